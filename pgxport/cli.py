# SPDX-License-Identifier: Apache-2.0
"""The command `pgx`: one thin function a command. Results go to stdout, progress to stderr and only to a terminal."""

import json as jsonlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import click

from pgxport import __version__
from pgxport.errors import PgxError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
engine_option = click.option("--engine", default="cpu", show_default=True, help="The engine to run in; no other is tried.")
threads_option = click.option("--threads", type=click.IntRange(1), help="Threads of the engine  [default: one a core]")


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="pgx")
def cli() -> None:
    """Export PaliGemma and PaliGemma 2 to ONNX, and run what was exported.

    \b
    Try first:   pgx demo
    Then:        pgx export --size tiny --res 224 -o b
                 pgx run b --image scene.png --prompt "detect red circle" --save out.png
    """


@cli.command()
@click.option("--size", help="A published size, 3b, 10b or 28b, or tiny for the embedded checkpoint.")
@click.option("--res", type=int, help="Pixels a side: 224, 448 or 896; tiny: 112 or 224.")
@click.option("--family", type=click.Choice(["paligemma", "paligemma2"]), default="paligemma2", show_default=True)
@click.option("--variant", default="pt", show_default=True, help="pt, mix or ft-TASK, as the hub names them.")
@click.option("--checkpoint", help="A folder in hub layout, or a hub id, in place of the published one.")
@click.option("--adapter", type=click.Path(), help="A LoRA adapter in PEFT layout, merged as the checkpoint is read.")
@click.option("--masks", type=click.Path(dir_okay=False), help="vae-oid.npz, for the masks of `segment` (tiny brings its own).")
@click.option("--precision", default="fp32", show_default=True, help="How weights are stored; a wrong one lists what there is.")
@click.option(
    "--recipe", type=click.Path(dir_okay=False), help="A TOML file that says it weight by weight (docs/reference/recipes.md)."
)
@click.option("--calibration", type=click.Path(dir_okay=False), help="What `pgx calibrate` wrote, for recipes that need it.")
@click.option("--target", default="cpu", show_default=True, help="The engine to write for; a wrong one lists what there is.")
@click.option("--context", type=click.IntRange(1), help="Longest prefix and answer together, in tokens  [default: image + 512]")
@click.option(
    "--local-window", type=click.Choice(["hf", "none"]), default="hf", show_default=True, help="Gemma 2's window: hf or none."
)
@click.option(
    "--parity", type=click.IntRange(0), default=2, show_default=True, help="Scenes to compare a rounded bundle on; 0: none."
)
@click.option("--gate", type=click.FloatRange(0, 1), help="Write nothing if fewer tokens agree with the checkpoint, as 0.99.")
@click.option("-o", "--output", type=click.Path(), help="The folder to write  [default: named after the model]")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
@click.option("--dry-run", is_flag=True, help="Check everything and say how large each file would be; write nothing.")
@json_option
def export(as_json: bool, dry_run: bool, **options: Any) -> None:
    """Write a bundle from a checkpoint.

    \b
    pgx export --size tiny --res 224 -o b
    pgx export --checkpoint my-finetune/ --precision int8 --gate 0.99 -o b
    """
    import time

    with needs("export"):
        from pgxport.exporter.export import ExportOptions, export
        from pgxport.exporter.export import dry_run as check

    if dry_run:
        with progress_bar() as progress:  # of a download, if it comes to one
            sizes = check(ExportOptions(**options), progress=progress)
        for line in [jsonlib.dumps({"files": sizes}, indent=1)] if as_json else [f"{n}: {size(b)}" for n, b in sizes.items()]:
            click.echo(line)
        if not as_json:
            click.echo(f"would write {size(sum(sizes.values()))}, and wrote nothing; try: the same without --dry-run")
        return
    start = time.perf_counter()
    with progress_bar() as progress:
        bundle = export(ExportOptions(**options), progress=progress)
    made = {
        "bundle": str(bundle.path),
        "bytes": bundle.nbytes,
        "seconds": round(time.perf_counter() - start, 2),
        "peak_rss_bytes": peak_rss(),
        "files": {name: info.size for name, info in bundle.manifest.files.items()},
        "parity": bundle.manifest.parity.model_dump() if bundle.manifest.parity else None,
    }
    if as_json:
        click.echo(jsonlib.dumps(made, indent=1))
        return
    click.echo(f"wrote {bundle.path}: {size(bundle.nbytes)} in {made['seconds']} s, peak memory {size(peak_rss())}")
    if parity := bundle.manifest.parity:
        click.echo(
            f"against the checkpoint, {parity.positions} tokens of {parity.scenes} scenes: {parity.agreement:.1%} of the likeliest "
            f"tokens the same, KL {parity.kl:.2g} nats (worst {parity.kl_worst:.2g})"
        )
        for path, decibels in list(parity.sqnr.items())[:5]:
            click.echo(f"  {decibels:6.1f} dB  {path}")
    if "mask_decoder" not in bundle.manifest.graphs:
        click.echo("without a mask decoder: `segment` answers with boxes and codes only; --masks vae-oid.npz adds it")
    shown = options["output"] or bundle.path.name
    click.echo(f'try: pgx run {shown} --image photo.jpg --prompt "caption en"    pgx inspect {shown}')


