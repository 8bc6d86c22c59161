# SPDX-License-Identifier: Apache-2.0
"""Half precision: what is stored, what is computed, and the exact rescale that keeps Gemma inside float16."""

import copy
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx_ir")
torch = pytest.importorskip("torch")

import onnxruntime as ort  # noqa: E402
from activation_ranges import ranges_of_whole_runs  # noqa: E402
from gemma_tokenizer import build_tokenizer  # noqa: E402
from reference import random_paligemma  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from pgxport.activations.ranges import FLOAT16_MAX, residual_divisor  # noqa: E402
from pgxport.bundle.reader import Bundle  # noqa: E402
from pgxport.errors import CheckpointError, EngineError  # noqa: E402
from pgxport.exporter.export import export  # noqa: E402
from pgxport.exporter.graph import GraphBuilder  # noqa: E402
from pgxport.exporter.prepare import ExportOptions  # noqa: E402
from pgxport.exporter.recipes import RECIPES  # noqa: E402
from pgxport.exporter.targets import TARGETS  # noqa: E402
from pgxport.models.checkpoint import Checkpoint  # noqa: E402
from pgxport.models.config import read_config  # noqa: E402
from pgxport.models.eager import Eager  # noqa: E402
from pgxport.models.gemma import decoder_step  # noqa: E402
from pgxport.models.projector import projector  # noqa: E402
from pgxport.models.siglip import vision_encoder  # noqa: E402
from pgxport.models.spec import shrunk  # noqa: E402
from pgxport.runners.runner import Runner  # noqa: E402

LOUD = 3e5  # about what a residual stream reaches; float16 ends at 65,504
FAMILIES = ("paligemma", "paligemma2")


def make(folder: Path, family: str, *, loud: float = 1.0):
    """A random checkpoint whose residual stream is `loud` times as large, and the reference."""
    build_tokenizer(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = {f"{name}_token_id": tokenizer.token_to_id(f"<{name}>") for name in ("bos", "eos", "pad")}
    # Small eps, so that the loud model's own eps is what it is for real ones.
    model = random_paligemma(
        folder, family=family, seed=3, text={"vocab_size": tokenizer.get_vocab_size() + 9},
        image_token_index=tokenizer.token_to_id("<image>"), **ids,
    )  # fmt: skip
    if loud != 1.0:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if (
                    name.endswith(("post_feedforward_layernorm.weight", "post_attention_layernorm.weight"))
                    and family == "paligemma2"
                ):
                    p.copy_((1 + p) * loud - 1)
                elif (name.endswith(("o_proj.weight", "down_proj.weight")) and family == "paligemma") or "projector" in name:
                    p.mul_(loud)
        model.save_pretrained(folder)
    model.set_attn_implementation("eager")
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def loud(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loud")
    model = make(folder, request.param, loud=LOUD)
    return folder, model


def eager_logits(folder: Path, *, dtype=np.float32, divisor: float = 1.0, observe=None) -> np.ndarray:
    """Logits [V] after a prefix, computed by our model functions in numpy."""
    checkpoint = Checkpoint.open(folder)
    spec = shrunk(read_config(checkpoint.config), divisor)
    ids, pixels = prompt(folder, spec)
    hidden = run(Eager(checkpoint, {"pixel_values": pixels}, dtype=dtype), vision_encoder, spec)["image_hidden"]
    features = run(Eager(checkpoint, {"image_hidden": hidden}, dtype=dtype), projector, spec)["image_features"]
    table = checkpoint.rows("language_model.model.embed_tokens.weight", 0, spec.text.vocab).astype(np.float32)
    text = table[ids[spec.image_tokens :]][None] * np.float32(spec.text.embed_scale)
    embeds = np.concatenate([features.astype(np.float32), text], 1)
    return run(Eager(checkpoint, {"inputs_embeds": embeds}, prefix=len(ids), dtype=dtype, observe=observe), decoder_step, spec)[
        "logits"
    ][0, 0]


def run(eager: Eager, model, spec) -> dict[str, np.ndarray]:
    with np.errstate(all="ignore"):
        model(eager, spec)
    return eager.outputs


def prompt(folder: Path, spec) -> tuple[np.ndarray, np.ndarray]:
    words = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = [words.token_to_id("<bos>"), *words.encode("caption en", add_special_tokens=False).ids, words.token_to_id("\n")]
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, spec.resolution, spec.resolution)).astype(np.float32)
    return np.array([words.token_to_id("<image>")] * spec.image_tokens + text), pixels


