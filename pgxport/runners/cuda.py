# SPDX-License-Identifier: Apache-2.0
"""Checked calls of CUDA's runtime, and memory that grows. Is handed the module; knows no engine."""

import ctypes
from types import ModuleType
from typing import Any

import numpy as np

from pgxport.errors import EngineError, NumericError, PgxError

OUT_OF_MEMORY, NO_DEVICE = 2, 100  # cudaErrorMemoryAllocation, cudaErrorNoDevice
# After these nothing more works in this process: a kernel failed or ran too long, the hardware reported an error.
LOST = {214, 220, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719}
REMEDIES = {
    35: "update the driver, or install a CUDA that it knows",  # cudaErrorInsufficientDriver
    NO_DEVICE: "this process sees no GPU; in a container, pass it in",
}
ALIGNMENT = 256  # of every address that an engine is given


class Cuda:
    """CUDA's runtime on device 0.

    Attributes:
        lost: The device no longer answers this process; what was allocated is the driver's to free.
    """

    def __init__(self, cudart: ModuleType):
        self._cudart = cudart
        self.lost = False
        kinds = cudart.cudaMemcpyKind
        self.up, self.down = kinds.cudaMemcpyHostToDevice, kinds.cudaMemcpyDeviceToHost
        self.across = kinds.cudaMemcpyDeviceToDevice

    def call(self, name: str, *args: Any) -> Any:
        """What the function gives: nothing, one value, or several.

        Raises:
            NumericError: there is not enough memory.
            EngineError: it fails otherwise; the message names the call and the code.
        """
        try:
            code, *values = getattr(self._cudart, name)(*args)
        except RuntimeError as error:  # cuda-python 12.6 has no code for a driver that is not there
            raise EngineError(f"{name} cannot be called: {error}; is there an NVIDIA driver? {REMEDIES[NO_DEVICE]}") from error
        if int(code) != 0:
            raise self._error(name, code, args)
        return values[0] if len(values) == 1 else tuple(values)

    def free(self, name: str, handle: Any) -> None:
        """Give back what `call` gave; once the device is lost there is nothing to give back."""
        if not self.lost:
            self.call(name, handle)

    def abandon_capture(self, stream: Any) -> None:
        """Leave a capture that failed; whether it ends with a graph or an error, nothing of it is kept."""
        code, *graph = self._cudart.cudaStreamEndCapture(stream)
        if int(code) == 0:
            self.free("cudaGraphDestroy", graph[0])

    def attribute(self, name: str) -> int:
        """As "ComputeCapabilityMajor" or "Integrated", of device 0."""
        return int(self.call("cudaDeviceGetAttribute", getattr(self._cudart.cudaDeviceAttr, f"cudaDevAttr{name}"), 0))

    def capture_mode(self) -> Any:
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


class Memory:
    """Device memory, or pinned memory of the host, that grows when more is asked for; what was in it is lost then."""

    def __init__(self, cuda: Cuda, *, pinned: bool = False):
        self._cuda = cuda
        self._allocate, self._free = ("cudaMallocHost", "cudaFreeHost") if pinned else ("cudaMalloc", "cudaFree")
        self._pinned = pinned
        self.address = self.nbytes = 0
        self.bytes: np.ndarray = np.empty(0, np.uint8)  # of the host

    def grow(self, nbytes: int) -> bool:
        """Hold at least so many bytes; True if it moved."""
        if nbytes <= self.nbytes:
            return False
        self.free()
        self.address = int(self._cuda.call(self._allocate, nbytes))
        self.nbytes = nbytes
        if self._pinned:
            self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(self.address))
        return True

    def free(self) -> None:
        address, self.address, self.nbytes, self.bytes = self.address, 0, 0, np.empty(0, np.uint8)
        if address:
            self._cuda.free(self._free, address)


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
