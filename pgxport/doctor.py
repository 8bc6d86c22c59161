# SPDX-License-Identifier: Apache-2.0
"""Examine this machine for pgx: packages, engines that open a session, the board, its GPU, what to install.

Nothing is installed, changed or run as root, and no other program is started.
"""

import ctypes
import importlib.metadata
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pgxport import __version__
from pgxport.errors import EngineError, PgxError
from pgxport.machine import board, clocks
from pgxport.machine.driver import Driver, Load, ask_driver
from pgxport.runners.open_session import why_not_here
from pgxport.runners.tensorrt_library import MODULES, engine_key, load_engine, logger
from pgxport.text import size

# Extra -> its packages, and its purpose. Those of a GPU are missed only where there is one.
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
WANTED = ("cpu", "export", "report", "reference")  # a command that lacks one ends with what to install
# A distribution -> others that serve as well.
ALIASES = {
    "onnxruntime": ("onnxruntime-gpu",),
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu13-bindings", "tensorrt-cu12-bindings"),
    "cuda-python": ("cuda-bindings",),
}
RTX = ("tensorrt-rtx-cu13", "tensorrt-rtx-cu12", "tensorrt-rtx")
CUDNN = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
BIG_BLOCK = 4 << 20  # bytes: the largest block that the kernel gives, where pages have 4 KiB
BASE = ("numpy", "Pillow", "tokenizers", "pydantic", "click", "rich")


def examine(root: Path = board.ROOT, *, load: Load = ctypes.CDLL) -> dict[str, Any]:
    """Examine this machine, and return what was found as plain data.

    Args:
        root: The tree that is read, for tests.
        load: How the driver's library is loaded, for tests.
    """
    machine = board.look(root)
    driver, no_driver = _driver(load)
    row = board.advise(machine, driver)
    extras: dict[str, Any] = {}
    for extra, (packages, purpose) in EXTRAS.items():
        versions = {p: _version(p, *ALIASES.get(p, ())) for p in packages}
        extras[extra] = {"complete": all(versions.values()), "for": purpose, "packages": versions}
    facts: dict[str, Any] = {
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
        "engines": {},
        "here": asdict(row),
    }  # fmt: skip
    facts["engines"] = _try_engines(facts["libraries"], gpu=driver is not None)
    facts["advice"] = advice(facts)
    return facts


def _try_engines(libraries: dict[str, str | None], *, gpu: bool) -> dict[str, dict[str, Any]]:
    """Whether each engine that may work here does, and the reason where it does not."""
    engines = {"cpu": _try_engine("cpu")}
    if _version("onnxruntime-gpu") or gpu:
        engines["cuda"] = _try_engine("cuda")
    for engine, library in (("tensorrt", "tensorrt"), ("tensorrt-rtx", "tensorrt_rtx")):
        if gpu and libraries[library]:
            engines[engine] = _try_tensorrt(engine)
    return engines


def advice(facts: dict[str, Any]) -> list[str]:
    """What to install or change, most urgent first; nothing where nothing is missing."""
    lines = []
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        lines.append("onnxruntime and onnxruntime-gpu overwrite each other's files: pip uninstall both, then install one")
    for extra, state in facts["extras"].items():
        if not state["complete"] and extra in WANTED:
            lines.append(f'to {state["for"]}: pip install "pgxport[{extra}]"')
    if facts["gpus"] or facts["machine"]["l4t"]:
        if not any(facts["extras"][extra]["complete"] for extra in OF_A_GPU):
            lines += [f"for {facts['here']['name']}: {command}" for command in facts["here"]["commands"]]
        lines += [f"for {facts['here']['name']}: {facts['here']['note']}"] if facts["here"]["note"] else []
    return lines + _slow(facts)


def _slow(facts: dict[str, Any]) -> list[str]:
    """What costs speed or memory, though everything works, and how to change it."""
    lines = []
    if facts["machine"]["vnni"] is False:
        lines.append(
            "this processor has no VNNI: 8-bit products are slow on it, above all those of --precision w8a8; int4-fast suits it better"
        )
    if facts["machine"]["l4t"]:
        if facts["clocks"]["held"] is False:
            lines.append("clocks move with the load; for measurements: sudo jetson_clocks")
        if facts["power_mode"] and "MAXN" not in facts["power_mode"]:
            lines.append(
                f"power mode {facts['power_mode']} is not the fastest; sudo nvpmodel -q --verbose lists them, -m N sets one"
            )
        memory = facts["machine"]["memory"]
        if memory and memory["block"] is not None and memory["block"] < BIG_BLOCK:
            lines.append(
                f"the largest free block of memory has {memory['block'] >> 10} KiB: it is in pieces; close programs, or restart "
                f"the board before pgx compile"
            )
        if memory and not memory["swap"]:
            lines.append(
                "there is no swap on a disk, and zram takes the memory that is short; pgx compile may want some (docs/jetson.md)"
            )
        if facts["clocks"]["hot"]:
            lines.append(f"the board is being throttled: {', '.join(facts['clocks']['hot'])}")
    return lines


