# SPDX-License-Identifier: Apache-2.0
"""Compile a bundle for this machine: build its TensorRT engines, or pack its weights for the CPU."""

import signal
from dataclasses import replace

from pgxport.bundle.reader import Bundle
from pgxport.compile.options import Compiled, CompileOptions, Progress
from pgxport.errors import UsageError, choose
from pgxport.interrupts import signals_recorded
from pgxport.runners.session import ENGINES


@signals_recorded(signal.SIGINT)
def compile_bundle(options: CompileOptions, *, progress: Progress | None = None) -> Compiled:
    """Build the engines of a bundle, or pack its weights for this CPU, unless the cache has them.

    Raises:
        UsageError: an option names what does not exist, or the bundle is for another engine.
        EngineError: the engine or the device is missing, or refuses a graph.
        NumericError: memory would not suffice.
        DiskError: the cache cannot be written.
        IntegrityError: the cache's folder belongs to others too.
    """
    if options.engine is not None:
        choose("engine", options.engine, ENGINES)
    bundle = Bundle.open(options.bundle)
    target = bundle.manifest.target
    engine = options.engine or target
    if ENGINES.get(engine) != target or target == "cuda":
        fix = f"; run it with --engine {target}"
        if engine != target:
            fix = f" for {engine}; export it with --target {ENGINES[engine]}"
        raise UsageError(f"{bundle.path} was written for target {target!r}, which is not compiled{fix}")
    options = replace(options, engine=engine)
    if engine == "cpu":
        return _pack(bundle, options, progress)
    from pgxport.compile.tensorrt import build_engines

    return build_engines(bundle, options, progress)


def _pack(bundle: Bundle, options: CompileOptions, progress: Progress | None) -> Compiled:
    for flag in ("sm", "profiles", "workspace", "timing_cache"):
        if getattr(options, flag) is not None:
            raise UsageError(f"--{flag.replace('_', '-')} is of TensorRT, and {bundle.path} is for the CPU; leave it out")
    try:
        from pgxport.compile.cpu import pack_unless_current
    except ImportError as error:
        raise UsageError(
            f'packing weights needs the extras cpu and export: pip install "pgxport[cpu,export]" ({error})'
        ) from error
    return pack_unless_current(bundle, options.cache, progress=progress)
