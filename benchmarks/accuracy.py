# SPDX-License-Identifier: Apache-2.0
"""Accuracy of recipes on the embedded checkpoint's test split, each beside the float32 bundle on the same questions.

python benchmarks/accuracy.py --questions 500                       # every named recipe, 112 and 224 px
python benchmarks/accuracy.py --recipes int4 my.toml --res 224      # some

For each recipe: the metric of every task with its 95 % bootstrap interval and its paired difference to float32, the share of
answers that are the same, and how often both find the same next token likeliest when both are given float32's answer so far; on
every fifth question also the KL divergence there. Answers are kept in --work as they come, so that a run that was stopped goes on
where it was. A yardstick beside them: transformers itself in bfloat16, given the same answers. Results of recipes that are not
named stay in --json as they are, if they were measured on as many questions.
"""

import argparse
import hashlib
import json
import platform
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from pgxport import __version__
from pgxport.calib.calibrate import CalibrateOptions, calibrate
from pgxport.data.scenes import scene_samples
from pgxport.exporter.export import export
from pgxport.exporter.prepare import ExportOptions
from pgxport.exporter.recipe_toml import read_recipe
from pgxport.exporter.recipes import RECIPE_NAMES
from pgxport.exporter.targets import CPU
from pgxport.metrics.bootstrap import draw
from pgxport.metrics.fidelity import kl_divergence, token_agreement
from pgxport.metrics.metrics import METRICS, groups, tally
from pgxport.metrics.sample import Sample
from pgxport.runners.image import load_image, pixel_values
from pgxport.runners.outputs import Answer
from pgxport.runners.pipeline import Pipeline

ROOT = Path(__file__).parent
RECIPES_AND_CACHES = [*(r for r in RECIPE_NAMES if r not in ("fp32", "fp8")), str(ROOT / "recipes" / "int8-kv8.toml")]
CHECKPOINTS = ROOT.parent / "pgxport" / "models" / "tiny"
EVERY = 5  # questions between those whose KL is measured, which needs float32's logits too
MORE = {"detect": ("box_iou",)}  # beside the metric that decides


def bundle(recipe: str, res: int, work: Path, samples: int) -> Path:
    """Export, calibrating first where the recipe needs it; what is there from an earlier run of the same is kept."""
    given = {"recipe": recipe} if recipe.endswith(".toml") else {"precision": recipe}
    text = Path(recipe).read_text() if recipe.endswith(".toml") else repr(CPU.recipe(recipe))
    output = work / f"{Path(recipe).stem}-{res}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    if (output / "manifest.json").exists():
        return output
    calibration = work / f"calibration-{res}-{samples}.safetensors"
    if not calibration.exists():
        calibrate(CalibrateOptions(output=calibration, size="tiny", res=res, samples=samples))
    recipe_of = read_recipe(Path(recipe)) if recipe.endswith(".toml") else CPU.recipe(recipe)
    needed = {"calibration": calibration} if recipe_of.calibrated else {}
    return export(ExportOptions(output=output, size="tiny", res=res, **given, **needed)).path


def ask(path: Path, reference: Path | None, questions: int, threads: int) -> list[dict[str, Any]]:
    """The ids a bundle answers with and, along the reference's answer, how many next tokens it finds likeliest as well."""
    done = path.with_suffix(".answers.jsonl")
    rows = [json.loads(line) for line in done.read_text().splitlines()] if done.exists() else []
    before = (
        None if reference is None else [json.loads(x) for x in reference.with_suffix(".answers.jsonl").read_text().splitlines()]
    )
    samples = scene_samples(questions)
    if len(rows) >= len(samples):
        return rows[: len(samples)]
    with ExitStack() as stack:
        pipeline, file = stack.enter_context(Pipeline.open(path, threads=threads)), stack.enter_context(done.open("a"))
        exact = reference and stack.enter_context(Pipeline.open(reference, threads=threads))
        for i in range(len(rows), len(samples)):
            prefix = prefix_of(pipeline, samples[i])
            ids = list(pipeline.generate(prefix, pipeline.answer_limit(prefix)))
            row = {"id": samples[i].id, "ids": ids}
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
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
    return rows


def prefix_of(pipeline: Pipeline, sample: Sample) -> np.ndarray:
    """The prefix [1, T, H] of a sample's picture and prompt."""
    return pipeline.prefix(pipeline.encode([sample.open()]), pipeline.prompt_ids(sample.prompt))


def teacher_forced(pipeline: Pipeline, prefix: np.ndarray, answer: list[int]) -> np.ndarray:
    """Logits [answer + 1, V] of each next token of a given answer, and of what follows it."""
    return np.stack([row.copy() for row in pipeline.teacher_forced(prefix, answer)])


