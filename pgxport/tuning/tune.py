# SPDX-License-Identifier: Apache-2.0
"""pgx tune: measure every group by itself, search, measure the proposals, and write the best recipe."""

import hashlib
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pgxport.activations.calibration_file import Calibration, checkpoint_sha256
from pgxport.cluster.pool import Cluster
from pgxport.data.loader import Accept, DataOptions, load
from pgxport.errors import EngineError, NumericError, UsageError, choose
from pgxport.exporter.prepare import ExportOptions, check_weights, context_length, open_checkpoint
from pgxport.exporter.recipe import Recipe
from pgxport.exporter.recipes import RECIPE_NAMES
from pgxport.exporter.targets import TARGETS, Target
from pgxport.files import check_output, disk_errors, write_whole
from pgxport.hub.locate import ModelChoice, locate
from pgxport.machine.conditions import describe_machine, versions
from pgxport.machine.driver import ask_driver
from pgxport.metrics.sample import Sample
from pgxport.models.checkpoint import Checkpoint
from pgxport.models.generation_config import generation_of
from pgxport.models.spec import ModelSpec
from pgxport.reporting.measured import keys
from pgxport.reporting.store import alone, digest
from pgxport.runners.saved_tokenizer import find_tokenizer
from pgxport.runners.session import ENGINES
from pgxport.text import duration
from pgxport.tuning.bundles import Bundles, MeasuredRecipe, Say, TunedModel
from pgxport.tuning.candidates import FLOAT, Group, chosen, groups, options, recipe
from pgxport.tuning.result import Limits, Mix, Probe, Tuning, toml
from pgxport.tuning.search import Choice, Option, front, spread

LADDER = 32  # choices of a front, among which the smallest that keeps the limit is looked for by halving
TRIES = 3  # fronts, each with less time than the one before, where those proposed were slower than predicted
VERSIONS = ("pgxport", "numpy", "onnxruntime")


@dataclass(frozen=True)
class TuneOptions(ModelChoice):
    """The model to tune and the limits. Names are those of `pgx tune`'s flags.

    Attributes:
        data: Samples to judge by, a file or a folder (docs/tune.md); None: the embedded scenes.
        format: Of the samples, where their content does not tell.
        samples: How many records, evenly spaced; of the scenes: of each task.
        calibration: What `pgx calibrate` wrote; without it statistics come from embedded scenes, and GPTQ is not among the candidates.
        max_loss: Points of the task metric that may be lost to float32.
        max_latency: Milliseconds of one answer of the mean length, without reading image and text.
        max_size: Megabytes of the bundle, 10**6 bytes each.
        candidates: Names of CANDIDATES; none: all that can be written.
        work: The folder of results, kept for the next time; None: beside the output.
        threads: Of the engine; None: its choice.
        cluster: The address of a Ray cluster that scores the samples (docs/cluster.md); None: this machine
            does.
    """

    output: str | Path = "recipe.toml"
    data: str | Path | None = None
    format: str | None = None
    samples: int = 50
    calibration: str | Path | None = None
    max_loss: float = 1.0
    max_latency: float | None = None
    max_size: float | None = None
    target: str = "cpu"
    candidates: tuple[str, ...] = ()
    work: str | Path | None = None
    threads: int | None = None
    overwrite: bool = False
    cluster: str | None = None


def tune(options: TuneOptions, *, progress: Say | None = None) -> Tuning:
    """Search the recipe with the smallest bundle within the limits, and write it.

    Kept results are not measured again.

    Raises:
        UsageError: an option names what does not exist, or the output is there already.
        EngineError: the target's engine cannot be run here.
        InputError: the checkpoint or a sample cannot be used.
    """
    output = Path(options.output)
    check_output(output, overwrite=options.overwrite)
    target = choose("target", options.target, TARGETS)
    _check_engine(target)
    if not options.max_loss >= 0:  # NaN is not either
        raise UsageError(f"--max-loss {options.max_loss:g}: give points from 0 on, as in 1%")
    names = chosen(options.candidates, calibrated=options.calibration is not None)
    subject = tuned_model(options)
    model_groups = groups(subject.spec)
    limits = Limits(options.max_loss, options.max_latency, None if options.max_size is None else round(options.max_size * 1e6))
    work = Path(options.work) if options.work else output.with_name(output.name + ".work")
    say = progress or (lambda text: None)
    cluster = Cluster(options.cluster) if options.cluster is not None else None
    with alone(work, "--work"), cluster or nullcontext(), Bundles(subject, work, say, cluster) as bundles:
        meter = RecipeMeter(bundles, say)
        named, skipped = _named(meter, target, calibrated=options.calibration is not None)
        base, probes = _probes(meter, model_groups, names, skipped)
        mixes = _search(meter, model_groups, base, probes, named, limits)
        tuning = Tuning(_facts(subject, bundles, options), limits, named, base, tuple(probes), tuple(mixes), tuple(skipped))
    if tuning.winner:
        with disk_errors(f"cannot write {output}"):
            write_whole(output, toml(tuning))
    return tuning


