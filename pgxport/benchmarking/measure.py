# SPDX-License-Identifier: Apache-2.0
"""Measure a bundle stage by stage: whole answers, or steps of its decoder alone. Run as a module, it is a worker that does.

python -m pgxport.benchmarking.measure, then a line of JSON a request (worker.py)
"""

import io
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from pgxport.benchmarking.worker import Subject, Worker, serve
from pgxport.bundle.manifest import MANIFEST, Manifest
from pgxport.bundle.reader import Bundle
from pgxport.errors import UsageError
from pgxport.files import file_sha256
from pgxport.runners.image import load_image
from pgxport.runners.loop import Decoder, generate
from pgxport.runners.open_session import graph_files, open_session
from pgxport.runners.outputs import parse
from pgxport.runners.pipeline import Pipeline
from pgxport.runners.session import Arrays, Session

WARM_UP_STEPS = 2
NEVER = -1  # an eos that no argmax can be
POOL = 1 << 20


@dataclass(frozen=True)
class Answers:
    """A repetition is one answer, as long as it is told to be."""

    prompt_tokens: int = 16  # bos and newline included
    new_tokens: int = 64  # decode steps, after the prefill's token
    images: tuple[str, ...] = ()  # none: a photo-sized JPEG of noise


@dataclass(frozen=True)
class Steps:
    """A repetition is `steps` decode steps after each past, and a prefill of each prefix; on random numbers, without the way there."""

    pasts: tuple[int, ...] = ()
    prefixes: tuple[int, ...] = ()
    steps: int = 64


Work = Answers | Steps


def worker(label: str, bundle: str, work: Work, *, engine: str = "cpu", threads: int | None = None) -> Worker:
    """A process that will measure a bundle."""
    request = {"bundle": bundle, "engine": engine, "threads": threads, type(work).__name__: asdict(work)}
    return Worker(label, [sys.executable, "-m", "pgxport.benchmarking.measure"], request)


def lengths(text: str | None) -> tuple[int, ...]:
    """Lengths in tokens, from the command line.

    Raises:
        UsageError: they are not whole numbers from 1 on.

    >>> lengths("1100,4200")
    (1100, 4200)
    """
    parts = text.split(",") if text else []
    if wrong := [part for part in parts if not part.strip().isdecimal() or int(part) < 1]:
        raise UsageError(f"{wrong[0]!r} is not a length in tokens; give whole numbers, as in 1100,4200")
    return tuple(map(int, parts))


def open_bundle(request: dict[str, Any]) -> Subject:
    """What `worker` asked for.

    Raises:
        PgxError: the bundle is not sound, cannot be loaded, or is too short for the work.
    """
    start = time.perf_counter()
    bundle = Bundle.open(request["bundle"])
    opening = {"verify": time.perf_counter() - start}
    if "Steps" in request:
        return _DecoderAlone(bundle, opening, Steps(**request["Steps"]), request["engine"], request["threads"])
    return _Answering(bundle, opening, Answers(**request["Answers"]), request["engine"], request["threads"])


class _Answering:
    def __init__(self, bundle: Bundle, opening: dict[str, float], work: Answers, engine: str, threads: int | None):
        start = time.perf_counter()
        self._pipeline = Pipeline(bundle, engine=engine, threads=threads)
        self.opening = opening | {"load": time.perf_counter() - start}
        self._session, self._work = _Timed(self._pipeline.session("decoder_step")), work
        self._images: list[str | bytes] = [*work.images] or [photo()]
        self._ids = random_ids(bundle.manifest, len(self._images), work.prompt_tokens)
        self._capacity = len(self._ids) + work.new_tokens
        self.facts = _facts(bundle, Decoder(self._session, bundle.manifest, self._capacity))

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
        for token in generate(decoder, embeds, lambda t: pipeline.embed([t]), eos=NEVER, limit=steps + 1):
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


class _DecoderAlone:
    def __init__(self, bundle: Bundle, opening: dict[str, float], work: Steps, engine: str, threads: int | None):
        manifest = bundle.manifest
        pasts = work.pasts or (() if work.prefixes else (manifest.image_tokens + Answers.prompt_tokens,))
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
        self._decoder = Decoder(self._session, manifest, longest)
        self._random, self._width = np.random.default_rng(0), manifest.token_table.shape[1]
        self.facts = _facts(bundle, self._decoder) | {"pasts": pasts, "prefixes": work.prefixes}
        _fill(self._decoder.cache.arrays, self._random)

    def repeat(self, *, warm_up: bool) -> dict[str, float]:
        seconds = {}
        for prefix in self._work.prefixes:
            self._decoder.length = 0
            seconds[f"prefill@{prefix}"] = self._feed(prefix)
        steps = min(WARM_UP_STEPS, self._work.steps) if warm_up else self._work.steps
        for past in self._pasts:
            wall, self._session.seconds = 0.0, 0.0
            for _ in range(steps):
                self._decoder.length = past  # every step is at the same place
                wall += self._feed(1)
            seconds |= {f"step@{past}": wall / steps, f"overhead@{past}": (wall - self._session.seconds) / steps}
        return seconds

    def _feed(self, tokens: int) -> float:
        embeds = self._random.standard_normal((1, tokens, self._width), np.float32)
        start = time.perf_counter()
        self._decoder.next_token(embeds)
        return time.perf_counter() - start


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


def _facts(bundle: Bundle, decoder: Decoder) -> dict[str, Any]:
    m = bundle.manifest
    shown = m.model_dump(include={"name", "recipe", "target", "resolution", "image_tokens", "context_length"})
    return shown | {
        "bytes": bundle.nbytes, "manifest_sha256": file_sha256(bundle.path / MANIFEST), "layers": m.cache.layers,
        "cache_bytes": decoder.cache.nbytes,
    }  # fmt: skip


def random_ids(manifest: Manifest, images: int, prompt_tokens: int) -> list[int]:
    """Ids of a prefix whose prompt is as long as was asked for, whatever the tokenizer makes of words."""
    prompt = np.random.default_rng(0).integers(manifest.token_table.shape[0], size=prompt_tokens)
    return [manifest.token_ids.image] * (images * manifest.image_tokens) + prompt.tolist()


def photo() -> bytes:
    """A JPEG of a camera's proportions, so that decoding and resizing cost what they do."""
    noise = np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((1024, 768), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def _fill(arrays: Arrays, random: np.random.Generator) -> None:
    """Finite random numbers in place: zeros would be kinder to an engine than a cache is, and untouched pages cost no memory."""
    normal = random.standard_normal(POOL, np.float32)
    for array in arrays.values():
        pool = (normal if array.dtype.kind == "f" else 32 * normal).clip(-127, 127).astype(array.dtype)
        flat = array.reshape(-1)
        for at in range(0, flat.size, POOL):
            flat[at : at + POOL] = pool[: flat.size - at]


if __name__ == "__main__":
    serve(open_bundle)
