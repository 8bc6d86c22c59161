# SPDX-License-Identifier: Apache-2.0
"""The commands that measure bundles: bench, report, diff."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgxport.cli.options import cluster_option, engine_option, json_option, threads_option
from pgxport.errors import GateError
from pgxport.terminal import fail, stages, volume_options
from pgxport.text import terminal_safe

if TYPE_CHECKING:
    from pgxport.benchmarking.measure import Work
    from pgxport.reporting.schema import Report


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path())
@click.option("-r", "--repeat", "repetitions", type=click.IntRange(1), default=5, show_default=True, help="Repetitions of each.")
@click.option("--prompt-tokens", type=click.IntRange(2), help="Length of the prompt, bos and newline included  [default: 16]")
@click.option("--new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Decode steps; no end is heeded.")
@click.option("--image", "images", multiple=True, type=click.Path(), help="An image; again for several  [default: noise]")
@click.option("--decoder-only", is_flag=True, help="Only decode steps, on random numbers, without an image or a prefill.")
@click.option("--past", help="With --decoder-only: tokens already there, as in 1100,4200  [default: image and prompt]")
@click.option("--batch", help="Answers at a time, of one image and prompt, as in 1,2,4: images and tokens a second at each.")
@engine_option
@threads_option
@volume_options
@json_option
def bench(as_json: bool, bundles: tuple[str, ...], **options: Any) -> None:
    """Measure time and memory of bundles side by side: one row a stage, and what can be told apart.

    \b
    pgx bench b-int8 b-int4 -r 5
    pgx bench b --decoder-only --past 1100,4200
    pgx bench b --batch 1,2,4
    """
    from pgxport.benchmarking.bench import bench, render

    names = ("decoder_only", "past", "batch", "prompt_tokens", "new_tokens", "images")
    work = _work(**{name: options.pop(name) for name in names})
    with stages() as progress:
        benched = bench(bundles, work, progress=progress, **options)
    click.echo(json.dumps(benched.to_json(), indent=1) if as_json else terminal_safe(render(benched)))
    if all(m.reason for m in benched.measurements):
        fail(benched.measurements[0].exit_code, f"nothing could be measured: {benched.measurements[0].reason}")


def _work(
    *,
    decoder_only: bool,
    past: str | None,
    batch: str | None,
    prompt_tokens: int | None,
    new_tokens: int,
    images: tuple[str, ...],
) -> "Work":
    """The work to measure: whole answers, batches of them, or decode steps."""
    from pgxport.benchmarking.measure import Batches, Steps, WholeAnswers, batch_sizes, lengths

    if past and not decoder_only:
        raise click.UsageError("--past goes with --decoder-only")
    if decoder_only and (prompt_tokens or images):
        raise click.UsageError("--prompt-tokens and --image belong to whole answers; with --decoder-only there is --past")
    if batch and (decoder_only or len(images) > 1):
        raise click.UsageError("--batch repeats one image and prompt; it goes with neither --decoder-only nor several --image")
    if decoder_only:
        return Steps(lengths(past), steps=new_tokens)
    prompt_tokens = prompt_tokens or WholeAnswers.prompt_tokens
    if batch:
        return Batches(batch_sizes(batch), prompt_tokens, new_tokens, images)
    return WholeAnswers(prompt_tokens, new_tokens, images)


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path())
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="A data set's file or folder (docs/reference/data.md)  [default: drawn scenes]",
)
@click.option("--format", help="What the data is, where its content does not say; a wrong one lists what there is.")
@click.option("--images", type=click.Path(path_type=Path), help="The pictures' folder, where it is not the data's.")
@click.option("--split", help="Of a data set that holds several: validation, test …")
@click.option("--prompt", help="In place of the format's, as in 'answer en {question}'.")
@click.option("--limit", type=click.IntRange(1), help="Records, evenly spaced; of the scenes: of each task  [default: all; 100]")
@click.option(
    "--reference", type=click.Path(path_type=Path), help="A checkpoint's folder, to run in transformers as the reference."
)
@click.option(
    "--gate", type=click.FloatRange(0, 1), help="End with 8 if a bundle keeps less of the reference's quality  [advice: 0.99]"
)
@click.option("--follow", type=click.IntRange(0), default=100, show_default=True, help="Samples to compare logits on.")
@click.option("--pictures", type=click.IntRange(0), default=12, show_default=True, help="Disagreements to show.")
@click.option("--max-new-tokens", type=click.IntRange(1), help="Stop an answer after so many tokens  [default: the bundle's]")
@click.option("--batch", help="Measure throughput too, so many answers at a time, as in 1,2,4.")
@click.option("--merge", is_flag=True, help="Join reports of several devices: give their report.json in place of bundles.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default="report", show_default=True, help="The folder to write.")
@engine_option
@threads_option
@cluster_option
@volume_options
@json_option
def report(
    as_json: bool, merge: bool, gate: float | None, batch: str | None, output: Path, bundles: tuple[str, ...], **options: Any
) -> None:
    """Measure accuracy against latency of bundles, and write a page to decide by.

    Stopped, it goes on where it was: what OUTPUT/measured holds is not measured again.

    \b
    pgx report b --limit 2 -o report
    pgx report b-fp16 b-int4 --data vqa/ --limit 500 --gate 0.99 -o report
    pgx report --merge jetson/report.json desktop/report.json -o both
    """
    from pgxport.benchmarking.measure import batch_sizes
    from pgxport.data.loader import DataOptions
    from pgxport.reporting.report import GATE, ReportOptions
    from pgxport.reporting.report import merge as merge_reports
    from pgxport.reporting.report import report as measure

    data = DataOptions(**{name: options.pop(name) for name in ("data", "format", "images", "split", "prompt", "limit")})
    if merge:
        measured = merge_reports(list(map(Path, bundles)), output)
    else:
        batches = batch_sizes(batch) if batch else ()
        given = ReportOptions(bundles, output, data, gate=GATE if gate is None else gate, batch=batches, **options)
        with stages() as progress:
            measured = measure(given, progress=progress)
    click.echo(measured.model_dump_json(indent=1) if as_json else render_report(measured, output))
    _check_report(measured, gate, output)


def render_report(report: "Report", output: Path) -> str:
    """The advice of a report, device by device, and what was written."""
    lines = []
    for device in report.devices:
        lines += [
            f"{device.name}:",
            *(f"  {remark}" for remark in device.data.remarks),
            *(f"  {finding.text}" for finding in device.verdict),
        ]
    lines += [
        f"wrote {output}/report.html, report.md, report.json, results.csv, chart.svg and chart.png",
        f"try: open {output}/report.html    pgx report --merge {output}/report.json OTHER/report.json -o both",
    ]
    return "\n".join(map(terminal_safe, lines))


def _check_report(report: "Report", gate: float | None, output: Path) -> None:
    """End with 8 if a bundle is below the gate, and with the first failure's code if nothing was measured."""
    from pgxport.reporting.advice import gate_failures

    if gate is not None and (failures := [line for device in report.devices for line in gate_failures(device)]):
        click.echo(terminal_safe("\n".join(failures[:20])), err=True)
        raise GateError(f"below the gate of {gate:.4g}; {output}/report.html shows the answers")
    failed = [row for device in report.devices for row in device.rows if row.status == "failed"]
    if len(failed) == sum(len(device.rows) for device in report.devices):
        fail(failed[0].exit_code or 1, f"nothing could be measured: {failed[0].reason}")