def render(facts: dict[str, Any]) -> str:
    """What examine() returns, as lines for people."""
    memory = size(facts["memory_bytes"]) if facts["memory_bytes"] else "an unknown amount"
    lines = [
        f"pgx {facts['pgxport']}, Python {facts['python']}, {facts['system']}, {facts['cores']} cores, {memory} of memory",
        *_render_board(facts),
        "base: " + ", ".join(f"{p} {v}" for p, v in facts["base"].items()),
    ]
    for extra, state in facts["extras"].items():
        packages = ", ".join(f"{p} {v or 'MISSING'}" for p, v in state["packages"].items())
        lines.append(f"[{extra}] {'complete' if state['complete'] else 'not complete'}: {packages}")
    for engine, result in facts["engines"].items():
        works = "starts on the GPU" if engine in MODULES else "ran a graph"
        lines.append(f"engine {engine}: {works if result['works'] else result['reason']}")
    here = facts["here"]
    if here["precisions"]:
        flags = f"--target tensorrt --trt {here['trt']}" if here["trt"] else "--target cpu"
        lines.append(f"bundles for here ({here['name']}): pgx export … {flags} --precision {', '.join(here['precisions'])}")
    ready = facts["extras"]["export"]["complete"] and facts["engines"]["cpu"]["works"]
    return "\n".join([*lines, *facts["advice"], *(["try: pgx demo"] if ready else [])])


def _render_board(facts: dict[str, Any]) -> list[str]:
    machine, lines = facts["machine"], []
    if machine["model"]:
        release = f", JetPack {machine['jetpack'] or 'unknown'} (Jetson Linux {machine['l4t']})" if machine["l4t"] else ""
        plan = f"; pgx plan --board {machine['board']}" if machine["board"] else ""
        lines.append(f"board: {machine['model']}{release}{plan}")
    if facts["power_mode"]:
        held = {True: "held (jetson_clocks)", False: "moving with the load", None: "unknown"}[facts["clocks"]["held"]]
        lines.append(f"power mode: {facts['power_mode']}, clocks {held}")
    if (memory := machine["memory"]) and machine["model"]:
        block = size(memory["block"]) if memory["block"] else "unknown"
        lines.append(
            f"memory: {size(memory['available'])} available, largest free block {block}, swap {size(memory['swap'])}, "
            f"zram {size(memory['zram'])}"
        )
    for gpu in facts["gpus"]:
        kind = "shares the system's memory" if gpu["integrated"] else size(gpu["memory"])
        lines.append(f"GPU: {gpu['name']}, compute capability {gpu['sm'][0]}.{gpu['sm'][1]}, {kind}")
    if facts["driver"]["cuda"]:
        lines.append(f"NVIDIA driver {machine['driver'] or 'of unknown version'}, for CUDA up to {facts['driver']['cuda']}")
    else:
        lines.append(f"NVIDIA: {facts['driver']['reason']}")
    libraries = [f"{name} {version}" for name, version in facts["libraries"].items() if version]
    return [*lines, f"libraries: {', '.join(libraries) or 'no CUDA, cuDNN or TensorRT found'}"]


def _driver(load: Load) -> tuple[Driver | None, str | None]:
    """NVIDIA's driver, or the reason why there is none."""
    try:
        return ask_driver(load), None
    except EngineError as error:
        return None, str(error)


def _try_engine(engine: str) -> dict[str, Any]:
    """Whether the engine computes a graph, and the reason where it does not."""
    reason = why_not_here(engine)
    return {"works": reason is None, "reason": reason or ""}


def _try_tensorrt(engine: str) -> dict[str, Any]:
    """Whether TensorRT starts on the device, and the reason where it does not.

    No graph is built: that takes memory that a board may lack.
    """
    try:
        trt = load_engine(engine)
        engine_key(engine, trt)
        log = logger(trt)
        try:
            trt.Runtime(log)
        except (TypeError, RuntimeError) as error:  # what its bindings raise where there is none
            raise EngineError(f"{trt.__name__} {trt.__version__} does not start: {'; '.join(log.errors) or error}") from error
    except PgxError as error:
        return {"works": False, "reason": str(error)}
    return {"works": True, "reason": ""}


def _version(*packages: str) -> str | None:
    """The version of the first package that is installed."""
    for package in packages:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
