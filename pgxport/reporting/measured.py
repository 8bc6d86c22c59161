# SPDX-License-Identifier: Apache-2.0
"""The measurements of one subject of a report, a bundle or a checkpoint, as lines of its file."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter

from pgxport.errors import UsageError
from pgxport.metrics.sample import Drawn, Sample, Segmentation
from pgxport.reporting.asking import TokenAgreement
from pgxport.reporting.schema import Memory
from pgxport.reporting.store import ResultFile, StoredLine, alone
from pgxport.runners.outputs import Answer, Box, Fault, Malformed, Mask

FOLDER = "measured"


@dataclass(frozen=True)
class Conditions:
    """What must be the same for a measurement to hold."""

    digest: str  # of the manifest, and with it of every file of the bundle
    copy_number: int  # the same bundle given twice is measured twice
    engine: str
    threads: int | None
    max_new_tokens: int | None
    processor: str | None  # None: of a cluster, whose lines name their place
    versions: dict[str, str]


@dataclass(frozen=True, order=True)
class Place:
    """A node of a cluster; with another processor it is another place, whatever its name."""

    node: str
    processor: str


class Opened(StoredLine):
    """A process got ready."""

    kind: Literal["opened"] = "opened"
    facts: dict[str, Any]
    seconds: dict[str, float]
    loaded: Memory | None
    place: Place | None = None
    environment: dict[str, Any] | None = None  # the node's name and environment, on a cluster


class Asked(StoredLine):
    """A sample and its answer, or why it cannot be asked."""

    kind: Literal["asked"] = "asked"
    sample: str
    answer: dict[str, Any] | None = None
    refused: str | None = None
    seconds: dict[str, float] = Field(default_factory=dict)
    joules: dict[str, float] = Field(default_factory=dict)  # by source
    mhz: float | None = None
    celsius: float | None = None
    throttled: int | None = None  # times during the answer
    gpu_mhz: float | None = None
    slowed: tuple[str, ...] = ()  # what held the clocks back at the end of the answer
    peak: Memory | None = None  # of the process, from its start to the end of the answer
    vram: int | None = None  # bytes of GPU memory that the process holds after the answer
    place: Place | None = None

    def untimed(self) -> "Asked":
        """The answer alone, without what depends on the machine that gave it."""
        return Asked(sample=self.sample, answer=self.answer, refused=self.refused)


class TeacherForced(StoredLine):
    """How far a subject agrees with the reference along the reference's answer to a sample."""

    kind: Literal["teacher_forced"] = "teacher_forced"
    sample: str
    reference: str  # its digest
    refused: str | None = None
    agreement: TokenAgreement | None = None


ReportLine = Opened | Asked | TeacherForced
LINES: TypeAdapter[ReportLine] = TypeAdapter(Annotated[ReportLine, Field(discriminator="kind")])


class SubjectResults:
    """The measurements of one subject, in memory and, where a file is given, on disk."""

    def __init__(self, file: ResultFile[ReportLine] | None = None):
        self.opened: list[Opened] = []
        self.asked: dict[str, Asked] = {}  # by sample
        self.teacher_forced: dict[tuple[str, str], TeacherForced] = {}  # by sample and reference
        self.added: list[ReportLine] = []
        self._file = file
        for line in file.lines if file else ():
            self.take(line)

    def add(self, line: ReportLine) -> None:
        """Keep a new measurement."""
        if self._file:
            self._file.add(line)
        self.added.append(line)
        self.take(line)

    def take(self, line: ReportLine) -> None:
        """Know a measurement that is kept already."""
        match line:
            case Opened():
                self.opened.append(line)
            case Asked():
                self.asked[line.sample] = line
            case TeacherForced():
                self.teacher_forced[line.sample, line.reference] = line

    def of(self, sample: str, reference: str) -> Iterator[ReportLine]:
        """Yield the lines about one sample."""
        if sample in self.asked:
            yield self.asked[sample]
        if (sample, reference) in self.teacher_forced:
            yield self.teacher_forced[sample, reference]


@contextmanager
def measured_folder(output: Path) -> Iterator[Path]:
    """Give the folder of measurements below a report, made where there is none and held by one pgx at a time.

    Raises:
        UsageError: the output is something else, or another pgx works in it.
        DiskError: it cannot be written.
    """
    folder = output / FOLDER
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not folder.is_dir())):
        raise UsageError(f"{output} exists and holds no report of pgx; choose another -o")
    with alone(folder, "-o"):
        yield folder


def keys(samples: Sequence[Sample]) -> list[str]:
    """Return the key of each sample: samples with the same picture and prompt have one answer."""
    digests: dict[Path | bytes | Drawn, str] = {}
    sample_keys = []
    for sample in samples:
        if sample.image not in digests:
            drawn = isinstance(sample.image, Drawn)
            digests[sample.image] = repr(sample.image) if drawn else hashlib.sha256(sample.content()).hexdigest()
        text = json.dumps([digests[sample.image], sample.prompt])
        sample_keys.append(hashlib.sha256(text.encode()).hexdigest()[:32])
    return sample_keys


def answer_of(asked: Asked) -> Answer:
    """Return the answer as it was given; a sample that was refused has an empty one."""
    if asked.answer is None:
        return Answer("")
    a = asked.answer
    boxes = tuple(_box(box) for box in a["boxes"])
    masks = tuple(Mask(m["label"], _box(m["box"]), tuple(m["codes"]), _mask(m["rle"])) for m in a["masks"])
    warnings = tuple(Malformed(Fault(w["fault"]), w["text"]) for w in a["warnings"])
    return Answer(a["text"], tuple(a["token_ids"]), boxes, masks, warnings, asked.seconds, truncated=a["truncated"])


def _box(box: Mapping[str, Any]) -> Box:
    return Box(**{**box, "bins": tuple(box["bins"])})


def _mask(rle: Mapping[str, Any] | None) -> np.ndarray | None:
    return None if rle is None else Segmentation((rle["size"][0], rle["size"][1]), runs=tuple(rle["counts"])).mask()
