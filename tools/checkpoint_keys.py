# SPDX-License-Identifier: Apache-2.0
"""Write what pgx does with every key of the files beside a checkpoint's weights into docs/reference/checkpoints.md.

python tools/checkpoint_keys.py            # writes it
python tools/checkpoint_keys.py --check    # ends with 1 if the document says something else
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from pgxport.models.config import Gemma2Config, GemmaConfig, PaliGemmaConfig, RopeConfig, VisionConfig  # noqa: E402
from pgxport.models.generation_config import GenerationConfig  # noqa: E402
from pgxport.models.processor_config import PictureSize, PreprocessorConfig, ProcessorConfig  # noqa: E402
from pgxport.models.schema import FileSchema  # noqa: E402

FILE = ROOT / "docs" / "reference" / "checkpoints.md"
BEGIN, END = "<!-- keys: written by tools/checkpoint_keys.py -->", "<!-- keys end -->"
SCHEMAS: dict[str, type[FileSchema]] = {
    "config.json": PaliGemmaConfig,
    "config.json, text_config of Gemma 1": GemmaConfig,
    "config.json, text_config of Gemma 2": Gemma2Config,
    "config.json, rope_parameters or rope_scaling of text_config": RopeConfig,
    "config.json, vision_config": VisionConfig,
    "generation_config.json": GenerationConfig,
    "preprocessor_config.json, and image_processor of processor_config.json": PreprocessorConfig,
    "size of these": PictureSize,
    "processor_config.json": ProcessorConfig,
}


def table(schema: type[FileSchema]) -> list[str]:
    """The keys of one file, by what is done with them."""
    rows = [f"| honoured | {names(schema.model_fields)} | |"]
    for key, (allowed, why) in schema.only.items():
        can = " or ".join(f"`{value!r}`" for value in allowed)
        rows.append(f"| refused{f' but for {can}' if can else ''} | `{key}` | {why.removeprefix('which ')} |")
    if schema.kept:
        rows.append(f"| kept in the manifest, not heeded by greedy answers | {names(schema.kept)} | |")
    reasons: dict[str, list[str]] = {}
    for key, why in schema.no_effect.items():
        reasons.setdefault(why, []).append(key)
    rows += [f"| no effect | {names(keys)} | {why} |" for why, keys in reasons.items()]
    return ["| what | keys | why |", "|---|---|---|", *rows]


def names(keys: object) -> str:
    return ", ".join(f"`{key}`" for key in keys)  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    text = FILE.read_text()
    before, rest = text.split(BEGIN)
    tables = [line for title, schema in SCHEMAS.items() for line in (f"### {title}", "", *table(schema), "")]
    written = "\n".join([before.rstrip("\n"), "", BEGIN, "", *tables, END]) + rest.split(END)[1]
    if asked.check:
        sys.exit(None if written == text else f"{FILE.name} is not what the schemas say; run python tools/checkpoint_keys.py")
    FILE.write_text(written)


if __name__ == "__main__":
    main()
