# SPDX-License-Identifier: Apache-2.0
"""What was measured, kept on disk line by line, so that it is never measured again.

A file for each bundle under the same conditions, named after both. A line that a kill cut off is taken away; any other damage is
an error, for a report must not lose samples in silence.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pgxport.errors import IntegrityError, UsageError
from pgxport.files import CHECK_DISK, disk_errors, file_sha256, locked
from pgxport.metrics.sample import Drawn, Sample, Segmentation
from pgxport.runners.outputs import Answer, Box, Fault, Malformed, Mask

FOLDER = "measured"


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Conditions(_Model):
    """What must be the same for a measurement to hold: the first line of a file."""

    kind: Literal["conditions"] = "conditions"
    digest: str  # of the manifest, and with it of every file of the bundle
    copy_number: int  # the same bundle given twice is measured twice
    engine: str
    threads: int | None
    max_new_tokens: int | None
    processor: str
    versions: dict[str, str]
    node: str | None = None  # of a cluster


class Held(_Model):
    """Bytes in memory."""

    private: int
    mapped: int
    resident: int


class Opened(_Model):
    """A process that got ready."""

    kind: Literal["opened"] = "opened"
    facts: dict[str, Any]
    seconds: dict[str, float]
    loaded: Held | None
    environment: dict[str, Any] | None = None  # of the node, where it is one of a cluster


class Asked(_Model):
    """A sample and its answer, or why it cannot be asked."""

    kind: Literal["asked"] = "asked"
    sample: str
    answer: dict[str, Any] | None = None
    refused: str | None = None
    seconds: dict[str, float] = Field(default_factory=dict)
    joules: dict[str, float] = Field(default_factory=dict)  # by source
    mhz: float | None = None
    celsius: float | None = None
    throttled: int | None = None  # times, meanwhile
    gpu_mhz: float | None = None
    slowed: tuple[str, ...] = ()  # what held the clocks back at its end
    peak: Held | None = None  # of the process, until then
    vram: int | None = None  # bytes of GPU memory that the process holds after it


class Followed(_Model):
    """What a bundle thought of each next token along the reference's answer."""

    kind: Literal["followed"] = "followed"
    sample: str
    reference: str  # its digest
    refused: str | None = None
    along: dict[str, float] = Field(default_factory=dict)


Line: TypeAdapter[Opened | Asked | Followed] = TypeAdapter(Annotated[Opened | Asked | Followed, Field(discriminator="kind")])


@dataclass(frozen=True)
class Key:
    """What is asked: two samples with the same picture and prompt have one answer."""

    picture: str
    prompt: str

    def __str__(self) -> str:
        return hashlib.sha256(json.dumps([self.picture, self.prompt]).encode()).hexdigest()[:32]


def keys(samples: Sequence[Sample]) -> list[str]:
    """The key of each sample; a picture is hashed once."""
    digests: dict[Path | bytes | Drawn, str] = {}
    found = []
    for sample in samples:
        if sample.image not in digests:
            digests[sample.image] = _picture(sample)
        found.append(str(Key(digests[sample.image], sample.prompt)))
    return found


class Measured:
    """The measurements of one bundle, in memory."""

    def __init__(self) -> None:
        self.opened: list[Opened] = []
        self.asked: dict[str, Asked] = {}
        self.followed: dict[tuple[str, str], Followed] = {}  # sample, reference

    def add(self, line: Opened | Asked | Followed) -> None:
        """Keep it."""
        self.take(line)

    def take(self, line: Opened | Asked | Followed) -> None:
        """Know it, as something that is kept already."""
        match line:
            case Opened():
                self.opened.append(line)
            case Asked():
                self.asked[line.sample] = line
            case Followed():
                self.followed[line.sample, line.reference] = line


