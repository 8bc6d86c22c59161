# SPDX-License-Identifier: Apache-2.0
"""A bundle is there whole or not at all, and a bundle that was tampered with never reaches the engine."""

import ctypes
import dataclasses
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pgxport.bundle import writer as writer_module
from pgxport.bundle.manifest import MANIFEST, MAX_MANIFEST_BYTES, TokenTable, parse_manifest
from pgxport.bundle.onnx_wire import read_signature
from pgxport.bundle.reader import Bundle
from pgxport.bundle.writer import BundleWriter
from pgxport.errors import DiskError, IntegrityError, PgxError, UsageError
from pgxport.runners import pipeline as pipeline_module
from pgxport.runners.runner import Runner

ROOT = Path(writer_module.__file__).parents[2]


def write_again(source: Path, output: Path, *, overwrite: bool = False) -> Bundle:
    """What an export does last: write a bundle's files, here those of another, and commit."""
    manifest = Bundle.open(source).manifest
    with BundleWriter(output, overwrite=overwrite) as writer:
        for name in manifest.files:
            writer.write(name, [(source / name).read_bytes()])
        return writer.commit(manifest.model_copy(update={"files": writer.files}))


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


# Whole or not at all


def test_a_bundle_is_what_was_written(a_bundle: Path, tmp_path: Path):
    bundle = write_again(a_bundle, tmp_path / "new" / "b")
    assert contents(bundle.path) == contents(a_bundle)
    assert Bundle.open(bundle.path) == bundle
    assert bundle.nbytes == sum(p.stat().st_size for p in a_bundle.iterdir() if p.name != MANIFEST)
    assert bundle.token_table().rows([0, 1]).shape == (2, bundle.manifest.token_table.shape[1])
    assert os.listdir(tmp_path / "new") == ["b"]


def test_a_token_table_of_an_earlier_manifest_is_read():
    text = """{"file": "token_table.bin", "dtype": "int8", "shape": [512, 64], "scale": 8.0, "group": 32,
        "scales_offset": 32768, "scales_dtype": "float16"}"""
    table = TokenTable.model_validate_json(text)
    assert (table.group, table.row_bytes, table.nbytes) == (32, 64, 32768 + 512 * 2 * 2)


def test_a_bundle_that_an_earlier_version_wrote_is_understood_to_the_last_key():
    """Of tiny-112 in `mixed`, written before the package was ordered by rooms and words."""
    pytest.importorskip("onnx_ir")
    from pgxport.exporter.recipe_toml import read_recipe, to_toml
    from pgxport.exporter.targets import CPU

    folder = Path(__file__).parents[1] / "goldens" / "before-rooms"
    text = (folder / MANIFEST).read_bytes()
    assert parse_manifest(text, MANIFEST).model_dump(mode="json", exclude_unset=True) == json.loads(text)
    recipe = read_recipe(folder / "recipe.toml")
    # As today's, but that inputs are scaled and rotated, and groups trimmed, since.
    since = {"scaling": "none", "alpha": 0.5, "rotate": None, "method": "nearest"}
    assert recipe.rules == tuple(
        dataclasses.replace(rule, scheme=dataclasses.replace(rule.scheme, **since)) for rule in CPU.recipe("mixed").rules
    )
    assert to_toml(recipe) == (folder / "recipe.toml").read_text()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError(), KeyboardInterrupt(), SystemExit(143)])
def test_leaving_in_the_middle_leaves_nothing(tmp_path: Path, error: BaseException):
    def chunks():
        yield b"half"
        raise error

    with pytest.raises((type(error), DiskError)), BundleWriter(tmp_path / "b") as writer:
        writer.write("two", chunks())
    assert os.listdir(tmp_path) == []


