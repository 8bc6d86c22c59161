# SPDX-License-Identifier: Apache-2.0
"""Write a checkpoint of a published model's true shapes with random weights, so that any figure can be had without the gated ones.

    python tools/make_checkpoint.py --size 3b --res 448 ck
    python tools/make_checkpoint.py --size 28b --res 896 --sparse ck     no byte of weights on disk; they read as zeros

The layout is the hub's: 4.x names, shards of 5 GB, an index, Google's config.json, and a small tokenizer with the real ids.
Every value follows from the seed and the tensor's name. Memory does not grow with the model.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

sys.path.insert(0, str(Path(__file__).parents[1]))  # the source tree is found without an install

from pgxport.models.spec import RESOLUTIONS, TEXT, ModelSpec, published
from pgxport.models.weights import weight_shapes

DTYPES = {"bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)), "float32": ("F32", np.dtype("<f4"))}
SHARD_BYTES = 5_000_000_000  # where transformers cut its files when these models were published
# Random values are drawn once and read from another place for each tensor. The number is prime: as long as a tensor has fewer
# rows than this, and rows are shorter, no two of its rows are the same.
POOL = 2_097_143

PAD, EOS, BOS, UNK, MASK, NEWLINE, BYTES, PIECES = 0, 1, 2, 3, 4, 108, 217, 473
LOC, SEG, IMAGE = 256000, 257024, 257152
WORDS = ("answer", "caption", "cat", "describe", "detect", "dog", "en", "image", "in", "ocr", "person", "segment", "the", "what")


def write_checkpoint(folder: Path, spec: ModelSpec, *, dtype: str = "bfloat16", sparse: bool = False, seed: int = 0) -> int:
    """Write all files of a checkpoint into `folder`, which is created, and return the bytes of its weights."""
    folder.mkdir(parents=True)
    name, kind = DTYPES[dtype]
    shapes = weight_shapes(spec)
    shards = split(shapes, kind.itemsize)
    files = [
        "model.safetensors" if len(shards) == 1 else f"model-{i:05}-of-{len(shards):05}.safetensors"
        for i in range(1, len(shards) + 1)
    ]
    pool = Pool(kind, seed)
    for file, tensors in zip(files, shards, strict=True):
        with open(folder / file, "wb", buffering=0) as f:
            f.write(header({t: shapes[t] for t in tensors}, name, kind.itemsize))
            if sparse:
                f.truncate(f.tell() + sum(prod(shapes[t]) for t in tensors) * kind.itemsize)
                continue
            for tensor in tensors:
                for block in pool.blocks(tensor, shapes[tensor]):
                    while block:
                        block = block[f.write(block) :]
    total = sum(prod(shape) for shape in shapes.values()) * kind.itemsize
    if len(files) > 1:
        where = {tensor: file for file, tensors in zip(files, shards, strict=True) for tensor in tensors}
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": where})
    write_json(folder / "config.json", config(spec, dtype))
    write_json(folder / "generation_config.json", {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD})
    write_json(folder / "preprocessor_config.json", preprocessor(spec))
    write_json(folder / "tokenizer_config.json", TOKENIZER_CONFIG)
    tokenizer().save(str(folder / "tokenizer.json"))
    return total


def split(shapes: dict[str, tuple[int, ...]], itemsize: int) -> list[list[str]]:
    """Names in order, in as many lists as there are shards."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = prod(shape) * itemsize
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    return shards


def header(shapes: dict[str, tuple[int, ...]], dtype: str, itemsize: int) -> bytes:
    """The beginning of a safetensors file with these tensors one after the other."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class Pool:
    """Random numbers of mean 0 and deviation 1, scaled and cast once for each kind of tensor."""

    def __init__(self, dtype: np.dtype[Any], seed: int):
        self._dtype, self._seed = dtype, seed
        self._normal = np.random.default_rng(seed).standard_normal(POOL, np.float32)
        self._cast: dict[tuple[float, float], np.ndarray] = {}

    def blocks(self, name: str, shape: tuple[int, ...]) -> Iterator[memoryview]:
        """The bytes of a tensor, which begin at a place in the pool that its name gives."""
        values = self._values(*distribution(name, shape))
        at = int.from_bytes(hashlib.sha256(f"{self._seed} {name}".encode()).digest()[:8], "little") % POOL
        left = prod(shape)
        while left:
            piece = values[at : at + left]
            yield piece.view(np.uint8).data
            left -= len(piece)
            at = 0

    def _values(self, mean: float, deviation: float) -> np.ndarray:
        key = (mean, deviation)
        if key not in self._cast:
            self._cast[key] = (mean + deviation * self._normal).astype(self._dtype)
        return self._cast[key]


def distribution(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and deviation that keep activations near one, as in tests/reference.py: norms are not 1, and biases not 0."""
    if len(shape) > 1:
        # Scores large enough for a wrong scale or a missing softcap to show.
        return 0.0, (3.0 if name.endswith("q_proj.weight") else 1.0) / prod(shape[1:]) ** 0.5
    if name.endswith("bias"):
        return 0.0, 0.2
    # Gemma's norms multiply by 1 + weight, SigLIP's by weight.
    return (1.0 if name.startswith("vision_tower") else 0.0), 0.3


