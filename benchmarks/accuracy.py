# SPDX-License-Identifier: Apache-2.0
"""Accuracy of every recipe on the embedded checkpoints' test split, each beside the float32 bundle on the same questions.

python benchmarks/accuracy.py --questions 500 --json benchmarks/results/recipes-tiny.json     # everything, in one run
python benchmarks/accuracy.py --recipes int4 my.toml --models tiny-224                        # some, to look at

Models: tiny-112 and tiny-224, and both with outlier channels (tools/tiny/outliers.py), of which float32's answers are the same. For
each recipe: the metric of every task with its 95 % bootstrap interval and its paired difference to float32, the share of answers
that are the same, how many are empty or malformed, and how often both find the same next token likeliest when both are given
float32's answer so far; on every fifth question also the KL divergence there. A yardstick beside them: transformers itself in
bfloat16, given the same answers.

Every run exports anew. Answers are kept in --work as they come, under the digests of the bundle that gave them and of its
reference: a run that was stopped goes on where it was, and no answer of an older bundle is taken for one of this code's. --json
holds what one run measured, and nothing else.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

from pgxport.bundle.reader import Bundle  # noqa: E402
from pgxport.calib.calibrate import CalibrateOptions, calibrate  # noqa: E402
from pgxport.data.scenes import scene_samples  # noqa: E402
from pgxport.errors import UsageError  # noqa: E402
from pgxport.exporter.export import export  # noqa: E402
from pgxport.exporter.prepare import ExportOptions  # noqa: E402
from pgxport.exporter.recipe_toml import read_recipe  # noqa: E402
from pgxport.exporter.recipes import RECIPE_NAMES  # noqa: E402
from pgxport.exporter.targets import CPU  # noqa: E402
from pgxport.files import file_sha256  # noqa: E402
from pgxport.machine.conditions import describe_machine  # noqa: E402
from pgxport.metrics.bootstrap import draw  # noqa: E402
from pgxport.metrics.fidelity import faults, kl_divergence, token_agreement  # noqa: E402
from pgxport.metrics.metrics import METRICS, groups, tally  # noqa: E402
from pgxport.metrics.sample import Sample  # noqa: E402
from pgxport.models.spec import TINY_RESOLUTIONS  # noqa: E402
from pgxport.runners.image import load_image, pixel_values  # noqa: E402
from pgxport.runners.outputs import Answer  # noqa: E402
from pgxport.runners.pipeline import Pipeline  # noqa: E402
from tools.tiny.outliers import write_outliers  # noqa: E402

CHECKPOINTS = ROOT / "pgxport" / "models" / "tiny"
MASKS = CHECKPOINTS / "vae-oid.npz"
OWN = sorted((ROOT / "benchmarks" / "recipes").glob("*.toml"))  # what shows what a choice of the named ones is worth
TINY = tuple(f"tiny-{res}" for res in TINY_RESOLUTIONS)
MODELS = (*TINY, *(f"{name}-outliers" for name in TINY))
EXACT = "fp32"
EVERY = 5  # questions between those whose KL is measured, which needs float32's logits too
MORE = {"detect": ("box_iou",)}  # beside the metric that decides


@dataclass(frozen=True)
class Exported:
    """A recipe's bundle of a model, and the file of its answers."""

    path: Path
    answers: Path

    def rows(self) -> list[dict[str, Any]]:
        """The answers so far; a line that was being written when the run was stopped is none."""
        whole = self.answers.read_text().split("\n")[:-1] if self.answers.exists() else []
        return [json.loads(line) for line in whole]


def named() -> list[str]:
    """The named recipes that a CPU can run, but float32, beside which all stand."""

    def runs(name: str) -> bool:
        try:
            CPU.check(CPU.recipe(name))
        except UsageError:
            return False
        return True

    return [name for name in RECIPE_NAMES if name != EXACT and runs(name)]


