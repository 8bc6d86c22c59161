# SPDX-License-Identifier: Apache-2.0
"""Answer samples for a report, one at a time, and follow an answer that is given. Run as a module, it is a worker that does.

python -m pgxport.reporting.asking, then a line of JSON a request (worker.py)
"""

import base64
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pgxport.benchmarking.worker import Askable, serve
from pgxport.bundle.manifest import Manifest, TokenIds
from pgxport.bundle.reader import Bundle
from pgxport.errors import InputError
from pgxport.machine.nvml import find_nvml
from pgxport.metrics.fidelity import kl_divergence
from pgxport.metrics.sample import Drawn, Sample
from pgxport.runners.outputs import Answer
from pgxport.runners.pipeline import Picture
from pgxport.runners.runner import Runner

WARM_UP_PROMPT = "caption en"


@dataclass
class Along:
    """What two models think of the next token, along the same answer and at its end."""

    positions: int = 0
    agreed: int = 0  # where both find the same token likeliest
    kl: float = 0.0  # summed over positions, in nats
    kl_worst: float = 0.0
    located: int = 0  # positions where the reference would write a <loc…> or a <seg…>
    kl_located: float = 0.0  # summed over those, among such tokens only

    def add(self, logits: np.ndarray, reference: np.ndarray, rows: np.ndarray) -> None:
        """One more position; logits [V], the same after the same tokens."""
        kl = float(kl_divergence(logits[None], reference[None])[0])
        self.positions += 1
        self.agreed += int(logits.argmax() == reference.argmax())
        self.kl, self.kl_worst = self.kl + kl, max(self.kl_worst, kl)
        if reference.argmax() in rows:
            self.located += 1
            self.kl_located += float(kl_divergence(logits[None], reference[None], rows)[0])


class BundleSubject:
    """A bundle that answers."""

    def __init__(self, request: dict[str, Any]):
        start = time.perf_counter()
        bundle = Bundle.open(request["bundle"])
        verified = time.perf_counter()
        self._runner = Runner(bundle, engine=request["engine"], threads=request["threads"])
        self.opening = {"verify": verified - start, "load": time.perf_counter() - verified}
        self.facts, self._nvml = bundle_facts(bundle), find_nvml(request["engine"])

    def repeat(self, *, warm_up: bool) -> dict[str, float]:
        return dict(self._runner.answer(Image.new("RGB", (640, 480), "grey"), WARM_UP_PROMPT, max_new_tokens=4).timings)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        picture = open_picture(request["image"])
        try:
            if "follow" in request:
                return self._follow(picture, request)
            found = answered(self._runner.answer(picture, request["prompt"], max_new_tokens=request["max_new_tokens"]))
            return found | ({"vram": self._nvml.held_by(os.getpid())} if self._nvml else {})
        except InputError as error:  # this one cannot be asked; the next may
            return {"refused": str(error)}

    def _follow(self, picture: Picture, request: dict[str, Any]) -> dict[str, Any]:
        pipeline, ids = self._runner.pipeline, request["follow"]
        prefix = pipeline.prefix(pipeline.encode([picture]), pipeline.prompt_ids(request["prompt"]))
        logits = pipeline.teacher_forced(prefix, ids)
        if "write" in request:
            write_logits(Path(request["write"]), logits, len(ids) + 1, pipeline.manifest.token_table.shape[0])
            return {}
        return along(request["read"], logits, pipeline.manifest.token_ids)


def open_subject(request: dict[str, Any]) -> Askable:
    """A bundle, or the checkpoint in transformers."""
    if "checkpoint" in request:
        from pgxport.reporting.transformers_subject import CheckpointSubject  # torch, which bundles do without

        return CheckpointSubject(request)
    return BundleSubject(request)


def picture_of(sample: Sample) -> dict[str, Any]:
    """A sample's picture, for `open_picture` in another process."""
    match sample.image:
        case Drawn(index):
            return {"scene": index}
        case bytes(content):
            return {"base64": base64.b64encode(content).decode()}
        case path:
            return {"path": str(path)}


def open_picture(image: dict[str, Any]) -> Picture:
    """What a runner takes: files are decoded inside what is timed, as in use, and scenes are drawn outside of it."""
    if "scene" in image:
        from pgxport.models.tiny.scenes import draw

        return draw("test", image["scene"]).image
    return base64.b64decode(image["base64"]) if "base64" in image else str(image["path"])


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """What a report says of a bundle that it has not measured."""
    m: Manifest = bundle.manifest
    shown = m.model_dump(include={"name", "recipe", "target", "resolution", "parameters"})
    parity = m.parity.model_dump() if m.parity else None
    stored: Counter[str] = Counter()
    for counts in m.stored.values():
        stored.update(counts)
    return shown | {
        "bytes": bundle.nbytes, "digest": bundle.digest(), "parity": parity,
        "stored": dict(stored), "matrices": max(stored, key=lambda dtype: stored[dtype], default=None),
    }  # fmt: skip


def answered(answer: Answer) -> dict[str, Any]:
    """An answer, and the seconds of its stages as a report shows them."""
    plain = answer.to_json()
    timings = plain.pop("timings")
    before = [timings[stage] for stage in ("preprocess", "vision", "projector", "prefill") if stage in timings]
    # The step that found the end of the text is one as well.
    steps = max(0, len(answer.token_ids) - answer.truncated)
    stages = timings | {"first_token": sum(before), "answer": sum(timings.values())}
    if steps and "decode" in timings:
        stages["step"] = timings["decode"] / steps
    return {"answer": plain, "seconds": stages}


def write_logits(file: Path, rows: Any, count: int, vocabulary: int) -> None:
    """A float32 [T, V] file, row by row: a long answer's logits are more than a board wants to hold."""
    out = np.lib.format.open_memmap(file, mode="w+", dtype=np.float32, shape=(count, vocabulary))
    for t, logits in enumerate(rows):
        out[t] = logits
    out.flush()


def along(file: str, rows: Any, ids: TokenIds) -> dict[str, Any]:
    """Compare logits [V], one position after the other, with those that `write_logits` wrote."""
    reference = np.load(file, mmap_mode="r", allow_pickle=False)
    located = np.array([*_run(ids.loc_first, ids.loc_count), *_run(ids.seg_first, ids.seg_count)])
    found = Along()
    for logits, theirs in zip(rows, reference, strict=True):
        if logits.shape != theirs.shape:
            return {"refused": f"{len(logits)} logits where the reference has {len(theirs)}: another vocabulary"}
        found.add(logits.astype(np.float32), theirs, located)
    return {"along": asdict(found)}


def _run(first: int, count: int) -> Sequence[int]:
    return range(first, first + count)


if __name__ == "__main__":
    serve(open_subject)
