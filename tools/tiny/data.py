# SPDX-License-Identifier: Apache-2.0
"""Training scenes as shards on disk: pixels at both resolutions, and for every patch the thing or character it shows.

python tools/tiny/data.py SCRATCH --shards 20    # resumable: a shard that exists is not drawn again
"""

import argparse
import os
import pickle
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pgxport.models.tiny.scenes import COLOURS, DIAMETERS, LETTERS, SHAPES, SIZE, Question, Scene, ask, draw

SHARD = 5000  # scenes
ROWS = 4  # most things in a scene, and most characters on a sign
CHARACTER = 11  # index map: 0 nothing, 1..4 a thing, 11..14 a character


def index_map(scene: Scene) -> np.ndarray:
    """Which thing (1..) or character (11..) covers each cell of a 112 × 112 map; 0 where none does."""
    canvas = Image.new("L", (112, 112))
    pen = ImageDraw.Draw(canvas)
    for i, thing in enumerate(scene.things):
        pen.polygon([(x / 2, y / 2) for x, y in thing.outline], fill=1 + i)
    for i, (y1, x1, y2, x2) in enumerate(scene.sign.characters if scene.sign else ()):
        pen.rectangle((x1 / 2, y1 / 2, x2 / 2, y2 / 2), fill=CHARACTER + i)
    return np.asarray(canvas)


def patch_index(cells: np.ndarray, grid: int) -> np.ndarray:
    """[112, 112] -> [grid * grid]: the commonest index of each patch that covers 15 % of it, else 0."""
    side = 112 // grid
    patches = cells.reshape(grid, side, grid, side).swapaxes(1, 2).reshape(grid * grid, -1)
    counts = np.stack([(patches == k).sum(1) for k in range(CHARACTER + ROWS)], 1)
    counts[:, 0] = 0.15 * side * side
    return counts.argmax(1).astype(np.uint8)


def tables(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Things [4, 7] (shape, colour, size, y1, x1, y2, x2) and characters [4, 5] (letter, y1, x1, y2, x2), boxes in 0..1."""
    things, characters = np.zeros((ROWS, 7), np.float32), np.zeros((ROWS, 5), np.float32)
    for i, t in enumerate(scene.things):
        ids = SHAPES.index(t.shape), list(COLOURS).index(t.colour), list(DIAMETERS).index(t.size)
        things[i] = [*ids, *(v / SIZE for v in t.box)]
    if scene.sign:
        for i, (letter, box) in enumerate(zip(scene.sign.text, scene.sign.characters, strict=True)):
            characters[i] = [LETTERS.index(letter), *(v / SIZE for v in box)]
    return things, characters


def write_shard(job: tuple[Path, int]) -> int:
    folder, shard = job
    os.nice(5)
    if (folder / f"{shard:03d}.pickle").exists():
        return shard
    pixels = {res: np.empty((SHARD, res, res, 3), np.uint8) for res in (112, 224)}
    index = {grid: np.empty((SHARD, grid * grid), np.uint8) for grid in (8, 16)}
    rows, questions = [], []
    for i in range(SHARD):
        scene = draw("train", shard * SHARD + i)
        pixels[224][i] = scene.image
        pixels[112][i] = scene.image.resize((112, 112), Image.Resampling.BICUBIC)
        cells = index_map(scene)
        for grid, out in index.items():
            out[i] = patch_index(cells, grid)
        rows.append(tables(scene))
        # Two sets of wordings for each picture; masks are stored small, for the mask tokenizer.
        questions.append([_plain(q) for seed in (0, 1) for q in ask(scene, 2 * (shard * SHARD + i) + seed)])
    for res, array in pixels.items():
        np.save(folder / f"{shard:03d}-{res}.npy", array)
    record = {
        "index": index,
        "things": np.stack([r[0] for r in rows]),
        "characters": np.stack([r[1] for r in rows]),
        "questions": questions,
    }
    temporary = folder / f"{shard:03d}.part"
    temporary.write_bytes(pickle.dumps(record))
    temporary.rename(folder / f"{shard:03d}.pickle")
    return shard


def _plain(question: Question) -> tuple:
    targets = [
        (label, t.box, np.packbits(t.crop_mask() > 0.5) if question.task == "segment" else None) for label, t in question.things
    ]
    return question.task, question.prompt, question.answer, targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--shards", type=int, default=20)
    args = parser.parse_args()
    folder = args.scratch / "shards"
    folder.mkdir(parents=True, exist_ok=True)
    with Pool(2) as pool:
        for shard in pool.imap_unordered(write_shard, [(folder, i) for i in range(args.shards)]):
            print(f"shard {shard} of {args.shards}", flush=True)


if __name__ == "__main__":
    main()
