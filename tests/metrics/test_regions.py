# SPDX-License-Identifier: Apache-2.0
"""Boxes and masks are judged as COCO's own tools judge them."""

import contextlib
import io
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pgxport import errors as extras
from pgxport.data.formats import _decompressed
from pgxport.errors import UsageError
from pgxport.metrics.bootstrap import estimate
from pgxport.metrics.regions import average_precision, box_iou, mask_overlap, matched_ious, referred_iou
from pgxport.metrics.sample import Drawn, Region, Sample, Segmentation
from pgxport.runners.outputs import Answer, Box, Mask, run_lengths

TOOLS = Path(__file__).parents[2] / "tools" / "tiny"


def box(label: str, *edges: float) -> Box:
    return Box(label, *edges, (0, 0, 1, 1))


def run(seed: int, pictures: int = 30) -> tuple[list[Sample], list[Answer]]:
    """Pictures with a few true things, some of them crowds, and answers that miss, invent and move boxes."""
    rng = np.random.default_rng(seed)
    samples, answers = [], []
    for n in range(pictures):
        regions, said = [], []
        for _ in range(rng.integers(0, 6)):
            y, x, h, w = rng.uniform(5, 60, 4)
            label = str(rng.choice(["cat", "dog", "Ball"]))
            regions.append(Region(label, (y, x, y + h, x + w), crowd=bool(rng.random() < 0.1)))
            if rng.random() < 0.8:
                dy, dx, dh, dw = rng.normal(0, 4, 4)
                said.append(box(label.lower(), y + dy, x + dx, y + dy + max(h + dh, 1), x + dx + max(w + dw, 1)))
        if rng.random() < 0.4:
            said.append(box(str(rng.choice(["cat", "horse"])), 1, 1, 20, 30))
        order = rng.permutation(len(said))
        samples.append(Sample(str(n), Drawn(n), "detect cat", "detect", "box_map", regions=tuple(regions)))
        answers.append(Answer("", boxes=tuple(said[i] for i in order)))
    return samples, answers


