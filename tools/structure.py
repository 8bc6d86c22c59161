# SPDX-License-Identifier: Apache-2.0
"""The package's rooms and files on docs/structure.md, and the core in reading order in README.md, from the files' own first lines.

python tools/structure.py            # write both
python tools/structure.py --check    # end with 1 where one of them is not true
"""

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "pgxport"
PAGE, README = ROOT / "docs" / "structure.md", ROOT / "README.md"
BEGIN, END = "<!-- core -->\n", "<!-- end -->"
# The rooms, the lowest first (tests/test_imports.py), and what each is for.
ROOMS = {
    "": "What every room may use, and the commands that walk through all of them.",
    "machine": "The machine that this runs on: processor, memory, board, GPU, clocks, energy.",
    "bundle": "The contract between export and run.",
    "models": "What PaliGemma is and computes, in numpy alone; and the one door to weights.",
    "hub": "Checkpoints and bundles on the model hub.",
    "runners": "Run a bundle: numpy, Pillow, tokenizers and one engine.",
    "compile": "Prepare a bundle for this machine.",
    "metrics": "A sample, and how right an answer to it is.",
    "data": "Samples from files, for every command that takes some.",
    "activations": "What flows through the model on samples, and the file that keeps it.",
    "exporter": "Write a bundle for a target.",
    "calib": "The pipeline of `pgx calibrate`.",
    "cluster": "A queue of tasks over a Ray cluster.",
    "benchmarking": "Time and memory, bundles side by side.",
    "reporting": "Accuracy against latency, as a page to decide by.",
    "tuning": "Search a mixed recipe.",
    "cli": "The command, a file a group of commands.",
}
# What a newcomer reads, in this order.
CORE = (
    "models/spec.py", "models/layers.py", "models/weights.py", "models/gemma.py", "models/siglip.py", "models/projector.py",
    "models/mask_decoder.py", "models/checkpoint.py", "bundle/manifest.py", "bundle/reader.py", "bundle/writer.py", "exporter/recipe.py",
    "exporter/targets.py", "exporter/stream.py", "exporter/graph.py", "exporter/lower_onnxruntime.py", "exporter/quantized_matrix.py",
    "exporter/graphs.py", "exporter/prepare.py", "exporter/export.py", "runners/session.py", "runners/ort.py", "runners/loop.py", "runners/pipeline.py",
    "runners/runner.py",
)  # fmt: skip


def summary(file: Path) -> str:
    """The first sentence of a file's docstring, without the period.

    Raises:
        SystemExit: it has none.
    """
    text = ast.get_docstring(ast.parse(file.read_text()))
    if not text:
        sys.exit(f"{file.relative_to(ROOT)} does not open with a sentence that says what it is for")
    first = " ".join(text.partition("\n\n")[0].split())
    return first.partition(". ")[0].removesuffix(".")


def lines_of(file: Path) -> int:
    return len(file.read_text().splitlines())


def page() -> str:
    """docs/structure.md: a section a room, a row a file."""
    text = "# Structure\n\nWritten by `python tools/structure.py` from the first sentence of each file. Imports go up this page, never down it.\n"
    for room, purpose in ROOMS.items():
        files = [f for f in sorted((PACKAGE / room).glob("*.py")) if f.name not in ("__init__.py", "__main__.py")]
        files += sorted(f for f in (PACKAGE / room).glob("*/*.py") if room and f.name != "__init__.py")
        total = sum(map(lines_of, files))
        name = f"`pgxport/{room}/`" if room else "`pgxport/`"
        text += f"\n## {name}\n\n{purpose} {len(files)} files, {total:,} lines.\n\n| file | what it is for |\n|---|---|\n"
        for file in files:
            cell = summary(file).replace("|", "\\|")
            text += f"| [{file.relative_to(PACKAGE / room)}](../{file.relative_to(ROOT)}) | {cell} |\n"
    return text


def core() -> str:
    """The core's table for the README."""
    rows = "".join(f"| [{name}](pgxport/{name}) | {lines_of(PACKAGE / name)} | {summary(PACKAGE / name)} |\n" for name in CORE)
    total = sum(lines_of(PACKAGE / name) for name in CORE)
    return f"| file | lines | what it is for |\n|---|---|---|\n{rows}| together | {total:,} | |\n"


def readme() -> str:
    text = README.read_text()
    before, found, rest = text.partition(BEGIN)
    if not found or END not in rest:
        sys.exit(f"README.md has no {BEGIN.strip()} … {END}")
    return before + BEGIN + core() + END + rest.partition(END)[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Write nothing, and end with 1 where a page is not true.")
    if parser.parse_args().check:
        false = [str(file.relative_to(ROOT)) for file, text in ((PAGE, page()), (README, readme())) if file.read_text() != text]
        if false:
            sys.exit(f"{' and '.join(false)} are not what the files say; run `python tools/structure.py`")
        return
    PAGE.write_text(page())
    README.write_text(readme())


if __name__ == "__main__":
    main()
