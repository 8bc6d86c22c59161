# SPDX-License-Identifier: Apache-2.0
"""The calibration file: what was written is read, and nothing else passes for one."""

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir")

from pgxport.activations.calibration_file import About, Array, Calibration, write_calibration
from pgxport.activations.statistics import OBSERVERS, pack
from pgxport.bundle.manifest import Ranges
from pgxport.errors import IntegrityError, PgxError, UsageError
from pgxport.files import file_sha256

RNG = np.random.default_rng(0)
WIDTHS = {"layers.0.q_proj.weight": 6, "layers.0.o_proj.weight": 3}
INPUTS = {"layers.0.q_proj.weight": "layers.0.q_proj.weight", "layers.0.k_proj.weight": "layers.0.q_proj.weight"}
INPUTS |= {"layers.0.o_proj.weight": "layers.0.o_proj.weight"}
ABOUT = About(
    model="random", model_sha256="ab" * 32, engine="numpy", samples=2, samples_sha256="cd" * 32, prefix_tokens=20, suffix_tokens=3,
    moments=True, layers=1, inputs=INPUTS, ranges=Ranges(largest={"residual": 3.5}, where={"residual": "x"}, scenes=2),
    versions={"pgxport": "0"}, command="pgx calibrate random",
)  # fmt: skip


def findings(*, moments: bool = True) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for path, k in WIDTHS.items():
        x = RNG.normal(size=(9, k)).astype(np.float32)
        moment = x.T @ x / np.float32(9) if moments else None
        channels, ranges = (RNG.normal(size=shape).astype(np.float32) for shape in ((4, k), (4, 2)))
        found |= {f"inputs/{path}": channels, f"range/{path}": ranges, path: moment}
        found |= {} if moment is None else {f"moment/{path}": pack(moment, k)}
    full = {path: found.pop(path) for path in WIDTHS}
    found |= {f"cache/0/{part}": RNG.normal(size=(2, 4)).astype(np.float32) for part in ("key", "value")}
    return found | {f"full {path}": moment for path, moment in full.items()}


def write(path: Path, found: dict[str, np.ndarray], about: About = ABOUT, **options: bool) -> Calibration:
    return write_calibration(path, about, {n: Array(v) for n, v in found.items() if not n.startswith("full ")}, **options)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Calibration, dict[str, np.ndarray]]:
    found = findings()
    return write(tmp_path / "c.safetensors", found), found


def test_what_was_written_is_read(made):
    calibration, found = made
    for path in WIDTHS:
        channels = [calibration.absmax(path), calibration.mean(path), calibration.mean_abs(path), calibration.square(path)]
        assert np.array_equal(channels, found[f"inputs/{path}"])
        assert np.array_equal(calibration.moment(path), found[f"full {path}"])
        assert np.array_equal([calibration.range(path, o) for o in OBSERVERS], found[f"range/{path}"])
    for part in ("key", "value"):
        assert np.array_equal(calibration.cache(0, part), found[f"cache/0/{part}"])
    assert (calibration.samples, calibration.tokens, calibration.model_sha256) == (2, 23, "ab" * 32)
    assert calibration.ranges == ABOUT.ranges
    assert calibration.digest == file_sha256(calibration.path)


def test_linears_that_share_an_input_read_the_same_numbers(made):
    calibration, _ = made
    q, k = "layers.0.q_proj.weight", "layers.0.k_proj.weight"
    assert np.array_equal(calibration.absmax(q), calibration.absmax(k))
    assert np.array_equal(calibration.moment(q), calibration.moment(k))
    assert calibration.range(q, "mse") == calibration.range(k, "mse")


