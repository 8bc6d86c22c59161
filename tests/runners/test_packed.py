# SPDX-License-Identifier: Apache-2.0
"""Weights packed for this CPU: the same answers, and nothing but what `pgx compile` put into the cache."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("onnx_ir")

import onnx

from pgxport.bundle.reader import Bundle
from pgxport.cli import cli
from pgxport.compile import cpu as packing
from pgxport.compile.cpu import align, pack
from pgxport.errors import DiskError, EngineError, IntegrityError, UsageError
from pgxport.exporter.export import export
from pgxport.exporter.prepare import ExportOptions
from pgxport.runners import packed as lookup
from pgxport.runners.engine_cache import FOLDER_VARIABLE, entry_folder
from pgxport.runners.ort import OrtSession
from pgxport.runners.packed import engine_key, packed
from pgxport.runners.runner import Runner

PRECISIONS = ("fp32", "int8", "w8a8", "int4", "mixed")
PICTURE = np.random.default_rng(1).integers(0, 256, (90, 120, 3), dtype=np.uint8)
PROMPT = "segment red circle"  # answers with boxes and masks, so that every graph runs


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("packed")
    return {p: export(ExportOptions(size="tiny", res=112, precision=p, parity=0, output=folder / p)) for p in PRECISIONS}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "engines"))
    return tmp_path / "engines"


@pytest.fixture(scope="module")
def packed_once(bundles, tmp_path_factory) -> Path:
    """A cache with the packed weights of every bundle, which tests only copy from."""
    cache = tmp_path_factory.mktemp("cache") / "engines"
    for bundle in bundles.values():
        pack(bundle, cache)
    return cache


@pytest.fixture
def pack_copy(cache, packed_once):
    """Put the packed weights of a bundle into the test's cache, as `pack` does: the folder of the entry."""

    def copy(bundle: Bundle) -> Path:
        folder = entry_folder(packed_once, bundle.digest(), engine_key())
        cache.mkdir(mode=0o700, exist_ok=True)
        shutil.copy2(packed_once / "seal.key", cache)
        return shutil.copytree(folder, cache / folder.name)

    return copy


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_compiled_bundle_answers_the_same_from_its_packed_weights(bundles, pack_copy, precision, monkeypatch):
    bundle = bundles[precision]
    with Runner(bundle, threads=1) as runner:
        expected = runner.answer(PICTURE, PROMPT)
    folder = pack_copy(bundle)
    loaded = []
    monkeypatch.setattr(OrtSession, "__init__", _noting(loaded, OrtSession.__init__))
    with Runner(bundle, threads=1) as runner:
        answer = runner.answer(PICTURE, PROMPT)
    assert answer.token_ids == expected.token_ids
    assert answer.boxes == expected.boxes
    assert sorted(loaded) == sorted(folder / f"{name}.onnx" for name in bundle.manifest.graphs)


def _noting(loaded: list[Path], init):
    def noted(self, graph, **options):
        loaded.append(graph)
        init(self, graph, **options)

    return noted


def initializers(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    branches = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return [*graph.initializer, *(tensor for branch in branches for tensor in initializers(branch))]


def test_what_was_packed_for_a_branch_is_moved_as_well(tmp_path):
    blob = bytes(range(100))
    (tmp_path / "g.onnx.data").write_bytes(b"\xff" * 7 + blob)
    weight = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="prepacked_0", value="kernel|7;100;5")
    branches = [onnx.helper.make_graph([], name, [], [], [weight]) for name in ("then", "else")]
    node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=branches[0], else_branch=branches[1])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [])), tmp_path / "g.onnx")
    align(tmp_path / "g.onnx")
    moved = initializers(onnx.load(tmp_path / "g.onnx", load_external_data=False).graph)
    assert len(moved) == 2
    for tensor in moved:
        offset, length, checksum = map(int, tensor.external_data[0].value.split("|")[1].split(";"))
        assert (offset % 64, length, checksum) == (0, 100, 5)
        assert (tmp_path / "g.onnx.data").read_bytes()[offset : offset + length] == blob


@pytest.mark.parametrize("precision", ["int8", "mixed"])
def test_packed_weights_of_any_size_are_aligned_in_their_file(bundles, packed_once, precision):
    """MatMulNBits reads unaligned ones shifted: tiny's int8 gave NaN. Those of mixed are in branches."""
    folder = entry_folder(packed_once, bundles[precision].digest(), engine_key())
    model = onnx.load(folder / "decoder_step.onnx", load_external_data=False)
    entries = [e.value for t in initializers(model.graph) for e in t.external_data if e.key.startswith("prepacked_")]
    blobs = [tuple(map(int, blob.split(";")[:2])) for value in entries for blob in value.split("|")[1:]]
    assert len(blobs) > 10
    assert all(offset % 64 == 0 for offset, _ in blobs)
    size = (folder / "decoder_step.onnx.data").stat().st_size
    assert max(offset + length for offset, length in blobs) <= size