def _check_engine(target: Target) -> None:
    """Check that an engine runs the target's bundles here, as they are exported.

    Raises:
        EngineError: none does.
    """
    if target.tensorrt is not None:
        raise EngineError(
            f"pgx tune runs a bundle as it is exported, and one for target {target.name!r} has to be compiled first; use --target cpu"
        )
    if ENGINES[target.name] != "cpu":
        try:
            ask_driver()
        except EngineError as error:
            raise EngineError(
                f"pgx tune measures where a recipe will run, and this machine does not run target {target.name!r}: {error}"
            ) from error


@dataclass
class RecipeMeter:
    """Measures one recipe after another, and tells how long the rest will take."""

    bundles: Bundles
    say: Say
    seconds: list[float] = field(default_factory=list)

    def __call__(self, label: str, recipe: Recipe, *, left: int = 0, probe: bool = False) -> MeasuredRecipe:
        start, known = time.perf_counter(), self.bundles.known(recipe, probe=probe)
        if not known:
            recent = self.seconds[-10:]
            pace = sum(recent) / len(recent) if recent else 0.0
            self.say(f"{label}" + (f"; {left} to go, about {duration(pace * left)}" if left and pace else ""))
        measured = self.bundles.measure(label, recipe, probe=probe)
        if not known:
            self.seconds.append(time.perf_counter() - start)
        return measured


def tuned_model(o: TuneOptions) -> TunedModel:
    """Open the checkpoint, the calibration and the samples that the options name."""
    if (o.checkpoint is None) == (o.size is None) and (o.size or not o.adapters):
        raise UsageError("name one model: a checkpoint, --size tiny --res 224, or an --adapter that names its base")
    located = locate(o, precision="fp32")
    checkpoint = open_checkpoint(located, o)
    spec = checkpoint.spec()
    check_weights(checkpoint, spec)
    sha256 = checkpoint_sha256(checkpoint.files())
    calibration = Calibration.open(o.calibration) if o.calibration else None
    if calibration:
        calibration.check(sha256, located.name)
    asked = DataOptions(data=Path(o.data) if o.data else None, format=o.format, limit=o.samples)
    data = load(asked, _accept(o, checkpoint, spec))
    common = {
        "checkpoint": sha256, "calibration": calibration.digest if calibration else None, "samples": _digest(data.samples),
        "masks": bool(o.masks or located.masks), "target": o.target, "threads": o.threads, "versions": versions(VERSIONS),
    }  # fmt: skip
    export = ExportOptions(
        checkpoint=located.path,
        adapter=o.adapter,
        masks=o.masks or located.masks,
        calibration=o.calibration,
        target=o.target,
        parity=0,
        answer=False,
    )
    return TunedModel(export, spec, data.samples, common, o.threads, (*located.notes, *data.remarks))


def _accept(o: TuneOptions, checkpoint: Checkpoint, spec: ModelSpec) -> Accept:
    """Return what refuses a sample whose prompt the exported bundles would refuse."""
    tokenizer = find_tokenizer(checkpoint.path, checkpoint.config, o.adapters).words()
    limit = context_length(spec, None, generation_of(checkpoint))
    return lambda sample: tokenizer.prompt_ids(sample.prompt, spec.image_tokens, limit=limit)


def _named(meter: RecipeMeter, target: Target, *, calibrated: bool) -> tuple[tuple[MeasuredRecipe, ...], list[str]]:
    """Measure the named recipes as the target has them; returns also why some were skipped."""
    measured, skipped = [], []
    for i, name in enumerate(RECIPE_NAMES):
        try:
            recipe = target.recipe(name)
            target.check(recipe)
            if not calibrated and any(rule.scheme.method == "gptq" for rule in recipe.rules):
                raise UsageError(f"recipe {name!r} rounds by second moments, which a --calibration holds")
            measured.append(meter(name, recipe, left=len(RECIPE_NAMES) - i))
        except (UsageError, NumericError) as error:
            skipped.append(f"{name}: {error}")
    return tuple(measured), skipped


