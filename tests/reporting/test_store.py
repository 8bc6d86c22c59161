# SPDX-License-Identifier: Apache-2.0
"""Results on disk: kept line by line under all that they depend on, and never lost in silence."""

import json
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from pydantic import TypeAdapter

from pgxport.errors import IntegrityError, UsageError
from pgxport.reporting.store import ResultFile, StoredLine, alone, load_array, save_array


class Number(StoredLine):
    kind: Literal["number"] = "number"
    value: int


def opened(folder: Path, **conditions: str) -> ResultFile[Number]:
    return ResultFile(folder, conditions, TypeAdapter(Number))


def kept(folder: Path, *values: int) -> Path:
    file = opened(folder, checkpoint="a")
    for value in values:
        file.add(Number(value=value))
    return file.path


def test_a_result_holds_only_for_all_that_it_depends_on(tmp_path: Path):
    kept(tmp_path, 1, 2)
    assert [line.value for line in opened(tmp_path, checkpoint="a").lines] == [1, 2]
    assert opened(tmp_path, checkpoint="b").lines == []
    assert len(list(tmp_path.iterdir())) == 2
    assert opened(tmp_path, checkpoint="a").find(kind="number", value=2) == Number(value=2)
    assert opened(tmp_path, checkpoint="a").find(kind="number", value=3) is None


def test_the_first_line_says_what_the_results_depend_on(tmp_path: Path):
    first, _ = kept(tmp_path, 1).read_text().splitlines()
    assert json.loads(first) == {"kind": "conditions", "checkpoint": "a"}


def test_a_line_that_a_kill_cut_off_is_taken_away(tmp_path: Path):
    path = kept(tmp_path, 1, 2)
    content = path.read_bytes()
    last = content.splitlines(keepends=True)[-1]
    for cut in range(1, len(last)):
        path.write_bytes(content[:-cut])
        assert [line.value for line in opened(tmp_path, checkpoint="a").lines] == [1]
        assert path.read_bytes() == content.removesuffix(last)


def test_a_first_line_that_a_kill_cut_off_is_begun_again(tmp_path: Path):
    path = kept(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:5])
    assert opened(tmp_path, checkpoint="a").lines == []
    assert json.loads(path.read_text())["checkpoint"] == "a"


def test_any_other_damage_is_an_error(tmp_path: Path):
    path = kept(tmp_path, 1, 2)
    content = path.read_text()
    for number, damaged in (
        (3, content.replace('"value":2', '"value":"x"')),
        (2, content.replace('"number"', '"other"', 1)),
        (1, "{}\n"),
    ):
        path.write_text(damaged)
        with pytest.raises(IntegrityError, match=f"line {number}: .*; delete the file"):
            opened(tmp_path, checkpoint="a")


def test_two_commands_do_not_work_in_one_folder(tmp_path: Path):
    again = alone(tmp_path, "--work")
    with alone(tmp_path, "--work"), pytest.raises(UsageError, match=r"another pgx works in .* choose another --work"), again:
        pass
    with alone(tmp_path, "--work"):
        pass


def test_an_array_is_read_as_it_was_written_or_not_at_all(tmp_path: Path):
    save_array(tmp_path / "a.npy", np.arange(6).reshape(2, 3))
    assert load_array(tmp_path / "a.npy").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [file.name for file in tmp_path.iterdir()] == ["a.npy"]
    (tmp_path / "a.npy").write_bytes(b"half")
    with pytest.raises(IntegrityError, match="cannot be read"):
        load_array(tmp_path / "a.npy")
