# SPDX-License-Identifier: Apache-2.0
"""Measure a bundle by stages: whole answers, steps of its decoder alone, or batches. As a module, a worker.

python -m pgxport.benchmarking.measure, then a line of JSON for each request (worker.py)
"""

import io
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from pgxport.benchmarking.worker import Worker, serve
from pgxport.bundle.manifest import MANIFEST, Manifest
from pgxport.bundle.reader import Bundle
from pgxport.errors import UsageError
from pgxport.files import file_sha256
from pgxport.machine.memory import forget_peak, process_memory
from pgxport.machine.nvml import find_nvml
from pgxport.runners.image import load_image
from pgxport.runners.loop import Decoder, generate
from pgxport.runners.open_session import graph_files, open_session
from pgxport.runners.outputs import parse
from pgxport.runners.pipeline import Pipeline
from pgxport.runners.session import Arrays, Session

WARM_UP_STEPS = 2
POOL = 1 << 20


@dataclass(frozen=True)
class WholeAnswers:
    """A repetition is one answer of a fixed length.

    Attributes:
        prompt_tokens: Length of the prompt, bos and newline included.
        new_tokens: Decode steps, after the token of the prefill.
        images: Files; none: a photo-sized JPEG of noise.
    """

    kind: ClassVar = "Answers"  # in requests and in the JSON of a bench
    prompt_tokens: int = 16
    new_tokens: int = 64
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Steps:
    """A repetition is `steps` decode steps after each past and a prefill of each prefix, on random data."""

    kind: ClassVar = "Steps"
    pasts: tuple[int, ...] = ()
    prefixes: tuple[int, ...] = ()
    steps: int = 64


@dataclass(frozen=True)
class Batches:
    """A repetition is so many answers at a time, for each size.

    One image and prompt is repeated, so that all rows have one length.

    Attributes:
        sizes: Answers at a time; engines keep what they took for a larger size, so the smallest comes first.
        images: One file, or none: a photo-sized JPEG of noise.
    """

    kind: ClassVar = "Batches"
    sizes: tuple[int, ...] = (1, 2, 4)
    prompt_tokens: int = WholeAnswers.prompt_tokens
    new_tokens: int = WholeAnswers.new_tokens
    images: tuple[str, ...] = ()


Work = WholeAnswers | Steps | Batches


def worker(label: str, bundle: str, work: Work, *, engine: str = "cpu", threads: int | None = None) -> Worker:
    """A process that will measure a bundle."""
    request = {"bundle": bundle, "engine": engine, "threads": threads, work.kind: asdict(work)}
    return Worker(label, [sys.executable, "-m", "pgxport.benchmarking.measure"], request)


def integers(text: str, what: str, most: int) -> tuple[int, ...]:
    """The integers of a list of the command line, in its order.

    Args:
        what: What each is, for the message, as "a length in tokens".

    Raises:
        UsageError: one is no integer from 1 to `most`.

    >>> integers("1100, 4200", "a length in tokens", 1 << 20)
    (1100, 4200)
    """
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if not (part.isascii() and part.isdecimal() and 1 <= int(part) <= most):
            raise UsageError(f"{part!r} is not {what}; give integers from 1 to {most}, as in 1,2,4")
    return tuple(map(int, parts))


def lengths(text: str | None) -> tuple[int, ...]:
    """Lengths in tokens, as in "1100,4200"; none of an empty text.

    Raises:
        UsageError: one is no length.
    """
    return integers(text, "a length in tokens", 1 << 30) if text else ()


def batch_sizes(text: str) -> tuple[int, ...]:
    """Batch sizes, the smallest first.

    Raises:
        UsageError: one is no size from 1 to 4096.

    >>> batch_sizes("4,1")
    (1, 4)
    """
    return tuple(sorted(set(integers(text, "a batch size", 4096))))


