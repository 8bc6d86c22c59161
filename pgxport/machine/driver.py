# SPDX-License-Identifier: Apache-2.0
"""The NVIDIA driver and its GPUs, read through libcuda alone: no toolkit, no package, no memory of a GPU.

Codes and attributes are those of CUresult and CUdevice_attribute in cuda.h.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pgxport.errors import EngineError

LIBRARY = "libcuda.so.1"
MAJOR, MINOR, INTEGRATED = 75, 76, 18  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*, CU_DEVICE_ATTRIBUTE_INTEGRATED
REFUSALS = {
    34: "libcuda is a stub of the toolkit, not a driver; take the stubs folder out of LD_LIBRARY_PATH",
    35: "the driver is older than this libcuda; update the driver",
    100: "there is no NVIDIA GPU; in a container, start it with --gpus all (--runtime nvidia on a Jetson)",
    803: "the driver and libcuda are of different versions; restart the machine after a driver update",
    804: "this GPU does not support the forward-compatibility libraries; take the compat folder out of LD_LIBRARY_PATH",
    999: "the driver does not start; see what the kernel says of nvidia (dmesg)",
}

Load = Callable[[str], Any]


@dataclass(frozen=True)
class Gpu:
    """One device, numbered as CUDA does."""

    name: str
    sm: tuple[int, int]  # compute capability
    memory: int  # bytes; of an integrated GPU the system's
    integrated: bool  # one memory for CPU and GPU, as on a Jetson


@dataclass(frozen=True)
class Driver:
    """The driver: what it runs, and its GPUs."""

    cuda: tuple[int, int]  # the newest CUDA that it runs
    gpus: tuple[Gpu, ...]


def ask_driver(load: Load = ctypes.CDLL) -> Driver:
    """Read the driver's version and its GPUs.

    Raises:
        EngineError: there is no driver, no GPU, or it does not start.
    """
    try:
        library = load(LIBRARY)
    except OSError as error:
        raise EngineError(f"there is no NVIDIA driver here ({error}); install one, or use --engine cpu") from error
    if code := library.cuInit(0):
        reason = REFUSALS.get(code, "see cuda.h for the code")
        raise EngineError(f"the NVIDIA driver refuses to start, CUDA error {code}: {reason}")
    version = _number(library.cuDriverGetVersion)
    count = _number(library.cuDeviceGetCount)
    return Driver((version // 1000, version % 1000 // 10), tuple(_gpu(library, i) for i in range(count)))


def missing_libraries(names: tuple[str, ...], load: Load = ctypes.CDLL) -> list[str]:
    """The loader's reason for each of the libraries that cannot be loaded."""
    missing = []
    for name in names:
        try:
            load(name)
        except OSError as error:
            missing.append(str(error))
    return missing


def _gpu(library: Any, index: int) -> Gpu:
    device = ctypes.c_int(_number(library.cuDeviceGet, index))
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    library.cuDeviceGetName(name, 256, device)
    library.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    major, minor, integrated = (_number(library.cuDeviceGetAttribute, what, device) for what in (MAJOR, MINOR, INTEGRATED))
    return Gpu(name.value.decode(errors="replace"), (major, minor), memory.value, bool(integrated))


def _number(call: Any, *args: Any) -> int:
    """The number that a call writes to its first parameter."""
    value = ctypes.c_int()
    if code := call(ctypes.byref(value), *args):
        raise EngineError(
            f"the NVIDIA driver answers a question with CUDA error {code}; restart the machine, or update the driver"
        )
    return value.value
