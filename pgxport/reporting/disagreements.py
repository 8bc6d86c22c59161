# SPDX-License-Identifier: Apache-2.0
"""The samples on which bundles disagree, the worst first, with small pictures of their boxes and masks."""

import difflib
import hashlib
import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from pgxport.errors import PgxError
from pgxport.metrics.fidelity import is_empty, is_malformed
from pgxport.metrics.metrics import METRICS, score
from pgxport.metrics.sample import LOCATING, Region, Sample
from pgxport.reporting import schema
from pgxport.runners.draw import draw
from pgxport.runners.outputs import Answer, Box, Mask

SIDE = 320  # pixels
QUALITY = 70  # of WebP: 5 to 15 kB a picture
BUDGET = 4_200_000  # bytes of the page, which has 5 MB at most, for all disagreements
BASE64, MARKUP = 4 / 3, 6  # bytes of the page for a byte of a picture, and of a text: alt, caption, a tag a word


@dataclass
class Album:
    """Pictures by name; the name is the digest."""

    files: dict[str, bytes] = field(default_factory=dict)

    def add(self, picture: Image.Image) -> str:
        """Keep a picture, small, and return its name."""
        small = picture.convert("RGB")
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        small.save(file, "WEBP", quality=QUALITY, method=4)
        name = hashlib.sha256(file.getvalue()).hexdigest()[:16] + ".webp"
        self.files[name] = file.getvalue()
        return name


def disagreements(
    samples: Sequence[Sample], answers: Mapping[str, Sequence[Answer]], reference: str, count: int, album: Album
) -> tuple[schema.Disagreement, ...]:
    """Return up to `count` samples on which rows differ, taking tasks in turn, the largest losses first."""
    shown_samples: list[schema.Disagreement] = []
    spent = 0.0
    for i in _worst(samples, answers, reference, count):
        of_this = Album()
        shown = _shown(samples[i], {label: given[i] for label, given in answers.items()}, reference, of_this)
        spent += _bytes(shown, of_this.files)
        if spent > BUDGET:
            break
        album.files |= of_this.files
        shown_samples.append(shown)
    return tuple(shown_samples)


def within_budget(devices: Sequence[schema.Device], files: Mapping[str, bytes]) -> tuple[schema.Device, ...]:
    """Return the devices of one page, each with the disagreements that its part of the page holds."""
    parts = max(1, sum(bool(device.disagreements) for device in devices))
    shortened = []
    for device in devices:
        kept, spent = list[schema.Disagreement](), 0.0
        for shown in device.disagreements:
            spent += _bytes(shown, {name: files[name] for name in named([shown]) if name in files})
            if spent > BUDGET / parts:
                break
            kept.append(shown)
        shortened.append(device.model_copy(update={"disagreements": tuple(kept)}))
    return tuple(shortened)


def named(shown: Sequence[schema.Disagreement]) -> set[str]:
    """Return the names of the pictures that disagreements show."""
    return {name for d in shown for name in (d.picture, *(answer.picture for answer in d.answers)) if name}


def _bytes(shown: schema.Disagreement, files: Mapping[str, bytes]) -> float:
    """Estimate the bytes of the page that a disagreement takes."""
    return BASE64 * sum(map(len, files.values())) + MARKUP * len(shown.model_dump_json())


def _worst(samples: Sequence[Sample], answers: Mapping[str, Sequence[Answer]], reference: str, count: int) -> list[int]:
    by_task: dict[str, list[tuple[float, int]]] = defaultdict(list)
    for i, sample in enumerate(samples):
        theirs = answers[reference][i]
        others = [given[i] for label, given in answers.items() if label != reference]
        if any(other.text != theirs.text for other in others):
            right = _value(sample, theirs)
            losses = [right - _value(sample, other) for other in others]
            by_task[sample.task].append((-max(losses), i))
    queues = [sorted(entries) for entries in by_task.values()]
    chosen: list[tuple[float, int]] = []
    while len(chosen) < count and any(queues):
        for queue in queues:
            if queue and len(chosen) < count:
                chosen.append(queue.pop(0))
    # Answers that lost come before those that are merely different.
    return [i for _, i in sorted(chosen, key=lambda entry: entry[0])]


