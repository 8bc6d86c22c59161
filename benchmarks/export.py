# SPDX-License-Identifier: Apache-2.0
"""Time and peak private memory of `pgx export` on a checkpoint of true shapes, against copying the same bytes with sha256.

python tools/make_checkpoint.py --size 3b --res 448 ck
python benchmarks/export.py ck --precision fp16 --repeat 3 --json benchmarks/results/export-3b-448-fp16.json
python benchmarks/export.py ck --precision int4 --no-copy --json benchmarks/results/export-3b-448-int4.json     # statistics, check, answer
python benchmarks/export.py ck --precision int4 --no-copy --no-answer --json benchmarks/results/export-3b-448-int4-no-answer.json
python benchmarks/export.py ck28 --precision fp16 --limit-data 1024 --no-copy     # MiB of private memory; sparse checkpoints

Export and copy run in turn. Private memory is RssAnon of /proc, sampled 50 times a second; --limit-data sets RLIMIT_DATA, which
counts every private writable mapping, touched or not.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from pgxport.machine.cpu import processor_name, vectors  # noqa: E402
from pgxport.machine.memory import process_memory  # noqa: E402


def export(
    checkpoint: Path, precision: str, target: str, out: Path, *, limit: int | None, parity: int | None, answer: bool
) -> dict:
    """Run the command once, and watch its memory."""
    command = [sys.executable, "-m", "pgxport", "export", "--checkpoint", str(checkpoint), "--precision", precision]
    command += ["--target", target, "-o", str(out), "--json"]
    command += [] if parity is None else ["--parity", str(parity)]
    command += [] if answer else ["--no-answer"]

    def confine() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit << 20, limit << 20))

    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=confine)
    private = resident = 0
    while process.poll() is None:
        if now := process_memory(process.pid, peak=True):
            private, resident = max(private, now.private), max(resident, now.resident)
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    stdout, stderr = process.communicate()
    if process.returncode:
        raise SystemExit(f"export ended with {process.returncode}: {stderr}")
    found = json.loads(stdout)
    measured = {"seconds": seconds, "private": private, "resident": resident, "bytes": found["bytes"]}
    return measured | {
        "parity": found["parity"] and {k: v for k, v in found["parity"].items() if k != "sqnr"},
        "said": stderr.splitlines(),
    }


def copy(files: list[Path], out: Path) -> float:
    """Seconds to copy the files with a sha256 of each, fsync included: what an export cannot avoid."""
    start = time.perf_counter()
    out.mkdir()
    for file in files:
        digest = hashlib.sha256()
        with open(file, "rb", buffering=0) as source, open(out / file.name, "wb", buffering=0) as target:
            while chunk := source.read(4 << 20):
                digest.update(chunk)
                target.write(chunk)
            os.fsync(target.fileno())
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--precision", default="fp16")
    parser.add_argument(
        "--parity", type=int, help="scenes to compare a rounded bundle on at its end; 0: none [the command's default]"
    )
    parser.add_argument("--no-answer", action="store_true", help="leave the engine's answer at the end out")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--limit-data", type=int, help="MiB")
    parser.add_argument("--no-copy", action="store_true")
    parser.add_argument("--keep", type=Path, help="keep the last bundle here")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    files = sorted(args.checkpoint.glob("*.safetensors"))
    runs, copies = [], []
    scratch = Path(tempfile.mkdtemp(dir=args.scratch))
    try:
        for i in range(args.repeat):
            if not args.no_copy:
                copies.append(copy(files, scratch / "copy"))
                shutil.rmtree(scratch / "copy")
            out = args.keep if args.keep and i + 1 == args.repeat else scratch / "bundle"
            options = {"limit": args.limit_data, "parity": args.parity, "answer": not args.no_answer}
            runs.append(export(args.checkpoint, args.precision, args.target, out, **options))
            shutil.rmtree(scratch / "bundle", ignore_errors=True)
            print(
                {k: round(v, 2) if isinstance(v, float) else v for k, v in runs[-1].items()},
                f"copy {copies[-1]:.1f} s" if copies else "",
                flush=True,
            )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    seconds = [r["seconds"] for r in runs]
    record = {
        "what": f"pgx export of {args.checkpoint.name} to {args.precision} for {args.target}"
        + (", compared as by default" if args.parity is None else f", compared on {args.parity} scenes")
        + (", not answered" if args.no_answer else ""),
        "command": "python benchmarks/export.py " + " ".join(a for a in sys.argv[1:] if not a.startswith("/")),
        "machine": {"cores": os.cpu_count(), "processor": processor_name(), "vectors": vectors(), "system": platform.platform()},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("pgxport", "numpy", "onnx-ir")}},
        "checkpoint_bytes": sum(f.stat().st_size for f in files),
        "bundle_bytes": runs[-1]["bytes"],
        "parity": runs[-1]["parity"],
        "said": runs[-1]["said"],  # what the pass and the check were announced to take
        "seconds": {"median": round(statistics.median(seconds), 2), "all": [round(s, 2) for s in seconds]},
        "peak_private_bytes": max(r["private"] for r in runs),
        "peak_resident_bytes": max(r["resident"] for r in runs),
        "limit_data_mib": args.limit_data,
    }
    if copies:
        ratios = [s / c for s, c in zip(seconds, copies, strict=True)]
        record["copy_with_sha256_seconds"] = {"median": round(statistics.median(copies), 2), "all": [round(c, 2) for c in copies]}
        record["ratio_to_copy"] = {"median": round(statistics.median(ratios), 2), "all": [round(r, 2) for r in ratios]}
    print(json.dumps(record, indent=1))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
