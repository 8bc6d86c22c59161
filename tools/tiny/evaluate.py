# SPDX-License-Identifier: Apache-2.0
"""Measure a tiny checkpoint with transformers, in float32, on held-out questions of every task.

python tools/tiny/evaluate.py CHECKPOINT --questions 500 --json benchmarks/results/tiny-112.json
python tools/tiny/evaluate.py pgxport/models/tiny/tiny-112 --questions 40 --answers tests/goldens/tiny-112-answers.json

caption, ocr, answer: share of answers that are exactly right. detect: share of true boxes met with an IoU of 0.5 or more, and
their mean IoU, boxes matched one to one within a label; a box nobody predicted counts 0. segment: mean IoU of the masks in the
picture's pixels. Intervals are 95 % bootstrap percentiles over questions.
"""

import argparse
import hashlib
import json
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.nn import functional as F

from pgxport.models.tiny.scenes import SIZE, TASKS, Question, Scene, ask, draw
from pgxport.runners.outputs import Box, parse

Item = tuple[int, Question]


def held_out(count: int, split: str = "test") -> list[Item]:
    """`count` questions of every task, one of a task for each scene."""
    found: dict[str, list[Item]] = defaultdict(list)
    index = 0
    while any(len(found[task]) < count for task in TASKS):
        questions = ask(draw(split, index), index)
        rng = np.random.default_rng([11, index])
        for task in TASKS:
            options = [q for q in questions if q.task == task]
            if options and len(found[task]) < count:
                found[task].append((index, options[int(rng.integers(len(options)))]))
        index += 1
    return [item for task in TASKS for item in found[task]]


def mask_decoder(file: Path) -> Callable[[np.ndarray], np.ndarray]:
    """codes [B, 16] -> masks [B, 64, 64], in PyTorch from the published layout."""
    w = {k: torch.from_numpy(v.astype(np.float32)) for k, v in np.load(file).items()}

    def conv(x: torch.Tensor, name: str, pad: int = 0) -> torch.Tensor:
        return F.conv2d(x, w[f"decoder.{name}.weight"], w[f"decoder.{name}.bias"], padding=pad)

    def decode(codes: np.ndarray) -> np.ndarray:
        x = torch.relu(conv(w["_vq_vae._embedding"][codes].reshape(-1, 4, 4, 512).permute(0, 3, 1, 2), "0"))
        for block in "23":
            h = torch.relu(conv(x, f"{block}.net.0", 1))
            x = x + conv(torch.relu(conv(h, f"{block}.net.2", 1)), f"{block}.net.4")
        for name in ("4", "6", "8", "10"):
            x = torch.relu(F.conv_transpose2d(x, w[f"decoder.{name}.weight"], w[f"decoder.{name}.bias"], stride=2, padding=1))
        return conv(x, "12")[:, 0].numpy()

    return decode


class Reference:
    """transformers' own processor and greedy generation."""

    def __init__(self, checkpoint: Path):
        self.processor = transformers.PaliGemmaProcessor.from_pretrained(checkpoint)
        self.model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
            checkpoint, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    @torch.no_grad()
    def __call__(self, scenes: list[Scene], prompts: list[str]) -> list[list[int]]:
        """Generated ids, without eos, of prompts of one length."""
        inputs = self.processor(images=[s.image for s in scenes], text=[f"<image>{p}" for p in prompts], return_tensors="pt")
        out = self.model.generate(**inputs, max_new_tokens=128, do_sample=False)[:, inputs["input_ids"].shape[1] :]
        ends = {self.model.generation_config.eos_token_id, self.model.generation_config.pad_token_id}
        return [[t for t in row if t not in ends] for row in out.tolist()]

    def length(self, prompt: str) -> int:
        return len(self.processor.tokenizer(prompt, add_special_tokens=False)["input_ids"])

    def text(self, ids: list[int]) -> str:
        return self.processor.tokenizer.decode(ids, skip_special_tokens=False)


