# SPDX-License-Identifier: Apache-2.0
"""What `pgx compile --engine cpu` changes: a start, memory, and speed after it, with and without packed weights, in turn.

python tools/make_checkpoint.py --size 3b --res 448 ck
pgx export --checkpoint ck --precision int4-fast -o b
python benchmarks/packed.py b --json benchmarks/results/packed-3b-448.json

Every start is a process of its own, with the files in the page cache. It verifies, loads, and answers once.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402

from pgxport.bundle.reader import Bundle  # noqa: E402
from pgxport.compile.cpu import pack  # noqa: E402
from pgxport.machine.conditions import describe_machine  # noqa: E402
from pgxport.machine.memory import process_memory  # noqa: E402
from pgxport.runners.engine_cache import FOLDER_VARIABLE  # noqa: E402
from pgxport.runners.runner import Runner  # noqa: E402

NEW_TOKENS = 32


def memory() -> dict[str, int]:
    """Bytes: private and mapped now, and the most resident so far."""
    now = process_memory(peak=True)
    assert now, "this needs Linux's /proc"
    return {"private": now.private, "mapped": now.mapped, "peak": now.resident}


def start(path: str, threads: int) -> dict[str, Any]:
    """One start, measured."""
    began = time.perf_counter()
    bundle = Bundle.open(path)
    opened = time.perf_counter()
    runner = Runner(bundle, threads=threads)
    loaded, at_rest = time.perf_counter(), memory()
    picture = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), dtype=np.uint8)
    answer = runner.answer(picture, "caption en", max_new_tokens=NEW_TOKENS)
    again = runner.answer(picture, "caption en", max_new_tokens=NEW_TOKENS)
    return {
        "verify": opened - began, "load": loaded - opened, "loaded": at_rest, "answered": memory(), "tokens": answer.token_ids,
        "first": answer.timings, "second": again.timings, "step": again.timings["decode"] / (len(again.token_ids) - 1),
    }  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def measure(path: str, threads: int, repeat: int, scratch: str) -> dict[str, Any]:
    bundle, cache = Bundle.open(path), Path(scratch) / "engines"
    began = time.perf_counter()
    entry = pack(bundle, cache)
    seconds = time.perf_counter() - began
    runs: dict[str, list[dict[str, Any]]] = {"packed": [], "as exported": []}
    for i in range(repeat):
        for kind in list(runs)[:: 1 if i % 2 else -1]:
            environment = os.environ | {FOLDER_VARIABLE: str(cache if kind == "packed" else Path(scratch) / "none")}
            command = [sys.executable, __file__, path, "--threads", str(threads), "--once"]
            runs[kind].append(json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout))
    assert len({tuple(run["tokens"]) for kind in runs.values() for run in kind}) == 1, "the answers differ"
    found: dict[str, Any] = {"bundle_bytes": bundle.nbytes, "pack_seconds": seconds}
    found["packed_bytes"] = sum(info.size for info in entry.files.values())
    for kind, of_kind in runs.items():
        found[kind] = {name: spread([run[name] for run in of_kind]) for name in ("verify", "load", "step")}
        for stage in ("vision", "prefill"):
            for when in ("first", "second"):
                found[kind][f"{stage}_{when}"] = spread([run[when][stage] for run in of_kind])
        for when in ("loaded", "answered"):
            found[kind][when] = {name: spread([run[when][name] for run in of_kind]) for name in ("private", "mapped", "peak")}
    shutil.rmtree(cache)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(start(args.bundles[0], args.threads)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        found = {Path(path).name: measure(path, args.threads, args.repeat, scratch) for path in args.bundles}
    command = "python benchmarks/packed.py " + " ".join(Path(path).name for path in args.bundles)
    about = {"command": command, "machine": describe_machine(), "threads": args.threads, "repeat": args.repeat}
    text = json.dumps(about | {"bundles": found}, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