@cli.command()
@click.option("--size", help="A published size, 3b, 10b or 28b, or tiny for the embedded checkpoint.")
@click.option("--res", type=int, help="Pixels a side: 224, 448 or 896; tiny: 112 or 224.")
@click.option("--family", type=click.Choice(["paligemma", "paligemma2"]), default="paligemma2", show_default=True)
@click.option("--checkpoint", type=click.Path(), help="A folder in hub layout, in place of a published model.")
@click.option("--masks", type=click.Path(dir_okay=False), help="vae-oid.npz, if the bundle is to have a mask decoder.")
@click.option("--precision", default="fp32", show_default=True, help="How weights are stored; a wrong one lists what there is.")
@click.option("--target", default="cpu", show_default=True, help="The engine to write for; a wrong one lists what there is.")
@click.option("--context", type=click.IntRange(1), help="Longest prefix and answer together, in tokens  [default: image + 512]")
@click.option(
    "--local-window", type=click.Choice(["hf", "none"]), default="hf", show_default=True, help="Gemma 2's window: hf or none."
)
@click.option("--board", help="Only this board, and what fits it: orin-nano-8gb, agx-orin-64gb, gpu-24gb …  [default: all]")
@json_option
def plan(as_json: bool, **options: Any) -> None:
    """Say what a bundle would take on disk and in memory, and which boards it fits. Reads no weight.

    \b
    pgx plan --size 3b --res 448 --precision fp16
    pgx plan --size 10b --res 224 --precision fp16 --board agx-orin-32gb
    """
    with needs("export"):
        from pgxport.exporter.plan import PlanOptions, plan, render

    planned = plan(PlanOptions(**options))
    click.echo(jsonlib.dumps(planned.to_json(), indent=1) if as_json else render(planned))


@cli.command()
@click.argument("source", required=False)
@click.option("--size", help="A published size, 3b, 10b or 28b, or tiny for the embedded checkpoint, in place of SOURCE.")
@click.option("--res", type=int, help="Pixels a side: 224, 448 or 896; tiny: 112 or 224.")
@click.option("--family", type=click.Choice(["paligemma", "paligemma2"]), default="paligemma2", show_default=True)
@click.option("--variant", default="pt", show_default=True, help="pt, mix or ft-TASK, as the hub names them.")
@click.option("--adapter", type=click.Path(), help="A LoRA adapter in PEFT layout, as it will be given to the export.")
@click.option("--data", type=click.Path(), help="Samples: a JSONL file, or a folder of images and texts  [default: drawn scenes]")
@click.option("--samples", type=click.IntRange(1), default=32, show_default=True, help="How many to take, from the beginning.")
@click.option("--moments/--no-moments", default=True, show_default=True, help="Keep the second moments, which GPTQ needs.")
@click.option(
    "-o", "--output", type=click.Path(), default="calibration.safetensors", show_default=True, help="The file to write."
)
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@json_option
def calibrate(as_json: bool, **options: Any) -> None:
    """Run samples through a model, and write what quantization has to know about its activations.

    SOURCE is a checkpoint or a hub id, run layer by layer (stopped, it goes on where it was), or a float bundle, run whole.

    \b
    pgx calibrate --size tiny --res 224 -o calibration.safetensors
    pgx calibrate my-finetune/ --data samples.jsonl --samples 64
    """
    import time

    with needs("export"):
        from pgxport.calib.calibrate import CalibrateOptions, calibrate

        start = time.perf_counter()
        with progress_bar() as progress:
            made = calibrate(CalibrateOptions(**options), progress=progress)
    about, nbytes, seconds = made.about, made.path.stat().st_size, round(time.perf_counter() - start, 2)
    if as_json:
        found = {"file": str(made.path), "bytes": nbytes, "sha256": made.digest, "seconds": seconds, "peak_rss_bytes": peak_rss()}
        click.echo(jsonlib.dumps(found | about.model_dump(exclude={"inputs"}), indent=1))
        return
    click.echo(f"wrote {made.path}: {size(nbytes)} in {seconds} s, peak memory {size(peak_rss())}")
    click.echo(f"{about.samples} samples: {about.prefix_tokens} tokens of prefix, {about.suffix_tokens} of suffix")
    of_bundle = about.engine == "onnxruntime"
    named = {"checkpoint": "CHECKPOINT" if of_bundle else options["source"], "size": options["size"], "res": options["res"]}
    model = " ".join(f"--{option} {value}" for option, value in named.items() if value)
    click.echo(f"try: pgx export {model} --precision int4 --calibration {made.path}")


