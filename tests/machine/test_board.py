# SPDX-License-Identifier: Apache-2.0
"""Boards, read from trees as they have them, and the table of what to install where."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from machines import MACHINES, ORIN_NANO, tree

from pgxport.machine.board import BOARDS, GIB, JETPACKS, SETUPS, advise, jetpack, look
from pgxport.machine.driver import Driver, Gpu
from pgxport.machine.memory import SystemMemory, available_memory, process_memory, system_memory

MIB = 1 << 20
ADA = Driver((13, 0), (Gpu("NVIDIA GeForce RTX 4090", (8, 9), 24 << 30, False),))


def test_an_orin_nano_of_jetpack_6(tmp_path: Path):
    found = look(tree(tmp_path, ORIN_NANO), arch="aarch64")
    assert found.model == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert (found.board, found.l4t, found.jetpack) == ("orin-nano-8gb", "36.4.3", "6.2")
    assert (found.driver, found.cuda, found.cudnn, found.tensorrt) == ("540.4.0", "12.6.11", "9.3.0", "10.3.0")
    assert found.vnni is None
    # The largest of buddyinfo's blocks is 2**10 pages of 4 KiB; two disks of zram, and no other swap.
    assert found.memory == SystemMemory(7802808 * 1024, 5606700 * 1024, 4 * MIB, 2 * 650228 * 1024, 0)


def test_a_thor_of_jetpack_7_with_its_memory_in_pieces(tmp_path: Path):
    found = look(tree(tmp_path, MACHINES["thor"]), arch="aarch64")
    assert (found.board, found.l4t, found.jetpack, found.tensorrt) == ("thor-128gb", "38.4.0", "7.1", "10.13.3")
    assert found.memory is not None
    assert (found.memory.block, found.memory.zram, found.memory.swap) == (8 * 4096, 0, 8388604 * 1024)


def test_a_desktop_and_a_server_are_no_boards(tmp_path: Path):
    desktop = look(tree(tmp_path / "d", MACHINES["desktop"]), arch="x86_64")
    assert (desktop.model, desktop.board, desktop.jetpack, desktop.driver) == (None, None, None, "580.65.06")
    assert desktop.vnni is False
    server = look(tree(tmp_path / "s", MACHINES["server"]), arch="x86_64")
    assert (server.driver, server.cuda, server.vnni) == (None, None, True)
    assert server.memory is not None
    assert server.memory.block is None


def test_nothing_to_read_is_nothing_found(tmp_path: Path):
    found = look(tmp_path, arch="x86_64")
    assert set(vars(found).values()) == {"x86_64", None}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("etc/nv_tegra_release", "garbage"), ("proc/meminfo", "MemTotal: lots"), ("usr/local/cuda/version.json", "[1]"),
        ("usr/local/cuda/version.json", "{"), ("proc/buddyinfo", "Node 0, zone"), ("proc/swaps", "\n\n"),
        ("proc/driver/nvidia/version", ""), ("proc/cpuinfo", "\ufffd"),
    ],
)  # fmt: skip
def test_files_of_another_form_are_not_believed(tmp_path: Path, file: str, text: str):
    look(tree(tmp_path, {**ORIN_NANO, file: text}))


@pytest.mark.parametrize(
    ("release", "expected"),
    [
        ("35.4.1", "5"), ("36.3.0", "6.0"), ("36.4.0", "6.1"), ("36.4.4", "6.2"), ("36.5.0", "6.2"), ("38.2.1", "7.0"),
        ("38.4.0", "7.1"), ("39.2.0", "7.2"), ("32.7.4", None), ("360.1", None), (None, None),
    ],
)  # fmt: skip
def test_jetson_linux_belongs_to_a_jetpack(release: str | None, expected: str | None):
    assert jetpack(release) == expected


@pytest.mark.parametrize(("gib", "board"), [(29.9, "agx-orin-32gb"), (61.3, "agx-orin-64gb"), (90.0, None)])
def test_two_modules_of_one_name_are_told_apart_by_memory(tmp_path: Path, gib: float, board: str | None):
    files = {
        **ORIN_NANO, "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
        "proc/meminfo": f"MemTotal: {int(gib * MIB)} kB\nMemAvailable: 1 kB\n",
    }  # fmt: skip
    assert look(tree(tmp_path, files)).board == board


def test_a_boards_name_tells_its_memory():
    for name, board in BOARDS.items():
        assert board.name == name
        assert name.endswith(f"-{board.memory // GIB}gb")
    of_one_model = [(board.model, board.memory) for board in BOARDS.values() if board.model]
    assert len(set(of_one_model)) == len(of_one_model)


@pytest.mark.parametrize(
    ("machine", "driver", "row", "trt"),
    [
        ("orin-nano", Driver((12, 6), (Gpu("Orin", (8, 7), 8 << 30, True),)), "JetPack 6.1 and 6.2", "10.3"),
        ("thor", Driver((13, 0), (Gpu("NVIDIA Thor", (11, 0), 128 << 30, True),)), "JetPack 7.0 and 7.1", "10.3"),
        ("desktop", ADA, "GPU of Ada, Hopper, Blackwell", "11"),
        ("desktop", None, "no NVIDIA GPU", None),
        ("server", None, "no NVIDIA GPU", None),
    ],
)
def test_each_machine_has_its_row(tmp_path: Path, machine: str, driver: Driver | None, row: str, trt: str | None):
    found = advise(look(tree(tmp_path, MACHINES[machine])), driver)
    assert (found.name, found.trt) == (row, trt)


@pytest.mark.parametrize(
    ("sm", "row"),
    [
        ((12, 0), "GPU of Ada, Hopper, Blackwell"), ((9, 0), "GPU of Ada, Hopper, Blackwell"), ((8, 6), "GPU of Ampere"),
        ((7, 5), "GPU of Turing"), ((7, 0), "older GPU"), ((6, 1), "older GPU"),
    ],
)  # fmt: skip
def test_a_gpu_has_its_row(tmp_path: Path, sm: tuple[int, int], row: str):
    assert advise(look(tmp_path), Driver((13, 0), (Gpu("x", sm, 1, False),))).name == row


@pytest.mark.parametrize("of", sorted(set(JETPACKS.values())))
@pytest.mark.parametrize("model", ["NVIDIA Jetson AGX Thor Developer Kit", "NVIDIA Jetson AGX Orin Developer Kit"])
def test_every_jetpack_has_a_row(tmp_path: Path, of: str, model: str):
    row = advise(replace(look(tmp_path), jetpack=of, l4t="x", model=model), None)
    assert row.jetpacks
    if row.name.startswith("JetPack 7.2"):
        assert ("Thor" in model) == ("Thor" in row.name)


def test_a_row_promises_only_what_can_be_written_for_it():
    pytest.importorskip("onnx_ir")
    from pgxport.exporter.targets import CPU, CUDA, TENSORRT

    for row in SETUPS:
        assert (row.trt is None) == (row.tensorrt in ("8.5", "8.6", "none"))
        for precision in row.precisions:
            targets = [TENSORRT[row.trt]] if row.trt else [CPU]  # type: ignore[index]
            if "GPU of" in row.name and precision == "int8":
                targets = [CUDA]
            for target in targets:
                target.check(target.recipe(precision))


def test_nothing_of_a_row_is_out_of_a_gpus_reach():
    """FP8 begins with Ada (8.9), bfloat16 with Ampere (8.0): NVIDIA's table of compute capabilities. Orin is 8.7, Thor 11.0."""
    for row in SETUPS:
        sm = row.sm if row.sm != (0, 0) else (11, 0) if "Thor" in row.name or row.jetpacks == ("7",) else (8, 7)
        assert "fp8" not in row.precisions or sm >= (8, 9), row
        assert "bf16" not in row.precisions or sm >= (8, 0), row


