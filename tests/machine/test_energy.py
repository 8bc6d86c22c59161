# SPDX-License-Identifier: Apache-2.0
"""Joules and clocks, read from trees as machines have them."""

import ctypes
from pathlib import Path
from typing import Any

import pytest
from fake_nvml import FakeGpu, FakeNvml
from machines import MACHINES
from machines import tree as machine
from made_up_report import device, row

from pgxport.machine.clocks import look, power_mode
from pgxport.machine.energy import Ina3221, NvmlMeter, Rapl, find_meters, ina3221_rails, rapl_zones
from pgxport.machine.nvml import Nvml
from pgxport.reporting.environment import settings
from pgxport.reporting.schema import Board
from pgxport.reporting.tables import environment


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content + "\n")
    return root


# As on a Xeon with two sockets, each with a DRAM zone below it, and the platform's own counter.
XEON = {
    "class/powercap/intel-rapl:0/name": "package-0",
    "class/powercap/intel-rapl:0/energy_uj": "1000000",
    "class/powercap/intel-rapl:0/max_energy_range_uj": "262143328850",
    "class/powercap/intel-rapl:0:0/name": "dram",
    "class/powercap/intel-rapl:0:0/energy_uj": "77",
    "class/powercap/intel-rapl:0:0/max_energy_range_uj": "65712999613",
    "class/powercap/intel-rapl:1/name": "package-1",
    "class/powercap/intel-rapl:1/energy_uj": "5000000",
    "class/powercap/intel-rapl:1/max_energy_range_uj": "262143328850",
    "class/powercap/intel-rapl:2/name": "psys",
    "class/powercap/intel-rapl:2/energy_uj": "9",
    "class/powercap/intel-rapl:2/max_energy_range_uj": "262143328850",
}
# As on a Jetson Orin Nano with JetPack 6: rail 4 is a sum that has no current of its own.
ORIN = {
    f"bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1/{name}": value
    for name, value in {
        "in1_label": "VDD_IN", "in1_input": "5000", "curr1_input": "1200", "in2_label": "VDD_CPU_GPU_CV", "in2_input": "5000",
        "curr2_input": "400", "in3_label": "VDD_SOC", "in3_input": "5000", "curr3_input": "300", "in4_label": "sum of shunt voltages",
    }.items()
}  # fmt: skip
# As on a Jetson Nano with JetPack 4, where the driver is an iio device.
NANO = {
    f"bus/i2c/drivers/ina3221x/6-0040/iio:device0/{name}": value
    for name, value in {
        "rail_name_0": "POM_5V_IN", "in_voltage0_input": "5120", "in_current0_input": "500", "rail_name_1": "POM_5V_GPU",
        "in_voltage1_input": "5120", "in_current1_input": "40",
    }.items()
}  # fmt: skip


def test_rapl_adds_up_the_packages_alone(tmp_path: Path):
    zones = rapl_zones(tree(tmp_path, XEON))
    assert [zone.name for zone in zones] == ["intel-rapl:0", "intel-rapl:1"]
    meter = Rapl(zones)
    tree(tmp_path, {"class/powercap/intel-rapl:0/energy_uj": "3500000", "class/powercap/intel-rapl:1/energy_uj": "5500000"})
    assert meter.joules() == pytest.approx(3.0)
    assert meter.source == "RAPL, 2 packages"


def test_a_rapl_counter_that_begins_again_loses_nothing(tmp_path: Path):
    one = {name: value for name, value in XEON.items() if "rapl:0/" in name} | {
        "class/powercap/intel-rapl:0/energy_uj": "262143000000"
    }
    meter = Rapl(rapl_zones(tree(tmp_path, one)))
    tree(tmp_path, {"class/powercap/intel-rapl:0/energy_uj": "671150"})
    assert meter.joules() == pytest.approx(1.0)


def test_a_counter_only_root_may_read_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tree(tmp_path, XEON)
    read = Path.read_text

    def refused(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refused)
    assert find_meters(tmp_path) == []


@pytest.mark.parametrize(("files", "rail", "watts"), [(ORIN, "VDD_IN", 6.0), (NANO, "POM_5V_IN", 2.56)])
def test_a_jetsons_whole_board_is_one_rail(tmp_path: Path, files: dict[str, str], rail: str, watts: float):
    now = [100.0]
    meter = Ina3221(ina3221_rails(tree(tmp_path, files)), clock=lambda: now[0])
    try:
        assert meter.source == f"INA3221, {rail}"
        assert meter.watts() == pytest.approx(watts)
        before = meter.joules()
        now[0] = 102.0
        assert meter.joules() - before == pytest.approx(2 * watts)
    finally:
        meter.close()


