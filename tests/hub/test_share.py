# SPDX-License-Identifier: Apache-2.0
"""pgx push and pgx pull, by the hub's own library, against a hub on this machine."""

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

pytest.importorskip("huggingface_hub")
pytest.importorskip("onnx_ir")

from huggingface_hub import constants

from pgxport.bundle import writer as writer_module
from pgxport.bundle.manifest import CARD, MANIFEST
from pgxport.bundle.reader import Bundle
from pgxport.errors import DiskError, HubError, InputError, IntegrityError, PgxError, UsageError
from pgxport.hub import fetch as hub
from pgxport.hub import share
from pgxport.hub.share import PullOptions, PushOptions, pull, push

ONLINE = {"HF_HUB_OFFLINE": "0"}  # where all else is kept offline: the server is of this machine
REPOSITORY = "me/my-paligemma"
TOKEN = "hf_" + "secretsecret" * 3
SMALL = (".json", ".md", ".toml")  # of these, git's own files are made


@dataclass
class Hub:
    """A model hub that keeps what it is given, and what is wrong with it."""

    commits: list[dict[str, bytes]] = field(default_factory=list)
    branches: dict[str, int] = field(default_factory=dict)  # name -> commit
    created: list[dict[str, Any]] = field(default_factory=list)
    lfs: dict[str, bytes] = field(default_factory=dict)
    refuse: dict[str, int] = field(default_factory=dict)  # part of a path -> status
    code: str = ""
    yaml_errors: list[dict[str, str]] = field(default_factory=list)
    break_uploads: bool = False
    corrupt: str | None = None
    break_after: list[int] = field(default_factory=list)
    slow: float = 0.0
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)  # method, path, Range
    url: str = ""

    def put(self, files: dict[str, bytes], branch: str = "main") -> None:
        self.commits.append(files)
        self.branches[branch] = len(self.commits) - 1

    def sha(self, number: int) -> str:
        return f"{number:040x}"

    def at(self, revision: str) -> dict[str, bytes] | None:
        number = self.branches.get(revision, int(revision, 16) if len(revision) == 40 else -1)
        return self.commits[number] if 0 <= number < len(self.commits) else None


def blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def handler(state: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer()

        do_HEAD = do_POST = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            return None

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path).lstrip("/")
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self.chunked()
            state.asked.append((self.command, path, self.headers.get("Range")))
            model = f"api/models/{REPOSITORY}"
            if status := next((code for part, code in state.refuse.items() if part in path), None):
                self.reply({"error": "refused"}, status, {"X-Error-Code": state.code})
            elif path == "api/repos/create":
                self.create(json.loads(body))
            elif path == "api/validate-yaml":  # of the card
                assert json.loads(body)["content"].startswith("---\nlibrary_name")
                self.reply({"errors": state.yaml_errors, "warnings": []}, 400 if state.yaml_errors else 200)
            elif path.startswith(f"{model}/branch/"):
                state.branches.setdefault(path.rpartition("/")[2], state.branches["main"])
                self.reply({})
            elif path.startswith(f"{model}/preupload/"):
                self.reply({"files": [self.mode(file) for file in json.loads(body)["files"]]})
            elif path == f"{REPOSITORY}.git/info/lfs/objects/batch":
                self.reply({"transfer": "basic", "objects": [self.upload(o) for o in json.loads(body)["objects"]]})
            elif path.startswith("upload/"):
                self.keep(path.removeprefix("upload/"), body)
            elif path.startswith(f"{model}/commit/"):
                self.commit(path.rpartition("/")[2], body)
            elif path.startswith(f"{model}/revision/") and (files := state.at(path.rpartition("/")[2])) is not None:
                number = state.commits.index(files)
                siblings = [self.entry(name, data) for name, data in files.items()]
                self.reply({"id": REPOSITORY, "sha": state.sha(number), "siblings": siblings})
            elif path.startswith(f"{REPOSITORY}/resolve/"):
                revision, _, name = path.removeprefix(f"{REPOSITORY}/resolve/").partition("/")
                self.file((state.at(revision) or {})[name], name)
            elif path.startswith(f"{model}/revision/"):
                self.reply({"error": "none"}, 404, {"X-Error-Code": "RevisionNotFound" if state.commits else "RepoNotFound"})
            else:
                self.reply({"error": path}, 404, {"X-Error-Code": "RepoNotFound"})

        def create(self, asked: dict[str, Any]) -> None:
            if state.commits:
                return self.reply({"error": "exists", "url": f"{state.url}/{REPOSITORY}"}, 409)
            state.created.append(asked)
            state.put({".gitattributes": b""})
            self.reply({"url": f"{state.url}/{REPOSITORY}", "name": REPOSITORY})

        def mode(self, file: dict[str, Any]) -> dict[str, Any]:
            return {
                "path": file["path"],
                "uploadMode": "regular" if file["path"].endswith(SMALL) and file["size"] < 100_000 else "lfs",
                "shouldIgnore": False,
            }

        def upload(self, item: dict[str, Any]) -> dict[str, Any]:
            there = {} if item["oid"] in state.lfs else {"actions": {"upload": {"href": f"{state.url}/upload/{item['oid']}"}}}
            return {"oid": item["oid"], "size": item["size"], **there}

        def keep(self, oid: str, body: bytes) -> None:
            if state.break_uploads and state.lfs:
                self.close_connection = True
                return self.connection.close()
            assert hashlib.sha256(body).hexdigest() == oid
            state.lfs[oid] = body
            self.reply({})

        def commit(self, branch: str, body: bytes) -> None:
            files = dict(state.commits[state.branches[branch]])
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = state.lfs[value["oid"]]
            if state.corrupt:
                files[state.corrupt] = b"not what was sent"
            state.put(files, branch)
            sha = state.sha(len(state.commits) - 1)
            self.reply({"success": True, "commitOid": sha, "commitUrl": f"{state.url}/{REPOSITORY}/commit/{sha}"})

        def entry(self, name: str, data: bytes) -> dict[str, Any]:
            found: dict[str, Any] = {"rfilename": name, "size": len(data), "blobId": blob_id(data)}
            if not name.endswith(SMALL) or len(data) >= 100_000:
                sha = hashlib.sha256(data).hexdigest()
                found["lfs"] = {"sha256": sha, "size": len(data), "pointerSize": 134}
            return found

        def file(self, data: bytes, name: str) -> None:
            asked = self.headers.get("Range")
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            if name == state.corrupt:
                data = bytes([data[0] ^ 1]) + data[1:]
            self.send_response(206 if asked else 200)
            if asked:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            if state.break_after and name.endswith(".data"):
                self.wfile.write(data[start : start + state.break_after.pop(0)])
                self.close_connection = True
                return
            if state.slow and name.endswith(".data"):
                self.wfile.write(data[start : start + 100_000])
                self.wfile.flush()
                time.sleep(state.slow)
                self.close_connection = True
                return
            self.wfile.write(data[start:])

        def chunked(self) -> bytes:
            body = b""
            while count := int(self.rfile.readline(), 16):
                body += self.rfile.read(count)
                self.rfile.readline()
            self.rfile.readline()
            return body

        def reply(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            for key, text in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(key, text)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    return Handler


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub on this machine, and nothing else within reach."""
    state = Hub()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(state)) as http:
        http.daemon_threads = True
        threading.Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        state.url = f"http://127.0.0.1:{http.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", state.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", state.url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(hub, "TIMEOUT", 5.0)
        monkeypatch.chdir(tmp_path)
        yield state
        http.shutdown()


@pytest.fixture(scope="module")
def source(a_bundle: Path) -> Path:
    return a_bundle


@pytest.fixture
def pushed(server: Hub, source: Path) -> Hub:
    """The hub, with the bundle in it and a file of its owner's."""
    server.put({file.name: file.read_bytes() for file in source.iterdir()} | {".gitattributes": b"", "notes.pdf": b"%PDF"})
    return server


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def fetched(server: Hub) -> list[tuple[str, str | None]]:
    return [(path.rpartition("/")[2], span) for method, path, span in server.asked if method == "GET" and "/resolve/" in path]


# Push


def test_what_is_pushed_and_pulled_is_the_bundle(server: Hub, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    done = push(PushOptions(source, REPOSITORY, private=True))
    assert server.created[0]["visibility"] == "private"
    assert {name: data for name, data in server.commits[-1].items() if name != ".gitattributes"} == contents(source)
    assert (done.commit, done.nbytes) == (server.sha(1), sum(map(len, contents(source).values())))
    found = pull(PullOptions(REPOSITORY, tmp_path / "b"))
    assert found.commit == done.commit
    assert contents(tmp_path / "b") == contents(source)
    assert Bundle.open(tmp_path / "b") == Bundle(tmp_path / "b", Bundle.open(source).manifest)
    assert os.listdir(tmp_path) == ["b"]
    assert capfd.readouterr() == ("", "")


def test_what_the_hub_has_is_not_sent_again(server: Hub, source: Path):
    push(PushOptions(source, REPOSITORY))
    server.asked.clear()
    push(PushOptions(source, REPOSITORY))
    assert not [path for method, path, _ in server.asked if path.startswith("upload/")]


def test_a_push_that_broke_off_goes_on_where_it_was(server: Hub, source: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import lfs

    monkeypatch.setattr(lfs.http_backoff, "__kwdefaults__", {**lfs.http_backoff.__kwdefaults__, "max_retries": 0})
    server.break_uploads = True
    with pytest.raises(HubError, match="run this again") as info:
        push(PushOptions(source, REPOSITORY))
    assert info.value.exit_code == 9
    assert len(server.commits) == 1  # in one commit, or in none
    kept = set(server.lfs)
    assert kept
    server.break_uploads = False
    server.asked.clear()
    push(PushOptions(source, REPOSITORY))
    assert not {path.removeprefix("upload/") for _, path, _ in server.asked} & kept
    assert contents(source).items() <= server.commits[-1].items()


def test_a_branch_is_made_for_a_revision(server: Hub, source: Path, tmp_path: Path):
    push(PushOptions(source, REPOSITORY, revision="v2"))
    assert set(server.branches) == {"main", "v2"}
    assert MANIFEST not in server.commits[server.branches["main"]]
    pull(PullOptions(REPOSITORY, tmp_path / "b", revision="v2"))
    with pytest.raises(InputError, match=r"holds no bundle at revision 'main': it has no manifest\.json"):
        pull(PullOptions(REPOSITORY, tmp_path / "c"))


def test_a_dry_run_verifies_and_needs_no_network(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    done = push(PushOptions(source, REPOSITORY, dry_run=True))
    assert done.files == {name: len(data) for name, data in contents(source).items()}
    copied = Path(shutil.copytree(source, tmp_path / "b"))
    (copied / CARD).write_bytes(b"changed")
    with pytest.raises(IntegrityError, match=r"README\.md"):
        push(PushOptions(copied, REPOSITORY, dry_run=True))


def test_a_bundle_that_was_changed_is_not_pushed(server: Hub, source: Path, tmp_path: Path):
    copied = Path(shutil.copytree(source, tmp_path / "b"))
    (copied / "stranger").touch()
    with pytest.raises(IntegrityError, match="stranger"):
        push(PushOptions(copied, REPOSITORY))
    assert not server.asked


@pytest.mark.parametrize("name", ["tokenizer.json", CARD])
def test_a_hub_that_keeps_something_else_is_found_out(server: Hub, source: Path, name: str):
    server.corrupt = name
    with pytest.raises(IntegrityError, match=f"after the upload the hub has another {name}"):
        push(PushOptions(source, REPOSITORY))


@pytest.mark.parametrize("name", ["", "b", "a/b/c", "me/x@main", "../x", "https://hub/me/x"])
def test_what_is_no_name_of_a_repository_is_a_usage_error(source: Path, name: str):
    for act in (lambda: push(PushOptions(source, name, dry_run=True)), lambda: pull(PullOptions(name))):
        with pytest.raises(UsageError, match="is no name of a repository; write OWNER/NAME"):
            act()


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        ({"api/repos/create": 401}, r"lets nobody write to me/my-paligemma .*HTTP 401.*token that may write, as me or"),
        ({"api/repos/create": 403}, "lets nobody write"),
        ({"preupload": 403}, "lets nobody write"),
        ({"commit": 409}, "changed by another commit meanwhile"),
        ({"commit": 500}, "HTTP 500; try again later"),
    ],
)
def test_a_refusal_to_write_is_explained(server: Hub, source: Path, refuse: dict[str, int], message: str):
    server.refuse = refuse
    with pytest.raises(HubError, match=message) as info:
        push(PushOptions(source, REPOSITORY))
    assert TOKEN not in str(info.value)


def test_a_card_that_the_hub_does_not_take_is_explained(server: Hub, source: Path):
    server.yaml_errors = [{"message": '"license" is unknown'}]
    with pytest.raises(HubError, match=r'the hub refuses the commit: (.|\n)*"license" is unknown'):
        push(PushOptions(source, REPOSITORY))


# Pull


def test_only_the_bundles_files_are_fetched(pushed: Hub, source: Path):
    pull(PullOptions(REPOSITORY))
    assert {name for name, _ in fetched(pushed)} == set(contents(source))
    assert contents(Path("my-paligemma")) == contents(source)


def test_progress_counts_every_byte(pushed: Hub, source: Path):
    seen: list[tuple[str, int, int]] = []
    pull(PullOptions(REPOSITORY), progress=lambda *now: seen.append(now))
    assert seen[-1][1:] == (Bundle.open(source).nbytes,) * 2


def test_a_pulled_dry_run_writes_nothing(pushed: Hub, source: Path, tmp_path: Path):
    found = pull(PullOptions(REPOSITORY, dry_run=True))
    assert (found.commit, dict(found.files)) == (pushed.sha(0), {name: len(data) for name, data in contents(source).items()})
    assert [name for name, _ in fetched(pushed)] == [MANIFEST]
    assert os.listdir(tmp_path) == []


def test_an_output_that_is_there_is_kept_until_overwrite(pushed: Hub, source: Path, tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "precious").touch()
    with pytest.raises(UsageError, match="--overwrite"):
        pull(PullOptions(REPOSITORY, tmp_path / "b"))
    with pytest.raises(UsageError, match="'precious', which is not part of a bundle"):
        pull(PullOptions(REPOSITORY, tmp_path / "b", overwrite=True))
    assert not pushed.asked
    (tmp_path / "b" / "precious").unlink()
    pull(PullOptions(REPOSITORY, tmp_path / "b", overwrite=True))
    pull(PullOptions(REPOSITORY, tmp_path / "b", overwrite=True))
    assert contents(tmp_path / "b") == contents(source)
    assert os.listdir(tmp_path) == ["b"]


def test_a_pull_that_broke_off_goes_on_where_it_was(pushed: Hub, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub, "RETRIES", 1)
    pushed.break_after = [70_000, 0, 0]
    with pytest.raises(HubError, match=r"broke off at .* run this again"):
        pull(PullOptions(REPOSITORY, tmp_path / "b"))
    assert not (tmp_path / "b").exists()
    whole = [name for name in contents(tmp_path / "b.partial") if not name.endswith(".incomplete")]
    (part,) = (tmp_path / "b.partial").glob("*.incomplete")
    kept = part.stat().st_size
    pushed.break_after = []
    pushed.asked.clear()
    pull(PullOptions(REPOSITORY, tmp_path / "b"))
    assert contents(tmp_path / "b") == contents(source)
    assert f"bytes={kept}-" in [span for _, span in fetched(pushed)]
    assert not {name for name, _ in fetched(pushed)} & set(whole)
    assert os.listdir(tmp_path) == ["b"]


def test_what_another_bundle_left_there_is_not_mixed_in(pushed: Hub, source: Path, tmp_path: Path):
    left = tmp_path / "b.partial"
    (left / "deep").mkdir(parents=True)
    (left / "stranger").touch()
    (left / "tokenizer.json").write_bytes(b"of another")
    (left / "projector.data").symlink_to(source / "projector.data")
    pull(PullOptions(REPOSITORY, tmp_path / "b"))
    assert contents(tmp_path / "b") == contents(source)


def test_killed_in_the_middle_it_leaves_no_bundle_and_goes_on(pushed: Hub, source: Path, tmp_path: Path):
    pushed.slow = 60.0
    command = [sys.executable, "-m", "pgxport", "pull", REPOSITORY, "-o", str(tmp_path / "b")]
    environment = {**os.environ, **ONLINE, "HF_ENDPOINT": pushed.url, "PYTHONPATH": str(Path(writer_module.__file__).parents[2])}
    process = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while not any(f.stat().st_size for f in tmp_path.glob("b.partial/*.incomplete")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert os.listdir(tmp_path) == ["b.partial"]
    pushed.slow = 0.0
    pull(PullOptions(REPOSITORY, tmp_path / "b"))
    assert contents(tmp_path / "b") == contents(source)


def spoilt(manifest: dict[str, Any], harm: str) -> None:
    files = manifest["files"]
    match harm:
        case "a path":
            files["../outside"] = files["tokenizer.json"]
        case "a file that is not there":
            files["more.data"] = files["tokenizer.json"]
        case "another size":
            files["tokenizer.json"]["size"] += 1
        case "another digest":
            files["decoder_step.data"]["sha256"] = "0" * 64
        case "another format":
            manifest["format_version"] = 2


@pytest.mark.parametrize("harm", ["a path", "a file that is not there", "another size", "another digest", "another format"])
def test_a_manifest_that_lies_is_refused_before_anything_is_fetched(pushed: Hub, source: Path, tmp_path: Path, harm: str):
    manifest = json.loads((source / MANIFEST).read_bytes())
    spoilt(manifest, harm)
    pushed.commits[0][MANIFEST] = json.dumps(manifest).encode()
    with pytest.raises(IntegrityError, match=REPOSITORY):
        pull(PullOptions(REPOSITORY, tmp_path / "b"))
    assert {name for name, _ in fetched(pushed)} == {MANIFEST}
    assert os.listdir(tmp_path) == []


def test_bytes_changed_on_the_way_are_found_out(pushed: Hub, tmp_path: Path):
    pushed.corrupt = "vision_encoder.data"
    with pytest.raises(IntegrityError, match=r"vision_encoder\.data arrived damaged"):
        pull(PullOptions(REPOSITORY, tmp_path / "b"))
    assert not (tmp_path / "b").exists()


def test_a_bundle_that_is_whole_and_not_sound_is_not_kept(pushed: Hub, source: Path, tmp_path: Path):
    manifest = json.loads((source / MANIFEST).read_bytes())
    graph = b"not a graph"
    manifest["files"]["projector.onnx"] = {"sha256": hashlib.sha256(graph).hexdigest(), "size": len(graph)}
    pushed.commits[0] |= {MANIFEST: json.dumps(manifest).encode(), "projector.onnx": graph}
    with pytest.raises(IntegrityError, match="is no sound bundle, and was deleted here"):
        pull(PullOptions(REPOSITORY, tmp_path / "b"))
    assert os.listdir(tmp_path) == []


def test_a_disk_without_room_is_said_before_anything_is_fetched(pushed: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Usage:
        free = 1000

    monkeypatch.setattr(share.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(DiskError, match="has room for 1,000"):
        pull(PullOptions(REPOSITORY, tmp_path / "b"))
    assert [name for name, _ in fetched(pushed)] == [MANIFEST]


@pytest.mark.parametrize(
    ("refuse", "code", "message"),
    [
        ({"revision": 401}, "GatedRepo", "is gated: sign in"),
        ({"revision": 403}, "GatedRepo", "is gated: accept its licence"),
        ({"revision": 404}, "RepoNotFound", "has no me/my-paligemma, or it is private"),
        ({"revision": 404}, "RevisionNotFound", "has no revision 'main'"),
        ({"revision": 503}, "", "HTTP 503; try again later"),
        ({"resolve": 403}, "GatedRepo", "is gated: accept its licence"),
    ],
)
def test_a_refusal_to_read_is_explained(pushed: Hub, refuse: dict[str, int], code: str, message: str):
    pushed.refuse, pushed.code = refuse, code
    with pytest.raises(HubError, match=message) as info:
        pull(PullOptions(REPOSITORY))
    assert info.value.exit_code == 9
    assert TOKEN not in str(info.value)


@pytest.mark.parametrize("command", ["push", "pull"])
def test_offline_and_out_of_reach_are_explained(server: Hub, source: Path, command: str, monkeypatch: pytest.MonkeyPatch):
    def act() -> None:
        push(PushOptions(source, REPOSITORY)) if command == "push" else pull(PullOptions(REPOSITORY))

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=f"HF_HUB_OFFLINE is set, and pgx {command} needs the hub; unset it"):
        act()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"cannot be reached \(ConnectError\)"):
        act()


def test_the_commands_say_what_they_did_and_never_the_token(server: Hub, source: Path, tmp_path: Path):
    environment = {**os.environ, **ONLINE, "HF_ENDPOINT": server.url, "HF_HUB_DISABLE_XET": "1"}
    environment["PYTHONPATH"] = str(Path(writer_module.__file__).parents[2])

    def pgx(*args: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pgxport", *map(str, args)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert TOKEN not in done.stdout + done.stderr
        return done

    dry = pgx("push", source, REPOSITORY, "--dry-run", "--json")
    assert (dry.returncode, json.loads(dry.stdout)["pushed"], server.asked) == (0, False, [])
    done = pgx("push", source, REPOSITORY)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert done.stdout.startswith("pushed ")
    done = pgx("pull", REPOSITORY, "-o", tmp_path / "b", "-v")
    assert done.returncode == 0, done
    assert "decoder_step.data" in done.stderr
    assert "every file verified" in done.stdout
    assert pgx("pull", REPOSITORY, "-o", tmp_path / "b").returncode == 2
    server.refuse = {"api": 403}
    assert pgx("push", source, REPOSITORY).returncode == 9
    assert pgx("push", tmp_path, REPOSITORY).returncode == 4


def test_errors_are_of_the_kinds_that_are_documented():
    assert [kind.exit_code for kind in (UsageError, InputError, IntegrityError, DiskError, HubError)] == [2, 3, 4, 5, 9]
    assert all(issubclass(kind, PgxError) for kind in (UsageError, InputError, IntegrityError, DiskError, HubError))
