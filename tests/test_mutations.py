# SPDX-License-Identifier: Apache-2.0
"""A seeded part of benchmarks/mutations.py: whatever a file beside the weights holds, an export ends with 0, 2 or 3 and a message."""

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

if not all(importlib.util.find_spec(m) for m in ("onnx_ir", "torch", "transformers", "peft")):
    pytest.skip("needs the exporter and what made the files", allow_module_level=True)

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "mutations.py"
FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json", "tokenizer.json",
)  # fmt: skip
FIRST = 1_000_000  # far from the numbers of the script, so that the two try different ones


@pytest.fixture
def script() -> Iterator[ModuleType]:
    if not SCRIPT.exists():
        pytest.skip("the wheel is tested without the repository")
    path, spec = list(sys.path), importlib.util.spec_from_file_location("mutations", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["mutations"] = importlib.util.module_from_spec(spec)  # where its dataclass looks for types
    spec.loader.exec_module(module)
    yield module
    del sys.modules["mutations"]
    sys.path[:] = path


@pytest.mark.skipif(not SCRIPT.exists(), reason="the wheel is tested without the repository")
def test_a_mutated_file_is_read_or_refused_by_name(tmp_path: Path):
    """A process of its own: it forks for each case, which one with torch's threads cannot."""
    out = tmp_path / "mutations.json"
    command = [sys.executable, SCRIPT, "--count", "50", "--compare", "0", "--first", str(FIRST), "--json", out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert out.exists(), done.stderr
    record = json.loads(out.read_text())
    assert record["faults"] == []
    assert {file: sum(of["codes"].values()) for file, of in record["files"].items()} == dict.fromkeys(FILES, 50) | {
        "tokenizer.json": 12
    }
    assert all(of["codes"].get("0", 0) for of in record["files"].values())


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"code": 0, "message": ""}, None),
        ({"code": 1}, "ended with 1"),
        ({"code": 4}, "ended with 4"),
        ({"code": -9}, "ended with -9"),
        ({"message": "Traceback … ValueError"}, "did not end with a message"),
        ({"seconds": 5.1}, "took 5.1 s"),
        ({"added_bytes": 1_000_000_001}, "took 1,000,000,001 bytes"),
    ],
)
def test_a_case_is_at_fault(script: Any, changes: dict[str, Any], fault: str | None):
    sound = script.Outcome("config.json", 0, "", 3, 0.2, 0, "pgx: config.json: model_type is 'x'")
    assert replace(sound, **changes).fault() == fault


@pytest.mark.parametrize("verdict", [None, "transformers refuses: ValueError: x", "logits are 0.2 of their scale apart"])
def test_only_answers_that_differ_are_found_to_differ(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, verdict: str | None
):
    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=lambda *_, **__: None))  # which makes the checkpoint
    monkeypatch.setattr(script, "_verdicts", lambda cases: [verdict] * len(cases))

    def run_case(base: Path, case: Path, file: str, number: int) -> Any:
        case.mkdir(parents=True)
        return script.Outcome(file, number, "", 0, 0.2, 0, "")

    monkeypatch.setattr(script, "run_case", run_case)
    record = script.measure(tmp_path, argparse.Namespace(file=["config.json"], first=0, count=5, compare=2))
    assert sum(record["files"]["config.json"]["compared"].values()) == 2
    assert len(record["differ"]) == (2 if verdict and verdict.startswith("logits") else 0)
    assert len(record["refused_by_transformers_alone"]) == (2 if verdict and verdict.startswith("transformers") else 0)
