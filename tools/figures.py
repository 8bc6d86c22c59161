# SPDX-License-Identifier: Apache-2.0
"""Write the measured figures of benchmarks/results/*.json, and the planned ones, into README.md and docs/, between their markers.

python tools/figures.py            # rewrite
python tools/figures.py --plan     # work out what fits which board anew, then rewrite
python tools/figures.py --check    # exit 1 if a page does not say what the results say
"""

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ("README.md", "docs/tiny.md", "docs/quantization.md", "docs/performance.md", "docs/jetson.md", "docs/gpu.md")


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


def true_shapes() -> str:
    """What was measured on checkpoints of published shapes with random weights."""
    lines = ["| measured on published shapes, random weights | |", "|---|---|"]
    for file in sorted(RESULTS.glob("export-*.json")):
        r = json.loads(file.read_text())
        row = f"{r['bundle_bytes'] / 1e9:.2f} GB in {r['seconds']['median']:.0f} s, peak private memory {r['peak_private_bytes'] / 1e6:.0f} MB"
        if "ratio_to_copy" in r:
            row += (
                f"; {r['ratio_to_copy']['median']:.2f} × copying the checkpoint with sha256 ({_range(r['ratio_to_copy']['all'])})"
            )
        if r["limit_data_mib"]:
            row += f"; under a limit of {r['limit_data_mib']} MiB"
        lines.append(f"| {r['what']} | {row} |")
    for file in sorted(RESULTS.glob("parity-*.json")):
        r = json.loads(file.read_text())
        row = f"{r['tokens_equal']} of {r['steps']} tokens equal; logits within {r['largest_error_of_logits_scale']:.1e} of their scale"
        lines.append(f"| {r['what']} | {row} |")
    graphs = json.loads((RESULTS / "graphs.json").read_text())["seconds"]
    slowest = max(graphs.values(), key=lambda row: row["median"])["median"]
    lines.append(f"| all graphs of a model written, {len(graphs)} models in every precision | {slowest:.2f} s at most (median) |")
    return "\n".join(lines)


def _range(values: list[float]) -> str:
    return f"{min(values):.2f}–{max(values):.2f}"


def _interval(row: dict[str, float]) -> str:
    return f"{row['mean'] * 100:.1f} % ({row['low'] * 100:.1f}–{row['high'] * 100:.1f})"


def recipes() -> str:
    """What each recipe costs: the KL of all models beside each other, then a table of each model with all its figures."""
    record = json.loads((RESULTS / "recipes-tiny.json").read_text())
    results, lines = record["results"], _divergences(record["results"])
    for model, rows in results.items():
        exact = rows["fp32"]["metrics"]
        names = [name.replace("exact match", "exact").replace("boxes found at IoU 0.5", "found") for name in exact]
        head = [model, "MB", *names, "next token", "answers", "KL", "empty", "malformed"]
        lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for name, of in rows.items():
            lines.append(f"| {name} | {of['bytes'] / 1e6:.2f} | {' | '.join([*_metrics(name, of), *_fidelity(name, of)])} |")
    if yardstick := record["transformers_bfloat16"]:
        found = " and ".join(f"{of['top1_agreement']:.1%} of {model} (KL {of['kl']:.5f})" for model, of in yardstick.items())
        lines += [
            "",
            f"A yardstick: transformers itself, computing in bfloat16, finds the next token of its float32 likeliest on {found}. Many tokens of these "
            "answers are places among 1,024, of which two neighbours are often as likely.",
        ]
    machine = record["machine"]
    lines += [
        "",
        f"{record['questions']} test questions of each task, greedy, ONNX Runtime on the CPU ({machine['processor']} with {machine['vectors']}), all in one run. Float32's "
        "metrics, and the others' paired differences to it in points with their 95 % bootstrap intervals; then the next tokens along float32's answers that are "
        "the same, the whole answers, the KL divergence of the next token in nats on every fifth question, and how many answers are empty or malformed. "
        f"`{record['command']} --json benchmarks/results/recipes-tiny.json` measures it again.",
    ]
    return "\n".join(lines)


def _divergences(results: dict[str, Any]) -> list[str]:
    """A table of the KL of each recipe on each model."""
    real = _real_gemma()
    head = ["KL, nats", *results, *(["Gemma 3 270M", "same token"] if real else [])]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in (name for name in next(iter(results.values())) if name != "fp32"):
        cells = [_kl(rows[name]["kl"]) for rows in results.values()]
        lines.append(f"| {' | '.join([name, *cells, *(_real_cells(real, name) if real else [])])} |")
    return lines


