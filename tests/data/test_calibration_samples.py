# SPDX-License-Identifier: Apache-2.0
"""Samples from files: what is read, and that no path leads out of their folder."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnx_ir")

from pgxport.data.calibration_samples import digest, read_samples
from pgxport.errors import InputError, UsageError
from pgxport.models.tiny.scenes import draw


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


def test_a_list_is_read_in_order_up_to_the_count(folder):
    file = write(folder, GOOD, "", {"image": "deep/b.png", "prompt": " ocr "}, {"image": "a.png", "prompt": "x", "answer": None})
    samples = read_samples(file, 9)
    assert [(s.prompt, s.answer) for s in samples] == [("caption en", "a cat"), ("ocr", None), ("x", None)]
    assert samples[1].name.endswith("samples.jsonl:3")
    assert samples[1].picture().getpixel((0, 0)) == (0, 0, 255)
    assert read_samples(folder, 9) == samples
    assert len(read_samples(file, 2)) == 2


def test_a_folder_with_one_list_of_any_name_is_that_list(folder):
    write(folder, GOOD, name="mine.jsonl")
    assert len(read_samples(folder, 5)) == 1
    write(folder, GOOD, name="other.jsonl")
    with pytest.raises(UsageError, match=r"mine\.jsonl, other\.jsonl"):
        read_samples(folder, 5)
    write(folder, GOOD, GOOD)
    assert len(read_samples(folder, 5)) == 2


def test_images_with_texts_beside_them_are_samples(folder):
    (folder / "a.txt").write_text("caption en\na red square\n")
    (folder / "z.JPG").write_bytes((folder / "a.png").read_bytes())
    (folder / "z.json").write_text('{"prompt": "ocr"}')
    assert [(s.prompt, s.answer) for s in read_samples(folder, 5)] == [("caption en", "a red square"), ("ocr", None)]
    (folder / "z.txt").write_text("ocr")
    with pytest.raises(InputError, match=r"z\.JPG has both z\.json and z\.txt"):
        read_samples(folder, 5)


def test_an_image_without_a_text_is_named(folder):
    with pytest.raises(InputError, match=r"a\.png has neither a\.json nor a\.txt"):
        read_samples(folder, 5)


@pytest.mark.parametrize("image", ["../secret.png", "/etc/passwd", "deep/../../secret.png", "link.png", "linked/secret.png"])
def test_a_path_out_of_the_folder_is_refused(folder, image):
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "linked").symlink_to(folder.parent)
    file = write(folder, GOOD, {"image": image, "prompt": "caption en"})
    with pytest.raises(InputError, match=r"samples\.jsonl:2: .* leads out of"):
        read_samples(file, 5)


def test_a_linked_text_beside_an_image_is_refused(folder):
    (folder.parent / "secret.txt").write_text("caption en")
    (folder / "a.txt").symlink_to(folder.parent / "secret.txt")
    with pytest.raises(InputError, match="leads out of"):
        read_samples(folder, 5)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("3", "a JSON int"),
        ({"image": "a.png", "promt": "x"}, "'promt' is no key.*did you mean 'prompt'"),
        ({"image": "a.png", "prompt": "x", "zzz": 1}, "there are image, prompt, answer"),
        ({"image": "a.png", "prompt": 3}, "'prompt' is 3"),
        ({"image": "a.png"}, "has no prompt"),
        ({"image": "a.png", "prompt": " "}, "has no prompt"),
        ({"prompt": "x"}, "names no image"),
        ({"image": "none.png", "prompt": "x"}, "is not a file of"),
        ({"image": "deep", "prompt": "x"}, "is not a file of"),
        ({"image": "a\0b", "prompt": "x"}, "is no path"),
        ({"image": "a" * 5000, "prompt": "x"}, "is no path"),
    ],
)
def test_an_error_names_the_line(folder, line, says):
    with pytest.raises(InputError, match=rf"(?s)samples\.jsonl:2: .*{says}"):
        read_samples(write(folder, GOOD, line), 5)


def test_what_is_not_there_or_empty_or_not_text_is_refused(folder):
    with pytest.raises(UsageError, match="no such file"):
        read_samples(folder / "nowhere", 5)
    with pytest.raises(UsageError, match="holds no samples"):
        read_samples(write(folder), 5)
    (folder / "samples.jsonl").write_bytes(b'{"image": "\xff"}')
    with pytest.raises(InputError, match="not UTF-8 at byte 11"):
        read_samples(folder, 5)


def test_a_damaged_image_is_refused_with_the_line(folder):
    (folder / "a.png").write_bytes(b"no picture")
    (sample,) = read_samples(write(folder, GOOD), 5)
    with pytest.raises(InputError, match=r"samples\.jsonl:1: .*a\.png"):
        sample.picture()


def test_without_data_scenes_of_the_calibration_split_are_drawn():
    samples = read_samples(None, 12)
    assert len(samples) == 12
    assert len({s.prompt.split()[0] for s in samples}) >= 3
    assert all(s.answer for s in samples)
    assert np.array_equal(np.asarray(samples[3].picture()), np.asarray(draw("calibration", 3).image))


def test_the_digest_is_of_images_prompts_and_answers_in_order(folder):
    other = [
        {**GOOD, "prompt": "caption de"},
        {**GOOD, "answer": "a dog"},
        {**GOOD, "image": "deep/b.png"},
        {**GOOD, "answer": None},
    ]
    digests = {digest(read_samples(write(folder, *lines), 5)) for lines in ([GOOD], *([o] for o in other), [GOOD, GOOD])}
    assert len(digests) == 6
    assert digest(read_samples(write(folder, GOOD), 1)) == digest(read_samples(write(folder, GOOD, name="again.jsonl"), 1))