def test_leaving_in_the_middle_leaves_the_bundle_that_was_to_be_replaced(a_bundle: Path, tmp_path: Path):
    write_again(a_bundle, tmp_path / "b")
    with pytest.raises(ZeroDivisionError), BundleWriter(tmp_path / "b", overwrite=True) as writer:
        writer.write("one", [bytes(1 // len(writer.files))])
    assert os.listdir(tmp_path) == ["b"]
    assert contents(tmp_path / "b") == contents(a_bundle)


@pytest.mark.parametrize("kind", ["folder", "file", "link", "dangling link"])
def test_what_a_killed_export_left_is_swept_away(a_bundle: Path, tmp_path: Path, kind: str):
    left, elsewhere = tmp_path / "b.partial", tmp_path / "elsewhere"
    if kind == "folder":
        (left / "deep").mkdir(parents=True)
        (left / "decoder_step.data").write_bytes(b"half")
    elif kind == "file":
        left.write_bytes(b"half")
    else:
        left.symlink_to(elsewhere)
        if kind == "link":
            elsewhere.mkdir()
            (elsewhere / "precious").write_bytes(b"!")
    write_again(a_bundle, tmp_path / "b")
    assert contents(tmp_path / "b") == contents(a_bundle)
    assert not os.path.lexists(left)
    assert kind != "link" or (elsewhere / "precious").exists()


def test_two_exports_to_one_place_do_not_mix(a_bundle: Path, tmp_path: Path):
    with BundleWriter(tmp_path / "b") as first:
        first.write("one", [b"1"])
        with pytest.raises(UsageError, match="another pgx is writing"):
            write_again(a_bundle, tmp_path / "b")
        assert (first.staging / "one").exists()
    write_again(a_bundle, tmp_path / "b")


def test_an_existing_output_is_kept_unless_overwrite_says_otherwise(a_bundle: Path, tmp_path: Path):
    write_again(a_bundle, tmp_path / "b")
    before = (tmp_path / "b" / MANIFEST).stat().st_ino
    with pytest.raises(UsageError, match="--overwrite"):
        write_again(a_bundle, tmp_path / "b")
    assert (tmp_path / "b" / MANIFEST).stat().st_ino == before
    write_again(a_bundle, tmp_path / "b", overwrite=True)
    assert (tmp_path / "b" / MANIFEST).stat().st_ino != before
    assert os.listdir(tmp_path) == ["b"]


def test_replacing_works_where_names_cannot_be_exchanged_at_once(a_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_again(a_bundle, tmp_path / "b")
    (tmp_path / "b.replaced").mkdir()  # of a process that was killed in between
    (tmp_path / "b.replaced" / "old").touch()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    write_again(a_bundle, tmp_path / "b", overwrite=True)
    assert contents(tmp_path / "b") == contents(a_bundle)
    assert os.listdir(tmp_path) == ["b"]


def test_overwrite_takes_an_empty_folder(a_bundle: Path, tmp_path: Path):
    (tmp_path / "b").mkdir()
    assert write_again(a_bundle, tmp_path / "b", overwrite=True).path == tmp_path / "b"


@pytest.mark.parametrize("holds", [["notes.txt"], [MANIFEST], [MANIFEST, "index.html"], "file", "link", "dangling", "stranger"])
def test_overwrite_replaces_nothing_but_a_bundle(a_bundle: Path, tmp_path: Path, holds: list[str] | str):
    output = tmp_path / "b"
    match holds:
        case "file":
            output.write_bytes(b"precious")
        case "link" | "dangling":
            output.symlink_to(a_bundle if holds == "link" else tmp_path / "nowhere")
        case "stranger":
            shutil.copytree(a_bundle, output)
            (output / "notes.txt").write_bytes(b"mine")
        case _:
            output.mkdir()
            for name in holds:
                (output / name).write_bytes(b'{"name": "a web page\'s own"}')
    before = sorted(os.listdir(output)) if output.is_dir() else os.path.lexists(output)
    with pytest.raises(UsageError):
        write_again(a_bundle, output, overwrite=True)
    assert before == (sorted(os.listdir(output)) if output.is_dir() else os.path.lexists(output))
    assert os.listdir(tmp_path) == ["b"]


@pytest.mark.parametrize("harm", ["damaged", "incomplete", "another version"])
def test_overwrite_replaces_a_bundle_that_cannot_be_read(a_bundle: Path, tmp_path: Path, harm: str):
    output = Path(shutil.copytree(a_bundle, tmp_path / "b"))
    match harm:
        case "damaged":
            os.truncate(output / "tokenizer.json", 10)
        case "incomplete":
            (output / "tokenizer.json").unlink()
        case "another version":
            (output / MANIFEST).write_text(json.dumps({"format_version": 99, "files": dict.fromkeys(os.listdir(output), 0)}))
    write_again(a_bundle, output, overwrite=True)
    assert contents(output) == contents(a_bundle)


def test_a_folder_that_cannot_be_written_is_a_disk_error(a_bundle: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="choose another -o"):
        write_again(a_bundle, tmp_path / "file" / "b")


# Forked from one process that has imported what is needed and started no threads.
TRIALS = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
from pgxport import files
from pgxport.bundle.reader import Bundle
from pgxport.bundle.writer import BundleWriter
from pgxport.errors import PgxError

source, output, full = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] != "-"
head = -1  # how much of each file to write; the writer does not mind what is in it

if full:
    from pgxport.exporter.export import ExportOptions, export

    def write(overwrite=True):
        export(ExportOptions(output=output, checkpoint=sys.argv[3], overwrite=overwrite))
else:
    manifest = Bundle.open(source).manifest

    def write(overwrite=True):
        with BundleWriter(output, overwrite=overwrite) as writer:
            for name in manifest.files:
                with open(source / name, "rb") as file:
                    writer.write(name, [file.read(head)])
            writer.commit(manifest.model_copy(update={"files": writer.files}))

def child(work):
    if (pid := os.fork()) == 0:
        code = 0
        try:
            work()
        except PgxError as error:
            code = error.exit_code
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            code = 99
        os._exit(code)
    return pid

def code(work):
    return os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1])

def state():
    return {p.name: p.read_bytes() for p in output.iterdir()} if os.path.lexists(output) else None

def die_at(step):
    seen = 0
    def counted(real):
        def call(*args, **kwargs):
            nonlocal seen
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return call
    os.fsync, os.mkdir, os.rename, os.unlink, os.rmdir = map(counted, (os.fsync, os.mkdir, os.rename, os.unlink, os.rmdir))
    files.exchange = counted(files.exchange)
    write()
"""


def trials(source: Path, output: Path, script: str, checkpoint: Path | str = "-") -> Any:
    done = subprocess.run(
        [sys.executable, "-c", TRIALS + script, str(source), str(output), str(checkpoint)],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_killed_at_any_step_there_is_the_old_bundle_or_the_new_one(a_bundle: Path, tmp_path: Path):
    script = """
head = 1000
write()
good, bad, step = state(), [], 0
for start in ("nothing", "bundle"):
    step, last = 0, -9
    while last == -9 and step < 200:
        step += 1
        if start == "nothing" and output.exists():
            [p.unlink() for p in output.iterdir()] and output.rmdir()
        last = code(lambda: die_at(step))
        if state() not in ((None, good) if start == "nothing" else (good,)):
            bad.append(f"{start}, step {step}")
    if code(write) or state() != good or [p.name for p in output.parent.iterdir()] != [output.name]:
        bad.append(f"{start}, again")
    assert last == 0 and step > 10
print(json.dumps(bad))
"""
    assert trials(a_bundle, tmp_path / "out" / "b", script) == []


def test_killed_at_random_moments_of_an_export_the_next_succeeds(random_bundle: Path, random_checkpoint: Path, tmp_path: Path):
    script = """
def processor_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

def die_after(seconds):  # of the processor's time, which a busy machine does not stretch; SIGPROF kills at once, as SIGKILL does
    signal.setitimer(signal.ITIMER_PROF, seconds)
    write()

code(write)
begin = processor_seconds()
assert code(write) == 0
good, took, bad, killed, random = state(), processor_seconds() - begin, [], 0, random.Random(0)
for trial in range(40):
    fresh = trial % 2
    if fresh:
        [p.unlink() for p in output.iterdir()] and output.rmdir()
    seconds = random.uniform(0.01, took)
    killed += code(lambda: die_after(seconds)) == -signal.SIGPROF
    if state() not in ((None, good) if fresh else (good,)):
        bad.append(f"{trial}: half")
    if code(write) or state() != good:
        bad.append(f"{trial}: again")
print(json.dumps([bad, killed, [p.name for p in output.parent.iterdir()]]))
"""
    bad, killed, left = trials(random_bundle, tmp_path / "out" / "b", script, random_checkpoint)
    assert (bad, left) == ([], ["b"])
    assert killed >= 20, "too few were killed in time to show anything"


def test_an_export_that_outgrows_its_limit_is_a_disk_error_and_leaves_nothing(a_bundle: Path, tmp_path: Path):
    sizes = sorted(info.size for info in Bundle.open(a_bundle).manifest.files.values())
    limits = [0, 1, 4095, *(s - 1 for s in sizes if s > 1), sizes[-1] // 2]
    script = f"""
def limited(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    write()
found = [[code(lambda: limited(limit)), os.listdir(output.parent) if output.parent.exists() else []] for limit in {limits}]
write()
good = state()
found += [[code(lambda: limited(limit)), [] if state() == good else "changed"] for limit in {limits}]
print(json.dumps(found))
"""
    assert trials(a_bundle, tmp_path / "out" / "b", script) == [[5, []]] * 2 * len(limits)


def test_a_full_disk_is_a_disk_error_and_leaves_nothing(a_bundle: Path, tmp_path: Path):
    total = Bundle.open(a_bundle).nbytes
    disk = tmp_path / "disk"
    disk.mkdir()
    for share in (0.01, 0.3, 0.7, 0.99):
        mount = ["mount", "-t", "tmpfs", "-o", f"size={int(total * share) // 4096 * 4}k", "tmpfs", str(disk)]
        if not hasattr(os, "geteuid") or os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("only root can mount a small disk")
        try:
            with pytest.raises(DiskError, match="space"):
                write_again(a_bundle, disk / "b")
            assert os.listdir(disk) == []
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def test_two_exports_of_one_checkpoint_are_the_same_bytes(random_checkpoint: Path, tmp_path: Path):
    pytest.importorskip("onnx_ir")
    from pgxport.exporter.export import export
    from pgxport.exporter.prepare import ExportOptions

    one, two = (
        export(ExportOptions(output=tmp_path / n / "b", checkpoint=random_checkpoint, answer=False)) for n in ("one", "two")
    )
    assert contents(one.path) == contents(two.path)


# Attacks: each takes a sound bundle and its manifest as data, which is written back afterwards.

Attack = Callable[[Path, dict[str, Any]], object]


def put(*path: str, value: Any) -> Attack:
    """Set a value of the manifest."""

    def attack(bundle: Path, m: dict[str, Any]) -> None:
        for key in path[:-1]:
            m = m[key]
        m[path[-1]] = value

    return attack


def rename(new: str) -> Attack:
    """List the tokenizer under another name."""
    return lambda bundle, m: m["files"].update({new: m["files"].pop("tokenizer.json")})


def replace(make: Callable[[Path, Path], object], name: str = "tokenizer.json") -> Attack:
    """Put something else in a file's place; `make` is given the place, and the file outside the bundle."""

    def attack(bundle: Path, m: dict[str, Any]) -> None:
        outside = bundle.parent / "outside"
        (bundle / name).rename(outside)
        make(bundle / name, outside)

    return attack


def swap_dims(bundle: Path, m: dict[str, Any]) -> None:
    m["token_table"]["shape"].reverse()


def rename_graph(bundle: Path, m: dict[str, Any]) -> None:
    """ONNX Runtime reads a file of this name in another format."""
    (bundle / "projector.onnx").rename(bundle / "projector.ort")
    m["files"]["projector.ort"] = m["files"].pop("projector.onnx")
    m["graphs"]["projector"]["file"] = "projector.ort"


ATTACKS: dict[str, Attack] = {
    "a file too many": lambda bundle, m: (bundle / "extra.bin").write_bytes(b"?"),
    "a hidden file too many": lambda bundle, m: (bundle / ".hidden").touch(),
    "a folder too many": lambda bundle, m: (bundle / "deep").mkdir(),
    "a file too few": lambda bundle, m: (bundle / "README.md").unlink(),
    "an unlisted tokenizer": lambda bundle, m: m["files"].pop("tokenizer.json"),
    "a name that climbs": rename("../outside.json"),
    "a name in a folder": rename("deep/tokenizer.json"),
    "an absolute name": rename("/etc/hostname"),
    "a name with a backslash": rename("..\\outside.json"),
    "a name of dots": rename(".."),
    "an empty name": rename(""),
    "a name with a NUL": rename("a\0b"),
    "a name with an escape": rename("a\x1b[2Jb"),
    "a very long name": rename("a" * 300),
    "a token table outside": put("token_table", "file", value="../outside.bin"),
    "a graph outside": put("graphs", "projector", "file", value="/tmp/projector.onnx"),
    "a symbolic link": replace(lambda place, outside: place.symlink_to(outside)),
    "a link to a device": replace(lambda place, outside: place.symlink_to("/dev/zero")),
    "a hard link": replace(lambda place, outside: place.hardlink_to(outside)),
    "a pipe": replace(lambda place, outside: os.mkfifo(place)),
    "a folder for a file": replace(lambda place, outside: place.mkdir()),
    "dims swapped": swap_dims,
    "dims too large": put("token_table", "shape", value=[1 << 40, 1 << 40]),
    "dims negative": put("token_table", "shape", value=[-4, -4]),
    "dims zero": put("token_table", "shape", value=[0, 0]),
    "a size that lies": put("files", "tokenizer.json", "size", value=1),
    "a size below zero": put("files", "tokenizer.json", "size", value=-1),
    "a digest that is none": put("files", "tokenizer.json", "sha256", value="0"),
    "a token beyond the table": put("token_ids", "newline", value=1 << 40),
    "a token below zero": put("token_ids", "eos", value=-1),
    "a scale that is no number": put("token_table", "scale", value=float("nan")),
    "an endless scale": put("token_table", "scale", value=float("inf")),
    "a gigantic image": put("resolution", value=1 << 20),
    "more image tokens than the projector gives": put("image_tokens", value=1 << 15),
    "a gigantic context": put("context_length", value=1 << 40),
    "a gigantic cache": put("cache", "head_dim", value=1 << 40),
    "a cache of other layers": put("cache", "layers", value=999),
    "an unknown version": put("format_version", value=2),
    "no version of ours": put("format_version", value="1; rm"),
    "a key too many": put("run_this", value="rm -rf /"),
    "a graph too many": lambda bundle, m: m["graphs"].update(extra=m["graphs"]["projector"]),
    "a graph too few": lambda bundle, m: m["graphs"].pop("projector"),
    "a graph in another format": rename_graph,
    "an input of another name": put("graphs", "vision_encoder", "inputs", value=[]),
    "another dtype": put("token_table", "dtype", value="object"),
}


@pytest.fixture
def bundle(a_bundle: Path, tmp_path: Path) -> Path:
    """A copy to attack."""
    return Path(shutil.copytree(a_bundle, tmp_path / "attacked" / "b"))


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a bundle that is not sound reached the engine")

    monkeypatch.setattr(pipeline_module, "open_session", refuse)


def refused(path: Path) -> str:
    with pytest.raises(IntegrityError) as caught:
        Runner.from_pretrained(path)
    return str(caught.value)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_manipulated_bundle_never_reaches_the_engine(bundle: Path, name: str):
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    ATTACKS[name](bundle, manifest)
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    assert str(bundle) in refused(bundle)


def test_a_sound_copy_is_not_refused(bundle: Path):
    with pytest.raises(AssertionError, match="reached the engine"):
        Runner.from_pretrained(bundle)


def test_a_bit_flipped_in_any_file_is_found(bundle: Path):
    rng = random.Random(0)
    for file in sorted(bundle.iterdir()):
        whole = file.read_bytes()
        at = rng.randrange(len(whole)) if file.name != MANIFEST else whole.index(b'"sha256"') + 14
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << rng.randrange(3)]) + whole[at + 1 :])
        assert str(bundle) in refused(bundle)
        file.write_bytes(whole)