def coco_ap(samples, answers, library: str) -> float:
    """The first number of COCO's own summary."""
    if library == "pycocotools":
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    else:
        from faster_coco_eval import COCO
        from faster_coco_eval import COCOeval_faster as COCOeval
    labels = sorted({r.label.lower() for s in samples for r in s.regions})
    truths, said = [], []
    for n, (sample, answer) in enumerate(zip(samples, answers, strict=True), 1):
        for r in sample.regions:
            y1, x1, y2, x2 = r.box
            entry = {"image_id": n, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (y2 - y1) * (x2 - x1), "iscrowd": int(r.crowd)}
            truths.append({**entry, "id": len(truths) + 1, "category_id": labels.index(r.label.lower()) + 1})
        for rank, b in enumerate(answer.boxes):
            if b.label in labels:
                entry = {"image_id": n, "bbox": [b.x1, b.y1, b.x2 - b.x1, b.y2 - b.y1], "score": 1 / (rank + 1)}
                said.append({**entry, "category_id": labels.index(b.label) + 1})
    with contextlib.redirect_stdout(io.StringIO()):
        table = COCO()
        table.dataset = {
            "images": [{"id": n, "width": 200, "height": 200} for n in range(1, len(samples) + 1)],
            "categories": [{"id": n, "name": label} for n, label in enumerate(labels, 1)],
            "annotations": truths,
        }
        table.createIndex()
        judge = COCOeval(table, table.loadRes(said), iouType="bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return float(judge.stats[0])


@pytest.mark.parametrize("library", ["pycocotools", "faster_coco_eval"])
@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_cocos_tools(library, seed):
    pytest.importorskip("pycocotools")
    pytest.importorskip(library)
    samples, answers = run(seed)
    assert average_precision(samples, answers)(np.ones((1, 30)))[0] == pytest.approx(coco_ap(samples, answers, library), abs=1e-9)


def flat_and_empty(*answers: tuple[Box, ...]) -> tuple[list[Sample], list[Answer]]:
    """A picture with a box and one without area, and one without any."""
    true = (Region("cat", (10, 10, 30, 30)), Region("cat", (40, 10, 40, 30)))
    asked = Sample("0", Drawn(0), "detect cat", "detect", "box_map", regions=true)
    return [asked, replace(asked, id="1", image=Drawn(1), regions=(), background=True)], [Answer("", boxes=b) for b in answers]


SAME, FLAT = box("cat", 10, 10, 30, 30), box("cat", 40, 10, 40, 30)


@pytest.mark.parametrize("library", ["pycocotools", "faster_coco_eval"])
@pytest.mark.parametrize("on_empty", [(), (SAME,), (SAME, FLAT)])
@pytest.mark.parametrize("on_boxes", [(SAME,), (SAME, FLAT), (FLAT, SAME)])
def test_pictures_without_boxes_and_boxes_without_area_count_as_in_cocos_tools(library, on_boxes, on_empty):
    pytest.importorskip("pycocotools")
    pytest.importorskip(library)
    samples, answers = flat_and_empty(on_boxes, on_empty)
    value = average_precision(samples, answers)(np.ones((1, 2)))[0]
    assert value == pytest.approx(coco_ap(samples, answers, library), abs=1e-9)
    # A box without area is met by none, itself included, so half of the truth is found at most.
    assert value <= 0.51
    assert matched_ious(samples[0].regions, answers[0].boxes) == [1, 0]


def test_what_is_found_on_a_picture_without_boxes_lowers_the_precision():
    pytest.importorskip("pycocotools")
    values = []
    for on_empty in ((), (SAME,)):
        samples, answers = flat_and_empty((SAME,), on_empty)
        # Of boxes of one rank the earlier picture's comes first, and what comes after the last hit costs nothing.
        values.append(average_precision(samples[::-1], answers[::-1])(np.ones((1, 2)))[0])
        assert values[-1] == pytest.approx(coco_ap(samples[::-1], answers[::-1], "pycocotools"), abs=1e-9)
    clean, false = values
    assert false < clean


def test_a_weight_is_that_many_copies_of_a_picture():
    pytest.importorskip("pycocotools")
    samples, answers = run(9, pictures=12)
    # One box an answer: where the scores of two pictures tie, copies would stand between each other's boxes.
    answers = [Answer("", boxes=answer.boxes[:1]) for answer in answers]
    times = np.random.default_rng(0).multinomial(12, [1 / 12] * 12, size=8)
    values = average_precision(samples, answers)(times.astype(float))
    for row, value in zip(times, values, strict=True):
        copies = [n for n, k in enumerate(row) for _ in range(k)]
        again = [samples[n] for n in copies], [answers[n] for n in copies]
        # Labels that no drawn picture has are no labels of the copies.
        assert value == pytest.approx(coco_ap(*again, "pycocotools"), abs=1e-9)


def test_the_interval_of_a_mean_average_precision_holds_its_expectation():
    pytest.importorskip("pycocotools")
    runs = [run(seed, pictures=25) for seed in range(120)]
    curves = [average_precision(*pair) for pair in runs]
    expected = np.mean([curve(np.ones((1, 25)))[0] for curve in curves])
    found = [estimate(curve, range(25), biased=True, draws=200) for curve in curves]
    assert np.mean([e.low <= expected <= e.high for e in found]) > 0.88


def test_an_interval_is_moved_back_where_drawing_a_picture_twice_moves_the_metric():
    """Many labels with few things each: without that, the whole interval lies above the value that it is for."""
    pytest.importorskip("pycocotools")
    rng = np.random.default_rng(0)
    samples, answers = [], []
    for n in range(250):
        things = [(str(rng.integers(60)), *rng.uniform(5, 200, 4)) for _ in range(6)]
        regions = tuple(Region(label, (y, x, y + h, x + w)) for label, y, x, h, w in things)
        said = [
            box(label, *(np.array([y, x, y + h, x + w]) + rng.normal(0, 9, 4) + [0, 0, 30, 30])) for label, y, x, h, w in things
        ]
        samples.append(Sample(str(n), Drawn(n), "detect", "detect", "box_map", regions=regions))
        answers.append(Answer("", boxes=tuple(said)))
    curve = average_precision(samples, answers)
    plain, moved = (estimate(curve, range(250), biased=biased, draws=200) for biased in (False, True))
    assert plain.value < plain.low
    assert moved.low < moved.value < moved.high
    assert moved.high - moved.low == pytest.approx(plain.high - plain.low)


def test_average_precision_without_boxes():
    pytest.importorskip("pycocotools")
    samples, _ = run(1)
    assert average_precision(samples, [Answer("")] * 30)(np.ones((2, 30))).tolist() == [0.0, 0.0]
    bare = [Sample("0", Drawn(0), "detect cat", "detect", "box_map")]
    assert np.isnan(average_precision(bare, [Answer("")])(np.ones((1, 1))))


def test_the_ious_are_cocos():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(50):
        y, x, h, w = rng.uniform(0, 50, (4, 2))
        theirs = coco.iou([[x[0], y[0], w[0], h[0]]], [[x[1], y[1], w[1], h[1]]], [0])[0, 0]
        a, b = ((y[i], x[i], y[i] + h[i], x[i] + w[i]) for i in range(2))
        assert box_iou(a, b) == pytest.approx(theirs)
        first, second = rng.random((2, 9, 7)) < 0.5
        region = Region("cat", (0, 0, 9, 7), Segmentation((9, 7), runs=tuple(run_lengths(first)["counts"])))
        both, either = mask_overlap(region, [Mask("cat", box("cat", 0, 0, 9, 7), (), second)])
        coded = [coco.encode(np.asfortranarray(m.astype(np.uint8))) for m in (first, second)]
        assert both / either == pytest.approx(coco.iou(coded[:1], coded[1:], [0])[0, 0])


def test_boxes_are_matched_as_the_tiny_checkpoint_was_evaluated(monkeypatch):
    for module in ("torch", "transformers"):
        pytest.importorskip(module)
    if not TOOLS.is_dir():
        pytest.skip("the wheel is tested without the repository")
    monkeypatch.syspath_prepend(str(TOOLS))
    import evaluate

    from pgxport.models.tiny.scenes import Question, Thing

    rng = np.random.default_rng(0)
    for _ in range(60):
        edges = [(y, x, y + h, x + w) for y, x, h, w in rng.uniform(5, 60, (6, 4))]
        things = tuple(
            (label, Thing(label, "", "", np.array([[e[1], e[0]], [e[3], e[2]]]), None))
            for label, e in zip("aabaab", edges, strict=True)
        )
        said = tuple(
            box(str(rng.choice(["a", "b"])), *(np.array(edges[rng.integers(6)]) + rng.normal(0, 3, 4) + [0, 0, 9, 9]))
            for _ in range(5)
        )
        regions = [Region(label, thing.box) for label, thing in things]
        assert matched_ious(regions, said) == pytest.approx(evaluate.match(Question("detect", "detect a", things=things), said))
    sys.modules.pop("evaluate", None)


def test_labels_match_in_any_case_and_crowds_are_not_asked_for():
    regions = [Region("Traffic Light ", (0, 0, 10, 10)), Region("person", (0, 0, 5, 5), crowd=True)]
    assert matched_ious(regions, [box("traffic light", 0, 0, 10, 10), box("person", 0, 0, 5, 5)]) == [1.0]


def test_one_box_meets_one_thing():
    regions = [Region("cat", (0, 0, 10, 10)), Region("cat", (0, 0, 10, 9))]
    assert matched_ious(regions, [box("cat", 0, 0, 10, 10)]) == [1.0, 0.0]


def test_an_expression_is_met_by_the_first_box_whatever_its_label():
    regions = [Region("the cat on the left", (0, 0, 10, 10))]
    assert referred_iou(regions, [box("cat", 0, 0, 10, 5), box("cat", 0, 0, 10, 10)]) == 0.5
    assert referred_iou(regions, []) == 0.0


def test_an_answer_without_a_mask_covers_nothing():
    region = Region("cat", (0, 0, 2, 2), Segmentation((4, 4), runs=(2, 6, 8)))
    assert mask_overlap(region, []) == (0, 6)
    assert mask_overlap(region, [Mask("cat", box("cat", 0, 0, 2, 2), (1,) * 16, None)]) == (0, 6)


def test_a_true_mask_is_cocos():
    coco = pytest.importorskip("pycocotools.mask")
    polygons = ((5.0, 5.0, 30.5, 7.0, 20.0, 28.0), (30.0, 30.0, 38.0, 30.0, 38.0, 38.0))
    coded = coco.merge(coco.frPyObjects([list(p) for p in polygons], 40, 50))
    true = coco.decode(coded).astype(bool)
    assert np.array_equal(Segmentation((40, 50), polygons=polygons).mask(), true)
    assert np.array_equal(Segmentation((40, 50), runs=tuple(_decompressed(coded["counts"].decode()))).mask(), true)
    assert np.array_equal(Segmentation((40, 50), runs=tuple(run_lengths(true)["counts"])).mask(), true)
    assert 0 < true.sum() < true.size


def test_compressed_run_lengths_are_cocos():
    coco = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for share in (0.0, 0.01, 0.5, 0.99, 1.0):
        mask = rng.random((70, 90)) < share
        assert (
            _decompressed(coco.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()) == run_lengths(mask)["counts"]
        )


def test_a_missing_library_is_one_line_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.delitem(sys.modules, "pycocotools.coco", raising=False)
    with pytest.raises(UsageError, match=r'box mAP needs pycocotools: pip install "pgxport\[report\]"'):
        extras.require("pycocotools.coco", "box mAP")
    with pytest.raises(UsageError, match="nowhere"):
        extras.require("nowhere_at_all", "it")
