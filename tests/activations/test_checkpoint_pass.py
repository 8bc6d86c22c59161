# SPDX-License-Identifier: Apache-2.0
"""A pass runs samples packed, thinned, one layer after the other: each gets the logits that it would get alone, in transformers."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if not all(importlib.util.find_spec(m) for m in ("torch", "transformers")):
    pytest.skip("needs the reference", allow_module_level=True)

import torch
from rounded import FAMILIES, make_checkpoint, sample

from pgxport.activations import steps
from pgxport.activations.checkpoint_pass import observe_checkpoint, scored_logits
from pgxport.activations.observe import EVERYTHING, NOTHING, Needs
from pgxport.activations.statistics import NOT_ASKED, Statistics
from pgxport.activations.steps import ModelSteps, StepSample, kept_patches
from pgxport.models.checkpoint import Checkpoint
from pgxport.models.config import read_config
from pgxport.models.eager import Eager, TokenizedSample, teacher_forced_logits

# Both compute in float32 with other orders of addition; the worst seen is 2e-6 of the largest number.
TOLERANCE = 2e-5


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("pass") / request.param
    return folder, make_checkpoint(folder, request.param)


def fed(given: TokenizedSample, every: int = 1, *, scored: bool = True) -> StepSample:
    return StepSample(lambda: given.pixels, tuple(given.prompt), tuple(given.answer), every, scored)


def model_steps(folder: Path) -> ModelSteps:
    checkpoint = Checkpoint.open(folder)
    return ModelSteps(checkpoint, read_config(checkpoint.config))


def numpy_logits(folder: Path, samples: list[StepSample]) -> list[np.ndarray]:
    model = model_steps(folder)
    return scored_logits(model, samples, lambda segments: Eager(model.source, {}, prefix=segments))


def transformers_logits(model: Any, given: TokenizedSample, kept: np.ndarray) -> np.ndarray:
    """transformers' own modules, with the vision encoder's layers on the patches that are kept alone."""
    paligemma = model.model
    vision, language = paligemma.vision_tower, paligemma.language_model
    vision = getattr(vision, "vision_model", vision)
    with torch.no_grad():
        patches = vision.embeddings(torch.from_numpy(given.pixels))[:, torch.from_numpy(kept)]
        hidden = vision.post_layernorm(vision.encoder(inputs_embeds=patches).last_hidden_state)
        features = paligemma.multi_modal_projector(hidden)
        words = language.embed_tokens(torch.tensor([[*given.prompt, *given.answer]]))
        embeds = torch.cat([features, words], 1)
        prefix, total = len(kept) + len(given.prompt), embeds.shape[1]
        i, j = torch.arange(total)[:, None], torch.arange(total)[None]
        seen = {}
        for kind, window in (("full_attention", total), ("sliding_attention", read_window(model))):
            allowed = ((j <= i) & (i - j < window)) | ((i < prefix) & (j < prefix))
            seen[kind] = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]
        mask = seen if "gemma2" in model.config.text_config.model_type else seen["full_attention"]
        positions = torch.arange(1, total + 1)[None]
        out = language(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
        logits = model.lm_head(out)[0, prefix - 1 :]
        if cap := getattr(model.config.text_config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
    return logits.numpy()


def read_window(model: Any) -> int:
    return int(getattr(model.config.text_config, "sliding_window", None) or 1 << 20)


def apart(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_scene_without_some_of_its_patches_is_transformers_without_them(case, every):
    folder, model = case
    given = sample(folder)
    kept = kept_patches(read_config(Checkpoint.open(folder).config).image_tokens, every)
    assert len(kept) == {1: 9, 2: 4, 3: 1}[every]
    (got,) = numpy_logits(folder, [fed(given, every)])
    assert apart(got, transformers_logits(model, given, kept)) < TOLERANCE


def test_packed_samples_see_nothing_of_each_other(case, monkeypatch):
    """Each has the logits of the whole model run for it alone."""
    folder, _ = case
    model, given = model_steps(folder), [sample(folder, i) for i in range(3)]
    expected = [teacher_forced_logits(model.source, model.spec, one) for one in given]
    assert len({len(one.answer) for one in given}) > 1
    assert len(model.packs(map(fed, given))) == 1
    for got in (numpy_logits(folder, [fed(one) for one in given]), scored_beside_observed(folder, given)):
        assert max(map(apart, got, expected)) < TOLERANCE
    monkeypatch.setattr(steps, "PACK", 1)
    assert len(model.packs(map(fed, given))) == 3
    assert max(map(apart, numpy_logits(folder, [fed(one) for one in given]), expected)) < TOLERANCE


def scored_beside_observed(folder: Path, given: list[TokenizedSample]) -> list[np.ndarray]:
    model, work = model_steps(folder), folder.parent / "beside"
    work.mkdir(exist_ok=True)
    for file in work.iterdir():
        file.unlink()
    observed = [fed(sample(folder, 7), 2, scored=False)]
    return observe_checkpoint(model.source, model.spec, [*observed, *map(fed, given)], work, EVERYTHING, progress=None).logits


@pytest.mark.usefixtures("no_entropy_search")
def test_statistics_are_of_the_observed_samples_alone(case, tmp_path):
    folder, _ = case
    model = model_steps(folder)
    observed, scored = [fed(sample(folder, i), scored=False) for i in range(2)], [fed(sample(folder, 2))]
    found = []
    for name, samples in (("alone", observed), ("beside", [*observed, *scored])):
        (tmp_path / name).mkdir()
        found.append(observe_checkpoint(model.source, model.spec, samples, tmp_path / name, EVERYTHING, progress=None))
    alone, beside = found
    assert alone.inputs == beside.inputs
    assert alone.tensors.keys() == beside.tensors.keys()
    assert not alone.logits
    for name, tensor in alone.tensors.items():
        got, expected = (t.rows(0, t.shape[0]) for t in (beside.tensors[name], tensor))
        assert apart(got, expected) < (0.01 if name.startswith("range/") else TOLERANCE), name  # a histogram's bin


def test_what_is_not_needed_is_not_gathered(case, tmp_path):
    folder, _ = case
    model = model_steps(folder)
    q, down = (f"language_model.model.layers.1.{part}.weight" for part in ("self_attn.k_proj", "mlp.down_proj"))
    needs = Needs(frozenset((q, down)), frozenset((down,)), frozenset((q,)), ("minmax",), caches=False)
    found = observe_checkpoint(model.source, model.spec, [fed(sample(folder), scored=False)], tmp_path, needs, progress=None)
    first = q.replace("k_proj", "q_proj")  # under whose name q, k and v have their input
    kinds = {f"inputs/{first}", f"moment/{first}", f"inputs/{down}", f"range/{down}"}
    assert found.tensors.keys() == kinds
    ranges = found.tensors[f"range/{down}"].rows(0, 4)
    assert ranges[0, 0] < ranges[0, 1]
    assert (ranges[1:] == NOT_ASKED).all()


class Halved:
    """A stand-in for what a recipe does: channels in reverse and divided by the largest that the step has seen."""

    def __init__(self, known: Statistics):
        self.known = known

    def changed_input(self, path: str, x: np.ndarray) -> np.ndarray:
        return x[..., ::-1] / self.known.absmax(path).max()

    def changed_values(self, layer: int, v: np.ndarray) -> np.ndarray:
        return v[..., ::-1] * (layer + 2)


def test_changed_inputs_are_observed_after_the_step_that_they_are_of(case, tmp_path, monkeypatch):
    folder, _ = case
    model = model_steps(folder)
    paths = {name for name in steps.linears(model.spec) if name.endswith(("up_proj.weight", "fc2.weight", "o_proj.weight"))}
    needs = Needs(moments=frozenset(), observers=("minmax",), changed=frozenset(paths), changed_values=True)
    monkeypatch.setattr(steps, "PACK", 1)  # inputs come in several packs
    found = observe_checkpoint(
        model.source,
        model.spec,
        [fed(sample(folder, i), scored=False) for i in range(2)],
        tmp_path,
        needs,
        changes=Halved,
        progress=None,
    )
    known = Statistics("found", found.inputs, found.tensors, None)
    for path in paths:
        low, high = known.range(path, "minmax")
        top = known.absmax(path).max()
        assert known.changed_range(path, "minmax") == pytest.approx((low / top, high / top), rel=1e-6)
    for layer in range(model.spec.text.depth):
        assert known.changed_values(layer) == pytest.approx(known.cache(layer, "value")[:, ::-1] * (layer + 2))
    assert not list(tmp_path.glob("kept-*"))


def test_nothing_to_gather_is_a_run_for_the_logits(case, tmp_path):
    folder, _ = case
    model = model_steps(folder)
    found = observe_checkpoint(model.source, model.spec, [fed(sample(folder))], tmp_path, NOTHING, progress=None)
    assert not found.tensors
    assert apart(found.logits[0], teacher_forced_logits(model.source, model.spec, sample(folder))) < TOLERANCE
