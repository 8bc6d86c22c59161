# SPDX-License-Identifier: Apache-2.0
"""Parse a generated text into boxes and masks in pixels of the original image, and warnings for malformed parts."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from PIL import Image

from pgxport.text import terminal_safe

BINS = 1024
CODES = 128
CODES_PER_MASK = 16

# One object of a clause. A label may be missing: models fine-tuned for one task write none.
OBJECT = re.compile(
    r"\s*(?P<loc>(?:<loc[0-9]{4}>\s*)*)(?P<seg>(?:<seg[0-9]{3}>\s*)*)(?P<label>(?:(?!<loc[0-9]{4}>|<seg[0-9]{3}>).)*)", re.DOTALL
)

DecodeMask = Callable[[np.ndarray], np.ndarray]  # codes [1, 16] int64 -> mask [1, 64, 64] float32 in [-1, 1]


class Fault(StrEnum):
    """The ways in which a part of an answer is malformed."""

    NO_BOX = "no box"
    WRONG_COUNT = "wrong count"
    OUT_OF_ORDER = "out of order"
    OUT_OF_RANGE = "out of range"
    EMPTY_BOX = "empty box"


@dataclass(frozen=True)
class Malformed:
    """A part of an answer that gave no box, word for word, and why."""

    fault: Fault
    text: str

    def __str__(self) -> str:
        return f"{self.fault}: {terminal_safe(self.text)!r}"


@dataclass(frozen=True)
class Box:
    """A located object, in pixels of the original image; `bins` are the four numbers the model wrote (y1, x1, y2, x2)."""

    label: str
    y1: float
    x1: float
    y2: float
    x2: float
    bins: tuple[int, int, int, int]

    def to_json(self) -> dict[str, Any]:
        """Plain data, for json.dumps."""
        return {"label": self.label, "y1": self.y1, "x1": self.x1, "y2": self.y2, "x2": self.x2, "bins": list(self.bins)}


@dataclass(frozen=True)
class Mask:
    """A segmented object. `mask` is bool [H, W] over the whole image, or None where no mask decoder was at hand."""

    label: str
    box: Box
    codes: tuple[int, ...]
    mask: np.ndarray | None = field(compare=False, repr=False)  # box and codes decide it

    def to_json(self) -> dict[str, Any]:
        """Plain data, for json.dumps; the mask as COCO's uncompressed run lengths."""
        rle = None if self.mask is None else run_lengths(self.mask)
        return {"label": self.label, "box": self.box.to_json(), "codes": list(self.codes), "rle": rle}


