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
cluster_option = click.option(
    "--cluster", metavar="ADDRESS", help="Spread the work over a Ray cluster: auto, local or HOST:PORT (docs/cluster.md)."
)
VOLUME = "pgxport.volume"  # in a command's context: "quiet" or "verbose", or nothing


def _set_volume(context: click.Context, option: click.Parameter, asked: bool) -> None:
    if asked and VOLUME in context.meta:
        raise click.UsageError("-q and -v were both given; choose one")
    if asked:
        context.meta[VOLUME] = option.name


def volume_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """-q and -v of a command that shows what it is doing."""
    quiet = click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_set_volume, help="Only errors on stderr.")
    verbose = click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=_set_volume, help="Say each thing that is done, and when."
    )
    return quiet(verbose(command))


def volume() -> str | None:
    """What the command was told."""
    context = click.get_current_context(silent=True)
    return context.meta.get(VOLUME) if context else None


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
@click.option(
    "--trt", help="Of target tensorrt: the version to write for, 10.3 (JetPack 6), 10.16 (JetPack 7.2) or 11  [default: 11]"
)
@click.option("--sm", help="Of target tensorrt: refuse what a GPU of this compute capability cannot run, as 8.7 (Orin).")
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
@volume_options
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
@click.option("--trt", help="Of target tensorrt: the version to write for, 10.3, 10.16 or 11  [default: 11]")
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
@click.argument("bundle", type=click.Path())
@click.option("--engine", help="tensorrt, tensorrt-rtx (TensorRT for RTX) or cpu  [default: what the bundle was written for]")
@click.option("--sm", help="Build for a GPU that is not there, as 8.9; tensorrt-rtx only  [default: this machine's]")
@click.option(
    "--profiles", type=click.IntRange(1, 2), help="2 tunes prefill and step apart, 1 takes less memory  [default: 2; rtx: 1]"
)
@click.option(
    "--workspace", type=click.IntRange(1), metavar="MIB", help="Device memory for intermediate results  [default: 1024]"
)
@click.option(
    "--timing-cache",
    type=click.Path(dir_okay=False, path_type=Path),
    help="TensorRT's timings, to share  [default: in the cache]",
)
@click.option(
    "-o",
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="The engine cache  [default: PGX_ENGINE_CACHE, ~/.cache/…]",
)
@click.option("--force", is_flag=True, help="Build though memory seems short.")
@volume_options
@json_option
def compile(as_json: bool, **options: Any) -> None:
    """Build a bundle's TensorRT engines on this machine; for the CPU, pack its weights once for all starts.

    \b
    pgx compile b
    pgx compile b --engine tensorrt
    pgx compile b --engine tensorrt-rtx --sm 8.9
    """
    import time

    from pgxport.compile.tensorrt import CompileOptions, compile_bundle

    start = time.perf_counter()
    with progress_bar(steps=True) as progress:
        made = compile_bundle(CompileOptions(**options), progress=progress)
    files = {name: info.size for name, info in made.entry.files.items()}
    seconds = round(time.perf_counter() - start, 2)
    if as_json:
        found = made.entry.model_dump(include={"machine", "flags"}) | {
            "entry": str(made.folder),
            "built": made.built,
            "files": files,
        }
        click.echo(jsonlib.dumps(found | {"bytes": made.nbytes, "seconds": seconds, "peak_rss_bytes": peak_rss()}, indent=1))
        return
    here = made.entry.machine
    done = f"written in {seconds} s, peak memory {size(peak_rss())}" if made.built else "was there already"
    what = f"weights packed for this CPU and onnxruntime {here.version}" if here.engine == "cpu" else f"engines for SM {here.sm}"
    click.echo(f"{made.folder}: {size(made.nbytes)}, {what}; {done}")
    where = f"PGX_ENGINE_CACHE={options['cache']} " if options["cache"] else ""
    click.echo(f'try: {where}pgx run {options["bundle"]} --engine {here.engine} --image photo.jpg --prompt "caption en"')


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
@volume_options
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
@click.option("--image", "images", multiple=True, type=click.Path(), help="An image; again for several in order.")
@click.option(
    "--images", "each", multiple=True, metavar="FOLDER|GLOB", help="Pictures to ask about one by one; again for more of them."
)
@click.option("--prompt", required=True, help='"caption en", "ocr", "answer en …", "detect a ; b", "segment a".')
@click.option("--max-new-tokens", type=click.IntRange(1), help="Stop after so many tokens  [default: the bundle's]")
@click.option("--low-memory", is_flag=True, help="Hold the vision encoder or the decoder, never both; slower to the first token.")
@click.option("--save", type=click.Path(dir_okay=False), help="Draw boxes and masks on the image and save it here.")
@engine_option
@threads_option
@cluster_option
@volume_options
@json_option
def run(
    bundle: str,
    images: tuple[str, ...],
    each: tuple[str, ...],
    prompt: str,
    max_new_tokens: int | None,
    low_memory: bool,
    save: str | None,
    engine: str,
    threads: int | None,
    cluster: str | None,
    as_json: bool,
) -> None:
    """Answer a prompt about an image, or about each of many.

    \b
    pgx run b --image scene.png --prompt "detect red circle" --save out.png
    pgx run b --images photos/ --images 'scans/*.png' --prompt "caption en" --json
    """
    if bool(images) == bool(each):
        raise click.UsageError("give --image, or --images for a prompt about each of many")
    if each and save:
        raise click.UsageError("--save draws on one picture; with --images use --json, which has boxes and masks")
    if cluster is not None and not each:
        raise click.UsageError("--cluster spreads many pictures; give them with --images")
    if each:
        from pgxport.runners.many import PictureQuestion

        run_each(bundle, each, PictureQuestion(prompt, max_new_tokens, engine, threads, low_memory), cluster, as_json)
        return
    from pgxport.runners.draw import picture_format, save_image
    from pgxport.runners.image import load_image
    from pgxport.runners.runner import Runner
    from pgxport.text import terminal_safe

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
        note(f"malformed answer: {warning}")
    if answer.truncated:
        note(f"stopped after {len(answer.token_ids)} tokens; --max-new-tokens allows more")
    times = ", ".join(f"{stage} {seconds * 1e3:.0f}" for stage, seconds in answer.timings.items())
    note(f"{len(answer.token_ids)} tokens; ms: {times}" + (f"; drawn on {save}" if save else "; --save out.png draws it"))


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
@cluster_option
@volume_options
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
        from pgxport.tuning.result import render
        from pgxport.tuning.tune import TuneOptions, tune

    try:
        points = float(max_loss.strip().removesuffix("%"))
    except ValueError:
        raise click.UsageError(f"--max-loss {max_loss!r} is not a number of points; write 1% or 0.5") from None
    names = tuple(name.strip() for name in candidates.split(",")) if candidates else ()
    progress = stages()
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
@click.option("--batch", help="Answers at a time, of one image and prompt, as in 1,2,4: images and tokens a second at each.")
@engine_option
@threads_option
@volume_options
@json_option
def bench(
    as_json: bool, decoder_only: bool, past: str | None, batch: str | None, bundles: tuple[str, ...], **options: Any
) -> None:
    """Measure time and memory of bundles side by side: one row a stage, and what can be told apart.

    \b
    pgx bench b-int8 b-int4 -r 5
    pgx bench b --decoder-only --past 1100,4200
    pgx bench b --batch 1,2,4
    """
    from pgxport.benchmarking.bench import bench, render
    from pgxport.benchmarking.measure import Answers, Steps, lengths
    from pgxport.benchmarking.throughput import Batches, sizes
    from pgxport.text import terminal_safe

    prompt_tokens, new_tokens, images = options.pop("prompt_tokens"), options.pop("new_tokens"), options.pop("images")
    if past and not decoder_only:
        raise click.UsageError("--past goes with --decoder-only")
    if decoder_only and (prompt_tokens or images):
        raise click.UsageError("--prompt-tokens and --image belong to whole answers; with --decoder-only there is --past")
    if batch and (decoder_only or len(images) > 1):
        raise click.UsageError("--batch repeats one image and prompt; it goes with neither --decoder-only nor several --image")
    whole: Answers | Batches = Answers(prompt_tokens or Answers.prompt_tokens, new_tokens, images)
    if batch:
        whole = Batches(sizes(batch), prompt_tokens or Answers.prompt_tokens, new_tokens, images)
    work = Steps(lengths(past), steps=new_tokens) if decoder_only else whole
    progress = stages()
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
    from pgxport.benchmarking.throughput import sizes
    from pgxport.data.loader import DataOptions
    from pgxport.errors import GateError
    from pgxport.reporting.advice import gate_failures
    from pgxport.reporting.report import GATE, ReportOptions
    from pgxport.reporting.report import merge as merge_reports
    from pgxport.reporting.report import report as measure
    from pgxport.text import terminal_safe

    data = DataOptions(**{name: options.pop(name) for name in ("data", "format", "images", "split", "prompt", "limit")})
    progress = stages()
    if merge:
        made = merge_reports(list(map(Path, bundles)), output)
    else:
        given = ReportOptions(
            bundles, output, data, gate=GATE if gate is None else gate, batch=sizes(batch) if batch else (), **options
        )
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
@volume_options
@json_option
def diff(as_json: bool, first: Path, second: Path, **options: Any) -> None:
    """Compare two bundles, or two reports: what changed, and what it cost.

    \b
    pgx diff b-fp32 b-int4
    pgx diff b-fp32 b-int4 --limit 20 --gate 0.99
    pgx diff last-week/report.json report.json --gate 0.99
    """
    from pgxport.errors import GateError
    from pgxport.reporting.diff import DiffOptions, diff
    from pgxport.text import terminal_safe

    progress = stages()
    found = diff(DiffOptions(first, second, **options), progress=progress)
    if progress:
        progress("")
    click.echo(jsonlib.dumps(found.to_json(), indent=1) if as_json else terminal_safe(found.render()))
    if found.failures:
        click.echo(terminal_safe("\n".join(found.failures[:20])), err=True)
        raise GateError(f"{second} keeps too little of {first}'s quality")


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--report", type=click.Path(path_type=Path), help="A report.json that measured this bundle  [default: as exported]")
@click.option("--dry-run", is_flag=True, help="Print the card, and write nothing.")
@json_option
def card(as_json: bool, bundle: Path, report: Path | None, dry_run: bool) -> None:
    """Write the model card of a bundle, README.md, with what a report measured.

    \b
    pgx card b --report report/report.json
    pgx card b --report report/report.json --dry-run
    """
    from pgxport.reporting.measured_card import CardOptions, write_card
    from pgxport.text import terminal_safe

    text = write_card(CardOptions(bundle, report, dry_run))
    if as_json:
        click.echo(jsonlib.dumps({"bundle": str(bundle), "written": not dry_run, "card": text}, indent=1))
    elif dry_run:
        click.echo("\n".join(map(terminal_safe, text.split("\n"))), nl=False)
    else:
        click.echo(f"wrote {bundle}/README.md: {size(len(text.encode()))}, and its digest into manifest.json")
        click.echo(f"try: pgx push {bundle} OWNER/NAME --private --dry-run")


