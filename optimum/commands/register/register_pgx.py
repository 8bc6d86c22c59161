# SPDX-License-Identifier: Apache-2.0
"""The command `optimum-cli export pgx`.

optimum loads every file of this namespace at its start, so nothing of pgx is imported before `run`.
"""

from argparse import ArgumentParser, ArgumentTypeError

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo
from optimum.commands.export.base import ExportCommand


class PgxExportCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(name="pgx", help="Export PaliGemma and PaliGemma 2 to a pgx bundle.")

    @staticmethod
    def parse_args(parser: ArgumentParser) -> None:
        parser.description = "Write a pgx bundle from a PaliGemma checkpoint, as `pgx export` does."
        parser.epilog = "example: optimum-cli export pgx -m google/paligemma2-3b-mix-448 bundle"
        parser.add_argument("-m", "--model", required=True, help="A checkpoint's folder, or its name on the hub.")
        parser.add_argument("output", help="The folder to write.")
        parser.add_argument("--precision", help="How weights are stored; pgx export --help lists what there is.")
        parser.add_argument("--target", help="The engine to write for.")
        parser.add_argument("--masks", help="vae-oid.npz, for the masks of `segment`.")
        parser.add_argument("--context", type=_positive, help="Longest prefix and answer together, in tokens.")
        parser.add_argument("--overwrite", action="store_true", help="Replace a bundle that is there.")

    def run(self) -> None:
        import click

        from pgxport.errors import PgxError, needs
        from pgxport.terminal import fail, progress_bar
        from pgxport.text import size

        given = {name: getattr(self.args, name) for name in ("precision", "target", "masks", "context")}
        given = {name: value for name, value in given.items() if value is not None}
        try:
            with needs("export"):
                from pgxport.exporter.export import export
                from pgxport.exporter.prepare import ExportOptions

            with progress_bar() as progress:
                options = ExportOptions(
                    output=self.args.output, checkpoint=self.args.model, overwrite=self.args.overwrite, **given
                )
                bundle = export(options, progress=progress)
        except PgxError as error:
            fail(error.exit_code, str(error))
        click.echo(f"wrote {bundle.path}: {size(bundle.nbytes)}")
        click.echo(f'try: pgx run {bundle.path} --image photo.jpg --prompt "caption en"')


def _positive(text: str) -> int:
    if int(text) < 1:
        raise ArgumentTypeError(f"{text} is not 1 or more")
    return int(text)


# optimum reads this once for every folder of its namespace. A source tree beside an installed pgxport makes
# two folders of one module, and registering a command twice is an error: an iterator is empty at the second.
REGISTER_COMMANDS = iter([(PgxExportCommand, ExportCommand)])
