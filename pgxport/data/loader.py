# SPDX-License-Identifier: Apache-2.0
"""Samples from data sets as they are distributed, read from local files: one row of FORMATS for each.

Which format a file has, its content says; where two fit, or none, the user does. Without data: the embedded scenes.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pgxport.data.documents import tables
from pgxport.data.formats import FORMATS, Context
from pgxport.data.records import Pictures, Rows
from pgxport.errors import InputError, UsageError, choose
from pgxport.metrics.metrics import TASKS
from pgxport.metrics.sample import Drawn, Region, Sample, Segmentation
from pgxport.runners.outputs import run_lengths

if TYPE_CHECKING:
    from pgxport.models.tiny.scenes import Question

MAX_EMBEDDED = 4 << 30  # bytes of pictures that stand in the records themselves
SCENES = 100  # of each task, where nothing else is asked for


@dataclass(frozen=True)
class DataOptions:
    """Where samples come from. Names and meanings are the command's flags."""

    data: Path | None = None  # a file or a folder; None: the embedded scenes
    format: str | None = None
    images: Path | None = None  # the pictures' folder, where it is not the data's
    split: str | None = None
    prompt: str | None = None  # in place of the format's, {question} standing for the question or expression
    limit: int | None = None  # records, evenly spaced; of the scenes: of each task


@dataclass(frozen=True)
class DataSet:
    """Samples, and what they were taken from."""

    format: str
    source: str
    samples: tuple[Sample, ...]
    records: int  # there were
    skipped: int  # of those taken, cannot be asked: no picture, nothing to find


def load(options: DataOptions) -> DataSet:
    """Read the samples.

    Raises:
        UsageError: there is no such data, its format or split is not certain, or a library is missing.
        InputError: a record is not what its format promises; the message names file, record, value and fix.
    """
    if options.format is not None:
        choose("format", options.format, FORMATS)
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit {options.limit}: give at least 1")
    if options.data is None:
        scenes = scene_samples(options.limit or SCENES)
        return DataSet("scenes", "embedded scenes, test split", scenes, len(scenes), 0)
    name, rows = _chosen(options)
    root = options.images or (options.data if options.data.is_dir() else options.data.parent)
    if not root.is_dir():
        raise UsageError(f"--images {root}: is not a folder")
    known = FORMATS[name]
    context = Context(known, Pictures(root), _template(options.prompt or known.prompt))
    taken = _evenly(len(rows), options.limit)
    samples: list[Sample] = []
    skipped = embedded = 0
    for record in rows.at(taken):
        found = list(known.samples(record, context))
        skipped += not found
        samples += found
        embedded += sum(len(sample.image) for sample in found if isinstance(sample.image, bytes))
        if embedded > MAX_EMBEDDED:
            raise UsageError(
                f"{rows.where}: its first {len(samples)} pictures have {embedded / 1e9:.1f} GB; take fewer with --limit"
            )
    if not samples:
        raise InputError(
            f"{rows.where}: none of {len(taken)} records of format {name} can be asked: no picture, or nothing to find"
        )
    return DataSet(name, rows.where, tuple(_unique(samples)), len(rows), skipped)


def scene_samples(count: int) -> tuple[Sample, ...]:
    """`count` questions of every task about embedded scenes, those on which the tiny checkpoint was evaluated."""
    # Imported here: a report on other data draws nothing.
    from pgxport.models.tiny.scenes import TASKS as ASKED
    from pgxport.models.tiny.scenes import ask, draw

    found: dict[str, list[Sample]] = {task: [] for task in ASKED}
    index = 0
    while any(len(samples) < count for samples in found.values()):
        questions = ask(draw("test", index), index)
        # As tools/tiny/evaluate.py chooses among several questions of a task.
        rng = np.random.default_rng([11, index])
        for task, samples in found.items():
            options = [q for q in questions if q.task == task]
            if options and len(samples) < count:
                samples.append(_scene_sample(index, options[int(rng.integers(len(options)))]))
        index += 1
    return tuple(sample for samples in found.values() for sample in samples)


def _scene_sample(index: int, question: "Question") -> Sample:
    regions = []
    for label, thing in question.things:
        mask = thing.mask() if question.task == "segment" else None
        runs = None if mask is None else Segmentation((mask.shape[0], mask.shape[1]), runs=tuple(run_lengths(mask)["counts"]))
        regions.append(Region(label, thing.box, runs))
    # A scene's caption has one right wording, which CIDEr would blur.
    metric = "exact_match" if question.task == "caption" else TASKS[question.task][0]
    answers = () if question.answer is None else (question.answer,)
    name = f"scene-{index}-{question.task}"
    return Sample(name, Drawn(index), question.prompt, question.task, metric, answers, tuple(regions))


def _chosen(options: DataOptions) -> tuple[str, Rows]:
    assert options.data is not None, "Bug: no data to choose from"
    if not options.data.exists():
        raise UsageError(f"{options.data}: there is no such file or folder; pgx downloads no data set")
    found = tables(options.data, options.split)
    candidates = [(name, rows) for rows in found for name in _formats(rows) if options.format in (None, name)]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        several = ", ".join(f"{rows.where} ({name})" for name, rows in candidates[:5])
        raise UsageError(f"{options.data}: holds {len(candidates)} data sets: {several}; give the file, or --format, or --split")
    if options.format is not None and len(found) == 1:
        return options.format, found[0]  # its records will say what they lack
    seen = "; ".join(f"{rows.where} has {', '.join(map(repr, list(_first(rows))[:8]))}" for rows in found[:3])
    raise UsageError(
        f"{options.data}: {seen or 'no JSON, parquet or Arrow file with records'}: no known data set; "
        f"say which it is with --format {'|'.join(FORMATS)}"
    )


def _formats(rows: Rows) -> list[str]:
    first = _first(rows)
    return [name for name, known in FORMATS.items() if first and known.fits(first)]


def _first(rows: Rows) -> Mapping[str, Any]:
    return next((record.fields for record in rows.at([0])), {}) if len(rows) else {}


def _template(prompt: str) -> str:
    if prompt.count("{") != prompt.count("{question}") + prompt.count("{task}"):
        raise UsageError(f"--prompt {prompt!r}: only {{question}} stands for something, for example 'answer en {{question}}'")
    return prompt


def _evenly(count: int, limit: int | None) -> list[int]:
    """`limit` of `count` numbers, evenly spaced: the first ones would be of one kind where a file is sorted."""
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


def _unique(samples: list[Sample]) -> Iterator[Sample]:
    """Samples of one record, or of records that share a name, told apart by a number."""
    seen: dict[str, int] = defaultdict(int)
    for sample in samples:
        seen[sample.id] += 1
        yield sample if seen[sample.id] == 1 else replace(sample, id=f"{sample.id}#{seen[sample.id]}")
