# SPDX-License-Identifier: Apache-2.0
"""Answers become boxes and masks in the original image's pixels; malformed ones become warnings, never a crash or a box."""

import itertools
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pgxport.runners.outputs import Answer, Box, Fault, Malformed, parse, run_lengths
from pgxport.text import terminal_safe

WIDTH, HEIGHT = 640, 480


def loc(*bins: int) -> str:
    return "".join(f"<loc{b:04}>" for b in bins)


def seg(*codes: int) -> str:
    return "".join(f"<seg{c:03}>" for c in codes)


SIXTEEN = seg(*range(16))
CAT = loc(256, 128, 768, 1023)


def disc(codes: np.ndarray) -> np.ndarray:
    """Stands for the mask decoder: a smooth disc."""
    assert codes.shape == (1, 16)
    assert codes.dtype == np.int64
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    return (0.8 - np.hypot(y, x))[None].astype(np.float32)


def test_one_object():
    boxes, masks, warnings = parse(f"{CAT} cat", WIDTH, HEIGHT)
    assert boxes == (Box("cat", 120.0, 80.0, 360.0, 1023 / 1024 * 640, (256, 128, 768, 1023)),)
    assert masks == warnings == ()


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        (f"{CAT} cat ; {loc(0, 0, 1, 1)} dog", ["cat", "dog"]),
        (f"{CAT} cat;{CAT}dog;{CAT} cat", ["cat", "dog", "cat"]),
        (f"{CAT} cat {CAT} dog", ["cat", "dog"]),  # the label ends the object
        (f" {CAT} a traffic light, red ; ", ["a traffic light, red"]),
        (f"{CAT}", [""]),  # models fine-tuned for one task write no label
        (f"{CAT} x<y <loc12> <b>", ["x<y <loc12> <b>"]),
        (" ; ".join(f"{CAT} n{i}" for i in range(200)), [f"n{i}" for i in range(200)]),
        (loc(256, 128) + " " + loc(768, 1023) + "\n猫\n", ["猫"]),
    ],
)
def test_any_number_of_objects(text, labels):
    boxes, masks, warnings = parse(text, WIDTH, HEIGHT)
    assert [box.label for box in boxes] == labels
    assert masks == warnings == ()


@pytest.mark.parametrize("text", ["", "a cat; on a mat.", "<b>bold</b> ; <locker> <loc12> <segment>", "loc0001", "\x1b[31m"])
def test_free_text_locates_nothing_and_is_not_malformed(text):
    assert parse(text, WIDTH, HEIGHT) == ((), (), ())


@pytest.mark.parametrize(
    ("clause", "fault"),
    [
        (loc(1, 2, 3) + " cat", Fault.WRONG_COUNT),
        (loc(1, 2, 3, 4, 5) + " cat", Fault.WRONG_COUNT),
        (CAT + CAT + " cat", Fault.WRONG_COUNT),
        (CAT + seg(*range(15)) + " cat", Fault.WRONG_COUNT),
        (CAT + seg(*range(17)) + " cat", Fault.WRONG_COUNT),
        (loc(768, 128, 256, 1023) + " cat", Fault.EMPTY_BOX),
        (loc(256, 1023, 768, 128) + " cat", Fault.EMPTY_BOX),
        (loc(256, 128, 256, 1023) + " cat", Fault.EMPTY_BOX),
        (loc(256, 128, 768, 1024) + " cat", Fault.OUT_OF_RANGE),
        (loc(256, 128, 9999, 1023) + " cat", Fault.OUT_OF_RANGE),
        (CAT + seg(*range(15), 128) + " cat", Fault.OUT_OF_RANGE),
        (SIXTEEN + " cat", Fault.NO_BOX),
        ("cat", Fault.NO_BOX),
        ("cat " + CAT, Fault.OUT_OF_ORDER),
        (SIXTEEN + CAT + " cat", Fault.OUT_OF_ORDER),
    ],
)
def test_a_malformed_object_is_a_warning_and_the_others_remain(clause, fault):
    boxes, masks, warnings = parse(f"{CAT} dog ; {clause} ; {CAT}{SIXTEEN} bird", WIDTH, HEIGHT, disc)
    assert [box.label for box in boxes] == ["dog", "bird"]
    assert [mask.label for mask in masks] == ["bird"]
    assert warnings == (Malformed(fault, clause),)


def test_codes_after_the_label_are_a_warning():
    boxes, masks, warnings = parse(f"{CAT} cat {SIXTEEN}", WIDTH, HEIGHT, disc)
    assert ([box.label for box in boxes], masks) == (["cat"], ())
    assert warnings == (Malformed(Fault.NO_BOX, SIXTEEN),)