@torch.no_grad()
def reference_logits(model, folder: Path, dtype=torch.float32) -> np.ndarray:
    spec = read_config(Checkpoint.open(folder).config)
    ids, pixels = prompt(folder, spec)
    tokens = torch.from_numpy(ids)[None]
    out = copy.deepcopy(model).to(dtype)(
        input_ids=tokens, pixel_values=torch.from_numpy(pixels).to(dtype), token_type_ids=torch.zeros_like(tokens), attention_mask=torch.ones_like(tokens)
    )  # fmt: skip
    return out.logits[0, -1].float().numpy()


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_functions_run_in_numpy_equal_transformers(tmp_path, family):
    model = make(tmp_path, family)
    assert relative(eager_logits(tmp_path), reference_logits(model, tmp_path)) < 1e-4


def test_the_loud_checkpoint_is_beyond_float16_and_transformers_breaks_on_it(loud):
    folder, model = loud
    largest = {}
    eager_logits(
        folder, observe=lambda kind, where, x: largest.__setitem__(kind, max(largest.get(kind, 0), float(np.abs(x).max())))
    )
    assert largest["residual"] > FLOAT16_MAX
    expected = reference_logits(model, folder)
    assert np.isfinite(expected).all()
    # Overflow may be silent: an infinite variance gives a finite, wrong norm.
    plain = reference_logits(model, folder, torch.float16)
    assert not np.isfinite(plain).all() or relative(plain, expected) > 0.2
    ours = eager_logits(folder, dtype=np.float16)
    assert not np.isfinite(ours).all() or relative(ours.astype(np.float32), expected) > 0.2


def test_the_measured_range_gives_a_divisor_that_makes_float16_match_float32(loud):
    folder, model = loud
    ranges = ranges_of_whole_runs(folder)
    assert ranges.largest["residual"] > FLOAT16_MAX
    assert {"residual", "norm square", "variance", "attention score", "MLP product", "linear output"} <= set(ranges.largest)
    divisor = residual_divisor(ranges)
    assert ranges.largest["residual"] / divisor < FLOAT16_MAX / 2
    half = eager_logits(folder, dtype=np.float16, divisor=divisor).astype(np.float32)
    # float16 has 11 bits; a few dozen roundings of 5e-4.
    assert relative(half, reference_logits(model, folder)) < 0.03


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("divisor", [2.0, 64.0, 1024.0])
def test_the_divided_graph_equals_the_undivided_one(tmp_path, family, divisor):
    """In ONNX Runtime, in float32: equal to 1e-6 of the logits, where the model is as loud as its divisor asks for."""
    make(tmp_path, family, loud=divisor)
    logits = []
    for d in (1.0, divisor):
        checkpoint = Checkpoint.open(tmp_path)
        logits.append(session_logits(tmp_path, shrunk(read_config(checkpoint.config), d), tmp_path / f"d{d}", "fp32", "cpu"))
    assert relative(logits[1], logits[0]) < 1e-6


