# SPDX-License-Identifier: Apache-2.0
"""Ask a loaded bundle, and compare it with the reference along the reference's answer (teacher forcing).

`pgx tune` calls these functions in its own process. `pgx report` runs this module as a process for each
bundle: python -m pgxport.reporting.asking, then a line of JSON a request (worker.py)
"""

import base64
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pgxport.benchmarking.worker import Askable, serve
from pgxport.bundle.manifest import Manifest, TokenIds
from pgxport.bundle.reader import Bundle
from pgxport.errors import InputError
from pgxport.files import disk_errors, writing
from pgxport.machine.nvml import find_nvml
from pgxport.metrics.fidelity import kl_divergence
from pgxport.metrics.sample import Drawn, Sample
from pgxport.reporting.store import load_array
from pgxport.runners.outputs import Answer
from pgxport.runners.pipeline import Picture, Pipeline
from pgxport.runners.runner import Runner

WARM_UP_PROMPT = "caption en"


@dataclass
class TokenAgreement:
    """How far two models agree about the next token, summed over the positions of answers and their ends."""

    positions: int = 0
    agreed: int = 0  # positions where the same token is likeliest to both
    kl: float = 0.0  # KL(reference ‖ other) summed over positions, in nats
    kl_worst: float = 0.0
    located: int = 0  # positions where the reference would write a <loc…> or a <seg…>
    kl_located: float = 0.0  # summed over those, among such tokens only

    def add(self, logits: np.ndarray, reference: np.ndarray, locations: np.ndarray) -> None:
        """Count one more position.

        Args:
            logits: [V], in float32.
            reference: The reference's, [V], after the same tokens.
            locations: Ids of the <loc…> and <seg…> tokens.
        """
        kl = float(kl_divergence(logits[None], reference[None])[0])
        likeliest = int(reference.argmax())
        self.positions += 1
        self.agreed += int(logits.argmax() == likeliest)
        self.kl, self.kl_worst = self.kl + kl, max(self.kl_worst, kl)
        if likeliest in locations:
            self.located += 1
            self.kl_located += float(kl_divergence(logits[None], reference[None], locations)[0])

    @staticmethod
    def total(parts: "Sequence[TokenAgreement]") -> "TokenAgreement":
        """Sum the agreement over several answers."""
        return TokenAgreement(
            sum(p.positions for p in parts),
            sum(p.agreed for p in parts),
            sum(p.kl for p in parts),
            max((p.kl_worst for p in parts), default=0.0),
            sum(p.located for p in parts),
            sum(p.kl_located for p in parts),
        )


def compare(logits: Iterable[np.ndarray], reference: np.ndarray, ids: TokenIds) -> TokenAgreement:
    """Compare logits [V], one position after the other, with the reference's [T, V].

    Raises:
        InputError: the models have different vocabularies.
    """
    locations = np.array([*_consecutive(ids.loc_first, ids.loc_count), *_consecutive(ids.seg_first, ids.seg_count)])
    agreement = TokenAgreement()
    for ours, theirs in zip(logits, reference, strict=True):
        if ours.shape != theirs.shape:
            raise InputError(f"{len(ours)} logits where the reference has {len(theirs)}: another vocabulary")
        agreement.add(ours.astype(np.float32), theirs, locations)
    return agreement


def compare_and_answer(
    pipeline: Pipeline, prefix: np.ndarray, ids: Sequence[int], reference: np.ndarray
) -> tuple[TokenAgreement, list[int]]:
    """Feed a bundle the reference's answer; returns the agreement, and the bundle's own answer.

    Both cost one prefill. As long as the bundle's likeliest tokens are the reference's, they are its own
    answer; at the first other token the cache is wound back, and the bundle goes on alone.

    Args:
        prefix: [1, T, H].
        ids: The reference's answer.
        reference: The reference's logits after the prefix and after each of its tokens, [len(ids) + 1, V].
    """
    limit, stop = pipeline.answer_limit(prefix), pipeline.manifest.stop
    decoder = pipeline.decoder(prefix.shape[1] + max(limit, len(ids)))
    likeliest: list[int] = []

    def noted() -> Iterator[np.ndarray]:
        for logits in pipeline.teacher_forced(prefix, ids, decoder):
            likeliest.append(int(logits.argmax()))
            yield logits

    agreement = compare(noted(), reference, pipeline.manifest.token_ids)
    same = next((i for i, (a, b) in enumerate(zip(likeliest, ids, strict=False)) if a != b), len(ids))
    answer = list(ids[:same])
    if same >= limit:  # cut off at the limit
        return agreement, answer[:limit]
    decoder.length = prefix.shape[1] + same
    token = likeliest[same]
    while token not in stop:
        answer.append(token)
        if len(answer) == limit:
            break
        token = int(decoder.feed(pipeline.embed([token])).argmax())
    return agreement, answer