def test_a_mask_fills_its_box_as_torchs_bilinear_does():
    torch = pytest.importorskip("torch")
    _, masks, _ = parse(f"{CAT}{SIXTEEN} cat", WIDTH, HEIGHT, disc)
    mask = masks[0]
    assert (mask.label, mask.codes, mask.mask.shape, mask.mask.dtype) == ("cat", tuple(range(16)), (HEIGHT, WIDTH), np.bool_)
    y1, x1, y2, x2 = 120, 80, 360, 639
    levels = torch.nn.functional.interpolate(
        torch.from_numpy(disc(np.zeros((1, 16), np.int64)))[None], (y2 - y1, x2 - x1), mode="bilinear", antialias=True
    )[0, 0].numpy()
    certain = np.abs(levels) > 1e-4
    np.testing.assert_array_equal(mask.mask[y1:y2, x1:x2][certain], (levels > 0)[certain])
    assert mask.mask.sum() == mask.mask[y1:y2, x1:x2].sum() > 0


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
@pytest.mark.parametrize("box", [(0, 0, 1, 1), (1022, 1022, 1023, 1023), (0, 0, 1023, 1023), (511, 511, 512, 512)])
def test_a_mask_on_a_tiny_image_has_its_size(size, box):
    _, masks, warnings = parse(f"{loc(*box)}{SIXTEEN}", *size, lambda codes: np.ones((1, 64, 64), np.float32))
    assert warnings == ()
    assert masks[0].mask.shape == size[::-1]
    assert masks[0].mask.any()


def test_without_a_mask_decoder_the_codes_remain():
    _, masks, warnings = parse(f"{CAT}{SIXTEEN} cat", WIDTH, HEIGHT)
    assert (masks[0].mask, masks[0].codes, warnings) == (None, tuple(range(16)), ())
    assert masks[0].to_json()["rle"] is None


FRAGMENT = st.one_of(
    st.sampled_from(
        [CAT, SIXTEEN, CAT + SIXTEEN, ";", " ; ", " ", "cat", "<loc", "<seg", ">", "\n", "\x1b[0m", "<bos>", "\ud800"]
    ),
    st.integers(0, 9999).map(loc),
    st.integers(0, 999).map(seg),
    st.text(max_size=5),
)


@given(st.lists(FRAGMENT, max_size=30).map("".join), st.integers(1, 50), st.integers(1, 50))
@settings(max_examples=1000, deadline=None)
def test_any_text_gives_sound_boxes_or_warnings(text, width, height):
    boxes, masks, warnings = parse(text, width, height, disc)
    for box in boxes:
        assert 0 <= box.y1 < box.y2 <= height
        assert 0 <= box.x1 < box.x2 <= width
        assert loc(*box.bins) in "".join(text.split())
        assert not math.isnan(box.y1 + box.x1)
    for mask in masks:
        assert mask.box in boxes
        assert mask.mask.shape == (height, width)
        assert seg(*mask.codes) in "".join(text.split())
    assert bool(boxes or warnings) == bool(re.search("<loc[0-9]{4}>|<seg[0-9]{3}>", text))
    answer = Answer(text, (), boxes, masks, warnings, {"decode": 0.1})
    json.dumps(answer.to_json())
    assert "\x1b" not in "".join(map(str, warnings))


@given(st.integers(0, 2**20 - 1), st.sampled_from([(4, 5), (1, 20), (20, 1), (2, 10)]))
@settings(max_examples=200, deadline=None)
def test_run_lengths_are_cocos(bits, shape):
    mask = np.array([bits >> i & 1 for i in range(20)], bool).reshape(shape)
    runs = [(value, len(list(group))) for value, group in itertools.groupby(mask.T.reshape(-1).tolist())]
    expected = [length for _, length in runs]
    assert run_lengths(mask) == {"size": list(shape), "counts": [0, *expected] if runs[0][0] else expected}


def test_an_answer_is_plain_data():
    boxes, masks, warnings = parse(f"{CAT}{SIXTEEN} cat ; dog", WIDTH, HEIGHT, disc)
    content = json.loads(json.dumps(Answer("…", (1, 2), boxes, masks, warnings, {"prefill": 0.5}).to_json()))
    assert content["boxes"][0]["bins"] == [256, 128, 768, 1023]
    assert content["masks"][0]["box"]["label"] == "cat"
    assert sum(content["masks"][0]["rle"]["counts"]) == WIDTH * HEIGHT
    assert content["warnings"] == [{"fault": "no box", "text": "dog"}]
    assert content["timings"] == {"prefill": 0.5}


def test_answers_compare_by_what_was_said():
    one, two = (Answer("…", (), *parse(f"{CAT}{SIXTEEN} cat", WIDTH, HEIGHT, disc), {"prefill": t}) for t in (0.1, 0.2))
    assert one == two


def test_an_answer_draws_itself():
    answer = Answer("…", (), *parse(f"{CAT}{SIXTEEN} cat", WIDTH, HEIGHT, disc))
    image = Image.new("RGB", (WIDTH, HEIGHT))
    assert answer.draw(image).size == image.size
    assert not np.asarray(image).any()


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("plain, 猫 é 🐈‍⬛\tand\nlines", "plain, 猫 é 🐈‍⬛\tand\nlines"),
        ("\x1b[31;1mred\x1b[0m", "red"),
        ("\x1b]0;title\x07cat", "cat"),
        ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
        ("\x1bPq payload\x1b\\cat", "cat"),
        ("\x1b(Bcat\x1bc\x1b", "cat"),
        ("over\rwrite\x08\x00\x7f\x9b", "overwrite"),
        ("exe\u202egpj.cat\u2066", "exegpj.cat"),
        ("half \ud800", "half "),
    ],
)
def test_text_for_a_terminal_has_no_orders_in_it(text, safe):
    assert terminal_safe(text) == safe
    terminal_safe(text).encode()
