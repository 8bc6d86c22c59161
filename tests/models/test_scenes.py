# SPDX-License-Identifier: Apache-2.0
"""The scene generator: seeded, disjoint splits, and questions whose answers are what was drawn."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest

from pgxport.models.tiny.scenes import SHAPES, SIZE, SPLITS, TASKS, ask, draw, locations

PRIMARY = {"red": 0, "green": 1, "blue": 2}  # the channel that is brightest


def digest(split: str, index: int) -> str:
    scene = draw(split, index)
    facts = [(t.name, t.size, t.box) for t in scene.things], scene.sign, [(q.prompt, q.answer) for q in ask(scene, index)]
    return hashlib.sha256(scene.image.tobytes() + repr(facts).encode()).hexdigest()


def test_the_same_numbers_draw_the_same_pixels_and_ask_the_same_questions_in_another_process():
    """Another process has another hash seed: an order taken from a set would show."""
    code = "import sys; sys.path[:0] = sys.argv[1:]; from test_scenes import digest; print(digest('test', 5), digest('train', 8))"
    for seed in ("1", "2"):
        paths = [str(p) for p in sys.path if p] + [__file__.rsplit("/", 1)[0]]
        ran = subprocess.run(
            [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        )
        assert ran.stdout.split() == [digest("test", 5), digest("train", 8)]


def test_splits_are_disjoint():
    seen = [digest(split, index) for split in SPLITS for index in range(20)]
    assert len(set(seen)) == len(seen)


def test_an_unknown_split_is_an_error():
    with pytest.raises(KeyError):
        draw("validation", 0)


@pytest.mark.parametrize("index", range(40))
def test_every_answer_is_what_was_drawn(index):
    scene = draw("test", index)
    names, shapes = [t.name for t in scene.things], [t.shape for t in scene.things]
    xs = [t.centre[1] for t in scene.things]
    assert xs == sorted(xs)
    for q in ask(scene, index):
        assert q.task in TASKS
        words = q.prompt.split()
        if q.task == "caption":
            assert [w for w in q.answer.replace(",", "").split() if w in SHAPES] == shapes
        elif q.task == "ocr":
            assert q.answer == scene.sign.text
        elif "how many things" in q.prompt:
            assert q.answer == str(len(names))
        elif words[:4] == ["answer", "en", "is", "there"]:
            assert q.answer == ("yes" if " ".join(words[5:7]) in names else "no")
        elif words[2:4] == ["what", "color"]:
            assert f"{q.answer} {words[-2]}" in names
        elif words[2:4] == ["what", "shape"]:
            assert f"{words[-3]} {q.answer}" in names
        elif words[2:3] == ["where"]:
            y, x = next(t.centre for t in scene.things if t.name == " ".join(words[-3:-1]))
            assert q.answer == f"{'top' if y < SIZE / 2 else 'bottom'} {'left' if x < SIZE / 2 else 'right'}"
        elif q.task == "detect":
            for label, thing in q.things:
                assert label in q.prompt
                assert label in (thing.name, thing.shape)
            asked = q.prompt.removeprefix("detect ").split(" ; ")
            assert len(q.things) == sum(word in (t.name, t.shape) for word in asked for t in scene.things)
        elif q.task == "segment":
            ((label, thing),) = q.things
            assert q.prompt == f"segment {label}"
            assert thing in scene.things


@pytest.mark.parametrize("index", range(12))
def test_a_thing_is_painted_where_its_mask_and_box_say(index):
    scene = draw("test", index)
    pixels = np.asarray(scene.image, np.float32)
    for thing in scene.things:
        mask = thing.mask()
        ys, xs = np.nonzero(mask)
        y1, x1, y2, x2 = thing.box
        assert abs(ys.min() - y1) <= 1.5
        assert abs(ys.max() + 1 - y2) <= 1.5
        assert abs(xs.min() - x1) <= 1.5
        assert abs(xs.max() + 1 - x2) <= 1.5
        if thing.colour in PRIMARY:
            assert np.argmax(pixels[mask].mean(0)) == PRIMARY[thing.colour]


def test_locations_are_bins_of_the_pictures_side():
    assert locations((0, 0, SIZE, SIZE)) == "<loc0000><loc0000><loc1023><loc1023>"
    assert locations((SIZE / 2, SIZE / 4, 1, 2)) == "<loc0512><loc0256><loc0005><loc0009>"
