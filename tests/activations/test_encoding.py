# SPDX-License-Identifier: Apache-2.0
"""A sample's true answer becomes the text that PaliGemma writes, and the digest holds images, prompts and answers."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pgxport.activations.encoding import answer_text, digest
from pgxport.data.loader import first_samples
from pgxport.metrics.sample import Region, Sample, Segmentation
from pgxport.models.tiny.scenes import ask, draw, locations

CAT, DOG = Region("cat", (0.0, 10.0, 15.0, 20.0)), Region("dog", (-2.0, 0.0, 30.0, 47.0))
CROWD = Region("people", (0.0, 0.0, 9.0, 9.0), crowd=True)
MASKED = Region("cat", CAT.box, Segmentation((30, 40), runs=(0, 1200)))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture of 30 × 40 pixels."""
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize(
    ("answers", "regions", "text"),
    [
        (("a cat ", "the cat"), (), "a cat"),
        ((), (), None),
        ((" ",), (), None),
        # 10 of 40 pixels are 256 of 1024 bins; what lies outside of the picture ends at its edge.
        ((), (CAT, CROWD, DOG), "<loc0000><loc0256><loc0512><loc0512> cat ; <loc0000><loc0000><loc1023><loc1023> dog"),
        ((), (CROWD,), None),
        # The codes of a mask would follow, and are not known.
        ((), (MASKED,), "<loc0000><loc0256><loc0512><loc0512>"),
    ],
)
def test_the_answer_is_the_first_text_or_the_boxes_of_the_objects(picture, answers, regions, text):
    assert answer_text(Sample("s", picture, "detect cat", "detect", "box_iou", answers, regions)) == text


def test_the_digest_is_of_images_prompts_and_answers_in_order(picture):
    good = {"image": "a.png", "prompt": "caption en", "answer": "a cat"}
    Image.new("RGB", (8, 8), "blue").save(picture.with_name("b.png"))

    def digest_of(*lines: dict[str, str | None], name: str = "samples.jsonl") -> str:
        file = picture.with_name(name)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return digest(first_samples(file, 5).samples)

    others = [{**good, "prompt": "caption de"}, {**good, "answer": "a dog"}, {**good, "image": "b.png"}, {**good, "answer": None}]
    digests = {digest_of(good), *map(digest_of, others), digest_of(good, good)}
    assert len(digests) == 6
    assert digest_of(good) == digest_of(good, name="again.jsonl")


def test_a_drawn_scene_is_in_the_digest_by_its_pixels():
    """Calibration files keep this digest, so what it is made of may not change."""
    samples = first_samples(None, 6).samples
    whole = hashlib.sha256()
    for i, sample in enumerate(samples):
        pixels = hashlib.sha256(np.asarray(draw("calibration", i).image).tobytes()).hexdigest()
        whole.update(f"{pixels} {json.dumps([sample.prompt, answer_text(sample)])}\n".encode())
    assert digest(samples) == whole.hexdigest()


def test_a_scenes_boxes_are_written_as_the_tiny_checkpoint_was_taught():
    for i, sample in enumerate(first_samples(None, 20).samples):
        if sample.task == "detect":
            questions = ask(draw("calibration", i), seed=i)
            things = next(q.things for q in questions if q.task == "detect" and q.prompt == sample.prompt)
            assert answer_text(sample) == " ; ".join(f"{locations(thing.box)} {label}" for label, thing in things)