def test_a_truncated_file_is_found(bundle: Path):
    for file in sorted(bundle.iterdir()):
        whole = file.read_bytes()
        for length in (0, len(whole) // 2, len(whole) - 2):
            file.write_bytes(whole[:length])
            assert file.name in refused(bundle)
        file.write_bytes(whole)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"not json",
        b"\xff\xfe",
        b'{"a": "\\ud800"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 100_000,
    ],
    ids=lambda text: repr(text[:12]),
)
def test_a_manifest_that_is_none_is_refused(bundle: Path, text: bytes):
    (bundle / MANIFEST).write_bytes(text)
    assert MANIFEST in refused(bundle)


def test_a_giant_manifest_is_refused_unread(bundle: Path):
    os.truncate(bundle / MANIFEST, 1 << 40)
    assert str(MAX_MANIFEST_BYTES) in refused(bundle)


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder", "none"])
def test_the_manifest_itself_is_a_plain_file(bundle: Path, kind: str):
    file, outside = bundle / MANIFEST, bundle.parent / "outside"
    file.rename(outside)
    make = {"link": file.symlink_to, "hard link": file.hardlink_to, "pipe": lambda _: os.mkfifo(file)}
    make.get(kind, lambda _: file.mkdir() if kind == "folder" else None)(outside)
    assert MANIFEST in refused(bundle)


