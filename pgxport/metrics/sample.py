# SPDX-License-Identifier: Apache-2.0
"""A sample: a picture, a prompt and what is true, of one type for every data set and every command."""

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pgxport.errors import DiskError, InputError, require
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
        """Return the pixels of the object, bool [H, W].

        >>> Segmentation((2, 2), runs=(2, 2)).mask().tolist()
        [[False, True], [False, True]]
        """
        height, width = self.size
        if not self.polygons:
            ones = np.repeat(np.arange(len(self.runs)) % 2 == 1, self.runs)
            return ones.reshape((height, width), order="F")
        coco = require("pycocotools.mask", "a mask of polygons")
        run_lengths = coco.merge(coco.frPyObjects([list(polygon) for polygon in self.polygons], height, width))
        return coco.decode(run_lengths).astype(np.bool_)


@dataclass(frozen=True)
class Region:
    """A true object. A crowd is many objects under one outline: to find it is neither right nor wrong."""

    label: str
    box: BoxEdges
    segmentation: Segmentation | None = None
    crowd: bool = False


@dataclass(frozen=True)
class Drawn:
    """An embedded scene by its number, drawn when it is needed: a picture takes 150 KB."""

    index: int
    split: str = "test"  # a key of models.tiny.scenes.SPLITS


@dataclass(frozen=True)
class Sample:
    """One question about one picture, and what is true: answers, or regions, or neither.

    Attributes:
        background: Whether it is true that nothing of what is asked for is there, rather than not known.
    """

    id: str  # for messages and pages
    image: Path | bytes | Drawn
    prompt: str
    task: str
    metric: str  # the metric that decides; a key of metrics.METRICS
    answers: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()
    background: bool = False

    @property
    def group(self) -> Hashable:
        """The key by which samples are drawn together: questions about one picture depend on each other."""
        return self.image

    def open(self) -> Image.Image:
        """Return the picture as upright 8-bit RGB.

        Raises:
            InputError: it is damaged; the message names the sample.
        """
        if isinstance(self.image, Drawn):
            from pgxport.models.tiny.scenes import draw

            return draw(self.image.split, self.image.index).image
        try:
            return load_image(self.image)
        except InputError as error:
            raise InputError(f"sample {self.id}: {error}") from error

    def content(self) -> bytes:
        """Return the bytes that a digest of the picture is made of: its file, or the pixels of a drawn scene.

        Raises:
            DiskError: the file cannot be read; the message names the sample.
        """
        if isinstance(self.image, Drawn):
            return self.open().tobytes()
        if isinstance(self.image, bytes):
            return self.image
        try:
            return self.image.read_bytes()
        except OSError as error:
            raise DiskError(f"sample {self.id}: {self.image} cannot be read: {error.strerror or error}") from error
