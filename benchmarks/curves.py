# SPDX-License-Identifier: Apache-2.0
"""What prefill and decode step cost, in time and memory, against length, resolution and depth; on models of few layers.

python benchmarks/curves.py --size 3b --precision int4 --json benchmarks/results/curves-3b-int4.json

True widths, random weights. The decoder runs alone on random numbers; at each resolution a whole answer is taken as well. Time at
every length comes from one process that goes through all of them in each repetition; memory from a process for each length. The
cost of a layer is the difference between the depths, divided by theirs.
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from make_checkpoint import shallow, write_checkpoint  # noqa: E402

from pgxport.benchmarking.bench import bench, measurement_json  # noqa: E402
from pgxport.benchmarking.measure import Steps, WholeAnswers, Work, lengths  # noqa: E402
from pgxport.benchmarking.worker import Measurement  # noqa: E402
from pgxport.exporter.export import export  # noqa: E402
from pgxport.exporter.prepare import ExportOptions  # noqa: E402
from pgxport.machine.conditions import describe_machine  # noqa: E402
from pgxport.models.spec import RESOLUTIONS, TEXT, published  # noqa: E402

STEPS = 16


def measured(bundle: Path, work: Work, repetitions: int, threads: int | None) -> Measurement:
    (found,) = bench([bundle], work, repetitions=repetitions, threads=threads).measurements
    if found.reason:
        raise SystemExit(f"{bundle}: {found.reason}")
    return found


def made(args: argparse.Namespace, scratch: Path, res: int, depth: int, context: int) -> Path:
    """A bundle of so many layers in both towers."""
    checkpoint, out = scratch / f"ck-{res}-{depth}", scratch / f"b-{res}-{depth}"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, shallow(published(args.family, args.size, res), depth))
    if not out.exists():
        export(ExportOptions(output=out, checkpoint=checkpoint, precision=args.precision, context=context))
    return out


def against_length(args: argparse.Namespace, bundle: Path) -> dict[str, Any]:
    """The decoder alone; its prefill and its step at each length, which the new token brings to `length`."""
    context: Sequence[int] = args.lengths
    pasts = tuple(n - 1 for n in context)
    times = measured(bundle, Steps(pasts, tuple(context), STEPS), args.repeat, args.threads)
    rows = []
    for n in context:
        memory = measured(bundle, Steps((n - 1,), (n,), STEPS), 1, args.threads)
        row = {
            stage: statistics.median(times.seconds[f"{stage}@{n - (stage != 'prefill')}"])
            for stage in ("prefill", "step", "overhead")
        }
        rows.append(
            {"length": n, **row, "memory": measurement_json(memory)["memory"], "cache_bytes": memory.facts["cache_bytes"]}
        )
        print(f"{bundle.name} {n}: prefill {row['prefill']:.3f} s, step {row['step'] * 1e3:.2f} ms", flush=True)
    return {"layers": times.facts["layers"], "lengths": rows, "all": times.seconds}


def per_layer(few: dict[str, Any], many: dict[str, Any]) -> list[dict[str, float]]:
    """Seconds of one decoder layer at each length, and what is left without any: the output matrix."""
    layers, rows = many["layers"] - few["layers"], []
    for a, b in zip(few["lengths"], many["lengths"], strict=True):
        row: dict[str, float] = {"length": a["length"]}
        for stage in ("prefill", "step"):
            row[f"{stage}_layer"] = (b[stage] - a[stage]) / layers
            row[f"{stage}_rest"] = a[stage] - few["layers"] * row[f"{stage}_layer"]
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted({size for _, size in TEXT}), default="3b")
    parser.add_argument("--family", choices=sorted({family for family, _ in TEXT}), default="paligemma2")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--depths", type=lengths, default=(2, 4), help="two numbers of layers, the smaller first")
    parser.add_argument("--lengths", type=lengths, default=(256, 512, 1024, 2048, 4096, 8192))
    parser.add_argument("--resolutions", type=lengths, default=RESOLUTIONS)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, help="keep checkpoints and bundles here")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if len(args.depths) != 2 or args.depths[0] >= args.depths[1]:
        parser.error(f"--depths {args.depths}: two numbers, the smaller first")
    record: dict[str, Any] = {
        "what": f"{args.family} {args.size} in {args.precision}, decoders of {args.depths[0]} and {args.depths[1]} layers, random weights",
        "command": "python benchmarks/curves.py " + " ".join(sys.argv[1:]),
        "machine": describe_machine(), "threads": args.threads, "repetitions": args.repeat,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        scratch = args.scratch or Path(folder)
        scratch.mkdir(exist_ok=True)
        few, depth = args.resolutions[0], args.depths[0]
        record["decoder"] = [against_length(args, made(args, scratch, few, d, max(args.lengths))) for d in args.depths]
        record["per_layer"] = per_layer(*record["decoder"])
        record["resolutions"] = []
        for res in args.resolutions:
            context = max(*args.lengths, published(args.family, args.size, res).image_tokens + 512)
            found = measured(made(args, scratch, res, depth, context), WholeAnswers(new_tokens=STEPS), args.repeat, args.threads)
            record["resolutions"].append(measurement_json(found))
            print(f"{res} px: { ({s: round(statistics.median(v), 4) for s, v in found.seconds.items()}) }", flush=True)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    main()
