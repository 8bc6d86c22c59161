# SPDX-License-Identifier: Apache-2.0
"""Statistics of what flows into linears, by tensors in files: read when they are asked for, no two second moments at once."""

from collections.abc import Iterable, Mapping
from math import isqrt

import numpy as np

from pgxport.errors import UsageError, choose
from pgxport.models.checkpoint import row_blocks
from pgxport.models.safetensors import Tensor, listed, shown

CHANNELS = ("absmax", "mean", "mean_abs", "square")  # rows of inputs/PATH
OBSERVERS = ("minmax", "percentile", "entropy", "mse")  # rows of range/PATH
PARTS = ("key", "value")
NOT_ASKED = (1.0, -1.0)  # what stands for the range of an observer that was not asked


class Statistics:
    """Statistics by the names of docs/calibration.md. Paths are those of weights in the checkpoint.

    Attributes:
        name: What they are called in a message, such as the path of their file.
        inputs: A linear's weight, and the weight under whose name its input is stored: q, k and v share one.
        recipe: The recipe that they were gathered for, and no more than that needs; None: for all.
        headroom: What ranges, and the largest values of a cache, are multiplied by: other samples may give larger ones.
    """

    def __init__(
        self, name: str, inputs: Mapping[str, str], tensors: Mapping[str, Tensor], recipe: str | None, *, headroom: float = 1.0
    ):
        self.name, self.inputs, self.recipe, self.headroom = name, inputs, recipe, headroom
        self._tensors = tensors

    def absmax(self, path: str) -> np.ndarray:
        """[K] the largest |x| of each input channel of the linear whose weight is `path`"""
        return self._channels(path, "absmax")

    def mean(self, path: str) -> np.ndarray:
        """[K] E[x]"""
        return self._channels(path, "mean")

    def mean_abs(self, path: str) -> np.ndarray:
        """[K] E[|x|]"""
        return self._channels(path, "mean_abs")

    def square(self, path: str) -> np.ndarray:
        """[K] E[x²]"""
        return self._channels(path, "square")

    def moment(self, path: str) -> np.ndarray | None:
        """[K, K] E[x xᵀ] in float32, read now; None where it was not gathered"""
        stored = self._tensors.get(f"moment/{self._site(path)}")
        if stored is None:
            return None
        k = _side(stored.shape[0])
        moment = np.empty((k, k), np.float32)
        for start, stop in row_blocks(k, 4 * k):
            triangle = stored.rows(area(start), area(stop))
            for row in range(start, stop):
                at = area(row) - area(start)
                moment[row, : row + 1] = triangle[at : at + row + 1]
            corner = moment[start:stop, start:stop]
            corner[:] = np.tril(corner) + np.tril(corner, -1).T
            moment[:start, start:stop] = moment[start:stop, :start].T
        return moment

    def range(self, path: str, observer: str) -> tuple[float, float]:
        """The lowest and highest x that the observer keeps, over all channels of the linear's input.

        Raises:
            UsageError: there is no such observer, or it was not asked when the file was made.
        """
        return self._range(f"range/{self._site(path)}", observer)

    def changed_range(self, path: str, observer: str) -> tuple[float, float] | None:
        """The same, of the input as the recipe changes it that they were gathered for; None where it was not"""
        return self._range(f"changed/{path}", observer) if f"changed/{path}" in self._tensors else None

    def cache(self, layer: int, part: str) -> np.ndarray:
        """[K, D] the largest |x| of each channel of a layer's keys after rotation, or of its values"""
        assert part in PARTS, f"Bug: a cache has no {part!r}"
        return self._whole(f"cache/{layer}/{part}") * np.float32(self.headroom)

    def changed_values(self, layer: int) -> np.ndarray | None:
        """[K, D] the largest |x| of each channel of a layer's values, as the recipe changes them; None where it was not gathered"""
        if f"changed/{layer}/value" not in self._tensors:
            return None
        return self._whole(f"changed/{layer}/value") * np.float32(self.headroom)

    def lacking(self, tensors: Iterable[str]) -> list[str]:
        """Those of the tensors that the file does not hold: of a linear's input under the linear's own name."""
        sites = self.inputs
        named = ((name, *name.split("/", 1)) for name in tensors)
        return [
            name for name, kind, path in named if name not in self._tensors and f"{kind}/{sites.get(path)}" not in self._tensors
        ]

    def _channels(self, path: str, row: str) -> np.ndarray:
        i = CHANNELS.index(row)
        return self._tensor(f"inputs/{self._site(path)}").rows(i, i + 1)[0]

    def _whole(self, name: str) -> np.ndarray:
        tensor = self._tensor(name)
        return tensor.rows(0, tensor.shape[0])

    def _range(self, name: str, observer: str) -> tuple[float, float]:
        row = choose("observer", observer, {name: i for i, name in enumerate(OBSERVERS)})
        low, high = self._tensor(name).rows(row, row + 1)[0]
        if (low, high) == NOT_ASKED:
            raise UsageError(f"{self.name} has {shown(name)} without what the observer {observer!r} keeps; {self._gather()}")
        return float(low) * self.headroom, float(high) * self.headroom

    def _tensor(self, name: str) -> Tensor:
        if name not in self._tensors:
            raise UsageError(f"{self.name} was made without {shown(name)}; {self._gather()}")
        return self._tensors[name]

    def _gather(self) -> str:
        if self.recipe is None:
            return "it may be of another model"
        return f"it was made for the recipe {shown(self.recipe)}; pgx calibrate --for another makes one for that"

    def _site(self, path: str) -> str:
        if path not in self.inputs:
            raise UsageError(
                f"{self.name} knows nothing about the input of {shown(path)}; it knows {listed(sorted(self.inputs))}. "
                f"It may be of another model"
            )
        return self.inputs[path]


def pack(rows: Iterable[np.ndarray], k: int) -> np.ndarray:
    """The lower triangle of a symmetric [K, K], row after row: [K (K + 1) / 2]; of a row, what is right of it is not read.

    >>> pack(np.array([[1, 2], [2, 3]], np.float32), 2).tolist()
    [1.0, 2.0, 3.0]
    """
    packed = np.empty(area(k), np.float32)
    for i, row in enumerate(rows):
        packed[area(i) : area(i + 1)] = row[: i + 1]
    return packed


def area(rows: int) -> int:
    """Numbers in the first rows of a triangle."""
    return rows * (rows + 1) // 2


def _side(area: int) -> int:
    """Rows of a triangle of so many numbers.

    >>> _side(area(7))
    7
    """
    return (isqrt(8 * area + 1) - 1) // 2
