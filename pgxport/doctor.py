# SPDX-License-Identifier: Apache-2.0
"""What this machine can do with pgx: packages, engines that really open a session, and what to install."""

import importlib.metadata
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from pgxport import __version__
from pgxport.errors import PgxError
from pgxport.runners.session import open_session

# y = x + x, float32 [1]: the smallest graph that shows that an engine runs.
PROBE = b'\x08\x08:5\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r'
# Extra -> what it needs, and what it is for.
EXTRAS = {
    "cpu": (("onnxruntime",), "run bundles on a CPU"),
    "export": (("onnx-ir", "onnx", "ml_dtypes", "safetensors", "huggingface_hub"), "run pgx export and pgx demo"),
    "reference": (("torch", "transformers"), "compare with transformers"),
}
SAME = {"onnxruntime": "onnxruntime-gpu"}  # either will do
BASE = ("numpy", "Pillow", "tokenizers", "pydantic", "click", "rich")


def examine() -> dict[str, Any]:
    """Plain data; nothing is installed or changed."""
    advice = []
    extras = {}
    for extra, (packages, purpose) in EXTRAS.items():
        versions = {p: _version(p) or _version(SAME.get(p, p)) for p in packages}
        complete = all(versions.values())
        extras[extra] = {"complete": complete, "for": purpose, "packages": versions}
        if not complete:
            advice.append(f'to {purpose}: pip install "pgxport[{extra}]"')
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        advice.insert(0, "onnxruntime and onnxruntime-gpu overwrite each other's files: pip uninstall both, then install one")
    return {
        "pgxport": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory(),
        "base": {p: _version(p) for p in BASE},
        "extras": extras,
        "engines": {"cpu": _try_engine("cpu")},
        "advice": advice,
    }


def render(found: dict[str, Any]) -> str:
    """The same, for people."""
    memory = f"{found['memory_bytes'] / 1e9:.1f} GB" if found["memory_bytes"] else "an unknown amount"
    lines = [
        f"pgx {found['pgxport']}, Python {found['python']}, {found['system']}, {found['cores']} cores, {memory} of memory",
        "base: " + ", ".join(f"{p} {v}" for p, v in found["base"].items()),
    ]
    for extra, state in found["extras"].items():
        there = ", ".join(f"{p} {v or 'MISSING'}" for p, v in state["packages"].items())
        lines.append(f"[{extra}] {'complete' if state['complete'] else 'not complete'}: {there}")
    for engine, result in found["engines"].items():
        lines.append(f"engine {engine}: {'ran a graph' if result['works'] else result['reason']}")
    ready = found["extras"]["export"]["complete"] and found["engines"]["cpu"]["works"]
    return "\n".join([*lines, *found["advice"], *(["try: pgx demo"] if ready else [])])


def _try_engine(engine: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "probe.onnx"
        graph.write_bytes(PROBE)
        try:
            session = open_session(engine, graph)
            result = session.run({"x": np.array([21.0], np.float32)})["y"]
            session.close()
        except PgxError as error:
            return {"works": False, "reason": str(error)}
    works = result.tolist() == [42.0]
    return {"works": works, "reason": "" if works else f"21 + 21 came out as {result.tolist()}"}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> int | None:
    if sys.platform == "linux":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
