# SPDX-License-Identifier: Apache-2.0
"""What this machine can do with pgx: packages, engines that really open a session, the board and its GPU, and what to install.

Looks only: nothing is installed, changed or run as root, and no other program is started.
"""

import ctypes
import importlib.metadata
import os
import platform
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pgxport import __version__
from pgxport.errors import EngineError, PgxError
from pgxport.machine import board, clocks
from pgxport.machine.driver import Driver, Load, ask_driver
from pgxport.runners.open_session import open_session
from pgxport.runners.tensorrt_library import MODULES, engine_key, load_engine, logger

# y = x + x, float32 [1]: the smallest graph that shows that an engine runs.
PROBE = b'\x08\x08:5\n\x0e\n\x01x\n\x01x\x12\x01y"\x03Add\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r'
# Extra -> what it needs, and what it is for. Those of a GPU are missed only where there is one.
EXTRAS = {
    "cpu": (("onnxruntime",), "run bundles on a CPU"),
    "gpu": (("onnxruntime-gpu",), "run bundles of target cuda"),
    "tensorrt": (("tensorrt", "cuda-python"), "compile and run bundles of target tensorrt"),
    "export": (("onnx-ir", "onnx", "ml_dtypes", "safetensors", "huggingface_hub"), "run pgx export and pgx demo"),
    "report": (("altair", "pyarrow", "pycocotools", "rouge-score", "sacrebleu", "vl-convert-python"), "write reports"),
    "cluster": (("ray",), "spread a search or a report over machines"),
    "reference": (("torch", "transformers"), "compare with transformers"),
}
OF_A_GPU = ("gpu", "tensorrt")
WANTED = ("cpu", "export", "report", "reference")  # without which a command ends with what to install
# A distribution -> others that serve as well.
SAME = {
    "onnxruntime": ("onnxruntime-gpu",),
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
    "cuda-python": ("cuda-bindings",),
}
RTX = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx")
CUDNN = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
BIG_BLOCK = 4 << 20  # what the kernel gives in one piece at most, where pages have 4 KiB
BASE = ("numpy", "Pillow", "tokenizers", "pydantic", "click", "rich")


def examine(root: Path = board.ROOT, *, load: Load = ctypes.CDLL) -> dict[str, Any]:
    """Plain data.

    Args:
        root: The tree that is read, for tests.
        load: How the driver's library is loaded, for tests.
    """
    machine = board.look(root)
    driver, no_driver = _driver(load)
    row = board.advise(machine, driver)
    extras: dict[str, Any] = {}
    for extra, (packages, purpose) in EXTRAS.items():
        versions = {p: _version(p, *SAME.get(p, ())) for p in packages}
        extras[extra] = {"complete": all(versions.values()), "for": purpose, "packages": versions}
    found: dict[str, Any] = {
        "pgxport": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": machine.memory.total if machine.memory else None,
        "machine": asdict(machine),
        "power_mode": clocks.power_mode(root),
        "clocks": asdict(clocks.look(root / "sys")),
        "gpus": [asdict(gpu) for gpu in driver.gpus] if driver else [],
        "driver": {"cuda": f"{driver.cuda[0]}.{driver.cuda[1]}" if driver else None, "reason": no_driver},
        "libraries": {
            "cuda": machine.cuda, "cudnn": _version(*CUDNN) or machine.cudnn,
            "tensorrt": extras["tensorrt"]["packages"]["tensorrt"] or machine.tensorrt, "tensorrt_rtx": _version(*RTX),
        },
        "base": {p: _version(p) for p in BASE},
        "extras": extras,
        "engines": {"cpu": _try_engine("cpu")},
        "here": asdict(row),
    }  # fmt: skip
    if _version("onnxruntime-gpu") or driver:
        found["engines"]["cuda"] = _try_engine("cuda")
    for engine, library in (("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")):
        if driver and found["libraries"][library]:
            found["engines"][engine] = _try_tensorrt(engine)
    found["advice"] = advice(found)
    return found


def advice(found: dict[str, Any]) -> list[str]:
    """What to do, most urgent first; nothing where nothing is missing."""
    said = []
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        said.append("onnxruntime and onnxruntime-gpu overwrite each other's files: pip uninstall both, then install one")
    for extra, state in found["extras"].items():
        if not state["complete"] and extra in WANTED:
            said.append(f'to {state["for"]}: pip install "pgxport[{extra}]"')
    if found["gpus"] or found["machine"]["l4t"]:
        if not any(found["extras"][extra]["complete"] for extra in OF_A_GPU):
            said += [f"for {found['here']['name']}: {command}" for command in found["here"]["commands"]]
        said += [f"for {found['here']['name']}: {found['here']['note']}"] if found["here"]["note"] else []
    return said + _manners(found)


