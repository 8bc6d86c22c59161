# SPDX-License-Identifier: Apache-2.0
"""The commands that describe a bundle to others and exchange it with the model hub: card, push, pull."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pgxport.cli.options import json_option
from pgxport.errors import needs
from pgxport.terminal import progress_bar, shows_progress, volume_options
from pgxport.text import size, terminal_safe

if TYPE_CHECKING:
    from pgxport.hub.share import Shared


@click.command()
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

    text = write_card(CardOptions(bundle, report, dry_run))
    if as_json:
        click.echo(json.dumps({"bundle": str(bundle), "written": not dry_run, "card": text}, indent=1))
    elif dry_run:
        click.echo("\n".join(map(terminal_safe, text.split("\n"))), nl=False)
    else:
        click.echo(f"wrote {bundle}/README.md: {size(len(text.encode()))}, and its digest into manifest.json")
        click.echo(f"try: pgx push {bundle} OWNER/NAME --private --dry-run")


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("repository", metavar="OWNER/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made now.")
@click.option("--revision", help="The branch, made where it is missing  [default: main]")
@click.option("--dry-run", is_flag=True, help="Verify, and say what would be uploaded, without the network.")
@volume_options
@json_option
def push(as_json: bool, dry_run: bool, **options: Any) -> None:
    """Verify a bundle and upload it to the model hub, in one commit; what the hub has already is not sent.

    Sign in first with `hf auth login`, as someone who may write there.

    \b
    pgx push b me/my-paligemma-int4 --private --dry-run
    pgx push b me/my-paligemma-int4
    """
    with needs("export"):
        from pgxport.hub.share import PushOptions, push

        shared = push(PushOptions(**options, dry_run=dry_run), bars=shows_progress())
    if as_json:
        click.echo(json.dumps(shared.to_json() | {"pushed": not dry_run}, indent=1))
    elif dry_run:
        total = f"would push {size(shared.nbytes)} to {shared.repository}, and sent nothing; try: the same without --dry-run"
        click.echo("\n".join([*_sizes(shared), total]))
    else:
        click.echo(f"pushed {size(shared.nbytes)} to {shared.repository}, commit {shared.commit}")
        click.echo(f"try: pgx pull {shared.repository} --revision {shared.commit} -o again")


@click.command()
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
    with needs("export"):
        from pgxport.hub.share import PullOptions, pull

        start = time.perf_counter()
        with progress_bar() as progress:
            shared = pull(PullOptions(**options, dry_run=dry_run), progress=progress)
    if as_json:
        click.echo(json.dumps(shared.to_json() | {"pulled": not dry_run}, indent=1))
    elif dry_run:
        total = f"would fetch {size(shared.nbytes)} of {shared.repository} at {shared.commit}; try: the same without --dry-run"
        click.echo("\n".join([*_sizes(shared), total]))
    else:
        folder = options["output"] or shared.path.name
        click.echo(f"wrote {folder}: {size(shared.nbytes)} in {time.perf_counter() - start:.2f} s, every file verified")
        click.echo(f'try: pgx run {folder} --image photo.jpg --prompt "caption en"    pgx inspect {folder}')


def _sizes(shared: "Shared") -> list[str]:
    return [f"{name}: {size(nbytes)}" for name, nbytes in shared.files.items()]
