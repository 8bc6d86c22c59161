# SPDX-License-Identifier: Apache-2.0
"""A sample: a picture, a prompt and what is true, the same type whatever data set it came from."""

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pgxport.errors import InputError, require
from pgxport.runners.image import load_image

# The tasks whose answer is a place: text without a box is then no answer.
LOCATING = ("detect", "segment", "refer")

BoxEdges = tuple[float, float, float, float]  # y1, x1, y2, x2 in pixels of the original image


@dataclass(frozen=True)
class Segmentation:
    """A true mask as COCO stores it: polygons, or run lengths column by column beginning with the zeros."""

    size: tuple[int, int]  # height, width
    polygons: tuple[tuple[float, ...], ...] = ()  # x, y, x, y, …
    runs: tuple[int, ...] = ()

    def mask(self) -> np.ndarray:
        """Bool [H, W].

        >>> Segmentation((2, 2), runs=(2, 2)).mask().tolist()
        [[False, True], [False, True]]
        """
        height, width = self.size
        if not self.polygons:
            ones = np.repeat(np.arange(len(self.runs)) % 2 == 1, self.runs)
            return ones.reshape((height, width), order="F")
        coco = require("pycocotools.mask", "a mask of polygons")
        coded = coco.merge(coco.frPyObjects([list(polygon) for polygon in self.polygons], height, width))
        return coco.decode(coded).astype(np.bool_)


@dataclass(frozen=True)
class Region:
    """A true object. A crowd is many objects under one outline: finding it is neither right nor wrong."""

    label: str
    box: BoxEdges
    segmentation: Segmentation | None = None
    crowd: bool = False


@dataclass(frozen=True)
class Drawn:
    """An embedded scene of the test split, drawn when it is needed: a picture is 150 KB, its number is not."""

    index: int


@dataclass(frozen=True)
class Sample:
    """What a bundle is asked, and what is true."""

    id: str
    image: Path | bytes | Drawn
    prompt: str
    task: str
    metric: str  # the one that decides; a key of metrics.METRICS
    answers: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()

    @property
    def group(self) -> Hashable:
        """What is drawn together in a bootstrap: questions about one picture are not independent."""
        return self.image

    def open(self) -> Image.Image:
        """The picture as upright 8-bit RGB.

        Raises:
            InputError: it is damaged; the message names the sample.
        """
        if isinstance(self.image, Drawn):
            from pgxport.models.tiny.scenes import draw

            return draw("test", self.image.index).image
        try:
            return load_image(self.image)
        except InputError as error:
            raise InputError(f"sample {self.id}: {error}") from error
