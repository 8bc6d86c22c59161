# SPDX-License-Identifier: Apache-2.0
"""Draw an answer's boxes, masks and labels on the image, legible from a thumbnail to a photo."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from pgxport.errors import DiskError, UsageError
from pgxport.files import disk_errors, writing
from pgxport.runners.outputs import Box, Mask
from pgxport.text import terminal_safe

# Told apart side by side, on photos, and with the common colour
# blindnesses: Okabe and Ito's set, brightened, and two more.
COLOURS = (
    (255, 176, 0),
    (64, 180, 255),
    (255, 92, 40),
    (0, 200, 140),
    (240, 110, 200),
    (245, 235, 70),
    (130, 120, 255),
    (160, 220, 60),
)
WRITES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MASK_OPACITY = 0.42

Area = tuple[int, int, int, int]  # x1, y1, x2, y2; the last two are one past the end


def draw(image: Image.Image, boxes: Sequence[Box], masks: Sequence[Mask]) -> Image.Image:
    """A copy of the image as RGB, a colour for each object; a mask has the colour of its box."""
    canvas = image.convert("RGB")
    objects = [*boxes, *(mask.box for mask in masks if mask.box not in boxes)]
    colour = {box: COLOURS[i % len(COLOURS)] for i, box in enumerate(dict.fromkeys(objects))}
    line = max(1, round(min(canvas.size) / 250))
    for mask in masks:
        if mask.mask is not None:
            _mask(canvas, mask.mask, colour[mask.box], line)
    pen = ImageDraw.Draw(canvas)
    for box in colour:
        _frame(pen, box, canvas.size, colour[box], line)
    _labels(pen, colour, canvas.size, line)
    return canvas


def _mask(canvas: Image.Image, mask: np.ndarray, colour: tuple[int, int, int], line: int) -> None:
    shape = Image.fromarray(mask.astype(np.uint8) * 255)
    canvas.paste(colour, mask=shape.point(lambda level: level * MASK_OPACITY))
    # The edge is what tells an object from its surroundings where both have
    # the colour of the mask. A mean over the neighbourhood is full only
    # inside; it costs the same for any width, a minimum filter its square.
    inside = shape.filter(ImageFilter.BoxBlur(line)).point(lambda level: 255 * (level == 255))
    canvas.paste(colour, mask=ImageChops.subtract(shape, inside))


def _frame(pen: ImageDraw.ImageDraw, box: Box, size: tuple[int, int], colour: tuple[int, int, int], line: int) -> None:
    x1, y1, x2, y2 = _pixels(box, size)
    pen.rectangle((x1, y1, x2 - 1, y2 - 1), outline=colour, width=line)
    if line > 1:  # a dark hairline around it, for a light frame on a light image; a thumbnail has no room for it
        pen.rectangle((x1 - 1, y1 - 1, x2, y2), outline=(0, 0, 0), width=1)


def _labels(pen: ImageDraw.ImageDraw, colour: dict[Box, tuple[int, int, int]], size: tuple[int, int], line: int) -> None:
    # Pillow's own typeface; below 10 pixels it cannot be read.
    font = ImageFont.load_default(max(10, round(min(size) / 32)))
    taken: list[Area] = []
    for box in colour:
        pad = line + 1
        text = _fitting(terminal_safe(" ".join(box.label.split())), font, size[0] - 2 * pad)
        if not text:
            continue
        ascent = round(-font.getbbox("X", anchor="ls")[1])
        descent = round(font.getbbox("g", anchor="ls")[3])
        width, height = round(font.getlength(text)) + 2 * pad, ascent + descent + 2 * pad
        area = _place(_pixels(box, size), width, height, size, taken)
        taken.append(area)
        pen.rectangle((area[0], area[1], area[2] - 1, area[3] - 1), fill=colour[box])
        pen.text((area[0] + pad, area[1] + pad + ascent), text, fill=(0, 0, 0), font=font, anchor="ls")  # COLOURS are all light


def _place(box: Area, width: int, height: int, size: tuple[int, int], taken: list[Area]) -> Area:
    """The first free place of: above the box, under it, inside it at the top or bottom; else lower and lower inside it."""
    x1, y1, x2, y2 = box
    rows = [y1 - height, y2, y1, y2 - height, *range(y1 + height, y2, height)]
    columns = (x1, x2 - width)
    places = [(x, y) for y in rows if 0 <= y <= size[1] - height for x in columns] or [(x1, y1)]
    areas = []
    for x, y in places:
        left, top = max(0, min(x, size[0] - width)), max(0, min(y, size[1] - height))
        areas.append((left, top, left + width, top + height))
    return next((area for area in areas if not any(_overlap(area, other) for other in taken)), areas[0])


def _overlap(a: Area, b: Area) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _pixels(box: Box, size: tuple[int, int]) -> Area:
    """The box in whole pixels of the image, at least one."""
    x1, y1 = min(max(0, round(box.x1)), size[0] - 1), min(max(0, round(box.y1)), size[1] - 1)
    return x1, y1, max(x1 + 1, min(round(box.x2), size[0])), max(y1 + 1, min(round(box.y2), size[1]))


def _fitting(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """The text, cut with an ellipsis to `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…" if text else ""


def picture_format(path: str | Path) -> str:
    """Pillow's name of the format that a file's ending asks for.

    Raises:
        UsageError: pgx does not write it.
    """
    path = Path(path)
    if path.suffix.lower() not in WRITES:
        raise UsageError(
            f"{path}: pictures are written as {', '.join(WRITES)}, not as {path.suffix or 'a name without an ending'}"
        )
    return WRITES[path.suffix.lower()]


def save_image(picture: Image.Image, path: str | Path) -> None:
    """Write a picture, whole or not at all.

    Raises:
        UsageError: the name's ending is not that of a format that pgx writes.
        DiskError: it cannot be written.
    """
    path, kind = Path(path), picture_format(path)
    try:
        with disk_errors(f"cannot write {path}", "choose another --save"), writing(path) as file:
            picture.save(file, kind)
    except ValueError as error:  # more pixels a side than the format can have
        raise DiskError(f"cannot write {path}: {error}; choose another --save") from error
