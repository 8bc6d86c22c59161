# SPDX-License-Identifier: Apache-2.0
"""Metrics of boxes and masks: IoU one to one, COCO's mAP, referring expressions, mask IoU."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pgxport.errors import require
from pgxport.metrics.bootstrap import Curve
from pgxport.metrics.sample import BoxEdges, Region, Sample
from pgxport.runners.outputs import Answer, Box, Mask

HIT = 0.5  # the IoU from which on a box is a hit
RECALLS = np.linspace(0, 1, 101)  # at which COCO reads the precision


def box_iou(a: BoxEdges, b: BoxEdges) -> float:
    """Return the intersection over union of two boxes y1, x1, y2, x2.

    >>> box_iou((0, 0, 2, 2), (0, 1, 2, 3))
    0.3333333333333333
    """
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, height) * max(0.0, width)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if union > 0 else 0.0


def matched_ious(regions: Sequence[Region], boxes: Sequence[Box]) -> list[float]:
    """Return the IoU of each true object but crowds with the box that is matched to it; 0 without one.

    Boxes are matched one to one within a label, best pairs first, as in the tiny checkpoint's evaluation
    (tools/tiny/evaluate.py).
    """
    truths = [region for region in regions if not region.crowd]
    pairs = sorted(
        (
            (box_iou(truth.box, edges(box)), i, j)
            for i, truth in enumerate(truths)
            for j, box in enumerate(boxes)
            if same_label(truth.label, box.label)
        ),
        reverse=True,
    )
    met: dict[int, float] = {}
    used: set[int] = set()
    for value, i, j in pairs:
        if i not in met and j not in used:
            met[i] = value
            used.add(j)
    return [met.get(i, 0.0) for i in range(len(truths))]


def referred_iou(regions: Sequence[Region], boxes: Sequence[Box]) -> float:
    """Return the IoU of the first box with the one true object, whatever its label."""
    return box_iou(regions[0].box, edges(boxes[0])) if boxes else 0.0


def mask_overlap(region: Region, masks: Sequence[Mask]) -> tuple[int, int]:
    """Return the pixels in both, and in either, of a true mask and an answer's first mask, if it has one."""
    assert region.segmentation is not None, "Bug: a mask metric on a sample without a true mask"
    truth = region.segmentation.mask()
    mask = masks[0].mask if masks else None
    if mask is None:
        return 0, int(truth.sum())
    assert mask.shape == truth.shape, f"Bug: a mask of {mask.shape} for a picture of {truth.shape}"
    return int((mask & truth).sum()), int((mask | truth).sum())


def same_label(a: str, b: str) -> bool:
    """Whether two labels are equal but for case and outer white space."""
    return a.strip().lower() == b.strip().lower()


def edges(box: Box) -> BoxEdges:
    """Return y1, x1, y2, x2 of a box."""
    return box.y1, box.x1, box.y2, box.x2


# COCO's mean average precision ---------------------------------------------------------------------


@dataclass(frozen=True)
class Category:
    """COCO's matching for one label: D detections by falling score, 10 IoU thresholds, N samples."""

    sample: np.ndarray  # int [D]: the sample that a detection belongs to
    hit: np.ndarray  # bool [10, D]: the detection matches a true box at the threshold
    miss: np.ndarray  # bool [10, D]: it matches nothing; one that matches a crowd is neither hit nor miss
    truths: np.ndarray  # [N]: true boxes in each sample


def average_precision(samples: Sequence[Sample], answers: Sequence[Answer]) -> Curve:
    """COCO's AP (IoU 0.50:0.95, all areas, 100 detections) as a function of the weights (Lin et al. 2014).

    pycocotools matches; the precision is accumulated here, because a bootstrap needs it thousands of times.
    PaliGemma gives no scores, so the order of an answer ranks its boxes: the first box of every answer comes
    before every second one.
    """
    categories = [category for category in _categories(samples, answers) if category.truths.any()]

    def curve(weights: np.ndarray) -> np.ndarray:
        if not categories:
            return np.full(len(weights), np.nan)
        values = np.stack([_category_ap(category, weights) for category in categories])  # [K, R]
        defined = ~np.isnan(values)
        total, count = np.where(defined, values, 0.0).sum(0), defined.sum(0)
        return np.divide(total, count, out=np.full(len(weights), np.nan), where=count > 0)

    return curve


