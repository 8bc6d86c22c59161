# SPDX-License-Identifier: Apache-2.0
"""Calibrate on a float bundle: its graphs run by ONNX Runtime, each linear's input as one more output.

Memory holds the statistics of all layers at once, and the activations of one sample.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from pgxport.activations.encoding import EncodedSample, token_weights
from pgxport.activations.observe import InputObserver, Needs
from pgxport.activations.steps import linears
from pgxport.bundle.reader import Bundle
from pgxport.errors import NumericError, UsageError
from pgxport.exporter.stream import Progress
from pgxport.machine.memory import available_memory
from pgxport.models.spec import ModelSpec, TextSpec, VisionSpec
from pgxport.runners.image import pixel_values
from pgxport.runners.loop import Decoder
from pgxport.runners.ort import OrtCache, refusals
from pgxport.runners.pipeline import Pipeline
from pgxport.runners.session import Arrays
from pgxport.text import size

FOLDER = "session.model_external_initializers_file_folder_path"
GRAPHS = ("vision_encoder", "projector", "decoder_step")


def observe_bundle(bundle: Bundle, samples: Sequence[EncodedSample], needs: Needs, *, progress: Progress | None) -> InputObserver:
    """Run image, prefix and answer of every sample, the answer's tokens one by one as if generated.

    Raises:
        UsageError: the bundle is for another engine than ONNX Runtime's CPU, or multiplies by integers.
        NumericError: second moments of all layers do not fit into memory, or activations are not finite.
    """
    m = bundle.manifest
    if m.target != "cpu":
        raise UsageError(f"{bundle.path} is for target {m.target!r}; calibrate the checkpoint, or a bundle for target 'cpu'")
    shapes = linears(model_of(bundle))
    _check_memory(bundle, {path: s for path, s in shapes.items() if needs.moments is None or path in needs.moments})
    sessions = {name: _ObservedSession(bundle, name, shapes) for name in GRAPHS}
    observed = {path for session in sessions.values() for paths in session.observed.values() for path in paths}
    if hidden := sorted(shapes.keys() - observed):
        raise UsageError(
            f"{bundle.path} ({m.recipe}) does not multiply by {hidden[0]!r} in float, nor by {len(hidden) - 1} others; "
            f"calibrate the checkpoint, or a bundle of it with --precision fp32"
        )
    statistics = InputObserver(needs)
    weights_of = token_weights(samples, [m.image_tokens] * len(samples))
    pipeline = Pipeline(bundle, low_memory=True)  # for embeddings: it loads no graph until one is run
    for number, (sample, weights) in enumerate(zip(samples, weights_of, strict=True), 1):
        pixels = pixel_values(sample.sample.open(), m.resolution, m.pixels)[None]
        hidden_states = sessions["vision_encoder"].run({"pixel_values": pixels})["image_hidden"]
        features = sessions["projector"].run({"image_hidden": hidden_states})["image_features"]
        decoder = Decoder(sessions["decoder_step"], m, features.shape[1] + len(sample.prompt) + len(sample.answer))
        decoder.feed(pipeline.prefix(features, [m.token_ids.image] * m.image_tokens + list(sample.prompt)))
        for token in sample.answer:
            decoder.feed(pipeline.embed([token]))
        for name, session in sessions.items():
            session.hand_over(statistics, weights if name == "decoder_step" else None)
        for layer in range(m.cache.layers):
            for part in ("key", "value"):
                statistics.add_cache(layer, part, decoder.cache.arrays[f"past_key_values.{layer}.{part}"])
        if progress:
            progress("samples", number * pixels.nbytes, len(samples) * pixels.nbytes)
    return statistics


class _ObservedSession:
    """A `Session` of a bundle's graph, with the inputs of its linears as further outputs."""

    def __init__(self, bundle: Bundle, name: str, weights: Mapping[str, Any]):
        self._file = bundle.graph(name)
        model = ir.load(self._file)
        self.observed = _inputs_of(model.graph, weights)  # the weights that a value is multiplied by, by the value's name
        known = {value.name for value in (*model.graph.inputs, *model.graph.outputs)}
        values = {value.name: value for node in model.graph for value in node.outputs}
        for value in (values[name] for name in self.observed if name not in known):
            value.dtype = ir.DataType.FLOAT  # the type of every activation of a bundle for the CPU
            model.graph.outputs.append(value)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors; they are raised as well
        options.add_session_config_entry(FOLDER, str(bundle.path))
        with refusals(f"load {self._file}"):
            data = ir.to_proto(model).SerializeToString()
            self._session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self._outputs = [output.name for output in self._session.get_outputs()]
        self._collected: dict[str, list[np.ndarray]] = {name: [] for name in self.observed}

    def run(self, feeds: Mapping[str, np.ndarray], cache: Any = None) -> Arrays:
        with refusals(f"run {self._file}"):
            if cache is None:
                results = dict(zip(self._outputs, self._session.run(None, dict(feeds)), strict=True))
            else:
                for name, array in feeds.items():
                    cache.binding.bind_cpu_input(name, array)
                for name in cache.results:  # at every call: ONNX Runtime would keep the shapes of the prefix
                    cache.binding.bind_output(name, "cpu")
                self._session.run_with_iobinding(cache.binding)
                values = cache.binding.get_outputs_as_ortvaluevector()
                results = {name: values[i].numpy().copy() for i, name in enumerate(cache.results)}
        for name, arrays in self._collected.items():
            arrays.append(feeds[name] if name in feeds else results[name])
        return results

    def new_cache(self, shapes: Mapping[str, tuple[int, ...]]) -> OrtCache:
        return OrtCache(self._session, shapes, self._outputs)

    def close(self) -> None:
        del self._session

    def hand_over(self, statistics: InputObserver, weights: np.ndarray | None) -> None:
        """Add the inputs observed since the last call, x [1, T, K], each token by its weight [T]."""
        for name, arrays in self._collected.items():
            x = np.concatenate(arrays, 1)
            # The input of the output matrix is observed only at the tokens that an answer is read from.
            all_tokens = weights is not None and x.shape[1] == len(weights)
            statistics.add_input(self.observed[name], x, weights if all_tokens else None)
            arrays.clear()


