# SPDX-License-Identifier: Apache-2.0
"""Finding a checkpoint: what was published, the local cache, and downloads from a hub on this machine."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("huggingface_hub")
pytest.importorskip("ml_dtypes")

from huggingface_hub import constants

from pgxport.errors import CheckpointError, HubError, IntegrityError, UsageError
from pgxport.hub import fetch as hub
from pgxport.hub.locate import ModelChoice, locate, published_name, revisions

REPOSITORY = "google/paligemma2-3b-pt-448"
COMMIT = "c0ffee" * 6 + "abcd"
WEIGHTS = os.urandom(3 << 20)
CONTENT = {
    "config.json": b'{"model_type": "paligemma"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "README.md": b"not fetched",
    "pytorch_model.bin": b"a pickle, never fetched",
    "onnx/config.json": b"not fetched either",
}


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def digest(name: str, data: bytes) -> str:
    return hashlib.sha256(data).hexdigest() if name.endswith((".safetensors", ".bin")) else blob_id(data)


@dataclass
class Hub:
    """A model hub with one repository, and what is wrong with it."""

    content: dict[str, bytes]
    branches: tuple[str, ...] = ("main",)
    refuse: tuple[int, str] | None = None  # for everything: a status, and the hub's name of the error
    gated: int | None = None  # for files only: 401 or 403
    break_after: list[int] = field(default_factory=list)  # bytes that the next requests get
    corrupt: str | None = None
    ranges: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # file and Range of every GET
    url: str = ""


def handler(state: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer()

        def do_HEAD(self) -> None:
            self.answer()

        def log_message(self, *_: object) -> None:
            return None

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path).lstrip("/")
            if state.refuse:
                self.fail(*state.refuse)
            elif path.startswith(f"api/models/{REPOSITORY}/revision/"):
                revision = path.rpartition("/")[2]
                if revision not in (*state.branches, COMMIT):
                    self.fail(404, "RevisionNotFound")
                else:
                    self.json(
                        {
                            "id": REPOSITORY,
                            "sha": COMMIT,
                            "siblings": [self.entry(n, "rfilename", "blobId") for n in state.content],
                        }
                    )
            elif path.startswith(f"api/models/{REPOSITORY}/tree/"):
                self.json([{"type": "file", **self.entry(n, "path", "oid")} for n in state.content])
            elif path.startswith(f"{REPOSITORY}/resolve/"):
                name = path.removeprefix(f"{REPOSITORY}/resolve/").partition("/")[2]
                self.file(name)
            else:
                self.fail(401, "RepoNotFound")

        def entry(self, name: str, key: str, oid: str) -> dict[str, Any]:
            data = state.content[name]
            found: dict[str, Any] = {key: name, "size": len(data), oid: blob_id(data)}
            if name.endswith((".safetensors", ".bin")):
                sha = hashlib.sha256(data).hexdigest()
                found["lfs"] = {"sha256": sha, "oid": sha, "size": len(data), "pointerSize": 134}
            return found

        def file(self, name: str) -> None:
            if state.gated:
                return self.fail(state.gated, "GatedRepo")
            data, start = state.content[name], 0
            headers = {"ETag": f'"{digest(name, data)}"', "X-Repo-Commit": COMMIT}
            if name == state.corrupt:
                data = bytes([data[0] ^ 1]) + data[1:]
            if self.command == "GET":
                state.asked.append((name, self.headers.get("Range")))
                if state.ranges and (asked := self.headers.get("Range")):
                    start = int(asked.removeprefix("bytes=").rstrip("-"))
                    headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.send_response(206 if "Content-Range" in headers else 200)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if self.command == "GET":
                if state.break_after and name == "model.safetensors":
                    self.wfile.write(data[start : start + state.break_after.pop(0)])
                    self.close_connection = True
                else:
                    self.wfile.write(data[start:])

        def json(self, value: object) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

    return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on this machine with an empty local cache, and nothing else within reach."""
    state = Hub(dict(CONTENT))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(state)) as http:
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        state.url = f"http://127.0.0.1:{http.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", state.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", state.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub, "TIMEOUT", 5.0)
        yield state
        http.shutdown()


def fetch(checkpoint: str | None = REPOSITORY) -> Path:
    return locate(ModelChoice(checkpoint=checkpoint)).path


