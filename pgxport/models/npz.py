# SPDX-License-Identifier: Apache-2.0
"""The reader of the training code's npz: parameters stacked over layers and shaped for einsum, sliced into the hub's tensors.

Names and axes are those of big_vision (models/vit.py, models/ppp/gemma.py), their counterparts on the
hub those of transformers' convert_paligemma_weights_to_hf.py and convert_paligemma2_weights_to_hf.py.
"""

import math
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib import format as npy

from pgxport.errors import CheckpointError
from pgxport.models.safetensors import BFLOAT16, DTYPES, Tensor, listed, opened, read_exactly, refuse_non_finite, shown
from pgxport.models.spec import TEXT
from pgxport.models.weights import EMBEDDING

# Published name, parameter, axes. The stored axes are left of the arrow, the published ones right of
# it: a comma separates two axes, letters without one merge. L is the layer, a digit the index into two
# stacked parameters. D: width, F: mlp, N: query heads, K: key/value heads, H: head dim, V: vocabulary,
# P: patches, each of Y × X pixels of C colours; M: the decoder's width where D is the encoder's.
VISION = (
    ("vision_tower.vision_model.embeddings.patch_embedding.weight", "img/embedding/kernel", "YXCD->D,C,Y,X"),
    ("vision_tower.vision_model.embeddings.patch_embedding.bias", "img/embedding/bias", "D->D"),
    ("vision_tower.vision_model.embeddings.position_embedding.weight", "img/pos_embedding", "0PD->P,D"),
    ("vision_tower.vision_model.post_layernorm.weight", "img/Transformer/encoder_norm/scale", "D->D"),
    ("vision_tower.vision_model.post_layernorm.bias", "img/Transformer/encoder_norm/bias", "D->D"),
    ("multi_modal_projector.linear.weight", "img/head/kernel", "DM->M,D"),
    ("multi_modal_projector.linear.bias", "img/head/bias", "M->M"),
)
BLOCK = "img/Transformer/encoderblock"
VISION_LAYER = (
    ("layer_norm1.weight", f"{BLOCK}/LayerNorm_0/scale", "LD->D"),
    ("layer_norm1.bias", f"{BLOCK}/LayerNorm_0/bias", "LD->D"),
    ("layer_norm2.weight", f"{BLOCK}/LayerNorm_1/scale", "LD->D"),
    ("layer_norm2.bias", f"{BLOCK}/LayerNorm_1/bias", "LD->D"),
    ("mlp.fc1.weight", f"{BLOCK}/MlpBlock_0/Dense_0/kernel", "LDF->F,D"),
    ("mlp.fc1.bias", f"{BLOCK}/MlpBlock_0/Dense_0/bias", "LF->F"),
    ("mlp.fc2.weight", f"{BLOCK}/MlpBlock_0/Dense_1/kernel", "LFD->D,F"),
    ("mlp.fc2.bias", f"{BLOCK}/MlpBlock_0/Dense_1/bias", "LD->D"),
    *(
        row
        for short, word in (("q", "query"), ("k", "key"), ("v", "value"))
        for row in (
            (f"self_attn.{short}_proj.weight", f"{BLOCK}/MultiHeadDotProductAttention_0/{word}/kernel", "LDNH->NH,D"),
            (f"self_attn.{short}_proj.bias", f"{BLOCK}/MultiHeadDotProductAttention_0/{word}/bias", "LNH->NH"),
        )
    ),
    ("self_attn.out_proj.weight", f"{BLOCK}/MultiHeadDotProductAttention_0/out/kernel", "LNHD->D,NH"),
    ("self_attn.out_proj.bias", f"{BLOCK}/MultiHeadDotProductAttention_0/out/bias", "LD->D"),
)
TEXT_MODEL = (
    (EMBEDDING, "llm/embedder/input_embedding", "VD->V,D"),
    ("language_model.model.norm.weight", "llm/final_norm/scale", "D->D"),
)
TEXT_LAYER = (
    ("self_attn.q_proj.weight", "llm/layers/attn/q_einsum/w", "LNDH->NH,D"),
    ("self_attn.k_proj.weight", "llm/layers/attn/kv_einsum/w", "L0KDH->KH,D"),
    ("self_attn.v_proj.weight", "llm/layers/attn/kv_einsum/w", "L1KDH->KH,D"),
    ("self_attn.o_proj.weight", "llm/layers/attn/attn_vec_einsum/w", "LNHD->D,NH"),
    ("mlp.gate_proj.weight", "llm/layers/mlp/gating_einsum", "L0DF->F,D"),
    ("mlp.up_proj.weight", "llm/layers/mlp/gating_einsum", "L1DF->F,D"),
    ("mlp.down_proj.weight", "llm/layers/mlp/linear", "LFD->D,F"),
    ("input_layernorm.weight", "llm/layers/pre_attention_norm/scale", "LD->D"),
)
# The same parameter means a different place in Gemma 1 and Gemma 2, and the hub's names differ with it.
GEMMA1_LAYER = (*TEXT_LAYER, ("post_attention_layernorm.weight", "llm/layers/pre_ffw_norm/scale", "LD->D"))
GEMMA2_LAYER = (
    *TEXT_LAYER,
    ("post_attention_layernorm.weight", "llm/layers/post_attention_norm/scale", "LD->D"),
    ("pre_feedforward_layernorm.weight", "llm/layers/pre_ffw_norm/scale", "LD->D"),
    ("post_feedforward_layernorm.weight", "llm/layers/post_ffw_norm/scale", "LD->D"),
)
# Only Gemma 2 has it.
POST_NORM = "llm/layers/post_attention_norm/scale"
# Prefixes of the arrays that a training checkpoint holds besides the weights -> what they are.
TRAINING_STATE = {"opt/": "the optimizer's state", "chrono/": "the training's clock"}
# The id of <image>, which has no row in the training code's
# table of 257,152 (transformers' conversion adds one).
IMAGE_TOKEN = 257152


