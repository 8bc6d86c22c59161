# SPDX-License-Identifier: Apache-2.0
"""Build every graph for TensorRT at the published shapes with NVIDIA's parser and builder, TensorRT-RTX, which needs no GPU for that.

    python benchmarks/tensorrt_builds.py                                    all that the results lack
    python benchmarks/tensorrt_builds.py --again --size 3b --precision int4 these, though they are there

Weights are random. The engines are for Ada (SM 8.9); nothing here runs them, so that nothing here is about speed. PaliGemma 2 3B at 448 px
is built whole, in all precisions but float32, whose weights of 10 GB the builder holds more than twice; the others with two layers of each
tower, all of which have the published shapes.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import tensorrt_rtx
from tensorrt_builder import build

from pgxport.compile.lint import check_file
from pgxport.exporter.graphs import TABLE_FILE, serialized, write_graphs
from pgxport.exporter.stream import DataLayout
from pgxport.exporter.targets import TENSORRT
from pgxport.hub.locate import TINY
from pgxport.models.mask_decoder import MaskWeights
from pgxport.models.spec import ModelSpec, published
from pgxport.models.weights import weight_shapes

RESULTS = Path(__file__).parent / "results" / "tensorrt-builds.json"
FLOATS = ("fp16", "bf16")
PRECISIONS = (*FLOATS, "int8", "w8a8", "int4", "fp8")
POOL = np.random.default_rng(0).normal(0, 0.02, 2_097_143).astype(np.float32)  # a prime number of them: no two rows are the same
GRAPHS = ("vision_encoder", "projector", "decoder_step", "mask_decoder")
SHORT, SM = 2, "8.9"


@dataclass(frozen=True)
class Case:
    """A bundle whose graphs are built."""

    size: str
    res: int
    precision: str
    trt: str
    family: str = "paligemma2"
    layers: int | None = SHORT  # of each tower; None: all

    @property
    def depth(self) -> int:
        return published(self.family, self.size, self.res).text.depth if self.layers is None else self.layers

    def profiles(self, graph: str) -> tuple[tuple[str, ...], ...]:
        """Those that the graph is built with. Float matrices are in the engine once more for a second: 21 GB of memory, of a whole 3B."""
        if graph != "decoder_step":
            return (("only",),)
        whole_floats = self.layers is None and self.precision in FLOATS
        return (("prefill",),) if whole_floats else (("prefill",), ("prefill", "step"))

    def rows(self) -> list[dict[str, Any]]:
        """What names each row of the results."""
        same = asdict(self) | {"layers": self.depth, "sm": SM}
        return [same | {"graph": graph, "profiles": list(p)} for graph in GRAPHS for p in self.profiles(graph)]


def cases() -> list[Case]:
    """Every graph in every precision, size and version."""
    return [
        *(Case("3b", 448, p, trt) for trt in TENSORRT for p in ("fp32", *PRECISIONS)),
        *(Case("3b", 448, p, "11", family="paligemma") for p in ("fp32", *PRECISIONS)),
        *(Case("3b", 448, p, "10.3", family="paligemma") for p in ("fp16", "int4")),
        *(Case("3b", res, p, trt) for res in (224, 896) for trt in ("10.16", "11") for p in ("fp16", "int4", "fp8")),
        *(Case(size, 448, p, "11") for size in ("10b", "28b") for p in PRECISIONS),
        *(Case(size, 448, p, "10.16") for size in ("10b", "28b") for p in ("fp16", "int4", "w8a8")),
        *(Case("3b", 448, p, "11", layers=None) for p in PRECISIONS),
    ]


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


def model(case: Case) -> ModelSpec:
    """The published model, or so many layers of each of its towers."""
    spec = published(case.family, case.size, case.res)
    if case.layers is None:
        return spec
    text = replace(spec.text, depth=case.layers, local_layers=tuple(i for i in spec.text.local_layers if i < case.layers))
    return replace(spec, text=text, vision=replace(spec.vision, depth=case.layers))


def write(folder: Path, spec: ModelSpec, precision: str, trt: str) -> tuple[dict[str, int], int]:
    """Write the graphs and their weights; the bytes of weights that each reads, and the rows of the cache."""
    source, target, context = Random(spec), TENSORRT[trt], spec.image_tokens + 512
    masks = MaskWeights(TINY / "vae-oid.npz")
    graphs, shared = write_graphs(source, spec, masks, target.recipe(precision), target, context, source)
    sizes = {}
    for file, layout in [*shared.items(), *((f"{n}.data", DataLayout(g.lazy_tensors.values())) for n, g in graphs.items())]:
        with open(folder / file, "wb") as out:
            out.writelines(layout.bytes())
        sizes[file.removesuffix(".data")] = layout.nbytes
    for name, g in graphs.items():
        (folder / f"{name}.onnx").write_bytes(serialized(g, DataLayout(g.lazy_tensors.values()), shared))
    sizes["decoder_step"] += sizes.pop(TABLE_FILE)
    return sizes, context


def build_all(case: Case, scratch: Path) -> list[dict[str, Any]]:
    """The rows of a case: each graph is linted, parsed and built."""
    spec, found = model(case), []
    weights, context = write(scratch, spec, case.precision, case.trt)
    for row in case.rows():
        file = scratch / f"{row['graph']}.onnx"
        check_file(file, case.trt, SM)
        built = build(file, prefix=spec.image_tokens + 64, capacity=context, profiles=row["profiles"], sm="SM89")
        seconds = {"parse_seconds": round(built.parse_seconds, 2), "build_seconds": round(built.seconds, 2)}
        found.append(row | {"weight_bytes": weights[row["graph"]], "engine_bytes": built.nbytes} | seconds)
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("family", "size", "res", "precision", "trt", "layers"):
        parser.add_argument(f"--{name}", nargs="*", help="only these" + (", or all" if name == "layers" else ""))
    parser.add_argument("--again", action="store_true", help="those that the results have, too")
    parser.add_argument("--scratch", type=Path, help="a folder with room for the weights of one case")
    options = parser.parse_args()
    for case in cases():
        asked = all(given is None or str(value) in given for given, value in (
            (getattr(options, name), "all" if value is None else value) for name, value in asdict(case).items()
        ))  # fmt: skip
        if asked and (options.again or not all(map(present(), case.rows()))):
            with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
                keep(build_all(case, Path(scratch)))


def present() -> Callable[[dict[str, Any]], bool]:
    """Whether the results have a row of a name."""
    rows = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else []
    return lambda name: any(name.items() <= row.items() for row in rows)


def keep(fresh: list[dict[str, Any]]) -> None:
    """Put rows into the results, in the place of those of the same build."""
    about = {
        "what": "engines built without a GPU, of random weights; not run",
        "builder": f"tensorrt_rtx {tensorrt_rtx.__version__}",
        "machine": platform.processor() or platform.machine(),
        "command": "python benchmarks/tensorrt_builds.py",
    }
    names = [name for case in cases() for name in case.rows()]
    found = fresh + (json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else [])
    rows = [row for name in names for row in [next((row for row in found if name.items() <= row.items()), None)] if row]
    lacking = [
        asdict(case) for case in cases() if not all(any(name.items() <= row.items() for row in rows) for name in case.rows())
    ]
    RESULTS.write_text(json.dumps({"about": about, "not_built": lacking, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