def open_bundle(request: dict[str, Any]) -> "Answering | Stepping | Batching":
    """The bundle and the work of a request of `worker`.

    Raises:
        PgxError: the bundle is not sound, cannot be loaded, or is too short for the work.
    """
    start = time.perf_counter()
    bundle = Bundle.open(request["bundle"])
    opening = {"verify": time.perf_counter() - start}
    engine, threads = request["engine"], request["threads"]
    if Steps.kind in request:
        return Stepping(bundle, opening, Steps(**request[Steps.kind]), engine, threads)
    if Batches.kind in request:
        return Batching(bundle, opening, Batches(**request[Batches.kind]), engine, threads)
    return Answering(bundle, opening, WholeAnswers(**request[WholeAnswers.kind]), engine, threads)


class Answering:
    """A bundle that gives whole answers, one after the other."""

    def __init__(self, bundle: Bundle, opening: dict[str, float], work: WholeAnswers, engine: str, threads: int | None):
        start = time.perf_counter()
        self._pipeline = Pipeline(bundle, engine=engine, threads=threads)
        self.opening = opening | {"load": time.perf_counter() - start}
        self._session, self._work = _Timed(self._pipeline.session("decoder_step")), work
        self._images: list[str | bytes] = [*work.images] or [photo()]
        self._ids = random_ids(bundle.manifest, len(self._images), work.prompt_tokens)
        self._capacity = len(self._ids) + work.new_tokens
        self.facts = _facts(bundle) | _cache_facts(Decoder(self._session, bundle.manifest, self._capacity), bundle)

    def repeat(self, *, warm_up: bool) -> dict[str, float]:
        pipeline, start = self._pipeline, time.perf_counter()
        images = [load_image(image) for image in self._images]
        pipeline.prompt_ids("caption en", len(images))
        pixels = pipeline.pixels(images)
        timings = {"preprocess": time.perf_counter() - start}
        features = pipeline.encode_pixels(pixels, timings=timings)
        embeds = pipeline.prefix(features, self._ids)

        steps = min(WARM_UP_STEPS, self._work.new_tokens) if warm_up else self._work.new_tokens
        ids, walls, engine = [], [], []
        start, self._session.seconds = time.perf_counter(), 0.0
        decoder = Decoder(self._session, pipeline.manifest, self._capacity)
        for token in generate(decoder, embeds, lambda t: pipeline.embed([t]), stop=(), limit=steps + 1):
            now = time.perf_counter()
            ids.append(token)
            walls.append(now - start)
            engine.append(self._session.seconds)
            start, self._session.seconds = time.perf_counter(), 0.0
        prefill, *each = walls
        assert len(each) == steps, f"Bug: {len(each)} steps instead of {steps}"

        start = time.perf_counter()
        parse(pipeline.decode(ids), *images[0].size)
        post = time.perf_counter() - start
        before = timings | {"prefill": prefill}
        first = sum(before.values())
        return before | {
            "first_token": first, "step": sum(each) / steps, "overhead": (sum(each) - sum(engine[1:])) / steps, "post": post,
            "answer": first + sum(each) + post,
        }  # fmt: skip


class Stepping:
    """A bundle's decoder alone, on random numbers."""

    def __init__(self, bundle: Bundle, opening: dict[str, float], work: Steps, engine: str, threads: int | None):
        manifest = bundle.manifest
        pasts = work.pasts or (() if work.prefixes else (manifest.image_tokens + WholeAnswers.prompt_tokens,))
        longest = max([past + 1 for past in pasts] + list(work.prefixes))
        if longest > manifest.context_length:
            raise UsageError(
                f"{bundle.path} has room for {manifest.context_length} tokens, and {longest} were asked for (--past, and the new "
                f"token); choose a shorter past, or export with a larger --context"
            )
        start = time.perf_counter()
        self._session = _Timed(open_session(engine, graph_files(engine, bundle)["decoder_step"], threads=threads))
        self.opening = opening | {"load": time.perf_counter() - start}
        self._pasts, self._work = pasts, work
        self.decoder = Decoder(self._session, manifest, longest)
        self._random, self._width = np.random.default_rng(0), manifest.token_table.shape[1]
        self.facts = _facts(bundle) | _cache_facts(self.decoder, bundle) | {"pasts": pasts, "prefixes": work.prefixes}
        fill(self.decoder.cache.arrays, self._random)

    def repeat(self, *, warm_up: bool) -> dict[str, float]:
        seconds = {}
        for prefix in self._work.prefixes:
            self.decoder.length = 0
            seconds[f"prefill@{prefix}"] = self._feed(prefix)
        steps = min(WARM_UP_STEPS, self._work.steps) if warm_up else self._work.steps
        for past in self._pasts:
            wall, self._session.seconds = 0.0, 0.0
            for _ in range(steps):
                self.decoder.length = past  # every step is at the same place
                wall += self._feed(1)
            seconds |= {f"step@{past}": wall / steps, f"overhead@{past}": (wall - self._session.seconds) / steps}
        return seconds

    def _feed(self, tokens: int) -> float:
        embeds = self._random.standard_normal((1, tokens, self._width), np.float32)
        start = time.perf_counter()
        self.decoder.next_token(embeds)
        return time.perf_counter() - start


