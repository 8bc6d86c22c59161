# SPDX-License-Identifier: Apache-2.0
"""Digests of the embedded model's bundles in every named recipe and target: a change that moves code must not move a byte.

python tools/bundle_digests.py --write      # before the change
python tools/bundle_digests.py              # after it: names what differs, and ends with 1

Provenance is left out, and what else depends on the machine's floating point: the comparison and the measured ranges. Recipes that
need statistics, of drawn scenes ("plain") or of a file ("calibrated"), depend on it as well, so that only a machine like the one that
wrote their digests can compare them; tests/test_digests.py holds the others.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import pgxport  # noqa: E402
from pgxport.errors import UsageError  # noqa: E402
from pgxport.exporter.recipes import RECIPE_NAMES, RECIPES  # noqa: E402

FILE = ROOT / "tests" / "goldens" / "bundle-digests.json"
TARGETS = {"cpu": None, "cuda": None, "tensorrt-10.3": "10.3", "tensorrt-10.16": "10.16", "tensorrt-11": "11"}
LEFT_OUT = ("provenance", "parity", "ranges", "files")
CARD = "README.md"


def digest(bundle: Path) -> str:
    """The sha256 of a bundle's files and of what its manifest says, without what `LEFT_OUT` names and the model card."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    files = {name: info["sha256"] for name, info in manifest["files"].items() if name != CARD}
    kept = {key: value for key, value in manifest.items() if key not in LEFT_OUT}
    return hashlib.sha256(json.dumps([files, kept], sort_keys=True).encode()).hexdigest()


def export_digest(target: str, recipe: str, folder: Path, calibration: Path | None = None) -> str:
    """The digest of one bundle of tiny at 112 px; "refused" where the target has no kernels for the recipe."""
    options = pgxport.ExportOptions(
        folder / "bundle", size="tiny", res=112, precision=recipe, target=target.partition("-")[0], trt=TARGETS[target],
        calibration=calibration, parity=0, answer=False, overwrite=True,
    )  # fmt: skip
    try:
        return digest(pgxport.export(options).path)
    except UsageError:
        return "refused"


def calibrated(target: str, recipe: str, folder: Path) -> str:
    """The digest of a bundle by a file that was made for its recipe."""
    from pgxport.calib.calibrate import CalibrateOptions, calibrate

    options = CalibrateOptions(
        size="tiny", res=112, samples=4, output=folder / "calibration.safetensors", recipe=recipe, target=target.partition("-")[0], overwrite=True
    )  # fmt: skip
    return export_digest(target, recipe, folder, calibrate(options).path)


def all_digests(folder: Path) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {"plain": {}, "calibrated": {}}
    for target in TARGETS:
        for recipe in RECIPE_NAMES:
            name = f"{target} {recipe}"
            found["plain"][name] = export_digest(target, recipe, folder)
            if found["plain"][name] != "refused" and RECIPES[target.partition("-")[0]][recipe].calibrated:
                found["calibrated"][name] = calibrated(target, recipe, folder)
            print(name, found["plain"][name][:12], found["calibrated"].get(name, "")[:12], file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="Keep the digests in tests/goldens/bundle-digests.json.")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = all_digests(Path(folder))
    if asked.write:
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        return
    kept = json.loads(FILE.read_text())
    differs = [f"{kind}: {name}" for kind in found for name in found[kind] if found[kind][name] != kept[kind].get(name)]
    if differs:
        sys.exit("these bundles are not as they were: " + "; ".join(differs))
    print(f"{sum(map(len, found.values()))} bundles are as they were")


if __name__ == "__main__":
    main()
