# SPDX-License-Identifier: Apache-2.0
"""The mask decoder: from 16 codes of a VQ-VAE to a 64 × 64 mask, with the weights of `vae-oid.npz`."""

import zipfile
from pathlib import Path

import numpy as np

from pgxport.errors import CheckpointError
from pgxport.models.layers import Value, Writer

CODES, CODE_WIDTH, GRID = 128, 512, 4


class MaskWeights:
    """The mask decoder's weights, read from an npz file of a few megabytes; a `TensorSource`.

    Raises:
        CheckpointError: the file cannot be read, or holds other weights.
    """

    def __init__(self, file: Path):
        try:
            with np.load(file, allow_pickle=False) as arrays:
                self._arrays = {
                    name: arrays[name] for name in arrays.files if name.startswith(("decoder.", "_vq_vae._embedding"))
                }
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(f"{file} cannot be read as the mask decoder's weights (vae-oid.npz): {error}") from error
        if (shape := self.shape("_vq_vae._embedding")) != (CODES, CODE_WIDTH):
            raise CheckpointError(f"{file}: _vq_vae._embedding is {list(shape)}, not [{CODES}, {CODE_WIDTH}]")

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self._arrays:
            raise CheckpointError(f"the mask decoder's weights lack {name}; vae-oid.npz holds it")
        return self._arrays[name].shape

    def dtype(self, name: str) -> np.dtype:
        return self._arrays[name].dtype

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._arrays[name][start:stop]


def mask_decoder(g: Writer) -> None:
    """Writes the mask decoder: codes [B, 16] int64, row by row -> mask [B, 64, 64], above 0 where the object is."""
    codes = g.input("codes", ["batch", GRID * GRID], np.int64)
    x = g.op("Gather", g.weight("_vq_vae._embedding"), codes, axis=0)
    x = g.op("Reshape", g.op("Transpose", x, perm=[0, 2, 1]), [0, CODE_WIDTH, GRID, GRID])
    with g.scope("decoder"):
        x = g.op("Relu", conv(g, x, "0"))
        for block in ("2", "3"):
            with g.scope(f"{block}.net"):
                x = g.op("Add", x, residual(g, x))
        for name in ("4", "6", "8", "10"):
            with g.scope(name):
                x = g.op(
                    "Relu", g.op("ConvTranspose", x, g.weight("weight"), g.weight("bias"), strides=[2, 2], pads=[1, 1, 1, 1])
                )
        x = conv(g, x, "12")
    g.output(g.op("Reshape", x, [0, 16 * GRID, 16 * GRID]), "mask", ["batch", 16 * GRID, 16 * GRID])


def residual(g: Writer, x: Value) -> Value:
    x = g.op("Relu", conv(g, x, "0", pad=1))
    x = g.op("Relu", conv(g, x, "2", pad=1))
    return conv(g, x, "4")


def conv(g: Writer, x: Value, name: str, pad: int = 0) -> Value:
    with g.scope(name):
        return g.op("Conv", x, g.weight("weight"), g.weight("bias"), pads=[pad] * 4)
