# SPDX-License-Identifier: Apache-2.0
"""A session of TensorRT or TensorRT for RTX: a plan that `pgx compile` made here, on the first CUDA device.

An engine has one profile or two (prefill, step), each with a context and buffers of its own.
"""

import os
import weakref
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from pgxport.errors import EngineError
from pgxport.runners.cuda import CudaMemory, aligned
from pgxport.runners.tensorrt_library import LoadedPlan
from pgxport.runners.tensorrt_profile import (
    RECORDING_VARIABLE,
    ProfileContext,
    Results,
    TensorrtCache,
    nbytes,
    shape_of,
)


class TensorrtSession:
    """A plan, loaded.

    Args:
        plan: A plan of the engine cache; any other is refused.
        engine: "tensorrt" or "tensorrt-rtx".

    Raises:
        IntegrityError: pgx did not compile the plan here.
        EngineError: the engine or the device is missing, or will not load the plan.
        NumericError: the plan does not fit into the device's memory.
    """

    def __init__(self, plan: Path, engine: str):
        self._plan = plan
        self._loaded = LoadedPlan(plan, engine)
        self.cuda = self._loaded.cuda
        # TensorRT-RTX compiles kernels as shapes come up, and records graphs by itself after the last.
        wanted = os.environ.get(RECORDING_VARIABLE) != "0"
        self._recorded = wanted and engine == "tensorrt"
        self._profiles: list[ProfileContext] = []
        self._caches: list[CudaMemory] = []  # all of them
        self._spare: list[CudaMemory] = []  # those that no answer holds
        try:
            for i in range(self._loaded.engine.num_optimization_profiles):
                context = self._loaded.context(i, records_itself=wanted and engine == "tensorrt-rtx")
                self._profiles.append(ProfileContext(self._loaded, i, context))
        except BaseException:
            self.close()
            raise

    def run(self, feeds: Mapping[str, np.ndarray], cache: TensorrtCache | None = None) -> Results:
        """Run the graph; see `Session.run`.

        Raises:
            EngineError: the plan was not compiled for these shapes, or TensorRT or CUDA fails.
            NumericError: there is not enough memory on the device.
        """
        loaded = self._loaded
        loaded.runs += 1
        if not isinstance(feeds, Results):  # TensorRT leaves out an input that no node reads
            feeds = {name: feeds[name] for name in feeds if name in loaded.inputs}
        profile = self._profile(feeds, cache)
        try:
            profile.bind(feeds, cache)
            profile.execute(record=self._recorded and cache is not None and len(feeds["positions"]) == 1)
            if cache is not None and not loaded.in_place:
                profile.append_rows(cache, first=int(feeds["positions"][0]), tokens=len(feeds["positions"]))
            loaded.synchronize()
            loaded.log.check()
        except BaseException:
            profile.unbind()
            raise
        return Results(loaded, profile)

    def new_cache(self, shapes: Mapping[str, tuple[int, ...]]) -> TensorrtCache:
        """A KV cache of zeros, in memory that an earlier answer left where there is some."""
        size = sum(aligned(nbytes(shape, self._loaded.inputs[name])) for name, shape in shapes.items())
        if self._spare:
            memory = self._spare.pop()
        else:
            self._caches.append(memory := CudaMemory(self.cuda))
        try:
            if size > memory.nbytes:
                for profile in self._profiles:  # a graph that recorded the old address must not be replayed
                    profile.unbind()
                memory.grow(size)
            self.cuda.call("cudaMemsetAsync", memory.address, 0, size, self._loaded.stream)
            self._loaded.synchronize()
        except BaseException:
            self._spare.append(memory)
            raise
        cache = TensorrtCache(self._loaded, memory, shapes)
        weakref.finalize(cache, self._spare.append, memory)  # for the next answer
        return cache

    def close(self) -> None:
        """Free everything on the device, this session's caches too."""
        profiles, caches = self._profiles, self._caches
        self._profiles, self._caches, self._spare = [], [], []
        with ExitStack() as last:  # all of it is tried, whatever fails
            last.callback(self._loaded.free)
            for memory in caches:
                last.callback(memory.free)
            for profile in profiles:
                last.callback(profile.free)

    def _profile(self, feeds: Mapping[str, np.ndarray], cache: TensorrtCache | None) -> ProfileContext:
        """The narrowest profile that takes these shapes, which is the last that does."""
        for profile in reversed(self._profiles):
            if profile.takes(feeds, cache):
                return profile
        shapes = ", ".join(f"{name} {list(shape_of(feeds, name))}" for name in feeds)
        raise EngineError(f"{self._plan} was not compiled for {shapes}; run `pgx compile` on the bundle again")
