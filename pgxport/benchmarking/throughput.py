# SPDX-License-Identifier: Apache-2.0
"""Measure a bundle at batch sizes: one picture and prompt repeated, so that all rows have one length. A module that is a worker.

python -m pgxport.benchmarking.throughput, then a line of JSON a request (worker.py)
"""

import os
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pgxport.benchmarking.measure import WARM_UP_STEPS, Answers, photo, random_ids
from pgxport.benchmarking.worker import Worker, serve
from pgxport.bundle.manifest import MANIFEST
from pgxport.bundle.reader import Bundle
from pgxport.errors import UsageError
from pgxport.files import file_sha256
from pgxport.machine.memory import forget_peak, process_memory
from pgxport.machine.nvml import find_nvml
from pgxport.runners.pipeline import Pipeline


@dataclass(frozen=True)
class Batches:
    """A repetition is `size` answers at a time, for each size, each as long as it is told to be."""

    sizes: tuple[int, ...] = (1, 2, 4)
    prompt_tokens: int = Answers.prompt_tokens
    new_tokens: int = Answers.new_tokens
    images: tuple[str, ...] = ()  # one, or none: a photo-sized JPEG of noise


def batch_worker(label: str, bundle: str, work: Batches, *, engine: str, threads: int | None) -> Worker:
    """A process that will measure a bundle."""
    request = {"bundle": bundle, "engine": engine, "threads": threads, "Batches": asdict(work)}
    return Worker(label, [sys.executable, "-m", "pgxport.benchmarking.throughput"], request)


def sizes(text: str) -> tuple[int, ...]:
    """Batch sizes, from the command line, the smallest first.

    Raises:
        UsageError: they are not whole numbers from 1 on.

    >>> sizes("4,1")
    (1, 4)
    """
    parts = [part.strip() for part in text.split(",")]
    if wrong := [part for part in parts if not (part.isascii() and part.isdecimal()) or not 1 <= int(part) <= 4096]:
        raise UsageError(f"{wrong[0]!r} is not a batch size; give whole numbers from 1 to 4096, as in 1,2,4")
    return tuple(sorted({int(part) for part in parts}))


class Batching:
    """A bundle that answers several at a time."""

    def __init__(self, request: dict[str, Any]):
        work, engine = Batches(**request["Batches"]), request["engine"]
        start = time.perf_counter()
        bundle = Bundle.open(request["bundle"])
        if bundle.manifest.cache.kind != "shared":
            raise UsageError(
                f"{bundle.path} was written for target {bundle.manifest.target}, whose cache holds one sequence; measure it without "
                f"--batch"
            )
        verified = time.perf_counter()
        self._pipeline = Pipeline(bundle, engine=engine, threads=request["threads"])
        self.opening = {"verify": verified - start, "load": time.perf_counter() - verified}
        self._work, self._nvml = work, find_nvml(engine)
        self._image = work.images[0] if work.images else photo()
        m = bundle.manifest
        self._ids, self._peaks = random_ids(m, 1, work.prompt_tokens), dict[str, dict[str, int | None]]()
        shown = m.model_dump(include={"name", "recipe", "target", "resolution", "image_tokens", "context_length"})
        self.facts = shown | {"bytes": bundle.nbytes, "manifest_sha256": file_sha256(bundle.path / MANIFEST)}

    def repeat(self, *, warm_up: bool) -> dict[str, float]:
        seconds: dict[str, float] = {}
        for size in self._work.sizes:
            forget_peak()
            seconds |= {f"{stage}/{size}": wall for stage, wall in self._answers(size, warm_up=warm_up).items()}
            held = process_memory(peak=True)
            vram = self._nvml.held_by(os.getpid()) if self._nvml else None
            # Of the first time, when the sizes rise: engines keep what they took for a larger one.
            self._peaks.setdefault(str(size), {"resident": held.resident if held else None, "vram": vram})
        return seconds

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The most that was resident, and what the GPU held, in bytes, by size."""
        return {"peaks": self._peaks}

    def _answers(self, size: int, *, warm_up: bool) -> dict[str, float]:
        pipeline, work = self._pipeline, self._work
        steps = min(WARM_UP_STEPS, work.new_tokens) if warm_up else work.new_tokens
        start = time.perf_counter()
        features = pipeline.encode([self._image] * size)
        embeds = np.concatenate([pipeline.prefix(row[None], self._ids) for row in features])
        decoder = pipeline.decoder(embeds.shape[1] + work.new_tokens, rows=size)
        tokens = decoder.feed_rows(embeds).argmax(-1)
        first = time.perf_counter()
        for _ in range(steps):
            tokens = decoder.feed_rows(pipeline.embed(tokens.tolist()).swapaxes(0, 1)).argmax(-1)
        end = time.perf_counter()
        return {"first_token": first - start, "step": (end - first) / steps, "answer": end - start}


if __name__ == "__main__":
    serve(Batching)
