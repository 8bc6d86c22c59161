# SPDX-License-Identifier: Apache-2.0
"""Checked calls of CUDA's runtime, and memory that grows. Receives the module; knows no engine."""

import ctypes
from types import ModuleType
from typing import Any

import numpy as np

from pgxport.errors import EngineError, NumericError, PgxError

OUT_OF_MEMORY, NO_DEVICE = 2, 100  # cudaErrorMemoryAllocation, cudaErrorNoDevice
# After these codes nothing more works in this process: a kernel failed or ran too long, or the hardware
# failed.
LOST = {214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719}
REMEDIES = {
    35: "update the driver, or install a CUDA that it knows",  # cudaErrorInsufficientDriver
    NO_DEVICE: "this process sees no GPU; in a container, pass it in",
}
ALIGNMENT = 256  # bytes, of every address that an engine gets


class Cuda:
    """CUDA's runtime on device 0.

    Attributes:
        lost: The device no longer answers this process; the driver frees what was allocated.
    """

    def __init__(self, cudart: ModuleType):
        self._cudart = cudart
        self.lost = False
        kinds = cudart.cudaMemcpyKind
        self.up, self.down = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self.across = kinds.cudaMemcpyDeviceToDevice

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the runtime; the result is nothing, one value, or a tuple of several.

        Raises:
            NumericError: there is not enough memory.
            EngineError: the call fails otherwise; the message names the call and the code.
        """
        try:
            code, *values = getattr(self._cudart, name)(*args)
        except RuntimeError as error:  # cuda-python 12.6 has no code for a driver that is not there
            raise EngineError(f"{name} cannot be called: {error}; is there an NVIDIA driver? {REMEDIES[NO_DEVICE]}") from error
        if int(code) != 0:
            raise self._error(name, code, args)
        return values[0] if len(values) == 1 else tuple(values)

    def free(self, name: str, handle: Any) -> None:
        """Free what `call` allocated; once the device is lost there is nothing to free."""
        if not self.lost:
            self.call(name, handle)

    def abandon_capture(self, stream: Any) -> None:
        """End a capture that failed, and keep nothing of it, whether it ends with a graph or an error."""
        code, *graph = self._cudart.cudaStreamEndCapture(stream)
        if int(code) == 0:
            self.free("cudaGraphDestroy", graph[0])

    def attribute(self, name: str) -> int:
        """An attribute of device 0, as "ComputeCapabilityMajor" or "Integrated"."""
        return int(self.call("cudaDeviceGetAttribute", getattr(self._cudart.cudaDeviceAttr, f"cudaDevAttr{name}"), 0))

    def capture_mode(self) -> Any:
        """The mode in which only this thread's calls may break a capture."""
        return self._cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal

    def _error(self, name: str, code: Any, args: tuple[Any, ...]) -> PgxError:
        what = f"{name} failed with {getattr(code, 'name', 'code')} ({int(code)})"
        if int(code) == OUT_OF_MEMORY:
            asked = f" of {int(args[0]) / 1e6:.0f} MB" if name.startswith(("cudaMalloc", "cudaHostAlloc")) else ""
            return NumericError(f"not enough memory on the device: {what}{asked}; close other programs, or ask for fewer tokens")
        self.lost = self.lost or int(code) in LOST
        fix = (
            "the device is lost to this process: start it again, and see dmesg" if self.lost else "see CUDA's list of error codes"
        )
        return EngineError(f"{what}; {REMEDIES.get(int(code), fix)}")


class CudaMemory:
    """Device memory, or pinned memory of the host, that grows on demand and then loses its contents."""

    def __init__(self, cuda: Cuda, *, pinned: bool = False):
        self._cuda = cuda
        self._allocate, self._free = ("cudaMallocHost", "cudaFreeHost") if pinned else ("cudaMalloc", "cudaFree")
        self._pinned = pinned
        self.address = self.nbytes = 0
        self.bytes: np.ndarray = np.empty(0, np.uint8)  # of pinned memory, as the host sees it

    def grow(self, nbytes: int) -> bool:
        """Hold at least `nbytes` bytes; True if the memory moved."""
        if nbytes <= self.nbytes:
            return False
        self.free()
        self.address = int(self._cuda.call(self._allocate, nbytes))
        self.nbytes = nbytes
        if self._pinned:
            self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))
        return True

    def free(self) -> None:
        """Free the memory; `grow` makes new."""
        address, self.address, self.nbytes, self.bytes = self.address, 0, 0, np.empty(0, np.uint8)
        if address:
            self._cuda.free(self._free, address)


def aligned(nbytes: int) -> int:
    """The next multiple of ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
