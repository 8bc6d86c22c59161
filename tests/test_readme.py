# SPDX-License-Identifier: Apache-2.0
"""The README is true: its commands and its Python run, its file tree is the package's, its figures are the measured ones."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "README.md").exists():
    pytest.skip("the wheel is tested without the repository", allow_module_level=True)
pytest.importorskip("onnx_ir")

from pgxport.models.tiny.scenes import draw  # noqa: E402

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader would be after `make demo`."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "demo").mkdir()
    draw("test", 3).image.save(folder / "demo" / "scene-3.png")
    return folder


def run(command: list[str], folder: Path, code: str | None = None) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, input=code, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def test_every_command_of_the_readme_runs(folder):
    lines = [line.partition("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    commands = [line for line in lines if line]
    assert len(commands) >= 6
    for line in commands:
        words = [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', line)]
        assert words[0] == "pgx", line
        assert run([sys.executable, "-m", "pgxport", *words[1:]], folder), line
    assert (folder / "out.png").exists()


def test_the_readmes_python_runs(folder):
    for code in blocks("python"):
        printed = run([sys.executable, "-"], folder, code)
        assert "orange cross" in printed


def test_the_reading_order_and_the_list_of_files_are_true():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "structure.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", sorted(p.relative_to(ROOT) for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]), ids=str)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text()):
        if not target.startswith(("http:", "https:")):
            assert ((ROOT / page).parent / target).exists(), target


def test_the_figures_are_those_of_the_results():
    done = subprocess.run([sys.executable, ROOT / "tools" / "figures.py", "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
