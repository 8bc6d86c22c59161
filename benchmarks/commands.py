# SPDX-License-Identifier: Apache-2.0
"""The processor's seconds that `pgx --help` and the largest `pgx plan` take, beside another checkout in turn.

git worktree add ../before 6e0c246
python benchmarks/commands.py --before ../before --json benchmarks/results/commands.json

User and system time of a whole process, which a busy machine stretches less than the clock. Nothing is computed in parallel.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from pgxport.machine.conditions import describe_machine  # noqa: E402

COMMANDS = {
    "help": ["--help"],
    "plan 28b at 896 px, int4-fast": ["plan", "--size", "28b", "--res", "896", "--precision", "int4-fast"],
}


def seconds(tree: Path, words: list[str]) -> float:
    """The user and system seconds of one run of `pgx` from a checkout.

    Raises:
        SystemExit: it failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    command = [sys.executable, "-m", "pgxport", *words]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, cwd=tree) as process:
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} in {tree} ended with {process.returncode}")
    return used.ru_utime + used.ru_stime


def spread(values: list[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "all": values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="Another checkout, measured in turn with this one.")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    trees = {"now": ROOT} | ({"before": args.before.resolve()} if args.before else {})
    record: dict[str, Any] = {"what": "user and system seconds of a process", "machine": describe_machine(), "commands": {}}
    for name, words in COMMANDS.items():
        measured: dict[str, list[float]] = {tree: [] for tree in trees}
        for turn in range(args.repeat + 1):
            for tree in list(trees) if turn % 2 else list(trees)[::-1]:
                used = seconds(trees[tree], words)
                measured[tree] += [used] if turn else []  # the first one fills the page cache and writes bytecode
        record["commands"][name] = {tree: spread(values) for tree, values in measured.items()}
        print(
            name,
            {
                tree: f"{statistics.median(values):.2f} s ({min(values):.2f}–{max(values):.2f})"
                for tree, values in measured.items()
            },
        )
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
