# SPDX-License-Identifier: Apache-2.0
"""The model card: what the hub's library and a Markdown renderer make of it, and a bundle that stays whole while it is written."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx_ir")
pytest.importorskip("huggingface_hub")

import markdown_it
import yaml
from hostile import MARK, PAYLOADS, Page
from huggingface_hub import ModelCard
from made_up_report import device, failed, row

from pgxport.bundle import writer as writer_module
from pgxport.bundle.manifest import CARD, MANIFEST, Manifest
from pgxport.bundle.model_card import card
from pgxport.bundle.reader import Bundle
from pgxport.errors import IntegrityError, UsageError
from pgxport.exporter.export import export
from pgxport.exporter.prepare import ExportOptions
from pgxport.reporting import files
from pgxport.reporting.measured_card import CardOptions, measured, write_card
from pgxport.reporting.schema import Fidelity, Report
from pgxport.text import markdown
from pgxport.text import yaml as to_yaml

# YAML's own words, what its quotes could miss, and what it does not print.
TRAPS = (
    "no",
    "~",
    "1e3",
    "a: b",
    "- a",
    "#",
    "{}",
    "|",
    "'\"",
    "\\",
    "a\nb\n---\nlicense: mit",
    "\x85\u2028\ufeff\x7f",
    "ü €",
    "😀",
    "\ud800",
)
ALLOWED = {"h1", "h2", "p", "pre", "code", "table", "thead", "tbody", "tr", "th", "td"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(ExportOptions(output=tmp_path_factory.mktemp("card") / "b", size="tiny", res=112, precision="int4")).path


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    copied = tmp_path / "b"
    copied.mkdir()
    for file in exported.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
    return copied


def report(*rows: Any, **more: Any) -> Report:
    return Report(pgxport="0", created="2026-01-01", devices=(device(*rows, **more),))


def measured_by(bundle: Path, folder: Path, **more: Any) -> Path:
    """A report.json with this bundle in it."""
    made = report(row("b-fp32", quality=0.9), row("b-int4", quality=0.8, digest=Bundle.open(bundle).digest()), **more)
    folder.mkdir(exist_ok=True)
    (folder / "report.json").write_text(made.model_dump_json())
    return folder / "report.json"


def front_matter(text: str) -> dict[str, Any]:
    head, matter, _ = text.split("---\n", 2)
    assert head == ""
    return yaml.safe_load(matter)  # type: ignore[no-any-return]


def rendered(text: str) -> Page:
    body = text.split("---\n", 2)[2]
    return Page(markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(body))


@pytest.mark.parametrize("value", [*TRAPS, *PAYLOADS], ids=range(len(TRAPS) + len(PAYLOADS)))
def test_yaml_gives_back_the_text(value: str):
    expected = value.replace("\ud800", "\ufffd")
    found = yaml.safe_load(to_yaml({"a": value, "b": [value, {"c": value, "d": [value]}], "n": 1e-7}))
    assert found == {"a": expected, "b": [expected, {"c": expected, "d": [expected]}], "n": pytest.approx(1e-7)}


@pytest.mark.parametrize("value", [0.5, 1e-7, 1e20, 0.0, 3, -1.25e-12, 100.0])
def test_yaml_gives_back_the_number(value: float):
    found = yaml.safe_load(to_yaml({"a": value}))["a"]
    assert found == value
    assert type(found) is type(value)


def test_what_the_export_writes_is_a_card_that_the_hub_reads(exported: Path):
    manifest = Bundle.open(exported).manifest
    text = (exported / CARD).read_text()
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("pgxport", "image-text-to-text", "apache-2.0")
    assert data.tags == ["paligemma2", "onnx", "onnxruntime", "int4"]
    assert data.base_model is None
    about, parity, listed = rendered(text).tables
    assert dict(about)["checkpoint"] == f"tiny-112, sha256 {manifest.provenance.checkpoint_sha256}"
    assert manifest.parity
    assert f"on {manifest.parity.agreement:.2%}; KL {manifest.parity.kl:.2g} nats" in text
    assert [path for path, _ in parity[1:]] == list(manifest.parity.sqnr)[:5]
    digests = {name: info.sha256 for name, info in manifest.files.items() if name != CARD}
    assert {name: sha for name, _, sha in listed[1:]} == digests


def test_a_checkpoint_of_googles_brings_its_licence_and_its_name(exported: Path):
    manifest = Bundle.open(exported).manifest
    known = {"repository": "google/paligemma2-3b-pt-448", "revision": "c0ffee", "license": "gemma"}
    text = card(manifest.model_copy(update={"provenance": manifest.provenance.model_copy(update=known)}))
    data = ModelCard(text).data
    assert (data.license, data.base_model) == ("gemma", "google/paligemma2-3b-pt-448")
    assert data.to_dict()["base_model_relation"] == "quantized"
    unknown = manifest.provenance.model_copy(update={"license": None})
    text = card(manifest.model_copy(update={"provenance": unknown}))
    assert ModelCard(text).data.license is None
    assert "That of the checkpoint, which pgx does not know." in text


@pytest.mark.parametrize("payload", [*PAYLOADS, *TRAPS[:-1]], ids=range(len(PAYLOADS) + len(TRAPS) - 1))
def test_a_hostile_name_is_text(exported: Path, tmp_path: Path, payload: str):
    opened = Bundle.open(exported)
    base, mine = row(payload), row("mine", digest=opened.digest())
    score = mine.scores[0].model_copy(update={"task": payload, "title": payload, "metric": payload})
    mine = mine.model_copy(update={"label": f"{payload} mine", "scores": (score,), "notes": (payload,)})
    made = report(base.model_copy(update={"scores": (score,)}), mine, name=payload)
    data = made.devices[0].data.model_copy(update={"format": payload, "source": payload})
    made = made.model_copy(update={"devices": (made.devices[0].model_copy(update={"data": data}),)})
    provenance = opened.manifest.provenance.model_copy(
        update={"checkpoint": payload, "versions": {payload: payload}, "repository": payload, "revision": payload}
    )
    changed = {"name": payload, "recipe": payload, "family": payload, "target": payload, "provenance": provenance}
    text = card(opened.manifest.model_copy(update=changed), measured(made, opened))
    page = rendered(text)
    assert {tag for tag, _ in page.elements} <= ALLOWED
    assert not any(name in ("src", "href") or name.startswith("on") for _, attributes in page.elements for name in attributes)
    data_of = front_matter(text)
    assert data_of["base_model"] == payload
    assert "license" not in data_of or data_of["license"] == "apache-2.0"
    (result,) = data_of["model-index"][0]["results"]
    assert result["dataset"]["name"] == result["task"]["name"] == payload
    assert MARK not in result["dataset"]["type"] or "<" not in result["dataset"]["type"]


def test_what_was_measured_is_in_the_table_and_in_the_hubs_index(bundle: Path, tmp_path: Path):
    path = measured_by(bundle, tmp_path / "report")
    before = {file.name: file.stat().st_ino for file in bundle.iterdir()}
    digest, manifest = Bundle.open(bundle).digest(), Bundle.open(bundle).manifest
    text = write_card(CardOptions(bundle, path.parent))
    again = Bundle.open(bundle)
    assert (bundle / CARD).read_text() == text
    assert again.digest() == digest
    assert again.manifest.model_copy(update={"files": manifest.files, "measured": ()}) == manifest
    inodes = {file.name: file.stat().st_ino for file in bundle.iterdir()}
    assert {name for name in before if before[name] != inodes[name]} == {CARD, MANIFEST}
    assert all(file.stat().st_nlink == 1 for file in bundle.iterdir())
    assert sorted(os.listdir(tmp_path)) == ["b", "report"]
    (result,) = ModelCard(text).data.eval_results or ()
    mine = files.read(path).devices[0].rows[1]
    assert (result.metric_type, result.metric_value, result.task_type) == ("exact_match", 0.8, "image-text-to-text")
    tables = rendered(text).tables
    assert tables[1][0] == ["", "b-fp32", "b-int4"]
    assert {line[0]: line[2] for line in tables[1]}["answer, ms"].startswith(f"{mine.seconds['answer'].p50 * 1e3:.3g} (")


def test_agreement_kl_and_broken_answers_are_in_the_card_and_in_the_manifest(bundle: Path, tmp_path: Path):
    near = Fidelity(
        identical=0.5, token_agreement=0.7, first_divergence=2, diverged=25, answers=50, positions=400, top1=0.9125, kl=0.0375, kl_worst=1.5
    )  # fmt: skip
    mine = row("b-int4", quality=0.8, digest=Bundle.open(bundle).digest(), fidelity=near, empty=3, malformed=7)
    (tmp_path / "report.json").write_text(report(row("b-fp32", quality=0.9), mine).model_dump_json())
    tables = rendered(write_card(CardOptions(bundle, tmp_path / "report.json"))).tables
    counts = {line[0]: line[2] for line in tables[1]}
    assert (counts["empty"], counts["malformed"]) == ("3", "7")
    head, _, line = next(t for t in tables if "KL, nats" in t[0])
    of = dict(zip(head, line, strict=True))
    assert (of["top-1 along its answers"], of["KL, nats"]) == ("91.25% of 400", "0.037 (worst 1.5)")
    (told,) = Bundle.open(bundle).manifest.measured
    assert told.model_dump(exclude={"data"}) == {
        "samples": 50, "reference": "b-fp32", "agreement": 0.9125, "kl": 0.0375, "empty": 3, "malformed": 7,
    }  # fmt: skip
    assert told.data in (bundle / CARD).read_text()
    write_card(CardOptions(bundle))
    assert Bundle.open(bundle).manifest.measured == ()


def test_a_card_can_be_written_again_and_taken_back(bundle: Path, tmp_path: Path):
    exported = (bundle / CARD).read_text()
    path = measured_by(bundle, tmp_path / "report")
    first = write_card(CardOptions(bundle, path))
    assert write_card(CardOptions(bundle, path)) == first != exported
    assert write_card(CardOptions(bundle, path, dry_run=True)) == first
    assert write_card(CardOptions(bundle)) == (bundle / CARD).read_text() == exported


def test_a_report_of_other_bundles_is_refused(bundle: Path, tmp_path: Path):
    before = (bundle / MANIFEST).read_bytes()
    (tmp_path / "report.json").write_text(report(row("other"), row("another")).model_dump_json())
    with pytest.raises(UsageError, match=r"did not measure .*but another, other; run pgx report"):
        write_card(CardOptions(bundle, tmp_path / "report.json"))
    broken = failed("b", "no memory").model_copy(update={"digest": Bundle.open(bundle).digest()})
    (tmp_path / "report.json").write_text(report(row("other"), broken).model_dump_json())
    with pytest.raises(UsageError, match="failed in this report: no memory"):
        write_card(CardOptions(bundle, tmp_path / "report.json"))
    assert (bundle / MANIFEST).read_bytes() == before


def test_a_bundle_that_was_changed_gets_no_card(bundle: Path):
    (bundle / "tokenizer.json").write_bytes(b"changed")
    before = (bundle / CARD).read_bytes()
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        write_card(CardOptions(bundle))
    assert (bundle / CARD).read_bytes() == before


KILLED = """
import os, sys
from pathlib import Path
from pgxport import files
from pgxport.reporting.measured_card import CardOptions, write_card
when, path = sys.argv[1], Path(sys.argv[2])
exchange = files.exchange
def killed(new, old):
    if when == "after":
        exchange(new, old)
    os.kill(os.getpid(), 9)
