# SPDX-License-Identifier: Apache-2.0
"""Build every graph for TensorRT at the published shapes with NVIDIA's parser and builder, TensorRT-RTX, which needs no GPU for that.

    python benchmarks/tensorrt_builds.py                                    reduced depth: two layers of each tower
    python benchmarks/tensorrt_builds.py --size 3b --res 448 --precision int4 --depth full

Weights are random. The engines are for Ada (SM 8.9); nothing here runs them, so that nothing here is about speed.
"""

import argparse
import json
import platform
import resource
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tensorrt_rtx
from tensorrt_builder import build

from pgxport.exporter.graphs import TABLE_FILE, serialized, write_graphs
from pgxport.exporter.locate import TINY
from pgxport.exporter.stream import DataLayout
from pgxport.exporter.targets import TENSORRT
from pgxport.models.mask_decoder import MaskWeights
from pgxport.models.spec import ModelSpec, published
from pgxport.models.weights import weight_shapes

RESULTS = Path(__file__).parent / "results" / "tensorrt-builds.json"
PRECISIONS = ("fp16", "bf16", "int8", "w8a8", "int4", "fp8")
POOL = np.random.default_rng(0).normal(0, 0.02, 2_097_143).astype(np.float32)  # a prime number of them: no two rows are the same
GRAPHS = ("vision_encoder", "projector", "decoder_step", "mask_decoder")


class Random:
    """A checkpoint of random weights, and a calibration in which every input is between -4 and 4."""

    def __init__(self, spec: ModelSpec):
        self._shapes = weight_shapes(spec)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32)

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        shape = self._shapes[name]
        width = int(np.prod(shape[1:]))
        first = crc32(name.encode()) + start * width
        return np.take(POOL, np.arange(first, first + (stop - start) * width) % len(POOL)).reshape(stop - start, *shape[1:])

    def range(self, path: str, observer: str) -> tuple[float, float]:
        return -4.0, 4.0

    def square(self, path: str) -> np.ndarray:
        return np.ones(self._shapes[path][1], np.float32)


def model(family: str, size: str, res: int, depth: int | None) -> ModelSpec:
    """The published model, or so many layers of each of its towers."""
    spec = published(family, size, res)
    if depth is None:
        return spec
    local = tuple(i for i in spec.text.local_layers if i < depth)
    return replace(spec, text=replace(spec.text, depth=depth, local_layers=local), vision=replace(spec.vision, depth=depth))


def write(folder: Path, spec: ModelSpec, precision: str, trt: str) -> tuple[dict[str, int], int]:
    """Write the graphs and their weights; the bytes of weights that each reads, and the rows of the cache."""
    source, target, context = Random(spec), TENSORRT[trt], spec.image_tokens + 512
    masks = MaskWeights(TINY / "vae-oid.npz")
    graphs, table = write_graphs(source, spec, masks, target.recipe(precision), target, context, source)
    sizes = {}
    for file, layout in [(TABLE_FILE, table), *((f"{n}.data", DataLayout(g.promises.values())) for n, g in graphs.items())]:
        with open(folder / file, "wb") as out:
            out.writelines(layout.bytes())
        sizes[file.removesuffix(".data")] = layout.nbytes
    for name, g in graphs.items():
        (folder / f"{name}.onnx").write_bytes(serialized(g, DataLayout(g.promises.values()), table))
    sizes["decoder_step"] += sizes.pop(TABLE_FILE)
    return sizes, context


def rows(options: argparse.Namespace, size: str, res: int, precision: str, trt: str) -> list[dict[str, Any]]:
    spec, found = model(options.family, size, res, options.depth), []
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        weights, context = write(Path(scratch), spec, precision, trt)
        for graph in options.graphs:
            for profiles in (("prefill",), ("prefill", "step")) if graph == "decoder_step" else (("only",),):
                built = build(
                    Path(scratch) / f"{graph}.onnx", prefix=spec.image_tokens + 64, capacity=context, profiles=profiles, sm="SM89"
                )
                found.append({
                    "family": options.family, "size": size, "res": res, "layers": spec.text.depth, "graph": graph, "trt": trt,
                    "precision": precision, "profiles": list(profiles), "sm": "8.9", "weight_bytes": weights[graph],
                    "engine_bytes": built.nbytes, "parse_seconds": round(built.parse_seconds, 2), "build_seconds": round(built.seconds, 2),
                })  # fmt: skip
                print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="paligemma2")
    parser.add_argument("--size", nargs="*", default=["3b"])
    parser.add_argument("--res", nargs="*", type=int, default=[448])
    parser.add_argument("--precision", nargs="*", default=PRECISIONS)
    parser.add_argument("--trt", nargs="*", default=["11", "10.16"])
    parser.add_argument("--depth", type=lambda text: None if text == "full" else int(text), default=2)
    parser.add_argument("--graphs", nargs="*", default=GRAPHS)
    parser.add_argument("--scratch", type=Path, help="A folder with room for the weights.")
    options = parser.parse_args()
    for size in options.size:
        for res in options.res:
            for precision in options.precision:
                for trt in options.trt:
                    keep(rows(options, size, res, precision, trt))


def keep(fresh: list[dict[str, Any]]) -> None:
    """Put rows into the results, in the place of those of the same build."""
    same = ("family", "size", "res", "layers", "graph", "trt", "precision", "profiles", "sm")
    before = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    names = [[row[key] for key in same] for row in fresh]
    about = {
        "what": "engines built without a GPU, of random weights; not run",
        "builder": f"tensorrt_rtx {tensorrt_rtx.__version__}",
        "machine": platform.processor() or platform.machine(),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "command": "python benchmarks/tensorrt_builds.py " + " ".join(sys.argv[1:]),
    }
    kept = [row for row in before if [row[key] for key in same] not in names]
    RESULTS.write_text(json.dumps({"about": about, "rows": kept + fresh}, indent=1) + "\n")


if __name__ == "__main__":
    main()