@pytest.mark.parametrize("kind", ["nothing", "file"])
def test_what_is_no_folder_is_no_bundle(tmp_path: Path, kind: str):
    if kind == "file":
        (tmp_path / "b").touch()
    assert "no such folder" in refused(tmp_path / "b")


# Attacks inside a graph, with digests that match.


def first_external(model: Any) -> Any:
    return next(t for t in model.graph.initializer if t.data_location == 1)


def place(key: str, value: str | None, *, twice: bool = False) -> Callable[[Any, Any], None]:
    """Change where the first weight is said to lie."""

    def attack(model: Any, onnx: Any) -> None:
        tensor = first_external(model)
        entry = next(e for e in tensor.external_data if e.key == key)
        if value is None:
            tensor.external_data.remove(entry)
        elif twice:
            tensor.external_data.add(key=key, value=value)
        else:
            entry.value = value

    return attack


def node(op: str, domain: str, **attributes: Any) -> Callable[[Any, Any], None]:
    def attack(model: Any, onnx: Any) -> None:
        made = onnx.helper.make_node(op, [], ["new"], domain=domain)
        made.attribute.extend(onnx.helper.make_attribute(k, v(onnx)) for k, v in attributes.items())
        model.graph.node.append(made)

    return attack


def outside_tensor(onnx: Any) -> Any:
    tensor = onnx.TensorProto(data_type=1, dims=[1], data_location=1)
    tensor.external_data.add(key="location", value="../outside")
    return tensor