@cli.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made now.")
@click.option("--revision", help="The branch, made where it is missing  [default: main]")
@click.option("--dry-run", is_flag=True, help="Verify, and say what would be uploaded, without the network.")
@volume_options
@json_option
def push(as_json: bool, dry_run: bool, **options: Any) -> None:
    """Verify a bundle and upload it to the model hub, in one commit; what the hub has already is not sent again.

    Sign in first with `hf auth login`, as someone who may write there.

    \b
    pgx push b me/my-paligemma-int4 --private --dry-run
    pgx push b me/my-paligemma-int4
    """
    with needs("export"):
        from pgxport.hub.share import PushOptions, push

        done = push(PushOptions(**options, dry_run=dry_run), bars=sys.stderr.isatty() and volume() != "quiet")
    if as_json:
        click.echo(jsonlib.dumps(done.to_json() | {"pushed": not dry_run}, indent=1))
        return
    for name, nbytes in done.files.items() if dry_run else ():
        click.echo(f"{name}: {size(nbytes)}")
    if dry_run:
        click.echo(f"would push {size(done.nbytes)} to {done.repository}, and sent nothing; try: the same without --dry-run")
    else:
        click.echo(f"pushed {size(done.nbytes)} to {done.repository}, commit {done.commit}")
        click.echo(f"try: pgx pull {done.repository} --revision {done.commit} -o again")


