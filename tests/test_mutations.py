# SPDX-License-Identifier: Apache-2.0
"""A seeded part of benchmarks/mutations.py: whatever a file beside the weights holds, an export ends with 0, 2 or 3 and a message."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

if not all(importlib.util.find_spec(m) for m in ("onnx_ir", "torch", "transformers", "peft")):
    pytest.skip("needs the exporter and what made the files", allow_module_level=True)

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "mutations.py"
FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json", "tokenizer.json",
)  # fmt: skip
FIRST = 1_000_000  # far from the numbers of the script, so that the two try different ones


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