def _metrics(name: str, of: dict[str, Any]) -> list[str]:
    """Float32's metrics, or a recipe's differences to them."""
    if name == "fp32":
        return [f"{100 * m['value']:.1f} %" for m in of["metrics"].values()]
    return [f"{_points(m['difference'])} {_span(m)}" for m in of["metrics"].values()]


def _fidelity(name: str, of: dict[str, Any]) -> list[str]:
    same = [] if name == "fp32" else [f"{of['top1_agreement']:.1%}", f"{of['identical_answers']:.1%}", _kl(of["kl"])]
    return [*(same or ["", "", ""]), str(of["empty"]), str(of["malformed"])]


def _real_gemma() -> dict[str, dict[str, float]]:
    """Recipe -> what it costs a real Gemma, by benchmarks/real_gemma.py, which has one row for decoders that are stored alike."""
    file = RESULTS / "real-gemma.json"
    rows = json.loads(file.read_text())["results"] if file.exists() else {}
    return {name: of for names, of in rows.items() for name in re.split(r", (?!its prefixes)", names)}


def _real_cells(real: dict[str, dict[str, float]], name: str) -> list[str]:
    """KL and the share of likeliest tokens that stay; of prefixes too, where they are multiplied by a copy of their own."""
    of = [row for row in (real.get(f"{name}, its prefixes"), real.get(name)) if row]
    return [" and ".join(_kl(row["kl"]) for row in of) or "–", " and ".join(f"{row['same']:.1%}" for row in of) or "–"]


def recipes_short() -> str:
    """The least that a reader wants of `recipes`: the worse of both resolutions, plain and with outliers, and a real Gemma."""
    record, real = json.loads((RESULTS / "recipes-tiny.json").read_text()), _real_gemma()
    results = record["results"]
    kinds = {
        "tiny": [rows for model, rows in results.items() if not model.endswith("-outliers")],
        "with outliers": [rows for model, rows in results.items() if model.endswith("-outliers")],
    }
    head = ["recipe", *(f"{kind}: {column}" for kind in kinds for column in ("worst task", "next token"))]
    head += ["Gemma 3 270M: KL", "same token"] if real else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in (name for name in kinds["tiny"][0] if name != "fp32"):
        cells = [cell for models in kinds.values() for cell in _worst([rows[name] for rows in models])]
        lines.append(f"| {' | '.join([name, *cells, *(_real_cells(real, name) if real else [])])} |")
    lines += [
        "",
        f"Each against float32 on the same {record['questions']} questions a task of tiny-112 and tiny-224, whichever lost more: the task that lost most, in points with the "
        "95 % interval, and the share of next tokens that stayed the same; the same on the checkpoints to which "
        "[outlier channels](docs/tiny.md#with-outlier-channels) were given.",
    ]
    return "\n".join(lines)


def _worst(models: list[dict[str, Any]]) -> list[str]:
    """The task that lost most on any of the models, and the least agreement of next tokens."""
    metrics = [item for of in models for item in of["metrics"].items()]
    task, worst = min(metrics, key=lambda item: item[1]["difference"])
    lost = "none lost" if worst["difference"] >= 0 else f"{task.split()[0]} {_points(worst['difference'])} {_span(worst)}"
    return [lost, f"{min(of['top1_agreement'] for of in models):.1%}"]


def _span(m: dict[str, float]) -> str:
    return f"({_points(m['difference_low'])} … {_points(m['difference_high'])})"


def _kl(value: float) -> str:
    """
    >>> _kl(0.000263), _kl(3e-8)
    ('0.00026', '< 0.00001')
    """
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.5f}" if value >= 1e-5 else "< 0.00001"


def peers() -> str:
    """Bundles and others on the shapes of PaliGemma 2 3B at 448 px, measured in turn."""
    return _peers(RESULTS / "against-peers-3b-448.json")


def peers_elsewhere() -> str:
    """The same at other resolutions, and for PaliGemma."""
    return "\n\n".join(_peers(p) for p in sorted(RESULTS.glob("against-peers-*.json")) if p.name != "against-peers-3b-448.json")


