# SPDX-License-Identifier: Apache-2.0
"""Parse and build a graph with TensorRT-RTX, which needs no GPU for that."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Built:
    nbytes: int
    seconds: float
    parse_seconds: float


def build(file: Path, *, prefix: int = 0, capacity: int = 0, profiles: Sequence[str] = ("prefill",), sm: str = "SM89") -> Built:
    """Build an engine, strongly typed, for a batch of one.

    Args:
        prefix: The longest prefix, in tokens; of decoders.
        capacity: Rows of the cache.
        profiles: "prefill" and "step", in the engine's order; of decoders.
        sm: A name of trt.ComputeCapability.

    Raises:
        AssertionError: TensorRT refused the graph; the message has its reason.
    """
    import tensorrt_rtx as trt

    errors: list[str] = []

    class ErrorLog(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                errors.append(message)

    log = ErrorLog()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser, start = trt.OnnxParser(network, log), time.perf_counter()
    parsed = parser.parse_from_file(str(file))
    assert parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)]
    parse_seconds = time.perf_counter() - start
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, sm), 0)
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    # Shape tensors would have to lie in host memory, and runners give addresses on the device.
    assert not any(tensor.is_shape_tensor for tensor in inputs), [t.name for t in inputs if t.is_shape_tensor]
    for name in profiles:
        profile = builder.create_optimization_profile()
        for tensor in inputs:
            shapes = _shapes(tensor, name, prefix, capacity)
            if shapes:
                profile.set_shape(tensor.name, *shapes)
        config.add_optimization_profile(profile)
    start = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    assert engine is not None, errors
    return Built(engine.nbytes, time.perf_counter() - start, parse_seconds)


def _shapes(tensor: Any, profile: str, prefix: int, capacity: int) -> list[list[int]] | None:
    """The smallest, the usual and the largest shape; None where no axis is free."""
    if -1 not in tuple(tensor.shape):
        return None
    shapes = []
    for tokens in (1, max(1, prefix - 8), max(1, prefix)) if profile == "prefill" else (1, 1, 1):
        past = 1 if profile == "prefill" else capacity
        sizes = {"batch": 1, "tokens": tokens, "past": past, "keys": past + tokens}
        shapes.append([sizes[tensor.get_dimension_name(i)] if d == -1 else d for i, d in enumerate(tensor.shape)])
    return shapes
