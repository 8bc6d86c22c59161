# SPDX-License-Identifier: Apache-2.0
"""Sizes, durations, lists of names and tables are written one way everywhere."""

import pytest

from pgxport.text import listed, size, table


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1_234_567, "1.23 MB"),
        (999_499_999, "999 MB"),
        (999_500_000, "1 GB"),
        (5e12, "5000 GB"),
    ],
)
def test_sizes_are_in_decimal_units(count: int, shown: str):
    assert size(count) == shown


@pytest.mark.parametrize(("count", "end"), [(1, "0"), (5, "4"), (6, "4 and 1 more"), (100, "4 and 95 more")])
def test_five_names_are_listed_and_then_a_count(count: int, end: str):
    assert listed(map(str, range(count))).endswith(end)


def test_a_table_is_plain_text_whatever_its_cells_hold(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    rows = [["", "[bold]b[/bold] :smile:", "x" * 300], ["猫", "  b", "two\nlines"]]
    assert table(rows).splitlines() == [f"    [bold]b[/bold] :smile:  {'x' * 300}", f"猫    b{' ' * 21}two lines"]


def test_a_table_without_rows_is_empty():
    assert table([]) == ""
