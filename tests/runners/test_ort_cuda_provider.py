# SPDX-License-Identifier: Apache-2.0
"""The real CUDA provider of onnxruntime-gpu on stand-in libraries (cuda_stand_in.py): nodes and copies."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.nightly
SITE = Path(os.environ.get("PGX_ORT_GPU", "nowhere"))
STEPS = """
import json, sys
import numpy as np
from pgxport.runners.loop import Decoder
from pgxport.runners.runner import Runner
with Runner.from_pretrained(sys.argv[1], engine="cuda", threads=1) as runner:
    decoder = runner.decoder(90)
    width, random = runner.manifest.token_table.shape[1], np.random.default_rng(0)
    for tokens in (70, 1, 1):
        print("===", file=sys.stderr, flush=True)
        decoder._run(random.standard_normal((1, tokens, width), np.float32))["logits"]
    print("===", file=sys.stderr, flush=True)
    print(json.dumps({"cache": decoder.cache.nbytes, "width": width}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    from cuda_stand_in import PROVIDER, build

    if not (SITE / PROVIDER).exists() or not shutil.which("gcc") or not shutil.which("nm"):
        pytest.skip("PGX_ORT_GPU names no unpacked onnxruntime-gpu, or gcc and nm are missing")
    libraries = build(SITE, tmp_path_factory.mktemp("stand-in"))
    root = str(Path(__file__).parents[2])
    return {**os.environ, "LD_LIBRARY_PATH": str(libraries), "PYTHONPATH": f"{SITE}:{root}", "STAND_IN_LOG": "1"}


def run(bundle: Path, environment: dict[str, str]) -> tuple[dict[str, Any], list[list[str]]]:
    """What a prefill and two steps printed, and the copies of each."""
    done = subprocess.run([sys.executable, "-c", STEPS, bundle], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    _, *parts = done.stderr.split("===\n")
    return json.loads(done.stdout), [part.splitlines() for part in parts[:-1]]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int4"])
def test_every_node_has_a_kernel_and_no_cache_is_copied(precision: str, environment: dict[str, str], tmp_path: Path):
    pytest.importorskip("onnx_ir")
    from pgxport.exporter.export import export
    from pgxport.exporter.prepare import ExportOptions

    options = ExportOptions(output=tmp_path / "b", size="tiny", res=112, precision=precision, target="cuda", parity=0)
    said, copies = run(export(options).path, environment)  # an error names nodes on the CPU
    for step in copies[1:]:
        moved = [(line.rpartition(" ")[0], int(line.rpartition(" ")[2])) for line in step]
        assert sum(size for _, size in moved) < said["cache"] / 4, moved
        assert ("host to device", 4 * said["width"]) in moved, "the token's embedding"
        assert [way for way, _ in moved].count("device to host") == 1, "the logits"
    assert copies[1] != copies[0]
