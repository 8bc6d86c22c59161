# SPDX-License-Identifier: Apache-2.0
"""Digests of the embedded model's bundles in every named recipe and target: a change that moves code must not move a byte.

python tools/bundle_digests.py --write      # before the change
python tools/bundle_digests.py              # after it: names what differs, and ends with 1

Provenance is left out, and what else depends on the machine's floating point: the comparison and the measured ranges. Recipes that
need calibration depend on it as well, so that only the machine that wrote their digests can compare them; tests/test_digests.py
holds the others.
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

FILE = ROOT / "tests" / "goldens" / "bundle-digests.json"
TARGETS = {"cpu": None, "cuda": None, "tensorrt-10.3": "10.3", "tensorrt-10.16": "10.16", "tensorrt-11": "11"}
RECIPES = (
    "fp32", "fp16", "bf16", "int8", "int4", "w8a8", "w8a8-static", "int4-gptq", "int4-fast", "int4-fast-kv8", "mixed", "int4-small",
    "int4-small-gptq", "fp8",
)  # fmt: skip
LEFT_OUT = ("provenance", "parity", "ranges", "files")
CARD = "README.md"


def digest(bundle: Path) -> str:
    """The sha256 of a bundle's files and of what its manifest says, without what `LEFT_OUT` names and the model card."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    files = {name: info["sha256"] for name, info in manifest["files"].items() if name != CARD}
    kept = {key: value for key, value in manifest.items() if key not in LEFT_OUT}
    return hashlib.sha256(json.dumps([files, kept], sort_keys=True).encode()).hexdigest()


def export_digest(target: str, recipe: str, folder: Path, calibration: Path | None = None) -> str:
    """The digest of one bundle of tiny at 112 px; "calibrated" where the recipe needs a file, "refused" where the target has none."""
    options = pgxport.ExportOptions(
        folder / "bundle", size="tiny", res=112, precision=recipe, target=target.partition("-")[0], trt=TARGETS[target],
        calibration=calibration, parity=0, answer=False, overwrite=True,
    )  # fmt: skip
    try:
        return digest(pgxport.export(options).path)
    except UsageError as error:
        return "calibrated" if "--calibration" in str(error) else "refused"


def all_digests(folder: Path) -> dict[str, dict[str, str]]:
    from pgxport.calib.calibrate import CalibrateOptions, calibrate

    calibration = calibrate(CalibrateOptions(size="tiny", res=112, samples=4, output=folder / "calibration.safetensors")).path
    found: dict[str, dict[str, str]] = {"plain": {}, "calibrated": {}}
    for target in TARGETS:
        for recipe in RECIPES:
            name = f"{target} {recipe}"
            plain = export_digest(target, recipe, folder)
            if plain != "calibrated":
                found["plain"][name] = plain
            found["calibrated"][name] = export_digest(target, recipe, folder, calibration)
            print(name, plain[:12], found["calibrated"][name][:12], file=sys.stderr)
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
