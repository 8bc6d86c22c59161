# SPDX-License-Identifier: Apache-2.0
"""The processor: its name, cores and instruction sets, and what engines have to know of them."""

import hashlib
import os
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
X86_64 = {"x86_64", "AMD64"}  # as Linux and Windows name it
# Instructions that add 8-bit products in 32 bits, as Linux names them. No processor has AMX for integers
# without one of the others.
VNNI = {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"}

# Instructions that decide how fast integers and bfloat16 are multiplied: Linux's names and the usual ones.
VECTORS = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx512_vnni": "VNNI", "avx_vnni": "VNNI", "avx512_bf16": "BF16", "amx_int8": "AMX",
    "asimd": "NEON", "asimddp": "dot product", "i8mm": "I8MM", "sve": "SVE", "bf16": "BF16",
}  # fmt: skip


def processor_name(cpuinfo: Path = CPUINFO) -> str:
    """The processor's name, or the architecture where the system tells no name."""
    names = [value.strip() for name, value in _fields(cpuinfo) if name.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()


def usable_cores() -> int | None:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def vectors(cpuinfo: Path = CPUINFO) -> str:
    """The instructions of all cores that multiply integers and bfloat16, as "AVX2, AVX-512, VNNI".

    >>> vectors(Path("/nonexistent"))
    'none known'
    """
    sets = [set(one.split()) for one in instruction_sets(cpuinfo)]
    common = set.intersection(*sets) if sets else set()
    return ", ".join(dict.fromkeys(name for flag, name in VECTORS.items() if flag in common)) or "none known"


def instruction_sets(cpuinfo: Path = CPUINFO) -> list[str]:
    """The different instruction sets of this machine's cores, as Linux lists them; empty where it does not.

    >>> instruction_sets(Path("/nonexistent"))
    []
    """
    # x86 says "flags", Arm "Features". A board with two kinds of core has two sets.
    return sorted({value.strip() for name, value in _fields(cpuinfo) if name.lower() in ("flags", "features")} - {""})


def instruction_key(cpuinfo: Path = CPUINFO) -> str:
    """A key for packed weights: the architecture and a digest of the instruction sets of all cores."""
    text = "\n".join(instruction_sets(cpuinfo) or [platform.processor()])
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def has_vnni(cpuinfo: Path = CPUINFO, *, arch: str | None = None) -> bool | None:
    """Whether every core of an x86-64 adds 8-bit products in 32 bits; None elsewhere, and where not told."""
    sets = instruction_sets(cpuinfo)
    if (arch or platform.machine()) not in X86_64 or not sets:
        return None
    return all(VNNI & set(one.split()) for one in sets)


def overflows_in_16_bits(cpuinfo: Path = CPUINFO, *, arch: str | None = None) -> bool:
    """Whether products of uint8 by int8 may overflow in sums of 16 bits: on x86-64 unless VNNI is known."""
    return (arch or platform.machine()) in X86_64 and not has_vnni(cpuinfo, arch=arch)


def _fields(cpuinfo: Path) -> list[tuple[str, str]]:
    """The names and values of the file's lines; none where it cannot be read."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [(name.strip(), value) for name, _, value in (line.partition(":") for line in lines)]
