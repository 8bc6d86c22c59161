# SPDX-License-Identifier: Apache-2.0
"""The command that searches a recipe: tune."""

import json
import time
from typing import Any

import click

from pgxport.cli.options import OF_SOURCE, cluster_option, json_option, model_options, threads_option
from pgxport.errors import GateError, needs
from pgxport.terminal import Cost, stages, volume_options


@click.command()
@click.argument("checkpoint", metavar="[SOURCE]", required=False)
@model_options(
    "size",
    "res",
    "family",
    "variant",
    "adapter",
    "masks",
    **OF_SOURCE,
    masks="vae-oid.npz, where `segment` is among the tasks (tiny has its own).",
)
@click.option("--data", type=click.Path(), help="A data set's file or folder (docs/reference/data.md)  [default: drawn scenes]")
@click.option(
    "--samples", type=click.IntRange(1), default=50, show_default=True, help="Records, evenly spaced; scenes of each task."
)
@click.option("--calibration", type=click.Path(dir_okay=False), help="What `pgx calibrate` wrote; GPTQ is tried with it.")
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

    Each group of layers is measured in each scheme, mixes are proposed and measured whole; stopped, it goes
    on where it was.

    \b
    pgx tune --size tiny --res 112 --samples 4 --candidates w8-dynamic --max-loss 20% -o recipe.toml
    pgx tune my-finetune/ --data vqa.jsonl --calibration calibration.safetensors --max-loss 1% --max-size 1800
    """
    with needs("export"):
        from pgxport.tuning.result import render
        from pgxport.tuning.tune import TuneOptions, tune

    names = tuple(name.strip() for name in candidates.split(",")) if candidates else ()
    given = TuneOptions(max_loss=_points(max_loss), candidates=names, **options)
    start = time.perf_counter()
    with stages() as progress:
        tuning = tune(given, progress=progress)
    cost = Cost.since(start)
    click.echo(json.dumps(tuning.to_json() | cost.to_json(), indent=1) if as_json else render(tuning))
    if refusal := tuning.refusal():
        raise GateError(refusal)
    if not as_json:
        click.echo(f"wrote {options['output']} in {cost}")
        click.echo(f"try: pgx export {_model(options)} -o tuned")


def _points(text: str) -> float:
    try:
        return float(text.strip().removesuffix("%"))
    except ValueError:
        raise click.UsageError(f"--max-loss {text!r} is not a number of points; write 1% or 0.5") from None


def _model(options: dict[str, Any]) -> str:
    """The flags with which `pgx export` writes the tuned bundle."""
    flags = {"checkpoint": options["checkpoint"], "size": options["size"], "res": options["res"], "adapter": options["adapter"]}
    flags |= {key: options[key] for key in ("family", "variant") if options["size"] not in (None, "tiny")}
    flags |= {"masks": options["masks"], "recipe": options["output"], "calibration": options["calibration"]}
    return " ".join(
        f"--{option} {value}"
        for option, given in flags.items()
        for value in (given if isinstance(given, tuple) else (given,))
        if value
    )