def blobs(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models--google--paligemma2-3b-pt-448" / "blobs"


def partial(tmp_path: Path) -> Path:
    return blobs(tmp_path) / f"{digest('model.safetensors', WEIGHTS)}.incomplete"


def test_a_published_model_is_downloaded_and_then_found_in_the_cache(server: Hub, capfd: pytest.CaptureFixture[str]):
    found = locate(ModelChoice(size="3b", res=448))
    assert (found.name, found.revision) == ("paligemma2-3b-pt-448", COMMIT)
    assert sorted(p.name for p in found.path.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (found.path / "model.safetensors").read_bytes() == WEIGHTS
    assert capfd.readouterr() == ("", "")
    server.refuse = (500, "InternalError")
    assert locate(ModelChoice(size="3b", res=448)) == found


def test_progress_counts_every_byte(server: Hub):
    seen: list[tuple[str, int, int]] = []
    locate(ModelChoice(checkpoint=REPOSITORY), progress=lambda *now: seen.append(now))
    total = sum(len(CONTENT[name]) for name in ("config.json", "tokenizer.json", "model.safetensors"))
    assert seen[-1][1:] == (total, total)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)


def test_a_connection_that_breaks_off_is_taken_up_again(server: Hub):
    server.break_after = [1 << 20, 100_000]
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS
    starts = [int(asked[6:-1]) for name, asked in server.asked if name == "model.safetensors" and asked]
    assert len(starts) == 3
    assert starts[0] == 0 < starts[1] < starts[2]


def test_a_download_that_failed_goes_on_where_it_stopped(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "RETRIES", 1)
    server.break_after = [1 << 20, 0, 0]
    with pytest.raises(HubError, match=r"broke off at [1-9][0-9,]+ of 3,145,728 bytes of model\.safetensors.*run this again"):
        fetch()
    kept = partial(tmp_path).stat().st_size
    assert kept > 0
    server.break_after, server.asked = [], []
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS
    assert ("model.safetensors", f"bytes={kept}-") in server.asked
    assert not partial(tmp_path).exists()


@pytest.mark.parametrize("left", [WEIGHTS[:1000], WEIGHTS, WEIGHTS + b"more"])
@pytest.mark.parametrize("ranges", [True, False])
def test_what_a_killed_download_left_is_used(server: Hub, tmp_path: Path, left: bytes, ranges: bool):
    server.ranges = ranges  # some proxies answer a range with the whole file
    blobs(tmp_path).mkdir(parents=True)
    partial(tmp_path).write_bytes(left)
    assert (fetch() / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_bytes_corrupted_on_the_way_are_detected_and_not_kept(server: Hub, tmp_path: Path, name: str):
    server.corrupt = name
    with pytest.raises(IntegrityError, match=rf"{name} arrived damaged"):
        fetch()
    assert digest(name, CONTENT[name]) not in {p.name.partition(".")[0] for p in blobs(tmp_path).iterdir()}
    server.corrupt = None
    assert (fetch() / name).read_bytes() == CONTENT[name]


def test_a_leftover_of_other_bytes_is_detected_and_not_kept(server: Hub, tmp_path: Path):
    blobs(tmp_path).mkdir(parents=True)
    partial(tmp_path).write_bytes(b"x" * 1000)
    with pytest.raises(IntegrityError, match="arrived damaged"):
        fetch()
    assert not partial(tmp_path).exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_byte_changed_in_the_cache_is_detected(server: Hub, name: str):
    file = (fetch() / name).resolve()
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError, match=rf"{name} of {REPOSITORY} was changed in the local cache.*delete this file"):
        fetch()


def test_a_copy_in_the_cache_that_is_not_whole_is_completed(server: Hub):
    folder = fetch()
    (folder / "tokenizer.json").unlink()
    server.asked = []
    assert (fetch() / "tokenizer.json").read_bytes() == CONTENT["tokenizer.json"]
    assert not server.asked  # its bytes were still there


def test_a_shard_that_is_missing_from_the_cache_is_fetched(server: Hub):
    del server.content["model.safetensors"]
    shards = {f"model-0000{i}-of-00002.safetensors": os.urandom(1000) for i in (1, 2)}
    index = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()
    server.content |= {"model.safetensors.index.json": index, **shards}
    folder = fetch()
    second = folder / "model-00002-of-00002.safetensors"
    second.resolve().unlink()
    second.unlink()
    server.asked = []
    assert (fetch() / second.name).read_bytes() == shards[second.name]
    assert [name for name, _ in server.asked] == [second.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gated": 401}, r"is gated: sign in with `hf auth login`"),
        ({"gated": 403}, r"is gated: accept its licence"),
        ({"refuse": (401, "RepoNotFound")}, r"has no google/paligemma2-3b-pt-448, or it is private"),
        ({"refuse": (404, "RepoNotFound")}, r"has no google/paligemma2-3b-pt-448, or it is private"),
        ({"refuse": (503, "Down")}, r"HTTP 503; try again later"),
        ({"branches": ("other",)}, r"has no revision 'main'"),
    ],
)
def test_a_refusal_of_the_hub_is_explained(server: Hub, changes: dict[str, Any], message: str):
    for name, value in changes.items():
        setattr(server, name, value)
    with pytest.raises(HubError, match=message) as info:
        fetch()
    assert info.value.exit_code == 9