def _value(sample: Sample, answer: Answer) -> float:
    """Return the sample's score, more being better; 0 for a metric that one sample alone does not have."""
    part = score(sample, answer)
    if part is None or not part.whole:
        return 0.0
    value = part.part / part.whole
    return value if METRICS[sample.metric].higher_is_better else -value


def _shown(sample: Sample, answers: Mapping[str, Answer], reference: str, album: Album) -> schema.Disagreement:
    try:
        picture = sample.open()
    except PgxError:
        picture = None
    truth = _truth(sample)
    located = sample.task in LOCATING
    true_picture = None
    if picture is not None:
        boxes, masks = _regions(sample.regions) if located else ((), ())
        true_picture = album.add(draw(picture, boxes, masks))
    entries = []
    for label, answer in answers.items():
        part = score(sample, answer)
        drawn = album.add(answer.draw(picture)) if located and picture is not None and (answer.boxes or answer.masks) else None
        entries.append(
            schema.Said(
                label=label,
                text=answer.text,
                score=part.part / part.whole if part and part.whole else None,
                same=answer.text == answers[reference].text,
                fault=_fault(sample, answer),
                picture=drawn,
            )
        )
    metric = METRICS[sample.metric].title
    return schema.Disagreement(
        sample=sample.id,
        task=sample.task,
        prompt=sample.prompt,
        truth=truth,
        metric=metric,
        picture=true_picture,
        answers=tuple(entries),
    )


def _truth(sample: Sample) -> str:
    if sample.background:
        return "nothing"
    if sample.answers:
        return " · ".join(dict.fromkeys(sample.answers))
    return ", ".join(region.label or "one object" for region in sample.regions)


def _fault(sample: Sample, answer: Answer) -> str | None:
    if is_empty(sample, answer):
        return "empty"
    if is_malformed(sample, answer):
        return "; ".join(map(str, answer.warnings)) or "locates nothing"
    return "cut off" if answer.truncated else None


def _regions(regions: Sequence[Region]) -> tuple[list[Box], list[Mask]]:
    boxes, masks = [], []
    for n, region in enumerate(regions):
        box = Box(region.label, *region.box, bins=(n, 0, 0, 0))  # a number each, so that equal boxes stay two
        boxes.append(box)
        if region.segmentation:
            masks.append(Mask(region.label, box, (), region.segmentation.mask()))
    return boxes, masks


Kind = Literal["same", "gone", "new"]
# A location token is a word, whatever stands around it.
WORD = re.compile(r"<loc[0-9]{4}>|<seg[0-9]{3}>|\s+|[^\s<]+|<")
MAX_WORDS = 400


def word_diff(before: str, after: str) -> list[tuple[Kind, str]]:
    """Return the pieces of both texts in order; texts of more than 400 words are whole pieces.

    >>> word_diff("a red cat", "a blue cat")
    [('same', 'a '), ('gone', 'red'), ('new', 'blue'), ('same', ' cat')]
    """
    a, b = WORD.findall(before), WORD.findall(after)
    if before == after:
        return [("same", after)] if after else []
    if max(len(a), len(b)) > MAX_WORDS:
        return [("gone", before), ("new", after)]
    pieces: list[tuple[Kind, str]] = []
    # Spaces match everywhere; without them as anchors it takes half the time.
    for kind, i, j, k, m in difflib.SequenceMatcher(str.isspace, a, b, autojunk=False).get_opcodes():
        if kind == "equal":
            pieces.append(("same", "".join(a[i:j])))
            continue
        pieces += [(k2, t) for k2, t in (("gone", "".join(a[i:j])), ("new", "".join(b[k:m]))) if t]  # type: ignore[misc]
    return pieces