def _inputs_of(graph: ir.Graph, weights: Mapping[str, Any]) -> dict[str, list[str]]:
    """The weights of the checkpoint that each value is multiplied by, by the value's name."""
    weights_of: dict[str, list[str]] = {}
    for node in graph:
        if node.op_type not in ("MatMul", "FusedMatMul"):
            continue
        x, weight = node.inputs[:2]
        if weight is not None and (cast := weight.producer()) and cast.op_type == "Cast":
            weight = cast.inputs[0]
        if x is None or weight is None or not weight.is_initializer():
            continue
        if x.name and weight.name and weight.name in weights:
            weights_of.setdefault(x.name, []).append(weight.name)
    return weights_of


def model_of(bundle: Bundle) -> ModelSpec:
    """The model that a bundle is of.

    Raises:
        UsageError: its manifest describes none that this pgx knows.
    """
    spec = bundle.manifest.spec
    try:
        return ModelSpec(spec["family"], VisionSpec(**spec["vision"]), TextSpec(**spec["text"]))
    except (KeyError, TypeError) as error:
        raise UsageError(
            f"{bundle.path}: its manifest describes no model that this pgx knows ({error}); export it again"
        ) from error


def _check_memory(bundle: Bundle, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse second moments that do not fit into memory: triangles, and once more as they are written."""
    # q, k and v share their input, and so do gate and up.
    sites = [s[1] for n, s in shapes.items() if not n.endswith(("k_proj.weight", "v_proj.weight", "up_proj.weight"))]
    needed, available = sum(4 * k * k for k in sites) + bundle.nbytes, available_memory()
    if available is not None and needed > available:
        raise NumericError(
            f"second moments of all layers of {bundle.path} take {size(needed)} of memory, and {size(available)} "
            f"are free; give the checkpoint, which is calibrated layer by layer, or --no-moments"
        )