@cli.command()
@click.argument("bundle", type=click.Path())
@click.option("--image", "images", multiple=True, required=True, type=click.Path(), help="An image; again for several in order.")
@click.option("--prompt", required=True, help='"caption en", "ocr", "answer en …", "detect a ; b", "segment a".')
@click.option("--max-new-tokens", type=click.IntRange(1), help="Stop after so many tokens  [default: the bundle's]")
@click.option("--low-memory", is_flag=True, help="Hold the vision encoder or the decoder, never both; slower to the first token.")
@click.option("--save", type=click.Path(dir_okay=False), help="Draw boxes and masks on the image and save it here.")
@engine_option
@threads_option
@json_option
def run(
    bundle: str,
    images: tuple[str, ...],
    prompt: str,
    max_new_tokens: int | None,
    low_memory: bool,
    save: str | None,
    engine: str,
    threads: int | None,
    as_json: bool,
) -> None:
    """Answer a prompt about an image.

    \b
    pgx run b --image scene.png --prompt "detect red circle" --save out.png
    """
    from pgxport.runners.draw import picture_format, save_image
    from pgxport.runners.image import load_image
    from pgxport.runners.outputs import terminal_safe
    from pgxport.runners.runner import Runner

    if save:
        picture_format(save)  # refused before the work rather than after
    with Runner.from_pretrained(bundle, engine=engine, threads=threads, low_memory=low_memory) as runner:
        picture = load_image(images[0])
        answer = runner.answer([picture, *images[1:]], prompt, max_new_tokens=max_new_tokens)
    if save:
        save_image(answer.draw(picture), save)
    if as_json:
        click.echo(jsonlib.dumps(answer.to_json() | ({"saved": save} if save else {}), indent=1))
        return
    click.echo(terminal_safe(answer.text))
    for box in answer.boxes:
        click.echo(f"  {terminal_safe(box.label) or '(no label)'}: y {box.y1:.0f}–{box.y2:.0f}, x {box.x1:.0f}–{box.x2:.0f} px")
    for mask in answer.masks:
        covered = "" if mask.mask is None else f"{int(mask.mask.sum())} px covered"
        click.echo(
            f"  mask of {terminal_safe(mask.label) or '(no label)'}: {covered or 'codes only, this bundle has no mask decoder'}"
        )
    for warning in answer.warnings:
        click.echo(f"malformed answer: {warning}", err=True)
    if answer.truncated:
        click.echo(f"stopped after {len(answer.token_ids)} tokens; --max-new-tokens allows more", err=True)
    times = ", ".join(f"{stage} {seconds * 1e3:.0f}" for stage, seconds in answer.timings.items())
    click.echo(
        f"{len(answer.token_ids)} tokens; ms: {times}" + (f"; drawn on {save}" if save else "; --save out.png draws it"), err=True
    )