def write_logits(file: Path, logits: Iterable[np.ndarray], count: int) -> None:
    """Write logits [V] as a float32 array [count, V], row by row: a long answer's fill a board's memory."""
    with disk_errors(f"cannot write {file}"), writing(file) as out:
        for t, row in enumerate(logits):
            if t == 0:
                header = {"descr": "<f4", "fortran_order": False, "shape": (count, len(row))}
                np.lib.format.write_array_header_1_0(out, header)
            out.write(row.astype("<f4").tobytes())


class BundleSubject:
    """A bundle that answers, in a process of its own."""

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
        """Answer a sample; or write the logits along the reference's answer, or compare them with a file's."""
        picture = open_picture(request["image"])
        try:
            if "teacher_force" in request:
                return self._teacher_force(picture, request)
            reply = answer_json(self._runner.answer(picture, request["prompt"], max_new_tokens=request["max_new_tokens"]))
            return reply | ({"vram": self._nvml.held_by(os.getpid())} if self._nvml else {})
        except InputError as error:  # this sample cannot be asked; the next may
            return {"refused": str(error)}

    def _teacher_force(self, picture: Picture, request: dict[str, Any]) -> dict[str, Any]:
        pipeline, ids = self._runner, request["teacher_force"]
        prefix = pipeline.prefix(pipeline.encode([picture]), pipeline.prompt_ids(request["prompt"]))
        logits = pipeline.teacher_forced(prefix, ids)
        if "write" in request:
            write_logits(Path(request["write"]), logits, len(ids) + 1)
            return {}
        return {"agreement": asdict(compare(logits, load_array(Path(request["read"])), pipeline.manifest.token_ids))}


def open_subject(request: dict[str, Any]) -> Askable:
    """Open a bundle, or the checkpoint in transformers."""
    if "checkpoint" in request:
        from pgxport.reporting.transformers_subject import CheckpointSubject  # torch, which bundles do without

        return CheckpointSubject(request)
    return BundleSubject(request)


def picture_of(sample: Sample) -> dict[str, Any]:
    """Return a sample's picture as plain data, for `open_picture` in another process."""
    match sample.image:
        case Drawn(index, split):
            return {"scene": index, "split": split}
        case bytes(content):
            return {"base64": base64.b64encode(content).decode()}
        case path:
            return {"path": str(path)}


def open_picture(image: dict[str, Any]) -> Picture:
    """Return what a runner takes: files are decoded inside the measured time, scenes are drawn outside."""
    if "scene" in image:
        from pgxport.models.tiny.scenes import draw

        return draw(image.get("split", "test"), image["scene"]).image
    return base64.b64decode(image["base64"]) if "base64" in image else str(image["path"])


def bundle_facts(bundle: Bundle) -> dict[str, Any]:
    """Return what a report says of a bundle without measuring it."""
    m: Manifest = bundle.manifest
    shown = m.model_dump(include={"name", "recipe", "target", "resolution", "parameters"})
    parity = m.parity.model_dump() if m.parity else None
    stored: Counter[str] = Counter()
    for counts in m.stored.values():
        stored.update(counts)
    matrices = max(stored, key=lambda dtype: stored[dtype], default=None)
    about = {"bytes": bundle.nbytes, "digest": bundle.digest(), "parity": parity, "stored": dict(stored), "matrices": matrices}
    return shown | about


def answer_json(answer: Answer) -> dict[str, Any]:
    """Return an answer as plain data, and the seconds of its stages as a report shows them."""
    plain = answer.to_json()
    timings = plain.pop("timings")
    before = [timings[stage] for stage in ("preprocess", "vision", "projector", "prefill") if stage in timings]
    # The step that gave the end of the text is one as well.
    steps = max(0, len(answer.token_ids) - answer.truncated)
    stages = timings | {"first_token": sum(before), "answer": sum(timings.values())}
    if steps and "decode" in timings:
        stages["step"] = timings["decode"] / steps
    return {"answer": plain, "seconds": stages}


def _consecutive(first: int, count: int) -> Sequence[int]:
    return range(first, first + count)


if __name__ == "__main__":
    serve(open_subject)
