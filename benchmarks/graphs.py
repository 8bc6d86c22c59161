# SPDX-License-Identifier: Apache-2.0
"""Seconds to write all graphs of every published model, in every precision that a target computes; no weight is read.

python benchmarks/graphs.py --json benchmarks/results/graphs.json
"""

import argparse
import json
import os
import statistics
import time
from importlib.metadata import version
from pathlib import Path

from pgxport.exporter.graphs import SpecSource, write_graphs
from pgxport.exporter.plan import _computes
from pgxport.exporter.recipes import RECIPES
from pgxport.exporter.targets import TARGETS
from pgxport.models.spec import RESOLUTIONS, TEXT, published


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = {}
    for family, size in TEXT:
        for res in RESOLUTIONS:
            spec = published(family, size, res)
            seconds = []
            for _ in range(args.repeat):
                for recipe in RECIPES["cuda"].values():
                    for target in TARGETS.values():
                        if _computes(recipe, target):
                            start = time.perf_counter()
                            write_graphs(SpecSource(spec), spec, None, recipe, target, spec.image_tokens + 512)
                            seconds.append(time.perf_counter() - start)
            rows[f"{family}-{size}-{res}"] = {"median": round(statistics.median(seconds), 3), "worst": round(max(seconds), 3)}
            print(f"{family}-{size}-{res}", rows[f"{family}-{size}-{res}"], flush=True)
    versions = {p: version(p) for p in ("pgxport", "onnx-ir")}
    record = {"what": "seconds to write all graphs of a model", "cores": os.cpu_count(), "versions": versions, "seconds": rows}
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
