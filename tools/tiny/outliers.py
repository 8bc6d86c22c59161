# SPDX-License-Identifier: Apache-2.0
"""Write the embedded checkpoint with outlier channels: it computes the same, and is as hard to quantize as trained giants are.

python tools/tiny/outliers.py --res 224 -o build/tiny-224-outliers
pgx export --checkpoint build/tiny-224-outliers --precision w8a8 -o bundle

At every place where the scale of a channel is free, a few channels become `--factor` times as large, and the columns that read
them as much smaller: the inputs of q, k and v and of the MLP, by the norms before them, that of `down_proj`, by the rows of
`up_proj`, and that of `o_proj`, by the rows of `v_proj`. Large language models have such channels by themselves (Dettmers et
al., 2022, arXiv 2208.07339; Xiao et al., 2023, arXiv 2211.10438); a model as small as this one does not grow them.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from pgxport.exporter.inputs.equivalent import Equivalent
from pgxport.exporter.inputs.scaling import ScalingSite, sites
from pgxport.models.checkpoint import Checkpoint, TensorSource, to_float32
from pgxport.models.spec import TINY_RESOLUTIONS, ModelSpec

EMBEDDED = Path(__file__).parents[2] / "pgxport" / "models" / "tiny"
CHANNELS, FACTOR = 3, 40.0


def with_outliers(
    source: TensorSource, spec: ModelSpec, *, channels: int = CHANNELS, factor: float = FACTOR, seed: int = 0
) -> Equivalent:
    """The checkpoint with `channels` channels of every input that something before can be multiplied for `factor` times as large.

    They are chosen at random. What stands behind a GELU stays as it is, for that is not linear.
    """
    rng = np.random.default_rng(seed)
    rows: dict[str, np.ndarray] = {}
    columns: dict[str, np.ndarray] = {}
    less_one: set[str] = set()
    for site in (site for site in sites(spec) if site.before):
        larger = np.ones(source.shape(site.before[0])[0])
        larger[rng.choice(len(larger), channels, replace=False)] = factor
        rows |= dict.fromkeys(site.before, larger)
        columns |= dict.fromkeys(site.linears, 1 / read_by(site, larger))
        less_one |= set(site.before) if site.less_one else set()
    return Equivalent(source, rows, columns, less_one)


def read_by(site: ScalingSite, rows: np.ndarray) -> np.ndarray:
    """[rows before] -> [K], a number of each channel for each column that reads it: every query head of a group its value head's."""
    return np.repeat(rows.reshape(-1, 1, site.head), site.share, 1).reshape(-1)


def write_outliers(
    folder: Path, res: int, *, channels: int = CHANNELS, factor: float = FACTOR, seed: int = 0, embedded: Path = EMBEDDED
) -> Path:
    """Write a folder in hub layout, in float32, for bfloat16 would round the new weights; return it.

    Raises:
        FileExistsError: the folder is there already.
    """
    original = embedded / f"tiny-{res}"
    checkpoint = Checkpoint.open(original)
    changed = with_outliers(checkpoint, checkpoint.spec(), channels=channels, factor=factor, seed=seed)
    weights = {name: to_float32(changed.rows(name, 0, changed.shape(name)[0])) for name in checkpoint.names()}
    shutil.copytree(original, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.dumps(checkpoint.config | {"dtype": "float32"}, indent=2)
    (folder / "config.json").write_text(config + "\n", encoding="utf-8")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--res", required=True, type=int, choices=TINY_RESOLUTIONS)
    parser.add_argument("-o", "--output", required=True, type=Path, help="what to write; it must not exist")
    parser.add_argument("--channels", type=int, default=CHANNELS, help="of each place")
    parser.add_argument("--factor", type=float, default=FACTOR, help="how much larger these become")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.output.exists():
        parser.error(f"{args.output} exists")
    if args.channels < 1 or not args.factor > 1:
        parser.error(f"--channels {args.channels} --factor {args.factor:g}: one channel at least, and larger than it is")
    write_outliers(args.output, args.res, channels=args.channels, factor=args.factor, seed=args.seed)
    print(f"wrote {args.output}: tiny-{args.res}, {args.channels} channels of each place x {args.factor:g}")
    print(f"try: pgx export --checkpoint {args.output} --precision w8a8 -o bundle")


if __name__ == "__main__":
    main()
