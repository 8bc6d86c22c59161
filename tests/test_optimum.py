# SPDX-License-Identifier: Apache-2.0
"""`optimum-cli export pgx` is the same export by another command."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("optimum.commands.base", reason="optimum is not installed")
pytest.importorskip("onnx_ir")
pytest.importorskip("torch")

from gemma_tokenizer import build_tokenizer
from reference import random_paligemma
from tokenizers import Tokenizer

from pgxport.bundle.reader import Bundle
from pgxport.exporter.export import export
from pgxport.exporter.prepare import ExportOptions

PLUGIN = Path("optimum/commands/register/register_pgx.py")
ROOT = next((p for p in map(Path, [Path(__file__).parents[1], *sys.path]) if (p / PLUGIN).is_file()), None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    build_tokenizer(folder)
    image = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id("<image>")
    random_paligemma(folder, text={"vocab_size": 2432}, image_token_index=image)
    return folder


def optimum_cli(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    assert ROOT is not None, f"{PLUGIN} is not installed"
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "pgx", *args]
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_bundle_is_the_same(checkpoint: Path, tmp_path: Path):
    done = optimum_cli("-m", str(checkpoint), "--context", "100", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "wrote" in done.stdout
    ours = export(ExportOptions(checkpoint=checkpoint, context=100, output=tmp_path / "ours"))
    assert Bundle.open(tmp_path / "out").manifest == ours.manifest


def test_help_has_an_example(tmp_path: Path):
    done = optimum_cli("--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "optimum-cli export pgx -m google/paligemma2-3b-mix-448 bundle" in done.stdout


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("-m", "nowhere", "out"), 3, "there is no such folder"),
        (("-m", "CHECKPOINT", "--precision", "fp12", "out"), 2, "choose fp32"),
        (("-m", "CHECKPOINT", "--context", "0", "out"), 2, "--context"),
        (("out",), 2, "-m"),
    ],
)
def test_errors_end_with_our_exit_codes(checkpoint: Path, tmp_path: Path, args: tuple[str, ...], code: int, message: str):
    done = optimum_cli(*(str(checkpoint) if a == "CHECKPOINT" else a for a in args), cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_plug_in_is_in_the_wheel_and_makes_optimum_no_package():
    assert ROOT is not None
    assert not list((ROOT / "optimum").rglob("__init__.py")) or (ROOT / "optimum" / "version.py").exists()


def test_starting_optimum_imports_nothing_of_pgx(tmp_path: Path):
    assert ROOT is not None
    code = "import sys, optimum.commands.register.register_pgx; sys.exit(any(m.startswith('pgxport') for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0
