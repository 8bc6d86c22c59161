# SPDX-License-Identifier: Apache-2.0
"""What a command shows on stderr beside its result: progress, notes, errors; more with -v, less with -q."""

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import click

from pgxport.errors import PgxWarning
from pgxport.text import size, terminal_safe

VOLUME = "pgxport.volume"  # in a command's context: "quiet" or "verbose", or absent

Say = Callable[[str], None]  # what is being done; "" after the last
Progress = Callable[[str, int, int], None]  # what is being done, bytes or steps so far, bytes or steps in all


def _set_volume(context: click.Context, option: click.Parameter, given: object) -> None:
    if given and VOLUME in context.meta:
        raise click.UsageError("-q and -v were both given; choose one")
    if given:
        context.meta[VOLUME] = option.name


def volume_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command that shows what it is doing the options -q and -v."""
    quiet = click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=_set_volume, help="Only errors on stderr.")
    verbose = click.option(
        "-v", "--verbose", is_flag=True, expose_value=False, callback=_set_volume, help="Say each thing that is done, and when."
    )
    return quiet(verbose(command))


def volume() -> str | None:
    """The volume of the running command: "quiet", "verbose", or None."""
    context = click.get_current_context(silent=True)
    return context.meta.get(VOLUME) if context else None


def shows_progress() -> bool:
    """Whether bars and stage lines are drawn: on a terminal, without --quiet."""
    return sys.stderr.isatty() and volume() != "quiet"


@contextmanager
def progress_bar(*, steps: bool = False) -> Iterator[Progress | None]:
    """Show a bar with bytes, rate and time left on a terminal, lines with --verbose, else nothing.

    Args:
        steps: The counts are of steps and not of bytes.
    """
    if volume() == "verbose" or not shows_progress():
        yield ProgressLog() if volume() == "verbose" else None
        return
    from rich import progress
    from rich.console import Console

    of_bytes = progress.DownloadColumn(), progress.TransferSpeedColumn(), progress.TimeRemainingColumn()
    counted: tuple[progress.ProgressColumn, ...] = (progress.MofNCompleteColumn(),) if steps else of_bytes
    columns = progress.TextColumn("{task.description}"), progress.BarColumn(), *counted
    with progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        yield lambda label, done, total: bar.update(task, description=label, completed=done, total=total)


@contextmanager
def stages() -> Iterator[Say | None]:
    """Show each stage on one line of a terminal, which is cleared at the end, or on lines with --verbose."""
    if volume() == "verbose" or not shows_progress():
        yield ProgressLog() if volume() == "verbose" else None
        return
    try:
        yield stage_line
    finally:
        stage_line("")


def stage_line(what: str) -> None:
    """Replace the terminal's last line by what is being done."""
    click.echo(f"\r\x1b[K{terminal_safe(what)}\r", nl=False, err=True)


class ProgressLog:
    """Writes a line on stderr for each thing that begins, with the seconds since the first."""

    def __init__(self) -> None:
        self._start, self._last = time.perf_counter(), ""

    def __call__(self, what: str, done: int = 0, total: int = 0) -> None:
        if what and what != self._last:
            click.echo(f"{time.perf_counter() - self._start:9.2f} s  {terminal_safe(what)}", err=True)
        self._last = what


def note(text: str) -> None:
    """Write on stderr what is worth knowing beside a result, unless --quiet."""
    if volume() != "quiet":
        click.echo(text, err=True)


def detail(text: str) -> None:
    """Write on stderr what only --verbose shows."""
    if volume() == "verbose":
        click.echo(terminal_safe(text), err=True)


@contextmanager
def warnings_shown() -> Iterator[None]:
    """Show a PgxWarning as a note, once, and every other warning as Python does."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def shown(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, PgxWarning):
                note(" ".join(terminal_safe(str(message)).split()))
            else:
                show(message, category, *where, **more)

        warnings.showwarning = shown
        yield


def fail(code: int, message: str) -> NoReturn:
    """End with one line on stderr, whatever a file's name or a stranger's manifest put in the message."""
    click.echo(f"pgx: {' '.join(terminal_safe(message).split())}", err=True)
    sys.exit(code)


@dataclass(frozen=True)
class Cost:
    """What a command took: seconds, and the most memory that this process has had resident, in bytes."""

    seconds: float
    peak_rss: int

    @classmethod
    def since(cls, start: float) -> "Cost":
        """The cost until now of what began at `start` of time.perf_counter()."""
        from pgxport.machine.memory import peak_rss

        return cls(round(time.perf_counter() - start, 2), peak_rss())

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the keys of every command's JSON."""
        return {"seconds": self.seconds, "peak_rss_bytes": self.peak_rss}

    def __str__(self) -> str:
        return f"{self.seconds} s, peak memory {size(self.peak_rss)}"
