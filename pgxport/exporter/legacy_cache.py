# SPDX-License-Identifier: Apache-2.0
"""Legacy: the cache of TensorRT 10's implicit int8 calibrator, from the ranges of a calibration file.

For boards that stay with TensorRT 10.x and its calibrators, which TensorRT 11 no longer has: a bundle of floats for TensorRT 10.x that is
exported with a calibration file carries one for each graph. Explicit Q and DQ (`--precision w8a8`) need none. The text is what IInt8EntropyCalibrator2.read_calibration_cache gives to the builder. No TensorRT has read one of ours.
"""

import struct
from collections.abc import Mapping

from pgxport.exporter.graph import GraphBuilder
from pgxport.exporter.recipe import Recipe
from pgxport.exporter.scaling import Statistics
from pgxport.exporter.targets import Target

HEADER = "TRT-{}-EntropyCalibration2"  # TensorRT's version as NvInferVersion.h has it


def legacy_caches(
    graphs: Mapping[str, GraphBuilder], recipe: Recipe, target: Target, statistics: Statistics | None
) -> dict[str, str]:
    """Files by name: none, unless a calibrator could ask for them."""
    if statistics is None or recipe.lossy or not (target.tensorrt or "").startswith("10."):
        return {}
    return {f"{name}.calibration.cache": calibration_cache(g, statistics) for name, g in graphs.items() if name != "mask_decoder"}


def header(version: str) -> str:
    """
    >>> header("10.16")
    'TRT-101600-EntropyCalibration2'
    """
    major, minor = map(int, version.split("."))
    return HEADER.format(10_000 * major + 100 * minor)


def calibration_cache(g: GraphBuilder, statistics: Statistics, observer: str = "minmax") -> str:
    """A line for each tensor that a matrix of the graph multiplies: its name, and its scale as the bits of a float32 in hexadecimal.

    Tensors without a line stay in floats.
    """
    assert g.target.tensorrt is not None, f"Bug: {g.target.name} has no calibrator"
    lines = {tensor: _scale(*statistics.range(path, observer)) for tensor, path in g.multiplied.items()}
    return "\n".join([header(g.target.tensorrt), *(f"{tensor}: {scale}" for tensor, scale in lines.items())]) + "\n"


def _scale(low: float, high: float) -> str:
    """The step of an int8 grid around zero that reaches both ends.

    >>> _scale(-127.0, 12.0)
    '3f800000'
    """
    return struct.pack(">f", max(-low, high, 0.0) / 127 or 1.0).hex()