class Batching:
    """A bundle that gives several answers at a time."""

    def __init__(self, bundle: Bundle, opening: dict[str, float], work: Batches, engine: str, threads: int | None):
        if bundle.manifest.cache.kind != "shared":
            raise UsageError(
                f"{bundle.path} was written for target {bundle.manifest.target}, whose cache holds one sequence; measure it without "
                f"--batch"
            )
        start = time.perf_counter()
        self._pipeline = Pipeline(bundle, engine=engine, threads=threads)
        self.opening = opening | {"load": time.perf_counter() - start}
        self._work, self._nvml = work, find_nvml(engine)
        self._image = work.images[0] if work.images else photo()
        self._ids, self._peaks = random_ids(bundle.manifest, 1, work.prompt_tokens), dict[str, dict[str, int | None]]()
        self.facts = _facts(bundle)

    def repeat(self, *, warm_up: bool) -> dict[str, float]:
        seconds: dict[str, float] = {}
        for size in self._work.sizes:
            forget_peak()
            seconds |= {f"{stage}/{size}": wall for stage, wall in self._answers(size, warm_up=warm_up).items()}
            memory = process_memory(peak=True)
            vram = self._nvml.held_by(os.getpid()) if self._nvml else None
            # Of the first time, when the sizes rise: engines keep what they took for a larger one.
            self._peaks.setdefault(str(size), {"resident": memory.resident if memory else None, "vram": vram})
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


class _Timed:
    """A session that adds up the seconds inside its `run`; the rest of a step is Python's."""

    def __init__(self, session: Session):
        self._session, self.seconds = session, 0.0

    def run(self, feeds: Mapping[str, np.ndarray], cache: Any = None) -> Mapping[str, np.ndarray]:
        start = time.perf_counter()
        try:
            return self._session.run(feeds, cache)
        finally:
            self.seconds += time.perf_counter() - start

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def _facts(bundle: Bundle) -> dict[str, Any]:
    m = bundle.manifest
    named = m.model_dump(include={"name", "recipe", "target", "resolution", "image_tokens", "context_length"})
    return named | {"bytes": bundle.nbytes, "manifest_sha256": file_sha256(bundle.path / MANIFEST)}


def _cache_facts(decoder: Decoder, bundle: Bundle) -> dict[str, Any]:
    return {"layers": bundle.manifest.cache.layers, "cache_bytes": decoder.cache.nbytes}


def random_ids(manifest: Manifest, images: int, prompt_tokens: int) -> list[int]:
    """Ids of a prefix: those of its images, then `prompt_tokens` random ones."""
    prompt = np.random.default_rng(0).integers(manifest.token_table.shape[0], size=prompt_tokens)
    return [manifest.token_ids.image] * (images * manifest.image_tokens) + prompt.tolist()


def photo() -> bytes:
    """A JPEG of a camera's proportions, so that decoding and resizing cost what they do."""
    noise = np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((1024, 768), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def fill(arrays: Arrays, random: np.random.Generator) -> None:
    """Fill arrays with finite random numbers: zeros may be faster, and untouched pages take no memory."""
    normal = random.standard_normal(POOL, np.float32)
    for array in arrays.values():
        pool = (normal if array.dtype.kind == "f" else 32 * normal).clip(-127, 127).astype(array.dtype)
        flat = array.reshape(-1)
        for at in range(0, flat.size, POOL):
            flat[at : at + POOL] = pool[: flat.size - at]


if __name__ == "__main__":
    serve(open_bundle)
