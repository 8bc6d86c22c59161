# SPDX-License-Identifier: Apache-2.0
"""pgx bundles, transformers and llama.cpp in turn: true shapes, random weights, an image and a prompt, then decode steps.

python tools/make_checkpoint.py --size 3b --res 448 ck
pgx export --checkpoint ck --precision int4 -o b-int4
python benchmarks/against_peers.py --size 3b --res 448 --threads 2 b-int4

Every peer has a process of its own and one works at a time; all are in memory together. transformers is made from the config in
bfloat16 and never written, or in float32 (transformers-float32, 12 GB for 3b), for processors that have no bfloat16. llama.cpp runs
the text part alone, quantized to Q4_0 by its own quantizer from a file made here (5 GB in --scratch, for 3b), where llama-cpp-python and gguf are installed: here, or in the environment of --llama-python. Where it crashes
on a CPU with AMX (0.3.36 does in its own AMX kernel), build it with CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON …".
"""

import argparse
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from make_checkpoint import BOS, IMAGE, NEWLINE, Pool, config, distribution, shallow  # noqa: E402

from pgxport.benchmarking.bench import labels, measurement_json  # noqa: E402
from pgxport.benchmarking.intervals import paired_ratio, verdict  # noqa: E402
from pgxport.benchmarking.measure import WARM_UP_STEPS, WholeAnswers, worker  # noqa: E402
from pgxport.benchmarking.worker import Measurement, Worker, environment, interleave, serve  # noqa: E402
from pgxport.machine.conditions import describe_machine, versions  # noqa: E402
from pgxport.models.spec import RESOLUTIONS, TEXT, ModelSpec, published  # noqa: E402

STAGES = ("vision", "prefill", "ttft", "step")
PEERS = ("transformers-static", "transformers-dynamic", "transformers-float32", "llama")


class Transformers:
    """PaliGemma in bfloat16 or float32, decoding greedily; attention is transformers' own choice, which is eager for Gemma 2."""

    def __init__(self, request: dict[str, Any]):
        import torch
        from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration
        from transformers.initialization import no_init_weights

        spec, threads = described(request), request["threads"]
        if threads:
            torch.set_num_threads(threads)
        precision = "float32" if request["peer"] == "transformers-float32" else "bfloat16"
        dtype = getattr(torch, precision)
        torch.set_default_dtype(dtype)
        with no_init_weights():
            self._model = PaliGemmaForConditionalGeneration(PaliGemmaConfig.from_dict(config(spec, precision))).eval()
        self._model.tie_weights()  # which no_init_weights leaves out
        normal = torch.randn(1 << 20)
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                mean, deviation = distribution(name.removeprefix("model."), tuple(parameter.shape))
                pool = (mean + deviation * normal).to(dtype)
                for piece in parameter.view(-1).split(len(pool)):
                    piece.copy_(pool[: len(piece)])
        self._clock: dict[str, float] = {}
        self._time(self._model.model.vision_tower, "vision")
        self._time(self._model.model.multi_modal_projector, "projector")
        ids = torch.from_numpy(prefix_ids(spec, request["prompt_tokens"]))[None]
        self._inputs = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids),
            "pixel_values": torch.randn(1, 3, spec.resolution, spec.resolution),
        }  # fmt: skip
        self._new_tokens, self._static = request["new_tokens"], request["peer"] != "transformers-dynamic"
        attention = {
            part: m.config._attn_implementation
            for part, m in (("vision", self._model.model.vision_tower), ("text", self._model.model.language_model))
        }
        self.facts = {
            "precision": precision, "attention": attention, "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in self._model.parameters()), "versions": versions(["torch", "transformers"]),
        }  # fmt: skip
        self.opening: dict[str, float] = {}

    def repeat(self, *, warm_up: bool) -> dict[str, float]:
        import torch
        from transformers import DynamicCache, StaticCache

        steps = min(WARM_UP_STEPS, self._new_tokens) if warm_up else self._new_tokens
        text, length = self._model.config.get_text_config(), self._inputs["input_ids"].shape[1]
        # Not generate(): with a static cache it hands PaliGemma 2 a mask that its forward does not take (5.23).
        with torch.inference_mode():
            start = time.perf_counter()
            cache = StaticCache(text, max_cache_len=length + self._new_tokens) if self._static else DynamicCache(config=text)
            token = self._next(**self._inputs, past_key_values=cache)
            first, start = time.perf_counter() - start, time.perf_counter()
            for i in range(1, steps + 1):
                token = self._next(input_ids=token, attention_mask=torch.ones(1, length + i, dtype=int), past_key_values=cache)
            decode = time.perf_counter() - start
        return {**self._clock, "prefill": first - sum(self._clock.values()), "step": decode / steps}

    def _next(self, **inputs: Any) -> Any:
        return self._model(**inputs, logits_to_keep=1, use_cache=True).logits[:, -1:].argmax(-1)

    def _time(self, module: Any, stage: str) -> None:
        started = []
        module.register_forward_pre_hook(lambda *_: started.append(time.perf_counter()))
        module.register_forward_hook(lambda *_: self._clock.__setitem__(stage, time.perf_counter() - started.pop()))


