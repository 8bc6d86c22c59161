# SPDX-License-Identifier: Apache-2.0
"""What is drawn is where the boxes and masks are, in distinct colours, with labels that can be read."""

import itertools

import numpy as np
import pytest
from PIL import Image

from pgxport.runners.draw import COLOURS, draw
from pgxport.runners.outputs import Box, Mask

GREY = (90, 90, 90)


def box(label: str, y1: float, x1: float, y2: float, x2: float) -> Box:
    return Box(label, y1, x1, y2, x2, (0, 0, 1, 1))


def drawn(size: tuple[int, int], boxes: list[Box], masks: list[Mask] | None = None) -> np.ndarray:
    return np.asarray(draw(Image.new("RGB", size, GREY), boxes, masks or []))


def where(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return (pixels == colour).all(-1)


@pytest.mark.parametrize("size", [(112, 112), (224, 224), (640, 480), (2000, 1500)])
def test_a_frame_lies_on_its_box_and_grows_with_the_image(size):
    width, height = size
    pixels = drawn(size, [box("", 0.2 * height, 0.3 * width, 0.7 * height, 0.9 * width)])
    rows, columns = np.nonzero(where(pixels, COLOURS[0]))
    edges = (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
    assert edges == (round(0.2 * height), round(0.3 * width), round(0.7 * height), round(0.9 * width))
    line = where(pixels, COLOURS[0])[:, width // 2].sum() // 2
    assert line == max(1, round(min(size) / 250))
    assert tuple(pixels[height // 2, width // 2]) == GREY


@pytest.mark.parametrize("size", [(1, 1), (1, 60), (60, 1), (8, 8), (112, 112), (224, 100)])
def test_any_size_and_any_box_can_be_drawn(size):
    width, height = size
    boxes = [
        box("cat", 0, 0, height, width),
        box("a very long label " * 9, height * 0.99, width * 0.99, height, width),
        box("", 0, 0, 0.1, 0.1),
    ]
    assert drawn(size, boxes).shape == (height, width, 3)


def test_each_object_has_its_colour():
    boxes = [box("", 10, 10 + 60 * i, 90, 60 + 60 * i) for i in range(len(COLOURS))]
    pixels = drawn((500, 100), boxes)
    for i, colour in enumerate(COLOURS):
        columns = np.nonzero(where(pixels, colour))[1]
        assert (columns.min(), columns.max()) == (10 + 60 * i, 59 + 60 * i)


def test_the_colours_are_far_apart_and_black_text_reads_on_them():
    for a, b in itertools.combinations(COLOURS, 2):
        assert np.abs(np.subtract(a, b)).sum() > 80
    for colour in COLOURS:
        linear = [(c / 255 + 0.055) ** 2.4 / 1.055**2.4 for c in colour]
        luminance = float(np.dot(linear, (0.2126, 0.7152, 0.0722)))
        assert (luminance + 0.05) / 0.05 >= 4.5  # WCAG AA


@pytest.mark.parametrize("size", [(112, 112), (224, 224), (640, 480), (2000, 1500)])
def test_a_label_is_black_on_its_colour_and_inside_the_image(size):
    width, height = size
    for y1, x1, y2, x2 in [(0.3, 0.1, 0.8, 0.6), (0, 0, 1, 1), (0.9, 0.9, 1, 1), (0, 0.8, 0.1, 1), (0, 0, 0.02, 0.02)]:
        bare = drawn(size, [box("", y1 * height, x1 * width, y2 * height, x2 * width)])
        pixels = drawn(size, [box("cat", y1 * height, x1 * width, y2 * height, x2 * width)])
        label = where(pixels, COLOURS[0]) & ~where(bare, COLOURS[0])
        text = (pixels.sum(-1) < 150) & (bare.sum(-1) >= 150)  # thin strokes are smoothed, never quite black
        assert label.sum() > 10 * 14
        assert text.sum() > 10


def test_labels_of_overlapping_boxes_do_not_cover_each_other():
    boxes = [box("cat", 60 + i, 60 + i, 180 - i, 180 - i) for i in range(4)]
    pixels = drawn((224, 224), boxes)
    for i in range(4):
        alone = where(drawn((224, 224), [box("cat", 60, 60, 180, 180)]), COLOURS[0]).sum()
        assert where(pixels, COLOURS[i]).sum() > 0.6 * alone


def test_a_mask_tints_its_object_and_nothing_else():
    shape = np.zeros((100, 120), bool)
    shape[30:70, 40:90] = True
    area = box("", 30, 40, 70, 90)
    pixels = drawn((120, 100), [area], [Mask("", area, (0,) * 16, shape)])
    assert (pixels[~shape] == GREY).all()
    inside = pixels[50, 60]
    assert (inside != GREY).any()
    assert (inside != COLOURS[0]).any()  # the image shows through
    assert tuple(pixels[30, 60]) == COLOURS[0]


def test_a_mask_without_its_box_in_the_list_is_framed_too():
    area = box("", 30, 40, 70, 90)
    pixels = drawn((120, 100), [], [Mask("", area, (0,) * 16, None)])
    assert tuple(pixels[30, 60]) == COLOURS[0]


def test_the_image_itself_stays_as_it_was():
    image = Image.new("RGBA", (64, 64), (*GREY, 255))
    draw(image, [box("cat", 1, 1, 60, 60)], [])
    assert image.getpixel((1, 1)) == (*GREY, 255)


def test_a_label_with_escape_sequences_or_lines_is_one_line_of_text():
    plain = drawn((224, 224), [box("a cat", 60, 60, 180, 180)])
    np.testing.assert_array_equal(drawn((224, 224), [box("\x1b[31ma\n cat\x1b[0m", 60, 60, 180, 180)]), plain)
