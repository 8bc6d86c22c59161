# SPDX-License-Identifier: Apache-2.0
"""Exported graphs compute what transformers computes, in float32: logits of prefill and forced steps, greedy tokens, masks.

The models are random and of odd shapes (tests/reference.py): a missing bias, norm or scale changes the logits.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
torch = pytest.importorskip("torch")

from gemma_tokenizer import build_tokenizer  # noqa: E402
from reference import TEXT, random_paligemma, transformers  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from pgxport.exporter.export import export  # noqa: E402
from pgxport.exporter.prepare import ExportOptions  # noqa: E402
from pgxport.models.tiny.scenes import draw  # noqa: E402
from pgxport.runners.image import pixel_values  # noqa: E402
from pgxport.runners.runner import Runner  # noqa: E402

# Both compute in float32 with other orders of addition; the worst seen over these models is 4e-6 of the logits' scale.
TOLERANCE = 1e-4
STEPS = 16


@dataclass(frozen=True)
class Case:
    family: str
    text: dict[str, Any] = field(default_factory=dict)
    vision: dict[str, Any] = field(default_factory=dict)
    images: int = 1
    local_window: str = "hf"
    seed: int = 0


CASES = {
    "paligemma, one key/value head": Case("paligemma"),
    "paligemma, a key/value head each, head_dim is width / heads": Case(
        "paligemma", {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 16, "hidden_size": 48}, seed=1
    ),
    "paligemma, eps and theta of its own": Case(
        "paligemma",
        {"rms_norm_eps": 1e-2, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}},
        {"layer_norm_eps": 1e-2},
    ),
    "paligemma2, window shorter than the prefix": Case("paligemma2"),
    "paligemma2, window shorter than the answer, longer than the prefix": Case("paligemma2", {"sliding_window": 20}, seed=2),
    # Not one: transformers' cache then keeps everything (its slice [-window + 1:] begins at 0), unlike its mask.
    "paligemma2, window of two": Case("paligemma2", {"sliding_window": 2}, seed=3),
    "paligemma2, window longer than everything": Case("paligemma2", {"sliding_window": 400}, seed=4),
    "paligemma2, no window": Case("paligemma2", local_window="none", seed=5),
    "paligemma2, low caps": Case("paligemma2", {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.5}, seed=6),
    "paligemma2, no caps": Case("paligemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}, seed=7),
    "paligemma2, local layers in another order": Case(
        "paligemma2", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}, seed=8
    ),
    "paligemma2, one key/value head, wide heads": Case("paligemma2", {"num_key_value_heads": 1, "head_dim": 32}, seed=9),
    "paligemma2, two images": Case("paligemma2", images=2, seed=10),
    "paligemma, two images": Case("paligemma", images=2, seed=11),
    "paligemma2, vision of another shape": Case(
        "paligemma2", vision={"image_size": 40, "patch_size": 8, "num_attention_heads": 2}, seed=12
    ),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES.keys())
def pair(request, tmp_path_factory):
    """A case, the reference model and a runner of the bundle exported from it."""
    case: Case = request.param
    folder = tmp_path_factory.mktemp("parity")
    build_tokenizer(folder / "checkpoint")
    tokenizer = Tokenizer.from_file(str(folder / "checkpoint" / "tokenizer.json"))
    vocab = tokenizer.get_vocab_size() + 7
    model = random_paligemma(
        folder / "checkpoint", family=case.family, seed=case.seed, vision=case.vision, text={**case.text, "vocab_size": vocab},
        image_token_index=tokenizer.token_to_id("<image>"), bos_token_id=tokenizer.token_to_id("<bos>"),
        eos_token_id=tokenizer.token_to_id("<eos>"), pad_token_id=tokenizer.token_to_id("<pad>"),
    )  # fmt: skip
    model.set_attn_implementation("eager")  # the only one that computes Gemma 2's cap
    export(ExportOptions(output=folder / "bundle", checkpoint=folder / "checkpoint", local_window=case.local_window))
    with Runner.from_pretrained(folder / "bundle", threads=1) as runner:
        yield case, model, runner


def prefix_of(case: Case, runner: Runner) -> tuple[np.ndarray, np.ndarray]:
    """Token ids [T] and pixels [images, 3, R, R] of a prompt about scenes."""
    m = runner.manifest
    ids = runner.prompt_ids("answer en what is in the image?", case.images)
    pixels = np.stack([pixel_values(draw("test", i).image, m.resolution) for i in range(case.images)])
    return np.array(ids), pixels


@contextmanager
def windows(model: Any, *, wide_open: bool):
    """Gemma 2's windows as they are, or so wide that they hide nothing."""
    config = model.config.get_text_config()
    before = getattr(config, "sliding_window", None)
    if before and wide_open:
        config.sliding_window = 10_000
    yield
    if before:
        config.sliding_window = before