def test_rails_without_a_whole_are_added_up(tmp_path: Path):
    meter = Ina3221(ina3221_rails(tree(tmp_path, {name: v.replace("VDD_IN", "VDD_GPU_SOC") for name, v in ORIN.items()})))
    meter.close()
    assert meter.watts() == pytest.approx(5 * (1.2 + 0.4 + 0.3))


def test_the_rails_of_an_agx_orin_are_three_that_do_not_overlap(tmp_path: Path):
    """VIN_SYS_5V0 is the 5 V rail, of which VDDQ_VDD2_1V8AO is a part; NC is not connected (Jetson Linux Developer Guide)."""
    first = {
        "in1_label": "VDD_GPU_SOC", "in1_input": "20000", "curr1_input": "200", "in2_label": "VDD_CPU_CV", "in2_input": "20000",
        "curr2_input": "40", "in3_label": "VIN_SYS_5V0", "in3_input": "5000", "curr3_input": "900",
    }  # fmt: skip
    second = {
        "in1_label": "NC",
        "in1_input": "0",
        "curr1_input": "0",
        "in2_label": "VDDQ_VDD2_1V8AO",
        "in2_input": "5000",
        "curr2_input": "300",
    }
    files = {f"bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3/{name}": value for name, value in first.items()}
    files |= {f"bus/i2c/drivers/ina3221/1-0041/hwmon/hwmon4/{name}": value for name, value in second.items()}
    meter = Ina3221(ina3221_rails(tree(tmp_path, files)))
    meter.close()
    assert meter.source == "INA3221, VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0"
    assert meter.watts() == pytest.approx(20 * 0.2 + 20 * 0.04 + 5 * 0.9)


def test_a_thors_whole_board_is_an_ina238(tmp_path: Path):
    rails = ina3221_rails(machine(tmp_path, MACHINES["thor"]) / "sys")
    assert set(rails) == {"VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0", "VIN"}
    meter = Ina3221(rails)
    meter.close()
    assert (meter.source, meter.watts()) == ("INA3221, VIN", pytest.approx(23.4))
    del rails["VIN"]
    meter = Ina3221(rails)
    meter.close()
    assert meter.watts() == pytest.approx(12 * 0.2 + 12 * 0.5 + 5 * 1.3)


def test_an_ina238_of_another_machine_is_no_rail(tmp_path: Path):
    assert ina3221_rails(tree(tmp_path, {"class/hwmon/hwmon4/name": "ina238", "class/hwmon/hwmon4/power1_input": "1"})) == {}


def test_find_meters_tells_what_is_there(tmp_path: Path):
    meters = find_meters(tree(tmp_path, {**XEON, **ORIN}))
    assert [meter.source for meter in meters] == ["RAPL, 2 packages", "INA3221, VDD_IN"]
    for meter in meters:
        meter.close()
    assert find_meters(tmp_path / "nothing") == []


def two_gpus(**told: Any) -> FakeNvml:
    """The first tells what is given, the second nothing: as an H100 and a GeForce beside it."""
    return FakeNvml(FakeGpu(**told), FakeGpu())


def test_nvml_counts_the_gpus_that_can():
    library = two_gpus(millijoules=1_000)
    meter = NvmlMeter(Nvml(library))
    library.gpus[0].millijoules = 4_500
    assert meter.source == "NVML, 1 GPU"
    assert meter.joules() == pytest.approx(4.5)
    meter.close()
    assert library.open == 0


def test_gpus_without_a_counter_are_no_meter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    library = two_gpus()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert find_meters(tmp_path, engine="cuda") == []
    assert library.open == 0


def test_a_boards_rails_are_not_added_to_what_its_gpu_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As on Thor, whose driver counts the GPU's joules, which the board's input has as well."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: two_gpus(millijoules=1_000))

    def sources(root: Path) -> list[str]:
        meters = find_meters(root, engine="cuda")
        for meter in meters:
            meter.close()
        return [meter.source for meter in meters]

    assert sources(tree(tmp_path / "orin", ORIN)) == ["INA3221, VDD_IN"]
    assert sources(tree(tmp_path / "xeon", XEON)) == ["RAPL, 2 packages", "NVML, 1 GPU"]


def test_what_slows_a_gpu_is_noted_and_what_somebody_chose_is_not(tmp_path: Path):
    library = two_gpus(reasons=0x01, mhz=1980)  # idle
    nvml = Nvml(library)
    assert look(tmp_path, nvml).hot == ()
    # A chosen clock, the power limit, heat by software and by hardware.
    library.gpus[0].reasons, library.gpus[0].mhz = 0x02 | 0x04 | 0x20 | 0x40, 1200
    clocks = look(tmp_path, nvml)
    assert (clocks.gpu_mhz, clocks.hot) == (1200.0, ("GPU at its power limit", "GPU slowed by heat"))


