# SPDX-License-Identifier: Apache-2.0
"""Energy in joules, from RAPL counters, NVML's counter, or the INA3221 of a Jetson.

Each counts the whole device or board, other programs included. Readers take the root of the tree they read,
for tests.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Protocol

from pgxport.machine.nvml import Nvml, find_nvml

SAMPLE_SECONDS = 0.05  # between two reads of a sensor that tells watts; one takes some 50 µs
SYS = Path("/sys")


class Meter(Protocol):
    """A counter of joules since some moment; only differences mean anything."""

    source: str

    def joules(self) -> float: ...
    def close(self) -> None: ...


class Rapl:
    """The package counters of Intel and AMD processors, in µJ; each begins again at a limit of its own."""

    def __init__(self, zones: Sequence[Path]):
        self.source = f"RAPL, {len(zones)} package" + ("s" if len(zones) > 1 else "")
        self._zones = {zone: int((zone / "max_energy_range_uj").read_text()) for zone in zones}
        self._last = {zone: _number(zone / "energy_uj") for zone in zones}
        self._total = 0

    def joules(self) -> float:
        for zone, limit in self._zones.items():
            now = _number(zone / "energy_uj")
            moved = now - self._last[zone]
            self._total += moved if moved >= 0 else moved + limit
            self._last[zone] = now
        return self._total / 1e6

    def close(self) -> None:
        pass


class Ina3221:
    """The rails of a Jetson, added up over time: the whole board's, else those of the module, else all.

    The rails are NVIDIA's (Jetson Linux Developer Guide, "Power Monitor"). On AGX Orin and Thor, VIN_SYS_5V0
    is one of three that do not overlap, not their sum; Thor's VIN is an INA238 of its own.
    """

    WHOLE = (
        ("VIN",),
        ("VDD_IN",),
        ("POM_5V_IN",),
        ("5V_IN",),
        ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"),
        ("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"),
    )

    def __init__(self, rails: Mapping[str, Sequence[Path]], clock: Callable[[], float] = time.monotonic):
        names = next((whole for whole in self.WHOLE if set(whole) <= set(rails)), tuple(rails))
        self._rails = [rails[name] for name in names]
        self.source = f"INA3221, {' + '.join(names)}"
        self._clock, self._total, self._stop, self._lock = clock, 0.0, threading.Event(), threading.Lock()
        self._at, self._watts = clock(), self.watts()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def watts(self) -> float:
        return sum(prod(map(_number, files)) for files in self._rails) / 1e6

    def joules(self) -> float:
        with self._lock:
            now, watts = self._clock(), self.watts()
            self._total += (now - self._at) * (watts + self._watts) / 2
            self._at, self._watts = now, watts
            return self._total

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            with suppress(OSError, ValueError):
                self.joules()


class NvmlMeter:
    """The energy counters of NVIDIA's desktop and server GPUs (Volta and later)."""

    def __init__(self, nvml: Nvml):
        """
        Raises:
            OSError: no GPU has a counter.
        """
        count = len(nvml.millijoules())
        if not count:
            raise OSError("no GPU tells its energy")
        self._nvml, self.source = nvml, f"NVML, {count} GPU" + ("s" if count > 1 else "")

    def joules(self) -> float:
        return sum(self._nvml.millijoules()) / 1e3

    def close(self) -> None:
        self._nvml.close()


def find_meters(sys: Path = SYS, *, engine: str = "cpu") -> list[Meter]:
    """All meters that can be read here; the GPU's only where the engine runs on it and no rail has it."""
    meters, rails = list[Meter](), dict[str, tuple[Path, ...]]()
    with suppress(OSError, ValueError):
        if zones := rapl_zones(sys):
            meters.append(Rapl(zones))
    with suppress(OSError, ValueError):
        if rails := ina3221_rails(sys):
            meters.append(Ina3221(rails))
    if not rails and (nvml := find_nvml(engine)):
        try:
            meters.append(NvmlMeter(nvml))
        except OSError:
            nvml.close()
    return meters


def rapl_zones(sys: Path = SYS) -> list[Path]:
    """The packages whose counters this user may read; since Linux 5.10 only root may by default."""
    zones = sorted((sys / "class" / "powercap").glob("intel-rapl:[0-9]*"))
    packages = [z for z in zones if z.name.count(":") == 1 and _text(z / "name").startswith("package")]
    return [z for z in packages if _readable(z / "energy_uj") and _readable(z / "max_energy_range_uj")]


def ina3221_rails(sys: Path = SYS) -> dict[str, tuple[Path, ...]]:
    """The files of each rail whose product is µW: mV and mA of hwmon (JetPack 5 on) or iio (4), or µW."""
    rails: dict[str, tuple[Path, ...]] = {}
    for folder in sorted((sys / "bus" / "i2c" / "drivers" / "ina3221").glob("*/hwmon/hwmon*")):
        for label in sorted(folder.glob("in[0-9]*_label")):
            number = label.name[2:].partition("_")[0]
            rails |= _rail(_text(label), folder / f"in{number}_input", folder / f"curr{number}_input")
    for folder in sorted((sys / "bus" / "i2c" / "drivers" / "ina3221x").glob("*/iio:device*")):
        for label in sorted(folder.glob("rail_name_*")):
            number = label.name.rpartition("_")[2]
            rails |= _rail(_text(label), folder / f"in_voltage{number}_input", folder / f"in_current{number}_input")
    for name in sorted((sys / "class" / "hwmon").glob("hwmon*/name")):
        if _text(name) == "ina238" and rails:  # beside an INA3221 it is Thor's
            rails |= _rail("VIN", name.with_name("power1_input"))
    return rails


def _rail(name: str, *files: Path) -> dict[str, tuple[Path, ...]]:
    """The rail and its files; empty where a file cannot be read, or nothing is connected."""
    return {name: files} if name != "NC" and all(map(_readable, files)) else {}


def _readable(file: Path) -> bool:
    with suppress(OSError, ValueError):
        return _number(file) >= 0
    return False


def _number(file: Path) -> int:
    return int(file.read_text())


def _text(file: Path) -> str:
    with suppress(OSError):
        return file.read_text().strip()
    return ""
