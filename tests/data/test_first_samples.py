# SPDX-License-Identifier: Apache-2.0
"""The first samples of a data set, as calibration takes them: in order, with or without answers, and from inside their folder only."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pgxport.data.loader import first_samples as first_of
from pgxport.errors import InputError, UsageError
from pgxport.metrics.sample import Sample
from pgxport.models.tiny.scenes import draw


def first_samples(data: Path | None, count: int) -> tuple[Sample, ...]:
    return first_of(data, count).samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an image inside, one in a folder below, and one outside."""
    made = tmp_path / "data"
    (made / "deep").mkdir(parents=True)
    for path, colour in ((made / "a.png", "red"), (made / "deep" / "b.png", "blue"), (tmp_path / "secret.png", "green")):
        Image.new("RGB", (8, 8), colour).save(path)
    return made


def write(folder: Path, *lines: object, name: str = "samples.jsonl") -> Path:
    file = folder / name
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return file


GOOD = {"image": "a.png", "prompt": "caption en", "answer": "a cat"}


def answers(data: Path) -> list[tuple[str, tuple[str, ...]]]:
    return [(s.prompt, s.answers) for s in first_samples(data, 9)]


def test_a_list_is_read_in_order_up_to_the_count(folder):
    file = write(folder, GOOD, "", {"image": "deep/b.png", "prompt": " ocr "}, {"image": "a.png", "prompt": "x", "answer": None})
    assert answers(file) == [("caption en", ("a cat",)), ("ocr", ()), ("x", ())]
    samples = first_samples(file, 9)
    assert samples[1].id == "samples.jsonl:3"
    assert samples[1].open().getpixel((0, 0)) == (0, 0, 255)
    assert first_samples(folder, 9) == samples
    assert len(first_samples(file, 2)) == 2


def test_a_folder_with_one_list_of_any_name_is_that_list(folder):
    write(folder, GOOD, name="mine.jsonl")
    assert len(first_samples(folder, 5)) == 1
    write(folder, GOOD, name="other.jsonl")
    with pytest.raises(
        UsageError, match=r"mine\.jsonl \(jsonl\), .*other\.jsonl \(jsonl\); give the file.*called samples\.jsonl"
    ):
        first_samples(folder, 5)
    write(folder, GOOD, GOOD)
    assert len(first_samples(folder, 5)) == 2


def test_images_with_texts_beside_them_are_samples(folder):
    (folder / "a.txt").write_text("caption en\na red square\n")
    (folder / "z.JPG").write_bytes((folder / "a.png").read_bytes())
    (folder / "z.json").write_text('{"prompt": "ocr"}')
    assert answers(folder) == [("caption en", ("a red square",)), ("ocr", ())]
    (folder / "z.txt").write_text("ocr")
    with pytest.raises(InputError, match=r"z\.JPG: has both z\.json and z\.txt"):
        first_samples(folder, 5)


def test_a_list_is_meant_rather_than_texts_beside_images(folder):
    (folder / "a.txt").write_text("ocr\nAB")
    write(folder, GOOD)
    assert answers(folder) == [("caption en", ("a cat",))]


def test_a_text_beside_an_image_names_no_other(folder):
    (folder / "a.json").write_text('{"prompt": "ocr", "image": "deep/b.png"}')
    with pytest.raises(InputError, match=r"a\.json: names an image, .*; take 'image' out"):
        first_samples(folder, 5)


def test_an_image_without_a_text_is_named(folder):
    with pytest.raises(InputError, match=r"a\.png: has neither of a\.json and a\.txt"):
        first_samples(folder, 5)


@pytest.mark.parametrize("image", ["../secret.png", "/etc/passwd", "deep/../../secret.png", "link.png", "linked/secret.png"])
def test_a_path_out_of_the_folder_is_refused(folder, image):
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "linked").symlink_to(folder.parent)
    file = write(folder, GOOD, {"image": image, "prompt": "caption en"})
    with pytest.raises(InputError, match=r"samples\.jsonl:2: .*(leads|is a link) out of"):
        first_samples(file, 5)


def test_a_linked_text_beside_an_image_is_refused(folder):
    (folder.parent / "secret.txt").write_text("caption en")
    (folder / "a.txt").symlink_to(folder.parent / "secret.txt")
    with pytest.raises(InputError, match=r"a\.txt: is a link out of"):
        first_samples(folder, 5)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "a JSON int"),
        ({"image": "a.png", "promt": "x"}, "'promt' is no key.*did you mean 'prompt'"),
        ({"image": "a.png", "prompt": 3}, "'prompt' is 3"),
        ({"image": "a.png"}, "has no 'prompt' or 'prefix' or 'question', which has to be text; it has 'image'"),
        ({"image": "a.png", "prompt": " "}, "'prompt' is ' ', and has to be text"),
        ({"prompt": "x"}, "has no 'image' or 'file_name'"),
        ({"image": "none.png", "prompt": "x"}, "no image 'none.png' below"),
        ({"image": "deep", "prompt": "x"}, "no image 'deep' below"),
        ({"image": "a\0b", "prompt": "x"}, "leads out of"),
        ({"image": "a" * 5000, "prompt": "x"}, "no image 'aaa|is no path"),
        ({"image": "a.png", "prompt": "x", "answer": 3}, "'answer' is 3"),
    ],
)
def test_an_error_names_the_line(folder, line, says):
    with pytest.raises(InputError, match=rf"(?s)samples\.jsonl:2: .*{says}"):
        first_samples(write(folder, GOOD, line), 5)


def test_a_slip_in_the_first_line_is_named_too(folder):
    with pytest.raises(InputError, match=r"samples\.jsonl:1: 'promt' is no key of a record; did you mean 'prompt'"):
        first_samples(write(folder, {"image": "a.png", "promt": "x"}), 5)


def test_what_is_not_there_or_empty_or_not_text_is_refused(folder):
    with pytest.raises(UsageError, match="no such file"):
        first_samples(folder / "nowhere", 5)
    with pytest.raises(UsageError, match=r"samples\.jsonl has no record: no known data set"):
        first_samples(write(folder), 5)
    (folder / "samples.jsonl").write_bytes(b'{"image": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8 at byte 11"):
        first_samples(folder, 5)


def test_a_damaged_image_is_refused_with_the_line(folder):
    (folder / "a.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"samples\.jsonl:1: .*a\.png: not a readable"):
        first_samples(write(folder, GOOD), 5)


def test_without_data_scenes_of_the_calibration_split_are_drawn():
    samples = first_samples(None, 12)
    assert len(samples) == 12
    assert len({s.prompt.split()[0] for s in samples}) >= 3
    assert all(s.answers or s.regions for s in samples)
    assert np.array_equal(np.asarray(samples[3].open()), np.asarray(draw("calibration", 3).image))