def answers(reference: Reference, items: list[Item], batch: int = 25) -> list[str]:
    """The reference's answer to every item; prompts of one length go together, so nothing is padded."""
    by_length = defaultdict(list)
    for k, (_, question) in enumerate(items):
        by_length[reference.length(question.prompt)].append(k)
    texts = [""] * len(items)
    for same in by_length.values():
        for start in range(0, len(same), batch):
            part = same[start : start + batch]
            rows = reference([draw("test", items[k][0]) for k in part], [items[k][1].prompt for k in part])
            for k, ids in zip(part, rows, strict=True):
                texts[k] = reference.text(ids)
    return texts


def iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Of two boxes y1, x1, y2, x2."""
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, height) * max(0.0, width)
    return both / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both)


def match(question: Question, boxes: tuple[Box, ...]) -> list[float]:
    """The IoU of each true box with the predicted box that is given to it, best pairs first; 0 where none is left."""
    pairs = sorted(
        (
            (iou(t.box, (b.y1, b.x1, b.y2, b.x2)), i, j)
            for i, (label, t) in enumerate(question.things)
            for j, b in enumerate(boxes)
            if b.label == label
        ),
        reverse=True,
    )
    met: dict[int, float] = {}
    used: set[int] = set()
    for value, i, j in pairs:
        if i not in met and j not in used:
            met[i] = value
            used.add(j)
    return [met.get(i, 0.0) for i in range(len(question.things))]


def score(items: list[Item], texts: list[str], decode: Callable[[np.ndarray], np.ndarray]) -> dict[str, dict]:
    """Metric -> mean, interval and count, and how many answers were empty or malformed."""
    values: dict[str, list[list[float]]] = defaultdict(list)
    faults = {"empty": 0, "malformed": 0}
    for (_, question), text in zip(items, texts, strict=True):
        boxes, masks, warnings = parse(text, SIZE, SIZE, decode)
        faults["empty"] += not text
        faults["malformed"] += bool(warnings)
        if question.answer is not None:
            values[f"{question.task} exact"].append([float(text == question.answer)])
        elif question.task == "detect":
            found = match(question, boxes)
            values["detect box IoU"].append(found)
            values["detect box accuracy@0.5"].append([float(v >= 0.5) for v in found])
        else:
            truth = question.things[0][1].mask()
            mask = masks[0].mask if masks else np.zeros_like(truth)
            values["segment mask IoU"].append([float((mask & truth).sum() / (mask | truth).sum())])
    return {name: _summary(rows) for name, rows in values.items()} | {"faults": faults}


def _summary(rows: list[list[float]]) -> dict[str, float | int]:
    rng = np.random.default_rng(0)
    sums, counts = np.array([sum(r) for r in rows]), np.array([len(r) for r in rows])
    draws = rng.integers(0, len(rows), (2000, len(rows)))
    low, high = np.percentile(sums[draws].sum(1) / counts[draws].sum(1), [2.5, 97.5])
    mean = sums.sum() / counts.sum()
    return {"mean": round(float(mean), 4), "low": round(float(low), 4), "high": round(float(high), 4), "questions": len(rows)}


def golden(checkpoint: Path, items: list[Item], texts: list[str]) -> dict[str, object]:
    """The answers with what they depend on."""
    return {
        "made_by": f"python tools/tiny/evaluate.py {checkpoint} --answers: transformers {transformers.__version__} in float32, greedy",
        "checkpoint_sha256": hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest(),
        "answers": [[index, question.prompt, text] for (index, question), text in zip(items, texts, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--questions", type=int, default=500, help="of each task")
    parser.add_argument("--masks", type=Path, default=Path("pgxport/models/tiny/vae-oid.npz"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--answers", type=Path, help="Keep the answers here, for tests.")
    args = parser.parse_args()
    start = time.monotonic()
    items = held_out(args.questions)
    texts = answers(Reference(args.checkpoint), items)
    if args.answers:
        args.answers.write_text(json.dumps(golden(args.checkpoint, items, texts), indent=1) + "\n")
    result = score(items, texts, mask_decoder(args.masks))
    record = {
        "what": f"{args.checkpoint.name}: accuracy on {args.questions} held-out questions a task, transformers in float32, greedy",
        "command": f"python tools/tiny/evaluate.py {args.checkpoint.name} --questions {args.questions}",
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "seconds": round(time.monotonic() - start, 1),
        "metrics": result,
    }
    for name, row in result.items():
        print(f"{name}: {row}")
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