@torch.no_grad()
def reference_logits(model: Any, ids: np.ndarray, pixels: np.ndarray, suffix: np.ndarray, *, window: bool) -> np.ndarray:
    """Logits [1 + suffix, V] after the prefix and each suffix token, in one pass over everything."""
    whole = torch.from_numpy(np.concatenate([ids, suffix]))[None]
    kinds = torch.from_numpy(np.repeat([0, 1], [len(ids), len(suffix)]))[None]  # 0 prefix, 1 suffix
    with windows(model, wide_open=not window):
        out = model(
            input_ids=whole, pixel_values=torch.from_numpy(pixels), token_type_ids=kinds, attention_mask=torch.ones_like(whole)
        )
    return out.logits[0, len(ids) - 1 :].numpy()


def prefix_embeds(runner: Runner, ids: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    return runner.prefix(runner.encode_pixels(pixels), ids)


def test_logits_of_prefill_and_forced_steps_equal_transformers(pair):
    case, model, runner = pair
    ids, pixels = prefix_of(case, runner)
    suffix = np.random.default_rng(case.seed).integers(3, runner.manifest.token_ids.image, STEPS)
    expected = reference_logits(model, ids, pixels, suffix, window=case.local_window == "hf")

    decoder = runner.decoder(len(ids) + STEPS)
    got = [decoder.feed(prefix_embeds(runner, ids, pixels)).copy()]
    got += [decoder.feed(runner.embed([token])).copy() for token in suffix]
    error = np.abs(np.stack(got) - expected).max(1) / np.abs(expected).max()
    print(f"largest error {error.max():.1e} of the logits' scale")
    assert error.max() < TOLERANCE, f"by position: {error}"


def test_greedy_tokens_equal_transformers_unless_nearly_tied(pair):
    case, model, runner = pair
    ids, pixels = prefix_of(case, runner)
    with torch.no_grad(), windows(model, wide_open=case.local_window == "none"):
        out = model.generate(
            input_ids=torch.from_numpy(ids)[None], pixel_values=torch.from_numpy(pixels), token_type_ids=torch.zeros(1, len(ids), dtype=int),
            attention_mask=torch.ones(1, len(ids), dtype=int), max_new_tokens=STEPS, do_sample=False, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    eos = runner.manifest.token_ids.eos
    expected = [int(t) for t in out.sequences[0, len(ids) :]]
    scenes = [draw("test", i).image for i in range(case.images)]
    got = [*runner.answer(scenes, "answer en what is in the image?", max_new_tokens=STEPS).token_ids, eos]
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=False)):
        best, second = out.logits[step][0].topk(2).values.tolist()
        if best - second < TOLERANCE * out.logits[step].abs().max():
            return  # a tie: what follows depends on who won
        assert ours == theirs, f"step {step}"


