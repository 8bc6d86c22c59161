# SPDX-License-Identifier: Apache-2.0
"""The command as a shell sees it: exit codes, what goes to which stream, and what is left behind."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from PIL import Image

import pgxport
from pgxport import errors, terminal
from pgxport.bundle.manifest import MANIFEST
from pgxport.bundle.reader import Bundle
from pgxport.cli import cli, main
from pgxport.runners import runner as runner_module
from pgxport.runners.outputs import Answer, parse

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(pgxport.__file__).parents[1])}
ESCAPE = "\x1b]0 owned\x07\x1b[31m\x1b[2J"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a failure prints."""
        assert self.out == ""
        assert self.err.startswith("pgx: ")
        assert self.err.count("\n") == 1
        return self.err


Pgx = Callable[..., Done]


@pytest.fixture
def pgx(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pgx:
    """Run a command in this process."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*args: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["pgx", *map(str, args)])
        capsys.readouterr()
        code: Any = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            signal.signal(signal.SIGTERM, before)
        return Done(code, *capsys.readouterr())

    return run


def python(code: str, *args: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env={**ENVIRONMENT, **environment})


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    return tmp_path / "red.png"


COMMANDS = sorted(cli.commands)


# Help


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_that_the_command_accepts(pgx: Pgx, command: str):
    done = pgx(command, "--help")
    examples = [line.strip() for line in done.out.splitlines() if line.strip().startswith(f"pgx {command}")]
    assert (done.code, done.err) == (0, "")
    assert examples
    for example in examples:
        cli.commands[command].make_context(command, shlex.split(example)[2:])


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command: str):
    for option in cli.commands[command].params:
        assert not isinstance(option, click.Option) or option.name == "family" or option.help, option.name


def test_help_and_version_print_to_stdout(pgx: Pgx):
    assert all(f"\n  {command} " in pgx("--help").out for command in COMMANDS)
    assert pgx("--version") == Done(0, f"pgx, version {pgxport.__version__}\n", "")


def test_help_loads_nothing_heavy_and_installs_as_a_module():
    heavy = "'numpy', 'pydantic', 'PIL', 'tokenizers', 'onnxruntime', 'rich', 'onnx_ir', 'torch'"
    code = f"import runpy, sys\nsys.argv = ['pgx', '--help']\nrunpy.run_module('pgxport')\nsys.exit(len({{{heavy}}} & set(sys.modules)))"
    process = python(code)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("Usage: pgx ")


# Exit codes (docs/reference/exit-codes.md)


def test_the_exit_codes_are_the_documented_ones():
    codes = {name: c.exit_code for name, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.PgxError)}
    assert codes == {
        "PgxError": 1, "UsageError": 2, "InputError": 3, "CheckpointError": 3, "IntegrityError": 4, "DiskError": 5,
        "NumericError": 6, "EngineError": 7, "GateError": 8, "HubError": 9,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (errors.GateError("x"), 8),
        (MemoryError(), 6),
        (MemoryError("Unable to allocate 8 EiB"), 6),
        (OSError(28, "No space left on device", "f"), 5),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
        (errors.InputError(f"a\nname {ESCAPE}of two\r\nlines"), 3),
    ],
    ids=repr,
)
def test_a_failure_is_one_line_without_a_traceback(
    pgx: Pgx, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, raised: BaseException, code: int
):
    def fail(path: Path) -> None:
        raise raised

    monkeypatch.setattr("pgxport.inspection.describe", fail)
    done = pgx("inspect", tmp_path)
    assert done.code == code
    assert "\x1b" not in done.err
    assert "\x07" not in done.err
    assert "Traceback" not in done.err
    assert [line for line in done.err.splitlines() if line][-1].startswith("pgx: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_ends_every_command_with_130(pgx: Pgx, monkeypatch: pytest.MonkeyPatch, command: str):
    def interrupt(**options: object) -> None:
        with terminal.progress_bar(), terminal.stages(), errors.needs("export"):
            raise KeyboardInterrupt

    monkeypatch.setattr(cli.commands[command], "callback", interrupt)
    example = next(line.strip() for line in pgx(command, "--help").out.splitlines() if line.strip().startswith(f"pgx {command}"))
    done = pgx(*shlex.split(example)[1:])
    assert (done.code, done.out) == (130, "")
    assert done.err.splitlines()[-1] == "pgx: interrupted"


def test_a_bug_of_ours_keeps_its_traceback(pgx: Pgx, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr("pgxport.inspection.describe", lambda path: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        pgx("inspect", tmp_path)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("export --size 4b -o OUT", "choose --size"),
        ("export -o OUT", "no model was named"),
        ("export --size 3b -o OUT", "choose --res"),
        ("export --size 3b --res 300 -o OUT", "choose --res"),
        ("export --size 10b --res 224 --family paligemma -o OUT", "no paligemma of size '10b'"),
        ("export --size 3b --res 224 --variant ../x -o OUT", "there are: pt"),
        ("export --size tiny --res 300 -o OUT", "choose --res 112 or 224"),
        ("export --size tiny --precision fp7 -o OUT", "choose fp32"),
        ("export --size tiny --target tpu -o OUT", "choose cpu"),
    ],
)
def test_asking_for_what_does_not_exist_ends_with_2(pgx: Pgx, tmp_path: Path, args: str, says: str):
    pytest.importorskip("onnx_ir")
    done = pgx(*args.replace("OUT", str(tmp_path / "b")).split())
    assert done.code == 2
    assert says in done.error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "args", ["nope", "export --nope", "export --res x", "run b", "run b --image i --prompt p --max-new-tokens 0", "demo x y"]
)
def test_a_command_line_that_cannot_be_read_ends_with_2(pgx: Pgx, args: str):
    done = pgx(*args.split())
    assert (done.code, done.out) == (2, "")
    assert "Error: " in done.err


def test_a_missing_checkpoint_ends_with_3(pgx: Pgx, tmp_path: Path):
    pytest.importorskip("onnx_ir")
    done = pgx("export", "--checkpoint", tmp_path / "nowhere", "-o", tmp_path / "b")
    assert done.code == 3
    assert "no such folder" in done.error


@pytest.mark.parametrize(
    "harm", ["truncated", "no weights", "no config", "no tokenizer", "not json", "another model", "wrong shape"]
)
def test_a_corrupt_checkpoint_ends_with_3_and_leaves_nothing(pgx: Pgx, random_checkpoint: Path, tmp_path: Path, harm: str):
    pytest.importorskip("onnx_ir")
    folder = Path(shutil.copytree(random_checkpoint, tmp_path / "checkpoint"))
    config = json.loads((folder / "config.json").read_text())
    match harm:
        case "truncated":
            os.truncate(folder / "model.safetensors", 100_000)
        case "no weights" | "no config" | "no tokenizer":
            name = {"weights": "model.safetensors", "config": "config.json", "tokenizer": "tokenizer.json"}[harm[3:]]
            (folder / name).unlink()
        case "not json":
            (folder / "config.json").write_text("{")
        case "another model":
            (folder / "config.json").write_text(json.dumps({**config, "model_type": "llava"}))
        case "wrong shape":
            config["text_config"]["intermediate_size"] += 1
            (folder / "config.json").write_text(json.dumps(config))
    done = pgx("export", "--checkpoint", folder, "-o", tmp_path / "b")
    assert done.code == 3, done
    assert len(done.error) > 60
    assert os.listdir(tmp_path) == ["checkpoint"]


def test_the_wrong_resolution_of_a_checkpoint_ends_with_2(pgx: Pgx, random_checkpoint: Path, tmp_path: Path):
    pytest.importorskip("onnx_ir")
    done = pgx("export", "--checkpoint", random_checkpoint, "--res", 224, "-o", tmp_path / "b")
    assert done.code == 2
    assert "42 px" in done.error
    assert os.listdir(tmp_path) == []


def test_an_existing_output_ends_with_2_until_overwrite(pgx: Pgx, random_checkpoint: Path, tmp_path: Path):
    pytest.importorskip("onnx_ir")
    export = ("export", "--checkpoint", random_checkpoint, "-o", tmp_path / "b")
    assert pgx(*export).code == 0
    done = pgx(*export)
    assert done.code == 2
    assert "--overwrite" in done.error
    assert pgx(*export, "--overwrite").code == 0


def test_an_output_that_outgrows_its_limit_ends_with_5(random_checkpoint: Path, tmp_path: Path):
    pytest.importorskip("onnx_ir")
    code = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)); from pgxport.cli import main; main()"
    process = python(code, "export", "--checkpoint", random_checkpoint, "-o", tmp_path / "b")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 5, err
    assert Done(5, out, err).error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "options", [["--size", "3b", "--res", "224"], ["--checkpoint", "someone/finetune"]], ids=["published", "somebody's"]
)
def test_offline_without_a_local_copy_ends_with_9(tmp_path: Path, options: list[str]):
    pytest.importorskip("huggingface_hub")
    pytest.importorskip("onnx_ir")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    process = python("from pgxport.cli import main; main()", "export", *options, "-o", tmp_path / "b", **offline)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 9, err
    assert "hf download" in Done(9, out, err).error
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"--prompt": ""}, 3, "prompt is empty"),
        ({"--prompt": " \n"}, 3, "prompt is empty"),
        ({"--prompt": "caption " * 10_000}, 3, "shorten the prompt"),
        ({"--image": "nowhere.png"}, 3, "does not exist"),
        ({"--image": "BUNDLE"}, 3, "folder"),
        ({"--image": "BUNDLE/tokenizer.json"}, 3, "not a readable"),
        ({"--engine": "tpu"}, 7, "--engine cpu"),
        ({"--max-new-tokens": "100000"}, 3, "--context"),
        ({"--save": "out.tiff"}, 2, ".png"),
        ({"--save": "BUNDLE/tokenizer.json/out.png"}, 5, "--save"),
        ({"BUNDLE": "nowhere"}, 4, "no such folder"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_run_refuses(pgx: Pgx, a_bundle: Path, picture: Path, change: dict[str, str], code: int, says: str):
    options = {"--image": str(picture), "--prompt": "caption en", "--max-new-tokens": "2", **change}
    bundle = options.pop("BUNDLE", str(a_bundle))
    done = pgx("run", bundle, *(v.replace("BUNDLE", str(a_bundle)) for pair in options.items() for v in pair))
    assert done.code == code, done
    assert says in done.error


def test_a_manipulated_bundle_ends_with_4_in_every_command_that_opens_it(pgx: Pgx, a_bundle: Path, picture: Path, tmp_path: Path):
    bundle = Path(shutil.copytree(a_bundle, tmp_path / f"b{ESCAPE}"))
    (bundle / "README.md").write_bytes(b"changed")
    for args in (("inspect", bundle), ("run", bundle, "--image", picture, "--prompt", "x")):
        done = pgx(*args)
        assert done.code == 4
        assert "README.md" in done.error
        assert "\x1b" not in done.err


# Signals and pipes

HANG = """
import sys, time
from pgxport import cli
from pgxport.bundle import writer
def hang(self, manifest):
    print("ready", flush=True)
    time.sleep(60)
writer.BundleWriter.complete = hang
cli.main()
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_an_export_with_its_own_code_and_leaves_nothing(
    random_checkpoint: Path, tmp_path: Path, number: signal.Signals, code: int
):
    pytest.importorskip("onnx_ir")
    process = python(HANG, "export", "--checkpoint", random_checkpoint, "-o", tmp_path / "b")
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    assert os.listdir(tmp_path) == ["b.partial"]
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (code, "")
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == []


def test_a_reader_that_leaves_is_no_failure(a_bundle: Path):
    process = python("from pgxport.cli import main; main()", "inspect", a_bundle, "--json")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (process.wait(timeout=60), process.stderr.read()) == (0, "")
    process.stderr.close()


# Results


def test_export_says_what_it_wrote_and_what_to_do_next(pgx: Pgx, random_checkpoint: Path, tmp_path: Path):
    pytest.importorskip("onnx_ir")
    done = pgx("export", "--checkpoint", random_checkpoint, "-o", tmp_path / "b")
    assert (done.code, done.err) == (0, "")
    assert "peak memory" in done.out
    assert "try: pgx run " in done.out
    assert "--masks" in done.out


def test_export_as_json(pgx: Pgx, random_checkpoint: Path, tmp_path: Path):
    pytest.importorskip("onnx_ir")
    done = pgx("export", "--checkpoint", random_checkpoint, "-o", tmp_path / "b", "--json")
    made, bundle = json.loads(done.out), Bundle.open(tmp_path / "b")
    assert (done.code, done.err) == (0, "")
    assert (made["bundle"], made["bytes"]) == (str(tmp_path / "b"), bundle.nbytes)
    assert made["files"].keys() == {p.name for p in (tmp_path / "b").iterdir()} - {MANIFEST}


def test_run_prints_the_answer_to_stdout_and_the_times_to_stderr(pgx: Pgx, a_bundle: Path, picture: Path, tmp_path: Path):
    args = ("run", a_bundle, "--image", picture, "--prompt", "detect red ; blue", "--max-new-tokens", 4)
    plain, as_json = pgx(*args), pgx(*args, "--json")
    assert (plain.code, as_json.code, as_json.err) == (0, 0, "")
    answer = json.loads(as_json.out)
    assert plain.out.splitlines()[0] == answer["text"]
    assert len(answer["token_ids"]) <= 4
    assert " tokens; ms: preprocess " in plain.err
    assert os.listdir(tmp_path) == [picture.name]


def test_run_saves_the_drawn_picture(pgx: Pgx, a_bundle: Path, picture: Path, tmp_path: Path):
    out = tmp_path / "out.png"
    args = ("run", a_bundle, "--image", picture, "--image", picture, "--prompt", "x", "--max-new-tokens", 2, "--save", out)
    done = pgx(*args, "--json")
    assert done.code == 0
    assert json.loads(done.out)["saved"] == str(out)
    with Image.open(out) as saved:
        assert (saved.format, saved.size) == ("PNG", (60, 40))
    assert sorted(os.listdir(tmp_path)) == ["out.png", picture.name]


class Scripted:
    """A runner whose model writes what a hostile one might."""

    @classmethod
    def from_pretrained(cls, path: str, **options: Any) -> "Scripted":
        return cls()

    def __enter__(self) -> "Scripted":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def answer(self, images: Any, prompt: str, **options: Any) -> Answer:
        box = "<loc0000><loc0000><loc0512><loc0512>"
        text = f"{box}{'<seg001>' * 16} {ESCAPE}cat ; {box} {ESCAPE}dog ; <loc0001> {ESCAPE}half"
        boxes, masks, warnings = parse(text, 60, 40, lambda codes: np.ones((1, 64, 64), np.float32))
        return Answer(text, (5, 6), boxes, masks, warnings, truncated=True, timings={"decode": 0.1})


def test_an_answer_cannot_command_the_terminal(pgx: Pgx, monkeypatch: pytest.MonkeyPatch, picture: Path):
    monkeypatch.setattr(runner_module, "Runner", Scripted)
    args = ("run", "b", "--image", picture, "--prompt", "segment cat")
    plain, as_json = pgx(*args), pgx(*args, "--json")
    for text in (plain.out, plain.err, as_json.out, as_json.err):
        assert not {"\x1b", "\x07"} & set(text)
    assert "  cat: y 0–20, x 0–30 px" in plain.out
    assert "mask of cat: 600 px covered" in plain.out
    assert "malformed answer: wrong count" in plain.err
    assert "stopped after 2 tokens" in plain.err
    assert ESCAPE in json.loads(as_json.out)["text"]  # whole for machines


def test_a_bundles_names_cannot_command_the_terminal(pgx: Pgx, a_bundle: Path, tmp_path: Path):
    bundle = Path(shutil.copytree(a_bundle, tmp_path / "b"))
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    manifest |= {"name": f"{ESCAPE}cat", "recipe": f"{ESCAPE}fp32", "family": f"{ESCAPE}f"}
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    done = pgx("inspect", bundle)
    assert done.code == 0
    assert done.out.startswith("cat: f at ")
    assert "\x1b" not in done.out


def test_nothing_is_coloured(pgx: Pgx, monkeypatch: pytest.MonkeyPatch, a_bundle: Path):
    monkeypatch.setenv("NO_COLOR", "1")
    for args in (("--help",), ("doctor",), ("inspect", a_bundle), ("inspect", "nowhere")):
        done = pgx(*args)
        assert "\x1b" not in done.out + done.err


def test_commands_that_only_run_work_without_the_export_tools(a_bundle: Path, picture: Path):
    absent = "('onnx', 'onnx_ir', 'ml_dtypes', 'safetensors', 'huggingface_hub', 'torch', 'transformers')"
    code = f"import sys\nsys.modules.update(dict.fromkeys({absent}))\nfrom pgxport.cli import main\nmain()"
    runs = {
        ("doctor", "--json"): 0,
        ("inspect", a_bundle): 0,
        ("run", a_bundle, "--image", picture, "--prompt", "x", "--max-new-tokens", "1"): 0,
        ("export", "--size", "tiny", "-o", "b"): 2,
        ("inspect", picture.parent): 2,
    }
    processes = {args: python(code, *args) for args in runs}
    for args, process in processes.items():
        out, err = process.communicate(timeout=60)
        assert process.returncode == runs[args], err
        assert runs[args] == 0 or 'pip install "pgxport[export]"' in Done(2, out, err).error