def _manners(found: dict[str, Any]) -> list[str]:
    """What costs speed or memory, though everything works."""
    said = []
    if found["machine"]["vnni"] is False:
        said.append(
            "this processor has no VNNI: 8-bit products are slow on it, above all those of --precision w8a8; int4-fast suits it better"
        )
    if found["machine"]["l4t"]:
        if found["clocks"]["held"] is False:
            said.append("clocks move with the load; for measurements: sudo jetson_clocks")
        if found["power_mode"] and "MAXN" not in found["power_mode"]:
            said.append(
                f"power mode {found['power_mode']} is not the fastest; sudo nvpmodel -q --verbose lists them, -m N sets one"
            )
        memory = found["machine"]["memory"]
        if memory and memory["block"] is not None and memory["block"] < BIG_BLOCK:
            said.append(
                f"the largest free block of memory has {memory['block'] >> 10} KiB: it is in pieces; close programs, or restart "
                f"the board before pgx compile"
            )
        if memory and not memory["swap"]:
            said.append(
                "there is no swap on a disk, and zram takes the memory that is short; pgx compile may want some (docs/jetson.md)"
            )
        if found["clocks"]["hot"]:
            said.append(f"the board is being throttled: {', '.join(found['clocks']['hot'])}")
    return said


def render(found: dict[str, Any]) -> str:
    """The same, for people."""
    memory = f"{found['memory_bytes'] / 1e9:.1f} GB" if found["memory_bytes"] else "an unknown amount"
    lines = [
        f"pgx {found['pgxport']}, Python {found['python']}, {found['system']}, {found['cores']} cores, {memory} of memory",
        *_render_board(found),
        "base: " + ", ".join(f"{p} {v}" for p, v in found["base"].items()),
    ]
    for extra, state in found["extras"].items():
        there = ", ".join(f"{p} {v or 'MISSING'}" for p, v in state["packages"].items())
        lines.append(f"[{extra}] {'complete' if state['complete'] else 'not complete'}: {there}")
    for engine, result in found["engines"].items():
        did = "starts on the GPU" if engine in MODULES else "ran a graph"
        lines.append(f"engine {engine}: {did if result['works'] else result['reason']}")
    here = found["here"]
    if here["precisions"]:
        flags = f"--target tensorrt --trt {here['trt']}" if here["trt"] else "--target cpu"
        lines.append(f"bundles for here ({here['name']}): pgx export … {flags} --precision {', '.join(here['precisions'])}")
    ready = found["extras"]["export"]["complete"] and found["engines"]["cpu"]["works"]
    return "\n".join([*lines, *found["advice"], *(["try: pgx demo"] if ready else [])])


def _render_board(found: dict[str, Any]) -> list[str]:
    machine, lines = found["machine"], []
    if machine["model"]:
        release = f", JetPack {machine['jetpack'] or 'unknown'} (Jetson Linux {machine['l4t']})" if machine["l4t"] else ""
        plan = f"; pgx plan --board {machine['board']}" if machine["board"] else ""
        lines.append(f"board: {machine['model']}{release}{plan}")
    if found["power_mode"]:
        held = {True: "held (jetson_clocks)", False: "moving with the load", None: "not told"}[found["clocks"]["held"]]
        lines.append(f"power mode: {found['power_mode']}, clocks {held}")
    if (memory := machine["memory"]) and machine["model"]:
        block = f"{memory['block'] / 1e6:.1f} MB" if memory["block"] else "unknown"
        lines.append(
            f"memory: {memory['available'] / 1e9:.1f} GB available, largest free block {block}, swap {memory['swap'] / 1e9:.1f} GB, "
            f"zram {memory['zram'] / 1e9:.1f} GB"
        )
    for gpu in found["gpus"]:
        kind = "shares the system's memory" if gpu["integrated"] else f"{gpu['memory'] / 1e9:.1f} GB"
        lines.append(f"GPU: {gpu['name']}, compute capability {gpu['sm'][0]}.{gpu['sm'][1]}, {kind}")
    if found["driver"]["cuda"]:
        lines.append(f"NVIDIA driver {machine['driver'] or 'of unknown version'}, for CUDA up to {found['driver']['cuda']}")
    else:
        lines.append(f"NVIDIA: {found['driver']['reason']}")
    there = [f"{name} {version}" for name, version in found["libraries"].items() if version]
    return [*lines, f"libraries: {', '.join(there) or 'no CUDA, cuDNN or TensorRT found'}"]


def _driver(load: Load) -> tuple[Driver | None, str | None]:
    try:
        return ask_driver(load), None
    except EngineError as error:
        return None, str(error)


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


def _try_tensorrt(engine: str) -> dict[str, Any]:
    """Its module, the device and a runtime there. Not a graph: that would be built first, which takes memory that a board may lack."""
    try:
        trt = load_engine(engine)
        engine_key(engine, trt)
        log = logger(trt)
        try:
            trt.Runtime(log)
        except (TypeError, RuntimeError) as error:  # how its bindings say that there is none
            raise EngineError(f"{trt.__name__} {trt.__version__} does not start: {'; '.join(log.errors) or error}") from error
    except PgxError as error:
        return {"works": False, "reason": str(error)}
    return {"works": True, "reason": ""}


def _version(*packages: str) -> str | None:
    """Of the first that is installed."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
