# SPDX-License-Identifier: Apache-2.0
"""The errors pgx raises on purpose, each with its command's exit code (docs/reference/exit-codes.md)."""

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")


class PgxError(Exception):
    """A failure that is not a bug of ours. The message says what, where, the value seen, and the fix."""

    exit_code = 1


class PgxWarning(UserWarning):
    """Something that is no failure, and that changes what comes out; commands show it on stderr."""


class UsageError(PgxError):
    """The command or the configuration asks for something that does not exist."""

    exit_code = 2


class InputError(PgxError):
    """A model, an image or a prompt that is invalid or not supported."""

    exit_code = 3


class CheckpointError(InputError):
    """A checkpoint that is not a complete, sound PaliGemma."""


class IntegrityError(PgxError):
    """A file differs from its digest, its manifest or its format, or reaches outside its folder."""

    exit_code = 4


class DiskError(PgxError):
    """Reading or writing failed: no space, no permission."""

    exit_code = 5


class NumericError(PgxError):
    """Not enough memory, or numbers that are not finite."""

    exit_code = 6


class EngineError(PgxError):
    """The device or the engine that was asked for is not available."""

    exit_code = 7


class GateError(PgxError):
    """A quality gate failed."""

    exit_code = 8


class HubError(PgxError):
    """The model hub could not be reached or refused."""

    exit_code = 9


def choose(option: str, name: str, table: Mapping[str, T]) -> T:
    """Return the table's entry of that name.

    Raises:
        UsageError: the table has none; the message lists its names.
    """
    if name not in table:
        raise UsageError(f"--{option} {name!r} does not exist; choose {', '.join(table)}")
    return table[name]


@contextmanager
def needs(extra: str, what: str = "this command") -> Iterator[None]:
    """Turn a missing package inside into the line that says what to install.

    Args:
        extra: The extra of pgxport that holds what is imported inside.
        what: What cannot be done without it, as the message's subject.

    Raises:
        UsageError: a package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "pgxport"):
            raise
        raise UsageError(f'{what} needs {package}: pip install "pgxport[{extra}]"') from error


def require(module: str, what: str, extra: str = "report") -> Any:
    """Import a module of an extra and return it.

    Raises:
        UsageError: it is not installed.
    """
    with needs(extra, what):
        return importlib.import_module(module)
