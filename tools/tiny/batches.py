# SPDX-License-Identifier: Apache-2.0
"""Read shards as training batches: token ids of the questions, pixels, and what every patch shows."""

import pickle
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from model import Questions, Size
from tokenizers import Tokenizer
from torch import Tensor
from vqvae import MaskAutoencoder, unpack

from pgxport.models.tiny.scenes import TASKS, locations

BOS, EOS = 2, 1
# How often a question is drawn, by task: each scene has one caption and one sign, and a dozen answers in words.
WEIGHT = {"caption": 3.0, "ocr": 6.0, "answer": 0.8, "detect": 1.6, "segment": 1.2}


@dataclass(frozen=True)
class Batch:
    pixels: Tensor  # uint8 [B, R, R, 3]
    index: Tensor  # [B, N] what each patch shows: 0, 1.. a thing, 11.. a character
    things: Tensor  # [B, 4, 7]
    characters: Tensor  # [B, 4, 5]
    codes: Tensor  # [B, 4, 16] of each thing, -1 where unknown
    questions: list[Questions]  # buckets of like length


class Shard:
    """One shard in memory: pixels mapped, questions as one flat array of token ids."""

    def __init__(self, folder: Path, number: int, resolution: int, tokenizer: Tokenizer, masks: MaskAutoencoder | None):
        record = pickle.loads((folder / f"{number:03d}.pickle").read_bytes())
        self.pixels = np.load(folder / f"{number:03d}-{resolution}.npy", mmap_mode="r")
        self.index = record["index"][resolution // 14]
        self.things, self.characters = record["things"], record["characters"]
        cache = folder / f"{number:03d}-questions.npz"
        if masks is not None and not cache.exists():
            _tokenize(record["questions"], self.things, tokenizer, masks, cache)
        if masks is not None:
            with np.load(cache) as arrays:
                self.ids, self.start, self.prefix, self.image, self.task, self.codes = (
                    arrays[k] for k in ("ids", "start", "prefix", "image", "task", "codes")
                )
            self.first = np.searchsorted(self.image, np.arange(len(self.index) + 1))


def _tokenize(questions: list, things: np.ndarray, tokenizer: Tokenizer, masks: MaskAutoencoder, cache: Path) -> None:
    flat = [(i, *q) for i, per_image in enumerate(questions) for q in per_image]
    # A caption and a sign are worded once; the second set of wordings repeats them.
    flat = [q for n, q in enumerate(flat) if q[1] not in ("caption", "ocr") or q not in flat[max(0, n - 14) : n]]
    segment = [q for q in flat if q[1] == "segment"]
    with torch.no_grad():
        rows = torch.from_numpy(np.stack([q[4][0][2] for q in segment]))
        codes = torch.cat([masks.codes(masks.encoder(unpack(part))) for part in rows.split(512)]).numpy()
    by_thing = np.full((len(questions), 4, 16), -1, np.int16)
    answers, n = [], 0
    for image, task, _, answer, targets in flat:
        if task == "segment":
            label, box, _ = targets[0]
            thing = np.abs(things[image, :, 3:] - np.array(box) / 224).sum(1).argmin()
            by_thing[image, thing] = codes[n]
            answer = locations(box) + "".join(f"<seg{c:03d}>" for c in codes[n]) + f" {label}"
            n += 1
        elif task == "detect":
            answer = " ; ".join(f"{locations(box)} {label}" for label, box, _ in targets)
        answers.append(answer)
    prompts = tokenizer.encode_batch([q[2] for q in flat], add_special_tokens=False)
    suffixes = tokenizer.encode_batch(answers, add_special_tokens=False)
    newline = tokenizer.token_to_id("\n")
    rows_ = [[BOS, *p.ids, newline, *a.ids, EOS] for p, a in zip(prompts, suffixes, strict=True)]
    arrays = {
        "ids": np.concatenate([np.array(r, np.int16) for r in rows_]),
        "start": np.cumsum([0, *map(len, rows_)]),
        "prefix": np.array([len(p.ids) + 2 for p in prompts], np.int16),
        "image": np.array([q[0] for q in flat], np.int32),
        "task": np.array([TASKS.index(q[1]) for q in flat], np.int8),
        "codes": by_thing,
    }
    temporary = cache.with_suffix(".part.npz")
    np.savez(temporary, **arrays)
    temporary.rename(cache)


def batches(
    folder: Path, size: Size, tokenizer: Tokenizer, masks: MaskAutoencoder | None, images: int, questions: int, seed: int
) -> Iterator[Batch]:
    """Endless random batches, made one ahead in a thread; picks up shards that appear while it runs."""
    made: queue.Queue = queue.Queue(3)

    def work() -> None:
        try:
            rng, shards = np.random.default_rng(seed), {}
            while True:
                there = sorted(int(f.stem) for f in folder.glob("*.pickle"))
                number = there[rng.integers(len(there))]
                if number not in shards:
                    shards[number] = Shard(folder, number, size.resolution, tokenizer, masks)
                for _ in range(20 if len(there) > 1 else 1):
                    made.put(_batch(shards[number], rng, images, questions))
        except Exception as error:  # handed over to the reader, which raises it
            made.put(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        item = made.get()
        if isinstance(item, Exception):
            raise item
        yield item


def _batch(shard: Shard, rng: np.random.Generator, images: int, questions: int) -> Batch:
    chosen = np.sort(rng.choice(len(shard.index), images, replace=False))
    buckets = []
    if questions:
        weight = np.array([WEIGHT[t] for t in TASKS])
        picks, owner = [], []
        for slot, i in enumerate(chosen):
            rows = np.arange(shard.first[i], shard.first[i + 1])
            p = weight[shard.task[rows]]
            take = rng.choice(rows, min(questions, len(rows)), replace=False, p=p / p.sum())
            picks.append(take)
            owner.append(np.full(len(take), slot))
        rows, slots = np.concatenate(picks), np.concatenate(owner)
        lengths = shard.start[rows + 1] - shard.start[rows]
        order = np.argsort(lengths, kind="stable")
        for part in np.array_split(order, 4):
            longest = int(lengths[part].max())
            ids = np.zeros((len(part), longest), np.int64)
            for k, row in enumerate(rows[part]):
                ids[k, : lengths[part[k]]] = shard.ids[shard.start[row] : shard.start[row + 1]]
            buckets.append(
                Questions(
                    torch.from_numpy(ids),
                    torch.from_numpy(slots[part]),
                    torch.from_numpy(shard.prefix[rows[part]].astype(np.int64)),
                )
            )
    codes = shard.codes[chosen] if questions else np.full((images, 4, 16), -1)
    return Batch(
        torch.from_numpy(shard.pixels[chosen]), torch.from_numpy(shard.index[chosen].astype(np.int64)), torch.from_numpy(shard.things[chosen]),
        torch.from_numpy(shard.characters[chosen]), torch.from_numpy(codes.astype(np.int64)), buckets,
    )  # fmt: skip
