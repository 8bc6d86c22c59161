# SPDX-License-Identifier: Apache-2.0
"""The whole road on the embedded model, as a user would walk it: draw a scene, export, ask, save annotated pictures."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pgxport.errors import DiskError
from pgxport.exporter.export import ExportOptions, export
from pgxport.models.spec import TINY_RESOLUTIONS
from pgxport.models.tiny.scenes import Question, Scene, ask, draw
from pgxport.runners.draw import save_image
from pgxport.runners.outputs import Answer
from pgxport.runners.runner import Runner

SCENES = (3, 1, 9)  # of the test split, which no training has seen


def walk(output: Path, *, echo: Callable[[str], object]) -> None:
    """Write bundles, scenes and annotated pictures to a folder, and say what the model answered beside what is true."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot write {output}: {error.strerror}; choose another -o") from error
    right = asked = 0
    for res in TINY_RESOLUTIONS:
        bundle = export(ExportOptions(output=output / f"tiny-{res}", size="tiny", res=res, overwrite=True))
        echo(f"exported {bundle.path} ({bundle.nbytes / 1e6:.1f} MB, {bundle.manifest.parameters / 1e6:.2f} million parameters)")
        with Runner.from_pretrained(bundle.path) as runner:
            for number in SCENES:
                scene = draw("test", number)
                picture = output / f"scene-{number}.png"
                save_image(scene.image, picture)
                for question in _one_of_each(scene, number):
                    start = time.perf_counter()
                    answer = runner.answer(picture, question.prompt)
                    took = (time.perf_counter() - start) * 1e3
                    echo(f'  {picture.name} at {res} px, "{question.prompt}": {_words(answer)}  ({took:.0f} ms)')
                    if question.answer is not None:
                        asked += 1
                        right += answer.text == question.answer
                    if answer.boxes:
                        drawn = output / f"scene-{number}-{res}-{question.task}.png"
                        save_image(answer.draw(scene.image), drawn)
                        echo(f"    drawn on {drawn.name}")
    echo(
        f"{right} of {asked} answers in words are what the scenes really show; the boxes and masks are yours to judge in {output}/"
    )
    first = output / f"tiny-{TINY_RESOLUTIONS[-1]}"
    echo(f'try: pgx run {first} --image {output}/scene-{SCENES[0]}.png --prompt "caption en"    pgx inspect {first}')


def _one_of_each(scene: Scene, number: int) -> Iterator[Question]:
    seen: set[str] = set()
    for question in ask(scene, number):
        if question.task not in seen:
            seen.add(question.task)
            yield question


def _words(answer: Answer) -> str:
    if answer.masks:
        return ", ".join(f"a mask of {m.label}, {int(m.mask.sum())} px" for m in answer.masks if m.mask is not None)
    if answer.boxes:
        return ", ".join(f"{b.label} at y {b.y1:.0f}–{b.y2:.0f}, x {b.x1:.0f}–{b.x2:.0f}" for b in answer.boxes)
    return answer.text
