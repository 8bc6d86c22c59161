# SPDX-License-Identifier: Apache-2.0
"""--cluster on a real Ray cluster of several nodes: what one machine finds, node deaths or not; and times that stay a node's own."""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

ray = pytest.importorskip("ray")
pytest.importorskip("onnxruntime")
for library in ("altair", "vl_convert", "sacrebleu", "rouge_score", "pycocotools"):
    pytest.importorskip(library)

from ray.cluster_utils import Cluster as RayCluster  # noqa: E402

from pgxport import cli  # noqa: E402
from pgxport.bundle.manifest import MANIFEST  # noqa: E402
from pgxport.bundle.reader import Bundle  # noqa: E402
from pgxport.cluster import file_server  # noqa: E402
from pgxport.cluster.pool import Cluster, TaskQueue, WorkerContext  # noqa: E402
from pgxport.cluster.tasks import TRIES, Workers  # noqa: E402
from pgxport.data.loader import DataOptions  # noqa: E402
from pgxport.errors import EngineError, IntegrityError, NumericError, UsageError  # noqa: E402
from pgxport.files import file_sha256  # noqa: E402
from pgxport.reporting.report import ReportOptions, report  # noqa: E402
from pgxport.reporting.schema import Report  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="nodes are killed as Linux does it")
FEW = DataOptions(limit=2)  # of each of five tasks
SMALL = 80 << 20  # bytes of a node's object store, the least Ray takes


class Nodes:
    """A Ray cluster of this machine: a head that works not, and nodes with one CPU and a bundle cache each."""

    def __init__(self, folder: Path):
        self.folder = folder
        quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 8}
        head = {"num_cpus": 0, "object_store_memory": SMALL, "include_dashboard": False, "_system_config": quick}
        self._cluster = RayCluster(initialize_head=True, connect=False, head_node_args=head)
        self.address = self._cluster.address
        self._nodes: dict[str, Any] = {}

    def add(self, name: str) -> None:
        env = {"PGX_CACHE": str(self.cache(name))}
        self._nodes[name] = self._cluster.add_node(num_cpus=1, object_store_memory=SMALL, node_name=name, env_vars=env)

    def cache(self, name: str) -> Path:
        return self.folder / name

    def __contains__(self, name: str) -> bool:
        return name in self._nodes

    def kill(self, name: str) -> None:
        self._cluster.remove_node(self._nodes.pop(name), allow_graceful=False)
        deadline = time.monotonic() + 30  # its processes live on for a moment, long enough for the few samples of a test
        while any(node["NodeName"] == name and node["Alive"] for node in ray.nodes()):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    # Two clusters that begin at once on one machine take each other's ports: one at a time, whoever runs the tests.
    with open(Path(tempfile.gettempdir()) / f"pgx-test-cluster-{os.getuid()}", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        made = Nodes(tmp_path_factory.mktemp("nodes"))
        for name in ("one", "two"):
            made.add(name)
        ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
        yield made
        ray.shutdown()
        made.close()


@pytest.fixture(scope="module", autouse=True)
def both_begin() -> Iterator[None]:
    """No task is assigned while a worker gets ready: a sample takes 50 ms, so the first worker would do all of them alone."""
    assign = TaskQueue.assign

    def patient(queue: Any) -> None:
        if all(call.queued for call in queue.running.values()):
            assign(queue)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskQueue, "assign", patient)
        yield


