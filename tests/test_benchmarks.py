# SPDX-License-Identifier: Apache-2.0
"""What the scripts in benchmarks/ work out from what they measured, and what they give to the peers."""

import importlib.util
import sys
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
if not (ROOT / "benchmarks").exists():
    pytest.skip("the wheel is tested without the repository", allow_module_level=True)
pytest.importorskip("onnx_ir")

from pgxport.models.spec import TEXT, published  # noqa: E402
from pgxport.models.weights import weight_shapes  # noqa: E402
from pgxport.report.worker import Measurement  # noqa: E402


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def peers() -> Any:
    path = list(sys.path)
    yield script("against_peers")
    sys.path[:] = path


def measurement(label: str, **seconds: list[float]) -> Measurement:
    return Measurement(label, {}, seconds, None, None)


@pytest.mark.parametrize(("family", "size"), TEXT)
def test_llama_is_given_all_weights_of_the_text_part(peers: Any, family: str, size: str):
    spec = published(family, size, 224)
    given = sum(prod(shape) for _, shape in peers.gguf_shapes(spec))
    own = {n: s for n, s in weight_shapes(spec).items() if not n.startswith(("vision_tower", "multi_modal_projector"))}
    assert given == sum(map(prod, own.values()))


def test_a_peers_prefix_is_an_image_and_the_prompt(peers: Any):
    spec = published("paligemma2", "3b", 448)
    ids = peers.prefix_ids(spec, 16)
    assert len(ids) == 1040
    assert (ids == peers.IMAGE).sum() == 1024
    assert (ids[1024], ids[-1]) == (peers.BOS, peers.NEWLINE)
    assert ids.max() < spec.text.vocab


def test_the_ratios_are_of_the_same_repetition(peers: Any):
    bundle = peers.with_ttft(measurement("b", vision=[1.0, 2.0], projector=[0.5, 0.5], prefill=[2.5, 1.5], step=[0.1, 0.2]))
    blind = measurement("llama", prefill=[5.0, 3.0], step=[0.1, 0.1])
    rows = peers.ratios([bundle], [blind, Measurement("dead", {}, {"step": [1.0]}, None, None, "died", 1)])
    assert bundle.seconds["ttft"] == [4.0, 4.0]
    assert {row["stage"]: row["peer_over_bundle"] for row in rows} == {"prefill": [2.0, 2.0], "step": [1.0, 0.5]}
    assert rows[0]["says"] == "b is faster than llama (×2.00, 2.00–2.00)"


def test_the_cost_of_a_layer_is_the_difference_between_two_depths():
    path = list(sys.path)
    curves = script("curves")
    sys.path[:] = path
    few, many = ({"layers": n, "lengths": [{"length": 256, "prefill": 3.0 + n, "step": 0.5 + 0.1 * n}]} for n in (2, 4))
    (row,) = curves.per_layer(few, many)
    assert row == pytest.approx({"length": 256, "prefill_layer": 1, "prefill_rest": 3, "step_layer": 0.1, "step_rest": 0.5})
