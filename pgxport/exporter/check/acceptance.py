# SPDX-License-Identifier: Apache-2.0
"""The last step of an export: the bundle is opened as `pgx run` opens it, and answers a drawn scene where this machine can.

Of a large picture the decoder reads an even subset of the image tokens, and the engine holds one graph at a time: the whole
prefix of 3B at 448 px takes it a minute, and shows no more of whether the bundle can answer.
"""

from pgxport.activations.steps import every_for, kept_patches
from pgxport.bundle.reader import Bundle
from pgxport.machine.memory import available_memory
from pgxport.models.tiny.scenes import draw
from pgxport.runners.open_session import why_not_here
from pgxport.runners.pipeline import Pipeline
from pgxport.text import size

IMAGE_TOKENS = 64  # at most
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
    with Pipeline(bundle, engine=engine, low_memory=True) as pipeline:
        features = pipeline.encode([draw("calibration", 0).image])
        whole = features.shape[1]
        kept = kept_patches(whole, every_for(whole, IMAGE_TOKENS))
        prefix = pipeline.prefix(features[:, kept], pipeline.prompt_ids("caption en")[whole - len(kept) :])
        pipeline.decode(list(pipeline.generate(prefix, TOKENS)))
    return None
