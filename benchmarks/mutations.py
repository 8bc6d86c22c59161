# SPDX-License-Identifier: Apache-2.0
"""Random mutations of the files beside the weights: each export ends with 0, 2 or 3, within 5 seconds and 1 GB, without a traceback.

python benchmarks/mutations.py --count 2000 --compare 200 --json benchmarks/results/mutations.json

The checkpoint is a random PaliGemma 2 of 2 layers with a small tokenizer, the adapter one that PEFT wrote. Each case is a
fork of one process, so that a case costs no import; memory is what the case adds to the fork. Of the mutated checkpoints
that were exported, some are compared with what transformers loads from the same folder: the logits after a prompt. It ends with 1
where a case is at fault, or where both answer and their logits differ.
"""

import argparse
import copy
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "adapter_config.json", "tokenizer.json",
)  # fmt: skip
SECONDS, BYTES, ALLOWED = 5.0, 1_000_000_000, (0, 2, 3)
PROMPT = "detect cat"
REFUSES = "transformers refuses"
TOLERANCE = 1e-3  # of the largest logit
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 1 << 31, (1 << 31) - 1, 10**12, -(10**12), 1 << 64, 10**30, 0.0, 0.5, -0.5, 1e-30, 1e30,
    1e308, "", "x", "auto", "gelu", "relu", "none", "all", "1", "\u2028", "𝔵" * 50, "x" * 100_000, "(a+)+$", "../../etc", [], [None],
    [1, 2], [[[]]], ["x"], [0.1, 0.2, 0.3], list(range(5000)), {}, {"x": 1}, {"rope_type": "default"}, {"rope_type": "linear", "factor": 2},
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """How an export of one mutated file ended."""

    file: str
    number: int
    mutation: str
    code: int  # the exit code, or minus the signal
    seconds: float
    added_bytes: int  # of memory, at its peak
    message: str

    def fault(self) -> str | None:
        """What is wrong with it; None where nothing is."""
        if self.code not in ALLOWED:
            return f"ended with {self.code}"
        if "Traceback" in self.message or (self.code and not self.message.startswith(("pgx: ", "Usage", "Error", "warning"))):
            return "did not end with a message"
        if self.seconds > SECONDS:
            return f"took {self.seconds:.1f} s"
        return f"took {self.added_bytes:,} bytes" if self.added_bytes > BYTES else None


def make_base(folder: Path) -> None:
    """Write a checkpoint, an adapter, and the keys that transformers and PEFT know, by file."""
    from dataclasses import fields

    import peft
    import transformers
    from gemma_tokenizer import build_tokenizer
    from reference import random_paligemma
    from tokenizers import Tokenizer

    checkpoint = folder / "checkpoint"
    build_tokenizer(checkpoint)
    image = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).token_to_id("<image>")
    model = random_paligemma(checkpoint, family="paligemma2", text={"vocab_size": image + 3}, image_token_index=image)
    model.generation_config.eos_token_id = [1, 107]
    model.generation_config.max_new_tokens = 20
    model.generation_config.save_pretrained(checkpoint)
    pixels = transformers.SiglipImageProcessor(size={"height": 42, "width": 42}, resample=3)
    pixels.save_pretrained(checkpoint)
    written = json.loads((checkpoint / "preprocessor_config.json").read_text())
    written["image_seq_length"] = 9
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(written))
    (checkpoint / "processor_config.json").write_text(
        json.dumps({"processor_class": "PaliGemmaProcessor", "image_processor": written})
    )
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    tuned.save_pretrained(folder / "adapter")
    text, vision = transformers.Gemma2Config().to_dict(), transformers.SiglipVisionConfig().to_dict()
    keys = {
        "config.json": [*transformers.PaliGemmaConfig().to_dict(), *text, *vision],
        "generation_config.json": list(transformers.GenerationConfig().to_dict()),
        "preprocessor_config.json": list(pixels.to_dict()),
        "processor_config.json": list(pixels.to_dict()),
        "adapter_config.json": [field.name for field in fields(peft.LoraConfig)],
        "tokenizer.json": ["truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model"],
    }
    (folder / "keys.json").write_text(json.dumps(keys))