@dataclass(frozen=True)
class Member:
    """An uncompressed array in an npz, from byte `offset` of the file on."""

    file: Path
    name: str
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    order: str  # "C" or "F"

    def mapped(self) -> np.ndarray:
        try:
            return np.memmap(self.file, self.dtype, "r", self.offset, self.shape, "F" if self.order == "F" else "C")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.file}: {shown(self.name)} cannot be mapped into memory: {error}") from error


@dataclass(frozen=True)
class Sliced:
    """One layer's weight, in the hub's shape, as a slice of a stacked parameter."""

    member: Member
    axes: str
    layer: int = 0

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.member.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        stored, published = self.axes.split("->")
        size = dict(zip(stored, self.member.shape, strict=True))
        return tuple(math.prod(size[axis] for axis in merged) for merged in published.split(","))

    def rows(self, start: int, stop: int) -> np.ndarray:
        stored, published = self.axes.split("->")
        index = tuple(self.layer if a == "L" else int(a) if a.isdigit() else slice(None) for a in stored)
        axes = [a for a in stored if a != "L" and not a.isdigit()]
        view = self.member.mapped()[index].transpose([axes.index(a) for a in published.replace(",", "")])
        # Where rows are [N, H] merged, whole heads are copied
        # and the ends cut off: at most two heads too many.
        inner = math.prod(view.shape[1 : len(published.split(",")[0])])
        first = start // inner
        heads = view[first : -(-stop // inner)].reshape(-1, *self.shape[1:])
        rows = np.array(heads[start - first * inner : stop - first * inner], order="C")
        refuse_non_finite(rows, start, self.member.name, self.member.file)
        return rows


def read_npz(file: Path) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]], dict[str, str]]:
    """Returns a training checkpoint's tensors by their published names, its parameters' shapes, and what is no weight and why.

    Reads no weight.

    Raises:
        CheckpointError: the file is not sound, is compressed, or is not a PaliGemma of the training code.
    """
    members: dict[str, Member] = {}
    arrays, skipped = _members(file)
    for name, member in arrays.items():
        # The fine-tuning notebook of big_vision saves without `params/`.
        key = name.removeprefix("params/")
        if key in members:
            raise CheckpointError(f"{file}: holds {shown(key)} twice, with and without params/")
        members[key] = member
    shapes = {key: member.shape for key, member in members.items()}
    tensors: dict[str, Tensor] = {
        name: Sliced(members[key], axes, layer) for name, (key, axes, layer) in layout(shapes, file).items()
    }
    return tensors, shapes, skipped


