# SPDX-License-Identifier: Apache-2.0
"""What follows from the instructions that /proc/cpuinfo lists; the lists are made up after what such processors show."""

import platform
from pathlib import Path

import pytest

from pgxport.machine.cpu import has_vnni, instruction_key, instruction_sets, overflows_in_16_bits, processor_name, vectors

AVX2 = "fpu sse2 avx avx2 fma"
AVX512 = f"{AVX2} avx512f avx512bw avx512vl"


def cpuinfo(folder: Path, *flags: str, field: str = "flags") -> Path:
    file = folder / "cpuinfo"
    file.write_text("".join(f"processor\t: {i}\ncpu MHz\t\t: {i}\n{field}\t\t: {one}\n\n" for i, one in enumerate(flags)))
    return file


@pytest.mark.parametrize(
    ("flags", "vnni"),
    [
        ([AVX2], False),  # Zen 1 to 3, Haswell
        ([AVX512], False),  # Skylake
        ([f"{AVX512} avx512_vnni"], True),  # Cascade Lake, Zen 4
        ([f"{AVX2} avx_vnni"], True),  # Alder Lake
        ([f"{AVX512} avx512_vnni amx_tile amx_int8"], True),  # Sapphire Rapids
        ([f"{AVX2} avx_vnni", AVX2], False),  # a session's threads may be on either core
        ([f"{AVX2} not_avx_vnni"], False),
        ([], None),
    ],
)
def test_integer_products_are_made_exact_on_x86_without_vnni_and_nowhere_else(tmp_path, flags, vnni):
    file = cpuinfo(tmp_path, *flags)
    assert has_vnni(file, arch="x86_64") is vnni
    assert overflows_in_16_bits(file, arch="x86_64") is (vnni is not True)
    assert overflows_in_16_bits(file, arch="AMD64") is (vnni is not True)


def test_arm_adds_8_bit_products_in_32_bits_whatever_it_lists(tmp_path):
    file = cpuinfo(tmp_path, "fp asimd asimddp i8mm", field="Features")
    assert instruction_sets(file) == ["fp asimd asimddp i8mm"]
    assert has_vnni(file, arch="aarch64") is None
    assert not overflows_in_16_bits(file, arch="aarch64")


def test_where_the_flags_cannot_be_read_products_are_made_exact(tmp_path):
    assert overflows_in_16_bits(tmp_path / "missing", arch="x86_64")
    (tmp_path / "cpuinfo").write_bytes(b"\xff\xfe: ?\nflags\n")
    assert overflows_in_16_bits(tmp_path / "cpuinfo", arch="x86_64")


def test_a_cpu_is_known_by_what_it_can_do_and_not_by_its_clock_or_the_order_of_its_cores(tmp_path):
    def key(*flags: str, field: str = "flags") -> str:
        return instruction_key(cpuinfo(tmp_path, *flags, field=field))

    assert key(AVX2, AVX512) == key(AVX512, AVX2) == key(AVX512, AVX2, AVX2) != key(AVX2)
    assert key(AVX2).startswith(platform.machine())
    assert key(AVX512) != key(f"{AVX512} avx512_vnni")
    assert key("fp asimd i8mm", "fp asimd", field="Features") != key("fp asimd", field="Features")


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([AVX2], "AVX2"),
        ([f"{AVX512} avx512_vnni avx512_bf16 amx_int8"], "AVX2, AVX-512, VNNI, BF16, AMX"),
        ([f"{AVX2} avx_vnni", AVX2], "AVX2"),  # a session's threads may be on either core
        (["fpu sse2"], "none known"),
        ([], "none known"),
    ],
)
def test_vectors_are_those_that_all_cores_have(tmp_path, flags, names):
    assert vectors(cpuinfo(tmp_path, *flags)) == names


def test_an_arm_core_has_vectors_too(tmp_path):
    assert vectors(cpuinfo(tmp_path, "fp asimd asimddp i8mm", field="Features")) == "NEON, dot product, I8MM"


def test_a_processor_tells_its_name_and_a_board_its_model(tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel name\t: AMD EPYC 9B14\nflags\t: avx2\n")
    assert processor_name(file) == "AMD EPYC 9B14"
    file.write_text("processor\t: 0\nCPU part\t: 0xd08\n\nModel\t\t: Raspberry Pi 4\n")
    assert processor_name(file) == "Raspberry Pi 4"
    assert processor_name(tmp_path / "missing")
