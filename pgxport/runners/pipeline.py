# SPDX-License-Identifier: Apache-2.0
"""The steps between pictures, words and answers, each public: encode, embed, build the prefix, decode, parse.

`Runner`, which is a pipeline, puts them together for one answer; whoever measures, scores or serves puts them together otherwise.

B: images or rows, N: tokens of an image, T: tokens, R: resolution, H: width of the decoder.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

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


class Pipeline:
    """A bundle, loaded into an engine, step by step.

    with Pipeline.open("bundle") as pipeline:
        features = pipeline.encode(["cat.jpg"])
        prefix = pipeline.prefix(features, pipeline.prompt_ids("detect cat"))
        ids = list(pipeline.generate(prefix, limit=64))

    Args:
        low_memory: Hold either the vision encoder or the decoder, never both, and load them again when they are used.
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
                self.session(name)
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.perf_counter() - start
        self._table = bundle.token_table()
        self._tokenizer = PromptTokenizer(bundle.path / "tokenizer.json", self.manifest.token_ids)

    @classmethod
    def open(cls, path: str | Path, *, engine: str = "cpu", threads: int | None = None, low_memory: bool = False) -> Self:
        """Open, verify and load a bundle.

        Raises:
            IntegrityError: The bundle is not what its manifest promises.
            EngineError: The engine is not available; no other is tried.
        """
        return cls(Bundle.open(path), engine=engine, threads=threads, low_memory=low_memory)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The graphs that the engine holds now."""
        return tuple(self._sessions)

    def session(self, name: str) -> Session:
        """The session of one of the bundle's graphs, loaded now if it is not.

        Raises:
            UsageError: The pipeline is closed.
        """
        if self._closed:
            raise UsageError("this bundle was closed; open it again with Runner.from_pretrained or Pipeline.open")
        if name not in self._sessions:
            self._sessions[name] = self._open(self._files[name])
        return self._sessions[name]

    def prompt_ids(self, prompt: str, images: int = 1, *, special_tokens: bool = False) -> list[int]:
        """Token ids of a whole prefix: the tokens of the images, then bos, the prompt and the newline.

        Args:
            special_tokens: The fine-tune's own special tokens are tokens in the prompt, and not text.

        Raises:
            InputError: The prompt cannot be used, or the prefix is longer than the bundle's context.
        """
        m = self.manifest
        return self._tokenizer.prompt_ids(prompt, m.image_tokens, images, limit=m.context_length, special_tokens=special_tokens)

    def encode(self, images: Sequence[Picture]) -> np.ndarray:
        """Pictures to image features [B, N, H].

        Raises:
            InputError: A picture cannot be used.
        """
        return self.encode_pixels(self.pixels([load_image(image) for image in images]))

    def pixels(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Pictures as `load_image` gives them to pixel values [B, 3, R, R]."""
        return np.stack([pixel_values(image, self.manifest.resolution, self.manifest.pixels) for image in images])

    def encode_pixels(self, pixels: np.ndarray, *, timings: dict[str, float] | None = None) -> np.ndarray:
        """Pixel values [B, 3, R, R] to image features [B, N, H].

        Args:
            timings: Receives the seconds of the vision encoder and of the projector.
        """
        if self._low_memory:
            self._release("decoder_step")
        start = time.perf_counter()
        hidden = self.session("vision_encoder").run({"pixel_values": pixels})
        encoded = time.perf_counter()
        features = self.session("projector").run(hidden)["image_features"]
        if self._low_memory:
            self._release("vision_encoder", "projector")
        if timings is not None:
            timings |= {"vision": encoded - start, "projector": time.perf_counter() - encoded}
        return features

    def embed(self, ids: Sequence[int]) -> np.ndarray:
        """Token ids to scaled embeddings [1, T, H]; only their rows of the mapped table are read.

        Raises:
            IntegrityError: The token table has no such row.
        """
        if max(ids) >= len(self._table):
            raise IntegrityError(
                f"tokenizer.json gives token {max(ids)}, and the token table has {len(self._table)} rows; export again"
            )
        return self._table.rows(ids)[None] * np.float32(self.manifest.token_table.scale)

    def prefix(self, features: np.ndarray, ids: Sequence[int]) -> np.ndarray:
        """Image features [B, N, H] and the ids of `prompt_ids` to the prefix's embeddings [1, T, H]."""
        images, tokens, width = features.shape
        placeholders = [self.manifest.token_ids.image] * (images * tokens)
        assert list(ids[: len(placeholders)]) == placeholders, f"Bug: ids that do not begin with {images} images"
        return np.concatenate([features.reshape(1, -1, width), self.embed(ids[len(placeholders) :])], axis=1)

    def decoder(self, capacity: int, rows: int = 1) -> Decoder:
        """The decoder with a KV cache of its own, for `rows` sequences of at most `capacity` tokens."""
        return Decoder(self.session("decoder_step"), self.manifest, capacity, rows=rows)

    def answer_limit(self, prefix: np.ndarray, asked: int | None = None) -> int:
        """How many tokens an answer may have; the bundle's own limit gives way to a long prefix, the caller's does not."""
        if asked is not None and asked < 1:
            raise UsageError(f"max_new_tokens is {asked}; ask for at least 1")
        room = self.manifest.context_length - prefix.shape[1]
        return max(1, min(self.manifest.max_new_tokens, room)) if asked is None else asked

    def generate(self, prefix: np.ndarray, limit: int) -> Iterator[int]:
        """The likeliest token ids after a prefix [1, T, H], until one of the manifest's stop tokens or `limit` tokens.

        Each answer has a cache of its own: what an abandoned
        or failed one left behind is never seen by the next.
        """
        decoder = self.decoder(prefix.shape[1] + limit)
        return generate(decoder, prefix, lambda token: self.embed([token]), stop=self.manifest.stop, limit=limit)

    def teacher_forced(self, prefix: np.ndarray, ids: Sequence[int], decoder: Decoder | None = None) -> Iterator[np.ndarray]:
        """Logits [V] after a prefix [1, T, H] and after each token of a given answer; each array stands until the next one.

        Args:
            decoder: An empty one, for a caller that goes on with it; None: one that is given up at the end.
        """
        decoder = decoder or self.decoder(prefix.shape[1] + len(ids))
        yield decoder.feed(prefix)
        for token in ids:
            yield decoder.feed(self.embed([token]))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of generated ids."""
        return self._tokenizer.decode(ids)

    def pieces(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of generated ids, piece by piece as they come."""
        return self._tokenizer.stream(ids)

    def parse(self, ids: Sequence[int], size: tuple[int, int]) -> Answer:
        """Generated ids to an answer whose boxes and masks are in pixels of a picture of `size` (width, height)."""
        text = self.decode(ids)
        masks = self._decode_mask if "mask_decoder" in self.manifest.graphs else None
        return Answer(text, tuple(ids), *parse(text, *size, masks))

    def close(self) -> None:
        """Free the engine's memory."""
        self._closed = True
        self._release(*self._sessions)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _release(self, *names: str) -> None:
        for name in names:
            if name in self._sessions:
                self._sessions.pop(name).close()

    def _decode_mask(self, codes: np.ndarray) -> np.ndarray:
        return self.session("mask_decoder").run({"codes": codes})["mask"]