def packed() -> str:
    """A start with and without packed weights."""
    record = json.loads((RESULTS / "packed-3b-448.json").read_text())
    lines = [
        "| | verify, s | load, s | private at rest, GB | mapped at rest, GB | private after answers, GB | peak resident, GB | decode step, ms |",
        "|---" * 8 + "|",
    ]
    for name, of in record["bundles"].items():
        for kind in ("as exported", "packed"):
            found, size = of[kind], of["packed_bytes" if kind == "packed" else "bundle_bytes"]
            spans = [(found[key], times, digits) for key, times, digits in (("verify", 1, 1), ("load", 1, 1), ("step", 1e3, 0))]
            spans = [f"{t * s['median']:.{d}f} ({t * s['least']:.{d}f}–{t * s['most']:.{d}f})" for s, t, d in spans]
            places = (("loaded", "private"), ("loaded", "mapped"), ("answered", "private"), ("answered", "peak"))
            memory = [f"{found[when][what]['median'] / 1e9:.2f}" for when, what in places]
            lines.append(f"| {name}, {kind}, {size / 1e9:.2f} GB | {' | '.join([*spans[:2], *memory, spans[2]])} |")
    seconds = "; ".join(f"{name} took {of['pack_seconds']:.0f} s to pack" for name, of in record["bundles"].items())
    machine = f"{record['machine']['cores']} cores of {record['machine']['processor']}, {record['threads']} threads"
    return "\n".join([*lines, "", f"{machine}, {record['repeat']} starts of each in turn: median (least–most). {seconds}."])


def real_gemma() -> str:
    """What each recipe costs the decoder of a real Gemma, and by kind of linear."""
    r = json.loads((RESULTS / "real-gemma.json").read_text())
    results = r["results"]
    kinds = list(next((of["kinds"] for of in results.values() if "kinds" in of), ()))
    lines = [
        f"| decoder of Gemma 3 270M | {' | '.join(['KL', 'same token', 'perplexity', *(f'KL, {kind} alone' for kind in kinds)])} |",
        "|---" * (len(kinds) + 4) + "|",
    ]
    for name, of in results.items():
        kl = "0" if name == "fp32" else f"{_digits(of['kl'])} ± {_digits(2 * of['kl_error'])}"
        alone = [_digits(of["kinds"][kind]["kl"]) if "kinds" in of else "" for kind in kinds]
        cells = [name, kl, f"{of['same']:.1%}", f"{of['perplexity']:.2f}", *alone]
        lines.append(f"| {' | '.join(cells)} |")
    machine, versions = r["machine"], r["versions"]
    said = (
        f"KL to float32 in nats, ± two standard errors over tokens; {r['judging']['tokens']:,} tokens of the documentation of Python "
        f"{versions['python']}, calibrated on {r['calibrating']['tokens']:,} others. {machine['cores']} cores of {machine['processor']} with "
        f"{machine['vectors']}, transformers {versions['transformers']}. `{r['command']} --json benchmarks/results/real-gemma.json` measures it again."
    )
    return "\n".join([*lines, "", said])


def _digits(value: float) -> str:
    """Two digits that count, not in powers of ten."""
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}" if value else "0"


def curves() -> str:
    """What one decoder layer costs against the length, from decoders of two depths."""
    r = json.loads((RESULTS / "curves-3b-int4.json").read_text())
    lines = [
        "| tokens | prefill of a layer, ms | a token of it, µs | step of a layer, ms | all else of a step, ms | cache, MB |",
        "|---" * 6 + "|",
    ]
    many = r["decoder"][-1]
    for row, of in zip(r["per_layer"], many["lengths"], strict=True):
        prefill, cache = row["prefill_layer"], of["cache_bytes"] / many["layers"]
        cells = f"{prefill * 1e3:.0f} | {prefill / row['length'] * 1e6:.0f} | {row['step_layer'] * 1e3:.2f} | {row['step_rest'] * 1e3:.1f} | {cache / 1e6:.0f}"
        lines.append(f"| {row['length']:,} | {cells} |")
    lines += ["", "| px | image tokens | vision, ms | prefill, ms | decode step, ms | peak private, GB |", "|---" * 6 + "|"]
    for of in r["resolutions"]:
        stages = [f"{1e3 * of['stages'][stage]['median']:.0f}" for stage in ("vision", "prefill", "step")]
        lines.append(
            f"| {of['resolution']} | {of['image_tokens']:,} | {' | '.join(stages)} | {of['memory']['peak']['private'] / 1e9:.2f} |"
        )
    machine = (
        f"{r['machine']['cores']} cores of {r['machine']['processor']}, {r['threads']} threads, {r['repetitions']} repetitions"
    )
    return "\n".join(
        [
            *lines,
            "",
            f"{r['what']}; at each resolution both towers are as shallow as the first. {machine}: medians.",
        ]
    )


