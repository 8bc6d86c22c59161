# SPDX-License-Identifier: Apache-2.0
"""Ask one prompt about many pictures: an answer for each, or why there is none."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgxport.errors import DiskError, InputError, NumericError
from pgxport.runners.image import read_picture
from pgxport.runners.outputs import Answer
from pgxport.runners.runner import Runner


@dataclass(frozen=True)
class PictureQuestion:
    """The question about every picture, and how it is answered. Names are those of `pgx run`'s flags."""

    prompt: str
    max_new_tokens: int | None = None
    engine: str = "cpu"
    threads: int | None = None
    low_memory: bool = False
    special_tokens: bool = False


@dataclass(frozen=True)
class EmbeddedPicture:
    """A picture that stands in a data set's record, and not in a file of its own."""

    name: str
    content: bytes

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class PictureAnswer:
    """One picture: its answer, or the reason why there is none and the exit code of that error."""

    image: str
    answer: Answer | None
    error: str | None = None
    exit_code: int = 0
    node: str | None = None  # of a cluster

    def to_json(self) -> dict[str, Any]:
        """Return plain data, for json.dumps."""
        where = {"node": self.node} if self.node else {}
        if self.answer is None:
            return {"image": self.image, "error": self.error, "exit_code": self.exit_code} | where
        return {"image": self.image} | self.answer.to_json() | where


AskedPicture = Path | EmbeddedPicture | PictureAnswer  # the last: a record that names no picture, as the row that says so


def ask_each(bundle: str, pictures: Sequence[AskedPicture], question: PictureQuestion) -> Iterator[PictureAnswer]:
    """Answer about one picture after the other; a picture that cannot be answered is a row like the others.

    Raises:
        IntegrityError: the bundle is not sound.
        EngineError: the engine is not available.
    """
    q = question
    with Runner.from_pretrained(bundle, engine=q.engine, threads=q.threads, low_memory=q.low_memory) as runner:
        for picture in pictures:
            yield answer(runner, str(picture), read(picture), q)


def read(picture: AskedPicture) -> bytes | PictureAnswer:
    """Return a picture's bytes, or the row that says why there are none."""
    if isinstance(picture, PictureAnswer):
        return picture
    if isinstance(picture, EmbeddedPicture):
        return picture.content
    try:
        return read_picture(picture)
    except (InputError, DiskError) as error:
        return PictureAnswer(str(picture), None, str(error), error.exit_code)


def answer(runner: Runner, name: str, content: bytes | PictureAnswer, question: PictureQuestion) -> PictureAnswer:
    """Return the row of one picture; `content` is what `read` gave."""
    if isinstance(content, PictureAnswer):
        return content
    q = question
    try:
        answered = runner.answer(content, q.prompt, max_new_tokens=q.max_new_tokens, special_tokens=q.special_tokens)
        return PictureAnswer(name, answered)
    except (InputError, NumericError) as error:  # the next picture may do better
        return PictureAnswer(name, None, str(error), error.exit_code)
