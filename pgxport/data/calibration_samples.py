# SPDX-License-Identifier: Apache-2.0
"""The samples that a model is calibrated on: an image, a prompt, and the answer where it is known.

From a JSONL file, from a folder, or, where nothing was given, drawn scenes.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from PIL import Image

from pgxport.errors import DiskError, InputError, UsageError
from pgxport.files import read_object, read_text
from pgxport.models.tiny.scenes import Question, ask, draw, locations
from pgxport.runners.image import load_image
from pgxport.runners.tokenizer import PromptTokenizer

KEYS = ("image", "prompt", "answer")
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
LIST = "samples.jsonl"
MAX_BYTES = 64 << 20  # of a list, or of the text beside an image
EXPECTED = f"a sample is an object with the keys {', '.join(KEYS)}"
LAYOUTS = f'a JSONL file of {{"image": "a.png", "prompt": "caption en", "answer": "a cat"}}, a folder with {LIST}, or images with texts beside them'


@dataclass(frozen=True)
class Sample:
    """One image with a prompt; without an answer, only the prefix is run."""

    name: str  # for messages: a file and line
    image: Path | Image.Image
    prompt: str
    answer: str | None = None

    def picture(self) -> Image.Image:
        """The image, upright and RGB.

        Raises:
            InputError: it cannot be used.
        """
        try:
            return load_image(self.image)
        except InputError as error:
            raise InputError(f"{self.name}: {error}") from error

    def content(self) -> bytes:
        """What a digest is made of."""
        if isinstance(self.image, Image.Image):
            return self.image.tobytes()
        try:
            return self.image.read_bytes()
        except OSError as error:
            raise DiskError(f"{self.name}: {self.image} cannot be read: {error.strerror or error}") from error


@dataclass(frozen=True)
class Encoded:
    """A sample as a model reads it."""

    sample: Sample
    prompt: tuple[int, ...]  # bos, the words, newline; the image's tokens come before them
    answer: tuple[int, ...]  # without the token that ends it, which is never fed


def read_samples(data: Path | None, count: int) -> list[Sample]:
    """The first `count` samples of a JSONL file or folder, in its order; of drawn scenes where `data` is None.

    Raises:
        UsageError: there is no such file or folder, or it holds no samples.
        InputError: a line, a text or a path in it cannot be used.
    """
    if data is None:
        return [_scene(index) for index in range(count)]
    if not data.exists():
        raise UsageError(f"{data}: there is no such file or folder; give {LAYOUTS}")
    listed = _list_of(data)
    found = _from_list(listed) if listed else _from_folder(data)
    samples = [sample for sample, _ in zip(found, range(count), strict=False)]
    if not samples:
        raise UsageError(f"{data} holds no samples; give {LAYOUTS}")
    return samples


def encode(sample: Sample, words: PromptTokenizer) -> Encoded:
    """The token ids of prompt and answer.

    Raises:
        InputError: one of them is not text that the tokenizer takes.
    """
    try:
        prompt = words.prompt_ids(sample.prompt, 0)
        # As a prompt's text, without the bos before it and the newline after.
        answer = words.prompt_ids(sample.answer, 0)[1:-1] if sample.answer else []
    except InputError as error:
        raise InputError(f"{sample.name}: {error}") from error
    return Encoded(sample, tuple(prompt), tuple(answer))


def token_weights(samples: Sequence[Encoded], image_tokens: int) -> list[np.ndarray]:
    """How much each token of each sample [T] counts: those that an answer is read from as much, together, as all others.

    An image has hundreds of tokens and an answer a few, so that without weights a method that minimises the mean error of a
    layer gives up the answer for the image. Measured in docs/decisions/0012.
    """
    read = sum(len(s.answer) + 1 for s in samples)  # the last of the prefix predicts the first of the answer
    others = sum(image_tokens + len(s.prompt) - 1 for s in samples)
    weights = []
    for sample in samples:
        w = np.ones(image_tokens + len(sample.prompt) + len(sample.answer), np.float32)
        w[image_tokens + len(sample.prompt) - 1 :] = others / read
        weights.append(w)
    return weights


def digest(samples: Iterable[Sample]) -> str:
    """sha256 of all images, prompts and answers, in order."""
    whole = hashlib.sha256()
    for sample in samples:
        words = json.dumps([sample.prompt, sample.answer])
        whole.update(f"{hashlib.sha256(sample.content()).hexdigest()} {words}\n".encode())
    return whole.hexdigest()


def _list_of(data: Path) -> Path | None:
    """The JSONL file that is meant, if there is one."""
    if data.is_file():
        return data
    lists = sorted(data.glob("*.jsonl"))
    named = [file for file in lists if file.name == LIST] or lists
    if len(named) > 1:
        raise UsageError(f"{data} holds {', '.join(f.name for f in named[:5])}; give the one that is meant, or call it {LIST}")
    return named[0] if named else None


def _from_list(file: Path) -> Iterator[Sample]:
    for number, line in enumerate(read_text(file, MAX_BYTES).splitlines(), 1):
        if line.strip():
            where = f"{file}:{number}"
            fields = _fields(line, where)
            if "image" not in fields:
                raise InputError(f'{where}: names no image; a line is {{"image": "a.png", "prompt": "caption en"}}')
            yield _sample(where, _inside(file.parent, fields["image"], where), fields)


def _from_folder(folder: Path) -> Iterator[Sample]:
    """Images, each with a .json of prompt and answer, or a .txt whose first line is the prompt and the rest the answer."""
    for image in sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGES):
        texts = [text for suffix in (".json", ".txt") if (text := image.with_suffix(suffix)).exists()]
        if len(texts) != 1:
            seen = "both " + " and ".join(t.name for t in texts) if texts else f"neither {image.stem}.json nor {image.stem}.txt"
            raise InputError(f"{image} has {seen} beside it; one of them says what its prompt is")
        text = _inside(folder, texts[0].name, str(texts[0]))
        if text.suffix == ".json":
            fields = _fields(read_text(text, MAX_BYTES), str(texts[0]))
            if "image" in fields:
                raise InputError(f"{texts[0]}: names an image, and the one beside it is meant; take 'image' out")
        else:
            prompt, _, answer = read_text(text, MAX_BYTES).partition("\n")
            fields = {"prompt": prompt} | ({"answer": answer} if answer.strip() else {})
        yield _sample(str(texts[0]), _inside(folder, image.name, str(image)), fields)


def _fields(text: str, where: str) -> dict[str, str]:
    value = read_object(text, where, EXPECTED)
    for key, field in value.items():
        if key not in KEYS:
            close = get_close_matches(key, KEYS, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(KEYS)}"
            raise InputError(f"{where}: {key[:200]!r} is no key of a sample; {hint}")
        if not isinstance(field, str) and not (key == "answer" and field is None):
            raise InputError(f"{where}: {key!r} is {field!r:.200}, and has to be text")
    return {key: field for key, field in value.items() if field is not None}


def _sample(where: str, image: Path, fields: dict[str, str]) -> Sample:
    if not fields.get("prompt", "").strip():
        raise InputError(f"{where}: has no prompt; say what the model is asked, for example 'caption en'")
    answer = fields.get("answer", "").strip()
    return Sample(where, image, fields["prompt"].strip(), answer or None)


def _inside(folder: Path, name: str, where: str) -> Path:
    """A file under the folder, and nowhere else, whatever `..` or links it goes by."""
    try:
        path = (folder / name).resolve()
        inside = not Path(name).is_absolute() and path.is_relative_to(folder.resolve())
        there = inside and path.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{where}: {name[:200]!r} is no path ({error})") from error
    if not inside:
        raise InputError(f"{where}: {name[:200]!r} leads out of {folder}; copy the file into the folder")
    if not there:
        raise InputError(f"{where}: {name[:200]!r} is not a file of {folder}; paths are relative to that folder")
    return path


def _scene(index: int) -> Sample:
    """A drawn scene and one of its questions, the kinds in turn."""
    scene = draw("calibration", index)
    # A mask's codes are not known without the encoder that made them.
    questions = [q for q in ask(scene, seed=index) if q.task != "segment"]
    tasks = list(dict.fromkeys(q.task for q in questions))
    of_task = [q for q in questions if q.task == tasks[index % len(tasks)]]
    question = of_task[index // len(tasks) % len(of_task)]
    return Sample(f"scene {index}", scene.image, question.prompt, _answer(question))


def _answer(question: Question) -> str:
    if question.answer is not None:
        return question.answer
    return " ; ".join(f"{locations(thing.box)} {label}" for label, thing in question.things)