def _peers(file: Path) -> str:
    r = json.loads(file.read_text())
    stages = {
        "vision": ("vision", 1, "s"),
        "prefill": ("prefill", 1, "s"),
        "ttft": ("first token", 1, "s"),
        "step": ("decode step", 1e3, "ms"),
    }
    lines = [f"| {r['what']} | {' | '.join(f'{title}, {unit}' for title, _, unit in stages.values())} | peak resident, GB |"]
    lines.append("|---" * (len(stages) + 2) + "|")
    for row in r["measured"]:
        if row["status"] != "ok":
            continue
        label = f"pgx {row['recipe']}, {row['bytes'] / 1e9:.2f} GB" if "recipe" in row else PEERS.get(row["label"], row["label"])
        if row["label"] == "llama" and "AMX" in r["machine"]["vectors"]:
            label += ", built without AMX"
        cells = []
        for stage, (_, times, _) in stages.items():
            seconds = row["stages"].get(stage)
            digits = 0 if times > 1 else 2
            cells.append(
                f"{times * seconds['median']:.{digits}f} ({times * seconds['low']:.{digits}f}–{times * seconds['high']:.{digits}f})"
                if seconds
                else "–"
            )
        lines.append(f"| {label} | {' | '.join(cells)} | {row['memory']['peak']['resident'] / 1e9:.2f} |")
    said = "; ".join(x["says"].replace("b3-", "pgx ") for x in r["ratios"] if x["stage"] in ("ttft", "step"))
    machine = (
        f"{r['machine']['cores']} cores of {r['machine']['processor']} with {r['machine']['vectors']}, {r['threads']} threads"
    )
    return "\n".join([*lines, "", f"{machine}, {r['repetitions']} repetitions in turn: median (least–most). {said}."])


PEERS = {
    "transformers-static": "transformers, bf16, static cache",
    "transformers-float32": "transformers, float32, static cache",
    "llama": "llama.cpp Q4_0, text only",
}


def boards() -> str:
    """What of each model fits a Jetson."""
    return _fitting("tensorrt")


def gpus() -> str:
    """What of each model fits a graphics card."""
    return _fitting("cuda")


def _fitting(target: str) -> str:
    planned = json.loads((RESULTS / "boards.json").read_text())[target]
    needs = planned["needs"]
    lines = [f"| | usable, GB | {' | '.join(needs)} |", "|---" * (2 + len(needs)) + "|"]
    for board, usable in planned["usable"].items():
        cells = [", ".join(name for name, need in of.items() if need <= usable) or "–" for of in needs.values()]
        lines.append(f"| {board} | {usable / 1e9:.1f} | {' | '.join(cells)} |")
    peaks = ["; ".join(f"{name} {need / 1e9:.1f}" for name, need in of.items()) for of in needs.values()]
    lines.append(f"| **needs at its peak, GB** | | {' | '.join(peaks)} |")
    return "\n".join([*lines, "", f"PaliGemma 2, by `pgx plan {planned['flags']}`: worked out, not measured."])


def plan_boards() -> None:
    """Work out benchmarks/results/boards.json anew, with the package as it is."""
    from pgxport.exporter.plan import PlanOptions, plan
    from pgxport.machine.board import BOARDS

    models = [("3b", 224), ("3b", 448), ("3b", 896), ("10b", 448), ("28b", 448)]
    rows = {"tensorrt": ("10.16", ("fp16", "w8a8-static", "int4")), "cuda": (None, ("fp16", "int8", "int4"))}
    record: dict[str, Any] = {"command": "python tools/figures.py --plan"}
    for target, (trt, precisions) in rows.items():
        plans = {f"{s} at {r}": plan(PlanOptions(size=s, res=r, precision="fp16", target=target, trt=trt)) for s, r in models}
        record[target] = {
            "flags": f"--target {target}" + (f" --trt {trt}" if trt else ""),
            "usable": {board.name: board.usable for board in BOARDS.values() if board.gpu_only == (target == "cuda")},
            "needs": {model: {name: p.needs[name] for name in precisions} for model, p in plans.items()},
        }
    (RESULTS / "boards.json").write_text(json.dumps(record, indent=1) + "\n")


def _points(value: float) -> str:
    return f"{100 * value:+.1f}".replace("-", "−")


TABLES = {"tiny": tiny, "true_shapes": true_shapes, "recipes": recipes, "recipes_short": recipes_short, "peers": peers}
TABLES |= {"peers_elsewhere": peers_elsewhere, "packed": packed, "curves": curves}
TABLES |= {"real_gemma": real_gemma}
TABLES |= {"boards": boards, "gpus": gpus}  # planned


def rewritten(text: str) -> str:
    """The page with every `<!-- figures: NAME -->` … `<!-- end -->` filled in."""
    return re.sub(
        r"(<!-- figures: (\w+) -->\n).*?(<!-- end -->)", lambda m: f"{m[1]}{TABLES[m[2]]()}\n{m[3]}", text, flags=re.DOTALL
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--plan", action="store_true")
    given = parser.parse_args()
    check, stale = given.check, []
    if given.plan:
        plan_boards()
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