@dataclass(frozen=True)
class Answer:
    """A model's answer about an image. Segmented objects stand in `masks` and, like all located ones, in `boxes`."""

    text: str
    token_ids: tuple[int, ...] = ()
    boxes: tuple[Box, ...] = ()
    masks: tuple[Mask, ...] = ()
    warnings: tuple[Malformed, ...] = ()
    timings: Mapping[str, float] = field(default_factory=dict, compare=False)  # seconds by stage
    truncated: bool = False  # the limit of new tokens came before the model's end of text

    def draw(self, image: Image.Image) -> Image.Image:
        """A copy of the original image with the boxes, masks and labels on it."""
        from pgxport.runners.draw import draw  # `draw` knows Box and Mask

        return draw(image, self.boxes, self.masks)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for json.dumps."""
        return {
            "text": self.text,
            "token_ids": list(self.token_ids),
            "boxes": [box.to_json() for box in self.boxes],
            "masks": [mask.to_json() for mask in self.masks],
            "warnings": [{"fault": warning.fault.value, "text": warning.text} for warning in self.warnings],
            "truncated": self.truncated,
            "timings": dict(self.timings),
        }


def parse(
    text: str, width: int, height: int, decode_mask: DecodeMask | None = None
) -> tuple[tuple[Box, ...], tuple[Mask, ...], tuple[Malformed, ...]]:
    """Read an answer of `detect` or `segment`. Text that locates nothing gives nothing; what is malformed gives a warning.

    Args:
        text: `<loc…>` × 4, then 16 `<seg…>` for a mask, then a label; objects are separated by semicolons.
        width: Of the original image.
        height: Of the original image.
        decode_mask: The mask decoder; without it a mask keeps its codes only.

    >>> boxes, _, _ = parse("<loc0256><loc0000><loc0512><loc1023> cat", width=100, height=200)
    >>> boxes[0].label, boxes[0].y1, boxes[0].y2
    ('cat', 50.0, 100.0)
    """
    boxes: list[Box] = []
    masks: list[Mask] = []
    warnings: list[Malformed] = []
    if not re.search(r"<loc[0-9]{4}>|<seg[0-9]{3}>", text):
        return (), (), ()
    for clause in text.split(";"):
        matches = [match for match in OBJECT.finditer(clause) if match[0].strip()]
        # Whose is a box that follows a label or codes? The whole clause is doubtful.
        if len(matches) > 1 and not matches[0]["loc"]:
            warnings.append(Malformed(Fault.OUT_OF_ORDER, clause.strip()))
            continue
        for match in matches:
            bins, codes, label = _numbers(match["loc"]), _numbers(match["seg"]), match["label"].strip()
            if fault := _fault(bins, codes):
                warnings.append(Malformed(fault, match[0].strip()))
                continue
            y1, x1, y2, x2 = bins
            # 1024, as the public post-processing; the training code's evaluator has 1023.
            box = Box(label, y1 / BINS * height, x1 / BINS * width, y2 / BINS * height, x2 / BINS * width, (y1, x1, y2, x2))
            boxes.append(box)
            if codes:
                decoded = None if decode_mask is None else decode_mask(np.array([codes], np.int64))
                masks.append(Mask(label, box, codes, None if decoded is None else _paste(decoded, box, width, height)))
    return tuple(boxes), tuple(masks), tuple(warnings)


def run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    """A mask as COCO's uncompressed run lengths: column by column, beginning with the zeros.

    >>> run_lengths(np.array([[False, True], [False, True]]))
    {'size': [2, 2], 'counts': [2, 2]}
    """
    column_wise = mask.astype(bool).ravel(order="F")
    changes = np.flatnonzero(np.diff(column_wise, prepend=False))
    edges = [0, *changes.tolist(), column_wise.size]
    return {"size": list(mask.shape), "counts": np.diff(edges).tolist()}


def _numbers(tokens: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"[0-9]+", tokens))


def _fault(bins: tuple[int, ...], codes: tuple[int, ...]) -> Fault | None:
    if not bins:
        return Fault.NO_BOX
    if len(bins) != 4 or len(codes) not in (0, CODES_PER_MASK):
        return Fault.WRONG_COUNT
    if max(bins) >= BINS or max(codes, default=0) >= CODES:
        return Fault.OUT_OF_RANGE
    if bins[2] <= bins[0] or bins[3] <= bins[1]:
        return Fault.EMPTY_BOX
    return None


def _paste(mask: np.ndarray, box: Box, width: int, height: int) -> np.ndarray:
    """[1, 64, 64] in [-1, 1] -> bool [H, W]: stretched over the box, nothing outside it."""
    # The box in whole pixels, at least one: on small images it may round to none.
    y1, x1 = min(round(box.y1), height - 1), min(round(box.x1), width - 1)
    y2, x2 = max(round(box.y2), y1 + 1), max(round(box.x2), x1 + 1)
    levels = Image.fromarray(np.asarray(mask, np.float32).reshape(mask.shape[-2:]))
    whole = np.zeros((height, width), np.bool_)
    whole[y1:y2, x1:x2] = np.asarray(levels.resize((x2 - x1, y2 - y1), Image.Resampling.BILINEAR)) > 0
    return whole
