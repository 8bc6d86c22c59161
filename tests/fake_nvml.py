# SPDX-License-Identifier: Apache-2.0
"""A library made up after nvml.h: the calls that pgxport.machine.nvml makes, with their signatures and codes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

NOT_SUPPORTED = 3
INSUFFICIENT_SIZE = 7
NOT_AVAILABLE = (1 << 64) - 1


@dataclass
class FakeGpu:
    """What one GPU tells; None for what it does not."""

    millijoules: int | None = None
    reasons: int | None = None
    mhz: int | None = None
    processes: Sequence[tuple[int, int | None]] | None = None  # number and bytes


class FakeNvml:
    """libnvidia-ml with some GPUs; `open` counts the calls that started it and were not ended."""

    def __init__(self, *gpus: FakeGpu, init: int = 0):
        self.gpus, self.init, self.open = gpus, init, 0

    def nvmlInit_v2(self) -> int:
        self.open += not self.init
        return self.init

    def nvmlShutdown(self) -> int:
        self.open -= 1
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = len(self.gpus)
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, device: Any) -> int:
        device._obj.value = 100 + index
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, device: Any, value: Any) -> int:
        return self._tell(self.gpus[device.value - 100].millijoules, value)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, device: Any, value: Any) -> int:
        return self._tell(self.gpus[device.value - 100].reasons, value)

    def nvmlDeviceGetClockInfo(self, device: Any, which: int, value: Any) -> int:
        return self._tell(self.gpus[device.value - 100].mhz if which == 1 else None, value)

    def nvmlDeviceGetComputeRunningProcesses_v3(self, device: Any, count: Any, infos: Any) -> int:
        processes = self.gpus[device.value - 100].processes
        if processes is None:
            return NOT_SUPPORTED
        room, count._obj.value = count._obj.value, len(processes)
        if room < len(processes):
            return INSUFFICIENT_SIZE
        for i, (number, held) in enumerate(processes):
            infos[i].pid, infos[i].used_gpu_memory = number, NOT_AVAILABLE if held is None else held
        return 0

    def _tell(self, told: int | None, value: Any) -> int:
        if told is None:
            return NOT_SUPPORTED
        value._obj.value = told
        return 0