@cli.command()
@click.argument("repository", metavar="OWNER/NAME")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The folder to write  [default: NAME]")
@click.option("--revision", help="A branch, a tag or a commit  [default: main]")
@click.option("--overwrite", is_flag=True, help="Replace a bundle that is there.")
@click.option("--dry-run", is_flag=True, help="Ask the hub what there is, and write nothing.")
@volume_options
@json_option
def pull(as_json: bool, dry_run: bool, **options: Any) -> None:
    """Fetch a bundle from the model hub and verify it. Stopped, it goes on where it was.

    \b
    pgx pull me/my-paligemma-int4 -o b
    pgx pull me/my-paligemma-int4 --revision v1 --dry-run
    """
    import time

    with needs("export"):
        from pgxport.hub.share import PullOptions, pull

        start = time.perf_counter()
        with progress_bar() as progress:
            done = pull(PullOptions(**options, dry_run=dry_run), progress=progress)
    if as_json:
        click.echo(jsonlib.dumps(done.to_json() | {"pulled": not dry_run}, indent=1))
        return
    for name, nbytes in done.files.items() if dry_run else ():
        click.echo(f"{name}: {size(nbytes)}")
    if dry_run:
        click.echo(f"would fetch {size(done.nbytes)} of {done.repository} at {done.commit}; try: the same without --dry-run")
    else:
        shown = options["output"] or done.path.name
        click.echo(f"wrote {shown}: {size(done.nbytes)} in {time.perf_counter() - start:.2f} s, every file verified")
        click.echo(f'try: pgx run {shown} --image photo.jpg --prompt "caption en"    pgx inspect {shown}')


