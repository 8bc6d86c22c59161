# SPDX-License-Identifier: Apache-2.0
"""FORMATS, a row for each data set: how its records are recognised, and how they become samples."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pgxport.data.records import ANSWER_KEYS, IMAGE_KEYS, PROMPT_KEYS, Pictures, Record
from pgxport.errors import InputError
from pgxport.metrics.metrics import METRICS, TASKS
from pgxport.metrics.sample import LOCATING, BoxEdges, Drawn, Region, Sample, Segmentation
from pgxport.runners.outputs import BINS, OBJECT, Fault, Malformed, parse

MAX_SIDE = 1 << 16  # pixels of a true mask


@dataclass(frozen=True)
class Context:
    """What building a sample needs besides its record."""

    format: "Format"
    pictures: Pictures
    prompt: str
    judged: bool  # answers will be compared with the true ones, which have to be there and of use to the metric


@dataclass(frozen=True)
class Format:
    """How one data set is told from the others, and what its records mean."""

    what: str  # its name, for people
    task: str
    prompt: str
    fits: Callable[[Mapping[str, Any]], bool]
    samples: Callable[[Record, Context], Iterable[Sample]]


def _question(record: Record, context: Context) -> Iterator[Sample]:
    question = record.text("question", "query", "text")
    answers = record.texts("answers", "answer", "label")
    yield _sample(record, context, context.prompt.replace("{question}", question), answers=answers)


def _choice(record: Record, context: Context) -> Iterator[Sample]:
    """ScienceQA's question, context and options, as its baseline words them; no sample without a picture."""
    if record.get("image") is None:
        return
    choices, answer = record.texts("choices"), record.get("answer")
    if type(answer) is not int or not 0 <= answer < len(choices) <= 26:
        raise record.wrong(["answer"], f"the number of one of its {len(choices)} choices")
    options = " ".join(f"({chr(65 + n)}) {choice}" for n, choice in enumerate(choices))
    hint = record.get("hint") or "N/A"
    prompt = context.prompt.replace(
        "{question}", f"Question: {record.text('question')}\nContext: {hint}\nOptions: {options}\nAnswer:"
    )
    yield _sample(record, context, prompt, answers=(chr(65 + answer), choices[answer]))


def _captions(record: Record, context: Context) -> Iterator[Sample]:
    if "coco captions" in record.fields:
        captions = tuple(part.text("caption") for part in record.parts("coco captions"))
    else:
        captions = record.texts("answer")
    if captions:
        yield _sample(record, context, context.prompt, answers=captions)


def _instances(record: Record, context: Context) -> Iterator[Sample]:
    """The prompt names the labels in the picture: it finds what it is asked for; mAP is on known labels.

    A picture without annotations is asked for the data's most frequent labels, none of which it has. One of
    crowds alone is not asked: nothing about it would be right or wrong.
    """
    parts = record.parts("coco objects")
    regions = [Region(part.text("name"), _box(part), crowd=bool(part.get("iscrowd"))) for part in parts]
    labels = dict.fromkeys(region.label for region in regions if not region.crowd)
    asked = labels if regions else record.texts("coco labels")
    if asked:
        sample = _sample(record, context, context.prompt.replace("{question}", " ; ".join(asked)), regions=tuple(regions))
        yield replace(sample, background=not regions)


def _expressions(record: Record, context: Context) -> Iterator[Sample]:
    """A sample for each sentence about one object, decided by the mask if there is one, or the box."""
    where = record.where
    if "raw_anns" in record.fields:
        # The hub's jxu124 keeps COCO's annotation and picture as JSON in strings; its bbox is x1, y1, x2, y2.
        annotation, picture = (_object(record, name) for name in ("raw_anns", "raw_image_info"))
        sizes: dict[str, Any] = {name: picture[name] for name in ("file_name", "height", "width") if name in picture}
        record = Record(where, {**record.fields, **sizes, **annotation, "id": record.get("ref_id")})
    elif "coco objects" in record.fields:
        # MDETR: the expression is the picture's caption.
        for part in record.parts("coco objects"):
            record = Record(where, {**part.fields, **record.fields})
    if "sentences" in record.fields:
        sentences = tuple(part.text("sent", "raw") for part in record.parts("sentences"))
    else:
        sentences = record.texts("caption", "answer")
    box, segmentation = _box(record), _segmentation(record)
    kind, metric = ("segment", "mask_iou") if segmentation else ("detect", "refer_accuracy")
    for sentence in sentences:
        prompt = context.prompt.replace("{task}", kind).replace("{question}", sentence)
        yield replace(_sample(record, context, prompt, regions=(Region(sentence, box, segmentation),)), metric=metric)


def _object(record: Record, name: str) -> dict[str, Any]:
    try:
        value = json.loads(record.text(name))
    except (ValueError, RecursionError) as error:
        raise record.wrong([name], "JSON") from error
    if not isinstance(value, dict):
        raise record.wrong([name], "a JSON object")
    return value