@cli.command()
@click.argument("source", required=False)
@click.option("--size", help="A published size, 3b, 10b or 28b, or tiny for the embedded checkpoint, in place of SOURCE.")
@click.option("--res", type=int, help="Pixels a side: 224, 448 or 896; tiny: 112 or 224.")
@click.option("--family", type=click.Choice(["paligemma", "paligemma2"]), default="paligemma2", show_default=True)
@click.option("--variant", default="pt", show_default=True, help="pt, mix or ft-TASK, as the hub names them.")
@click.option("--adapter", type=click.Path(), help="A LoRA adapter, as it will be given to the export.")
@click.option(
    "--masks", type=click.Path(dir_okay=False), help="vae-oid.npz, where `segment` is among the tasks (tiny has its own)."
)
@click.option("--data", type=click.Path(), help="Samples to judge by: a data set's file or folder  [default: drawn scenes]")
@click.option(
    "--samples", type=click.IntRange(1), default=50, show_default=True, help="Records, evenly spaced; scenes of each task."
)
@click.option(
    "--calibration", type=click.Path(dir_okay=False), help="What `pgx calibrate` wrote; AWQ and GPTQ are tried with it."
)
@click.option("--max-loss", default="1%", show_default=True, metavar="POINTS", help="Points of the task metric that may be lost.")
@click.option("--max-latency", type=click.FloatRange(0, min_open=True), metavar="MS", help="Milliseconds of one answer.")
@click.option("--max-size", type=click.FloatRange(0, min_open=True), metavar="MB", help="Megabytes of the bundle.")
@click.option("--target", default="cpu", show_default=True, help="The engine to tune for; it has to run here.")
@click.option("--candidates", help="Schemes to try, as in w8-g128,w4-g32; a wrong one lists what there is  [default: all]")
@click.option("-o", "--output", type=click.Path(), default="recipe.toml", show_default=True, help="The recipe to write.")
@click.option("--work", type=click.Path(file_okay=False), help="Where results are kept for the next time  [default: OUTPUT.work]")
@click.option("--overwrite", is_flag=True, help="Replace a recipe that is there.")
@threads_option
@json_option
def tune(as_json: bool, max_loss: str, candidates: str | None, **options: Any) -> None:
    """Search the recipe with the smallest bundle that loses no more than it may.

    Each group of layers is measured in each scheme, mixes are proposed and measured whole; stopped, it goes on where it was.

    \b
    pgx tune --size tiny --res 112 --samples 4 --candidates w8-dynamic --max-loss 20% -o recipe.toml
    pgx tune my-finetune/ --data vqa.jsonl --calibration calibration.safetensors --max-loss 1% --max-size 1800
    """
    import time

    from pgxport.errors import GateError

    with needs("export"):
        from pgxport.tune.result import render
        from pgxport.tune.tune import TuneOptions, tune

    try:
        points = float(max_loss.strip().removesuffix("%"))
    except ValueError:
        raise click.UsageError(f"--max-loss {max_loss!r} is not a number of points; write 1% or 0.5") from None
    names = tuple(name.strip() for name in candidates.split(",")) if candidates else ()
    progress = stage_line if sys.stderr.isatty() else None
    start = time.perf_counter()
    found = tune(TuneOptions(max_loss=points, candidates=names, **options), progress=progress)
    if progress:
        progress("")
    seconds = round(time.perf_counter() - start, 2)
    if as_json:
        click.echo(jsonlib.dumps(found.to_json() | {"seconds": seconds, "peak_rss_bytes": peak_rss()}, indent=1))
    else:
        click.echo(render(found))
    if refusal := found.refusal():
        raise GateError(refusal)
    if as_json:
        return
    given = {"checkpoint": options["source"], "size": options["size"], "res": options["res"], "adapter": options["adapter"]}
    given |= {key: options[key] for key in ("family", "variant") if options["size"] not in (None, "tiny")}
    given |= {"masks": options["masks"], "recipe": options["output"], "calibration": options["calibration"]}
    words = " ".join(f"--{option} {value}" for option, value in given.items() if value)
    click.echo(f"wrote {options['output']} in {seconds} s, peak memory {size(peak_rss())}")
    click.echo(f"try: pgx export {words} -o tuned")


