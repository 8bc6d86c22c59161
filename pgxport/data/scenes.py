# SPDX-License-Identifier: Apache-2.0
"""Samples about embedded drawn scenes, for commands that were given no data."""

from typing import TYPE_CHECKING

import numpy as np

from pgxport.metrics.metrics import TASKS
from pgxport.metrics.sample import Drawn, Region, Sample, Segmentation
from pgxport.runners.outputs import run_lengths

if TYPE_CHECKING:
    from pgxport.models.tiny.scenes import Question


def scene_samples(count: int) -> tuple[Sample, ...]:
    """`count` questions of every task about test scenes, those of the tiny checkpoint's evaluation."""
    # Imported here: a report on other data draws nothing.
    from pgxport.models.tiny.scenes import TASKS as SCENE_TASKS
    from pgxport.models.tiny.scenes import ask, draw

    by_task: dict[str, list[Sample]] = {task: [] for task in SCENE_TASKS}
    index = 0
    while any(len(samples) < count for samples in by_task.values()):
        questions = ask(draw("test", index), index)
        # As tools/tiny/evaluate.py chooses among several questions of a task.
        rng = np.random.default_rng([11, index])
        for task, samples in by_task.items():
            options = [q for q in questions if q.task == task]
            if options and len(samples) < count:
                question = options[int(rng.integers(len(options)))]
                samples.append(_sample(f"scene-{index}-{task}", Drawn(index), question))
        index += 1
    return tuple(sample for samples in by_task.values() for sample in samples)


def calibration_scene(index: int) -> Sample:
    """One question about one scene of the calibration split; the kinds of questions take turns."""
    from pgxport.models.tiny.scenes import ask, draw

    # Codes of a mask are not known without the encoder that made them, so nothing is segmented.
    questions = [q for q in ask(draw("calibration", index), seed=index) if q.task != "segment"]
    tasks = list(dict.fromkeys(q.task for q in questions))
    of_task = [q for q in questions if q.task == tasks[index % len(tasks)]]
    return _sample(f"scene {index}", Drawn(index, "calibration"), of_task[index // len(tasks) % len(of_task)])


def _sample(name: str, image: Drawn, question: "Question") -> Sample:
    regions = []
    for label, thing in question.things:
        mask = thing.mask() if question.task == "segment" else None
        runs = None if mask is None else Segmentation((mask.shape[0], mask.shape[1]), runs=tuple(run_lengths(mask)["counts"]))
        regions.append(Region(label, thing.box, runs))
    # A scene's caption has one right wording, which CIDEr would blur.
    metric = "exact_match" if question.task == "caption" else TASKS[question.task][0]
    answers = () if question.answer is None else (question.answer,)
    return Sample(name, image, question.prompt, question.task, metric, answers, tuple(regions))