def branch(onnx: Any, node: Any, *weights: Any) -> Any:
    return onnx.GraphProto(name="branch", node=[node], initializer=weights)


GRAPH_ATTACKS: dict[str, Callable[[Any, Any], object]] = {
    "climbs": place("location", "../outside.data"),
    "absolute": place("location", "/etc/hostname"),
    "through a folder": place("location", "./decoder_step.data"),
    "unlisted": place("location", "unlisted.data"),
    "the manifest": place("location", MANIFEST),
    "nowhere": place("location", ""),
    "memory": place("location", "*/_ORT_MEM_ADDR_/*"),
    "past the end": place("offset", str(1 << 40)),
    "before the start": place("offset", "-4096"),
    "wraps around": place("offset", str((1 << 64) - 8)),
    "no number": place("offset", "0x10"),
    "other digits": place("offset", "١"),
    "too long": place("length", str(1 << 50)),
    "less than nothing": place("length", "-1"),
    "no length": place("length", None),
    "no location": place("location", None),
    "two locations": place("location", "../outside.data", twice=True),
    "an unknown key": lambda model, onnx: first_external(model).external_data.add(key="checksum", value="0"),
    "external without a place": lambda model, onnx: first_external(model).ClearField("external_data"),
    "a custom domain": node("Run", "evil.example"),
    "a compiled engine": node("EPContext", "com.microsoft"),
    "a custom domain in a branch": node("If", "", then_branch=lambda onnx: branch(onnx, onnx.NodeProto(op_type="Run", domain="evil.example"))),
    "an outside tensor in a branch": node("If", "", then_branch=lambda onnx: branch(onnx, onnx.NodeProto(), outside_tensor(onnx))),
    "a branch in a branch": node("If", "", then_branch=lambda onnx: branch(onnx, onnx.helper.make_node("If", [], [], then_branch=branch(onnx, onnx.NodeProto(op_type="Run", domain="evil.example"))))),
    "subgraphs": node("Scan", "", bodies=lambda onnx: [onnx.GraphProto()]),
    "an outside constant": node("Constant", "", value=outside_tensor),
    "outside constants": node("Constant", "", value=lambda onnx: [outside_tensor(onnx)]),
    "a sparse weight": lambda model, onnx: model.graph.sparse_initializer.add(),
    "a sparse constant": node("Constant", "", sparse_value=lambda onnx: onnx.SparseTensorProto()),
    "a function": lambda model, onnx: model.functions.add(name="f", domain=""),
    "training": lambda model, onnx: model.training_info.add(),
    "an output renamed": lambda model, onnx: setattr(model.graph.output[-1], "name", "renamed"),
    "an input of another shape": lambda model, onnx: setattr(
        model.graph.input[0].type.tensor_type.shape.dim[-1], "dim_value", 1 << 40
    ),
}  # fmt: skip


