# SPDX-License-Identifier: Apache-2.0
"""What a machine's clocks did meanwhile: frequencies, temperature, and how often it was throttled. None where it is not told."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SYS = Path("/sys")


@dataclass(frozen=True)
class Clocks:
    """One look."""

    governor: str | None  # what sets the frequency: "performance" holds it, "schedutil" does not
    mhz: float | None  # mean over cores, now
    max_mhz: float | None
    celsius: float | None  # of the hottest zone
    throttled: int | None  # times, since the machine started


def look(sys: Path = SYS) -> Clocks:
    """Read them now.

    >>> look(Path("/nonexistent"))
    Clocks(governor=None, mhz=None, max_mhz=None, celsius=None, throttled=None)
    """
    cores = sorted((sys / "devices" / "system" / "cpu").glob("cpu[0-9]*"))
    now = _numbers([core / "cpufreq" / "scaling_cur_freq" for core in cores])
    most = _numbers([core / "cpufreq" / "cpuinfo_max_freq" for core in cores])
    heat = _numbers(sorted((sys / "class" / "thermal").glob("thermal_zone*/temp")))
    throttled = _numbers([core / "thermal_throttle" / "core_throttle_count" for core in cores])
    governor = None
    with suppress(OSError, IndexError):
        governor = (cores[0] / "cpufreq" / "scaling_governor").read_text().strip()
    return Clocks(
        governor,
        sum(now) / len(now) / 1e3 if now else None,
        max(most) / 1e3 if most else None,
        max(heat) / 1e3 if heat else None,
        sum(throttled) if throttled else None,
    )


def _numbers(files: list[Path]) -> list[int]:
    found = []
    for file in files:
        with suppress(OSError, ValueError):
            found.append(int(file.read_text()))
    return found
