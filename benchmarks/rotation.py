# SPDX-License-Identifier: Apache-2.0
"""What rotating the inputs of linears costs at run time: each graph as it is, and without its rotations, in turn.

python tools/make_checkpoint.py --size 3b --res 448 ck
pgx export --checkpoint ck --precision w8a8 -o b
python benchmarks/rotation.py b --json benchmarks/results/rotation-3b-448-w8a8.json

A graph without its rotations reads the same weights and answers nonsense; it does all the other work. Times are the
fastest of several, of a decode step of many.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import onnx  # noqa: E402

from pgxport.bundle.reader import Bundle  # noqa: E402
from pgxport.machine.conditions import describe_machine  # noqa: E402
from pgxport.runners.loop import Decoder  # noqa: E402
from pgxport.runners.ort import OrtSession  # noqa: E402
from pgxport.runners.pipeline import Pipeline  # noqa: E402

STEPS = 32
SHORT = 16  # tokens before steps, whose weights take the same time whatever came before


def without_rotations(graph: Path, folder: Path) -> tuple[Path, list[int]]:
    """The graph beside links to its data, each Reshape, MatMul, Reshape left out; and the sizes of their blocks."""
    model = onnx.load(graph, load_external_data=False)
    nodes = model.graph.node
    square = {t.name: t.dims[0] for t in model.graph.initializer if len(t.dims) == 2 and t.dims[0] == t.dims[1] <= 128}
    made = {name: node for node in nodes for name in node.output}
    read = {name: node for node in nodes for name in node.input}
    blocks, left_out, renamed = [], set(), {}
    for node in nodes:
        if node.op_type == "MatMul" and node.input[1] in square:
            first, last = made[node.input[0]], read[node.output[0]]
            left_out |= {first.name, node.name, last.name}
            renamed[last.output[0]] = first.input[0]
            blocks.append(square[node.input[1]])
    kept = [node for node in nodes if node.name not in left_out]
    for node in kept:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    del nodes[:]
    nodes.extend(kept)
    for data in graph.parent.glob("*.*"):
        if data.suffix in (".data", ".bin"):
            (folder / data.name).hardlink_to(data)
    onnx.save(model, folder / graph.name)
    return folder / graph.name, blocks


def in_turn(runs: dict[str, Callable[[], None]], repeat: int) -> dict[str, float]:
    """The fastest seconds of each, run in turn."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeat):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def measured(bundle: Bundle, scratch: Path, repeat: int) -> dict[str, Any]:
    """Of the vision encoder, a prefill and a step: milliseconds with rotations and without, and the share of the rotations."""
    m = bundle.manifest
    found: dict[str, Any] = {}

    def sessions(name: str) -> tuple[dict[str, OrtSession], list[int]]:
        (scratch / name).mkdir()
        plain, blocks = without_rotations(bundle.graph(name), scratch / name)
        return {"with": OrtSession(bundle.graph(name)), "without": OrtSession(plain)}, blocks

    def add(what: str, best: dict[str, float], blocks: list[int]) -> None:
        of = {name: round(1e3 * seconds, 3) for name, seconds in best.items()}
        share = round(1 - best["without"] / best["with"], 4)
        found[what] = {"ms": of, "share": share, "rotations": len(blocks), "blocks": sorted(set(blocks))}

    pixels = np.random.default_rng(0).standard_normal((1, 3, m.resolution, m.resolution)).astype(np.float32)
    opened, blocks = sessions("vision_encoder")
    calls = {name: (lambda s=s: s.run({"pixel_values": pixels})) for name, s in opened.items()}
    add("vision encoder", in_turn(calls, repeat), blocks)
    del opened, calls
    with Pipeline(bundle, low_memory=True) as pipeline:
        ids = pipeline.prompt_ids("caption en")
        features = np.random.default_rng(1).standard_normal((1, m.image_tokens, m.spec["text"]["width"])).astype(np.float32)
        prefix, word = pipeline.prefix(features, ids), pipeline.embed(ids[-1:])
    opened, blocks = sessions("decoder_step")
    calls = {name: (lambda s=s: Decoder(s, m, prefix.shape[1]).feed(prefix)) for name, s in opened.items()}
    add("prefill", in_turn(calls, repeat), blocks)
    decoders = {name: Decoder(s, m, SHORT + repeat * STEPS) for name, s in opened.items()}
    for decoder in decoders.values():
        decoder.feed(prefix[:, -SHORT:])
    steps = {name: (lambda d=d: d.feed(word)) for name, d in decoders.items()}
    add("decode step", in_turn(steps, repeat * STEPS), blocks)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="on the bundle's disk, for links [beside the bundle]")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    m = bundle.manifest
    record: dict[str, Any] = {
        "what": f"rotated inputs of {m.name} in {m.recipe}: each graph as it is, and without its rotations, in turn",
        "machine": describe_machine(),
    }
    with tempfile.TemporaryDirectory(dir=args.scratch or args.bundle.resolve().parent) as folder:
        record["found"] = measured(bundle, Path(folder), args.repeat)
    print(json.dumps(record, indent=1))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
