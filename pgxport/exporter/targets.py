# SPDX-License-Identifier: Apache-2.0
"""What an engine can execute. Knows no layers; `lower.py` reads it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """An engine on a kind of device, and the operator sets its graphs are written in."""

    name: str
    opsets: tuple[tuple[str, int], ...]
    ir_version: int
    schemes: frozenset[str]  # the dtypes of weights it multiplies by


# GroupQueryAttention has had `causal` since ONNX Runtime 1.30: one node serves the bidirectional prefix and the decode step.
CPU = Target("cpu", (("", 23), ("com.microsoft", 1)), ir_version=11, schemes=frozenset({"float32"}))
TARGETS = {target.name: target for target in (CPU,)}
