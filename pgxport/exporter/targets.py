# SPDX-License-Identifier: Apache-2.0
"""What an engine can execute. Knows no layers; `lower.py` and `graph.py` read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pgxport.errors import UsageError


@dataclass(frozen=True)
class Target:
    """An engine on a kind of device, and the operator sets its graphs are written in."""

    name: str
    opsets: tuple[tuple[str, int], ...]
    ir_version: int
    computes: Mapping[str, str]  # the dtype a weight is stored in -> the dtype of activations it is multiplied with

    def compute(self, stored: str) -> str:
        """The dtype of activations for weights stored as `stored`.

        Raises:
            UsageError: the engine has no kernels for it.
        """
        if stored not in self.computes:
            can = ", ".join(self.computes)
            raise UsageError(f"target {self.name!r} does not compute with {stored} weights; it does with {can}")
        return self.computes[stored]


# GroupQueryAttention has had `causal` since ONNX Runtime 1.30: one node serves the bidirectional prefix and the decode step.
_ORT = (("", 23), ("com.microsoft", 1))
# On a CPU, ONNX Runtime has no bfloat16 products, and widens float16 ones to float32: so half precision is a way to store.
CPU = Target("cpu", _ORT, 11, MappingProxyType({"float32": "float32", "float16": "float32"}))
CUDA = Target("cuda", _ORT, 11, MappingProxyType({"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}))
TARGETS = {target.name: target for target in (CPU, CUDA)}