def session_logits(folder: Path, spec, out: Path, precision: str, target: str) -> np.ndarray:
    """Logits of graphs written from `spec` and run by ONNX Runtime on the CPU, whatever their target."""
    import onnx_ir as ir

    checkpoint, values = Checkpoint.open(folder), {}
    ids, pixels = prompt(folder, spec)
    values["pixel_values"] = pixels
    for model in (vision_encoder, projector, decoder_step):
        g = GraphBuilder(model.__name__, checkpoint, RECIPES[target][precision], TARGETS[target], context_length=64)
        model(g, spec)
        for name, lazy in g.lazy_tensors.items():
            array = np.concatenate([b.astype(lazy.dtype) for b in lazy.blocks()]).reshape(lazy.shape)
            g.graph.initializers[name].const_value = ir.tensor(array, name=name)
        out.mkdir(exist_ok=True)
        ir.save(ir.Model(g.graph, ir_version=11), out / f"{g.name}.onnx")
        options = ort.SessionOptions()
        options.log_severity_level = 3
        session = ort.InferenceSession(out / f"{g.name}.onnx", options, providers=["CPUExecutionProvider"])
        if model is decoder_step:
            table = checkpoint.rows("language_model.model.embed_tokens.weight", 0, spec.text.vocab).astype(np.float32)
            text = table[ids[spec.image_tokens :]][None] * np.float32(spec.text.embed_scale)
            values["inputs_embeds"] = np.concatenate([values["image_features"], text], 1)
            total = len(ids)
            values |= {"seqlens_k": np.array([total - 1], np.int32), "total_sequence_length": np.array(total, np.int32)}
            values["local_bias"] = np.zeros((1, 1, total, total), np.float32)
            for i in session.get_inputs():
                if i.name.startswith("past"):
                    kind = np.float16 if "16" in i.type else np.float32
                    values[i.name] = np.zeros((1, spec.text.kv_heads, total, spec.text.head_dim), kind)
        feeds = {i.name: values[i.name] for i in session.get_inputs()}
        values |= dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
    return values["logits"][0, 0]


def test_a_float16_graph_with_the_divisor_matches_float32_in_onnxruntime(loud, tmp_path):
    folder, model = loud
    spec = shrunk(read_config(Checkpoint.open(folder).config), 2.0**9)
    assert relative(session_logits(folder, spec, tmp_path, "fp16", "cuda"), reference_logits(model, folder)) < 0.03


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_half_precision_bundle_for_the_cpu_computes_in_float32_with_rounded_weights(tmp_path, family, precision):
    """The reference: transformers in float32 on weights rounded to the same type."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    model = make(tmp_path / "ck", family)
    bundle = export(ExportOptions(output=tmp_path / "b", checkpoint=tmp_path / "ck", precision=precision))
    whole = export(ExportOptions(output=tmp_path / "w", checkpoint=tmp_path / "ck", precision="fp32"))
    assert bundle.manifest.token_table.dtype == str(dtype).removeprefix("torch.")
    assert bundle.manifest.cache.dtype == "float32"
    assert 2 * bundle.manifest.files["token_table.bin"].size == whole.manifest.files["token_table.bin"].size
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" not in name:  # which stay in float32
                p.copy_(p.to(dtype).float())
    spec = read_config(Checkpoint.open(tmp_path / "ck").config)
    ids, pixels = prompt(tmp_path / "ck", spec)

    with Runner.from_pretrained(tmp_path / "b") as runner:
        pipeline = runner
        got = pipeline.decoder(len(ids)).feed(pipeline.prefix(pipeline.encode_pixels(pixels), ids))
    assert relative(got, reference_logits(model, tmp_path / "ck")) < 1e-4


def test_bundles_for_cuda_are_written_and_the_cpu_does_not_run_them_in_silence(tmp_path):
    make(tmp_path / "ck", "paligemma2", loud=LOUD)
    half = export(ExportOptions(output=tmp_path / "h", checkpoint=tmp_path / "ck", precision="fp16", target="cuda"))
    assert half.manifest.residual_divisor > 1
    assert half.manifest.ranges.largest["residual"] > FLOAT16_MAX
    assert half.manifest.cache.dtype == "float16"
    brain = export(ExportOptions(output=tmp_path / "b", checkpoint=tmp_path / "ck", precision="bf16", target="cuda"))
    assert (brain.manifest.residual_divisor, brain.manifest.ranges, brain.manifest.cache.dtype) == (1, None, "bfloat16")
    assert Bundle.open(tmp_path / "b").manifest.token_table.dtype == "bfloat16"
    with pytest.raises(EngineError, match="written for target 'cuda'"):
        Runner.from_pretrained(tmp_path / "h")


def test_a_weight_beyond_float16_is_named(tmp_path):
    from safetensors.numpy import load_file, save_file

    make(tmp_path, "paligemma2")
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(n for n in tensors if n.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name][3, 2] = 1e5
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds 100000"):
        export(ExportOptions(output=tmp_path / "b", checkpoint=tmp_path, precision="fp16"))
    assert not (tmp_path / "b").exists()
