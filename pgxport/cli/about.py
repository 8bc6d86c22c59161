# SPDX-License-Identifier: Apache-2.0
"""The commands that show what there is: inspect, doctor, demo."""

import json
from pathlib import Path

import click

from pgxport.cli.options import json_option
from pgxport.errors import needs
from pgxport.text import terminal_safe


@click.command()
@click.argument("path", type=click.Path())
@json_option
def inspect(path: str, as_json: bool) -> None:
    """Show what a bundle or a checkpoint holds, without loading it.

    \b
    pgx inspect b
    """
    from pgxport.inspection import describe, render

    with needs("export"):  # for a checkpoint; a bundle needs the base alone
        facts = describe(Path(path))
    click.echo(json.dumps(facts, indent=1) if as_json else terminal_safe(render(facts)))


@click.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what is installed, which engines really open a session, and what to install.

    \b
    pgx doctor
    """
    from pgxport.doctor import examine, render

    facts = examine()
    click.echo(json.dumps(facts, indent=1) if as_json else render(facts))


@click.command()
@click.option("-o", "--output", type=click.Path(), default="demo", show_default=True, help="The folder to write.")
def demo(output: str) -> None:
    """Walk the whole road on the embedded model: draw scenes, export, ask, and save the annotated pictures.

    \b
    pgx demo -o demo
    """
    with needs("export"):
        from pgxport.demo import walk

    walk(Path(output), echo=click.echo)
