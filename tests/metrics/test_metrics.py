# SPDX-License-Identifier: Apache-2.0
"""The table of metrics: every task has one that decides, and each value is that of its library."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pgxport.data.scenes import scene_samples
from pgxport.errors import UsageError
from pgxport.metrics.bootstrap import estimate
from pgxport.metrics.metrics import METRICS, TASKS, cider_is_defined, groups, metrics_for, score, tally, with_caption_metric
from pgxport.metrics.sample import Drawn, Region, Sample, Segmentation
from pgxport.runners.outputs import Answer, parse, run_lengths

TOOLS = Path(__file__).parents[2] / "tools" / "tiny"
CAPTIONS = [
    ("a red cat sits on the mat", ("a cat on a mat", "the red cat is sitting on a mat")),
    ("two dogs", ("two dogs run over the grass", "dogs running")),
    ("", ("nothing to see",)),
    ("a bus a bus a bus", ("a bus drives down the street", "the bus", "a red bus on the street")),
]


def captioned() -> tuple[list[Sample], list[Answer]]:
    samples = [Sample(str(n), Drawn(n), "caption en", "caption", "cider", truths) for n, (_, truths) in enumerate(CAPTIONS)]
    return samples, [Answer(said) for said, _ in CAPTIONS]


def value(metric: str, samples: list[Sample], answers: list[Answer]) -> float:
    return float(tally(metric, samples, answers).curve(np.ones((1, len(samples))))[0])


def test_every_task_and_every_metric_is_in_the_tables():
    assert all(metrics and set(metrics) <= set(METRICS) for metrics in TASKS.values())
    assert all((metric.score is None) != (metric.corpus is None) for metric in METRICS.values())


def test_an_unknown_metric_is_an_error_that_lists_those_there_are():
    with pytest.raises(UsageError, match=r"--metric 'f1' does not exist; choose exact_match, "):
        tally("f1", [], [])


def test_bleu_is_sacrebleus_corpus_score():
    sacrebleu = pytest.importorskip("sacrebleu")
    samples, answers = captioned()
    most = max(len(s.answers) for s in samples)
    streams = [[s.answers[i] if i < len(s.answers) else None for s in samples] for i in range(most)]
    theirs = sacrebleu.corpus_bleu([a.text for a in answers], streams).score / 100
    assert value("bleu", samples, answers) == pytest.approx(theirs)
    twice = np.array([[2.0, 1.0, 0.0, 1.0]])
    picked = [0, 0, 1, 3]
    again = (
        sacrebleu.corpus_bleu([answers[i].text for i in picked], [[stream[i] for i in picked] for stream in streams]).score / 100
    )
    assert tally("bleu", samples, answers).curve(twice)[0] == pytest.approx(again)


def test_rouge_is_rouge_scores_best_of_the_truths():
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    samples, answers = captioned()
    theirs = [max(scorer.score(t, a.text)["rougeL"].fmeasure for t in s.answers) for s, a in zip(samples, answers, strict=True)]
    found = tally("rouge_l", samples, answers)
    assert found.per_sample == pytest.approx(theirs)
    assert value("rouge_l", samples, answers) == pytest.approx(np.mean(theirs))


def test_a_rate_is_a_ratio_of_sums_and_no_mean_of_ratios():
    samples = [Sample(str(n), Drawn(n), "ocr", "ocr", "exact_match", (truth,)) for n, truth in enumerate(["AB", "ABCDEFGH"])]
    answers = [Answer("AX"), Answer("ABCDEFGH")]
    found = tally("character_error_rate", samples, answers)
    assert found.per_sample.tolist() == [0.5, 0.0]
    assert value("character_error_rate", samples, answers) == pytest.approx(0.1)


def masked(n: int, mask: np.ndarray) -> Sample:
    region = Region("cat", (0, 0, 8, 8), Segmentation((16, 16), runs=tuple(run_lengths(mask)["counts"])))
    return Sample(str(n), Drawn(n), "segment cat", "segment", "mask_iou", regions=(region,))


def test_the_mean_iou_weighs_pictures_and_the_cumulative_one_pixels():
    small, large = np.zeros((2, 16, 16), bool)
    small[:4, :4], large[:, :8] = True, True
    text = "<loc0000><loc0000><loc1023><loc0512>" + "<seg000>" * 16 + " cat"
    boxes, masks, _ = parse(text, 16, 16, lambda codes: np.ones((1, 64, 64), np.float32))
    assert masks[0].mask.sum() == 128
    samples, answers = [masked(0, small), masked(1, large)], [Answer(text, boxes=boxes, masks=masks)] * 2
    assert value("mask_iou", samples, answers) == pytest.approx((16 / 128 + 1) / 2)
    assert value("mask_ciou", samples, answers) == pytest.approx((16 + 128) / (128 + 128))


def test_one_answer_is_scored_by_its_samples_own_metric():
    (caption, *_), (answer, *_) = captioned()
    assert score(caption, answer) is None  # CIDEr needs the corpus
    assert score(Sample("0", Drawn(0), "ocr", "ocr", "exact_match", ("AB",)), Answer("AB")) == (1.0, 1.0)


def test_a_sample_is_judged_by_its_own_metric_first_and_by_what_its_truth_allows():
    assert metrics_for(masked(0, np.ones((16, 16), bool))) == ("mask_iou", "mask_ciou", "box_iou")
    box = Sample("0", Drawn(0), "detect cat", "refer", "refer_accuracy", regions=(Region("cat", (0, 0, 1, 1)),))
    assert metrics_for(box) == ("refer_accuracy", "box_iou")
    scene = Sample("0", Drawn(0), "caption en", "caption", "exact_match", ("a cat",))
    assert metrics_for(scene) == ("exact_match", "cider", "bleu", "rouge_l")


def background(metric: str) -> Sample:
    return Sample("0", Drawn(0), "detect cat", "detect", metric, ("",), background=True)


@pytest.mark.parametrize("metric", ["box_accuracy", "box_iou"])
def test_where_nothing_is_there_an_answer_without_boxes_is_right_and_any_box_is_wrong(metric):
    box = parse("<loc0000><loc0000><loc0512><loc0512> dog", 64, 64)[0]
    answers = [Answer(""), Answer("no cat"), Answer("x", boxes=box)]
    assert tally(metric, [background(metric)] * 3, answers).per_sample.tolist() == [1.0, 1.0, 0.0]
    there = Sample("1", Drawn(1), "detect cat", "detect", metric, regions=(Region("cat", (0, 0, 8, 8)),))
    # The picture without one counts as one box does.
    assert value(metric, [background(metric), there], [Answer(""), Answer("")]) == 0.5


def test_a_picture_without_a_box_is_judged_by_the_metrics_of_boxes():
    assert metrics_for(background("box_accuracy")) == ("box_accuracy", "box_iou", "box_map")
    segment = replace(background("box_accuracy"), task="segment")
    assert metrics_for(segment) == ("box_accuracy", "box_iou")


@pytest.mark.parametrize(
    ("metric", "of_empty", "of_text"),
    [
        *((m, 1.0, 0.0) for m in ("exact_match", "vqa_accuracy", "textvqa_accuracy", "anls", "relaxed_accuracy")),
        ("yes_no_accuracy", 0.0, 0.0), ("cider", 0.0, 0.0), ("bleu", 0.0, 0.0), ("rouge_l", 0.0, 0.0),
    ],
)  # fmt: skip
def test_an_empty_reference_is_met_by_an_empty_answer_where_the_metric_compares_texts(metric, of_empty, of_text):
    """The zeros of the last four are those of their own libraries, which share no word with an empty text."""
    if metric in ("bleu", "rouge_l"):
        pytest.importorskip("sacrebleu")
        pytest.importorskip("rouge_score")
    sample = Sample("0", Drawn(0), "caption en", "caption", metric, ("",))
    found = [float(tally(metric, [sample], [Answer(text)]).per_sample[0]) for text in ("", "two gulls")]
    assert found == [of_empty, of_text]


def test_every_character_of_an_answer_to_an_empty_reference_is_an_error():
    samples = [Sample(str(n), Drawn(n), "ocr", "ocr", "character_error_rate", (truth,)) for n, truth in enumerate(["", "ABCD"])]
    assert value("character_error_rate", samples, [Answer("xyz"), Answer("ABCD")]) == 3 / 4
    jiwer = pytest.importorskip("jiwer")
    assert value("character_error_rate", samples, [Answer("xyz"), Answer("ABCX")]) == jiwer.cer("ABCD", "xyzABCX")


def captions(*references: str) -> list[Sample]:
    return [Sample(str(n), Drawn(n), "caption en", "caption", "cider", (text,)) for n, text in enumerate(references)]


@pytest.mark.parametrize(
    "references", [["a gull on a pier"], ["a gull on a pier"] * 6, ["A gull on a pier.", "a gull on a pier"] * 40]
)
def test_cider_says_nothing_of_few_different_references_and_is_not_taken(references):
    samples = captions(*references)
    exact = [Answer(text) for text in references]
    assert value("cider", samples, exact) == 0
    chosen, (note,) = with_caption_metric(samples)
    assert {sample.metric for sample in chosen} == {"rouge_l"}
    assert metrics_for(chosen[0]) == ("rouge_l", "cider", "bleu", "exact_match")
    assert "and needs 50 different ones; these have 1" in note
    pytest.importorskip("rouge_score")
    assert value("rouge_l", list(chosen), exact) == value("exact_match", list(chosen), exact) == 1


def test_cider_is_taken_from_fifty_different_references_on():
    texts = [f"a gull number {n} on a pier" for n in range(50)]
    assert with_caption_metric(captions(*texts)) == (tuple(captions(*texts)), ())
    assert cider_is_defined(captions(*texts, *texts))
    fewer, notes = with_caption_metric(captions(*texts[1:], *texts[1:]))
    assert {sample.metric for sample in fewer} == {"rouge_l"}
    assert "these have 49" in notes[0]


@pytest.mark.parametrize("references", [["桟橋のカモメ"], ["чайка"] * 3, ["a gull", "чайка"], [""]])
def test_where_rouge_counts_no_word_exact_match_decides(references):
    chosen, (note,) = with_caption_metric(captions(*references))
    assert {sample.metric for sample in chosen} == {"exact_match"}
    assert "captions are judged by exact match: CIDEr-D" in note


def test_samples_of_other_metrics_are_left_alone():
    scene = Sample("0", Drawn(0), "caption en", "caption", "exact_match", ("a cat",))
    assert with_caption_metric([scene]) == ((scene,), ())


def test_questions_about_one_picture_are_one_group():
    same = [Sample(str(n), Path("a.png"), "answer en ?", "vqa", "vqa_accuracy", ("1",)) for n in range(3)]
    assert len(set(groups([*same, Sample("3", Path("b.png"), "answer en ?", "vqa", "vqa_accuracy", ("1",))]))) == 2
    assert len(set(groups([Sample(str(n), b"same", "ocr", "ocr", "exact_match") for n in range(2)]))) == 1


def test_scenes_are_the_questions_and_metrics_of_the_tiny_checkpoints_evaluation(monkeypatch):
    for module in ("torch", "transformers"):
        pytest.importorskip(module)
    if not TOOLS.is_dir():
        pytest.skip("the wheel is tested without the repository")
    monkeypatch.syspath_prepend(str(TOOLS))
    import evaluate

    items, samples = evaluate.held_out(12), scene_samples(12)
    assert [(q.task, q.prompt, i) for i, q in items] == [(s.task, s.prompt, s.image.index) for s in samples]

    def decode(codes: np.ndarray) -> np.ndarray:
        y, x = np.mgrid[-1:1:64j, -1:1:64j]
        return (0.8 - np.hypot(y, x))[None].astype(np.float32)

    rng = np.random.default_rng(0)
    texts = []
    for _, question in items:  # answers that are right, nearly right, or nothing
        wobble = [np.clip(np.array(t.box) / 224 * 1024 + rng.normal(0, 25, 4), 0, 1023).astype(int) for _, t in question.things]
        codes = "<seg007>" * 16 if question.task == "segment" else ""
        places = [
            f"{''.join(f'<loc{v:04d}>' for v in box)}{codes} {label}"
            for box, (label, _) in zip(wobble, question.things, strict=True)
        ]
        texts.append(str(rng.choice([question.answer or " ; ".join(places), "nothing", ""], p=[0.7, 0.2, 0.1])))
    theirs = evaluate.score(items, texts, decode)
    answers = []
    for text in texts:
        boxes, masks, warnings = parse(text, 224, 224, decode)
        answers.append(Answer(text, (), boxes, masks, warnings))

    rows = {
        task: [n for n, s in enumerate(samples) if s.task == task] for task in ("caption", "ocr", "answer", "detect", "segment")
    }
    pairs = [
        *((task, samples[rows[task][0]].metric, f"{task} exact") for task in ("caption", "ocr", "answer")),
        ("detect", "box_accuracy", "detect box accuracy@0.5"),
        ("detect", "box_iou", "detect box IoU"),
        ("segment", "mask_iou", "segment mask IoU"),
    ]
    for task, metric, name in pairs:
        asked, said = [samples[n] for n in rows[task]], [answers[n] for n in rows[task]]
        found = estimate(tally(metric, asked, said).curve, groups(asked))
        ours = [round(v, 4) for v in (found.value, found.low, found.high)]
        assert ours == pytest.approx([theirs[name][k] for k in ("mean", "low", "high")], abs=1e-3), name
    sys.modules.pop("evaluate", None)
