# SPDX-License-Identifier: Apache-2.0
"""pgx report: accuracy against latency of bundles, measured in one shared pass, from samples to files."""

import datetime
import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pgxport import __version__
from pgxport.benchmarking.bench import bench, labels, measurement_json
from pgxport.benchmarking.measure import Batches
from pgxport.benchmarking.worker import Measurement, Progress
from pgxport.bundle.reader import Bundle
from pgxport.data.loader import DataOptions, DataSet, load
from pgxport.errors import PgxError, UsageError
from pgxport.machine.conditions import describe_machine
from pgxport.reporting import advice, chart, disagreements, files, results, schema
from pgxport.reporting.asking import bundle_facts
from pgxport.reporting.cluster_pass import NodeResults, cluster_pass
from pgxport.reporting.environment import board, environment
from pgxport.reporting.measured import Conditions, answer_of, keys, measured_folder
from pgxport.reporting.shared_pass import ReportSubject, ReportWork, shared_pass
from pgxport.reporting.transformers_subject import checkpoint_facts, require_reference
from pgxport.runners.tokenizer import PromptTokenizer

GATE = 0.99
FOLLOW = 100
PICTURES = 12
REPETITIONS = 3  # of each batch size
EXACT = ("float32", "float16", "bfloat16")  # the dtypes of a bundle that may be the reference, the best first


@dataclass(frozen=True)
class ReportOptions:
    """What to measure. Names and meanings are the command's flags.

    Attributes:
        reference: A checkpoint's folder, to be run in transformers.
        gate: The share of the reference's quality that a bundle has to keep.
        follow: How many samples are compared token by token, along the reference's answers.
        pictures: Disagreements to show.
        batch: Answers at a time, to measure throughput at as well.
        cluster: The address of a Ray cluster, over which the samples are spread (docs/cluster.md).
        first_is_reference: Take the first bundle as the reference, whatever it is.
    """

    bundles: tuple[str, ...]
    output: Path
    data: DataOptions = DataOptions()  # noqa: RUF009
    reference: Path | None = None
    gate: float = GATE
    follow: int = FOLLOW
    pictures: int = PICTURES
    max_new_tokens: int | None = None
    engine: str = "cpu"
    threads: int | None = None
    first_is_reference: bool = False
    batch: tuple[int, ...] = ()
    cluster: str | None = None


def report(options: ReportOptions, *, progress: Progress | None = None) -> schema.Report:
    """Measure what is not measured yet, and write the whole report.

    Raises:
        UsageError: the output is something else, an extra is missing, or the data's format is uncertain.
        InputError: the data is not sound.
    """
    chart.require_charts()  # before hours of measuring rather than after
    if options.batch and options.cluster is not None:
        raise UsageError("--batch measures this machine, and --cluster others; run pgx bench --batch on each")
    if options.reference:
        require_reference()
    data = load(options.data)
    _warn_of_special_tokens(options.bundles, data)
    sample_keys = keys(data.samples)
    with measured_folder(options.output) as folder:
        here = describe_machine()
        subjects = _subjects(options, here)
        reference = 0 if options.first_is_reference else _reference(subjects)
        unique = dict(zip(sample_keys, data.samples, strict=True))
        work = ReportWork(unique, frozenset(_evenly(list(unique), options.follow)), reference, options.max_new_tokens)
        nodes = _measure(options, subjects, work, folder, here, progress)
    if progress:
        progress("working out intervals")
    devices, album = _devices(options, data, sample_keys, nodes, reference)
    if options.batch:
        devices = (_batched(devices[0], options, progress), *devices[1:])
    made = schema.Report(pgxport=__version__, created=_now(), devices=devices)
    files.write(made, album.files, options.output)
    return made


def _warn_of_special_tokens(bundles: Sequence[str], data: DataSet) -> None:
    """Say once which special tokens the prompts spell: what the processes that answer have to say is not shown."""
    for path in bundles:
        try:
            bundle = Bundle.open(path, verify=False)
            words = PromptTokenizer(bundle.path / "tokenizer.json", bundle.manifest.token_ids)
        except PgxError:  # that of a bundle which cannot be used is in the report
            continue
        words.warn_of_special(sample.prompt for sample in data.samples)
        return


