# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the logits of every engine and precision against transformers', then time and memory against it, and as a share of what
the GPU moves and multiplies, measured in the same run. Random weights of the published shapes.

    python benchmarks/on_gpu.py --scratch DIR                       3b at 224, 448 and 896 px, with every engine that is installed
    python benchmarks/on_gpu.py --scratch DIR --prepare             what needs no GPU: checkpoints, bundles, transformers' logits
    pytest -m gpu                                                   the embedded model on the same engines
    python benchmarks/on_gpu.py --scratch DIR --device cpu --engines cpu --precision fp16 --depth 1 --res 224      this script itself

Needs torch for CUDA and transformers; 15 GB of disk a resolution, and memory of the GPU for all at once (80 GB; narrow --precision, --peers
or --engines for less). **It has not been run: no GPU was at hand.** What it works out is tested in tests/test_benchmarks.py, on a CPU.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools"), str(ROOT / "benchmarks")]

from against_peers import prefix_ids, ratios, with_ttft  # noqa: E402
from make_checkpoint import config, distribution, shallow, write_checkpoint  # noqa: E402
from parity_true_shapes import inputs  # noqa: E402

from pgxport.benchmarking.bench import measurement_json  # noqa: E402
from pgxport.benchmarking.measure import WARM_UP_STEPS, WholeAnswers, worker  # noqa: E402
from pgxport.benchmarking.worker import Measurement, Worker, interleave, serve  # noqa: E402
from pgxport.bundle.reader import Bundle  # noqa: E402
from pgxport.calib.calibrate import CalibrateOptions, calibrate  # noqa: E402
from pgxport.compile.compile import compile_bundle  # noqa: E402
from pgxport.compile.memory import weight_bytes  # noqa: E402
from pgxport.compile.options import CompileOptions  # noqa: E402
from pgxport.errors import PgxError  # noqa: E402
from pgxport.exporter.export import export  # noqa: E402
from pgxport.exporter.prepare import ExportOptions  # noqa: E402
from pgxport.machine.conditions import describe_machine, versions  # noqa: E402
from pgxport.machine.driver import ask_driver  # noqa: E402
from pgxport.models.spec import RESOLUTIONS, ModelSpec, published  # noqa: E402
from pgxport.models.weights import weight_shapes  # noqa: E402
from pgxport.runners.pipeline import Pipeline  # noqa: E402
from pgxport.runners.session import ENGINES  # noqa: E402

