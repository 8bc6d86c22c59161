# SPDX-License-Identifier: Apache-2.0
"""What a recipe has to know of the model that it quantizes, and the pass over the checkpoint that finds it, with the check's reference."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pgxport.activations.calibration_file import Calibration
from pgxport.activations.checkpoint_pass import observe_checkpoint
from pgxport.activations.encoding import encode
from pgxport.activations.observe import Changes, Needs
from pgxport.activations.statistics import Statistics
from pgxport.activations.steps import ModelSteps, StepSample, every_for, linears
from pgxport.bundle.manifest import Pixels, Ranges
from pgxport.data.loader import first_samples
from pgxport.errors import UsageError
from pgxport.exporter.equivalent import Equivalent, equivalent
from pgxport.exporter.prepare import PreparedExport, open_checkpoint
from pgxport.exporter.recipe import Recipe, Scheme
from pgxport.exporter.stream import Progress
from pgxport.models.checkpoint import TensorSource
from pgxport.models.spec import ModelSpec
from pgxport.models.weights import parameters
from pgxport.text import duration

Say = Callable[[str], None]
# Drawn scenes that statistics are taken of where no calibration is given, and their image tokens at most. Second moments,
# whose many numbers a few tokens cannot tell, take as many as pgx calibrate does.
SCENES, MOMENT_SCENES, SCENE_TOKENS = 2, 32, 64
# Image tokens of a scene of the check, at most: the first of these that keeps a scene below so many multiplications.
CHECK_TOKENS, CHECK_PRODUCTS = (256, 64), 4e12