@cli.command()
@click.argument("path", type=click.Path())
@json_option
def inspect(path: str, as_json: bool) -> None:
    """Show what a bundle or a checkpoint holds, without loading it.

    \b
    pgx inspect b
    """
    from pgxport.inspection import describe, render
    from pgxport.text import terminal_safe

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
    """A bar with bytes, rate and time left, on a terminal; a line for each thing with --verbose; else nothing.

    Args:
        steps: What is counted are steps and not bytes.
    """

    def __init__(self, *, steps: bool = False):
        self._steps = steps

    def __enter__(self) -> Callable[[str, int, int], None] | None:
        self._bar = None
        if volume() == "verbose":
            return Log()
        if volume() == "quiet" or not sys.stderr.isatty():
            return None
        from rich import progress
        from rich.console import Console

        of_bytes = progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn()
        counted: tuple[progress.ProgressColumn, ...] = (progress.MofNCompleteColumn(),) if self._steps else of_bytes
        columns = progress.TextColumn("{task.description}"), progress.BarColumn(), *counted
        self._bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
        self._bar.start()
        task = self._bar.add_task("")
        return lambda label, done, total: self._bar.update(task, description=label, completed=done, total=total)  # type: ignore[union-attr]

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()


def stages() -> Callable[[str], None] | None:
    """How to say what is being done: over one line of a terminal; a line each with --verbose; else not at all."""
    if volume() == "verbose":
        return Log()
    return stage_line if sys.stderr.isatty() and volume() != "quiet" else None


class Log:
    """A line on stderr for each thing that is begun, with the seconds since the first."""

    def __init__(self) -> None:
        import time

        self._clock, self._start, self._last = time.perf_counter, time.perf_counter(), ""

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        from pgxport.text import terminal_safe

        if what and what != self._last:
            click.echo(f"{self._clock() - self._start:9.2f} s  {terminal_safe(what)}", err=True)
        self._last = what


def run_each(bundle: str, patterns: tuple[str, ...], question: Any, cluster: str | None, as_json: bool) -> None:
    """`pgx run --images`: a line for each picture, as it is answered."""
    from pgxport.runners.many import ask_each, find_pictures
    from pgxport.text import terminal_safe

    pictures = find_pictures(patterns)
    if cluster is not None:
        from pgxport.cluster.many_pictures import ask_each as ask_on_cluster

        rows = ask_on_cluster(bundle, pictures, question, cluster)
    else:
        rows = ask_each(bundle, pictures, question)
    failed = []
    for row in rows:
        said = "FAILED: " + (row.error or "") if row.answer is None else row.answer.text
        click.echo(jsonlib.dumps(row.to_json()) if as_json else " ".join(terminal_safe(f"{row.image}: {said}").split()))
        failed += [row] if row.answer is None else []
    if failed and len(failed) == len(pictures):
        fail(failed[0].exit_code, f"no picture was answered: {failed[0].error}")
    more = "" if as_json else "; --json has boxes and masks"
    note(f"{len(pictures) - len(failed)} of {len(pictures)} pictures answered{more}")


def note(text: str) -> None:
    """What is worth saying beside a result, unless --quiet."""
    if volume() != "quiet":
        click.echo(text, err=True)


def stage_line(what: str) -> None:
    """Say on the terminal what is being done, over what was said before."""
    from pgxport.text import terminal_safe

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
    from pgxport.text import terminal_safe

    click.echo(f"pgx: {' '.join(terminal_safe(message).split())}", err=True)
    sys.exit(code)