@cli.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path())
@click.option("-r", "--repeat", "repetitions", type=click.IntRange(1), default=5, show_default=True, help="Repetitions of each.")
@click.option("--prompt-tokens", type=click.IntRange(2), help="Length of the prompt, bos and newline included  [default: 16]")
@click.option("--new-tokens", type=click.IntRange(1), default=64, show_default=True, help="Decode steps; no end is heeded.")
@click.option("--image", "images", multiple=True, type=click.Path(), help="An image; again for several  [default: noise]")
@click.option("--decoder-only", is_flag=True, help="Only decode steps, on random numbers, without an image or a prefill.")
@click.option("--past", help="With --decoder-only: tokens already there, as in 1100,4200  [default: image and prompt]")
@engine_option
@threads_option
@json_option
def bench(as_json: bool, decoder_only: bool, past: str | None, bundles: tuple[str, ...], **options: Any) -> None:
    """Measure time and memory of bundles side by side: one row a stage, and what can be told apart.

    \b
    pgx bench b-int8 b-int4 -r 5
    pgx bench b --decoder-only --past 1100,4200
    """
    from pgxport.report.bench import bench, render
    from pgxport.report.measure import Answers, Steps, lengths
    from pgxport.runners.outputs import terminal_safe

    prompt_tokens, new_tokens, images = options.pop("prompt_tokens"), options.pop("new_tokens"), options.pop("images")
    if past and not decoder_only:
        raise click.UsageError("--past goes with --decoder-only")
    if decoder_only and (prompt_tokens or images):
        raise click.UsageError("--prompt-tokens and --image belong to whole answers; with --decoder-only there is --past")
    whole = Answers(prompt_tokens or Answers.prompt_tokens, new_tokens, images)
    work = Steps(lengths(past), steps=new_tokens) if decoder_only else whole
    progress = stage_line if sys.stderr.isatty() else None
    done = bench(bundles, work, progress=progress, **options)
    if progress:
        progress("")
    click.echo(jsonlib.dumps(done.to_json(), indent=1) if as_json else terminal_safe(render(done)))
    if all(m.reason for m in done.measurements):
        fail(done.measurements[0].exit_code, f"nothing could be measured: {done.measurements[0].reason}")