def checkpoint_of(model: str, work: Path) -> Path:
    """The folder of a checkpoint; one with outliers is written anew, which takes a second."""
    plain = model.removesuffix("-outliers")
    if plain == model:
        return CHECKPOINTS / model
    folder = work / "checkpoints" / model
    shutil.rmtree(folder, ignore_errors=True)
    return write_outliers(folder, int(plain.removeprefix("tiny-")))


def calibration_of(recipe: str, checkpoint: Path, work: Path, samples: int) -> Path:
    """The calibration for a recipe, from an earlier run where neither checkpoint, recipe nor a line of the package has changed."""
    digest = hashlib.sha256(file_sha256(checkpoint / "model.safetensors").encode())
    given = [Path(recipe)] if recipe.endswith(".toml") else []
    for file in (*given, *sorted((ROOT / "pgxport").rglob("*.py"))):
        digest.update(file.read_bytes())
    output = work / f"{checkpoint.name}-{Path(recipe).stem}-{samples}-{digest.hexdigest()[:12]}.safetensors"
    if not output.exists():
        calibrate(CalibrateOptions(output=output, checkpoint=checkpoint, samples=samples, recipe=recipe))
    return output


def exported(recipe: str, checkpoint: Path, work: Path, samples: int | None, reference: Exported | None = None) -> Exported:
    """Export a recipe of a model as `pgx export` does, which takes statistics of a few scenes; or calibrate on `samples` first."""
    of = read_recipe(Path(recipe)) if recipe.endswith(".toml") else CPU.recipe(recipe)
    given: dict[str, Any] = {"recipe": recipe} if recipe.endswith(".toml") else {"precision": recipe}
    if of.calibrated and samples is not None:
        given["calibration"] = calibration_of(recipe, checkpoint, work, samples)
    name = f"{checkpoint.name}-{Path(recipe).stem}"
    options = ExportOptions(
        output=work / "bundles" / name, checkpoint=checkpoint, masks=MASKS, parity=0, answer=False, overwrite=True, **given
    )
    bundle = Bundle.open(export(options).path, verify=False)
    beside = f"-{reference.answers.stem.rpartition('-')[2]}" if reference else ""
    return Exported(bundle.path, work / "answers" / f"{name}{beside}-{bundle.digest()[:12]}.jsonl")


def ask(one: Exported, reference: Exported | None, questions: int) -> list[dict[str, Any]]:
    """The ids a bundle answers with and, along the reference's answer, how many next tokens it finds likeliest as well."""
    rows, before = one.rows(), reference.rows() if reference else None
    samples = scene_samples(questions)
    if len(rows) >= len(samples):
        return rows[: len(samples)]
    one.answers.parent.mkdir(parents=True, exist_ok=True)
    one.answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ExitStack() as stack:
        pipeline, file = stack.enter_context(Pipeline.open(one.path, threads=1)), stack.enter_context(one.answers.open("a"))
        exact = reference and stack.enter_context(Pipeline.open(reference.path, threads=1))
        for i in range(len(rows), len(samples)):
            start = time.perf_counter()
            prefix = prefix_of(pipeline, samples[i])
            ids = list(pipeline.generate(prefix, pipeline.answer_limit(prefix)))
            row: dict[str, Any] = {"id": samples[i].id, "ids": ids}
            if before is not None:
                given = before[i]["ids"]
                # Where the whole answer is the same, so is every next token along it.
                row |= {"agreed": len(given) + 1, "positions": len(given) + 1}
                if ids != given or i % EVERY == 0:
                    logits = teacher_forced(pipeline, prefix, given)
                    row["agreed"] = int((logits.argmax(-1) == [*given, pipeline.manifest.token_ids.eos]).sum())
                if i % EVERY == 0:
                    assert exact is not None
                    theirs = teacher_forced(exact, prefix_of(exact, samples[i]), given)
                    row["kl"] = float(kl_divergence(logits, theirs).sum())
            rows.append(row | {"seconds": round(time.perf_counter() - start, 3)})
            file.write(json.dumps(rows[-1]) + "\n")
            file.flush()
    return rows