def _subjects(options: ReportOptions, here: dict[str, Any]) -> list[ReportSubject]:
    labels = _labels(options.bundles)
    subjects = [_bundle(label, path, options, here) for label, path in zip(labels, options.bundles, strict=True)]
    if options.reference:
        # Without a bundle that has a mask decoder, masks keep their codes.
        masks = next((str(m) for path in options.bundles if (m := _mask_decoder(Path(path)))), None)
        facts = checkpoint_facts(options.reference)
        request = {"checkpoint": str(options.reference), "mask_decoder": masks, "threads": options.threads}
        subjects.append(
            ReportSubject(f"{facts['name']} (transformers)", request, facts, _conditions(facts["digest"], options, here))
        )
    copies: dict[str, int] = {}
    for i, subject in enumerate(subjects):
        if subject.conditions:
            copies[subject.conditions.digest] = number = copies.get(subject.conditions.digest, 0) + 1
            subjects[i] = replace(subject, conditions=replace(subject.conditions, copy_number=number))
    return subjects


def _bundle(label: str, path: str, options: ReportOptions, here: dict[str, Any]) -> ReportSubject:
    request = {"bundle": path, "engine": options.engine, "threads": options.threads}
    try:
        facts = bundle_facts(Bundle.open(path, verify=False))  # its own process verifies it
    except PgxError as error:
        return ReportSubject(label, request, {}, None, str(error), error.exit_code)
    return ReportSubject(label, request, facts, _conditions(facts["digest"], options, here))


def _conditions(digest: str, options: ReportOptions, here: dict[str, Any]) -> Conditions:
    return Conditions(
        digest=digest,
        copy_number=1,
        engine=options.engine,
        threads=options.threads,
        max_new_tokens=options.max_new_tokens,
        processor=here["processor"] if options.cluster is None else None,
        versions={p: v for p, v in here["versions"].items() if p != "python"},
    )


def _labels(paths: Sequence[str]) -> list[str]:
    """Return the folders' names where those are enough to tell them apart, else the paths."""
    names = [Path(path).resolve().name for path in paths]
    unique = len(set(names)) == len({str(Path(p).resolve()) for p in paths})
    # A name that is no UTF-8 cannot stand in a report as it is.
    return labels(_utf8(name) for name in (names if unique else paths))


def _reference(subjects: Sequence[ReportSubject]) -> int:
    """Return the number of the checkpoint, else of the most exact bundle of floats, else of the first."""
    for i, subject in enumerate(subjects):
        if "checkpoint" in subject.request:
            return i
    for dtype in EXACT:
        for i, subject in enumerate(subjects):
            if subject.facts and set(subject.facts["stored"]) <= set(EXACT) and subject.facts["matrices"] == dtype:
                return i
    return 0


def _mask_decoder(path: Path) -> Path | None:
    try:
        bundle = Bundle.open(path)
    except PgxError:
        return None
    return bundle.graph("mask_decoder") if "mask_decoder" in bundle.manifest.graphs else None


def _measure(
    options: ReportOptions,
    subjects: Sequence[ReportSubject],
    work: ReportWork,
    folder: Path,
    here: dict[str, Any],
    progress: Progress | None,
) -> list[NodeResults]:
    """Measure on this machine, or on each node of the cluster."""
    if options.cluster is not None:
        return cluster_pass(
            subjects, work, folder, options.cluster, engine=options.engine, threads=options.threads, progress=progress
        )
    runs = shared_pass(subjects, work, folder, engine=options.engine, progress=progress)
    return [NodeResults(board() or here["processor"], environment(options.engine, options.threads, here), runs)]


def _devices(
    options: ReportOptions, data: DataSet, sample_keys: list[str], nodes: list[NodeResults], reference: int
) -> tuple[tuple[schema.Device, ...], disagreements.Album]:
    """Return a device for each node: the first is complete, the others have the same answers and their times."""
    first, album = _device(options, data, sample_keys, nodes[0], reference)
    devices = [first]
    for node in nodes[1:]:
        rows = results.retimed(first.rows, node.runs, sample_keys)
        pairs = results.retimed_pairs(first.pairs, node.runs, sample_keys)
        own = {"name": node.name, "environment": node.environment, "rows": rows, "pairs": pairs, "disagreements": ()}
        device = first.model_copy(update=own)
        devices.append(device.model_copy(update={"verdict": advice.findings(device)}))
    return tuple(devices), album


def _batched(device: schema.Device, options: ReportOptions, progress: Progress | None) -> schema.Device:
    """Add the throughput of each complete bundle, measured anew each time, for it takes seconds."""
    named = dict(zip(_labels(options.bundles), options.bundles, strict=True))
    paths = {row.label: named[row.label] for row in device.rows if row.status == "ok" and row.label in named}
    work, engine, threads = Batches(options.batch), options.engine, options.threads
    done = bench(list(paths.values()), work, repetitions=REPETITIONS, engine=engine, threads=threads, progress=progress)
    measured = dict(zip(paths, done.measurements, strict=True))
    return device.model_copy(update={"rows": tuple(_with_batches(row, measured.get(row.label)) for row in device.rows)})