def _own(record: Record, context: Context) -> Iterator[Sample]:
    """A user's own record: image, prompt and answer, or PaliGemma's prefix and suffix."""
    for key in set(record.fields) - set(OWN_KEYS):
        if (close := get_close_matches(key, OWN_KEYS, 1, 0.8)) and close[0] not in record.fields:
            raise InputError(f"{record.where}: {key!r} is no key of a record; did you mean {close[0]!r}?")
    prompt = context.prompt.replace("{question}", record.text(*PROMPT_KEYS))
    unanswered = not context.judged and record.get(*ANSWER_KEYS) is None
    answers = () if unanswered else record.texts(*ANSWER_KEYS)
    first = prompt.split()[0]
    task = record.one_of("task", TASKS, first if first in ("caption", "ocr", "detect", "segment") else "answer")
    sample = replace(_sample(record, context, prompt, answers=answers), task=task, metric=TASKS[task][0])
    if context.judged:
        sample = _with_true_regions(record, sample, context)
    metric = record.one_of("metric", METRICS, sample.metric)
    needs = METRICS[metric].needs
    if context.judged and (needs == "masks" or (needs == "regions" and not (sample.regions or sample.background))):
        raise InputError(
            f"{record.where}: {metric} needs true {needs}, which the answer {answers[0][:80]!r} does not give; name another 'metric'"
        )
    yield replace(sample, metric=metric)


def _with_true_regions(record: Record, sample: Sample, context: Context) -> Sample:
    """The sample with the boxes that its answer writes in `<loc…>` tokens, if any.

    The empty answer of a locating task says that nothing is there.
    """
    background = sample.task in LOCATING and not any(answer.strip() for answer in sample.answers)
    if not background and "<loc" not in sample.answers[0]:
        return sample
    assert not isinstance(sample.image, Drawn), "Bug: a record's picture is drawn"
    width, height = context.pictures.size(sample.image, record.where)
    boxes, _, warnings = parse(sample.answers[0], width, height)
    empty = [_empty_region(warning, width, height) for warning in warnings]
    if None in empty or not (boxes or empty or background):
        raise InputError(f"{record.where}: the answer locates nothing, or is malformed: {'; '.join(map(str, warnings[:3]))}")
    regions = (*(Region(box.label, (box.y1, box.x1, box.y2, box.x2)) for box in boxes), *(region for region in empty if region))
    # Codes of a true mask cannot be judged without a decoder: its box is.
    metric = TASKS["detect"][0] if sample.task == "segment" else sample.metric
    return replace(sample, regions=regions, metric=metric, background=background)


def _empty_region(warning: Malformed, width: int, height: int) -> Region | None:
    """A true box without area, which the answer of a model may not have; None if its edges are in disorder."""
    found = OBJECT.match(warning.text)
    if warning.fault is not Fault.EMPTY_BOX or found is None:
        return None
    y1, x1, y2, x2 = (int(number) / BINS for number in re.findall(r"[0-9]+", found["loc"]))
    return None if y2 < y1 or x2 < x1 else Region(found["label"].strip(), (y1 * height, x1 * width, y2 * height, x2 * width))


def _sample(
    record: Record, context: Context, prompt: str, *, answers: tuple[str, ...] = (), regions: tuple[Region, ...] = ()
) -> Sample:
    name = record.get(*NAME_KEYS)
    task = context.format.task
    # A record without a name of its own goes by its place, without the folder, which may be anyone's.
    place = record.where.rsplit("/", 1)[-1]
    return Sample(place if name is None else str(name), _image(record, context), prompt, task, TASKS[task][0], answers, regions)


def _image(record: Record, context: Context) -> Path | bytes:
    image = record.get("image")
    if isinstance(image, Mapping):  # the hub's Image feature
        if isinstance(image.get("bytes"), bytes):
            return bytes(image["bytes"])
        image = image.get("path")
    if isinstance(image, bytes):
        return image
    name = image or record.get(*IMAGE_KEYS, "imgname")
    if isinstance(name, str):
        return context.pictures.find(name, record.where)
    number = record.get("image_id")
    if type(number) is int and 0 <= number < 10**12:
        return context.pictures.numbered(number, record.where)
    if isinstance(number, str):
        return context.pictures.find(f"{number}.jpg", record.where)
    raise record.wrong([*IMAGE_KEYS, "image_id"], "the name, the number or the bytes of an image")


def _box(record: Record) -> BoxEdges:
    """The box from COCO's x, y, width, height."""
    x, y, width, height = record.numbers("bbox", count=4)
    if width < 0 or height < 0:
        raise record.wrong(["bbox"], "x, y, width, height, none of the last two negative")
    return y, x, y + height, x + width


