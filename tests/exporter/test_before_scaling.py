# SPDX-License-Identifier: Apache-2.0
"""Recipes that name neither scales nor rotations write the bytes that they wrote before there were any."""

import hashlib
import json
from pathlib import Path

import pytest

pytest.importorskip("onnx_ir")

from pgxport.exporter.export import export
from pgxport.exporter.prepare import ExportOptions

# Written by pgx as of 2026-11-28, without the keys `scaling`, `alpha` and `rotate`, without a calibration.
BEFORE = json.loads((Path(__file__).parents[1] / "goldens" / "before-scaling.json").read_text())


@pytest.mark.parametrize("name", BEFORE)
def test_a_recipe_without_the_new_keys_writes_the_bytes_that_it_wrote(name, tmp_path):
    (tmp_path / "recipe.toml").write_text(BEFORE[name]["recipe"])
    target = name.split()[0]
    bundle = export(
        ExportOptions(
            output=tmp_path / "bundle", size="tiny", res=112, recipe=tmp_path / "recipe.toml", target=target,
            trt="11" if target == "tensorrt" else None, parity=0, answer=False,
        )
    )  # fmt: skip
    files = (f for f in bundle.path.iterdir() if f.suffix in (".data", ".bin", ".onnx", ".toml"))
    assert {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files} == BEFORE[name]["files"]
