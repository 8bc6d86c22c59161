# SPDX-License-Identifier: Apache-2.0
"""NVIDIA's GPUs as NVML, the driver's own library, describes them: clocks, energy, and memory by process.

The library comes with the driver; a Jetson's holds a part of it. What a GPU does not tell is None or left
out. Functions, structures and constants are those of nvml.h.
"""

import ctypes
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

LIBRARY = "libnvidia-ml.so.1"
# nvmlClocksEventReasons without idleness and without the clocks that somebody chose.
REASONS = {
    0x04: "GPU at its power limit", 0x08: "GPU slowed by its hardware", 0x20: "GPU slowed by heat", 0x40: "GPU slowed by heat",
    0x80: "GPU slowed by its power supply",
}  # fmt: skip
SM_CLOCK = 1  # NVML_CLOCK_SM
INSUFFICIENT_SIZE = 7  # NVML_ERROR_INSUFFICIENT_SIZE
NOT_AVAILABLE = (1 << 64) - 1  # NVML_VALUE_NOT_AVAILABLE


class ProcessInfo(ctypes.Structure):
    """nvmlProcessInfo_t since version 2 of the call."""

    _fields_ = (
        ("pid", ctypes.c_uint),
        ("used_gpu_memory", ctypes.c_ulonglong),
        ("gpu_instance_id", ctypes.c_uint),
        ("compute_instance_id", ctypes.c_uint),
    )


class Nvml:
    """All GPUs of this machine, until `close`."""

    def __init__(self, library: Any):
        """
        Raises:
            OSError: NVML does not start.
            AttributeError: the library lacks what every NVML has.
        """
        self._library, self._gpus = library, list[ctypes.c_void_p]()
        if code := library.nvmlInit_v2():
            raise OSError(f"NVML does not start, error {code}")
        count = ctypes.c_uint()
        library.nvmlDeviceGetCount_v2(ctypes.byref(count))
        for i in range(count.value):
            gpu = ctypes.c_void_p()
            if not library.nvmlDeviceGetHandleByIndex_v2(i, ctypes.byref(gpu)):
                self._gpus.append(gpu)

    def clock_mhz(self) -> float | None:
        """The highest clock of any GPU now, in MHz."""
        clocks = (self._number("nvmlDeviceGetClockInfo", ctypes.c_uint, gpu, SM_CLOCK) for gpu in self._gpus)
        return max((float(mhz) for mhz in clocks if mhz is not None), default=None)

    def slowed_by(self) -> tuple[str, ...]:
        """What slows any of the GPUs now, but for idleness and chosen clocks."""
        # The name that old and new drivers have.
        name = "nvmlDeviceGetCurrentClocksThrottleReasons"
        reasons = [self._number(name, ctypes.c_ulonglong, gpu) or 0 for gpu in self._gpus]
        return tuple(dict.fromkeys(text for bit, text in REASONS.items() if any(bits & bit for bits in reasons)))

    def millijoules(self) -> list[int]:
        """The energy of each GPU that counts it (Volta and later), in mJ since the driver was loaded."""
        counters = (self._number("nvmlDeviceGetTotalEnergyConsumption", ctypes.c_ulonglong, gpu) for gpu in self._gpus)
        return [counter for counter in counters if counter is not None]

    def held_by(self, process: int) -> int | None:
        """Bytes of GPU memory that a process holds on all GPUs together.

        Engines keep what they once took, so what a process holds after its work is the most it held. NVML may
        name the processes of a container by the host's numbers.

        Returns:
            None where no GPU knows the process, or one does not tell how much it holds.
        """
        held = [used for gpu in self._gpus for pid, used in self._processes(gpu) if pid == process]
        return None if not held or NOT_AVAILABLE in held else sum(held)

    def close(self) -> None:
        """Release the library; nothing can be read afterwards."""
        self._library.nvmlShutdown()

    def _number(self, name: str, kind: Any, gpu: ctypes.c_void_p, *args: int) -> int | None:
        """The number that a call writes to its last parameter."""
        value, call = kind(), getattr(self._library, name, None)
        return None if call is None or call(gpu, *args, ctypes.byref(value)) else value.value

    def _processes(self, gpu: ctypes.c_void_p) -> Iterator[tuple[int, int]]:
        """Number and bytes of each process that computes on a GPU; none on boards and on shared GPUs."""
        call = getattr(self._library, "nvmlDeviceGetComputeRunningProcesses_v3", None)
        count = ctypes.c_uint(0)
        if call is None or call(gpu, ctypes.byref(count), None) != INSUFFICIENT_SIZE:
            return
        count.value = 2 * count.value + 5  # more may start between the calls
        processes = (ProcessInfo * count.value)()
        if not call(gpu, ctypes.byref(count), processes):
            yield from ((info.pid, info.used_gpu_memory) for info in processes[: count.value])


def find_nvml(engine: str) -> Nvml | None:
    """NVML, where the engine runs on a GPU and the driver brings it; None elsewhere."""
    if engine != "cpu":
        with suppress(OSError, AttributeError):
            return Nvml(ctypes.CDLL(LIBRARY))
    return None