def test_a_late_prefix_token_moves_an_early_ones_keys_and_values(pair):
    """The whole prefix attends to the whole prefix: causal graphs, the classic silent bug, leave the early rows as they were."""
    case, _, runner = pair
    embeds = prefix_embeds(runner, *prefix_of(case, runner))
    caches = []
    for shift in (0.0, 1.0):
        decoder = runner.decoder(embeds.shape[1] + 1)
        moved = embeds.copy()
        moved[0, -1] += shift
        decoder.feed(moved)
        caches.append({name: array[:, :, 0].copy() for name, array in decoder.cache.arrays.items()})
    for part in ("key", "value"):
        # Layer 0 reads the embeddings only; from layer 1 on, every row has seen every other.
        assert np.array_equal(caches[0][f"past_key_values.0.{part}"], caches[1][f"past_key_values.0.{part}"])
        for layer in range(1, runner.manifest.cache.layers):
            name = f"past_key_values.{layer}.{part}"
            assert np.abs(caches[0][name] - caches[1][name]).max() > 1e-5, name


def test_a_suffix_token_is_not_seen_by_what_came_before(pair):
    case, _, runner = pair
    embeds = prefix_embeds(runner, *prefix_of(case, runner))
    decoder = runner.decoder(embeds.shape[1] + 2)
    decoder.feed(embeds)
    decoder.feed(runner.embed([5]))
    length = decoder.length
    before = {name: array[:, :, :length].copy() for name, array in decoder.cache.arrays.items()}
    decoder.feed(runner.embed([9]))
    for name, array in decoder.cache.arrays.items():
        assert np.array_equal(array[:, :, :length], before[name]), name
        assert np.abs(array[:, :, length]).max() > 0, name


def test_the_cases_leave_no_option_of_the_reference_at_its_default():
    """The reference models' own shapes are odd; this keeps someone from making them even."""
    for text in TEXT.values():
        assert text["head_dim"] * text["num_attention_heads"] != text["hidden_size"]
    assert TEXT["paligemma2"]["query_pre_attn_scalar"] != TEXT["paligemma2"]["head_dim"]
    assert transformers.__version__.startswith("5.")


def test_the_mask_decoder_equals_the_same_layers_in_torch(tmp_path):
    from pgxport.hub.locate import TINY

    weights = {k: torch.from_numpy(v.astype(np.float32)) for k, v in np.load(TINY / "vae-oid.npz").items()}
    conv, up, relu = torch.nn.functional.conv2d, torch.nn.functional.conv_transpose2d, torch.relu
    codes = np.random.default_rng(0).integers(0, 128, (3, 16))

    def layer(x: Any, name: str, **how: Any) -> Any:
        return conv(x, weights[f"decoder.{name}.weight"], weights[f"decoder.{name}.bias"], **how)

    x = weights["_vq_vae._embedding"][codes].reshape(3, 4, 4, 512).permute(0, 3, 1, 2)
    x = relu(layer(x, "0"))
    for block in "23":
        h = relu(layer(x, f"{block}.net.0", padding=1))
        h = relu(layer(h, f"{block}.net.2", padding=1))
        x = x + layer(h, f"{block}.net.4")
    for name in ("4", "6", "8", "10"):
        x = relu(up(x, weights[f"decoder.{name}.weight"], weights[f"decoder.{name}.bias"], stride=2, padding=1))
    expected = layer(x, "12")[:, 0].numpy()

    build_tokenizer(tmp_path / "checkpoint")
    vocab = Tokenizer.from_file(str(tmp_path / "checkpoint" / "tokenizer.json")).get_vocab_size()
    random_paligemma(tmp_path / "checkpoint", text={"vocab_size": vocab}, image_token_index=vocab - 1)
    export(ExportOptions(output=tmp_path / "bundle", checkpoint=tmp_path / "checkpoint", masks=Path(TINY / "vae-oid.npz")))
    with Runner.from_pretrained(tmp_path / "bundle") as runner:
        got = runner.session("mask_decoder").run({"codes": codes})["mask"]
    assert got.shape == (3, 64, 64)
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()
