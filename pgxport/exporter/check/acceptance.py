# SPDX-License-Identifier: Apache-2.0
"""The last step of an export: the bundle is opened as `pgx run` opens it, and answers a drawn scene where this machine can."""

from pgxport.bundle.reader import Bundle
from pgxport.machine.memory import available_memory
from pgxport.models.tiny.scenes import draw
from pgxport.runners.open_session import why_not_here
from pgxport.runners.runner import Runner
from pgxport.text import size

TOKENS = 4  # of the answer: a prefill and some steps


def answer_scene(bundle: Bundle, memory: int) -> str | None:
    """Answer a prompt about a drawn scene, in the engine that the bundle was written for.

    Args:
        memory: What a run of the bundle takes at its peak, in bytes.

    Returns:
        Why this machine was not asked; None where it answered.

    Raises:
        EngineError: the engine refuses a graph.
        NumericError: the model's numbers are not finite.
    """
    engine, free = bundle.manifest.target, available_memory()
    if reason := why_not_here(engine):
        return reason
    if free is None:
        return f"a run needs {size(memory)} of memory, and this system does not say how much is free"
    if memory > free:
        return f"a run needs {size(memory)} of memory, and {size(free)} are free"
    with Runner(bundle, engine=engine) as runner:
        runner.answer(draw("calibration", 0).image, "caption en", max_new_tokens=TOKENS)
    return None
