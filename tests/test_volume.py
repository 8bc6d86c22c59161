# SPDX-License-Identifier: Apache-2.0
"""-q and -v set how much a command shows of its progress: on stderr, and never instead of its result."""

import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from pgxport import terminal
from pgxport.cli import cli

SHOWING = ["bench", "calibrate", "compile", "diff", "export", "pull", "push", "report", "run", "tune"]


class Terminal:
    """A stderr that says it is one."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        return None

    def isatty(self) -> bool:
        return True


Spoken = Callable[..., str]


@pytest.fixture
def spoken(monkeypatch: pytest.MonkeyPatch) -> Spoken:
    """Run a command that works through two things, and return its stderr."""

    def run(*flags: str, bar: bool, tty: bool) -> str:
        @click.command()
        @terminal.volume_options
        def command() -> None:
            if bar:
                with terminal.progress_bar() as progress:
                    for done in (1, 2, 3):
                        if progress:
                            progress("first\x1b[31m" if done < 3 else "second", done, 3)
            else:
                with terminal.stages() as say:
                    for what in ("first\x1b[31m", "first\x1b[31m", "second", ""):
                        if say:
                            say(what)
            terminal.note("a note")

        stream = Terminal()
        stream.isatty = lambda: tty  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        command.main(list(flags), standalone_mode=False)
        return stream.text

    return run


@pytest.mark.parametrize("bar", [True, False])
def test_progress_is_shown_on_a_terminal_alone(spoken: Spoken, bar: bool):
    assert "second" in spoken(bar=bar, tty=True)
    assert spoken(bar=bar, tty=False) == "a note\n"


@pytest.mark.parametrize("bar", [True, False])
@pytest.mark.parametrize("tty", [True, False])
@pytest.mark.parametrize("flag", ["-q", "--quiet"])
def test_quiet_says_nothing(spoken: Spoken, bar: bool, tty: bool, flag: str):
    assert spoken(flag, bar=bar, tty=tty) == ""


@pytest.mark.parametrize("bar", [True, False])
@pytest.mark.parametrize("tty", [True, False])
@pytest.mark.parametrize("flag", ["-v", "--verbose"])
def test_verbose_says_each_thing_once_and_when(spoken: Spoken, bar: bool, tty: bool, flag: str):
    lines = spoken(flag, bar=bar, tty=tty).splitlines()
    assert [line.split(" s  ")[-1] for line in lines] == ["first", "second", "a note"]
    times = [float(line.split(" s  ")[0]) for line in lines[:2]]
    assert times == sorted(times)


def test_a_stage_line_is_cleared_when_the_command_fails(monkeypatch: pytest.MonkeyPatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)

    def command() -> None:
        with terminal.stages() as say:
            assert say
            say("measuring")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command()
    assert stream.text.endswith("\r\x1b[K\r")


def test_both_are_a_contradiction(spoken: Spoken):
    with pytest.raises(click.UsageError, match="-q and -v were both given"):
        spoken("-q", "-v", bar=True, tty=True)


def test_one_command_is_not_as_loud_as_the_last(spoken: Spoken):
    assert spoken("-q", bar=False, tty=False) == ""
    assert spoken(bar=False, tty=False) == "a note\n"


def test_every_command_that_shows_progress_has_both():
    for name in SHOWING:
        flags = {flag for option in cli.commands[name].params for flag in option.opts}
        assert flags >= {"-q", "--quiet", "-v", "--verbose"}, name


def test_an_export_says_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("onnx_ir")
    export = ["export", "--size", "tiny", "--res", "112", "--overwrite", "-o", str(tmp_path / "b")]
    cli.main([*export, "-v"], standalone_mode=False)
    printed = capsys.readouterr()
    assert [line.split()[-1] for line in printed.err.splitlines()][:2] == ["token_table.bin", "vision_encoder.data"]
    assert printed.out.startswith("wrote ")
    cli.main([*export, "-q"], standalone_mode=False)
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("wrote ")
