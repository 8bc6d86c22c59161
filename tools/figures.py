# SPDX-License-Identifier: Apache-2.0
"""Write the measured figures of benchmarks/results/*.json into README.md and docs/, between their markers.

python tools/figures.py            # rewrite
python tools/figures.py --check    # exit 1 if a page does not say what the results say
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/tiny.md")


def tiny() -> str:
    """Accuracy of the embedded checkpoints."""
    columns = {res: json.loads((RESULTS / f"tiny-{res}.json").read_text()) for res in (112, 224)}
    lines = ["| held-out questions, transformers in float32 | tiny-112 | tiny-224 |", "|---|---|---|"]
    for metric in columns[112]["metrics"]:
        if metric != "faults":
            lines.append(f"| {metric} | " + " | ".join(_interval(c["metrics"][metric]) for c in columns.values()) + " |")
    faults = [c["metrics"]["faults"] for c in columns.values()]
    lines.append("| empty, malformed answers | " + " | ".join(f"{f['empty']}, {f['malformed']}" for f in faults) + " |")
    count = columns[112]["metrics"]["caption exact"]["questions"]
    return "\n".join([*lines, "", f"{count} questions of each task; in brackets the 95 % bootstrap interval."])


def _interval(row: dict[str, float]) -> str:
    return f"{row['mean'] * 100:.1f} % ({row['low'] * 100:.1f}–{row['high'] * 100:.1f})"


TABLES = {"tiny": tiny}


def rewritten(text: str) -> str:
    """The page with every `<!-- figures: NAME -->` … `<!-- end -->` filled in."""
    return re.sub(
        r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text, flags=re.DOTALL
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check, stale = parser.parse_args().check, []
    for name in PAGES:
        page = ROOT / name
        text = page.read_text()
        if (new := rewritten(text)) != text:
            stale.append(name)
            if not check:
                page.write_text(new)
    if stale:
        print(f"{'out of date' if check else 'rewritten'}: {', '.join(stale)}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
