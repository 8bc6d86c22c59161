# SPDX-License-Identifier: Apache-2.0
"""The ranges of all activations with the model run whole, one scene after another."""

from pathlib import Path

from pgxport.activations.ranges import ActivationRanges
from pgxport.bundle.manifest import Ranges
from pgxport.models.checkpoint import Checkpoint
from pgxport.models.config import read_config
from pgxport.models.eager import TokenizedSample, teacher_forced_logits
from pgxport.models.tiny.scenes import caption, draw
from pgxport.runners.image import pixel_values
from pgxport.runners.saved_tokenizer import find_tokenizer


def ranges_of_whole_runs(folder: Path, scenes: int = 2) -> Ranges:
    checkpoint = Checkpoint.open(folder)
    spec = read_config(checkpoint.config)
    words = find_tokenizer(folder, checkpoint.config).words()
    observe = ActivationRanges(spec)
    for i in range(scenes):
        scene = draw("calibration", i)
        prompt, answer = words.prompt_ids("caption en", 0), words.prompt_ids(caption(scene), 0)[1:-1]
        sample = TokenizedSample(pixel_values(scene.image, spec.resolution)[None], prompt, answer)
        teacher_forced_logits(checkpoint, spec, sample, observe=observe)
    return observe.ranges(scenes)