def _segmentation(record: Record) -> Segmentation | None:
    """COCO's polygons (one may stand flat) or run lengths; None without them or the picture's size."""
    value, height, width = (record.get(name) for name in ("segmentation", "height", "width"))
    if not value or not all(type(side) is int and 0 < side <= MAX_SIDE for side in (height, width)):
        return None
    size = (int(height), int(width))
    if isinstance(value, Mapping):
        counts: Any = value.get("counts")
        runs = _decompressed(counts) if isinstance(counts, str) else counts
        whole = isinstance(runs, list) and all(type(n) is int and n >= 0 for n in runs) and sum(runs) == size[0] * size[1]
        if value.get("size") != list(size) or not whole:
            raise record.wrong(["segmentation"], f"run lengths of {height} × {width} pixels")
        return Segmentation(size, runs=tuple(runs))
    polygons = value if isinstance(value, list) and isinstance(value[0], list) else [value]
    parts = tuple(Record(record.where, {"segmentation": polygon}).numbers("segmentation") for polygon in polygons)
    # Far outside the picture, drawing it would take the memory of a picture of that size.
    if any(len(part) < 6 or len(part) % 2 or max(map(abs, part)) > 2 * max(size) for part in parts):
        raise record.wrong(["segmentation"], f"polygons of at least three points in {height} × {width} pixels")
    return Segmentation(size, polygons=parts)


def _decompressed(counts: str) -> list[int]:
    """COCO's run lengths from their compressed text: six bits a character from '0' on, the sixth says that
    more follow; from the third run on, a number is the difference to the run before the last. Not by
    pycocotools, whose C code trusts its input.

    >>> _decompressed("52203")
    [5, 2, 2, 2, 5]
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            return []
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            value -= (1 << shift) if bits & 0x10 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs


def _has(*names: str) -> Callable[[Mapping[str, Any]], bool]:
    return lambda fields: set(names) <= set(fields)


NAME_KEYS = ("question_id", "questionId", "id", "image_id")
OWN_KEYS = (*IMAGE_KEYS, *PROMPT_KEYS, *ANSWER_KEYS, "task", "metric", *NAME_KEYS)


def _fits_own(fields: Mapping[str, Any]) -> bool:
    """Whether there is an image with a prompt, or with a key so close to it that the error should name the slip."""
    prompt = any(get_close_matches(key, ("prompt", "prefix"), 1, 0.8) for key in fields)
    # Most data sets have questions, each with more that tells it from the others.
    alone = "question" in fields and not any(known.fits(fields) for name, known in FORMATS.items() if name != "jsonl")
    return (prompt or alone) and bool(set(IMAGE_KEYS) & set(fields))


def _fits_vqa(fields: Mapping[str, Any], *, raw: bool) -> bool:
    """Whether the fields are VQA's: OK-VQA's where `raw`, which differ in one field."""
    if not _has("question", "answers", "answer_type")(fields):
        return False
    answers = fields["answers"]
    first = answers[0] if isinstance(answers, list) and answers else None
    okvqa = "raw_answer" in first if isinstance(first, Mapping) else "multiple_choice_answer" not in fields
    return okvqa == raw


def _fits_pope(fields: Mapping[str, Any]) -> bool:
    return (_has("image", "text", "label")(fields) and str(fields["label"]).lower() in ("yes", "no")) or _has(
        "question", "answer", "image_source"
    )(fields)


def _fits_chartqa(fields: Mapping[str, Any]) -> bool:
    editions = (("imgname", "query", "label"), ("query", "label", "human_or_machine"), ("type", "question", "answer", "image"))
    return any(set(names) <= set(fields) for names in editions)


def _fits_refcoco(fields: Mapping[str, Any]) -> bool:
    editions = (
        ("sentences", "bbox", "ref_id"),  # refs with their instances; the hub's jxu124
        ("caption", "coco objects"),  # MDETR
        ("bbox", "segmentation", "answer", "question"),  # the hub's lmms-lab
    )
    return any(set(names) <= set(fields) for names in editions)


# The prompts are those of PaliGemma's fine-tuning (big_vision, configs/proj/paligemma/transfers) or of its
# mix checkpoints.
FORMATS = {
    "jsonl": Format("lines or sidecars of image, prompt, answer", "answer", "{question}", _fits_own, _own),
    "vqav2": Format("VQA v2", "vqa", "answer en {question}", lambda f: _fits_vqa(f, raw=False), _question),
    "okvqa": Format("OK-VQA", "vqa", "answer en {question}", lambda f: _fits_vqa(f, raw=True), _question),
    "textvqa": Format("TextVQA", "textvqa", "answer en {question}", _has("question", "answers", "image_classes"), _question),
    "docvqa": Format("DocVQA", "docvqa", "{question}", _has("question", "answers", "docId"), _question),
    "chartqa": Format("ChartQA", "chartqa", "{question}", _fits_chartqa, _question),
    "scienceqa": Format("ScienceQA", "scienceqa", "{question}", _has("question", "choices", "answer", "hint"), _choice),
    "pope": Format("POPE", "pope", "{question}", _fits_pope, _question),
    "coco-captions": Format(
        "COCO captions", "caption", "caption en", lambda f: "coco captions" in f or _has("answer", "coco_url")(f), _captions
    ),
    "coco-instances": Format(
        "COCO instances", "detect", "detect {question}", lambda f: "coco objects" in f and "caption" not in f, _instances
    ),
    "refcoco": Format("RefCOCO, RefCOCO+, RefCOCOg", "refer", "{task} {question}", _fits_refcoco, _expressions),
}