class Llama:
    """llama.cpp through its C interface: the Python class on top would keep logits of a whole batch."""

    def __init__(self, request: dict[str, Any]):
        import llama_cpp as c

        self._c, spec = c, described(request)
        c.llama_backend_init()
        start = time.perf_counter()
        self._model = c.llama_model_load_from_file(request["gguf"].encode(), c.llama_model_default_params())
        if not self._model:
            raise OSError(f"llama.cpp cannot load {request['gguf']}")
        self.opening = {"load": time.perf_counter() - start}
        self._prefix, self._new_tokens = spec.image_tokens + request["prompt_tokens"], request["new_tokens"]
        params = c.llama_context_default_params()
        params.n_ctx = self._prefix + self._new_tokens
        params.n_batch = self._prefix  # 2,048 unless told
        if request["threads"]:
            params.n_threads = params.n_threads_batch = request["threads"]
        self._context, self._vocab = c.llama_init_from_model(self._model, params), spec.text.vocab
        self._ids = np.random.default_rng(0).integers(self._vocab, size=self._prefix)
        self.facts = {
            "precision": "Q4_0", "threads": c.llama_n_threads(self._context), "bytes": Path(request["gguf"]).stat().st_size,
            "text_only": True, "versions": {"llama-cpp-python": c.__version__},
        }  # fmt: skip

    def repeat(self, *, warm_up: bool) -> dict[str, float]:
        self._c.llama_memory_clear(self._c.llama_get_memory(self._context), True)
        steps = min(WARM_UP_STEPS, self._new_tokens) if warm_up else self._new_tokens
        start = time.perf_counter()
        token = self._feed(self._ids.tolist())
        prefill, start = time.perf_counter() - start, time.perf_counter()
        for _ in range(steps):
            token = self._feed([token])
        return {"prefill": prefill, "step": (time.perf_counter() - start) / steps}

    def _feed(self, ids: list[int]) -> int:
        tokens = (ctypes.c_int32 * len(ids))(*ids)  # the batch only points to them
        if code := self._c.llama_decode(self._context, self._c.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError(f"llama_decode gave {code}")
        logits = self._c.llama_get_logits_ith(self._context, -1)
        return int(np.ctypeslib.as_array(logits, (self._vocab,)).argmax())


def write_gguf(spec: ModelSpec, out: Path) -> None:
    """The text part as llama.cpp reads it: written in float16, then quantized by llama.cpp to its Q4_0."""
    import gguf
    import llama_cpp as c

    t, arch = spec.text, "gemma2" if spec.family == "paligemma2" else "gemma"
    half = out.with_suffix(".f16")
    writer = gguf.GGUFWriter(half, arch)
    writer.add_context_length(8192)
    writer.add_embedding_length(t.width)
    writer.add_block_count(t.depth)
    writer.add_feed_forward_length(t.mlp)
    writer.add_head_count(t.heads)
    writer.add_head_count_kv(t.kv_heads)
    writer.add_key_length(t.head_dim)
    writer.add_value_length(t.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(t.vocab)
    writer.add_tokenizer_model("no_vocab")
    if arch == "gemma2":
        writer.add_attn_logit_softcapping(t.attn_softcap)
        writer.add_final_logit_softcapping(t.logit_softcap)
        writer.add_sliding_window(t.window)
    shapes = dict(gguf_shapes(spec))
    for name, shape in shapes.items():
        kind = np.dtype(np.float16 if len(shape) > 1 else np.float32)
        writer.add_tensor_info(name, shape, kind, int(np.prod(shape)) * kind.itemsize)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    pools = {1: Pool(np.dtype(np.float32), 0), 2: Pool(np.dtype(np.float16), 0)}
    for name, shape in shapes.items():
        blocks = b"".join(bytes(block) for block in pools[len(shape)].blocks(name, shape))
        writer.write_tensor_data(np.frombuffer(blocks, np.float16 if len(shape) > 1 else np.float32).reshape(shape))
    writer.close()
    params = c.llama_model_quantize_default_params()
    params.ftype = c.LLAMA_FTYPE_MOSTLY_Q4_0
    partial = out.with_suffix(".partial")
    if code := c.llama_model_quantize(str(half).encode(), str(partial).encode(), ctypes.byref(params)):
        raise SystemExit(f"llama_model_quantize gave {code}")
    half.unlink()
    partial.rename(out)


def gguf_shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, ...]]]:
    """llama.cpp's names; the table is the output matrix too."""
    t = spec.text
    yield "token_embd.weight", (t.vocab, t.width)
    yield "output_norm.weight", (t.width,)
    norms = ("attn_norm", "ffn_norm", "post_attention_norm", "post_ffw_norm") if t.post_norms else ("attn_norm", "ffn_norm")
    query, kv = t.heads * t.head_dim, t.kv_heads * t.head_dim
    for i in range(t.depth):
        for norm in norms:
            yield f"blk.{i}.{norm}.weight", (t.width,)
        yield f"blk.{i}.attn_q.weight", (query, t.width)
        yield f"blk.{i}.attn_k.weight", (kv, t.width)
        yield f"blk.{i}.attn_v.weight", (kv, t.width)
        yield f"blk.{i}.attn_output.weight", (t.width, query)
        yield f"blk.{i}.ffn_gate.weight", (t.mlp, t.width)
        yield f"blk.{i}.ffn_up.weight", (t.mlp, t.width)
        yield f"blk.{i}.ffn_down.weight", (t.width, t.mlp)


