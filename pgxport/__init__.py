# SPDX-License-Identifier: Apache-2.0
"""Portable edge export and quantization for PaliGemma.

>>> import pgxport
>>> pgxport.__version__
'0.1.0.dev0'
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pgxport.bundle.reader import Bundle
    from pgxport.exporter.export import export
    from pgxport.exporter.prepare import ExportOptions
    from pgxport.runners.outputs import Answer
    from pgxport.runners.pipeline import Pipeline
    from pgxport.runners.runner import Runner

__version__ = "0.1.0.dev0"

_HOME = {
    "Answer": "pgxport.runners.outputs",
    "Bundle": "pgxport.bundle",
    "ExportOptions": "pgxport.exporter.prepare",
    "Pipeline": "pgxport.runners.pipeline",
    "Runner": "pgxport.runners.runner",
    "export": "pgxport.exporter.export",
}
__all__ = ["Answer", "Bundle", "ExportOptions", "Pipeline", "Runner", "__version__", "export"]


def __getattr__(name: str) -> Any:
    # Importing pgxport does no work: a name's module is loaded when the name is used.
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'pgxport' has no attribute {name!r}")