@pytest.fixture(scope="module")
def bundles(tiny_112: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two bundles that answer differently."""
    other = tmp_path_factory.mktemp("bundles") / "other"
    shutil.copytree(tiny_112, other)
    table = np.fromfile(other / "token_table.bin", np.float32)
    noise = np.random.default_rng(1).normal(0, 0.3 * table.std(), table.shape)
    (table + noise).astype(np.float32).tofile(other / "token_table.bin")
    resealed(other, "token_table.bin")
    return tiny_112, other


def resealed(bundle: Path, name: str) -> None:
    """Let the manifest promise what a file holds now."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest["files"][name] = {"sha256": file_sha256(bundle / name), "size": (bundle / name).stat().st_size}
    (bundle / MANIFEST).write_text(json.dumps(manifest))


# The report ---------------------------------------------------------------------------------------------------------


def options(output: Path, bundles: Sequence[Path], **more: Any) -> ReportOptions:
    return ReportOptions(tuple(map(str, bundles)), output, **{"data": FEW, "threads": 1, **more})


def told(device: Any) -> Any:
    """What a chapter says that depends on no clock, as JSON; pictures stand in the first chapter."""
    kept = {"label", "name", "status", "digest", "bytes", "measured", "refused", "empty", "malformed", "truncated"}
    kept |= {"quality", "kept", "scores", "fidelity", "rounding"}
    return json.dumps(
        [row.model_dump(include=kept) for row in device.rows] + [p.quality and p.quality.model_dump() for p in device.pairs]
    )


def asked(output: Path) -> list[tuple[str, str, str]]:
    """Bundle, sample and node of every answer on disk."""
    found = []
    for file in (output / "measured").glob("*.jsonl"):
        first, *rest = map(json.loads, file.read_text().splitlines())
        found += [(first["digest"], line["sample"], line["place"]["node"]) for line in rest if line["kind"] == "asked"]
    return found


@pytest.fixture(scope="module")
def alone(bundles: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of this machine by itself."""
    return report(options(tmp_path_factory.mktemp("alone") / "report", bundles))


@pytest.fixture(scope="module")
def spread(nodes: Nodes, bundles: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    output = tmp_path_factory.mktemp("spread") / "report"
    return report(options(output, bundles, cluster=nodes.address)), output


def test_a_cluster_finds_what_one_machine_finds(alone: Report, spread: tuple[Report, Path]):
    made = spread[0]
    assert len(made.devices) == 2
    for device in made.devices:
        assert told(device) == told(alone.devices[0])
    assert made.devices[0].disagreements == alone.devices[0].disagreements
    assert made.devices[0].data == alone.devices[0].data


def test_times_stay_with_the_node_that_took_them(spread: tuple[Report, Path]):
    made, output = spread
    by_node = {device.name.rpartition("node ")[2]: device for device in made.devices}
    answers = asked(output)
    assert by_node.keys() == {"one", "two"} == {node for *_, node in answers}
    assert len(answers) == len({(bundle, sample) for bundle, sample, _ in answers}) == 2 * 10
    for name, device in by_node.items():
        assert device.environment.cores is not None
        own = Counter(bundle for bundle, _, node in answers if node == name)
        assert {row.digest: row.seconds["answer"].count for row in device.rows} == own
        assert all(row.load_seconds.keys() == {"verify", "load"} and row.peak for row in device.rows)
    # Both bundles answer a sample on one node, so that a ratio of their times is never one of two nodes.
    assert len({(sample, node) for _, sample, node in answers}) == 10
    page = (output / "report.html").read_text()
    assert all(f"node {name}" in page for name in by_node)


def test_a_node_fetches_a_bundle_once(nodes: Nodes, bundles: tuple[Path, Path], spread: tuple[Report, Path]):
    digests = {file_sha256(bundle / MANIFEST) for bundle in bundles}
    for name in ("one", "two"):
        kept = nodes.cache(name) / "bundles"
        assert {path.name for path in kept.iterdir() if path.is_dir()} == digests
        assert kept.stat().st_mode & 0o077 == 0
        assert all(Bundle.open(kept / digest) for digest in digests)


def test_what_was_measured_is_not_measured_again(nodes: Nodes, bundles: tuple[Path, Path], spread: tuple[Report, Path]):
    before = {file: file.read_bytes() for file in (spread[1] / "measured").iterdir()}
    said = list[str]()
    made = report(options(spread[1], bundles, cluster="127.0.0.1:1"), progress=said.append)  # nobody is asked
    assert said == ["working out intervals"]
    assert {file: file.read_bytes() for file in (spread[1] / "measured").iterdir()} == before
    assert made.devices == tuple(
        d.model_copy(update={"command": d.command.replace(nodes.address, "127.0.0.1:1")}) for d in spread[0].devices
    )


def test_a_killed_nodes_samples_are_done_again(
    nodes: Nodes, bundles: tuple[Path, Path], alone: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said, lost, killed = list[str](), list[Any](), list[str]()
    lose = TaskQueue.lose
    monkeypatch.setattr(TaskQueue, "lose", lambda self, call, reason: [lost.append(call.queued), *lose(self, call, reason)][1:])

    def progress(what: str) -> None:
        said.append(what)
        if what.startswith("sample 2 of 10"):  # whose node is given the next one right after
            killed.append(what.partition("on node ")[2].partition(":")[0])
            nodes.kill(killed[0])

    made = report(options(tmp_path / "report", bundles, cluster=nodes.address), progress=progress)
    nodes.add(killed[0])
    assert any(lost)
    assert told(made.devices[0]) == told(alone.devices[0])
    answers = asked(tmp_path / "report")
    assert len(answers) == len({(bundle, sample) for bundle, sample, _ in answers}) == 2 * 10
    assert killed[0] in {node for *_, node in answers}
    assert {device.name.rpartition("node ")[2] for device in made.devices} == {node for *_, node in answers}


def test_a_killed_driver_goes_on_where_it_was(nodes: Nodes, bundles: tuple[Path, Path], alone: Report, tmp_path: Path):
    output = tmp_path / "report"
    command = [sys.executable, "-m", "pgxport", "report", *map(str, bundles), "--limit", "2", "--threads", "1", "-o", str(output)]
    driver = subprocess.Popen(
        [*command, "--cluster", nodes.address], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while sum(file.read_bytes().count(b'"asked"') for file in output.glob("measured/*.jsonl")) < 6:
        assert driver.poll() is None, driver.stderr and driver.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    driver.kill()
    driver.communicate()
    before = asked(output)
    assert 6 <= len(before) < 20
    made = report(options(output, bundles, cluster=nodes.address))
    assert told(made.devices[0]) == told(alone.devices[0])
    after = asked(output)
    assert set(before) <= set(after)
    assert len(after) == len({(bundle, sample) for bundle, sample, _ in after}) == 20


def test_a_bundle_that_crashes_is_a_row_and_the_others_go_on(
    nodes: Nodes, bundles: tuple[Path, Path], alone: Report, tmp_path: Path
):
    crashing = tmp_path / "crashing"
    shutil.copytree(bundles[1], crashing)
    (crashing / MANIFEST).write_text((crashing / MANIFEST).read_text() + "\n")  # another digest
    digest = file_sha256(crashing / MANIFEST)

    def progress(what: str) -> None:
        if what.startswith("sample 3 of"):
            for name in ("one", "two"):
                for file in (nodes.cache(name) / "bundles" / digest).glob("*.data"):
                    os.truncate(file, 0)  # under the mapped weights

    missing = tmp_path / "missing"
    shutil.copytree(bundles[0], missing)
    (missing / "decoder_step.onnx").unlink()
    made = report(options(tmp_path / "report", [bundles[0], crashing, missing], cluster=nodes.address), progress=progress)
    for device in made.devices:
        sound, crashed, torn = device.rows
        assert (sound.status, sound.measured, sound.quality) == ("ok", 10, alone.devices[0].rows[0].quality)
        assert (crashed.status, torn.status, torn.exit_code) == ("failed", "failed", 4)
        assert "ended by signal 7" in crashed.reason  # SIGBUS
        assert "(on node " in crashed.reason
        assert "decoder_step.onnx is missing" in torn.reason
        assert 0 < crashed.measured < 10


# The pool -----------------------------------------------------------------------------------------------------------


ONE = Workers(1)


@dataclass(frozen=True)
class Toy:
    """Does what its tasks say: sleep for some seconds, die some times, or raise."""

    folder: Path

    def start(self, context: WorkerContext) -> Any:
        def do(task: tuple[str, float]) -> str:
            what, amount = task
            file = self.folder / f"{what}-{amount}"
            with open(file, "a") as log:
                log.write("x")
            if what == "die" and len(file.read_text()) <= amount:
                os.kill(os.getpid(), 9)
            if what == "raise":
                raise NumericError("the numbers are not finite")
            time.sleep(amount if what == "sleep" else 0)
            return what

        return do


@pytest.fixture
def toy(nodes: Nodes, tmp_path: Path) -> Iterator[Any]:
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield lambda tasks, workers=ONE: list(Cluster(nodes.address).__enter__().spread(Toy(tmp_path), tasks, workers))
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_whoever_is_free_takes_the_next_and_what_the_dead_held_is_not_for_ever(toy: Any, tmp_path: Path):
    found = {d.task: d for d in toy([("sleep", 3.0), *[("sleep", 0.01 * n) for n in range(9)], ("die", 1), ("die", 99)])}
    assert sum(d.node != found["sleep", 3.0].node for d in found.values()) >= 9
    assert found["die", 1].result == "die"
    assert (found["die", 99].result, len((tmp_path / "die-99").read_text())) == (None, TRIES)
    assert found["die", 99].lost


def test_an_error_keeps_its_kind_and_names_its_node(toy: Any):
    with pytest.raises(NumericError, match=r"^on node (one|two): the numbers are not finite$"):
        toy([("raise", 0)])


def test_a_cluster_without_room_says_what_it_has(toy: Any):
    with pytest.raises(EngineError, match=r"room for 8 CPUs; there are: .*one with 1 CPUs"):
        toy([("sleep", 0.0)], Workers(8))
    with pytest.raises(EngineError, match="1 CPUs and a GPU"):
        toy([("sleep", 0.0)], Workers(1, gpu=True))


def test_nodes_with_other_versions_are_refused(toy: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: "0.0")
    with pytest.raises(UsageError, match=r"node (one|two) has pgxport .* \(here 0\.0\), numpy"):
        toy([("sleep", 0.0)])


def test_an_address_is_checked_before_ray_is(monkeypatch: pytest.MonkeyPatch):
    for wrong in ("", "ray://head:10001", "head", "auto ", "head:port"):
        with pytest.raises(UsageError, match="auto, local or HOST:PORT"):
            Cluster(wrong)
    for right in ("auto", "local", "10.0.0.1:6379", "head.lan:6379", "[fe80::1]:6379"):
        assert Cluster(right).address == right
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r'pip install "pgxport\[cluster\]", here and on every node'):
        Cluster("auto").__enter__()


def test_a_cluster_that_does_not_answer_is_an_error_at_once():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", f"from pgxport.cluster.pool import Cluster; Cluster({address!r}).__enter__()"],
            capture_output=True, text=True, timeout=30, check=False,
        )  # fmt: skip
    assert f"EngineError: no Ray cluster answers at --cluster {address}" in done.stderr


# Bundles in transfer ------------------------------------------------------------------------------------------------


class Counting(file_server.FileServer):
    """A file server without Ray."""

    def transfer(self, digest: str, *, wrong: str = "") -> file_server.Transfer:
        def chunks(name: str, size: int | None) -> Iterator[bytes]:
            for offset in range(0, size or 1, file_server.CHUNK):
                content = self.chunk(digest, name, offset)
                yield content[:-1] + bytes([content[-1] ^ 1]) if name == wrong else content

        return chunks


@pytest.fixture
def served(tiny_112: Path) -> tuple[Counting, str]:
    made, digest = Counting(), file_server.digest_of(tiny_112)
    made.offer(digest, str(tiny_112))
    return made, digest


def test_workers_of_one_node_fetch_a_bundle_once(served: tuple[Counting, str], tiny_112: Path, tmp_path: Path):
    made, digest = served
    with ThreadPoolExecutor(4) as workers:  # a lock of flock is one of an open file, whichever thread or process has it
        found = list(workers.map(lambda _: file_server.fetch(digest, made.transfer(digest), tmp_path / "cache"), range(4)))
    assert set(found) == {tmp_path / "cache" / digest}
    assert made.served() == {digest: sum(file.stat().st_size for file in tiny_112.iterdir())}
    assert {file.name: file_sha256(file) for file in found[0].iterdir()} == {f.name: file_sha256(f) for f in tiny_112.iterdir()}


def test_a_damaged_bundle_is_never_used(served: tuple[Counting, str], tmp_path: Path):
    made, digest = served
    for name in (MANIFEST, "tokenizer.json"):
        with pytest.raises(IntegrityError, match="sha256"):
            file_server.fetch(digest, made.transfer(digest, wrong=name), tmp_path)
        assert not (tmp_path / digest).exists()
    path = file_server.fetch(digest, made.transfer(digest), tmp_path)
    (path / "tokenizer.json").write_text("{}")
    assert file_server.fetch(digest, made.transfer(digest), tmp_path) == path
    assert file_server.digest_of(path) == digest


def test_a_folder_that_others_may_write_is_refused(served: tuple[Counting, str], tmp_path: Path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("open", "link"):
        with pytest.raises(IntegrityError, match="this user alone"):
            file_server.fetch(served[1], served[0].transfer(served[1]), tmp_path / name)


def test_folders_of_dead_processes_are_deleted(tmp_path: Path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for pid in (dead.pid, os.getpid(), os.getppid()):
        (tmp_path / f"passing-{pid}").mkdir()
    assert file_server.temporary_folder(tmp_path) == tmp_path / f"passing-{os.getpid()}"
    assert {path.name for path in tmp_path.iterdir()} == {f"passing-{pid}" for pid in (os.getpid(), os.getppid())}


# pgx run --images ---------------------------------------------------------------------------------------------------


def test_many_pictures_are_answered_as_alone(nodes: Nodes, tiny_112: Path, tmp_path: Path):
    from pgxport.models.tiny.scenes import draw

    for n in range(5):
        draw("test", n).image.save(tmp_path / f"{n}.png")
    (tmp_path / "2b.jpg").write_bytes(b"no picture")
    words = ["run", str(tiny_112), "--images", str(tmp_path), "--images", str(tmp_path / "gone.png"), "--prompt", "caption en"]
    found = []
    for more in ([], ["--cluster", nodes.address]):
        done = CliRunner().invoke(cli.cli, [*words, "--threads", "1", "--json", *more], catch_exceptions=False)
        assert (done.exit_code, done.stderr) == (0, "5 of 7 pictures answered\n")
        found.append([json.loads(line) for line in done.stdout.splitlines()])
    here, there = found
    assert sum("error" in row for row in here) == 2
    assert {row.pop("node") for row in there} <= {"one", "two"}
    for row in (*here, *there):
        assert ("error" in row) != bool(row.pop("timings", None))
    assert there == here


@pytest.fixture
def dying(nodes: Nodes, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The node of the first result is killed as soon as that is there, and given the next item; yields what was lost with it."""
    lost, killed, lose, spread = list[Any](), list[str](), TaskQueue.lose, Cluster.spread

    def killing(self: Cluster, *given: Any) -> Iterator[Any]:
        for done in spread(self, *given):
            if not killed:
                killed.append(done.node)
                nodes.kill(done.node)
            yield done

    monkeypatch.setattr(TaskQueue, "lose", lambda self, call, reason: [lost.append(call.queued), *lose(self, call, reason)][1:])
    monkeypatch.setattr(Cluster, "spread", killing)
    yield lost
    nodes.add(killed[0])


def test_a_killed_nodes_pictures_are_answered_by_another(nodes: Nodes, tiny_112: Path, tmp_path: Path, dying: list[Any]):
    from pgxport.cluster.many_pictures import ask_each as ask_there
    from pgxport.models.tiny.scenes import draw
    from pgxport.runners.many import PictureQuestion, ask_each

    pictures = [tmp_path / f"{n}.png" for n in range(6)]
    for n, path in enumerate(pictures):
        draw("test", n).image.save(path)
    question = PictureQuestion("caption en", threads=1)
    here = [row.to_json() for row in ask_each(str(tiny_112), pictures, question)]
    there = [row.to_json() for row in ask_there(str(tiny_112), pictures, question, nodes.address)]
    assert any(dying)
    assert {row.pop("node") for row in there} == {"one", "two"}
    for row in (*here, *there):
        del row["timings"]
    assert there == here


# pgx tune -----------------------------------------------------------------------------------------------------------


def test_a_candidates_score_is_that_of_one_machine(nodes: Nodes, tmp_path: Path):
    from pgxport.tuning.bundles import Bundles
    from pgxport.tuning.candidates import groups, recipe
    from pgxport.tuning.tune import TuneOptions, tuned_model

    subject = tuned_model(TuneOptions(size="tiny", res=112, samples=1, threads=1))
    found = {}
    with Cluster(nodes.address) as cluster:
        for name, where in (("alone", None), ("spread", cluster)):
            with Bundles(subject, tmp_path / name, lambda what: None, where) as bundles:
                every = groups(subject.spec)
                decoder = next(g.name for g in every if "vision" not in g.name and "projector" not in g.name)
                vision = next(g.name for g in every if "vision" in g.name)
                for group in (decoder, vision):
                    made = bundles.measure(group, recipe("tuned", every, {group: "w8-dynamic"})).to_json()
                    assert made.pop("ms") > 0
                    assert made.pop("stages").keys() == {"vision", "prefill", "step"}
                    found[name, group] = made
    for group in (decoder, vision):
        assert found["spread", group] == found["alone", group]
        assert found["alone", group]["kl"] > 0
    features = {n: sorted(f.name for f in (tmp_path / n).glob("reference-*/features-*")) for n in ("alone", "spread")}
    assert features["alone"] == features["spread"] != []
    for name in ("one", "two"):
        assert not list((nodes.cache(name) / "bundles").glob("passing-*"))


def test_a_killed_nodes_samples_of_a_candidate_are_scored_by_another(nodes: Nodes, tmp_path: Path, dying: list[Any]):
    from pgxport.tuning.bundles import Bundles
    from pgxport.tuning.candidates import groups, recipe
    from pgxport.tuning.tune import TuneOptions, tuned_model

    subject = tuned_model(TuneOptions(size="tiny", res=112, samples=1, threads=1))
    every = groups(subject.spec)
    tried = recipe("tuned", every, {every[-1].name: "w8-dynamic"})
    found = []
    with Cluster(nodes.address) as cluster:
        for name, where in (("alone", None), ("spread", cluster)):
            with Bundles(subject, tmp_path / name, lambda what: None, where) as bundles:
                made = bundles.measure("last", tried).to_json()
                found.append({key: value for key, value in made.items() if key not in ("ms", "stages")})
    assert any(dying)
    assert found[0] == found[1]


@pytest.mark.nightly
def test_a_recipe_tuned_on_a_cluster_is_that_of_one_machine(nodes: Nodes, tmp_path: Path):
    from pgxport.tuning.bundles import rules_text
    from pgxport.tuning.tune import TuneOptions, tune

    found = []
    for name, address in (("alone", None), ("spread", nodes.address)):
        words = {"size": "tiny", "res": 112, "samples": 1, "threads": 1, "candidates": ("w8-dynamic",), "max_loss": 20.0}
        made = tune(TuneOptions(output=tmp_path / f"{name}.toml", cluster=address, **words))
        assert made.winner
        measured = [*made.named, made.base, *(p.measured for p in made.probes), *(m.measured for m in made.mixes)]
        found.append((rules_text(made.winner.recipe), [(m.label, m.nbytes, m.kl, m.agreement, m.loss) for m in measured]))
    assert found[0] == found[1]
