# SPDX-License-Identifier: Apache-2.0
"""The commands that write a bundle or prepare one: export, plan, calibrate, compile."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgxport.cli.options import (
    OF_SOURCE,
    context_option,
    json_option,
    local_window_option,
    model_options,
    precision_option,
    target_option,
)
from pgxport.errors import needs
from pgxport.terminal import Cost, detail, note, progress_bar, volume_options
from pgxport.text import size, terminal_safe

if TYPE_CHECKING:
    from pgxport.activations.calibration_file import Calibration
    from pgxport.compile.options import Compiled
    from pgxport.exporter.export import ExportedBundle


def _tokens(context: click.Context, option: click.Parameter, given: str | None) -> int | None:
    """A number of image tokens, 0 for all; None where it was not given."""
    if given is None or given == "all":
        return None if given is None else 0
    return int(click.IntRange(1)(given, option, context))


@click.command()
@model_options("size", "res", "family", "variant", "checkpoint", "adapter", "masks")
@precision_option
@click.option(
    "--recipe", type=click.Path(dir_okay=False), help="A TOML file that says it weight by weight (docs/reference/recipes.md)."
)
@click.option("--calibration", type=click.Path(dir_okay=False), help="What `pgx calibrate` wrote  [default: embedded scenes]")
@target_option
@click.option(
    "--trt", help="Of target tensorrt: the version to write for, 10.3 (JetPack 6), 10.16 (JetPack 7.2) or 11  [default: 11]"
)
@click.option("--sm", help="Of target tensorrt: refuse what a GPU of this compute capability cannot run, as 8.7 (Orin).")
@context_option
@local_window_option
@click.option(
    "--parity", type=click.IntRange(0), default=1, show_default=True, help="Scenes to compare a rounded bundle on; 0: none."
)
@click.option(
    "--parity-tokens", metavar="N|all", callback=_tokens, help="Image tokens of each, evenly spaced, or all  [default: by size]"
)
@click.option("--gate", type=click.FloatRange(0, 1), help="Write nothing if fewer tokens agree with the checkpoint, as 0.99.")
@click.option(
    "--answer/--no-answer", default=True, show_default=True, help="Ask the bundle about a scene before it gets its name."
)
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
    with needs("export"):
        from pgxport.exporter.export import dry_run as check
        from pgxport.exporter.export import export
        from pgxport.exporter.prepare import ExportOptions

    if dry_run:
        with progress_bar() as progress:  # of a download, where one is needed
            sizes = check(ExportOptions(**options), progress=progress)
        click.echo(json.dumps({"files": sizes}, indent=1) if as_json else render_dry_run(sizes))
        return
    start = time.perf_counter()
    with progress_bar() as progress:
        bundle = export(ExportOptions(**options), progress=progress, say=lambda text: note(terminal_safe(text)))
    cost = Cost.since(start)
    for sentence in bundle.notes:
        note(sentence)
    if skipped := bundle.manifest.provenance.skipped:
        detail(f"skipped {len(skipped)} tensors of the checkpoint that no answer depends on:")
        for name, why in skipped.items():
            detail(f"  {name}: {why}")
    if as_json:
        click.echo(json.dumps(export_json(bundle, cost), indent=1))
    else:
        click.echo(render_export(bundle, options["output"] or bundle.path.name, cost))


def render_dry_run(sizes: dict[str, int]) -> str:
    """The size of each file that an export would write, and of all of them."""
    total = f"would write {size(sum(sizes.values()))}, and wrote nothing; try: the same without --dry-run"
    return "\n".join([*(f"{name}: {size(nbytes)}" for name, nbytes in sizes.items()), total])


def export_json(bundle: "ExportedBundle", cost: Cost) -> dict[str, Any]:
    """An exported bundle as plain data."""
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path), "bytes": bundle.nbytes, **cost.to_json(),
        "files": {name: info.size for name, info in manifest.files.items()},
        "parity": manifest.parity.model_dump() if manifest.parity else None,
        "answered": bundle.not_answered is None, "not_answered": bundle.not_answered, "notes": list(bundle.notes),
    }  # fmt: skip


def render_export(bundle: "ExportedBundle", output: str, cost: Cost) -> str:
    """An exported bundle for people: its size, its parity with the checkpoint, and the next command."""
    done = "opened, verified, and asked about a drawn scene" if bundle.not_answered is None else "opened and verified"
    lines = [f"wrote {bundle.path}: {size(bundle.nbytes)} in {cost}; {done}"]
    if bundle.not_answered is not None:
        lines.append(f"not answered here: {bundle.not_answered}")
    if parity := bundle.manifest.parity:
        scenes = f"{parity.scenes} scene{'s' if parity.scenes > 1 else ''}"
        if parity.image_tokens is not None and parity.image_tokens < bundle.manifest.image_tokens:
            scenes += f" ({parity.image_tokens} of {bundle.manifest.image_tokens} image tokens; --parity-tokens all)"
        lines.append(
            f"against the checkpoint, {parity.positions} tokens of {scenes}: {parity.agreement:.1%} of the likeliest "
            f"tokens the same, KL {parity.kl:.2g} nats (worst {parity.kl_worst:.2g})"
        )
        lines += [f"  {decibels:6.1f} dB  {path}" for path, decibels in parity.losses[:5]]
    if "mask_decoder" not in bundle.manifest.graphs:
        lines.append("without a mask decoder: `segment` answers with boxes and codes only; --masks vae-oid.npz adds it")
    return "\n".join([*lines, f'try: pgx run {output} --image photo.jpg --prompt "caption en"    pgx inspect {output}'])


@click.command()
@model_options(
    "size",
    "res",
    "family",
    "checkpoint",
    "masks",
    checkpoint="A folder in hub layout, in place of a published model.",
    masks="vae-oid.npz, if the bundle is to have a mask decoder.",
)
@precision_option
@target_option
@click.option("--trt", help="Of target tensorrt: the version to write for, 10.3, 10.16 or 11  [default: 11]")
@context_option
@local_window_option
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
    click.echo(json.dumps(planned.to_json(), indent=1) if as_json else render(planned))


@click.command()
@click.argument("checkpoint", metavar="[SOURCE]", required=False)
@model_options("size", "res", "family", "variant", "adapter", **OF_SOURCE)
@click.option("--data", type=click.Path(), help="A data set's file or folder (docs/reference/data.md)  [default: drawn scenes]")
@click.option("--samples", type=click.IntRange(1), default=32, show_default=True, help="How many to take, from the beginning.")
@click.option(
    "--for", "recipe", metavar="RECIPE", help="Gather what this recipe needs, a name or a TOML file  [default: what any needs]"
)
@target_option
@click.option("--moments/--no-moments", default=None, help="Keep the second moments, which GPTQ needs  [default: if of use]")
@click.option(
    "-o", "--output", type=click.Path(), default="calibration.safetensors", show_default=True, help="The file to write."
)
@click.option("--overwrite", is_flag=True, help="Replace a file that is there.")
@volume_options
@json_option
def calibrate(as_json: bool, **options: Any) -> None:
    """Run samples through a model, and write what quantization has to know about its activations.

    SOURCE is a checkpoint or a hub id, run layer by layer (stopped, it goes on where it was), or a float
    bundle, run whole.

    \b
    pgx calibrate --size tiny --res 224 -o calibration.safetensors
    pgx calibrate my-finetune/ --data samples.jsonl --samples 64 --for int4-fast-kv8
    """
    with needs("export"):
        from pgxport.calib.calibrate import CalibrateOptions, calibrate

        start = time.perf_counter()
        with progress_bar() as progress:
            calibration = calibrate(CalibrateOptions(**options), progress=progress, say=lambda text: note(terminal_safe(text)))
    cost = Cost.since(start)
    if as_json:
        click.echo(json.dumps(calibration_json(calibration, cost), indent=1))
    else:
        click.echo(render_calibration(calibration, options, cost))


def calibration_json(calibration: "Calibration", cost: Cost) -> dict[str, Any]:
    """A calibration file as plain data, without its inputs."""
    file = {"file": str(calibration.path), "bytes": calibration.path.stat().st_size, "sha256": calibration.digest}
    return file | cost.to_json() | calibration.about.model_dump(exclude={"inputs"})


def render_calibration(calibration: "Calibration", options: dict[str, Any], cost: Cost) -> str:
    """A calibration file for people: its size, its samples, and the export that reads it."""
    path, about = calibration.path, calibration.about
    # A bundle, which onnxruntime runs, does not say where its checkpoint is.
    checkpoint = "CHECKPOINT" if about.engine == "onnxruntime" else options["checkpoint"]
    skipped = f" ({about.skipped} records left out)" if about.skipped else ""
    named = [("checkpoint", checkpoint), ("size", options["size"]), ("res", options["res"])]
    named += [("adapter", adapter) for adapter in options["adapter"]]
    model = " ".join(f"--{option} {value}" for option, value in named if value)
    recipe = options["recipe"] or "int4"
    precision = f"--recipe {recipe}" if recipe.endswith(".toml") else f"--precision {recipe}"
    precision += f" --target {options['target']}" if options["target"] != "cpu" else ""
    return (
        f"wrote {path}: {size(path.stat().st_size)} in {cost}\n"
        f"{about.samples} samples{skipped}: {about.prefix_tokens} tokens of prefix, {about.suffix_tokens} of suffix\n"
        f"try: pgx export {model} {precision} --calibration {path}"
    )


@click.command()
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
    from pgxport.compile.compile import compile_bundle
    from pgxport.compile.options import CompileOptions

    start = time.perf_counter()
    with progress_bar(steps=True) as progress:
        compiled = compile_bundle(CompileOptions(**options), progress=progress)
    cost = Cost.since(start)
    if as_json:
        click.echo(json.dumps(compiled_json(compiled, cost), indent=1))
    else:
        click.echo(render_compiled(compiled, options["bundle"], options["cache"], cost))


def compiled_json(compiled: "Compiled", cost: Cost) -> dict[str, Any]:
    """An entry of the engine cache as plain data."""
    files = {name: info.size for name, info in compiled.entry.files.items()}
    entry = {"entry": str(compiled.folder), "built": compiled.built, "files": files, "bytes": compiled.nbytes}
    return compiled.entry.model_dump(include={"machine", "flags"}) | entry | cost.to_json()


def render_compiled(compiled: "Compiled", bundle: str, cache: Path | None, cost: Cost) -> str:
    """An entry of the engine cache for people: what it holds, what it took, and the next command."""
    here = compiled.entry.machine
    what = f"weights packed for this CPU and onnxruntime {here.version}" if here.engine == "cpu" else f"engines for SM {here.sm}"
    done = f"written in {cost}" if compiled.built else "was there already"
    where = f"PGX_ENGINE_CACHE={cache} " if cache else ""
    return (
        f"{compiled.folder}: {size(compiled.nbytes)}, {what}; {done}\n"
        f'try: {where}pgx run {bundle} --engine {here.engine} --image photo.jpg --prompt "caption en"'
    )