@click.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option(
    "--data", type=click.Path(path_type=Path), help="A data set's file or folder (docs/reference/data.md) to ask both bundles."
)
@click.option("--format", help="What the data is, where its content does not say.")
@click.option("--limit", type=click.IntRange(1), help="Records, evenly spaced; without --data of the drawn scenes, of each task.")
@click.option("--gate", type=click.FloatRange(0, 1), help="End with 8 if the second keeps less of the first's quality.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Keep the report of both here  [default: nowhere]")
@engine_option
@threads_option
@volume_options
@json_option
def diff(as_json: bool, first: Path, second: Path, **options: Any) -> None:
    """Compare two bundles, or two reports: what changed, and what it cost.

    \b
    pgx diff b-fp32 b-int4
    pgx diff b-fp32 b-int4 --limit 20 --gate 0.99
    pgx diff last-week/report.json report.json --gate 0.99
    """
    from pgxport.reporting.diff import DiffOptions, diff

    with stages() as progress:
        compared = diff(DiffOptions(first, second, **options), progress=progress)
    click.echo(json.dumps(compared.to_json(), indent=1) if as_json else terminal_safe(compared.render()))
    if compared.failures:
        click.echo(terminal_safe("\n".join(compared.failures[:20])), err=True)
        raise GateError(f"{second} keeps too little of {first}'s quality")
