# SPDX-License-Identifier: Apache-2.0
"""The one way from a path to samples, for every command: tables, their format, their records.

The content of a file tells its format, a row of FORMATS; where two rows fit, or none, the user chooses.
Without a path: drawn scenes.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path

from pgxport.data.documents import LIST, tables
from pgxport.data.formats import FORMATS, Context
from pgxport.data.records import ANSWER_KEYS, IMAGE_KEYS, PROMPT_KEYS, Pictures, Record, Rows
from pgxport.data.scenes import calibration_scene, scene_samples
from pgxport.errors import InputError, UsageError, choose
from pgxport.metrics.metrics import with_caption_metric
from pgxport.metrics.sample import Sample
from pgxport.text import listed, size

MAX_EMBEDDED = 4 << 30  # bytes of pictures that stand in the records themselves
SCENES = 100  # of each task, where nothing else is asked for
MOST_UNUSABLE = 0.1  # of the records taken; with more of them the rest is not what the data was meant to be
FIRST = 20  # records of a table, among which the first of a known format decides

Accept = Callable[[Sample], object]  # raises InputError for a sample that the caller cannot use


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
class UnusableRecord:
    """A record that gives no sample, and why; the text begins with its place."""

    where: str
    why: str


@dataclass(frozen=True)
class DataSet:
    """Samples, and what they were taken from.

    Attributes:
        records: In the data, before the limit.
        taken: Records of those, after the limit.
        skipped: Records among those taken that give no sample: the unusable ones, and those that the format
            does not ask (ScienceQA's without a picture).
        notes: What was decided for the data as a whole.
    """

    format: str
    source: str
    samples: tuple[Sample, ...]
    records: int
    taken: int
    skipped: int
    unusable: tuple[UnusableRecord, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What to know before the figures: the first five records that cannot be used and why, then the notes."""
        left_out = f"{len(self.unusable)} of the records cannot be used and are left out: {named(self.unusable)}"
        return (left_out, *self.notes) if self.unusable else self.notes

    def checked(self) -> "DataSet":
        """Return the same.

        Raises:
            InputError: more than MOST_UNUSABLE of the records taken cannot be used, or none can be asked.
        """
        if self.unusable and (len(self.unusable) > MOST_UNUSABLE * self.taken or not self.samples):
            raise InputError(
                f"{self.source}: {len(self.unusable)} of {self.taken} records of format {self.format} cannot be used, and at most "
                f"{MOST_UNUSABLE:.0%} may be so: {named(self.unusable)}"
            )
        if not self.samples:
            raise InputError(
                f"{self.source}: none of {self.taken} records of format {self.format} can be asked: no picture, or nothing to "
                f"find; give other data"
            )
        return self


def load(options: DataOptions, accept: Accept | None = None) -> DataSet:
    """Read evenly spaced samples, each with its true answer, to be judged; every picture is decoded once.

    Raises:
        UsageError: there is no such data, its format or split is not certain, or a library is missing.
        InputError: more than MOST_UNUSABLE of the records cannot be used, or none can; the message names file,
            record, value and fix of the first.
    """
    if options.format is not None:
        choose("format", options.format, FORMATS)
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit {options.limit}: give at least 1")
    if options.data is None:
        scenes = scene_samples(options.limit or SCENES)
        return DataSet("scenes", "embedded scenes, test split", scenes, len(scenes), len(scenes), 0)
    name, rows, context = _open(options, options.data, judged=True)
    taken = Taking(rows, context, decode=True, accept=accept)
    samples, notes = with_caption_metric(taken.all(_evenly(len(rows), options.limit)))
    return taken.data_set(name, samples, notes)


def first_samples(data: Path | None, count: int, accept: Accept | None = None) -> DataSet:
    """Read the first `count` usable samples in order, with or without answers; without data, calibration scenes.

    Raises:
        UsageError: there is no such data, or its format is not certain.
        InputError: more than MOST_UNUSABLE of the records up to there cannot be used, or none can.
    """
    if data is None:
        scenes = tuple(calibration_scene(index) for index in range(count))
        return DataSet("scenes", "embedded scenes, calibration split", scenes, count, count, 0)
    name, rows, context = _open(DataOptions(data), data, judged=False)
    taken = Taking(rows, context, decode=True, accept=accept)
    return taken.data_set(name, taken.all(range(len(rows)), count))


def all_pictures(data: Path) -> tuple[dict[Path | bytes, str], tuple[UnusableRecord, ...]]:
    """Find the distinct pictures of all records, in the data's order, each with the id of its first sample.

    Returns also the records that cannot be used. No picture is decoded.

    Raises:
        UsageError: there is no such data, or its format is not certain.
        InputError: more than MOST_UNUSABLE of the records cannot be used, or none can.
    """
    name, rows, context = _open(DataOptions(data), data, judged=False)
    taken = Taking(rows, context, decode=False)
    found = taken.data_set(name, taken.all(range(len(rows))))
    ids: dict[Path | bytes, str] = {}
    for sample in found.samples:
        assert isinstance(sample.image, Path | bytes), "Bug: a record's picture is drawn"
        ids.setdefault(sample.image, sample.id)
    return ids, found.unusable


def _open(options: DataOptions, data: Path, *, judged: bool) -> tuple[str, Rows, Context]:
    """The one table that is meant, the name of its format, and what building its samples needs."""
    name, rows = _chosen(options, data)
    root = options.images or (data if data.is_dir() else data.parent)
    if not root.is_dir():
        raise UsageError(f"--images {root}: is not a folder")
    known = FORMATS[name]
    return name, rows, Context(known, Pictures(root), _template(options.prompt or known.prompt), judged)


@dataclass
class Taking:
    """Takes records one after the other, and remembers which give no sample, and why.

    Args:
        decode: Whether a picture has to decode; it takes some milliseconds, and an answer about it a hundred.
        accept: What else a sample has to pass.
    """

    rows: Rows
    context: Context
    decode: bool
    accept: Accept | None = None
    taken: int = 0
    skipped: int = 0
    unusable: list[UnusableRecord] = field(default_factory=list)

    def all(self, indices: Iterable[int], count: int | None = None) -> tuple[Sample, ...]:
        """Return the samples of these records, or the first `count` of them."""
        return tuple(islice(_unique(chain.from_iterable(self._samples(indices))), count))

    def _samples(self, indices: Iterable[int]) -> Iterator[list[Sample]]:
        count = embedded = 0
        for record in self.rows.at(indices):
            samples = self._usable(record)
            self.taken += 1
            self.skipped += not samples
            count += len(samples)
            embedded += sum(len(sample.image) for sample in samples if isinstance(sample.image, bytes))
            if embedded > MAX_EMBEDDED:
                raise UsageError(
                    f"{self.rows.where}: its first {count} pictures have {size(embedded)}; take fewer with "
                    f"--limit or --samples, or give a part of the data"
                )
            yield samples

    def _usable(self, record: Record) -> list[Sample]:
        """The samples of a record; none where it is not asked, or cannot be used."""
        try:
            if record.fault:
                raise InputError(record.fault)
            samples = list(self.context.format.samples(record, self.context))
            for sample in samples:
                if self.decode and isinstance(sample.image, Path | bytes):
                    self.context.pictures.size(sample.image, record.where)
                if self.accept:
                    self.accept(sample)
        except InputError as error:
            why = str(error)
            self.unusable.append(UnusableRecord(record.where, why if record.where in why else f"{record.where}: {why}"))
            return []
        return samples

    def data_set(self, name: str, samples: tuple[Sample, ...], notes: Sequence[str] = ()) -> DataSet:
        """Return what was taken.

        Raises:
            InputError: too many records cannot be used, or none can be asked.
        """
        unusable, every = tuple(self.unusable), len(self.rows)
        return DataSet(name, self.rows.where, samples, every, self.taken, self.skipped, unusable, tuple(notes)).checked()


def named(unusable: Sequence[UnusableRecord]) -> str:
    """Name the first five records that cannot be used, and why, then count the others."""
    return listed((record.why for record in unusable), between="; ")


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
    for rows in every:
        first = list(rows.at(range(min(FIRST, len(rows)))))
        if first and all(record.fault for record in first):
            why = listed((record.fault for record in first if record.fault), between="; ")
            raise InputError(f"{rows.where}: none of the first {len(first)} records can be read: {why}")
    raise UsageError(_seen(every) if every else f"{data}: holds no JSON, parquet or Arrow file")


def _formats(rows: Rows) -> list[str]:
    """The formats that fit the first record of which any does."""
    records = rows.at(range(min(FIRST, len(rows))))
    fitting = ([name for name, known in FORMATS.items() if known.fits(record.fields)] for record in records if record.fields)
    return next(filter(None, fitting), [])


def _seen(every: Sequence[Rows]) -> str:
    """What data of no known format has, and what it could have."""
    tables = "; ".join(f"{rows.where} has {_keys(rows)}" for rows in every[:3])
    own = ", ".join(f"{keys[0]!r} (or {' or '.join(map(repr, keys[1:]))})" for keys in (IMAGE_KEYS, PROMPT_KEYS, ANSWER_KEYS))
    return (
        f"{tables}: no known data set; say which it is with --format {'|'.join(FORMATS)} (report, tune, diff), or give records with the "
        f"keys {own}, or COCO's JSON: 'images' (of 'id', 'file_name') and 'annotations' (of 'image_id', and 'bbox' or 'caption')"
    )


def _keys(rows: Rows) -> str:
    first = next((record for record in rows.at(range(min(FIRST, len(rows)))) if not record.fault), None)
    return "no record" if first is None else first.keys or "no key"


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