def prefix_ids(spec: ModelSpec, prompt_tokens: int) -> np.ndarray:
    words = np.random.default_rng(0).integers(NEWLINE + 1, 50_000, size=prompt_tokens - 2)
    return np.array([*[IMAGE] * spec.image_tokens, BOS, *words, NEWLINE], np.int64)


def described(request: dict[str, Any]) -> ModelSpec:
    return shallow(published(request["family"], request["size"], request["res"]), request["depth"])


def open_peer(request: dict[str, Any]) -> Transformers | Llama:
    return Llama(request) if request["peer"] == "llama" else Transformers(request)


def with_ttft(m: Measurement) -> Measurement:
    """Time to the first token from pixels that are ready, which all can tell that see the image at all."""
    if "vision" in m.seconds and "prefill" in m.seconds:
        m.seconds["ttft"] = [
            sum(parts) for parts in zip(*(m.seconds[s] for s in ("vision", "projector", "prefill")), strict=True)
        ]
    return m


def ratios(bundles: list[Measurement], peers: list[Measurement]) -> list[dict[str, Any]]:
    """How many times as long a peer took as a bundle, paired by repetition."""
    rows = []
    for bundle in bundles:
        for peer in peers:
            for stage in STAGES:
                if not bundle.reason and not peer.reason and stage in bundle.seconds and stage in peer.seconds:
                    ratio = paired_ratio(bundle.seconds[stage], peer.seconds[stage])
                    pairs = [p / b for b, p in zip(bundle.seconds[stage], peer.seconds[stage], strict=True)]
                    row = {"bundle": bundle.label, "peer": peer.label, "stage": stage, "peer_over_bundle": pairs}
                    row |= {"mean": ratio.value, "low": ratio.low, "high": ratio.high} if ratio else {}
                    rows.append(row | {"says": verdict(bundle.label, peer.label, ratio)})
    return rows