def mutate(text: str, keys: list[str], seed: str) -> tuple[str, str]:
    """A file's text with one or two mutations, and what they are."""
    chance = random.Random(seed)
    if chance.random() < 0.05:  # of the bytes
        cut = chance.randrange(len(text))
        return (
            (text[:cut], f"cut at {cut}")
            if chance.random() < 0.5
            else (text[:cut] + chance.choice('{}[],:"0') + text[cut:], f"at {cut}")
        )
    value, what = json.loads(text), []
    for _ in range(chance.choice((1, 1, 2))):
        places = list(_places(value, limit=4000))
        parent, key = chance.choice(places)
        match chance.randrange(6):
            case 0:
                what.append(f"without {key}")
                del parent[key]
            case 1 | 2:
                parent[key] = copy.deepcopy(chance.choice(VALUES))
                what.append(f"{key} = {parent[key]!r:.60}")
            case 3:
                other, name = chance.choice(places)
                if name in other if isinstance(other, dict) else name < len(other):
                    parent[key] = copy.deepcopy(other[name])
                what.append(f"{key} = that of {name}")
            case 4:
                if type(parent[key]) in (int, float):
                    parent[key] = chance.choice(
                        (parent[key] * 2, parent[key] + 1, parent[key] - 1, -parent[key], float(parent[key]), str(parent[key]))
                    )
                else:
                    parent[key] = [parent[key]]
                what.append(f"{key} = {parent[key]!r:.60}")
            case _:
                name = chance.choice(keys)
                below = chance.choice([p for p, _ in places if isinstance(p, dict)])
                below[name] = copy.deepcopy(chance.choice(VALUES))
                what.append(f"{name} = {below[name]!r:.60}")
        if not value:
            break
    return json.dumps(value), ", ".join(what)


def _places(value: Any, limit: int) -> Iterator[tuple[Any, Any]]:
    """Parents and keys of a JSON value's parts, the outermost first, `limit` at most."""
    waiting, count = [value], 0
    while waiting:
        parent = waiting.pop(0)
        for key in list(parent) if isinstance(parent, dict) else range(len(parent)):
            yield parent, key
            if (count := count + 1) >= limit:
                return
            if isinstance(parent[key], dict | list):
                waiting.append(parent[key])


def prepare_case(base: Path, folder: Path, file: str, number: int) -> tuple[list[str], str]:
    """Make a case's folder; returns the words of its export, and the mutation."""
    of_adapter = file == "adapter_config.json"
    kept, mutated = ("checkpoint", "adapter") if of_adapter else ("adapter", "checkpoint")
    (folder / mutated).mkdir(parents=True)
    for path in (base / mutated).iterdir():
        if path.name != file:
            os.link(path, folder / mutated / path.name)
    if file == "preprocessor_config.json":  # which the other goes before
        (folder / mutated / "processor_config.json").unlink(missing_ok=True)
    keys = json.loads((base / "keys.json").read_text())[file]
    text, mutation = mutate((base / mutated / file).read_text(), keys, f"{file}:{number}")
    (folder / mutated / file).write_text(text)
    checkpoint = base / kept if of_adapter else folder / mutated
    return ["export", "--checkpoint", str(checkpoint), *(["--adapter", str(folder / mutated)] if of_adapter else [])], mutation


