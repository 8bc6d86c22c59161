# SPDX-License-Identifier: Apache-2.0
"""The command that asks a bundle: run."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from pgxport.cli.options import cluster_option, engine_option, json_option, threads_option
from pgxport.terminal import fail, note, volume_options
from pgxport.text import terminal_safe

if TYPE_CHECKING:
    from pgxport.runners.outputs import Answer


@click.command()
@click.argument("bundle", type=click.Path())
@click.option("--image", "images", multiple=True, type=click.Path(), help="An image; again for several in order.")
@click.option(
    "--images",
    "each",
    multiple=True,
    metavar="FOLDER|GLOB|DATA",
    help="Pictures to ask about one by one; again for more of them.",
)
@click.option("--prompt", required=True, help='"caption en", "ocr", "answer en …", "detect a ; b", "segment a".')
@click.option("--max-new-tokens", type=click.IntRange(1), help="Stop after so many tokens  [default: the bundle's]")
@click.option("--special-tokens", is_flag=True, help="Special tokens of the fine-tune's own are tokens in the prompt, not text.")
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
    save: str | None,
    cluster: str | None,
    as_json: bool,
    **question: Any,
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
        _answer_each(bundle, each, question, cluster, as_json=as_json)
    else:
        _answer_one(bundle, images, question, save, as_json=as_json)


def _answer_one(bundle: str, images: tuple[str, ...], question: dict[str, Any], save: str | None, *, as_json: bool) -> None:
    from pgxport.runners.draw import picture_format, save_image
    from pgxport.runners.image import load_image
    from pgxport.runners.runner import Runner

    if save:
        picture_format(save)  # refused before the work rather than after
    asked = {name: question.pop(name) for name in ("prompt", "max_new_tokens", "special_tokens")}
    with Runner.from_pretrained(bundle, **question) as runner:
        picture = load_image(images[0])
        answer = runner.answer([picture, *images[1:]], **asked)
    if save:
        save_image(answer.draw(picture), save)
    if as_json:
        click.echo(json.dumps(answer.to_json() | ({"saved": save} if save else {}), indent=1))
        return
    click.echo(render_answer(answer))
    for line in notes(answer, save):
        note(line)


def render_answer(answer: "Answer") -> str:
    """The text of an answer, and its boxes and masks in pixels."""
    lines = [terminal_safe(answer.text)]
    for box in answer.boxes:
        corners = f"y {box.y1:.0f}–{box.y2:.0f}, x {box.x1:.0f}–{box.x2:.0f} px"
        lines.append(f"  {terminal_safe(box.label) or '(no label)'}: {corners}")
    for mask in answer.masks:
        covered = "codes only, this bundle has no mask decoder" if mask.mask is None else f"{int(mask.mask.sum())} px covered"
        lines.append(f"  mask of {terminal_safe(mask.label) or '(no label)'}: {covered}")
    return "\n".join(lines)


def notes(answer: "Answer", save: str | None) -> Iterator[str]:
    """Notes beside an answer: what is malformed, whether it was cut short, and the time of each stage."""
    yield from (f"malformed answer: {warning}" for warning in answer.warnings)
    count = len(answer.token_ids)
    if answer.truncated:
        yield f"stopped after {count} tokens; --max-new-tokens allows more"
    times = ", ".join(f"{stage} {seconds * 1e3:.0f}" for stage, seconds in answer.timings.items())
    yield f"{count} tokens; ms: {times}" + (f"; drawn on {save}" if save else "; --save out.png draws it")


def _answer_each(bundle: str, patterns: tuple[str, ...], question: dict[str, Any], cluster: str | None, *, as_json: bool) -> None:
    """Print a line for each picture, as it is answered."""
    from pgxport.data.pictures import find_pictures
    from pgxport.runners.many import PictureQuestion, ask_each

    pictures = find_pictures(patterns)
    if cluster is not None:
        from pgxport.cluster.many_pictures import ask_each as ask_on_cluster

        rows = ask_on_cluster(bundle, pictures, PictureQuestion(**question), cluster)
    else:
        rows = ask_each(bundle, pictures, PictureQuestion(**question))
    failed = []
    for row in rows:
        text = "FAILED: " + (row.error or "") if row.answer is None else row.answer.text
        click.echo(json.dumps(row.to_json()) if as_json else " ".join(terminal_safe(f"{row.image}: {text}").split()))
        failed += [row] if row.answer is None else []
    if failed and len(failed) == len(pictures):
        fail(failed[0].exit_code, f"no picture was answered: {failed[0].error}")
    more = "" if as_json else "; --json has boxes and masks"
    note(f"{len(pictures) - len(failed)} of {len(pictures)} pictures answered{more}")