def in_bfloat16(res: int, exact: Path, questions: int) -> dict[str, float]:
    """How often transformers in bfloat16 finds float32's next token likeliest, and the KL divergence, as measured for recipes."""
    import torch
    from transformers import PaliGemmaForConditionalGeneration

    torch.set_num_threads(1)
    model = PaliGemmaForConditionalGeneration.from_pretrained(
        CHECKPOINTS / f"tiny-{res}", dtype=torch.bfloat16, attn_implementation="eager"
    ).eval()
    samples, agreed, positions, losses = scene_samples(questions), 0, 0, []
    rows = [json.loads(line) for line in exact.with_suffix(".answers.jsonl").read_text().splitlines()]
    with Pipeline.open(exact, threads=1) as pipeline, torch.inference_mode():
        for i, (sample, row) in enumerate(zip(samples, rows, strict=False)):
            m, answer = pipeline.manifest, row["ids"]
            prompt = pipeline.prompt_ids(sample.prompt)
            ids = torch.tensor([[*prompt, *answer]])
            logits = model(
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES_AND_CACHES)
    parser.add_argument("--res", type=int, nargs="+", default=[112, 224])
    parser.add_argument("--questions", type=int, default=500, help="of each task")
    parser.add_argument("--calibration-samples", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("build/accuracy"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    samples = scene_samples(args.questions)
    record: dict[str, Any] = {
        "what": f"recipes on the embedded checkpoint, {args.questions} test questions a task, ONNX Runtime on the CPU, greedy",
        "command": f"python benchmarks/accuracy.py --questions {args.questions} --recipes {' '.join(Path(r).name for r in args.recipes)}",
        "versions": {"pgxport": __version__, "onnxruntime": onnxruntime.__version__, "python": platform.python_version()},
        "transformers_bfloat16": {},
        "results": {},
    }
    if args.json and args.json.exists():
        before = json.loads(args.json.read_text())
        if before["what"] != record["what"]:
            parser.error(f"{args.json} holds {before['what']!r}; other questions do not belong beside them: name another file")
        record["results"], record["transformers_bfloat16"] = before["results"], before.get("transformers_bfloat16", {})
    with ProcessPoolExecutor(args.workers) as pool:
        for res in args.res:
            paths = {r: bundle(r, res, args.work, args.calibration_samples) for r in ("fp32", *args.recipes)}
            pool.submit(ask, paths["fp32"], None, args.questions, 1).result()
            yardstick = pool.submit(in_bfloat16, res, paths["fp32"], args.questions)
            jobs = {r: pool.submit(ask, paths[r], paths["fp32"] if r != "fp32" else None, args.questions, 1) for r in paths}
            rows = {r: job.result() for r, job in jobs.items()}
            with Pipeline.open(paths["fp32"]) as pipeline:
                answers = {
                    r: [pipeline.parse(row["ids"], s.open().size) for s, row in zip(samples, rows[r], strict=True)] for r in paths
                }
            for recipe in paths:
                same = [float(a["ids"] == b["ids"]) for a, b in zip(rows[recipe], rows["fp32"], strict=True)]
                of = record["results"].setdefault(Path(recipe).stem, {})[str(res)] = {
                    "bytes": sum(f.stat().st_size for f in paths[recipe].iterdir()),
                    "metrics": table(samples, answers[recipe], answers["fp32"]),
                    "identical_answers": float(np.mean(same)),
                    "token_agreement": float(
                        np.mean([token_agreement(a["ids"], b["ids"]) for a, b in zip(rows[recipe], rows["fp32"], strict=True)])
                    ),
                }
                if recipe != "fp32":
                    of["top1_agreement"] = sum(r["agreed"] for r in rows[recipe]) / sum(r["positions"] for r in rows[recipe])
                    some = [r for r in rows[recipe] if "kl" in r]
                    of["kl"] = sum(r["kl"] for r in some) / sum(r["positions"] for r in some)
                print(line(recipe, res, of), flush=True)
            record["transformers_bfloat16"][str(res)] = yardstick.result()
            print("transformers in bfloat16", res, record["transformers_bfloat16"][str(res)], flush=True)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def line(recipe: str, res: int, of: dict[str, Any]) -> str:
    changes = " ".join(f"{n.split()[0]} {100 * m['difference']:+.2f}" for n, m in of["metrics"].items())
    return (
        f"{Path(recipe).stem:24} {res}  {of['bytes'] / 1e6:6.2f} MB  same {of['identical_answers']:.1%}  "
        f"top-1 {of.get('top1_agreement', 1):.2%}  KL {of.get('kl', 0):.5f}  points: {changes}"
    )


if __name__ == "__main__":
    main()
