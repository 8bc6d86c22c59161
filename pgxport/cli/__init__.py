# SPDX-License-Identifier: Apache-2.0
"""The command `pgx`: one thin function a command. Results go to stdout, progress to a terminal's stderr."""

import signal
import sys

import click

from pgxport import __version__
from pgxport.cli import about, export, measure, run, share, tune
from pgxport.errors import PgxError
from pgxport.interrupts import signals_recorded
from pgxport.terminal import fail, warnings_shown

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="pgx")
def cli() -> None:
    """Export PaliGemma and PaliGemma 2 to ONNX, and run what was exported.

    \b
    Try first:   pgx demo
    Then:        pgx export --size tiny --res 224 -o b
                 pgx run b --image scene.png --prompt "detect red circle" --save out.png
    """


for command in (
    export.export, export.plan, export.calibrate, export.compile, run.run, measure.bench, measure.report, measure.diff, tune.tune,
    share.card, share.push, share.pull, about.inspect, about.doctor, about.demo,
):  # fmt: skip
    cli.add_command(command)


def main() -> None:
    """Run a command; each of our errors ends with its own exit code (docs/reference/exit-codes.md)."""
    try:
        # Signals come as exceptions, so that what is half done is cleaned up.
        with warnings_shown(), signals_recorded(signal.SIGINT, signal.SIGTERM):
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
        # click ends with 1 where the reader of a pipe has gone (`pgx … | head`), which is no failure.
        sys.exit(0 if stop.code == 1 else stop.code)