PACKAGES = (
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-cu12",
    "tensorrt-cu13",
    "tensorrt-rtx-cu13",
    "cuda-python",
    "torch",
    "transformers",
)
RESULTS = ROOT / "benchmarks" / "results"
MODULES = {"cuda": "onnxruntime", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
PRECISIONS = ("fp16", "int8", "int4", "fp8")
CALIBRATED = ("fp8", "w8a8")
# What a recipe multiplies in: weights of 8 and 4 bits alone become float16 first.
MULTIPLIES = {"fp16": "float16", "bf16": "bfloat16", "int8": "float16", "int4": "float16", "w8a8": "int8", "fp8": "float8"}
# Peer -> its attention, and whether the step is compiled over a static cache. None: transformers' own choice, which is sdpa but for the
# text part of PaliGemma 2, whose softcap sdpa has not; what it came to is in the results.
PEERS = {"transformers-eager": ("eager", False), "transformers-sdpa": (None, False), "transformers-compiled": (None, True)}
COPIED, SIDE, TIMES = 1 << 30, 8192, 10  # bytes; of the square matrices; of each in a repetition


class Limits:
    """What the GPU does at its best: a copy that reads and writes, and products of large matrices."""

    def __init__(self, request: dict[str, Any]):
        import torch

        device, side = request["device"], request["side"]
        self._torch, self._wait = torch, waiting(device)
        self._bytes = torch.empty(request["bytes"], dtype=torch.uint8, device=device)
        self._copy = torch.empty_like(self._bytes)
        ones = torch.ones(side, side, device=device)
        halves = {
            str(dtype).removeprefix("torch."): (ones.to(dtype), ones.to(dtype)) for dtype in (torch.float16, torch.bfloat16)
        }
        self._products: dict[str, Callable[[], Any]] = {
            name: lambda a=a, b=b: torch.matmul(a, b) for name, (a, b) in halves.items()
        }
        if device == "cuda":
            whole = ones.to(torch.int8)
            self._products["int8"] = lambda: torch._int_mm(whole, whole.t())
            if torch.cuda.get_device_capability() >= (8, 9):
                eight, one = ones.to(torch.float8_e4m3fn), torch.ones((), device=device)
                self._products["float8"] = lambda: torch._scaled_mm(eight, eight.t(), one, one, out_dtype=torch.bfloat16)
        self.opening: dict[str, float] = {}
        self.facts = {"copied": 2 * request["bytes"], "operations": 2 * side**3, "versions": versions(["torch"])}

    def repeat(self, *, warm_up: bool) -> dict[str, float]:
        work = {"copy": lambda: self._copy.copy_(self._bytes)} | self._products
        return {name: self._timed(each) for name, each in work.items()}

    def _timed(self, work: Callable[[], Any]) -> float:
        work()
        self._wait()
        start = time.perf_counter()
        for _ in range(TIMES):
            work()
        self._wait()
        return (time.perf_counter() - start) / TIMES


class Transformers:
    """PaliGemma in bfloat16, decoding greedily; a token is waited for before the next is asked for, as a stream of words does."""

    def __init__(self, spec: ModelSpec, request: dict[str, Any]):
        import torch
        from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
        from transformers.initialization import no_init_weights

        attention, compiled = PEERS[request["peer"]]
        device = request["device"]
        self._wait, self._device = waiting(device), device
        described = PaliGemmaConfig.from_dict(config(spec, "bfloat16"))
        if attention:
            described._attn_implementation = attention
        if compiled and spec.text.window is not None:
            # A static cache of local layers counts in Python, so that each step would be compiled anew (5.24). Up to 448 px no window hides
            # anything; at 896 px, 16 of 4,112 tokens.
            described.text_config.layer_types = ["full_attention"] * spec.text.depth
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        with no_init_weights(), torch.device(device):
            self._model = PaliGemmaForConditionalGeneration(described).eval()
        torch.set_default_dtype(before)
        self._model.tie_weights()
        generator = torch.Generator(device).manual_seed(0)
        normal = torch.randn(1 << 20, generator=generator, device=device)
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                mean, deviation = distribution(name.removeprefix("model."), tuple(parameter.shape))
                pool = (mean + deviation * normal).to(parameter.dtype)
                for piece in parameter.view(-1).split(len(pool)):
                    piece.copy_(pool[: len(piece)])
        ids = torch.from_numpy(prefix_ids(spec, request["prompt_tokens"]))[None].to(device)
        shape = (1, 3, spec.resolution, spec.resolution)
        self._first = {
            "input_ids": ids, "token_type_ids": torch.zeros_like(ids),
            "pixel_values": torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16),
        }  # fmt: skip
        self._steps, self._static = request["new_tokens"], compiled
        # Shapes of a step never change over a static cache, so that one compilation does; a second one would be in the times.
        self._forward = torch.compile(self._model, dynamic=False, **request["compile"]) if compiled else self._model
        self._cache: Any = None  # one for all answers, where it is static: what is recorded is recorded for its place
        self._clock: dict[str, float] = {}
        self._time(self._model.model.vision_tower, "vision")
        self._time(self._model.model.multi_modal_projector, "projector")
        used = {
            p: m.config._attn_implementation
            for p, m in (("vision", self._model.model.vision_tower), ("text", self._model.model.language_model))
        }
        self.facts = {
            "precision": "bfloat16", "attention": used, "compiled": compiled, "versions": versions(["torch", "transformers"]),
            "decoder_bytes": sum(p.numel() * p.element_size() for p in self._model.model.language_model.parameters()),
        }  # fmt: skip
        self.opening: dict[str, float] = {}

    def repeat(self, *, warm_up: bool) -> dict[str, float]:
        # Compiling is done in the warm-up, and so is recording, which the second and third step of a compiled model do.
        steps = min(max(WARM_UP_STEPS, 4), self._steps) if warm_up else self._steps
        self.tokens, walls = [], []
        for token in self._generate(steps):
            walls.append(token[1])
            self.tokens.append(token[0])
        first, *rest = walls
        return {**self._clock, "prefill": first - sum(self._clock.values()), "step": sum(rest) / steps}

    def _generate(self, steps: int) -> Iterator[tuple[int, float]]:
        import torch
        from transformers import DynamicCache, StaticCache

        text, length = self._model.config.get_text_config(), self._first["input_ids"].shape[1]
        with torch.inference_mode():
            start = time.perf_counter()
            if not self._static:
                self._cache = DynamicCache(config=text)
            elif self._cache is None:
                self._cache = StaticCache(text, max_cache_len=length + self._steps)
            else:
                self._cache.reset()
            token = self._next(self._model, **self._first, past_key_values=self._cache)
            yield int(token), time.perf_counter() - start  # reading it waits for it
            for i in range(steps):
                start = time.perf_counter()
                at = torch.full((1, 1), length + i, device=self._device)
                token = self._next(
                    self._forward, input_ids=token, position_ids=at + 1, cache_position=at[0], past_key_values=self._cache
                )
                yield int(token), time.perf_counter() - start

    def _next(self, forward: Any, **inputs: Any) -> Any:
        self.logits = forward(**inputs, logits_to_keep=1, use_cache=True).logits[:, -1:]
        return self.logits.argmax(-1)

    def _time(self, module: Any, stage: str) -> None:
        started = []

        def begin(*_: Any) -> None:
            self._wait()
            started.append(time.perf_counter())

        def end(*_: Any) -> None:
            self._wait()
            self._clock[stage] = time.perf_counter() - started.pop()

        module.register_forward_pre_hook(begin)
        module.register_forward_hook(end)


