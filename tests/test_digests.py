# SPDX-License-Identifier: Apache-2.0
"""The embedded model's bundles are byte for byte those whose digests are kept: a change that moves code must not move a byte."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOL, DIGESTS = ROOT / "tools" / "bundle_digests.py", Path(__file__).parent / "goldens" / "bundle-digests.json"
# `python tools/bundle_digests.py` compares the others: what computes in float16 measures activation ranges first, which takes seconds,
# and what rounds to integers knows activations, whose last bits are the processor's.
FAST = ("cpu fp32", "cpu fp16", "cpu bf16", "tensorrt-11 fp32", "tensorrt-11 bf16")
DIGEST_OF = {name: json.loads(DIGESTS.read_text())["plain"][name] for name in FAST}

pytestmark = pytest.mark.skipif(not TOOL.exists(), reason="the wheel is tested without the repository")


@pytest.mark.parametrize("name", DIGEST_OF)
def test_a_bundle_is_byte_for_byte_as_it_was(name: str, tmp_path: Path):
    spec = importlib.util.spec_from_file_location("bundle_digests", TOOL)
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    target, _, recipe = name.partition(" ")
    assert tool.export_digest(target, recipe, tmp_path) == DIGEST_OF[name]