def _probes(
    meter: RecipeMeter, model_groups: Sequence[Group], names: Sequence[str], skipped: list[str]
) -> tuple[MeasuredRecipe, list[Probe]]:
    """Measure the model in floats, and each group by itself in each candidate."""
    base = meter(FLOAT, recipe("tuned", model_groups, {}))
    wanted = [(group, name) for group in model_groups for name in options(group, names) if name != FLOAT]
    recipes = [recipe("tuned", model_groups, {group.name: name}) for group, name in wanted]
    unknown = [not meter.bundles.known(r, probe=True) for r in recipes]
    probes = []
    for i, ((group, name), tried) in enumerate(zip(wanted, recipes, strict=True)):
        try:
            measured = meter(f"{group.name} in {name}", tried, left=sum(unknown[i:]), probe=True)
        except (UsageError, NumericError) as error:
            skipped.append(f"{group.name} in {name}: {error}")
        else:
            probes.append(Probe(group.name, name, measured))
    return base, probes


def _search(
    meter: RecipeMeter,
    model_groups: Sequence[Group],
    base: MeasuredRecipe,
    probes: Sequence[Probe],
    named: Sequence[MeasuredRecipe],
    limits: Limits,
) -> list[Mix]:
    """Measure proposals: at each named recipe's size, and by halving down to the smallest within the limits."""
    table = {group.name: [Option(FLOAT, 0, 0.0, 0.0)] for group in model_groups}
    for p in probes:
        m = p.measured
        table[p.group].append(Option(p.candidate, m.nbytes - base.nbytes, m.ms - base.ms, max(0.0, m.kl - base.kl)))
    mixes: dict[str, Mix] = {}

    def measured(choice: Choice) -> Mix:
        made = recipe("tuned", model_groups, choice.names)
        key = digest(dict(choice.names))
        if key not in mixes:
            label = f"mix {len(mixes) + 1}"
            mixes[key] = Mix(meter(label, made), dict(choice.names), base.kl + choice.loss, base.ms + choice.ms)
        return mixes[key]

    everything = front(table)
    for m in named:
        if fitting := [c for c in everything if base.nbytes + c.nbytes <= m.nbytes]:
            measured(fitting[-1])
    room = None if limits.ms is None else limits.ms - base.ms
    for _ in range(TRIES):
        fast = front(table, max_ms=room) if room is not None else everything
        fitting = [c for c in fast if limits.nbytes is None or base.nbytes + c.nbytes <= limits.nbytes]
        ladder = spread(fitting, LADDER) or everything[:1]
        best = _smallest(ladder, lambda c: measured(c).measured.loss.points <= limits.points)
        mix = measured(best)
        late = 0.0 if limits.ms is None else mix.measured.ms - limits.ms
        if room is None or late <= 0 or not fitting:
            break
        room -= late
    return list(mixes.values())


def _smallest(ladder: Sequence[Choice], holds: Callable[[Choice], bool]) -> Choice:
    """Return the first choice that holds, if all after one that holds do; the last, where none does."""
    low, high = 0, len(ladder) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(ladder[middle]) else (middle + 1, high)
    return ladder[high]


def _facts(subject: TunedModel, bundles: Bundles, o: TuneOptions) -> dict[str, Any]:
    tasks: dict[str, int] = {}
    for sample in subject.samples:
        tasks[sample.task] = tasks.get(sample.task, 0) + 1
    return {
        "checkpoint": _model(o), "calibration": str(o.calibration) if o.calibration else None,
        "output": str(o.output), "samples": tasks, "remarks": subject.remarks, "answer_tokens": bundles.answer_tokens, "engine": o.target,
        "reference": {"recipe": "fp32", "bytes": bundles.reference_bytes, "ms": bundles.reference_ms},
        "key": subject.common, "machine": describe_machine(),
    }  # fmt: skip


def _model(o: TuneOptions) -> str:
    """The model that the options name, for people."""
    named = str(o.checkpoint) if o.checkpoint else f"--size {o.size}" if o.size else ""
    words = [named, *([f"--res {o.res}"] if o.res and o.size else []), *(f"--adapter {adapter}" for adapter in o.adapters)]
    return " ".join(word for word in words if word)


def _digest(samples: Sequence[Sample]) -> str:
    """Return the sha256 of pictures, prompts and truths."""
    whole = hashlib.sha256()
    for sample, key in zip(samples, keys(samples), strict=True):
        whole.update(key.encode() + repr(replace(sample, image=b"")).encode())
    return whole.hexdigest()
