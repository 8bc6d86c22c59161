# SPDX-License-Identifier: Apache-2.0
"""Answer prompts about images from a bundle: a `Pipeline` with words."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image

from pgxport.bundle.reader import Bundle
from pgxport.errors import UsageError
from pgxport.runners.image import load_image
from pgxport.runners.outputs import Answer
from pgxport.runners.pipeline import Picture, Pipeline


@dataclass(frozen=True)
class _Prefix:
    """The embeddings [1, T, H] of a prefix, the images of it, and the seconds that each stage took."""

    embeds: np.ndarray
    images: list[Image.Image]
    timings: dict[str, float]


class Runner(Pipeline):
    """A bundle, loaded into an engine, that answers prompts about images; the steps of an answer are its own methods.

    with Runner.from_pretrained("bundle") as runner:
        answer = runner.answer("cat.jpg", "detect cat")
        answer.draw(Image.open("cat.jpg")).save("out.png")
    """

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, engine: str = "cpu", threads: int | None = None, low_memory: bool = False
    ) -> Self:
        """Open, verify and load a bundle.

        Args:
            low_memory: Hold either the vision encoder or the decoder, never both, and give working memory back; every answer loads
                them again.

        Raises:
            IntegrityError: The bundle is not what its manifest promises.
            EngineError: The engine is not available; no other is tried.
        """
        return cls(Bundle.open(path), engine=engine, threads=threads, low_memory=low_memory)

    def answer(
        self, image: Picture | Sequence[Picture], prompt: str, *, max_new_tokens: int | None = None, special_tokens: bool = False
    ) -> Answer:
        """Answer a prompt about an image, or about several in order.

        Boxes and masks are in pixels of the first image as it was given. Timings are in seconds, by stage.

        Args:
            special_tokens: The fine-tune's own special tokens are tokens in the prompt, and not text.

        Raises:
            InputError: An image or the prompt cannot be used, or they are too long for the bundle.
            NumericError: The model's numbers are not finite.
        """
        prefix = self._prefix(image, prompt, special_tokens=special_tokens)
        timings, start = dict(prefix.timings), time.perf_counter()
        ids: list[int] = []
        limit = self.answer_limit(prefix.embeds, max_new_tokens)
        for token in self.generate(prefix.embeds, limit):
            if not ids:
                timings["prefill"], start = time.perf_counter() - start, time.perf_counter()
            ids.append(token)
        timings["decode" if ids else "prefill"] = time.perf_counter() - start
        start = time.perf_counter()
        answer = self.parse(ids, prefix.images[0].size)
        timings["post"] = time.perf_counter() - start
        return replace(answer, truncated=len(ids) == limit, timings=timings)

    def stream(
        self, image: Picture | Sequence[Picture], prompt: str, *, max_new_tokens: int | None = None, special_tokens: bool = False
    ) -> Iterator[str]:
        """The answer's text, piece by piece as it is generated; it may be left at any time."""
        embeds = self._prefix(image, prompt, special_tokens=special_tokens).embeds
        return self.pieces(self.generate(embeds, self.answer_limit(embeds, max_new_tokens)))

    def _prefix(self, image: Picture | Sequence[Picture], prompt: str, *, special_tokens: bool) -> _Prefix:
        start = time.perf_counter()
        pictures: Sequence[Any] = image if isinstance(image, Sequence) and not isinstance(image, str | bytes) else [image]
        if not pictures:
            raise UsageError("no image was given; PaliGemma answers about at least one")
        images = [load_image(picture) for picture in pictures]
        ids = self.prompt_ids(prompt, len(images), special_tokens=special_tokens)
        pixels = self.pixels(images)
        timings = {"preprocess": time.perf_counter() - start}
        features = self.encode_pixels(pixels, timings=timings)
        start = time.perf_counter()
        embeds = self.prefix(features, ids)
        timings["projector"] += time.perf_counter() - start
        return _Prefix(embeds, images, timings)
