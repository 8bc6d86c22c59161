# SPDX-License-Identifier: Apache-2.0
"""METRICS and TASKS: the metrics, those that judge each task, and a metric's value over samples."""

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from pgxport.errors import choose, require
from pgxport.metrics import bootstrap, cider, regions, words
from pgxport.metrics.bootstrap import Curve
from pgxport.metrics.sample import Sample
from pgxport.runners.outputs import Answer

CIDER_REFERENCES = 50  # different ones, below which CIDEr-D is not taken


class Share(NamedTuple):
    """A sample's share of a metric, whose value is the sum of parts over the sum of wholes."""

    part: float
    whole: float = 1.0


@dataclass(frozen=True)
class Tally:
    """A metric on a run: a number for each sample, NaN if nothing can be judged, and the curve."""

    per_sample: np.ndarray  # float64 [N]
    curve: Curve


SampleScore = Callable[[Sample, Answer], Share]
CorpusScore = Callable[[Sequence[Sample], Sequence[Answer]], Tally]


@dataclass(frozen=True)
class Metric:
    """A row of METRICS. `score` judges a sample by itself; `corpus` needs all samples."""

    title: str
    needs: str  # the part of a sample's truth that must not be empty: answers, regions or masks
    score: SampleScore | None = None
    corpus: CorpusScore | None = None
    higher_is_better: bool = True
    scale: float = 1.0  # the value of a perfect run
    biased: bool = False  # see bootstrap.Resampled


def score(sample: Sample, answer: Answer) -> Share | None:
    """Return a sample's share of its own metric; None for a metric of the whole corpus."""
    metric = METRICS[sample.metric]
    return None if metric.score is None else metric.score(sample, answer)


def metrics_for(sample: Sample) -> tuple[str, ...]:
    """Return the sample's own metric, then the others of its task that its truth allows."""
    available = {
        "answers": bool(sample.answers),
        "regions": bool(sample.regions) or sample.background,
        "masks": any(region.segmentation for region in sample.regions),
    }
    others = (name for name in TASKS[sample.task] if name != sample.metric and available[METRICS[name].needs])
    return (sample.metric, *others)


def tally(name: str, samples: Sequence[Sample], answers: Sequence[Answer]) -> Tally:
    """Compute a metric on all samples of a run.

    Raises:
        UsageError: there is no metric of that name, or its library is not installed.
    """
    metric = choose("metric", name, METRICS)
    if metric.corpus is not None:
        return metric.corpus(samples, answers)
    assert metric.score is not None, f"Bug: metric {name!r} has no function"
    shares = np.array([metric.score(s, a) for s, a in zip(samples, answers, strict=True)], np.float64).reshape(-1, 2)
    part, whole = shares[:, 0], shares[:, 1]
    each = np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)
    return Tally(each, bootstrap.ratio(part, whole))


def cider_is_defined(samples: Iterable[Sample]) -> bool:
    """Whether there are enough different references to tell rare words from frequent ones.

    CIDEr-D weighs an n-gram by the share of pictures whose references have it: where all pictures have one
    reference, an exact caption scores 0.
    """
    return len(_references(samples)) >= CIDER_REFERENCES


def with_caption_metric(samples: Sequence[Sample]) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """Return the samples, those of CIDEr-D judged by another metric where it says nothing, and a note why.

    ROUGE-L decides then, with exact match beside it; exact match alone where a reference has no word that
    ROUGE counts, which has to be of Latin letters or digits.
    """
    places = [sample for sample in samples if sample.metric == "cider"]
    if not places or cider_is_defined(places):
        return tuple(samples), ()
    texts = [answer.lower() for sample in places for answer in sample.answers if answer.strip()]
    counted = bool(texts) and all(re.search("[a-z0-9]", text) for text in texts)
    metric = "rouge_l" if counted else "exact_match"
    note = (
        f"captions are judged by {'ROUGE-L, with exact match beside it' if counted else 'exact match'}: CIDEr-D weighs words by how "
        f"rare they are among the references, and needs {CIDER_REFERENCES} different ones; these have {len(_references(places))}"
    )
    return tuple(replace(sample, metric=metric) if sample.metric == "cider" else sample for sample in samples), (note,)


def _references(samples: Iterable[Sample]) -> set[tuple[str, ...]]:
    return {tuple(cider.words(answer)) for sample in samples for answer in sample.answers}


def groups(samples: Sequence[Sample]) -> list[Hashable]:
    """Return a key for each sample; a bootstrap draws samples with one key together."""
    return [sample.group for sample in samples]


def _text(function: Callable[[str, Sequence[str]], float]) -> SampleScore:
    return lambda sample, answer: Share(function(answer.text, sample.answers))


def _cider(samples: Sequence[Sample], answers: Sequence[Answer]) -> Tally:
    captions = [cider.words(answer.text) for answer in answers]
    values = cider.cider_d(captions, [[cider.words(truth) for truth in sample.answers] for sample in samples])
    return Tally(values, bootstrap.mean(values))