class Store(Measured):
    """One file of measurements: what it held, and what is added."""

    def __init__(self, folder: Path, conditions: Conditions):
        super().__init__()
        text = conditions.model_dump_json()
        copy = f"-{conditions.copy_number}" if conditions.copy_number > 1 else ""
        self.file = folder / f"{conditions.digest[:16]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}{copy}.jsonl"
        if self.file.exists():
            self._read()
        if not self.file.exists():
            self._append(text)

    def add(self, line: Opened | Asked | Followed) -> None:
        """Keep it, in memory and on disk."""
        self._append(line.model_dump_json())
        self.take(line)

    def _read(self) -> None:
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(self.file, len(whole))
        if not whole:  # not even the first line came to its end
            self.file.unlink()
            return
        for number, line in enumerate(whole.splitlines()[1:], start=2):
            try:
                self.take(Line.validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                raise IntegrityError(
                    f"{self.file}, line {number}: {first['msg']}; delete the file to measure that bundle again"
                ) from None

    def _append(self, text: str) -> None:
        with disk_errors(f"cannot write {self.file}"), open(self.file, "ab", buffering=0) as file:
            file.write(text.encode() + b"\n")


@dataclass(frozen=True, order=True)
class Place:
    """A node of a cluster; with another processor it is another one, whatever its name."""

    node: str
    processor: str


class NodeStores(Measured):
    """What all nodes of a cluster measured of one bundle, each in a file of its own; to look at, it is one."""

    def __init__(self, folder: Path, conditions: Conditions):
        super().__init__()
        self.places: dict[Place, Store] = {}
        self._folder, self._conditions = folder, conditions
        for file in sorted(folder.glob(f"{conditions.digest[:16]}-*.jsonl")):
            found = _first_line(file)
            if found and found.node and found == self._at(Place(found.node, found.processor)):
                store = self.at(Place(found.node, found.processor))
                self.opened += store.opened
                self.asked |= store.asked
                self.followed |= store.followed

    def at(self, place: Place) -> Store:
        """What one node measured."""
        if place not in self.places:
            self.places[place] = Store(self._folder, self._at(place))
        return self.places[place]

    def add_at(self, place: Place, line: Opened | Asked | Followed) -> None:
        """Keep what a node measured."""
        self.at(place).add(line)
        self.take(line)

    def _at(self, place: Place) -> Conditions:
        return self._conditions.model_copy(update={"node": place.node, "processor": place.processor})


class Folder:
    """The folder of measurements below a report, held by one pgx at a time."""

    def __init__(self, output: Path):
        self.path = output / FOLDER
        if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not self.path.is_dir())):
            raise UsageError(f"{output} exists and holds no report of pgx; choose another -o")
        held, self._lock = f"another pgx is measuring into {output}; wait for it, or choose another -o", ExitStack()
        with disk_errors(f"cannot write {output}", "choose another -o"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.enter_context(locked(self.path, held))

    def close(self) -> None:
        """Let another pgx have the folder."""
        self._lock.close()


def answer_of(asked: Asked) -> Answer:
    """The answer as it was given; a sample that was refused has an empty one."""
    if asked.answer is None:
        return Answer("")
    a = asked.answer
    boxes = tuple(_box(box) for box in a["boxes"])
    masks = tuple(Mask(m["label"], _box(m["box"]), tuple(m["codes"]), _mask(m["rle"])) for m in a["masks"])
    warnings = tuple(Malformed(Fault(w["fault"]), w["text"]) for w in a["warnings"])
    return Answer(a["text"], tuple(a["token_ids"]), boxes, masks, warnings, asked.seconds, truncated=a["truncated"])


def _first_line(file: Path) -> Conditions | None:
    """The conditions of a file; None where not even they came to their end, and the store will begin it again."""
    with open(file, "rb") as opened:
        line = opened.readline()
    try:
        return Conditions.model_validate_json(line) if line.endswith(b"\n") else None
    except ValidationError as error:
        raise IntegrityError(
            f"{file}, line 1: {error.errors()[0]['msg']}; delete the file to measure that bundle again"
        ) from None


def _box(box: Mapping[str, Any]) -> Box:
    return Box(**{**box, "bins": tuple(box["bins"])})


def _mask(rle: Mapping[str, Any] | None) -> np.ndarray | None:
    return None if rle is None else Segmentation((rle["size"][0], rle["size"][1]), runs=tuple(rle["counts"])).mask()


def _picture(sample: Sample) -> str:
    match sample.image:
        case Drawn(index):
            return f"scene-{index}"
        case bytes(content):
            return hashlib.sha256(content).hexdigest()
        case path:
            with disk_errors(f"sample {sample.id}: cannot read {path}", CHECK_DISK):
                return file_sha256(Path(path))