def test_the_safetensors_library_reads_the_file_and_the_same_numbers_give_the_same_bytes(made, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    calibration, found = made
    theirs = safetensors.load_file(calibration.path)
    assert theirs.keys() == {n for n in found if not n.startswith("full ")}
    assert all(np.array_equal(theirs[n], found[n]) for n in theirs)
    write(tmp_path / "again.safetensors", found)
    assert (tmp_path / "again.safetensors").read_bytes() == calibration.path.read_bytes()


def test_without_moments_there_is_none_to_read(tmp_path):
    calibration = write(tmp_path / "c", findings(moments=False), ABOUT.model_copy(update={"moments": False}))
    assert calibration.moment("layers.0.q_proj.weight") is None
    assert calibration.mean("layers.0.q_proj.weight").shape == (6,)


def test_what_the_file_does_not_know_is_named(made):
    calibration, _ = made
    for ask in (calibration.absmax, calibration.moment, lambda path: calibration.range(path, "mse")):
        with pytest.raises(UsageError, match=r"nothing about the input of 'layers\.7\.fc1'.*layers\.0\.k_proj"):
            ask("layers.7.fc1")
    with pytest.raises(UsageError, match="observer 'best' does not exist; choose minmax"):
        calibration.range("layers.0.q_proj.weight", "best")
    with pytest.raises(UsageError, match=r"without .cache/1/key."):
        calibration.cache(1, "key")


def test_another_model_is_refused(made):
    calibration, _ = made
    calibration.check("ab" * 32, "random")
    with pytest.raises(UsageError, match=r"made from 'random' \(sha256 abababababab\), and other is another model \(00000000"):
        calibration.check("00" * 32, "other")


def test_every_flipped_bit_and_every_cut_is_refused(made, tmp_path):
    calibration, _ = made
    whole, damaged = calibration.path.read_bytes(), tmp_path / "damaged"
    for place in range(0, len(whole), 5):
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        damaged.write_bytes(data)
        with pytest.raises(IntegrityError, match="damaged"):
            Calibration.open(damaged)
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        damaged.write_bytes(whole[:length])
        with pytest.raises(IntegrityError, match="not a sound calibration file"):
            Calibration.open(damaged)


def test_other_files_are_refused_with_what_they_are(made, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    weights = tmp_path / "model.safetensors"
    safetensors.save_file({"a": np.ones(3, np.float32)}, weights)
    with pytest.raises(IntegrityError, match="not one that pgx calibrate wrote"):
        Calibration.open(weights)
    other = tmp_path / "other"
    other.write_bytes(made[0].path.read_bytes().replace(b'"format_version":"1"', b'"format_version":"2"', 1))
    with pytest.raises(IntegrityError, match="version '2', and this pgx reads 1"):
        Calibration.open(other)
    other.write_text(json.dumps({"ranges": {}}))
    with pytest.raises(IntegrityError, match="not a sound calibration file"):
        Calibration.open(other)
    with pytest.raises(UsageError, match="no such calibration file"):
        Calibration.open(tmp_path / "none")
    with pytest.raises(PgxError):
        Calibration.open(tmp_path)


def test_a_file_that_lacks_or_adds_a_tensor_cannot_be_written(tmp_path):
    for change in ({"cache/0/key": None}, {"stranger": np.ones(3)}, {"range/layers.0.q_proj.weight": np.ones((2, 2))}):
        found = {n: v for n, v in {**findings(), **change}.items() if v is not None}
        with pytest.raises(IntegrityError, match=next(iter(change))):
            write(tmp_path / "c", found)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_kept_unless_it_is_to_be_replaced(made, tmp_path):
    calibration, _ = made
    before = calibration.path.read_bytes()
    with pytest.raises(UsageError, match="--overwrite"):
        write(calibration.path, findings())
    assert calibration.path.read_bytes() == before
    write(calibration.path, findings(), overwrite=True)
    assert calibration.path.read_bytes() != before
    assert [f.name for f in tmp_path.iterdir()] == ["c.safetensors"]
    with pytest.raises(UsageError, match="no such folder"):
        write(tmp_path / "none" / "c", findings())
    with pytest.raises(UsageError, match="is a folder"):
        write(tmp_path, findings(), overwrite=True)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    class Broken(Array):
        def rows(self, start: int, stop: int) -> np.ndarray:
            raise KeyboardInterrupt

    tensors = {n: Array(v) for n, v in findings().items() if not n.startswith("full ")}
    last = list(tensors)[-1]
    with pytest.raises(KeyboardInterrupt):
        write_calibration(tmp_path / "c", ABOUT, {**tensors, last: Broken(tensors[last].values)})
    assert not list(tmp_path.iterdir())