def layout(shapes: Mapping[str, tuple[int, ...]], file: Path) -> dict[str, tuple[str, str, int]]:
    """Returns the parameter, axes and layer of each tensor by its published name.

    Raises:
        CheckpointError: a parameter is missing, unknown or of an unexpected shape.
    """
    if not any(key.startswith("llm/") for key in shapes) or not any(key.startswith("img/") for key in shapes):
        raise CheckpointError(
            f"{file}: holds {listed(sorted(shapes)) or 'nothing'}, and no params/img/… and params/llm/…; "
            f"this npz is not a PaliGemma of the training code"
        )
    text_layer = GEMMA2_LAYER if POST_NORM in shapes else GEMMA1_LAYER
    expected = {key: axes for _, key, axes in (*VISION, *VISION_LAYER, *TEXT_MODEL, *text_layer)}
    if missing := sorted(expected.keys() - shapes.keys()):
        raise CheckpointError(f"{file}: {listed(missing)} missing; give a complete PaliGemma of the training code")
    if unknown := sorted(shapes.keys() - expected.keys()):
        raise CheckpointError(f"{file}: {listed(unknown)}: pgx does not know this parameter, and would not use it")
    for key, axes in expected.items():
        stored, shape = axes.split("->")[0], shapes[key]
        # A digit is an axis of two stacked parameters, except the position embedding's batch axis of one.
        stacked = 1 if key == "img/pos_embedding" else 2
        if len(shape) != len(stored) or any(n != stacked for a, n in zip(stored, shape, strict=True) if a.isdigit()):
            raise CheckpointError(f"{file}: {shown(key)} has the shape {list(shape)}, not the axes {' '.join(stored)}")
    tables = {name: (key, axes, 0) for name, key, axes in (*VISION, *TEXT_MODEL)}
    for prefix, rows in (("vision_tower.vision_model.encoder.layers", VISION_LAYER), ("language_model.model.layers", text_layer)):
        depths = {shapes[key][0] for _, key, _ in rows}
        if len(depths) != 1:
            raise CheckpointError(f"{file}: the parameters of {prefix} have {sorted(depths)} layers, and not all the same number")
        for i in range(depths.pop()):
            tables |= {f"{prefix}.{i}.{name}": (key, axes, i) for name, key, axes in rows}
    return tables


def config_of(shapes: Mapping[str, tuple[int, ...]], file: Path) -> dict[str, Any]:
    """Returns the config.json that the hub would have for parameters of these shapes.

    Raises:
        CheckpointError: the shapes do not determine it. Those of a Gemma 2 do not give its attention scale, which pgx
            knows for the published sizes alone.
    """
    patch, _, _, width = shapes["img/embedding/kernel"]
    _, patches, _ = shapes["img/pos_embedding"]
    depth, _, mlp = shapes[f"{BLOCK}/MlpBlock_0/Dense_0/kernel"]
    side = math.isqrt(patches)
    if side * side != patches:
        raise CheckpointError(f"{file}: 'img/pos_embedding' has {patches} positions, which are no square of patches")
    text = _text_config(shapes, file)
    return {
        "model_type": "paligemma",
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "image_token_index": min(text["vocab_size"], IMAGE_TOKEN),
        "projection_dim": text["hidden_size"],
        "text_config": text,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": width,
            "num_hidden_layers": depth,
            "intermediate_size": mlp,
            "num_attention_heads": shapes[f"{BLOCK}/MultiHeadDotProductAttention_0/query/kernel"][2],
            "image_size": side * patch,
            "patch_size": patch,
            "hidden_act": "gelu_pytorch_tanh",
            "projection_dim": text["hidden_size"],
            "vision_use_head": False,
        },
    }


def _text_config(shapes: Mapping[str, tuple[int, ...]], file: Path) -> dict[str, Any]:
    """Returns the decoder's part of config.json."""
    vocab, width = shapes["llm/embedder/input_embedding"]
    depth, heads, _, head_dim = shapes["llm/layers/attn/q_einsum/w"]
    kv_heads, mlp = shapes["llm/layers/attn/kv_einsum/w"][2], shapes["llm/layers/mlp/linear"][1]
    gemma2 = POST_NORM in shapes
    text: dict[str, Any] = {
        "model_type": "gemma2" if gemma2 else "gemma",
        "hidden_size": width,
        "num_hidden_layers": depth,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "hidden_activation": "gelu_pytorch_tanh",
    }
    if not gemma2:
        return text
    size = (width, depth, mlp, heads, kv_heads, head_dim)
    scales = [t.query_scale for t in TEXT.values() if size == (t.width, t.depth, t.mlp, t.heads, t.kv_heads, t.head_dim)]
    if not scales:
        raise CheckpointError(
            f"{file}: a Gemma 2 of width {width} and {depth} layers was not published, and an npz does not say its "
            f"query_pre_attn_scalar and sliding_window; put the npz and a config.json into a folder and give that"
        )
    return text | {"query_pre_attn_scalar": round(scales[0] ** -2)}