files.exchange = killed
write_card(CardOptions(path, Path(sys.argv[3])))
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_in_the_middle_it_leaves_the_old_bundle_or_the_new_one(bundle: Path, tmp_path: Path, when: str):
    path, old = measured_by(bundle, tmp_path / "report"), (bundle / CARD).read_text()
    environment = {**os.environ, "PYTHONPATH": str(Path(writer_module.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", KILLED, when, bundle, path], env=environment, check=False)
    assert done.returncode == -9
    assert (tmp_path / "b.partial").is_dir()
    assert ((bundle / CARD).read_text() == old) is (when == "before")
    Bundle.open(bundle)  # sound, though its files are linked from what was left
    write_card(CardOptions(bundle))
    assert (bundle / CARD).read_text() == old
    assert all(file.stat().st_nlink == 1 for file in bundle.iterdir())
    assert sorted(os.listdir(tmp_path)) == ["b", "report"]


def test_a_bundle_behind_a_link_to_its_folder_gets_its_card(bundle: Path, tmp_path: Path):
    (tmp_path / "latest").symlink_to(bundle)
    text = write_card(CardOptions(tmp_path / "latest", measured_by(bundle, tmp_path / "report")))
    assert (bundle / CARD).read_text() == text
    assert (tmp_path / "latest").is_symlink()
    Bundle.open(tmp_path / "latest")


def test_a_link_from_anywhere_else_is_still_refused(bundle: Path, tmp_path: Path):
    (tmp_path / "b.partial").mkdir()
    os.link(bundle / "tokenizer.json", tmp_path / "b.partial" / "another.json")
    with pytest.raises(IntegrityError, match="not a plain file of its own"):
        Bundle.open(bundle)
    os.link(bundle / "tokenizer.json", tmp_path / "b.partial" / "tokenizer.json")
    with pytest.raises(IntegrityError, match="not a plain file of its own"):
        Bundle.open(bundle)  # three names, and one is nobody's


def test_where_there_are_no_links_files_are_copied(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr(writer_module.os, "link", refuse)
    before = (bundle / "tokenizer.json").stat().st_ino
    write_card(CardOptions(bundle))
    assert (bundle / "tokenizer.json").stat().st_ino != before
    Bundle.open(bundle)


def test_the_digest_is_of_all_but_the_card(bundle: Path):
    digest = Bundle.open(bundle).digest()
    found = Manifest.model_validate_json((bundle / MANIFEST).read_bytes())
    (bundle / MANIFEST).write_text(found.model_copy(update={"max_new_tokens": 7}).model_dump_json())
    assert Bundle.open(bundle).digest() != digest


def test_markdown_leaves_words_readable():
    assert markdown("answer en what colour is the cross?") == "answer en what colour is the cross?"