def config(spec: ModelSpec, dtype: str) -> dict[str, Any]:
    """config.json, with the fields that Google's have: what it leaves out is a default of transformers."""
    v, t, gemma2 = spec.vision, spec.text, spec.family == "paligemma2"
    common = {"torch_dtype": dtype, "num_image_tokens": spec.image_tokens}
    text: dict[str, Any] = {
        "model_type": "gemma2" if gemma2 else "gemma", "hidden_size": t.width, "intermediate_size": t.mlp, "num_hidden_layers": t.depth,
        "num_attention_heads": t.heads, "num_key_value_heads": t.kv_heads, "head_dim": t.head_dim, "vocab_size": t.vocab, **common,
    }  # fmt: skip
    if gemma2:
        text |= {
            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "sliding_window": t.window,
            "query_pre_attn_scalar": round(t.query_scale**-2), "attn_logit_softcapping": t.attn_softcap,
            "final_logit_softcapping": t.logit_softcap,
        }  # fmt: skip
    vision = {
        "model_type": "siglip_vision_model", "image_size": v.resolution, "patch_size": v.patch, "hidden_size": v.width,
        "intermediate_size": v.mlp, "num_hidden_layers": v.depth, "num_attention_heads": v.heads, "projection_dim": t.width,
        "vision_use_head": False, **common,
    }  # fmt: skip
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma", "torch_dtype": dtype,
        "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "image_token_index": IMAGE, "hidden_size": t.width,
        "projection_dim": t.width, "transformers_version": "4.47.0", "text_config": text, "vision_config": vision,
    }  # fmt: skip


def preprocessor(spec: ModelSpec) -> dict[str, Any]:
    return {
        "image_processor_type": "SiglipImageProcessor", "processor_class": "PaliGemmaProcessor", "image_seq_length": spec.image_tokens,
        "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3,
        "rescale_factor": 1 / 255, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "size": {"height": spec.resolution, "width": spec.resolution},
    }  # fmt: skip


TOKENIZER_CONFIG = {
    "tokenizer_class": "GemmaTokenizer", "processor_class": "PaliGemmaProcessor", "bos_token": "<bos>", "eos_token": "<eos>",
    "pad_token": "<pad>", "unk_token": "<unk>", "additional_special_tokens": ["<image>"], "add_bos_token": True,
    "add_eos_token": False, "clean_up_tokenization_spaces": False,
}  # fmt: skip


def tokenizer() -> Tokenizer:
    """Characters and a few words, at Gemma's ids; most ids in between are nobody's."""
    control = {"<pad>": PAD, "<eos>": EOS, "<bos>": BOS, "<unk>": UNK}
    symbols = {"<mask>": MASK, **{"\n" * n: NEWLINE + n - 1 for n in range(1, 32)}, **{"▁" * n: 137 + n for n in range(2, 32)}}
    located = {f"<loc{i:04}>": LOC + i for i in range(1024)} | {f"<seg{i:03}>": SEG + i for i in range(128)}
    vocab = {**control, **symbols, **{f"<0x{b:02X}>": BYTES + b for b in range(256)}, **located, "<image>": IMAGE}
    merges: list[tuple[str, str]] = []
    pieces = ["▁", *(chr(c) for c in range(33, 127))]
    for word in WORDS:
        for end in range(2, len(word) + 2):
            merge = (f"▁{word}"[: end - 1], f"▁{word}"[end - 1])
            if merge not in merges:
                merges.append(merge)
                pieces.append("".join(merge))
    vocab |= {piece: PIECES + i for i, piece in enumerate(pieces)}

    made = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    made.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in (*control, "<image>")])
    made.add_tokens([AddedToken(t, normalized=False) for t in (*symbols, *located)])
    return made


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what to write; it must not exist")
    parser.add_argument("--size", required=True, choices=sorted({size for _, size in TEXT}))
    parser.add_argument("--res", required=True, type=int, choices=RESOLUTIONS)
    parser.add_argument("--family", default="paligemma2", choices=sorted({family for family, _ in TEXT}))
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(DTYPES))
    parser.add_argument("--depth", type=int, help="so many layers in both towers, instead of all")
    parser.add_argument("--sparse", action="store_true", help="files of holes: nothing on disk, and zeros when read")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if (args.family, args.size) not in TEXT:
        parser.error(f"no {args.family} {args.size} was published")
    if args.folder.exists():
        parser.error(f"{args.folder} exists")
    if args.depth is not None and args.depth < 1:
        parser.error(f"--depth {args.depth}: a model has a layer at least")
    start = time.perf_counter()
    spec = shallow(published(args.family, args.size, args.res), args.depth)
    total = write_checkpoint(args.folder, spec, dtype=args.dtype, sparse=args.sparse, seed=args.seed)
    seconds = time.perf_counter() - start
    print(f"wrote {args.folder}: {total / 1e9:.2f} GB of weights in {seconds:.1f} s ({total / 1e6 / seconds:.0f} MB/s)")
    print(f"try: pgx export --checkpoint {args.folder} -o bundle")


def shallow(spec: ModelSpec, depth: int | None) -> ModelSpec:
    """The same model with no more than `depth` layers in both towers."""
    if depth is None:
        return spec
    vision = replace(spec.vision, depth=min(depth, spec.vision.depth))
    depth = min(depth, spec.text.depth)
    local = tuple(i for i in spec.text.local_layers if i < depth)
    return replace(spec, vision=vision, text=replace(spec.text, depth=depth, local_layers=local))


if __name__ == "__main__":
    main()
