# SPDX-License-Identifier: Apache-2.0
"""Write docs/report-tiny/: the report of the embedded model in every named recipe that runs on a CPU, beside transformers.

make report-example                                  # export, measure, write; stopped, it goes on where it was
python tools/report_example.py --limit 20 -o /tmp/example

Where Chromium is installed, the page's screenshots are made as well, with the network off; else those that are there stay.
"""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

from pgxport.benchmarking.measure import batch_sizes
from pgxport.data.loader import DataOptions
from pgxport.errors import UsageError
from pgxport.exporter.export import export
from pgxport.exporter.prepare import ExportOptions
from pgxport.exporter.recipes import RECIPE_NAMES
from pgxport.exporter.targets import TARGETS
from pgxport.hub.locate import TINY
from pgxport.reporting.report import ReportOptions, report

ROOT = Path(__file__).parent.parent
MAX_BYTES = 1_000_000  # of all that is committed
WRITTEN = ("report.html", "report.md", "report.json", "results.csv", "chart.svg", "chart.png")
# Without a window, a network, and whatever a browser does on its own.
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def recipes() -> list[str]:
    """Those the CPU has kernels for."""
    found = []
    for name in RECIPE_NAMES:
        try:
            TARGETS["cpu"].check(TARGETS["cpu"].recipe(name))
        except UsageError:
            continue
        found.append(name)
    return found


def bundles(work: Path, res: int) -> list[str]:
    """Export what is not exported yet. Names are relative, for they stand in the report."""
    paths = []
    for name in recipes():
        output = work / f"tiny-{res}-{name}"
        if not output.exists():
            export(ExportOptions(output=output, size="tiny", res=res, precision=name))
        paths.append(str(output))
    return paths


def screenshots(page: Path, output: Path) -> None:
    """What the page looks like, wide and on a phone, light and dark."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        left = "those that are there show an earlier report" if any(output.glob("screenshot-*.png")) else "there are none"
        print(f"no screenshots were made: none of {', '.join(BROWSERS)} is installed; {left}", file=sys.stderr)
        return
    dark = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"]
    for width, height in ((1280, 1500), (390, 1100)):
        for mode, flags in {"light": [], "dark": dark}.items():
            file = output / f"screenshot-{width}-{mode}.png"
            file.unlink(missing_ok=True)
            command = [browser, *QUIET, "--hide-scrollbars", *flags, f"--window-size={width},{height}", f"--screenshot={file}"]
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
                command += [f"--user-data-dir={profile}", page.absolute().as_uri()]
                done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            if done.returncode or not file.exists():
                sys.exit(f"{browser} made no screenshot (it ended with {done.returncode}): {done.stderr[-500:]}")
            Image.open(file).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--res", type=int, default=224)
    parser.add_argument("--limit", type=int, default=60, help="questions of each task")
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--batch", default="1,2,4", help="answers at a time")
    parser.add_argument("--work", type=Path, default=Path("build/report-tiny"))
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "docs" / "report-tiny")
    args = parser.parse_args()
    args.output = args.output.absolute()
    os.chdir(ROOT)  # paths stand in the report, and are relative
    args.work.mkdir(parents=True, exist_ok=True)
    has_reference = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
    made = args.work / "report"
    options = ReportOptions(
        tuple(bundles(args.work, args.res)), made, DataOptions(limit=args.limit), pictures=args.pictures, threads=1, batch=batch_sizes(args.batch),
        reference=(TINY / f"tiny-{args.res}").relative_to(ROOT) if has_reference else None,
    )  # fmt: skip
    report(options, progress=lambda what: print(f"\r\x1b[K{what}", end="", file=sys.stderr))
    args.output.mkdir(parents=True, exist_ok=True)
    for name in WRITTEN:
        shutil.copy(made / name, args.output / name)
    screenshots(args.output / "report.html", args.output)
    nbytes = {file.name: file.stat().st_size for file in args.output.iterdir()}
    print("\n" + "\n".join(f"{name}: {size} bytes" for name, size in sorted(nbytes.items())))
    if sum(nbytes.values()) > MAX_BYTES:
        sys.exit(f"{args.output} has {sum(nbytes.values())} bytes, and {MAX_BYTES} are to be committed; take fewer --pictures")


if __name__ == "__main__":
    main()