def test_gpus_that_do_not_tell_slow_nothing(tmp_path: Path):
    clocks = look(tmp_path, Nvml(two_gpus()))
    assert (clocks.gpu_mhz, clocks.hot) == (None, ())


def test_clocks_are_read_as_linux_tells_them(tmp_path: Path):
    cores = {
        f"devices/system/cpu/cpu{i}/{name}": value
        for i, mhz in enumerate((1_800_000, 2_200_000))
        for name, value in {
            "cpufreq/scaling_cur_freq": str(mhz), "cpufreq/cpuinfo_max_freq": "3500000", "cpufreq/scaling_governor": "schedutil",
            "thermal_throttle/core_throttle_count": "4",
        }.items()
    }  # fmt: skip
    found = look(
        tree(tmp_path, {**cores, "class/thermal/thermal_zone0/temp": "41500", "class/thermal/thermal_zone1/temp": "63000"})
    )
    assert (found.governor, found.mhz, found.max_mhz, found.celsius, found.throttled) == ("schedutil", 2000.0, 3500.0, 63.0, 8)


def test_a_jetsons_clocks_are_its_gpus_too(tmp_path: Path):
    found = look(machine(tmp_path, MACHINES["orin-nano"]) / "sys")
    assert (found.governor, found.mhz, found.max_mhz) == ("schedutil", 1036.8, 1344.0)
    assert (found.gpu_mhz, found.gpu_max_mhz, found.emc_mhz) == (612.0, 918.0, None)  # the memory's is root's to read
    assert (found.celsius, found.throttled, found.held, found.hot) == (50.812, 7, False, ())


def test_jetson_clocks_holds_the_cores_and_the_gpu(tmp_path: Path):
    root = machine(tmp_path, MACHINES["thor"])
    found = look(root / "sys")
    assert (found.gpu_mhz, found.held, found.hot, found.throttled) == (1575.0, True, ("gpu-throttle-alert",), 821)
    machine(root, {"sys/class/devfreq/gpu-gpc-0/min_freq": "315000000"})
    assert look(root / "sys").held is False


def test_a_machine_that_is_no_jetson_holds_nothing(tmp_path: Path):
    files = {f"devices/system/cpu/cpu0/cpufreq/scaling_{which}_freq": "2000000" for which in ("min", "max")}
    assert look(tree(tmp_path, files)).held is None


@pytest.mark.parametrize(
    ("change", "mode"),
    [
        ({}, "25W (1)"),
        ({"var/lib/nvpmodel/status": "pmode:0002 fmode:quiet"}, "MAXN_SUPER (2)"),
        ({"var/lib/nvpmodel/status": "pmode:0009"}, "mode 9"),
        ({"var/lib/nvpmodel/status": ""}, None),
        ({"etc/nvpmodel.conf": "# < POWER_MODEL ID=1 NAME=OFF >\n"}, "mode 1"),
    ],
)
def test_the_power_mode_is_the_one_nvpmodel_wrote_down(tmp_path: Path, change: dict[str, str], mode: str | None):
    assert power_mode(machine(tmp_path, MACHINES["orin-nano"] | change)) == mode


def test_without_nvpmodel_there_is_no_power_mode(tmp_path: Path):
    assert power_mode(tmp_path) is None


def test_a_report_records_what_a_jetson_is_set_to(tmp_path: Path):
    root = machine(tmp_path, MACHINES["orin-nano"])
    board = settings(look(root / "sys"), root)
    assert board == Board(jetpack="6.2", l4t="36.4.3", power_mode="25W (1)", clocks_held=False, gpu_max_mhz=918.0, emc_mhz=None)
    assert settings(look(root / "sys"), machine(tmp_path / "server", MACHINES["server"])) is None


def test_a_reports_page_shows_it():
    plain = device(row("a"))
    assert "board" not in dict(environment(plain).rows)
    board = Board(jetpack="6.2", l4t="36.4.3", power_mode="25W (1)", clocks_held=True, gpu_max_mhz=918.0, emc_mhz=None)
    shown = plain.model_copy(update={"environment": plain.environment.model_copy(update={"board": board})})
    assert dict(environment(shown).rows)["board"] == (
        "JetPack 6.2 (Jetson Linux 36.4.3), power mode 25W (1), clocks held, GPU at most 918 MHz"
    )
