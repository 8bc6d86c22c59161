# SPDX-License-Identifier: Apache-2.0
"""One prompt about many pictures: each is answered as by itself, and one that cannot be is a row."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("onnxruntime")

from pgxport import cli
from pgxport.data.pictures import find_pictures
from pgxport.runners.many import PictureQuestion, ask_each
from pgxport.runners.runner import Runner

PROMPT = "caption en"


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("album")
    for name, colour in (("b.png", "red"), ("a.JPG", "blue"), ("c.webp", "green")):
        Image.new("RGB", (40, 30), colour).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not one of them")
    return folder


def test_each_is_answered_as_by_itself_and_a_broken_one_is_a_row(tiny_112: Path, album: Path):
    pictures = [*find_pictures([str(album)]), album / "gone.png"]
    rows = {Path(row.image).name: row for row in ask_each(str(tiny_112), pictures, PictureQuestion(PROMPT, threads=1))}
    assert list(rows) == ["a.JPG", "b.png", "broken.png", "c.webp", "gone.png"]
    with Runner.from_pretrained(tiny_112, threads=1) as runner:
        for name in ("a.JPG", "b.png", "c.webp"):
            assert rows[name].answer == runner.answer(album / name, PROMPT)
    assert (rows["broken.png"].answer, rows["broken.png"].exit_code) == (None, 3)
    assert "convert it to PNG or JPEG" in str(rows["broken.png"].error)
    assert "does not exist" in str(rows["gone.png"].error)


def invoke(*words: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(cli.cli, ["run", *words], standalone_mode=False)
    if isinstance(done.exception, Exception):
        return getattr(done.exception, "exit_code", 1), done.stdout, str(done.exception)
    return done.exit_code, done.stdout, done.stderr


def test_the_command_prints_a_line_each(tiny_112: Path, album: Path):
    code, out, err = invoke(str(tiny_112), "--images", str(album), "--prompt", PROMPT, "--json")
    assert (code, err) == (0, "3 of 4 pictures answered\n")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [set(row) >= {"image", "text", "boxes", "timings"} for row in rows] == [True, True, False, True]
    assert set(rows[2]) == {"image", "error", "exit_code"}
    code, out, _ = invoke(str(tiny_112), "--images", str(album), "--prompt", PROMPT)
    assert [line.split(": ")[0] for line in out.splitlines()] == [row["image"] for row in rows]
    assert f"{album}/broken.png: FAILED: " in out


def test_only_failures_end_with_their_code(tiny_112: Path, album: Path):
    assert invoke(str(tiny_112), "--images", str(album / "broken.png"), "--prompt", PROMPT)[0] == 3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "give --image, or --images"),
        (["--image", "a", "--images", "b"], "give --image, or --images"),
        (["--images", "a", "--save", "out.png"], "--save draws on one picture"),
        (["--image", "a", "--cluster", "local"], "give them with --images"),
    ],
)
def test_what_does_not_go_together_is_refused(words: list[str], says: str):
    code, _, said = invoke("b", "--prompt", PROMPT, *words)
    assert (code, says in said) == (2, True), said
