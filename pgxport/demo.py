# SPDX-License-Identifier: Apache-2.0
"""Walk from export to answers on the embedded model: draw scenes, export, ask, save annotated pictures."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pgxport.errors import DiskError
from pgxport.exporter.export import export
from pgxport.exporter.prepare import ExportOptions
from pgxport.models.spec import TINY_RESOLUTIONS
from pgxport.models.tiny.scenes import Question, Scene, ask, draw
from pgxport.runners.draw import save_image
from pgxport.runners.outputs import Answer
from pgxport.runners.runner import Runner
from pgxport.text import size

SCENES = (3, 1, 9)  # numbers in the test split, which the model was not trained on


def walk(output: Path, *, echo: Callable[[str], object]) -> None:
    """Write bundles, scenes and annotated pictures to a folder, and count the answers that are right.

    Args:
        echo: Receives each line for people.

    Raises:
        DiskError: the folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot write {output}: {error.strerror}; choose another -o") from error
    graded: list[bool] = []
    for res in TINY_RESOLUTIONS:
        bundle = export(ExportOptions(output=output / f"tiny-{res}", size="tiny", res=res, answer=False, overwrite=True))
        echo(f"exported {bundle.path} ({size(bundle.nbytes)}, {bundle.manifest.parameters / 1e6:.2f} million parameters)")
        with Runner.from_pretrained(bundle.path) as runner:
            for number in SCENES:
                graded += _ask(runner, number, res, output, echo)
    echo(
        f"{sum(graded)} of {len(graded)} answers in words are what the scenes really show; the boxes and masks are yours to judge in {output}/"
    )
    first = output / f"tiny-{TINY_RESOLUTIONS[-1]}"
    echo(f'try: pgx run {first} --image {output}/scene-{SCENES[0]}.png --prompt "caption en"    pgx inspect {first}')


def _ask(runner: Runner, number: int, res: int, output: Path, echo: Callable[[str], object]) -> Iterator[bool]:
    """Ask a question of each task about a scene; yield whether each answer in words is right."""
    scene = draw("test", number)
    picture = output / f"scene-{number}.png"
    save_image(scene.image, picture)
    for question in _one_of_each(scene, number):
        start = time.perf_counter()
        answer = runner.answer(picture, question.prompt)
        milliseconds = (time.perf_counter() - start) * 1e3
        echo(f'  {picture.name} at {res} px, "{question.prompt}": {_words(answer)}  ({milliseconds:.0f} ms)')
        if question.answer is not None:
            yield answer.text == question.answer
        if answer.boxes:
            annotated = output / f"scene-{number}-{res}-{question.task}.png"
            save_image(answer.draw(scene.image), annotated)
            echo(f"    drawn on {annotated.name}")


def _one_of_each(scene: Scene, number: int) -> list[Question]:
    """The first question of each task about a scene."""
    first: dict[str, Question] = {}
    for question in ask(scene, number):
        first.setdefault(question.task, question)
    return list(first.values())


def _words(answer: Answer) -> str:
    """An answer on one line: its masks, else its boxes, else its text."""
    if answer.masks:
        return ", ".join(f"a mask of {m.label}, {int(m.mask.sum())} px" for m in answer.masks if m.mask is not None)
    if answer.boxes:
        return ", ".join(f"{b.label} at y {b.y1:.0f}–{b.y2:.0f}, x {b.x1:.0f}–{b.x2:.0f}" for b in answer.boxes)
    return answer.text