def prefix_of(pipeline: Pipeline, sample: Sample) -> np.ndarray:
    """The prefix [1, T, H] of a sample's picture and prompt."""
    return pipeline.prefix(pipeline.encode([sample.open()]), pipeline.prompt_ids(sample.prompt))


def teacher_forced(pipeline: Pipeline, prefix: np.ndarray, answer: list[int]) -> np.ndarray:
    """Logits [answer + 1, V] of each next token of a given answer, and of what follows it."""
    return np.stack([row.copy() for row in pipeline.teacher_forced(prefix, answer)])


def in_bfloat16(model: str, exact: Exported, questions: int) -> dict[str, float]:
    """How often transformers in bfloat16 finds float32's next token likeliest, and the KL divergence, as measured for recipes."""
    import torch
    from transformers import PaliGemmaForConditionalGeneration

    torch.set_num_threads(1)
    reference = PaliGemmaForConditionalGeneration.from_pretrained(
        CHECKPOINTS / model, dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    samples, agreed, positions, losses = scene_samples(questions), 0, 0, []
    with Pipeline.open(exact.path, threads=1) as pipeline, torch.inference_mode():
        for i, (sample, row) in enumerate(zip(samples, exact.rows(), strict=False)):
            m, answer = pipeline.manifest, row["ids"]
            prompt = pipeline.prompt_ids(sample.prompt)
            ids = torch.tensor([[*prompt, *answer]])
            logits = reference(
                input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=(torch.arange(ids.shape[1]) >= len(prompt))[None].long(),
                pixel_values=torch.from_numpy(pixel_values(load_image(sample.open()), m.resolution)[None]).bfloat16(),
                labels=ids,  # without them it attends to all of it both ways
            ).logits[0, len(prompt) - 1 :].float().numpy()  # fmt: skip
            agreed += int((logits.argmax(-1) == [*answer, m.token_ids.eos]).sum())
            positions += len(logits)
            if i % EVERY == 0:
                theirs = teacher_forced(pipeline, prefix_of(pipeline, sample), answer)
                losses.append((float(kl_divergence(logits, theirs).sum()), len(logits)))
    return {"top1_agreement": agreed / positions, "kl": sum(k for k, _ in losses) / sum(n for _, n in losses)}


def table(samples: tuple[Sample, ...], answers: list[Answer], reference: list[Answer]) -> dict[str, Any]:
    """Task metric -> value, interval, and paired difference to the reference."""
    result: dict[str, Any] = {}
    for task in dict.fromkeys(s.task for s in samples):
        chosen = [i for i, s in enumerate(samples) if s.task == task]
        of, mine, theirs = ([x[i] for i in chosen] for x in (samples, answers, reference))
        for name in (of[0].metric, *MORE.get(task, ())):
            drawn, of_float32 = (draw(tally(name, of, run).curve, groups(of)) for run in (mine, theirs))
            value, change = drawn.estimate(), drawn.change(of_float32)
            result[f"{task} {METRICS[name].title}"] = {
                "value": value.value, "low": value.low, "high": value.high, "questions": len(of),
                "difference": change.value, "difference_low": change.low, "difference_high": change.high, "verdict": str(change.verdict),
            }  # fmt: skip
    return result


def compared(
    samples: tuple[Sample, ...], one: Exported, rows: list[dict[str, Any]], reference: Exported, exact: list[dict[str, Any]]
) -> dict[str, Any]:
    """The figures of a bundle beside those of its reference."""
    with Pipeline.open(reference.path, threads=1) as pipeline:
        answers, theirs = (
            [pipeline.parse(row["ids"], s.open().size) for s, row in zip(samples, of, strict=True)] for of in (rows, exact)
        )
    broken = faults(samples, answers)
    of: dict[str, Any] = {
        "bundle": Bundle.open(one.path, verify=False).digest()[:12],
        "bytes": sum(f.stat().st_size for f in one.path.iterdir()),
        "metrics": table(samples, answers, theirs),
        "empty": broken.empty,
        "malformed": broken.malformed,
        "identical_answers": float(np.mean([a["ids"] == b["ids"] for a, b in zip(rows, exact, strict=True)])),
        "token_agreement": float(np.mean([token_agreement(a["ids"], b["ids"]) for a, b in zip(rows, exact, strict=True)])),
    }
    if one != reference:
        some = [row for row in rows if "kl" in row]
        of["top1_agreement"] = sum(row["agreed"] for row in rows) / sum(row["positions"] for row in rows)
        of["kl"] = sum(row["kl"] for row in some) / sum(row["positions"] for row in some)
    return of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=[*named(), *map(str, OWN)], help="names, or TOML files")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--questions", type=int, default=500, help="of each task")
    parser.add_argument(
        "--calibration-samples", type=int, help="of each recipe that needs statistics; as pgx export does without"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/accuracy"))
    parser.add_argument("--no-yardstick", action="store_true", help="leave out transformers in bfloat16")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    record: dict[str, Any] = {
        "what": "recipes on the embedded checkpoint, ONNX Runtime on the CPU, greedy", "questions": args.questions,
        "calibration_samples": args.calibration_samples, "command": command(args), "machine": describe_machine(),
        "transformers_bfloat16": {}, "results": {},
    }  # fmt: skip
    made: dict[str, dict[str, Exported]] = {}
    for model in args.models:
        checkpoint = checkpoint_of(model, args.work)
        exact = exported(EXACT, checkpoint, args.work, args.calibration_samples)
        made[model] = {EXACT: exact}
        for recipe in (r for r in args.recipes if r != EXACT):
            made[model][Path(recipe).stem] = exported(recipe, checkpoint, args.work, args.calibration_samples, exact)
    samples = scene_samples(args.questions)
    with ProcessPoolExecutor(args.workers) as pool:
        asked = {model: pool.submit(ask, of[EXACT], None, args.questions) for model, of in made.items()}
        for model, of in made.items():
            theirs = asked[model].result()
            # A checkpoint with outliers is the same to floats, so that the yardstick is the same too.
            wanted = model in TINY and not args.no_yardstick
            yardstick = pool.submit(in_bfloat16, model, of[EXACT], args.questions) if wanted else None
            jobs = {name: pool.submit(ask, one, of[EXACT], args.questions) for name, one in of.items() if name != EXACT}
            results = record["results"][model] = {EXACT: compared(samples, of[EXACT], theirs, of[EXACT], theirs)}
            for name, job in jobs.items():
                rows = job.result()
                results[name] = compared(samples, of[name], rows, of[EXACT], theirs)
                print(line(model, name, results[name], sum(row["seconds"] for row in rows)), flush=True)
            if yardstick:
                record["transformers_bfloat16"][model] = yardstick.result()
                print(model, "transformers in bfloat16", record["transformers_bfloat16"][model], flush=True)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def command(args: argparse.Namespace) -> str:
    """The command line of a run, without what is as it is when it is not given."""
    text = f"python benchmarks/accuracy.py --questions {args.questions}"
    if args.calibration_samples is not None:
        text += f" --calibration-samples {args.calibration_samples}"
    if args.recipes != [*named(), *map(str, OWN)]:
        text += f" --recipes {' '.join(Path(r).name for r in args.recipes)}"
    return text if tuple(args.models) == MODELS else f"{text} --models {' '.join(args.models)}"


def line(model: str, recipe: str, of: dict[str, Any], seconds: float) -> str:
    changes = " ".join(f"{n.split()[0]} {100 * m['difference']:+.2f}" for n, m in of["metrics"].items())
    return (
        f"{model} {recipe:18} {of['bytes'] / 1e6:6.2f} MB  same {of['identical_answers']:.1%}  top-1 {of['top1_agreement']:.2%}  "
        f"KL {of['kl']:.5f}  empty {of['empty']}  malformed {of['malformed']}  points: {changes}  ({seconds:.0f} s)"
    )


if __name__ == "__main__":
    main()