def llama_peer(args: argparse.Namespace, request: dict[str, Any], scratch: Path) -> tuple[list[str], dict[str, Any]]:
    """The command and the request of the worker; the file is made unless --scratch has it.

    Raises:
        OSError: llama-cpp-python or gguf is not installed, or the file cannot be made.
    """
    tried = subprocess.run([args.llama_python, "-c", "import llama_cpp, gguf"], capture_output=True, text=True, check=False)
    if tried.returncode:
        raise OSError(f"{tried.stderr.strip().splitlines()[-1]} in {args.llama_python}; pip install llama-cpp-python gguf")
    depth = f"-depth{args.depth}" if args.depth else ""
    gguf = scratch / f"{args.family}-{args.size}-{args.res}{depth}-Q4_0.gguf"
    command = [args.llama_python, __file__]
    if not gguf.exists():
        print(f"writing {gguf}", file=sys.stderr)
        write = [*command, "--write-gguf", json.dumps(request | {"gguf": str(gguf)})]
        made = subprocess.run(write, env=environment(), capture_output=True, text=True, check=False)
        if made.returncode:
            raise OSError(f"the GGUF was not made: {made.stderr.strip().splitlines()[-1]}")
    return [*command, "--serve"], request | {"gguf": str(gguf)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*")
    parser.add_argument("--size", choices=sorted({size for _, size in TEXT}), default="3b")
    parser.add_argument("--res", type=int, choices=RESOLUTIONS, default=448)
    parser.add_argument("--family", choices=sorted({family for family, _ in TEXT}), default="paligemma2")
    parser.add_argument("--depth", type=int, help="so many layers of both towers, as in tools/make_checkpoint.py")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--peers", default="transformers-static,transformers-dynamic,llama", help=f"of {', '.join(PEERS)}")
    parser.add_argument("--llama-python", default=sys.executable, help="the interpreter that has llama-cpp-python and gguf")
    parser.add_argument("--scratch", type=Path, help="keep the GGUF here")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--write-gguf", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(open_peer)
        return
    if args.write_gguf:
        write_gguf(described(args.write_gguf), Path(args.write_gguf["gguf"]))
        return
    peers = args.peers.split(",") if args.peers else []
    if unknown := set(peers) - set(PEERS):
        parser.error(f"--peers {', '.join(unknown)}: choose of {', '.join(PEERS)}")
    measure(args, peers)


def measure(args: argparse.Namespace, peers: list[str]) -> None:
    conditions = describe_machine()
    shared = {key: vars(args)[key] for key in ("family", "size", "res", "depth", "threads", "prompt_tokens", "new_tokens")}
    work, skipped = WholeAnswers(args.prompt_tokens, args.new_tokens), []
    with ExitStack() as stack:
        scratch = args.scratch or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workers = [
            worker(label, path, work, threads=args.threads)
            for label, path in zip(labels(Path(b).name for b in args.bundles), args.bundles, strict=True)
        ]
        for peer in peers:
            command, request = [sys.executable, __file__, "--serve"], shared | {"peer": peer}
            if peer == "llama":
                try:
                    command, request = llama_peer(args, request, scratch)
                except OSError as error:
                    skipped.append({"label": peer, "status": "skipped", "reason": str(error)})
                    continue
            workers.append(Worker(peer, command, request))
        for one in workers:
            stack.enter_context(one)
        measured = [with_ttft(m) for m in interleave(workers, args.repeat, lambda what: print(what, file=sys.stderr))]
    bundles, others = measured[: len(args.bundles)], measured[len(args.bundles) :]
    depth = f"-depth{args.depth}" if args.depth else ""
    record = {
        "what": f"{args.family} {args.size} at {args.res} px, random weights: an image and {args.prompt_tokens} tokens, then {args.new_tokens} steps",
        "command": "python benchmarks/against_peers.py "
        + " ".join(Path(a).name if a.startswith("/") else a for a in sys.argv[1:]),
        "machine": conditions,
        **shared,
        "repetitions": args.repeat,
        "measured": [measurement_json(m) for m in measured] + skipped,
        "ratios": ratios(bundles, others),
    }
    for m in record["measured"]:
        stages = {s: round(v["median"], 4) for s, v in m.get("stages", {}).items() if s in STAGES}
        print(m["label"], m["reason"] or stages)
    for row in record["ratios"]:
        print(f"{row['stage']}: {row['says']}")
    out = args.json or ROOT / "benchmarks" / "results" / f"against-peers-{args.size}-{args.res}{depth}.json"
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