def run_case(base: Path, folder: Path, file: str, number: int) -> Outcome:
    """Export one mutated checkpoint in a fork of this process."""
    words, mutation = prepare_case(base, folder, file, number)
    log, start = folder / "log", time.perf_counter()
    pid = os.fork()
    if pid == 0:
        _export([*words, "--no-answer", "-o", str(folder / "b")], log)
    _, status, used = os.wait4(pid, 0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = log.read_text(errors="replace").strip() if log.exists() else ""
    message = ("Traceback … " if "Traceback" in text else "") + text.rpartition("\n")[2][:2000]
    added = max(0, used.ru_maxrss - before) << 10
    return Outcome(
        file, number, mutation, os.waitstatus_to_exitcode(status), round(time.perf_counter() - start, 2), added, message[-2000:]
    )


def _export(words: list[str], log: Path) -> None:
    """Run `pgx export` in this fork, and end it."""
    from pgxport import cli

    code = 1
    try:
        opened = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(opened, 2)
        signal.setitimer(signal.ITIMER_REAL, 4 * SECONDS)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_DATA, (4 * BYTES, 4 * BYTES))  # a case that takes all memory ends, and no other
        sys.argv = ["pgx", *words]
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            import traceback

            traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def compare(base: Path, folder: Path) -> str | None:
    """Compare the logits of a case's bundle with transformers' of the same folders; what differs, and None where nothing does."""
    import numpy as np
    import torch
    import transformers
    from PIL import Image

    from pgxport.errors import PgxError
    from pgxport.runners.runner import Runner

    checkpoint = folder / "checkpoint" if (folder / "checkpoint").exists() else base / "checkpoint"
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (60, 80, 3), np.uint8))
    try:
        model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
        if (folder / "adapter").exists():
            import peft

            model = peft.PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().eval()
        inputs = transformers.AutoProcessor.from_pretrained(checkpoint)(text=PROMPT, images=picture, return_tensors="pt")
        with torch.no_grad():
            theirs = model(**inputs).logits[0, -1].float().numpy()
    except Exception as error:
        return f"{REFUSES}: {type(error).__name__}: {str(error)[:150]}"
    try:
        with Runner.from_pretrained(folder / "b") as runner:
            prefix = runner.prefix(runner.encode([picture]), runner.prompt_ids(PROMPT))
            ours = next(iter(runner.teacher_forced(prefix, [])))
    except PgxError as error:
        return f"pgx runs not: {error}"
    far = float(np.abs(ours - theirs).max() / max(1e-9, np.abs(theirs).max()))
    return None if far < TOLERANCE else f"logits are {far:.2g} of their scale apart"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="Mutations of each file; a quarter of them of tokenizer.json.")
    parser.add_argument(
        "--compare", type=int, default=200, help="How many exported cases of each file are compared with transformers."
    )
    parser.add_argument("--file", choices=FILES, action="append")
    parser.add_argument("--first", type=int, default=0, help="The number of the first mutation, which is its seed.")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--compare-in", type=Path, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compare_in:
        for folder in args.compare_in:
            print("verdict:", json.dumps(compare(folder.parents[1] / "base", folder)), flush=True)
        return
    with tempfile.TemporaryDirectory() as temporary:
        record = measure(Path(temporary), args)
    print(json.dumps(record, indent=1))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(record["faults"] or record["differ"]))


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Run every case, and return what was measured as plain data."""
    from pgxport.machine.conditions import describe_machine

    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path[:2]}; from pathlib import Path; "
                    f"from mutations import make_base; make_base(Path({str(folder / 'base')!r}))"],
                   check=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)}, capture_output=True)  # fmt: skip
    import pgxport.cli
    import pgxport.exporter.export
    import pgxport.runners.runner  # noqa: F401

    record: dict[str, Any] = {
        "what": "exports of mutated files",
        "machine": describe_machine(),
        "files": {},
        "faults": [],
        "differ": [],
        "refused_by_transformers_alone": [],
    }
    kept: list[tuple[Path, Outcome]] = []
    for file in args.file or FILES:
        outcomes, compared = [], 0
        for number in range(args.first, args.first + (args.count // 4 if file == "tokenizer.json" else args.count)):
            case = folder / "cases" / f"{file}-{number}"
            outcome = run_case(folder / "base", case, file, number)
            outcomes.append(outcome)
            if fault := outcome.fault():
                record["faults"].append(asdict(outcome) | {"fault": fault})
                print(file, number, fault, outcome.mutation, outcome.message[:300], file=sys.stderr)
            if outcome.code == 0 and compared < args.compare:
                kept.append((case, outcome))
                compared += 1
            else:
                shutil.rmtree(case)
        record["files"][file] = {
            "cases": len(outcomes), "codes": Counter(str(o.code) for o in outcomes), "compared": Counter(),
            "slowest_seconds": max(o.seconds for o in outcomes), "most_added_bytes": max(o.added_bytes for o in outcomes),
        }  # fmt: skip
    for (case, outcome), verdict in zip(kept, _verdicts([case for case, _ in kept]), strict=True):
        kind = "as transformers" if verdict is None else REFUSES if verdict.startswith(REFUSES) else "otherwise"
        record["files"][outcome.file]["compared"][kind] += 1
        if verdict is not None:
            row = {"file": outcome.file, "number": outcome.number, "mutation": outcome.mutation, "verdict": verdict}
            record["differ" if kind == "otherwise" else "refused_by_transformers_alone"].append(row)
        shutil.rmtree(case)
    return record


def _verdicts(cases: list[Path]) -> list[str | None]:
    """What `compare` says of each case, from a process that imports transformers once."""
    if not cases:
        return []
    command = [sys.executable, __file__, "--compare-in", *map(str, cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the comparison ended with {done.returncode}: {done.stderr[-2000:]}")
    return [json.loads(line.removeprefix("verdict: ")) for line in done.stdout.splitlines() if line.startswith("verdict: ")]


if __name__ == "__main__":
    main()
