# SPDX-License-Identifier: Apache-2.0
"""The checkpoint in transformers, asked like a bundle: the row that everything else is measured against.

transformers' own processor, masks and greedy generation in float32, so that none of our code decides what is
right.
"""

import contextlib
import importlib.metadata
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pgxport.errors import CheckpointError, InputError, UsageError
from pgxport.files import file_sha256
from pgxport.models.generation_config import read_generation
from pgxport.models.safetensors import read_json
from pgxport.reporting.asking import answer_json, open_picture, write_logits
from pgxport.runners.image import load_image
from pgxport.runners.open_session import open_session
from pgxport.runners.outputs import Answer, parse

LIMIT = 512  # new tokens, where the caller sets no limit


def require_reference() -> None:
    """Check that torch and transformers are installed.

    Raises:
        UsageError: one of them is not.
    """
    for package in ("torch", "transformers"):
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UsageError(f'--reference needs {package}: pip install "pgxport[reference]"') from None


def checkpoint_facts(folder: Path) -> dict[str, Any]:
    """Return what a report says of a checkpoint without measuring it.

    Raises:
        CheckpointError: the folder holds no safetensors checkpoint.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").exists():
        raise CheckpointError(f"--reference {folder}: is no folder with config.json and *.safetensors, as the hub lays them out")
    weights = sum(file.stat().st_size for file in files)
    shown = {"name": folder.resolve().name, "recipe": "float32 in transformers", "target": "torch", "bytes": weights}
    return shown | {"resolution": None, "parameters": None, "digest": _digest(files), "parity": None, "stored": {}}


class CheckpointSubject:
    """A checkpoint that answers in transformers."""

    def __init__(self, request: dict[str, Any]):
        import torch
        import transformers

        folder, start = Path(request["checkpoint"]), time.perf_counter()
        if request["threads"]:
            torch.set_num_threads(request["threads"])
        self._torch, self._transformers = torch, transformers
        self._processor = transformers.PaliGemmaProcessor.from_pretrained(folder, local_files_only=True)
        model = transformers.PaliGemmaForConditionalGeneration
        self._model = model.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", local_files_only=True, use_safetensors=True
        ).eval()
        generation = folder / "generation_config.json"
        asked = read_generation(read_json(folder / "config.json"), read_json(generation) if generation.is_file() else None)
        self._ends = set(asked.stop or (self._processor.tokenizer.eos_token_id,))
        self._limit = asked.max_new_tokens or LIMIT
        # Greedy, as a bundle answers: penalties and the like of the file would stay with generate's own arguments.
        self._model.generation_config = transformers.GenerationConfig(
            eos_token_id=sorted(self._ends), pad_token_id=self._processor.tokenizer.pad_token_id
        )
        masks = request["mask_decoder"]
        self._masks = open_session("cpu", Path(masks), threads=request["threads"]) if masks else None
        self.opening = {"load": time.perf_counter() - start}
        self.facts = checkpoint_facts(folder)

    def repeat(self, *, warm_up: bool) -> dict[str, float]:
        self._generate(Image.new("RGB", (640, 480), "grey"), "caption en", 4)
        return {}

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        picture, prompt = open_picture(request["image"]), request["prompt"]
        try:
            if "write" in request:
                forcing = _TeacherForcing(self._torch, request["teacher_force"])
                self._generate(load_image(picture), prompt, len(request["teacher_force"]) + 1, forcing)
                write_logits(Path(request["write"]), forcing.logits, len(forcing.logits))
                return {}
            return self._answer(picture, prompt, request["max_new_tokens"] or self._limit)
        except InputError as error:  # a picture that cannot be read
            return {"refused": str(error)}

    def _answer(self, picture: Any, prompt: str, limit: int) -> dict[str, Any]:
        start = time.perf_counter()
        image = load_image(picture)
        ids, clock = self._generate(image, prompt, limit)
        now = time.perf_counter()
        ended = bool(ids) and ids[-1] in self._ends
        kept = tuple(ids[:-1] if ended else ids)
        text = self._processor.tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        boxes, masks, warnings = parse(text, *image.size, self._decode_mask if self._masks else None)
        timings = {"prefill": clock[0] - start, "decode": clock[-1] - clock[0], "post": time.perf_counter() - now}
        return answer_json(Answer(text, kept, boxes, masks, warnings, timings=timings, truncated=not ended))

    def _generate(self, image: Image.Image, prompt: str, limit: int, forcing: Any = None) -> tuple[list[int], list[float]]:
        """Return the new ids, their end included, and the time at which each of them came."""
        inputs = self._processor(images=[image], text=[f"<image>{prompt}"], return_tensors="pt")
        ticks = _Ticks()
        processors = self._transformers.LogitsProcessorList([forcing] if forcing else [])
        with self._torch.no_grad(), _quiet(self._transformers):
            out = self._model.generate(
                **inputs, max_new_tokens=limit, do_sample=False, streamer=ticks, logits_processor=processors
            )
        return out[0, inputs["input_ids"].shape[1] :].tolist(), ticks.times[1:]

    def _decode_mask(self, codes: np.ndarray) -> np.ndarray:
        assert self._masks is not None
        return self._masks.run({"codes": codes})["mask"]


class _Ticks:
    """A streamer, which `generate` calls with the prompt and then with each token; keeps the times."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


class _TeacherForcing:
    """A logits processor that makes `generate` write a given answer, and keeps the logits of each token."""

    def __init__(self, torch: Any, ids: list[int]):
        self._torch, self._ids, self.logits = torch, ids, list[np.ndarray]()

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        at = len(self.logits)
        self.logits.append(scores[0].float().numpy().copy())
        if at >= len(self._ids):
            return scores
        forced = self._torch.full_like(scores, -float("inf"))
        forced[0, self._ids[at]] = 0
        return forced


def _digest(files: list[Path]) -> str:
    import hashlib

    return hashlib.sha256("".join(file.name + file_sha256(file) for file in files).encode()).hexdigest()


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Silence transformers, which gives advice about prompts and padding for every answer."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
