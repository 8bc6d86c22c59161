# SPDX-License-Identifier: Apache-2.0
"""The one way from a path to samples, for every command: tables, their format, their records.

The content of a file tells its format, a row of FORMATS; where two rows fit, or none, the user chooses.
Without a path: drawn scenes.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from pgxport.data.documents import LIST, tables
from pgxport.data.formats import FORMATS, Context
from pgxport.data.records import Pictures, Rows
from pgxport.data.scenes import calibration_scene, scene_samples
from pgxport.errors import InputError, UsageError, choose
from pgxport.metrics.sample import Sample
from pgxport.text import listed, size

MAX_EMBEDDED = 4 << 30  # bytes of pictures that stand in the records themselves
SCENES = 100  # of each task, where nothing else is asked for


@dataclass(frozen=True)
class DataOptions:
    """Where samples come from. Names and meanings are those of `pgx report`'s flags."""

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
    records: int  # in the data, before the limit
    skipped: int  # records among those taken that cannot be asked: no picture, nothing to find


def load(options: DataOptions) -> DataSet:
    """Read evenly spaced samples, each with its true answer, to be judged.

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
    name, rows, context = _open(options, options.data, judged=True)
    indices = _evenly(len(rows), options.limit)
    by_record = list(_read(rows, indices, context))
    samples = _unique(chain.from_iterable(by_record))
    skipped = sum(not samples for samples in by_record)
    return DataSet(name, rows.where, _some(samples, rows, name, len(indices)), len(rows), skipped)


def first_samples(data: Path | None, count: int) -> tuple[Sample, ...]:
    """Read the first `count` samples in order, with or without answers; without data, calibration scenes.

    Raises:
        UsageError: there is no such data, or its format is not certain.
        InputError: a record is not what its format promises; the message names file, record, value and fix.
    """
    if data is None:
        return tuple(calibration_scene(index) for index in range(count))
    name, rows, context = _open(DataOptions(data), data, judged=False)
    samples = _unique(chain.from_iterable(_read(rows, range(len(rows)), context)))
    return _some(islice(samples, count), rows, name, len(rows))


def all_pictures(data: Path) -> dict[Path | bytes, str]:
    """Find the distinct pictures of all records, in the data's order, each with the id of its first sample.

    Raises:
        UsageError: there is no such data, or its format is not certain.
        InputError: a record is not what its format promises; the message names file, record, value and fix.
    """
    name, rows, context = _open(DataOptions(data), data, judged=False)
    ids: dict[Path | bytes, str] = {}
    samples = _unique(chain.from_iterable(_read(rows, range(len(rows)), context)))
    for sample in _some(samples, rows, name, len(rows)):
        assert isinstance(sample.image, Path | bytes), "Bug: a record's picture is drawn"
        ids.setdefault(sample.image, sample.id)
    return ids


def _open(options: DataOptions, data: Path, *, judged: bool) -> tuple[str, Rows, Context]:
    """The one table that is meant, the name of its format, and what building its samples needs."""
    name, rows = _chosen(options, data)
    root = options.images or (data if data.is_dir() else data.parent)
    if not root.is_dir():
        raise UsageError(f"--images {root}: is not a folder")
    known = FORMATS[name]
    return name, rows, Context(known, Pictures(root), _template(options.prompt or known.prompt), judged)


def _read(rows: Rows, indices: Iterable[int], context: Context) -> Iterator[list[Sample]]:
    """The samples of each record; none where it cannot be asked."""
    count = embedded = 0
    for record in rows.at(indices):
        samples = list(context.format.samples(record, context))
        count += len(samples)
        embedded += sum(len(sample.image) for sample in samples if isinstance(sample.image, bytes))
        if embedded > MAX_EMBEDDED:
            raise UsageError(
                f"{rows.where}: its first {count} pictures have {size(embedded)}; take fewer with "
                f"--limit or --samples, or give a part of the data"
            )
        yield samples


def _some(samples: Iterable[Sample], rows: Rows, name: str, records: int) -> tuple[Sample, ...]:
    taken = tuple(samples)
    if not taken:
        raise InputError(
            f"{rows.where}: none of {records} records of format {name} can be asked: no picture, or nothing to find; give other data"
        )
    return taken


def _chosen(options: DataOptions, data: Path) -> tuple[str, Rows]:
    if not data.exists():
        raise UsageError(f"{data}: there is no such file or folder; pgx downloads no data set")
    every = tables(data, options.split)
    candidates = [(name, rows) for rows in every for name in _formats(rows) if options.format in (None, name)]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        several = listed(f"{rows.where} ({name})" for name, rows in candidates)
        raise UsageError(
            f"{data}: holds {len(candidates)} data sets: {several}; give the file, or choose with --format or "
            f"--split (pgx report); of your own files, the one called {LIST} is meant"
        )
    if options.format is not None and len(every) == 1:
        return options.format, every[0]  # its records will say what they lack
    columns = "; ".join(f"{rows.where} has {', '.join(map(repr, list(_first(rows))[:8]))}" for rows in every[:3])
    raise UsageError(
        f"{data}: {columns or 'no JSON, parquet or Arrow file with records'}: no known data set; "
        f"say which it is with --format {'|'.join(FORMATS)} (report, tune, diff), or give records of 'image', 'prompt' and 'answer'"
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
    """`limit` of `count` indices, evenly spaced: a sorted file begins with one kind."""
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


def _unique(samples: Iterable[Sample]) -> Iterator[Sample]:
    """The samples, with a number behind an id that an earlier one has, from one record or another."""
    times: dict[str, int] = defaultdict(int)
    for sample in samples:
        times[sample.id] += 1
        yield sample if times[sample.id] == 1 else replace(sample, id=f"{sample.id}#{times[sample.id]}")
