# SPDX-License-Identifier: Apache-2.0
"""The machine: board, JetPack, GPU libraries and memory, read from files; known boards, and what to install.

No command is run and nothing needs root. Every reader takes the root of the tree it reads, for tests.
"""

import json
import platform
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pgxport.machine.cpu import has_vnni
from pgxport.machine.driver import Driver
from pgxport.machine.memory import SystemMemory, system_memory

ROOT = Path("/")
GIB = 1 << 30

# Jetson Linux -> JetPack, the longest match counts (NVIDIA's JetPack archive; R39 is JetPack 7.2).
JETPACKS = {
    "35": "5", "36.2": "6.0", "36.3": "6.0", "36.4": "6.2", "36.4.0": "6.1", "36.5": "6.2", "38": "7.0", "38.2": "7.0",
    "38.4": "7.1", "39": "7.2",
}  # fmt: skip


@dataclass(frozen=True)
class BoardSpec:
    """A device that `pgx plan` knows: its memory, and what of it is not free for pgx, in bytes.

    Jetsons share one memory between CPU and GPU. The firmware reserves some of it (a module of 8 GB reports
    some 7.4 GiB), and a system without a desktop takes some more. On a graphics card it is the driver and a
    display. We measured neither.

    Attributes:
        name: As `pgx plan --board` calls it.
        model: A part of the device tree's model, which modules of two sizes share; None for a graphics card.
    """

    name: str
    memory: int
    reserved: int
    model: str | None = None

    @property
    def usable(self) -> int:
        """The memory that is free for pgx."""
        return self.memory - self.reserved

    @property
    def gpu_only(self) -> bool:
        """Whether the memory is a graphics card's alone."""
        return self.model is None


BOARDS = {
    board.name: board
    for board in (
        BoardSpec("orin-nano-8gb", 8 * GIB, int(1.5 * GIB), "Orin Nano"),
        BoardSpec("orin-nx-8gb", 8 * GIB, int(1.5 * GIB), "Orin NX"),
        BoardSpec("orin-nx-16gb", 16 * GIB, int(1.75 * GIB), "Orin NX"),
        BoardSpec("agx-orin-32gb", 32 * GIB, int(2.5 * GIB), "AGX Orin"),
        BoardSpec("agx-orin-64gb", 64 * GIB, int(3.5 * GIB), "AGX Orin"),
        BoardSpec("thor-128gb", 128 * GIB, int(6.5 * GIB), "AGX Thor"),
        *(BoardSpec(f"gpu-{n}gb", n * GIB, int(0.5 * GIB)) for n in (8, 12, 16, 24, 32, 48, 80, 96)),
    )
}


@dataclass(frozen=True)
class Host:
    """This machine as its files describe it; None for what is not there."""

    arch: str
    model: str | None  # of the device tree; None on most that are no boards
    board: str | None  # as `pgx plan --board` calls it
    l4t: str | None  # Jetson Linux, "36.4.3"
    jetpack: str | None
    driver: str | None  # NVIDIA's kernel module
    cuda: str | None  # toolkit
    cudnn: str | None
    tensorrt: str | None  # libnvinfer of the system; a package of pip's is another
    vnni: bool | None  # 8-bit products in hardware; None where that is no question
    memory: SystemMemory | None


def look(root: Path = ROOT, *, arch: str | None = None) -> Host:
    """Read all of it, from the tree below `root`."""
    model = _text(root / "proc/device-tree/model").strip("\0 \n") or None
    memory, release = system_memory(root), l4t(root)
    arch = arch or platform.machine()
    return Host(
        arch,
        model,
        _board(model, memory),
        release,
        jetpack(release),
        _kernel_module(root),
        _cuda(root),
        _library(root, "libcudnn.so"),
        _library(root, "libnvinfer.so"),
        has_vnni(root / "proc/cpuinfo", arch=arch),
        memory,
    )


def l4t(root: Path = ROOT) -> str | None:
    """The version of Jetson Linux, 36.4.3 of "# R36 (release), REVISION: 4.3, ..."; None elsewhere."""
    release = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", _text(root / "etc/nv_tegra_release"))
    return f"{release[1]}.{release[2]}" if release else None


def jetpack(release: str | None) -> str | None:
    """The JetPack that a Jetson Linux belongs to; a newer revision counts as the one before it.

    >>> jetpack("36.4.3"), jetpack("36.4.0"), jetpack("39.2"), jetpack("40.1")
    ('6.2', '6.1', '7.2', None)
    """
    fitting = [of for of in JETPACKS if release and f"{release}.".startswith(f"{of}.")]
    return JETPACKS[max(fitting, key=len)] if fitting else None


def _board(model: str | None, memory: SystemMemory | None) -> str | None:
    if model is None or memory is None:
        return None
    # Firmware keeps some: a module of 8 GB reports 7.4 GiB.
    fitting = [board for board in BOARDS.values() if board.model and board.model in model and memory.total <= board.memory]
    return min(fitting, key=lambda board: board.memory).name if fitting else None


def _kernel_module(root: Path) -> str | None:
    # "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build ..."
    version = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s", _text(root / "proc/driver/nvidia/version"))
    return version[1] if version else None


def _cuda(root: Path) -> str | None:
    with suppress(ValueError, KeyError, TypeError):
        return str(json.loads(_text(root / "usr/local/cuda/version.json"))["cuda"]["version"])
    return None


