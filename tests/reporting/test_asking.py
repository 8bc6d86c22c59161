# SPDX-License-Identifier: Apache-2.0
"""What is told of an answer, and of how far two models agree along one."""

from pathlib import Path

import numpy as np
import pytest

from pgxport.bundle.manifest import TokenIds
from pgxport.errors import InputError
from pgxport.metrics.fidelity import kl_divergence
from pgxport.metrics.sample import Drawn, Sample
from pgxport.reporting.asking import TokenAgreement, answer_json, compare, open_picture, picture_of, write_logits
from pgxport.reporting.measured import Asked, answer_of
from pgxport.reporting.store import load_array
from pgxport.runners.outputs import Answer, Box, Fault, Malformed, Mask

IDS = TokenIds(bos=0, eos=1, pad=2, newline=3, image=4, loc_first=5, loc_count=2, seg_first=9, seg_count=1)


def test_logits_are_compared_position_by_position(tmp_path: Path):
    reference, mine = np.random.default_rng(0).normal(0, 2, (2, 3, 10)).astype(np.float32)
    reference[0, 6] = mine[0, 6] = 9.0  # a <loc…> that both would write
    reference[1, 0] = mine[1, 3] = 9.0  # where they do not agree
    reference[2, 9] = mine[2, 9] = 9.0  # a <seg…>
    write_logits(tmp_path / "logits.npy", iter(reference), 3)
    found = compare(iter(mine), load_array(tmp_path / "logits.npy"), IDS)
    each = kl_divergence(mine, reference)
    assert (found.positions, found.agreed, found.located) == (3, 2, 2)
    assert (found.kl, found.kl_worst) == pytest.approx((each.sum(), each.max()))
    among = kl_divergence(mine[[0, 2]], reference[[0, 2]], np.array([5, 6, 9]))
    assert found.kl_located == pytest.approx(among.sum())
    twice = TokenAgreement.total([found, found])
    assert (twice.positions, twice.agreed, twice.located, twice.kl_worst) == (6, 4, 4, found.kl_worst)
    assert (twice.kl, twice.kl_located) == (2 * found.kl, 2 * found.kl_located)
    assert TokenAgreement.total([]) == TokenAgreement()


def test_another_vocabulary_is_not_compared():
    with pytest.raises(InputError, match="another vocabulary"):
        compare(iter(np.zeros((1, 12), np.float32)), np.zeros((1, 10), np.float32), IDS)


def test_an_answer_survives_the_way_to_the_file_and_back():
    box = Box("cat", 1.0, 2.0, 3.0, 4.0, (1, 2, 3, 4))
    mask = np.array([[False, True], [True, True]])
    timings = {"preprocess": 1.0, "vision": 2.0, "projector": 0.5, "prefill": 3.0, "decode": 4.0, "post": 0.5}
    answer = Answer(
        "<loc0001> cat",
        (5, 6),
        (box,),
        (Mask("cat", box, (1, 2), mask),),
        (Malformed(Fault.NO_BOX, "x"),),
        timings,
        truncated=False,
    )
    asked = Asked(sample="k", **answer_json(answer))
    back = answer_of(Asked.model_validate_json(asked.model_dump_json()))
    assert back == answer
    assert back.masks[0].mask is not None
    assert (back.masks[0].mask == mask).all()
    # Two tokens and the end of the text are two decode steps after the prefill's.
    assert asked.seconds | {"first_token": 6.5, "answer": 11.0, "step": 2.0} == asked.seconds


@pytest.mark.parametrize(
    ("ids", "truncated", "steps"), [((5,), True, None), ((5,), False, 4.0), ((5, 6), True, 4.0), ((), False, None)]
)
def test_a_step_is_what_was_decoded_after_the_prefill(ids: tuple[int, ...], truncated: bool, steps: float | None):
    timings = {"prefill": 1.0, "decode": 4.0} if ids else {"prefill": 1.0}
    assert answer_json(Answer("x", ids, timings=timings, truncated=truncated))["seconds"].get("step") == steps


def test_a_picture_crosses_to_the_worker(tmp_path: Path):
    def sample(image: Path | bytes | Drawn) -> Sample:
        return Sample("s", image, "caption en", "caption", "exact_match")

    assert open_picture(picture_of(sample(tmp_path / "a.png"))) == str(tmp_path / "a.png")
    assert open_picture(picture_of(sample(b"bytes"))) == b"bytes"
    assert open_picture(picture_of(sample(Drawn(3)))).size == sample(Drawn(3)).open().size  # type: ignore[union-attr]