def _with_batches(row: schema.Row, m: Measurement | None) -> schema.Row:
    if m is None:
        return row
    if m.reason:
        return row.model_copy(update={"notes": (*row.notes, f"no throughput: {m.reason}")})
    batches = measurement_json(m)["batches"]
    return row.model_copy(update={"batches": tuple(schema.Batch(size=int(size), **b) for size, b in batches.items())})


def _device(
    options: ReportOptions, data: DataSet, sample_keys: list[str], node: NodeResults, reference: int
) -> tuple[schema.Device, disagreements.Album]:
    runs = node.runs
    rows = results.rows(data.samples, sample_keys, runs, reference)
    whole = {run.label: run for run, row in zip(runs, rows, strict=True) if row.status == "ok"}
    album, shown = disagreements.Album(), tuple[schema.Disagreement, ...]()
    name = runs[reference].label
    if name in whole and options.pictures:
        answers = {label: [answer_of(run.asked[key]) for key in sample_keys] for label, run in whole.items()}
        shown = disagreements.disagreements(data.samples, answers, name, options.pictures, album)
    device = schema.Device(
        name=node.name,
        command=_command(options),
        environment=node.environment,
        data=_data(data),
        reference=name,
        gate=options.gate,
        rows=rows,
        pairs=results.pairs(data.samples, sample_keys, runs),
        verdict=(),
        disagreements=shown,
    )
    return device.model_copy(update={"verdict": advice.findings(device)}), album


def _data(data: DataSet) -> schema.Data:
    tasks: dict[str, int] = {}
    digest = hashlib.sha256()
    for sample, key in zip(data.samples, keys(data.samples), strict=True):
        tasks[sample.task] = tasks.get(sample.task, 0) + 1
        digest.update(repr((key, sample.task, sample.metric, sample.answers, sample.regions, sample.background)).encode())
    return schema.Data(
        format=data.format,
        source=_utf8(data.source),
        digest=digest.hexdigest(),
        samples=len(data.samples),
        tasks=tasks,
        records=data.records,
        skipped=data.skipped,
        unusable=len(data.unusable),
        remarks=tuple(map(_utf8, data.remarks)),
    )


def _command(options: ReportOptions) -> str:
    d = options.data
    flags = {
        "--data": d.data, "--format": d.format, "--images": d.images, "--split": d.split, "--prompt": d.prompt, "--limit": d.limit,
        "--reference": options.reference, "--gate": options.gate if options.gate != GATE else None,
        "--follow": options.follow if options.follow != FOLLOW else None,
        "--pictures": options.pictures if options.pictures != PICTURES else None,
        "--max-new-tokens": options.max_new_tokens, "--engine": options.engine if options.engine != "cpu" else None,
        "--threads": options.threads, "--batch": ",".join(map(str, options.batch)) or None, "--cluster": options.cluster,
    }  # fmt: skip
    given = [word for flag, value in flags.items() if value is not None for word in (flag, str(value))]
    words = shlex.join(["pgx", "report", *options.bundles, *given, "-o", str(options.output)])
    return _utf8(words)


def _utf8(text: str) -> str:
    """The text with a mark for what UTF-8 cannot encode: a path may hold any bytes, and a report may not."""
    return text.encode("utf-8", "replace").decode()


def _evenly(items: list[str], count: int) -> list[str]:
    return items if count >= len(items) else [items[i * len(items) // count] for i in range(count)]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def merge(paths: Sequence[Path], output: Path) -> schema.Report:
    """Join reports of several devices into one.

    Raises:
        UsageError: fewer than two reports are given.
    """
    chart.require_charts()
    if len(paths) < 2:
        raise UsageError("--merge joins two or more report.json; give them after it")
    read = [files.read(path) for path in paths]
    pictures: dict[str, bytes] = {}
    for path, one in zip(paths, read, strict=True):
        pictures |= files.read_pictures(one, path if path.is_dir() else path.parent)
    devices = disagreements.within_budget([device for one in read for device in one.devices], pictures)
    made = schema.Report(pgxport=__version__, created=_now(), devices=devices)
    shown = disagreements.named([d for device in devices for d in device.disagreements])
    files.check_output(output)
    files.write(made, {name: content for name, content in pictures.items() if name in shown}, output)
    return made
