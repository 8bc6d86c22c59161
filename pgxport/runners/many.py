# SPDX-License-Identifier: Apache-2.0
"""Ask one prompt about many pictures: an answer for each, or why there is none."""

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgxport.errors import DiskError, InputError, NumericError, UsageError
from pgxport.runners.image import read_picture
from pgxport.runners.outputs import Answer
from pgxport.runners.runner import Runner

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class PictureQuestion:
    """The question about every picture, and how it is answered. Names are those of `pgx run`'s flags."""

    prompt: str
    max_new_tokens: int | None = None
    engine: str = "cpu"
    threads: int | None = None
    low_memory: bool = False


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


def find_pictures(patterns: Sequence[str]) -> list[Path]:
    """Files, the pictures of folders by their suffix, and what a pattern with * ? [ matches; each once, a folder's by name.

    Raises:
        UsageError: one of them finds nothing.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        elif not path.exists() and glob.has_magic(pattern):
            files = sorted(file for file in map(Path, glob.glob(pattern, recursive=True)) if file.is_file())
        else:
            files = [path]  # one that does not exist is a row that says so
        if not files:
            raise UsageError(
                f"--images {pattern!r} finds no picture; give a folder with {', '.join(SUFFIXES)}, a pattern or a file"
            )
        found |= dict.fromkeys(files)
    return list(found)


def ask_each(bundle: str, pictures: Sequence[Path], question: PictureQuestion) -> Iterator[PictureAnswer]:
    """Answer about one picture after the other; a picture that cannot be answered is a row like the others.

    Raises:
        IntegrityError: the bundle is not sound.
        EngineError: the engine is not available.
    """
    q = question
    with Runner.from_pretrained(bundle, engine=q.engine, threads=q.threads, low_memory=q.low_memory) as runner:
        for path in pictures:
            yield answer(runner, str(path), read(path), q)


def read(path: Path) -> bytes | PictureAnswer:
    """Return a picture's bytes, or the row that says why there are none."""
    try:
        return read_picture(path)
    except (InputError, DiskError) as error:
        return PictureAnswer(str(path), None, str(error), error.exit_code)


def answer(runner: Runner, name: str, content: bytes | PictureAnswer, question: PictureQuestion) -> PictureAnswer:
    """Return the row of one picture; `content` is what `read` gave."""
    if isinstance(content, PictureAnswer):
        return content
    try:
        return PictureAnswer(name, runner.answer(content, question.prompt, max_new_tokens=question.max_new_tokens))
    except (InputError, NumericError) as error:  # the next picture may do better
        return PictureAnswer(name, None, str(error), error.exit_code)
