# SPDX-License-Identifier: Apache-2.0
"""How much GPU memory a process holds, as NVML tells it of each process; nothing where it does not.

Engines keep what they once took, so that what a process holds after its work is the most it held. In a container NVML may name
processes by the host's numbers; a process that it does not name is not measured.
"""

from typing import Any


class Vram:
    """A look at all GPUs of this machine."""

    def __init__(self, library: Any):
        """
        Raises:
            NVMLError of the library: there is no driver.
        """
        self._library = library
        library.nvmlInit()
        self._gpus = [library.nvmlDeviceGetHandleByIndex(i) for i in range(library.nvmlDeviceGetCount())]

    def held_by(self, process: int) -> int | None:
        """Bytes on all GPUs together; None where no GPU knows the process, or tells how much it holds."""
        found = [p.usedGpuMemory for gpu in self._gpus for p in self._running(gpu) if p.pid == process]
        return None if not found or None in found else sum(found)

    def close(self) -> None:
        self._library.nvmlShutdown()

    def _running(self, gpu: Any) -> list[Any]:
        try:
            return list(self._library.nvmlDeviceGetComputeRunningProcesses(gpu))
        except self._library.NVMLError:  # as on boards, and on GPUs that are shared out
            return []


def find_vram(engine: str) -> Vram | None:
    """None where the engine runs on no GPU, nvidia-ml-py is not installed, or there is no driver."""
    if engine == "cpu":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        return Vram(pynvml)
    except pynvml.NVMLError:
        return None
