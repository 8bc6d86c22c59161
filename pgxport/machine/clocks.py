# SPDX-License-Identifier: Apache-2.0
"""Clocks of this machine: frequencies, temperature, and how often it was throttled; None where not told.

Files of a Jetson are those of the Jetson Linux Developer Guide, "Platform Power and Performance": devfreq for
the GPU, the counters of soctherm_oc for too much current, cooling devices named alerts for too much heat, and
the status of nvpmodel. Other GPUs of NVIDIA tell their clocks through NVML.
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pgxport.machine.nvml import Nvml

SYS = Path("/sys")
# 17000000.gpu on JetPack 6, 17000000.ga10b and .gv11b before; gpu-gpc-0 on Thor.
GPU_NODES = re.compile(r"(.+\.(gpu|ga10b|gv11b|gp10b)|gpu-gpc-\d+)")
# Readable by root alone on most systems.
EMC = ("kernel/debug/bpmp/debug/clk/emc/rate", "kernel/debug/clk/emc/clk_rate")


@dataclass(frozen=True)
class Clocks:
    """The clocks at one moment."""

    governor: str | None  # sets the frequency: "performance" holds it, "schedutil" does not
    mhz: float | None  # mean over cores, now
    max_mhz: float | None
    celsius: float | None  # of the hottest zone
    throttled: int | None  # times, since the machine started
    gpu_mhz: float | None = None  # of the GPU, now
    gpu_max_mhz: float | None = None  # in this power mode
    emc_mhz: float | None = None  # of a Jetson's memory, now
    held: bool | None = None  # jetson_clocks: the least is the most, for all cores and the GPU
    hot: tuple[str, ...] = ()  # the alerts that are on, and what slows other GPUs


def look(sys: Path = SYS, nvml: Nvml | None = None) -> Clocks:
    """Read the clocks now.

    >>> look(Path("/nonexistent")).mhz is None
    True
    """
    cores = sorted((sys / "devices" / "system" / "cpu").glob("cpu[0-9]*"))
    now = _numbers([core / "cpufreq" / "scaling_cur_freq" for core in cores])
    most = _numbers([core / "cpufreq" / "cpuinfo_max_freq" for core in cores])
    heat = _numbers(sorted((sys / "class" / "thermal").glob("thermal_zone*/temp")))
    throttled = _numbers([core / "thermal_throttle" / "core_throttle_count" for core in cores])
    throttled += _numbers(sorted((sys / "class" / "hwmon").glob("hwmon*/oc[0-9]_event_cnt")))
    nodes = [node for node in sorted((sys / "class" / "devfreq").glob("*")) if GPU_NODES.fullmatch(node.name)]
    gpu, gpu_most = (_numbers([node / f"{which}_freq" for node in nodes]) for which in ("cur", "max"))
    nvidia_mhz, slowed = (nvml.clock_mhz(), nvml.slowed_by()) if nvml else (None, ())
    emc = _numbers([sys / file for file in EMC])
    governors = _texts([core / "cpufreq" / "scaling_governor" for core in cores[:1]])
    return Clocks(
        governors[0] if governors else None,
        sum(now) / len(now) / 1e3 if now else None,
        max(most) / 1e3 if most else None,
        max(heat) / 1e3 if heat else None,
        sum(throttled) if throttled else None,
        max(gpu) / 1e6 if gpu else nvidia_mhz,
        max(gpu_most) / 1e6 if gpu_most else None,
        emc[0] / 1e6 if emc else None,
        _held(cores, nodes) if nodes else None,
        _alerts(sys) + slowed,
    )


def power_mode(root: Path = Path("/")) -> str | None:
    """The mode that nvpmodel was last set to, as "15W (0)"; None without nvpmodel, or never set."""
    status = _texts([root / "var" / "lib" / "nvpmodel" / "status"])  # pmode:0002
    mode = re.search(r"pmode:(\d+)", status[0]) if status else None
    if not mode:
        return None
    number = int(mode[1])
    # < POWER_MODEL ID=2 NAME=MAXN_SUPER >
    modes = _texts([root / "etc" / "nvpmodel.conf"])
    named = re.search(rf"^<\s*POWER_MODEL\s+ID={number}\s+NAME=(\S+)", modes[0], re.MULTILINE) if modes else None
    return f"{named[1]} ({number})" if named else f"mode {number}"


def _held(cores: Iterable[Path], nodes: Iterable[Path]) -> bool | None:
    """Whether the lowest frequency allowed is the highest one, for all cores and the GPU."""
    pairs = [(core / "cpufreq" / "scaling_min_freq", core / "cpufreq" / "scaling_max_freq") for core in cores]
    pairs += [(node / "min_freq", node / "max_freq") for node in nodes]
    limits = [_numbers(list(pair)) for pair in pairs]
    whole = [pair for pair in limits if len(pair) == 2]
    return all(least == most for least, most in whole) if whole else None


def _alerts(sys: Path) -> tuple[str, ...]:
    """The names of cooling devices that are alerts and whose state is not 0, as cpu-throttle-alert."""
    devices = sorted((sys / "class" / "thermal").glob("cooling_device*"))
    named = [(device, (_texts([device / "type"]) or [""])[0]) for device in devices]
    return tuple(name for device, name in named if name.endswith("-alert") and any(_numbers([device / "cur_state"])))


def _numbers(files: list[Path]) -> list[int]:
    numbers = []
    for text in _texts(files):
        with suppress(ValueError):
            numbers.append(int(text))
    return numbers


def _texts(files: list[Path]) -> list[str]:
    texts = []
    for file in files:
        with suppress(OSError, UnicodeDecodeError):
            texts.append(file.read_text().strip())
    return texts