def test_the_rows_commands_name_this_package():
    assert all(any("pgxport" in command for command in row.commands) for row in SETUPS if row.commands)


def test_the_memory_of_this_machine_is_what_the_kernel_says():
    import os

    here = system_memory()
    if here is None:
        pytest.skip("no /proc/meminfo")
    assert here.total == pytest.approx(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), rel=0.02)
    available = available_memory()
    assert available
    assert 0 < available <= here.total
    held = process_memory()
    assert held
    assert 0 < held.private < held.resident < here.total
    assert process_memory(1 << 30) is None


DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["jetson.md", "gpu.md"])
def test_commands_of_the_pages_are_commands(page: str):
    click = pytest.importorskip("click")
    if not (DOCS / page).exists():
        pytest.skip("docs/ is not beside the tests")
    from pgxport.cli import cli

    lines = [line.partition("  #")[0] for line in (DOCS / page).read_text().splitlines() if line.startswith("pgx ")]
    assert len(lines) > 4
    for line in lines:
        _, name, *args = shlex.split(line)
        with click.Context(cli) as context:
            assert cli.get_command(context, name), line
            cli.get_command(context, name).make_context(name, args, parent=context)


def test_the_page_says_what_the_table_does():
    if not (DOCS / "jetson.md").exists():
        pytest.skip("docs/ is not beside the tests")
    page = (DOCS / "jetson.md").read_text()
    for row in SETUPS:
        if row.jetpacks and row.trt:
            told = f"| {row.tensorrt} | `--trt {row.trt}` | {', '.join(row.precisions)} |"
            assert told in page, row.name
        for command in row.commands if row.jetpacks else ():
            package = command.partition('"tensorrt')[2].strip('"')
            assert package.rpartition("==")[2] in page