def waiting(device: str) -> Callable[[], None]:
    import torch

    return torch.cuda.synchronize if device == "cuda" else lambda: None


@dataclass
class Held:
    """A worker, and how much of the GPU's memory went while it worked: they work one at a time, and keep what they took."""

    worker: Worker
    free: Callable[[], int]
    taken: int = 0

    @property
    def label(self) -> str:
        return self.worker.label

    def open(self) -> None:
        self._watched(self.worker.open)

    def repeat(self) -> None:
        self._watched(self.worker.repeat)

    def measurement(self) -> Measurement:
        m = self.worker.measurement()
        return replace(m, facts=m.facts | {"gpu_bytes": self.taken})

    def _watched(self, work: Callable[[], None]) -> None:
        before = self.free()
        work()
        self.taken += before - self.free()


@dataclass(frozen=True)
class Cost:
    """What a decoder has to move for a step, and to multiply for a prefill, whoever does it."""

    step_bytes: int
    prefill_operations: int


def cost(spec: ModelSpec, weights: int, cache_bytes_a_token: int, prefix: int, steps: int) -> Cost:
    """A step reads every weight and the cache, at its mean length; a prefill multiplies each token by every matrix of the layers, the
    last by the output matrix, and every token's query by every token's key and value."""
    t = spec.text
    matrices = sum(
        prod(shape)
        for name, shape in weight_shapes(spec).items()
        if name.startswith("language_model") and name.endswith("_proj.weight")
    )
    attention = 4 * t.depth * t.heads * t.head_dim * prefix**2
    return Cost(weights + cache_bytes_a_token * (prefix + steps // 2), 2 * (matrices * prefix + t.vocab * t.width) + attention)


def shares(m: Measurement, limits: Measurement, of: Cost, multiplies: str) -> dict[str, float]:
    """Of the bytes a second and the operations a second that the limits reached, by medians."""
    copy = limits.facts["copied"] / median(limits.seconds["copy"])
    found = {"step_of_bandwidth": of.step_bytes / median(m.seconds["step"]) / copy}
    if multiplies in limits.seconds:
        rate = limits.facts["operations"] / median(limits.seconds[multiplies])
        found["prefill_of_products"] = of.prefill_operations / median(m.seconds["prefill"]) / rate
    return found


@dataclass(frozen=True)
class Made:
    """A bundle in one engine, or why there is none."""

    engine: str
    precision: str
    bundle: Path
    reason: str | None = None

    @property
    def label(self) -> str:
        return f"{self.engine} {self.precision}"


def installed() -> list[str]:
    return [engine for engine, module in MODULES.items() if importlib.util.find_spec(module)]


def prepare(args: argparse.Namespace, res: int) -> list[Made]:
    """The checkpoint, the bundles of all engines, and what transformers says, each unless --scratch has it."""
    folder = args.scratch / f"{args.size}-{res}"
    checkpoint, calibration, expected = folder / "checkpoint", folder / "calibration.safetensors", folder / "reference.npz"
    if not checkpoint.exists():
        write_checkpoint(checkpoint, shallow(published("paligemma2", args.size, res), args.depth))
    if not calibration.exists() and set(args.precision) & set(CALIBRATED):
        calibrate(CalibrateOptions(output=calibration, checkpoint=checkpoint, samples=1, moments=False))
    found = []
    for engine in args.engines:
        for precision in args.precision:
            target = ENGINES[engine]
            out = folder / f"{target}-{precision}"
            more = {"calibration": calibration} if precision in CALIBRATED else {}
            try:
                if not out.exists():
                    export(ExportOptions(output=out, checkpoint=checkpoint, precision=precision, target=target, parity=0, **more))
                found.append(Made(engine, precision, out))
            except PgxError as error:
                found.append(Made(engine, precision, out, str(error)))
    whole = [made.bundle for made in found if made.reason is None]
    if whole and not expected.exists():
        command = [sys.executable, str(ROOT / "benchmarks" / "parity_true_shapes.py"), str(checkpoint), str(whole[0])]
        subprocess.run([*command, "--part", "reference", "--out", str(expected)], check=True)
    return found


def ready(made: Made) -> Made:
    """Compiled, where its engine wants that."""
    if made.reason is None and ENGINES[made.engine] == "tensorrt":
        try:
            compile_bundle(CompileOptions(made.bundle, engine=made.engine))
        except PgxError as error:
            return replace(made, reason=str(error))
    return made


def parity(made: Made, expected: Path) -> dict[str, Any]:
    """Fed transformers' tokens: how far its logits lie from those of transformers in float32, of their largest."""
    reference = np.load(expected)
    tokens, wanted = reference["tokens"], reference["logits"]
    ids, pixels = inputs(made.bundle)
    try:
        with Pipeline.open(made.bundle, engine=made.engine) as pipeline:
            prefix = pipeline.prefix(pipeline.encode_pixels(pixels), ids)
            logits = [row.copy() for row in pipeline.teacher_forced(prefix, tokens[:-1].tolist())]
    except PgxError as error:
        return {"label": made.label, "reason": str(error)}
    got, scale = np.stack(logits), np.abs(wanted).max()
    error = np.abs(got - wanted).max(1) / scale
    return {
        "label": made.label, "steps": len(tokens), "tokens_equal": int((got.argmax(1) == tokens).sum()),
        "largest_error_of_logits_scale": float(error.max()), "median_error_of_logits_scale": float(np.median(error)),
    }  # fmt: skip


def row(m: Measurement, limits: Measurement, of: Cost, multiplies: str) -> dict[str, Any]:
    found = measurement_json(m)
    if m.reason is None and limits.reason is None:
        found["shares"] = shares(m, limits, of, multiplies)
    return found


def measure(args: argparse.Namespace, res: int, bundles: list[Made], free: Callable[[], int]) -> dict[str, Any]:
    """Everything in turn, the limits too, so that a GPU that slows down does it to all."""
    spec = shallow(published("paligemma2", args.size, res), args.depth)
    shared = {
        "size": args.size,
        "res": res,
        "depth": args.depth,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
    }
    if args.device == "cuda":
        shared |= {"device": "cuda", "compile": {"mode": "reduce-overhead"}, "bytes": COPIED, "side": SIDE}
    else:
        shared |= {"device": "cpu", "compile": {"backend": "eager"}, "bytes": COPIED >> 8, "side": SIDE >> 5}
    work = WholeAnswers(args.prompt_tokens, args.new_tokens)
    here = [sys.executable, __file__, "--serve"]
    with ExitStack() as stack:
        whole = [made for made in bundles if made.reason is None]
        workers = [worker(made.label, str(made.bundle), work, engine=made.engine) for made in whole]
        workers += [Worker(peer, here, shared | {"peer": peer}) for peer in (*args.peers, "limits")]
        watched = [Held(stack.enter_context(one), free) for one in workers]
        measured = [with_ttft(m) for m in interleave(watched, args.repeat, lambda what: print(what, file=sys.stderr))]  # type: ignore[arg-type]
    ours, others, limits = measured[: len(whole)], measured[len(whole) : -1], measured[-1]
    prefix, kv = spec.image_tokens + args.prompt_tokens, 2 * spec.text.depth * spec.text.kv_heads * spec.text.head_dim
    rows = []
    for made, m in zip(whole, ours, strict=True):
        of = cost(spec, weight_bytes(Bundle.open(made.bundle, verify=False), "decoder_step"), 2 * kv, prefix, args.new_tokens)
        rows.append(row(m, limits, of, MULTIPLIES[made.precision]))
    for m in others:
        rows.append(row(m, limits, cost(spec, m.facts.get("decoder_bytes", 0), 2 * kv, prefix, args.new_tokens), "bfloat16"))
    return {
        "res": res, "limits": measurement_json(limits), "measured": rows, "ratios": ratios(ours, others),
        "not_measured": [{"label": made.label, "reason": made.reason} for made in bundles if made.reason],
    }  # fmt: skip


def open_subject(request: dict[str, Any]) -> Limits | Transformers:
    if request["peer"] == "limits":
        return Limits(request)
    return Transformers(shallow(published("paligemma2", request["size"], request["res"]), request["depth"]), request)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="a folder for checkpoints, bundles and logits, which are found there again")
    parser.add_argument("--size", default="3b")
    parser.add_argument("--res", nargs="*", type=int, choices=RESOLUTIONS, default=RESOLUTIONS)
    parser.add_argument("--depth", type=int, help="so many layers of both towers")
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=installed())
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries this script out, with --engines cpu")
    parser.add_argument("--precision", nargs="*", choices=MULTIPLIES, default=PRECISIONS)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--prepare", action="store_true", help="make what needs no GPU, and measure nothing")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(open_subject)
        return
    if args.scratch is None:
        parser.error("--scratch DIR is needed: 15 GB a resolution")
    made = {res: prepare(args, res) for res in args.res}
    if args.prepare:
        return
    gpu = ask_driver().gpus[0] if args.device == "cuda" else None  # or it ends here, with what is missing
    import torch

    def free() -> int:
        return int(torch.cuda.mem_get_info()[0]) if gpu else 0

    record: dict[str, Any] = {
        "what": f"paligemma2 {args.size}, random weights: an image and {args.prompt_tokens} tokens, then {args.new_tokens} steps",
        "command": "python benchmarks/on_gpu.py " + " ".join(Path(a).name if a.startswith("/") else a for a in sys.argv[1:]),
        "versions": versions(PACKAGES),
        "gpu": asdict(gpu) if gpu else None, "machine": describe_machine(), "depth": args.depth, "repetitions": args.repeat, "resolutions": [], "parity": [],
    }  # fmt: skip
    name = gpu.name.lower().replace(" ", "-") if gpu else "tried-out"
    out = args.json or (RESULTS if gpu else args.scratch) / f"on-gpu-{args.size}-{name}.json"
    for res, bundles in made.items():
        bundles = [ready(one) for one in bundles]
        expected = args.scratch / f"{args.size}-{res}" / "reference.npz"
        record["parity"] += [parity(one, expected) | {"res": res} for one in bundles if one.reason is None]
        record["resolutions"].append(measure(args, res, bundles, free))
        out.write_text(json.dumps(record, indent=1) + "\n")  # after each, for a GPU may be gone before the last
        print(f"{res} px: wrote {out}")


if __name__ == "__main__":
    try:
        main()
    except PgxError as error:
        raise SystemExit(f"on_gpu: {error}") from error
