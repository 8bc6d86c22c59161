# SPDX-License-Identifier: Apache-2.0
"""What libcuda says, on a libcuda made up for it: codes and attributes are those of cuda.h."""

from typing import Any

import pytest

from pgxport.errors import EngineError
from pgxport.machine.driver import Driver, Gpu, ask_driver, missing_libraries

# CUdevice_attribute of cuda.h: COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR, INTEGRATED
ORIN = {75: 8, 76: 7, 18: 1}
ADA = {75: 8, 76: 9, 18: 0}


class Libcuda:
    """The functions of the driver API that are asked, with their signatures."""

    def __init__(self, *, version: int = 13020, init: int = 0, devices: tuple[tuple[str, int, dict[int, int]], ...] = ()):
        self.version, self.init, self.devices = version, init, devices

    def cuInit(self, flags: int) -> int:
        assert flags == 0
        return self.init

    def cuDriverGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.devices)
        return 0

    def cuDeviceGet(self, device: Any, index: int) -> int:
        device._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, length: int, device: Any) -> int:
        name.value = self.devices[device.value][0].encode()[: length - 1]
        return 0

    def cuDeviceTotalMem_v2(self, memory: Any, device: Any) -> int:
        memory._obj.value = self.devices[device.value][1]
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, device: Any) -> int:
        value._obj.value = self.devices[device.value][2][attribute]
        return 0


def test_a_gpu_tells_its_name_its_sm_and_whether_it_shares_the_memory():
    library = Libcuda(version=12060, devices=(("Orin", 7_990_194_176, ORIN),))
    assert ask_driver(lambda name: library) == Driver((12, 6), (Gpu("Orin", (8, 7), 7_990_194_176, True),))


def test_every_gpu_is_asked():
    library = Libcuda(devices=(("NVIDIA RTX 4090", 24 << 30, ADA), ("NVIDIA L4", 23 << 30, ADA)))
    found = ask_driver(lambda name: library)
    assert [(gpu.name, gpu.sm, gpu.integrated) for gpu in found.gpus] == [
        ("NVIDIA RTX 4090", (8, 9), False),
        ("NVIDIA L4", (8, 9), False),
    ]
    assert found.cuda == (13, 2)


@pytest.mark.parametrize(
    ("code", "says"), [(100, "--gpus all"), (34, "stub"), (803, "restart"), (35, "update the driver"), (7, "CUDA error 7")]
)
def test_a_driver_that_refuses_says_why(code: int, says: str):
    with pytest.raises(EngineError, match=says):
        ask_driver(lambda name: Libcuda(init=code))


def test_no_driver_is_said_so():
    def absent(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    with pytest.raises(EngineError, match=r"no NVIDIA driver here \(libcuda.so.1: cannot open"):
        ask_driver(absent)
    assert missing_libraries(("libcudnn.so.9",), absent) == ["libcudnn.so.9: cannot open shared object file"]


def test_libraries_that_load_are_not_missing():
    assert missing_libraries(("libc.so.6",)) == []