def resign(bundle: Path, name: str) -> None:
    """Make the manifest match a file that was changed."""
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    data = (bundle / name).read_bytes()
    manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (bundle / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", GRAPH_ATTACKS)
def test_a_manipulated_graph_never_reaches_the_engine(bundle: Path, name: str):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle / "decoder_step.onnx", load_external_data=False)
    GRAPH_ATTACKS[name](model, onnx)
    (bundle / "decoder_step.onnx").write_bytes(model.SerializeToString())
    (bundle.parent / "outside.data").write_bytes(bytes(1 << 20))
    resign(bundle, "decoder_step.onnx")
    assert "decoder_step.onnx" in refused(bundle)


def test_a_graph_written_again_by_onnx_is_still_accepted(bundle: Path):
    onnx = pytest.importorskip("onnx")
    model = onnx.load(bundle / "decoder_step.onnx", load_external_data=False)
    (bundle / "decoder_step.onnx").write_bytes(model.SerializeToString())
    resign(bundle, "decoder_step.onnx")
    assert Bundle.open(bundle)


def test_weights_of_another_size_than_their_graph_says_are_an_integrity_error(bundle: Path, monkeypatch: pytest.MonkeyPatch):
    """Only the engine can know this one."""
    onnx = pytest.importorskip("onnx")
    monkeypatch.undo()
    model = onnx.load(bundle / "decoder_step.onnx", load_external_data=False)
    place("length", "4")(model, onnx)
    (bundle / "decoder_step.onnx").write_bytes(model.SerializeToString())
    resign(bundle, "decoder_step.onnx")
    assert "decoder_step.onnx" in refused(bundle)


def test_no_bytes_at_all_confuse_the_reading_of_a_graph(bundle: Path):
    rng = random.Random(0)
    file = bundle / "projector.onnx"
    sizes = {p.name: p.stat().st_size for p in bundle.iterdir()}
    whole = file.read_bytes()
    for _ in range(300):
        changed = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 8))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        if rng.random() < 0.3:
            del changed[rng.randrange(len(changed)) :]
        file.write_bytes(changed)
        try:
            read_signature(file, sizes)
        except PgxError as error:
            assert isinstance(error, IntegrityError)  # noqa: PT017  neither is a failure: a changed name is still a graph