def _library(root: Path, name: str) -> str | None:
    """The version in the name of a library's file, as packages install it: libnvinfer.so.10.3.0."""
    folders = [root / "usr/lib" / kind for kind in ("aarch64-linux-gnu", "x86_64-linux-gnu")]
    files = [file.name for folder in folders for file in folder.glob(f"{name}.*")]
    versions = [match[1] for file in files if (match := re.fullmatch(rf"{re.escape(name)}\.(\d+\.\d+\.\d+)", file))]
    return max(versions, key=lambda v: [int(n) for n in v.split(".")]) if versions else None


def _text(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(errors="replace")
    return ""


@dataclass(frozen=True)
class Setup:
    """What to install on which machine; the first of the table that fits counts.

    Attributes:
        jetpacks: JetPacks by their beginning; empty: no Jetson.
        boards: A part of the device tree's model; empty: any.
        sm: The lowest compute capability, where there is no JetPack.
        tensorrt: The version that comes with it, or that is to be installed.
        trt: The flag of `pgx export --target tensorrt`; None: TensorRT is of no use there.
        precisions: Precisions worth trying, smallest last.
        commands: Commands to run, in order.
        note: A restriction or another way.
    """

    name: str
    jetpacks: tuple[str, ...]
    boards: tuple[str, ...]
    sm: tuple[int, int]
    tensorrt: str
    trt: str | None
    precisions: tuple[str, ...]
    commands: tuple[str, ...]
    note: str = ""


_BINDINGS = 'pip install "pgxport" cuda-python "tensorrt-cu13-bindings=={0}"'
_ORIN = ("fp16", "w8a8-static", "int4")
_GPU = ('pip install "pgxport[gpu]" "onnxruntime-gpu[cuda,cudnn]"', 'or, for TensorRT: pip install "pgxport[tensorrt]"')
# JetPack -> TensorRT: NVIDIA's JetPack archive. TensorRT 11 on Jetson: NVIDIA's "Migrating TensorRT from 10.x
# to 11.x on Jetson/JetPack".
SETUPS = (
    Setup(
        "JetPack 5", ("5",), (), (0, 0), "8.5", None, (), (),
        "its TensorRT is too old for every graph that pgx writes; flash JetPack 6.2, on Orin 7.2 too",
    ),
    Setup(
        "JetPack 6.0", ("6.0",), (), (0, 0), "8.6", None, (), (),
        "its TensorRT is too old; sudo apt full-upgrade to JetPack 6.2 without flashing",
    ),
    Setup(
        "JetPack 6.1 and 6.2", ("6",), (), (0, 0), "10.3", "10.3", _ORIN,
        ("pip install pgxport \"cuda-python~=12.6\"", "then TensorRT 10.3's Python bindings for your Python (docs/jetson.md)"),
        "TensorRT's bindings come for Python 3.10 alone, and pgx needs 3.11: docker/Dockerfile.jetpack6 builds them",
    ),
    Setup(
        "JetPack 7.2 on Thor", ("7.2",), ("Thor",), (0, 0), "10.16", "10.16", ("bf16", "fp8", "int4"),
        (_BINDINGS.format("10.16.1.11"),), "from JetPack 7.2.2 on, TensorRT 11.4.1 (SBSA) can be installed: then --trt 11",
    ),
    Setup(
        "JetPack 7.2 on Orin", ("7.2",), (), (0, 0), "10.16", "10.16", _ORIN,
        (_BINDINGS.format("10.16.1.11"),), "on AGX Orin from JetPack 7.2.2 on, TensorRT 11.4.1 (SBSA) can be installed: then --trt 11",
    ),
    Setup(
        "JetPack 7.0 and 7.1", ("7",), (), (0, 0), "10.13", "10.3", ("bf16", "fp8", "int4"),
        (_BINDINGS.format("10.13.3.9"),), "TensorRT 10.13 is older than 10.16, so it takes the graphs for 10.3",
    ),
    Setup("GPU of Ada, Hopper, Blackwell", (), (), (8, 9), "11", "11", ("bf16", "fp16", "fp8", "int4"), _GPU),
    Setup("GPU of Ampere", (), (), (8, 0), "11", "11", ("bf16", "fp16", "int8", "int4"), _GPU),
    Setup(
        "GPU of Turing", (), (), (7, 5), "11", "11", ("fp16", "int8", "int4"), _GPU,
        "it has no bfloat16",
    ),
    Setup(
        "older GPU", (), (), (0, 1), "none", None, (), ('pip install "pgxport[cpu]"',),
        "CUDA 13 and TensorRT begin with Turing, compute capability 7.5; run on the CPU",
    ),
    Setup("no NVIDIA GPU", (), (), (0, 0), "none", None, ("w8a8", "int4-fast", "fp32"), ('pip install "pgxport[export,cpu]"',)),
)  # fmt: skip


def advise(machine: Host, driver: Driver | None, setups: Iterable[Setup] = SETUPS) -> Setup:
    """The setup of a machine.

    >>> advise(look(Path("/nonexistent")), None).name
    'no NVIDIA GPU'
    """
    sm = max((gpu.sm for gpu in driver.gpus), default=(0, 0)) if driver else (0, 0)
    for setup in setups:
        release = any(f"{machine.jetpack}.".startswith(f"{of}.") for of in setup.jetpacks)
        if machine.jetpack is not None and release and all(part in (machine.model or "") for part in setup.boards):
            return setup
        if machine.jetpack is None and not setup.jetpacks and sm >= setup.sm:
            return setup
    raise AssertionError("Bug: the table's last row is for no GPU, and JetPacks that are not in it are not told")
