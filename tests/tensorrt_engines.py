# SPDX-License-Identifier: Apache-2.0
"""Run a bundle of target `tensorrt` without a GPU: ONNX Runtime, OpenVINO, ONNX's reference evaluator."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort

from pgxport.bundle.manifest import Manifest
from pgxport.bundle.reader import Bundle
from pgxport.models.eager import TokenizedSample

Arrays = dict[str, np.ndarray]
Engine = Callable[[Path], Callable[[Arrays], Arrays]]
STALE = 7.0  # the value of cache rows that are not written yet, which nothing may read


def onnxruntime(file: Path) -> Callable[[Arrays], Arrays]:
    """Run node by node: optimized kernels for integer matrices would round activations too."""
    options = ort.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    names = [o.name for o in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(None, feeds), strict=True))


def openvino(file: Path) -> Callable[[Arrays], Arrays]:
    import openvino

    model = openvino.Core().compile_model(
        str(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "KV_CACHE_PRECISION": "f32"}
    )
    return lambda feeds: {next(iter(o.names)): np.array(v) for o, v in model(feeds).items()}


def reference(file: Path) -> Callable[[Arrays], Arrays]:
    """ONNX's reference evaluator: numpy, operator by operator; it has bfloat16 and TensorScatter."""
    from onnx.reference import ReferenceEvaluator

    graph = ReferenceEvaluator(str(file))
    return lambda feeds: dict(zip(graph.output_names, graph.run(None, feeds), strict=True))


class Decoder:
    """The decoder graph and its cache, with the inputs that docs/reference/tensorrt-dialect.md describes."""

    def __init__(self, run: Callable[[Arrays], Arrays], manifest: Manifest, rows: int):
        self.run, self.manifest, self.length = run, manifest, 0
        cache = manifest.cache
        self.rows = manifest.context_length if cache.kind == "update" else rows
        shape = (self.rows, cache.kv_heads) if cache.kind == "delta" else (cache.kv_heads, self.rows)
        names = [f"{i}.{part}" for i in range(cache.layers) for part in ("key", "value")]
        self.cache = {n: np.full((1, *shape, cache.head_dim), STALE, cache.dtype) for n in names}

    def feed(self, embeds: np.ndarray) -> Arrays:
        """embeds [1, T, H], a prefix, then one token at a time -> the graph's outputs but for the cache"""
        tokens, before, kind = embeds.shape[1], self.length, self.manifest.cache.kind
        assert before == 0 or tokens == 1
        feeds: Arrays = {"inputs_embeds": embeds, "positions": np.arange(before, before + tokens)}
        past = {n: x[:, :1] if kind == "delta" and before == 0 else x for n, x in self.cache.items()}
        feeds |= {f"past_key_values.{n}": x for n, x in past.items()}
        feeds["visible"] = self._visible(tokens, None)
        if self.manifest.local_window is not None:
            feeds["local_visible"] = self._visible(tokens, self.manifest.local_window)
        if kind == "update":
            feeds["write_indices"] = np.array([before])
        outputs = self.run(feeds)
        self.length += tokens
        for name, whole in self.cache.items():
            new = outputs.pop(f"present.{name}")
            if kind == "delta":
                assert new.shape[1] == tokens
                whole[:, before : self.length] = new
            else:
                self.cache[name] = new
        return outputs

    def _visible(self, tokens: int, window: int | None) -> np.ndarray:
        """[1, 1, T, keys]: a prefix sees itself; a token itself and the keys before it in its window."""
        before = self.length
        if self.manifest.cache.kind == "delta":
            past = np.arange(1 if before == 0 else self.rows)
            shown = (past < before) & (window is None or before - past < (window or 0))
            row = np.concatenate([shown, np.ones(tokens, bool)])
        else:
            rows = np.arange(self.rows)
            row = rows < before + tokens
            if window is not None and before:
                row &= before - rows < window
        return np.broadcast_to(row, (1, 1, tokens, len(row))).copy()


def teacher_forced_logits(path: Path, engine: Engine, given: TokenizedSample) -> np.ndarray:
    """[answer tokens + 1, V], teacher-forced; checks the other outputs beside the logits too."""
    bundle = Bundle.open(path)
    m, table = bundle.manifest, bundle.token_table()
    hidden = engine(bundle.graph("vision_encoder"))({"pixel_values": given.pixels})["image_hidden"]
    features = engine(bundle.graph("projector"))({"image_hidden": hidden})["image_features"]

    def embed(ids: list[int]) -> np.ndarray:
        return (table.rows(ids) * np.float32(m.token_table.scale))[None]

    decoder = Decoder(engine(bundle.graph("decoder_step")), m, m.image_tokens + len(given.prompt) + len(given.answer) + 3)
    logits = []
    for embeds in [np.concatenate([features, embed(given.prompt)], 1), *(embed([t]) for t in given.answer)]:
        outputs = decoder.feed(embeds)
        assert outputs["next_token"].tolist() == [[outputs["logits"][0, 0].argmax()]]
        assert np.allclose(outputs["logits_square"], (outputs["logits"].astype(np.float64) ** 2).sum(), rtol=1e-4)
        logits.append(outputs["logits"][0, 0].copy())
    return np.stack(logits)