def _category_ap(category: Category, weights: np.ndarray) -> np.ndarray:
    """[R, N] -> [R]: mean over thresholds of the precision at 101 recalls, NaN if no true box was drawn."""
    truths = weights @ category.truths  # [R]
    if not len(category.sample):
        return np.where(truths > 0, 0.0, np.nan)
    drawn = weights[:, category.sample]  # [R, D]
    values = np.zeros(len(weights))
    for hit, miss in zip(category.hit, category.miss, strict=True):
        hits, misses = np.cumsum(drawn * hit, 1), np.cumsum(drawn * miss, 1)
        recall = hits / np.maximum(truths, 1)[:, None]
        precision = hits / (hits + misses + np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
        # A detection answers for the recalls that it is the first to reach.
        reached = np.searchsorted(RECALLS, recall.ravel(), side="right").reshape(recall.shape)
        values += (precision * np.diff(reached, axis=1, prepend=0)).sum(1) / len(RECALLS)
    return np.where(truths > 0, values / len(category.hit), np.nan)


def _categories(samples: Sequence[Sample], answers: Sequence[Answer]) -> list[Category]:
    coco, evaluation = require("pycocotools.coco", "box mAP"), require("pycocotools.cocoeval", "box mAP")
    labels = {region.label.strip().lower() for sample in samples for region in sample.regions}
    number = {label: n for n, label in enumerate(sorted(labels), 1)}
    truths = [_annotation(n, number, r.label, r.box, iscrowd=int(r.crowd)) for n, s in enumerate(samples, 1) for r in s.regions]
    detections = [
        _annotation(n, number, box.label, edges(box), score=1 / (1 + rank))
        for n, answer in enumerate(answers, 1)
        for rank, box in enumerate(answer.boxes)
        if box.label.strip().lower() in number
    ]
    if not number:
        return []
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        tables = [coco.COCO() for _ in range(2)]
        for table, annotations in zip(tables, (truths, detections), strict=True):
            table.dataset = {
                "images": [{"id": n} for n in range(1, len(samples) + 1)],
                "categories": [{"id": n} for n in number.values()],
                "annotations": [{**annotation, "id": n} for n, annotation in enumerate(annotations, 1)],
            }
            table.createIndex()
        run = evaluation.COCOeval(*tables, "bbox")
        run.params.areaRng, run.params.areaRngLbl, run.params.maxDets = [[0, 1e10]], ["all"], [100]
        run.evaluate()
    rows = len(samples)
    return [_category(run.evalImgs[k * rows : (k + 1) * rows], len(run.params.iouThrs)) for k in range(len(number))]


def _category(pictures: list[dict[str, np.ndarray] | None], thresholds: int) -> Category:
    scores, sample, hit, miss = [], [], [np.zeros((thresholds, 0), bool)], [np.zeros((thresholds, 0), bool)]
    truths = np.zeros(len(pictures))
    for n, picture in enumerate(pictures):
        if picture is None:
            continue
        truths[n] = np.sum(np.asarray(picture["gtIgnore"]) == 0)
        matched, counts = np.asarray(picture["dtMatches"]) > 0, ~np.asarray(picture["dtIgnore"]).astype(bool)
        scores += list(picture["dtScores"])
        sample += [n] * matched.shape[1]
        hit.append(matched & counts)
        miss.append(~matched)
    order = np.argsort(-np.array(scores), kind="mergesort")
    return Category(np.array(sample, np.int64)[order], np.hstack(hit)[:, order], np.hstack(miss)[:, order], truths)


def _annotation(
    image: int, number: dict[str, int], label: str, box: BoxEdges, *, iscrowd: int = 0, score: float = 1.0
) -> dict[str, object]:
    y1, x1, y2, x2 = box
    return {
        "image_id": image,
        "category_id": number[label.strip().lower()],
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "area": (x2 - x1) * (y2 - y1),
        "iscrowd": iscrowd,
        "score": score,
    }
