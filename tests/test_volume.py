# SPDX-License-Identifier: Apache-2.0
"""-q and -v: how much a command says of what it is doing, always on stderr, and never instead of its result."""

import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest

from pgxport import cli

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
    """What a command that works through two things says on stderr."""

    def run(*flags: str, bar: bool, terminal: bool) -> str:
        @click.command()
        @cli.volume_options
        def command() -> None:
            if bar:
                with cli.progress_bar() as progress:
                    for done in (1, 2, 3):
                        if progress:
                            progress("first\x1b[31m" if done < 3 else "second", done, 3)
            else:
                said = cli.stages()
                for what in ("first\x1b[31m", "first\x1b[31m", "second", ""):
                    if said:
                        said(what)
            cli.note("a note")

        stream = Terminal()
        stream.isatty = lambda: terminal  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        command.main(list(flags), standalone_mode=False)
        return stream.text

    return run


@pytest.mark.parametrize("bar", [True, False])
def test_progress_is_shown_on_a_terminal_alone(spoken: Spoken, bar: bool):
    assert "second" in spoken(bar=bar, terminal=True)
    assert spoken(bar=bar, terminal=False) == "a note\n"


@pytest.mark.parametrize("bar", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("flag", ["-q", "--quiet"])
def test_quiet_says_nothing(spoken: Spoken, bar: bool, terminal: bool, flag: str):
    assert spoken(flag, bar=bar, terminal=terminal) == ""


@pytest.mark.parametrize("bar", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("flag", ["-v", "--verbose"])
def test_verbose_says_each_thing_once_and_when(spoken: Spoken, bar: bool, terminal: bool, flag: str):
    lines = spoken(flag, bar=bar, terminal=terminal).splitlines()
    assert [line.split(" s  ")[-1] for line in lines] == ["first", "second", "a note"]
    times = [float(line.split(" s  ")[0]) for line in lines[:2]]
    assert times == sorted(times)


def test_both_are_a_contradiction(spoken: Spoken):
    with pytest.raises(click.UsageError, match="-q and -v were both given"):
        spoken("-q", "-v", bar=True, terminal=True)


def test_one_command_is_not_as_loud_as_the_last(spoken: Spoken):
    assert spoken("-q", bar=False, terminal=False) == ""
    assert spoken(bar=False, terminal=False) == "a note\n"


def test_every_command_that_shows_progress_has_both():
    for name in SHOWING:
        flags = {flag for option in cli.cli.commands[name].params for flag in option.opts}
        assert flags >= {"-q", "--quiet", "-v", "--verbose"}, name


def test_an_export_says_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("onnx_ir")
    export = ["export", "--size", "tiny", "--res", "112", "--overwrite", "-o", str(tmp_path / "b")]
    cli.cli.main([*export, "-v"], standalone_mode=False)
    said = capsys.readouterr()
    assert [line.split()[-1] for line in said.err.splitlines()][:2] == ["token_table.bin", "vision_encoder.data"]
    assert said.out.startswith("wrote ")
    cli.cli.main([*export, "-q"], standalone_mode=False)
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("wrote ")