def _members(file: Path) -> tuple[dict[str, Member], dict[str, str]]:
    """The arrays of an npz that may be weights, and those of a training's state, which may be of any kind, with what they are."""
    members: dict[str, Member] = {}
    skipped: dict[str, str] = {}
    with opened(file) as f:
        size = file.stat().st_size
        try:
            with zipfile.ZipFile(f) as archive:
                entries = archive.infolist()
        # zipfile and numpy's header parser raise a dozen kinds of
        # error on damaged bytes, MemoryError and RecursionError too.
        except Exception as error:
            raise CheckpointError(f"{file}: not a sound npz: {error}; give a sound copy of the file") from error
        end = 0
        for entry in sorted(entries, key=lambda e: e.header_offset):
            name = entry.filename.removesuffix(".npy")
            where = f"{file}: {shown(name)}"
            if state := next((what for prefix, what in TRAINING_STATE.items() if name.startswith(prefix)), None):
                skipped[name] = state
                continue
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise CheckpointError(
                    f"{where} is compressed or encrypted, and cannot be read in rows; save it again with numpy.savez "
                    f"(not savez_compressed), which takes as much disk as the weights"
                )
            if entry.header_offset < end:
                raise CheckpointError(f"{where} overlaps the array before it; give a sound copy of the file")
            f.seek(entry.header_offset)
            local = read_exactly(f, 30, file)
            if local[:4] != b"PK\x03\x04":
                raise CheckpointError(f"{where} does not begin where the npz says; give a sound copy of the file")
            begin = entry.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
            end = begin + entry.file_size
            if entry.file_size != entry.compress_size or end > size:
                raise CheckpointError(f"{where} ends beyond the file's {size:,} bytes; give a whole copy of the file")
            if name in members:
                raise CheckpointError(f"{where} stands twice in the file")
            f.seek(begin)
            members[name] = _member(f, file, name, end)
    return members, skipped


def _member(f: BinaryIO, file: Path, name: str, end: int) -> Member:
    """The array that begins here and ends at byte `end` of the file."""
    where = f"{file}: {shown(name)}"
    try:
        # Later versions are for headers of over 64 KB, which
        # no plain array has and numpy would read whole.
        if (version := npy.read_magic(f)) != (1, 0):
            raise ValueError(f"npy version {version}")
        shape, fortran, dtype = npy.read_array_header_1_0(f)
    except Exception as error:
        raise CheckpointError(f"{where} is not a sound array: {shown(str(error))}; give a sound copy of the file") from error
    offset = f.tell()
    member = Member(file, name, offset, _dtype(dtype, where), _shape(shape, where), "F" if fortran else "C")
    if (needed := math.prod(shape) * dtype.itemsize) != end - offset:
        raise CheckpointError(f"{where} is {dtype} {list(shape)}, which takes {needed:,} bytes, and has {end - offset:,}")
    return member


def _dtype(dtype: np.dtype[Any], where: str) -> np.dtype[Any]:
    # numpy has no bfloat16 and saves it as two opaque bytes;
    # transformers' conversion reads them the same way.
    if dtype.kind == "V" and dtype.itemsize == 2 and dtype.names is None and dtype.subdtype is None:
        return BFLOAT16
    if dtype not in (DTYPES["F32"], DTYPES["F16"]):
        raise CheckpointError(f"{where} is stored as {shown(str(dtype))}; pgx reads float32, float16 and bfloat16")
    return dtype


def _shape(shape: tuple[int, ...], where: str) -> tuple[int, ...]:
    if any(type(n) is not int or n < 1 for n in shape) or not shape:
        raise CheckpointError(f"{where} has the shape {list(shape)}, which is no weight's")
    return shape