@cli.command()
@click.argument("bundles", nargs=-1, required=True, type=click.Path())
@click.option(
    "--data", type=click.Path(path_type=Path), help="A data set's file or folder, as it is distributed  [default: drawn scenes]"
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
@click.option("--merge", is_flag=True, help="Join reports of several devices: give their report.json in place of bundles.")
@click.option("-o", "--output", type=click.Path(path_type=Path), default="report", show_default=True, help="The folder to write.")
@engine_option
@threads_option
@json_option
def report(as_json: bool, merge: bool, gate: float | None, output: Path, bundles: tuple[str, ...], **options: Any) -> None:
    """Measure accuracy against latency of bundles, and write a page to decide by.

    Stopped, it goes on where it was: what OUTPUT/measured holds is not measured again.

    \b
    pgx report b --limit 2 -o report
    pgx report b-fp16 b-int4 --data vqa/ --limit 500 --gate 0.99 -o report
    pgx report --merge jetson/report.json desktop/report.json -o both
    """
    from pgxport.errors import GateError
    from pgxport.report.datasets import DataOptions
    from pgxport.report.report import GATE, ReportOptions
    from pgxport.report.report import merge as merge_reports
    from pgxport.report.report import report as measure
    from pgxport.report.verdict import gate_failures
    from pgxport.runners.outputs import terminal_safe

    data = DataOptions(**{name: options.pop(name) for name in ("data", "format", "images", "split", "prompt", "limit")})
    progress = stage_line if sys.stderr.isatty() else None
    if merge:
        made = merge_reports(list(map(Path, bundles)), output)
    else:
        given = ReportOptions(bundles, output, data, gate=GATE if gate is None else gate, **options)
        made = measure(given, progress=progress)
    if progress:
        progress("")
    if as_json:
        click.echo(made.model_dump_json(indent=1))
    else:
        for device in made.devices:
            click.echo(terminal_safe(f"{device.name}:"))
            for finding in device.verdict:
                click.echo(terminal_safe(f"  {finding.text}"))
        click.echo(f"wrote {output}/report.html, report.md, report.json, results.csv, chart.svg and chart.png")
        click.echo(f"try: open {output}/report.html    pgx report --merge {output}/report.json OTHER/report.json -o both")
    failed = [row for device in made.devices for row in device.rows if row.status == "failed"]
    if gate is not None and (lines := [line for device in made.devices for line in gate_failures(device)]):
        click.echo(terminal_safe("\n".join(lines[:20])), err=True)
        raise GateError(f"below the gate of {gate:.4g}; {output}/report.html shows the answers")
    if len(failed) == sum(len(device.rows) for device in made.devices):
        fail(failed[0].exit_code or 1, f"nothing could be measured: {failed[0].reason}")


@cli.command()
@click.argument("first", type=click.Path(path_type=Path))
@click.argument("second", type=click.Path(path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), help="Ask both bundles these samples, and compare the answers.")
@click.option("--format", help="What the data is, where its content does not say.")
@click.option("--limit", type=click.IntRange(1), help="Records, evenly spaced; without --data of the drawn scenes, of each task.")
@click.option("--gate", type=click.FloatRange(0, 1), help="End with 8 if the second keeps less of the first's quality.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Keep the report of both here  [default: nowhere]")
@engine_option
@threads_option
@json_option
def diff(as_json: bool, first: Path, second: Path, **options: Any) -> None:
    """Compare two bundles, or two reports: what changed, and what it cost.

    \b
    pgx diff b-fp32 b-int4
    pgx diff b-fp32 b-int4 --limit 20 --gate 0.99
    pgx diff last-week/report.json report.json --gate 0.99
    """
    from pgxport.errors import GateError
    from pgxport.report.diff import DiffOptions, diff
    from pgxport.runners.outputs import terminal_safe

    progress = stage_line if sys.stderr.isatty() else None
    found = diff(DiffOptions(first, second, **options), progress=progress)
    if progress:
        progress("")
    click.echo(jsonlib.dumps(found.to_json(), indent=1) if as_json else terminal_safe(found.render()))
    if found.failures:
        click.echo(terminal_safe("\n".join(found.failures[:20])), err=True)
        raise GateError(f"{second} keeps too little of {first}'s quality")


@cli.command()
@click.argument("path", type=click.Path())
@json_option
def inspect(path: str, as_json: bool) -> None:
    """Show what a bundle or a checkpoint holds, without loading it.

    \b
    pgx inspect b
    """
    from pgxport.inspection import describe, render
    from pgxport.runners.outputs import terminal_safe

    with needs("export"):  # for a checkpoint; a bundle needs the base alone
        found = describe(Path(path))
    click.echo(jsonlib.dumps(found, indent=1) if as_json else terminal_safe(render(found)))


@cli.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what is installed, which engines really open a session, and what to install.

    \b
    pgx doctor
    """
    from pgxport.doctor import examine, render

    found = examine()
    click.echo(jsonlib.dumps(found, indent=1) if as_json else render(found))


@cli.command()
@click.option("-o", "--output", type=click.Path(), default="demo", show_default=True, help="The folder to write.")
def demo(output: str) -> None:
    """Walk the whole road on the embedded model: draw scenes, export, ask, and save the annotated pictures.

    \b
    pgx demo -o demo
    """
    with needs("export"):
        from pgxport.demo import walk

    walk(Path(output), echo=click.echo)


class needs:
    """Turn a missing import inside into the one line that says what to install."""

    def __init__(self, extra: str):
        self.extra = extra

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("pgxport"):
            from pgxport.errors import UsageError

            raise UsageError(f'this command needs {error.name}: pip install "pgxport[{self.extra}]"') from error


class progress_bar:
    """A bar with bytes, rate and time left, on a terminal; nothing elsewhere."""

    def __enter__(self) -> Callable[[str, int, int], None] | None:
        if not sys.stderr.isatty():
            self._bar = None
            return None
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        task = self._bar.add_task("")
        return lambda label, done, total: self._bar.update(task, description=label, completed=done, total=total)  # type: ignore[union-attr]

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()


def stage_line(what: str) -> None:
    """Say on the terminal what is being done, over what was said before."""
    from pgxport.runners.outputs import terminal_safe

    click.echo(f"\r\x1b[K{terminal_safe(what)}\r", nl=False, err=True)


def size(count: int) -> str:
    """Bytes for people, in decimal units.

    >>> size(1_750_000_000)
    '1.75 GB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.3g} {unit}" if unit != "B" else f"{count} B"
        count /= 1000  # type: ignore[assignment]
    raise AssertionError


def peak_rss() -> int:
    """The most memory this process has had resident, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Run a command; errors we raise on purpose end with their own exit code (docs/reference/exit-codes.md)."""
    # As an exception, so that what is half done is cleaned up on the way out.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        cli(prog_name="pgx", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except PgxError as error:
        fail(error.exit_code, str(error))
    except (click.Abort, KeyboardInterrupt):
        fail(130, "interrupted")
    except MemoryError as error:
        fail(6, f"not enough memory ({error}); close other programs, or ask for less" if str(error) else "not enough memory")
    except OSError as error:
        fail(5, f"{error.filename or 'input or output'}: {error.strerror or error}")
    except SystemExit as stop:
        # 1 is click's own, where the reader of a pipe has gone (`pgx … | head`): no failure, and we never end with it.
        sys.exit(0 if stop.code == 1 else stop.code)


def fail(code: int, message: str) -> NoReturn:
    """End with one line on stderr, whatever a file's name or a stranger's manifest put in the message."""
    from pgxport.runners.outputs import terminal_safe

    click.echo(f"pgx: {' '.join(terminal_safe(message).split())}", err=True)
    sys.exit(code)
