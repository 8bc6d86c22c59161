# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens and logits of an exported bundle of true shapes against transformers in float32, on one drawn scene.

python tools/make_checkpoint.py --size 3b --res 448 ck
pgx export --checkpoint ck --precision fp16 -o b
python benchmarks/parity_true_shapes.py ck b --json benchmarks/results/parity-3b-448-fp16.json

The two run one after the other, each in a process of its own: the reference alone takes 12 GB. The bundle is fed the reference's
tokens, so that every step is compared; a step whose two best logits are nearer than the tolerance counts as a tie.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

TOLERANCE = 1e-3  # of the logits' scale: weights rounded to float16, sums in another order
STEPS = 16
PROMPT = "answer en what color is the cross ?"


def inputs(bundle: Path) -> tuple[np.ndarray, np.ndarray]:
    """Prefix ids [T] and pixels [1, 3, R, R]."""
    from pgxport.bundle.reader import Bundle
    from pgxport.models.tiny.scenes import draw
    from pgxport.runners.image import pixel_values
    from pgxport.runners.tokenizer import PromptTokenizer

    m = Bundle.open(bundle, verify=False).manifest
    ids = PromptTokenizer(bundle / "tokenizer.json", m.token_ids).prompt_ids(PROMPT, m.image_tokens)
    return np.array(ids), pixel_values(draw("test", 3).image, m.resolution)[None]


def reference(checkpoint: Path, bundle: Path, out: Path) -> None:
    """transformers: tokens [16] and the logits [16, V] that chose them."""
    import torch
    from transformers import PaliGemmaForConditionalGeneration

    ids, pixels = inputs(bundle)
    start = time.perf_counter()
    model = PaliGemmaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
    loaded = time.perf_counter()
    with torch.no_grad():
        result = model.generate(
            input_ids=torch.from_numpy(ids)[None], pixel_values=torch.from_numpy(pixels), attention_mask=torch.ones(1, len(ids), dtype=int),
            token_type_ids=torch.zeros(1, len(ids), dtype=int), max_new_tokens=STEPS, min_new_tokens=STEPS, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    tokens = result.sequences[0, len(ids) :].numpy()
    logits = torch.cat(result.logits).numpy()
    np.savez(out, tokens=tokens, logits=logits, seconds=[loaded - start, time.perf_counter() - loaded])


def candidate(bundle: Path, tokens: np.ndarray, out: Path) -> None:
    """The bundle, fed those tokens: logits [16, V]."""
    from pgxport.runners.pipeline import Pipeline

    ids, pixels = inputs(bundle)
    with Pipeline.open(bundle) as pipeline:
        start = time.perf_counter()
        prefix = pipeline.prefix(pipeline.encode_pixels(pixels), ids)
        following = pipeline.teacher_forced(prefix, tokens[:-1].tolist())
        logits = [next(following).copy()]
        first = time.perf_counter() - start
        logits += [row.copy() for row in following]
        np.savez(out, logits=np.stack(logits), seconds=[pipeline.load_seconds, first, time.perf_counter() - start - first])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=["reference", "candidate"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part == "reference":
        reference(args.checkpoint, args.bundle, args.out)
        return
    if args.part == "candidate":
        candidate(args.bundle, np.load(args.out.with_name("reference.npz"))["tokens"], args.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        results = {}
        for part in ("reference", "candidate"):
            out = Path(folder) / f"{part}.npz"
            command = [sys.executable, __file__, str(args.checkpoint), str(args.bundle), "--part", part, "--out", str(out)]
            subprocess.run(command, check=True)
            results[part] = dict(np.load(out))
            print(f"{part}: {results[part]['seconds'].round(1).tolist()} s", flush=True)
    expected, got, tokens = results["reference"]["logits"], results["candidate"]["logits"], results["reference"]["tokens"]
    scale = np.abs(expected).max()
    error = np.abs(got - expected).max(1) / scale
    best = np.sort(expected, axis=1)
    ties = (best[:, -1] - best[:, -2]) < TOLERANCE * scale
    same = got.argmax(1) == tokens
    record = {
        "what": f"{args.bundle.name}: {STEPS} teacher-forced steps against transformers in float32",
        "tokens_equal": int(same.sum()),
        "steps": STEPS,
        "unequal_and_no_tie": int((~same & ~ties).sum()),
        "largest_error_of_logits_scale": float(error.max()),
        "error_by_step": [float(f"{e:.2e}") for e in error],
        "versions": {p: version(p) for p in ("pgxport", "onnxruntime", "transformers", "torch")},
        "cores": os.cpu_count(),
    }
    print(json.dumps(record, indent=1))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if record["unequal_and_no_tie"] or record["largest_error_of_logits_scale"] > TOLERANCE:
        raise SystemExit("the bundle does not compute what transformers computes")


if __name__ == "__main__":
    main()