def _bleu(samples: Sequence[Sample], answers: Sequence[Answer]) -> Tally:
    """BLEU-4 of sacrebleu (Post 2018), from sums of its counts; a sample has its smoothed sentence BLEU."""
    bleu = require("sacrebleu.metrics", "BLEU").BLEU
    corpus, sentence = bleu(), bleu(effective_order=True)
    rows = [sentence.sentence_score(a.text, list(s.answers)) for s, a in zip(samples, answers, strict=True)]
    counts = np.array([[*row.counts, *row.totals, row.sys_len, row.ref_len] for row in rows], np.float64).reshape(-1, 10)

    def curve(weights: np.ndarray) -> np.ndarray:
        sums = (weights @ counts).round().astype(int).tolist()
        smooth = {"smooth_method": corpus.smooth_method, "smooth_value": corpus.smooth_value}
        values = [bleu.compute_bleu(row[:4], row[4:8], row[8], row[9], **smooth).score / 100 for row in sums]
        return np.array(values)

    return Tally(np.array([row.score / 100 for row in rows]), curve)


def _rouge(samples: Sequence[Sample], answers: Sequence[Answer]) -> Tally:
    """ROUGE-L of rouge-score (Lin 2004): the F measure against the nearest true answer, stemmed."""
    scorer = require("rouge_score.rouge_scorer", "ROUGE").RougeScorer(["rougeL"], use_stemmer=True)
    values = [scorer.score_multi(s.answers, a.text)["rougeL"].fmeasure for s, a in zip(samples, answers, strict=True)]
    return Tally(np.array(values), bootstrap.mean(values))


def _character_errors(sample: Sample, answer: Answer) -> Share:
    return Share(*words.character_errors(answer.text, sample.answers))


def _nothing_found(answer: Answer) -> Share:
    """A picture without a true box counts as one: right if no box is predicted, as any would be false."""
    return Share(float(not answer.boxes))


def _box_accuracy(sample: Sample, answer: Answer) -> Share:
    if sample.background:
        return _nothing_found(answer)
    ious = regions.matched_ious(sample.regions, answer.boxes)
    return Share(sum(iou >= regions.HIT for iou in ious), len(ious))


def _box_iou(sample: Sample, answer: Answer) -> Share:
    if sample.background:
        return _nothing_found(answer)
    ious = regions.matched_ious(sample.regions, answer.boxes)
    return Share(sum(ious), len(ious))


def _box_map(samples: Sequence[Sample], answers: Sequence[Answer]) -> Tally:
    each = tally("box_iou", samples, answers).per_sample
    return Tally(each, regions.average_precision(samples, answers))


def _refer_accuracy(sample: Sample, answer: Answer) -> Share:
    return Share(float(regions.referred_iou(sample.regions, answer.boxes) >= regions.HIT))


def _mask_iou(sample: Sample, answer: Answer) -> Share:
    both, either = regions.mask_overlap(sample.regions[0], answer.masks)
    return Share(both / either if either else 0.0)


def _mask_ciou(sample: Sample, answer: Answer) -> Share:
    return Share(*regions.mask_overlap(sample.regions[0], answer.masks))


METRICS = {
    "exact_match": Metric("exact match", "answers", _text(words.exact_match)),
    "vqa_accuracy": Metric("VQA accuracy", "answers", _text(words.vqa_accuracy)),
    "textvqa_accuracy": Metric("TextVQA accuracy", "answers", _text(words.textvqa_accuracy)),
    "anls": Metric("ANLS", "answers", _text(words.anls)),
    "relaxed_accuracy": Metric("relaxed accuracy (5 %)", "answers", _text(words.relaxed_accuracy)),
    "choice_accuracy": Metric("choice accuracy", "answers", _text(words.choice_accuracy)),
    "yes_no_accuracy": Metric("yes/no accuracy", "answers", _text(words.yes_no_accuracy)),
    "character_error_rate": Metric("character error rate", "answers", _character_errors, higher_is_better=False, scale=0.0),
    "cider": Metric("CIDEr-D", "answers", corpus=_cider, scale=10.0),
    "bleu": Metric("BLEU-4", "answers", corpus=_bleu),
    "rouge_l": Metric("ROUGE-L", "answers", corpus=_rouge),
    "box_accuracy": Metric("boxes found at IoU 0.5", "regions", _box_accuracy),
    "box_iou": Metric("mean box IoU", "regions", _box_iou),
    "box_map": Metric("box mAP (COCO)", "regions", corpus=_box_map, biased=True),
    "refer_accuracy": Metric("referring accuracy at IoU 0.5", "regions", _refer_accuracy),
    "mask_iou": Metric("mean mask IoU", "masks", _mask_iou),
    "mask_ciou": Metric("cumulative mask IoU", "masks", _mask_ciou),
}

# The first metric of a task decides; the others are shown beside it. A sample may name another of the table.
TASKS = {
    "vqa": ("vqa_accuracy",),
    "textvqa": ("textvqa_accuracy",),
    "docvqa": ("anls", "exact_match"),
    "chartqa": ("relaxed_accuracy", "exact_match"),
    "scienceqa": ("choice_accuracy",),
    "pope": ("yes_no_accuracy",),
    "answer": ("exact_match",),
    "ocr": ("exact_match", "character_error_rate"),
    "caption": ("cider", "bleu", "rouge_l", "exact_match"),
    "detect": ("box_accuracy", "box_iou", "box_map"),
    "segment": ("mask_iou", "mask_ciou", "box_iou"),
    "refer": ("refer_accuracy", "box_iou", "mask_iou", "mask_ciou"),
}