def test_a_bundle_that_is_not_compiled_loads_its_own_graphs(bundles, cache, pack_copy):
    bundle = bundles["int4"]
    assert packed(bundle) == {name: bundle.graph(name) for name in bundle.manifest.graphs}
    pack_copy(bundles["int8"])  # another bundle
    assert packed(bundle)["decoder_step"].parent == bundle.path


@pytest.mark.parametrize("change", [{"version": "1.99.0"}, {"sm": "x86_64-0123456789ab"}])
def test_what_was_packed_for_another_machine_is_not_looked_at(bundles, pack_copy, monkeypatch, change):
    bundle = bundles["int4"]
    pack_copy(bundle)
    assert packed(bundle)["decoder_step"] != bundle.graph("decoder_step")
    elsewhere = dataclasses.replace(engine_key(), **change)
    monkeypatch.setattr(lookup, "engine_key", lambda: elsewhere)
    assert packed(bundle)["decoder_step"] == bundle.graph("decoder_step")


def test_what_was_packed_with_the_other_setting_of_products_is_not_used_and_is_packed_again(bundles, cache, monkeypatch):
    bundle = bundles["w8a8"]
    path, own = str(bundle.path), {name: bundle.graph(name) for name in bundle.manifest.graphs}
    flags = lookup.flags()
    for others in ({}, {"x64quantprecision": 1 - flags["x64quantprecision"]}):  # earlier; another machine
        monkeypatch.setattr(packing, "flags", lambda others=others: others)
        pack(bundle)
        assert packed(bundle) == own
        monkeypatch.setattr(packing, "flags", lambda: flags)
        assert json.loads(CliRunner().invoke(cli, ["compile", path, "--json"]).output)["built"]
        assert packed(bundle) != own
    assert not json.loads(CliRunner().invoke(cli, ["compile", path, "--json"]).output)["built"]


@pytest.mark.parametrize("name", ["decoder_step.onnx", "decoder_step.onnx.data", "entry.json"])
def test_a_changed_byte_is_refused(bundles, pack_copy, name):
    bundle = bundles["int4"]
    file = pack_copy(bundle) / name
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(IntegrityError, match="pgx compile"):
        Runner(bundle)


def test_a_file_that_pgx_did_not_write_is_refused(bundles, pack_copy):
    bundle = bundles["int4"]
    (pack_copy(bundle) / "more.data").write_bytes(b"x")
    with pytest.raises(IntegrityError, match=r"more\.data"):
        packed(bundle)


def test_packed_weights_that_compute_something_else_are_not_kept(bundles, cache, monkeypatch):
    real = packing.sample_outputs
    calls = []

    def second_differs(session, bundle, name):
        calls.append(name)
        outputs = real(session, bundle, name)
        return [np.nextafter(x, np.float32(np.inf)) for x in outputs] if calls.count("decoder_step") == 2 else outputs

    monkeypatch.setattr(packing, "sample_outputs", second_differs)
    with pytest.raises(EngineError, match="something else"):
        pack(bundles["int4"])
    assert not list(cache.glob("*/*"))
    assert packed(bundles["int4"])["decoder_step"].parent == bundles["int4"].path


def test_a_disk_without_room_is_refused_before_anything_is_packed(bundles, cache, monkeypatch):
    usage = type("Usage", (), {"free": bundles["int4"].nbytes})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DiskError, match="choose another --cache"):
        pack(bundles["int4"])
    assert not list(cache.glob("*/*"))


# The command


def test_pgx_compile_packs_a_bundle_for_the_cpu_once_and_says_so(bundles, cache):
    path = str(bundles["int8"].path)
    first = CliRunner().invoke(cli, ["compile", path])
    assert first.exit_code == 0, first.output
    assert "weights packed for this CPU" in first.output
    assert "written in" in first.output
    again = json.loads(CliRunner().invoke(cli, ["compile", path, "--engine", "cpu", "--json"]).output)
    assert not again["built"]
    (data,) = Path(again["entry"]).glob("decoder_step.onnx.data")
    data.write_bytes(bytes(data.stat().st_size))
    mended = json.loads(CliRunner().invoke(cli, ["compile", path, "--json"]).output)
    assert mended["built"]
    with Runner(bundles["int8"], threads=1) as runner:
        assert runner.answer(PICTURE, PROMPT).text


@pytest.mark.parametrize(
    ("words", "says"), [(["--sm", "8.9"], "--sm is of TensorRT"), (["--engine", "tensorrt"], "--target tensorrt")]
)
def test_what_is_of_tensorrt_is_refused_for_a_bundle_of_the_cpu(bundles, cache, words, says):
    with pytest.raises(UsageError, match=says):
        cli(["compile", str(bundles["int4"].path), *words], standalone_mode=False)
