# SPDX-License-Identifier: Apache-2.0
"""What the processor can compute, read from /proc/cpuinfo: its instruction sets, and what an engine has to know of them."""

import hashlib
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
X86_64 = {"x86_64", "AMD64"}  # as Linux and Windows name it
# Instructions that add 8-bit products in 32 bits, as Linux names them. No processor has AMX for integers without one of the others.
VNNI = {"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8"}


def instruction_sets(cpuinfo: Path = CPUINFO) -> list[str]:
    """The different sets of instructions that cores of this machine have, as Linux lists them; empty where it does not.

    >>> instruction_sets(Path("/nonexistent"))
    []
    """
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return []
    fields = (line.partition(":") for line in lines)
    # x86 says "flags", Arm "Features". A board with two kinds of core has two sets.
    return sorted({value.strip() for name, _, value in fields if name.strip().lower() in ("flags", "features")} - {""})


def instruction_key(cpuinfo: Path = CPUINFO) -> str:
    """A name for what all cores can do, on which packed weights depend: the architecture and a digest of the instruction sets."""
    text = "\n".join(instruction_sets(cpuinfo) or [platform.processor()])
    return f"{platform.machine()}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def has_vnni(cpuinfo: Path = CPUINFO, *, arch: str | None = None) -> bool | None:
    """Whether every core of an x86-64 processor adds 8-bit products in 32 bits; None on others, and where Linux does not tell."""
    sets = instruction_sets(cpuinfo)
    if (arch or platform.machine()) not in X86_64 or not sets:
        return None
    return all(VNNI & set(one.split()) for one in sets)


def overflows_in_16_bits(cpuinfo: Path = CPUINFO, *, arch: str | None = None) -> bool:
    """Whether a product of uint8 by int8 may be added in 16 bits, where it overflows: on x86-64 unless VNNI is known to be there."""
    return (arch or platform.machine()) in X86_64 and not has_vnni(cpuinfo, arch=arch)