def test_offline_is_explained(server: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"HF_HUB_OFFLINE is set; unset it, or use `hf download .*--checkpoint DIR"):
        fetch()


def test_a_hub_out_of_reach_is_explained(server: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"cannot be reached \(ConnectError\); use `hf download"):
        fetch()


def test_a_revision_follows_the_name(server: Hub):
    server.branches = ("float16",)
    assert fetch(f"{REPOSITORY}@float16").name == COMMIT
    with pytest.raises(HubError, match="no revision 'float99'"):
        fetch(f"{REPOSITORY}@float99")


def test_a_repository_without_safetensors_is_refused_before_anything_is_fetched(server: Hub):
    del server.content["model.safetensors"]
    with pytest.raises(CheckpointError, match=r"has no safetensors at revision 'main' \(it holds .*pytorch_model\.bin"):
        fetch()
    assert not server.asked


def test_a_model_too_large_for_the_disk_is_refused_before_anything_is_fetched(server: Hub, monkeypatch: pytest.MonkeyPatch):
    from pgxport.errors import DiskError

    class Usage:
        free = 1000

    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(DiskError, match="has room for 1,000"):
        fetch()
    assert not server.asked


def test_the_command_ends_with_the_exit_code_of_the_hub(server: Hub, tmp_path: Path):
    server.gated = 403
    done = subprocess.run(
        [sys.executable, "-m", "pgxport", "export", "--size", "3b", "--res", "448", "-o", str(tmp_path / "b")],
        env={**os.environ, "HF_ENDPOINT": server.url, "HF_HUB_CACHE": str(tmp_path / "other"), "HF_HUB_OFFLINE": "0"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 9, done.stderr
    assert "is gated: accept its licence" in done.stderr
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("family", "size", "res", "variant"),
    [
        ("paligemma", "3b", 896, "pt"), ("paligemma", "3b", 448, "mix"), ("paligemma", "3b", 896, "ft-docvqa"),
        ("paligemma", "3b", 224, "ft-science-qa"), ("paligemma2", "28b", 896, "pt"), ("paligemma2", "10b", 224, "mix"),
        ("paligemma2", "3b", 448, "ft-docci"), ("paligemma2", "10b", 448, "ft-docci"),
    ],
)  # fmt: skip
def test_what_was_published_has_a_name(family: str, size: str, res: int, variant: str):
    assert published_name(family, size, res, variant) == f"{family}-{size}-{variant}-{res}"


@pytest.mark.parametrize(
    ("family", "size", "res", "variant"),
    [
        ("paligemma", "3b", 896, "mix"), ("paligemma2", "28b", 448, "ft-docci"), ("paligemma2", "3b", 224, "ft-docci"),
        ("paligemma2", "3b", 448, "ft-docvqa"), ("paligemma2", "3b", 448, "it"), ("paligemma", "3b", 448, "ft-"),
        ("paligemma", "3b", 448, "ft-../x"), ("paligemma", "3b", 448, ""),
    ],
)  # fmt: skip
def test_what_was_not_published_is_refused_with_what_was(family: str, size: str, res: int, variant: str):
    with pytest.raises(UsageError, match=rf"no {family} {size} .* there are: pt at 224/448/896, mix at 224/448"):
        locate(ModelChoice(size=size, res=res, family=family, variant=variant))


@pytest.mark.parametrize(
    ("size", "res", "family"), [("10b", 448, "paligemma"), ("3b", 225, "paligemma2"), ("5b", 448, "paligemma2")]
)
def test_a_model_that_does_not_exist_is_refused(size: str, res: int, family: str):
    with pytest.raises(UsageError, match=r"published|does not exist"):
        locate(ModelChoice(size=size, res=res, family=family))


def test_only_bf16_begins_from_the_rounded_revision():
    assert revisions("paligemma", "bf16") == ["bfloat16", "main"]
    assert {tuple(revisions("paligemma", p)) for p in (None, "fp32", "fp16", "int4")} == {("main",)}
    assert revisions("paligemma2", "bf16") == ["main"]


def test_an_adapter_alone_brings_its_base_from_the_hub(server: Hub, tmp_path: Path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": REPOSITORY}
    (adapter / "adapter_model.safetensors").write_bytes(b"")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    found = locate(ModelChoice(adapter=adapter))
    assert (found.repository, found.revision, found.license, found.notes) == (REPOSITORY, COMMIT, "gemma", ())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "revision": "float99"}))
    with pytest.raises(HubError, match="no revision 'float99'"):
        locate(ModelChoice(adapter=adapter))
