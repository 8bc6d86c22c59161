# SPDX-License-Identifier: Apache-2.0
"""Which disagreements a report shows, in which order, and that a page never outgrows its 5 MB."""

import io
from pathlib import Path

import numpy as np
import pytest
from made_up_report import device, report, row
from PIL import Image

from pgxport.metrics.sample import Region, Sample, Segmentation
from pgxport.reporting import disagreements as pictures
from pgxport.reporting.disagreements import SIDE, Album, disagreements
from pgxport.runners.outputs import Answer, parse


def noise(seed: int) -> bytes:
    """What compresses worst."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(256, size=(400, 400, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def sample(i: int, task: str = "answer", truth: str = "yes", image: bytes | Path = b"") -> Sample:
    return Sample(f"s{i}", image or noise(i), f"prompt {i}", task, "exact_match", (truth,))


def said(*texts: str) -> list[Answer]:
    return [Answer(text, (1,)) for text in texts]


def test_failures_come_first_and_every_task_has_its_turn():
    asked = [sample(0), sample(1), sample(2), sample(3, "ocr"), sample(4, "ocr"), sample(5)]
    answers = {
        "fp32": said("no", "yes", "yes", "yes", "a", "yes"),
        "int4": said("oh", "no", "no", "no", "b", "yes"),  # 0 and 4 are merely different, 5 is the same
    }
    assert [d.sample for d in disagreements(asked, answers, "fp32", 10, Album())] == ["s1", "s3", "s2", "s4", "s0"]
    assert {d.task for d in disagreements(asked, answers, "fp32", 2, Album())} == {"answer", "ocr"}


def test_what_is_true_and_what_was_found_is_drawn():
    white = io.BytesIO()
    Image.new("RGB", (64, 64), "white").save(white, "PNG")
    mask = Segmentation((64, 64), runs=(0, 64 * 32, 64 * 32))
    asked = Sample("s", white.getvalue(), "detect a", "detect", "box_accuracy", (), (Region("a", (0, 0, 64, 32), mask),))
    text = "<loc0000><loc0512><loc1023><loc1023> a"
    found = Answer(text, (1,), *parse(text, 64, 64))
    album = Album()
    (shown,) = disagreements([asked], {"fp32": said("nothing"), "int8": [found]}, "fp32", 1, album)
    names = [shown.picture, *(s.picture for s in shown.answers)]
    assert names[1] is None  # nothing located, nothing to draw
    drawn = [np.asarray(Image.open(io.BytesIO(album.files[name]))).astype(int) for name in names if name]
    left, right = (slice(8, 56), slice(4, 28)), (slice(8, 56), slice(36, 60))
    assert drawn[0][left].mean() < 240 < drawn[0][right].mean()  # the mask lies on the left half
    assert shown.answers[0].fault == "locates nothing"
    assert shown.truth == "a"


def test_pictures_are_small():
    album = Album()
    name = album.add(Image.new("RGBA", (4000, 1000), "red"))
    assert Image.open(io.BytesIO(album.files[name])).size == (SIDE, SIDE // 4)


def test_a_picture_that_cannot_be_read_leaves_its_words(tmp_path: Path):
    asked = [sample(0, image=tmp_path / "gone.png")]
    (shown,) = disagreements(asked, {"a": said("yes"), "b": said("no")}, "a", 1, Album())
    assert (shown.picture, [s.text for s in shown.answers]) == (None, ["yes", "no"])


def test_a_page_never_outgrows_five_megabytes():
    pytest.importorskip("vl_convert")
    pytest.importorskip("altair")
    from pgxport.reporting.page import page

    labels = ["fp32", *(f"b{i}" for i in range(7))]
    asked = [sample(i) for i in range(70)]
    words = [" ".join(f"w{(i * k) % 97}" for k in range(60)) for i in range(1, 9)]
    answers = {label: said(*[words[n]] * len(asked)) for n, label in enumerate(labels)}
    album = Album()
    shown = disagreements(asked, answers, "fp32", 70, album)
    assert 10 < len(shown) < 70
    made = report(device(*map(row, labels), disagreements=shown))
    assert pictures.BUDGET / 3 < len(page(made, album.files).encode()) < 5_000_000
