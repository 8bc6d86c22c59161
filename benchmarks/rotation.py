# SPDX-License-Identifier: Apache-2.0
"""What rotating the inputs of linears costs at run time: the time of Reshape, MatMul, Reshape in ONNX Runtime's own profile.

python tools/make_checkpoint.py --size 3b --res 448 ck
pgx export --checkpoint ck --precision int4 -o b
python benchmarks/rotation.py b --json benchmarks/results/rotation-3b-448-int4.json

One picture is encoded and answered several times; of each graph the fastest run counts, prefills and steps apart. A profile
slows a step down, by a few microseconds for each node, so that the share of a step is an upper limit.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # noqa: E402

from pgxport.bundle.reader import Bundle  # noqa: E402
from pgxport.machine.conditions import describe_machine  # noqa: E402
from pgxport.runners import ort as runner  # noqa: E402
from pgxport.runners.pipeline import Pipeline  # noqa: E402

STEPS = 16


def rotations(graph: Path) -> dict[str, int]:
    """The nodes of a graph that rotate, by name, and the size of their blocks."""
    nodes = onnx.load(graph, load_external_data=False).graph
    square = {t.name: t.dims[0] for t in nodes.initializer if len(t.dims) == 2 and t.dims[0] == t.dims[1] <= 128}
    made = {name: node for node in nodes.node for name in node.output}
    read = {name: node for node in nodes.node for name in node.input}
    found = {}
    for node in nodes.node:
        if node.op_type == "MatMul" and node.input[1] in square:
            for part in (made[node.input[0]], node, read[node.output[0]]):
                found[part.name] = square[node.input[1]]
    return found


def runs(profile: Path, names: set[str]) -> list[tuple[float, float]]:
    """Milliseconds of each run of a session, and of the nodes with these names in it."""
    events = [e for e in json.loads(profile.read_text()) if "dur" in e]
    nodes = [(e["ts"], e["dur"]) for e in events if e["name"].removesuffix("_kernel_time") in names]
    whole = [(e["ts"], e["dur"]) for e in events if e["name"] == "model_run"]
    return [(dur / 1e3, sum(d for ts, d in nodes if start <= ts < start + dur) / 1e3) for start, dur in whole]


def profiled(bundle: Bundle, folder: Path, repeat: int) -> dict[str, list[tuple[float, float]]]:
    """The runs of each graph, those of the decoder as prefills and steps."""
    plain, opened = runner.session_options, []

    def options(**how: Any) -> onnxruntime.SessionOptions:
        opened.append(folder / f"session-{len(opened)}-")
        made = plain(**how)
        made.enable_profiling, made.profile_file_prefix = True, str(opened[-1])
        return made

    runner.session_options = options
    try:
        with Pipeline(bundle) as pipeline:
            order = pipeline.loaded
            picture = np.random.default_rng(0).integers(0, 256, (768, 1024, 3), np.uint8)
            ids = pipeline.prompt_ids("caption en")
            for _ in range(repeat):
                prefix = pipeline.prefix(pipeline.encode([picture]), ids)
                for _ in pipeline.teacher_forced(prefix, ids[-1:] * STEPS):
                    pass
    finally:
        runner.session_options = plain
    found = {}
    for name, prefix in zip(order, opened, strict=True):
        (file,) = folder.glob(f"{prefix.name}*")
        found[name] = runs(file, set(rotations(bundle.graph(name))))
    decoder = found.pop("decoder_step")
    starts = range(0, len(decoder), STEPS + 1)
    return found | {
        "prefill": [decoder[i] for i in starts],
        "decode step": [r for i in starts for r in decoder[i + 1 : i + STEPS + 1]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    with tempfile.TemporaryDirectory() as folder:
        found = profiled(bundle, Path(folder), args.repeat)
    m = bundle.manifest
    record: dict[str, Any] = {
        "what": f"rotated inputs of {m.name}, {m.recipe}, in ONNX Runtime's profile",
        "machine": describe_machine(),
        "blocks": {name: sorted(set(rotations(bundle.graph(name)).values())) for name in m.graphs},
        "ms": {},
    }
    for name, of in found.items():
        if rotated := [r for r in of if r[1]]:
            whole, turned = min(rotated)
            record["ms"][name] = {"whole": round(whole, 3), "rotations": round(turned, 3), "share": round(turned / whole, 4)}
    print(json.dumps(record, indent=1))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
