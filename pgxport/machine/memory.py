# SPDX-License-Identifier: Apache-2.0
"""Memory of the system and of a process, as Linux's /proc tells it. All sizes are bytes."""

import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PAGE = 4096


@dataclass(frozen=True)
class SystemMemory:
    """The memory of this machine."""

    total: int
    available: int
    block: int | None  # the largest free one, which some of a Jetson's drivers need; None where not told
    zram: int
    swap: int  # on disks and in files


@dataclass(frozen=True)
class ProcessMemory:
    """The resident memory of a process: private (anonymous), and mapped files, which the kernel can drop.

    In a peak each is its own highest, so that the two may add up to more than `resident`.
    """

    private: int
    mapped: int
    resident: int


def system_memory(root: Path = Path("/")) -> SystemMemory | None:
    """The memory of the system, from meminfo, buddyinfo and swaps of /proc; None without meminfo."""
    kilobytes = dict(re.findall(r"^(\w+):\s+(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE))
    if not {"MemTotal", "MemAvailable"} <= set(kilobytes):
        return None
    # A line a zone: "Node 0, zone   Normal   9600   5890 ...", free blocks of 1, 2, 4, ... pages.
    zones = [line.split("zone", 1)[1].split()[1:] for line in _text(root / "proc/buddyinfo").splitlines() if "zone" in line]
    free = [order for zone in zones for order, count in enumerate(zone) if count != "0"]
    swaps = [line.split() for line in _text(root / "proc/swaps").splitlines()[1:] if len(line.split()) >= 3]
    zram, swap = (
        sum(int(size) << 10 for name, _, size, *_ in swaps if name.startswith("/dev/zram") == compressed)
        for compressed in (True, False)
    )
    total, available = (int(kilobytes[name]) << 10 for name in ("MemTotal", "MemAvailable"))
    return SystemMemory(total, available, PAGE << max(free) if free else None, zram, swap)


def available_memory() -> int | None:
    """Bytes of memory that a program can still take; None where the system does not tell."""
    memory = system_memory()
    return memory.available if memory else None


def process_memory(pid: int | None = None, *, peak: bool = False) -> ProcessMemory | None:
    """What a process has resident now, this one by default.

    Args:
        peak: Give the highest `resident` since its start instead of the one of now.

    Returns:
        None where the process is gone or the system has no /proc.
    """
    lines = (line.partition(":") for line in _text(Path(f"/proc/{pid or 'self'}/status")).splitlines())
    held = {key: int(value.split()[0]) << 10 for key, _, value in lines if value.endswith(" kB")}
    if "RssAnon" not in held:  # it has died, or the kernel is older than 4.5
        return None
    return ProcessMemory(held["RssAnon"], held["RssFile"] + held["RssShmem"], held["VmHWM" if peak else "VmRSS"])


def forget_peak() -> None:
    """Let the kernel begin again with the highest resident memory of this process, where it can."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """The most memory that this process has had resident, in bytes, on any Unix."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak << 10


def _text(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(errors="replace")
    return ""
