# SPDX-License-Identifier: Apache-2.0
"""Answer prompts about images from a bundle: the one object that puts image, tokenizer, sessions and loop together."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from PIL import Image

from pgxport.bundle.reader import Bundle
from pgxport.errors import IntegrityError, UsageError
from pgxport.runners.image import load_image, pixel_values
from pgxport.runners.loop import Decoder, generate
from pgxport.runners.open_session import graph_files, open_session
from pgxport.runners.outputs import Answer, parse
from pgxport.runners.session import Session
from pgxport.runners.tokenizer import PromptTokenizer

Picture = str | Path | bytes | Image.Image | np.ndarray


@dataclass(frozen=True)
class _Prefix:
    embeds: np.ndarray  # [1, T, H]
    images: list[Image.Image]
    timings: dict[str, float]


class Runner:
    """A bundle, loaded into an engine.

    with Runner.from_pretrained("bundle") as runner:
        answer = runner.answer("cat.jpg", "detect cat")
        answer.draw(Image.open("cat.jpg")).save("out.png")
    """

    def __init__(self, bundle: Bundle, *, engine: str = "cpu", threads: int | None = None, low_memory: bool = False):
        self.bundle, self.manifest = bundle, bundle.manifest
        self._files = graph_files(engine, bundle)
        self._low_memory, self._closed = low_memory, False
        self._open = partial(open_session, engine, threads=threads, low_memory=low_memory)
        self._sessions: dict[str, Session] = {}
        start = time.perf_counter()
        try:
            for name in () if low_memory else self.manifest.graphs:
                self._session(name)
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.perf_counter() - start
        self._table = bundle.token_table()
        self._tokenizer = PromptTokenizer(bundle.path / "tokenizer.json", self.manifest.token_ids)

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, engine: str = "cpu", threads: int | None = None, low_memory: bool = False
    ) -> Self:
        """Open, verify and load a bundle.

        Args:
            low_memory: Hold either the vision encoder or the decoder, never both, and give working memory back; every answer loads
                them again.

        Raises:
            IntegrityError: the bundle is not what its manifest promises.
            EngineError: the engine is not available; no other is tried.
        """
        return cls(Bundle.open(path), engine=engine, threads=threads, low_memory=low_memory)

    def answer(self, image: Picture | Sequence[Picture], prompt: str, *, max_new_tokens: int | None = None) -> Answer:
        """Answer a prompt about an image, or about several in order.

        Boxes and masks are in pixels of the first image as it was given. Timings are in seconds, by stage.

        Raises:
            InputError: an image or the prompt cannot be used, or they are too long for the bundle.
            NumericError: the model's numbers are not finite.
        """
        prefix = self._prefix(image, prompt)
        timings, start = dict(prefix.timings), time.perf_counter()
        ids: list[int] = []
        limit = self._limit(prefix, max_new_tokens)
        for token in self._generate(prefix, limit):
            if not ids:
                timings["prefill"], start = time.perf_counter() - start, time.perf_counter()
            ids.append(token)
        timings["decode" if ids else "prefill"] = time.perf_counter() - start
        start = time.perf_counter()
        text = self._tokenizer.decode(ids)
        boxes, masks, warnings = parse(
            text, *prefix.images[0].size, self._decode_mask if "mask_decoder" in self.manifest.graphs else None
        )
        timings["post"] = time.perf_counter() - start
        return Answer(text, tuple(ids), boxes, masks, warnings, truncated=len(ids) == limit, timings=timings)

    def stream(self, image: Picture | Sequence[Picture], prompt: str, *, max_new_tokens: int | None = None) -> Iterator[str]:
        """The answer's text, piece by piece as it is generated; it may be left at any time."""
        prefix = self._prefix(image, prompt)
        return self._tokenizer.stream(self._generate(prefix, self._limit(prefix, max_new_tokens)))

    def close(self) -> None:
        """Free the engine's memory."""
        self._closed = True
        self._release(*self._sessions)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _session(self, name: str) -> Session:
        if name not in self._sessions:
            self._sessions[name] = self._open(self._files[name])
        return self._sessions[name]

    def _release(self, *names: str) -> None:
        for name in names:
            if name in self._sessions:
                self._sessions.pop(name).close()

    def _prefix(self, image: Picture | Sequence[Picture], prompt: str) -> _Prefix:
        if self._closed:
            raise UsageError("this runner was closed; make another with Runner.from_pretrained")
        m, timings = self.manifest, {}

        def lap(stage: str, start: float) -> float:
            timings[stage] = time.perf_counter() - start
            return time.perf_counter()

        now = time.perf_counter()
        pictures: Sequence[Any] = image if isinstance(image, Sequence) and not isinstance(image, str | bytes) else [image]
        if not pictures:
            raise UsageError("no image was given; PaliGemma answers about at least one")
        images = [load_image(p) for p in pictures]
        ids = self._tokenizer.prompt_ids(prompt, m.image_tokens, len(images), limit=m.context_length)
        pixels = np.stack([pixel_values(i, m.resolution) for i in images])
        now = lap("preprocess", now)
        if self._low_memory:
            self._release("decoder_step")
        hidden = self._session("vision_encoder").run({"pixel_values": pixels})
        now = lap("vision", now)
        features = self._session("projector").run(hidden)["image_features"]
        if self._low_memory:
            self._release("vision_encoder", "projector")
        text = self._embed(ids[len(images) * m.image_tokens :])
        embeds = np.concatenate([features.reshape(1, -1, features.shape[-1]), text], axis=1)
        lap("projector", now)
        return _Prefix(embeds, images, timings)

    def _limit(self, prefix: _Prefix, asked: int | None) -> int:
        """How many tokens the answer may have; the bundle's own limit gives way to a long prompt, the caller's does not."""
        if asked is not None and asked < 1:
            raise UsageError(f"max_new_tokens is {asked}; ask for at least 1")
        room = self.manifest.context_length - prefix.embeds.shape[1]
        return max(1, min(self.manifest.max_new_tokens, room)) if asked is None else asked

    def _generate(self, prefix: _Prefix, limit: int) -> Iterator[int]:
        # A cache for each answer: what an abandoned or failed one left behind is never seen by the next.
        decoder = Decoder(self._session("decoder_step"), self.manifest, prefix.embeds.shape[1] + limit)
        return generate(decoder, prefix.embeds, lambda token: self._embed([token]), eos=self.manifest.token_ids.eos, limit=limit)

    def _embed(self, ids: Sequence[int]) -> np.ndarray:
        """Token ids to scaled embeddings [1, T, H]; only their rows of the mapped table are read."""
        if max(ids) >= len(self._table):
            raise IntegrityError(
                f"tokenizer.json gives token {max(ids)}, and the token table has {len(self._table)} rows; export again"
            )
        return self._table.rows(ids)[None] * np.float32(self.manifest.token_table.scale)

    def _decode_mask(self, codes: np.ndarray) -> np.ndarray:
        return self._session("mask_decoder").run({"codes": codes})["mask"]
