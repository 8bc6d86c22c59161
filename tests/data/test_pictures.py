# SPDX-License-Identifier: Apache-2.0
"""`pgx run --images` finds pictures in files, folders and patterns, and in the records of a data set."""

import json
from pathlib import Path

import pytest
from PIL import Image

from pgxport.data.pictures import find_pictures
from pgxport.errors import InputError, UsageError
from pgxport.runners.many import EmbeddedPicture, read


@pytest.fixture
def album(tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    folder.mkdir()
    for name, colour in (("b.png", "red"), ("a.JPG", "blue"), ("c.webp", "green")):
        Image.new("RGB", (40, 30), colour).save(folder / name)
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not one of them")
    return folder


def lines(file: Path, *records: dict[str, object]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def test_folders_patterns_and_files_are_found_once_each(album: Path):
    def names(*patterns: str) -> list[str]:
        return [Path(str(path)).name for path in find_pictures([str(album / p) for p in patterns])]

    assert names("") == ["a.JPG", "b.png", "broken.png", "c.webp"]
    assert names("[bc].*", "b.png", "gone.png") == ["b.png", "c.webp", "gone.png"]
    (album / "[1].png").write_bytes(b"a name, not a pattern")
    assert names("[1].png") == ["[1].png"]
    (album / "[1].png").unlink()
    for nothing in ("*.gif", "empty"):
        (album / "empty").mkdir(exist_ok=True)
        with pytest.raises(UsageError, match="finds no picture"):
            names(nothing)
    (album / "empty").rmdir()


def test_the_pictures_of_records_are_found_once_each_in_their_order(album: Path):
    """Records need no answer here, and no prompt of theirs is asked."""
    records = [{"image": f"album/{name}", "prompt": "ocr"} for name in ("c.webp", "b.png", "c.webp")]
    for file in ("mine.jsonl", "no suffix that says so"):
        assert find_pictures([str(lines(album.parent / file, *records))]) == [album / "c.webp", album / "b.png"]
    one = lines(album.parent / "folder" / "one.jsonl", {"image": "deep/a.png", "prompt": "ocr"})
    with pytest.raises(InputError, match=r"one\.jsonl:1: no image 'deep/a\.png' below"):
        find_pictures([str(one.parent)])
    (one.parent / "deep").mkdir()
    Image.new("RGB", (8, 8)).save(one.parent / "deep" / "a.png")
    assert find_pictures([str(one.parent)]) == [one.parent / "deep" / "a.png"]


def test_a_folder_of_pictures_is_that_whatever_lies_beside_them(album: Path):
    lines(album / "samples.jsonl", {"image": "b.png", "prompt": "ocr"})
    assert len(find_pictures([str(album)])) == 4


def test_a_data_set_as_it_is_distributed_gives_its_pictures(album: Path):
    record = {"image": "b.png", "text": "Is there a cat?", "label": "no", "question_id": 1}
    assert find_pictures([str(lines(album / "pope.json", record, {**record, "question_id": 2}))]) == [album / "b.png"]


def test_pictures_in_the_records_themselves_go_by_their_samples_name(album: Path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    content = (album / "b.png").read_bytes()
    columns = {"prompt": ["ocr", "ocr"], "id": ["first", "second"], "image": [{"bytes": content, "path": "x"}] * 2}
    parquet.write_table(arrow.table(columns), album.parent / "rows.parquet")
    (picture,) = find_pictures([str(album.parent / "rows.parquet")])
    assert picture == EmbeddedPicture("first", content)
    assert (str(picture), read(picture)) == ("first", content)
