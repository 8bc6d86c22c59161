# SPDX-License-Identifier: Apache-2.0
"""Every key that transformers reads from a file beside the weights is known to pgx, and read as transformers reads it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pgxport.bundle.manifest import Generation, Pixels
from pgxport.errors import CheckpointError
from pgxport.models.config import Gemma2Config, GemmaConfig, PaliGemmaConfig, RopeConfig, VisionConfig, read_config
from pgxport.models.generation_config import SAMPLING, SEARCH, GenerationConfig, read_generation, unheeded
from pgxport.models.processor_config import PictureSize, PreprocessorConfig, ProcessorConfig, read_pixels
from pgxport.models.schema import FileSchema
from pgxport.models.spec import published
from pgxport.runners.image import pixel_values

SCHEMAS = (
    PaliGemmaConfig, GemmaConfig, Gemma2Config, VisionConfig, RopeConfig, GenerationConfig, PreprocessorConfig, ProcessorConfig, PictureSize,
)  # fmt: skip
ROOT = Path(__file__).parents[2]
SPEC = published("paligemma", "3b", 224)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_each_key_has_one_treatment(schema: type[FileSchema]):
    treatments = [set(schema.model_fields), set(schema.no_effect), set(schema.kept), set(schema.only)]
    assert sum(map(len, treatments)) == len(schema.keys())
    assert all(schema.no_effect.values())


OF_CLASS: dict[str, type[FileSchema]] = {
    "PaliGemmaConfig": PaliGemmaConfig, "GemmaConfig": GemmaConfig, "Gemma2Config": Gemma2Config, "SiglipVisionConfig": VisionConfig,
    "RopeParameters": RopeConfig, "GenerationConfig": GenerationConfig, "SiglipImageProcessor": PreprocessorConfig,
    "PaliGemmaProcessor": ProcessorConfig,
}  # fmt: skip


def unknown(keys: dict[str, list[str]]) -> dict[str, list[str]]:
    """The keys of classes of transformers that the schemas say nothing about."""
    assert keys.keys() == OF_CLASS.keys()
    return {name: left for name, found in keys.items() if (left := sorted(set(found) - OF_CLASS[name].keys() - {"model_type"}))}


@pytest.mark.skipif(not (ROOT / "tools").exists(), reason="the wheel is tested without the repository")
def test_every_key_of_the_installed_transformers_is_known():
    pytest.importorskip("transformers")
    sys.path.insert(0, str(ROOT / "tools"))
    from transformers_keys import keys

    found = keys()["keys"]
    assert {"rope_theta", "hidden_act", "use_bidirectional_attention", "torch_dtype"} <= set(found["GemmaConfig"])
    assert {"repetition_penalty", "eos_token_id", "stop_strings"} <= set(found["GenerationConfig"])
    assert {"image_mean", "resample", "image_seq_length"} <= set(found["SiglipImageProcessor"])
    assert unknown(found) == {}


def test_every_key_of_transformers_4_57_is_known():
    golden = json.loads((ROOT / "tests" / "goldens" / "transformers-4.57-keys.json").read_text())
    assert golden["transformers"].startswith("4.57.")
    assert unknown(golden["keys"]) == {}


def test_a_key_that_no_schema_knows_is_found():
    assert unknown({name: ["model_type", "new_key"] if name == "GemmaConfig" else [] for name in OF_CLASS}) == {
        "GemmaConfig": ["new_key"]
    }


def test_the_defaults_are_those_of_transformers_classes():
    transformers = pytest.importorskip("transformers")
    for name, schema in (("GemmaConfig", GemmaConfig), ("Gemma2Config", Gemma2Config), ("SiglipVisionConfig", VisionConfig)):
        theirs = {f.name: f.default for f in dataclasses.fields(getattr(transformers, name))}
        for key, field in schema.model_fields.items():
            if key in theirs and key not in ("model_type", "layer_types"):
                assert field.default == theirs[key], f"{name}.{key}"


# Generation ------------------------------------------------------------------------------------------------------------

CONFIG = {"model_type": "paligemma"}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "one": (CONFIG, {"eos_token_id": 1}),
    "a list": (CONFIG, {"eos_token_id": [1, 107]}),
    "the file goes before config.json": ({**CONFIG, "eos_token_id": 5}, {"eos_token_id": [7]}),
    "no file": ({**CONFIG, "eos_token_id": [3, 4]}, None),
    "no file, and the decoder's": ({**CONFIG, "text_config": {"model_type": "gemma", "eos_token_id": [1, 107]}}, None),
    "no file, and both": ({**CONFIG, "eos_token_id": 5, "text_config": {"model_type": "gemma2", "eos_token_id": [1, 107]}}, None),
    "a length": (CONFIG, {"eos_token_id": 1, "max_new_tokens": 40}),
    "no file, a length": ({**CONFIG, "max_new_tokens": 40, "eos_token_id": 1}, None),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_stop_tokens_and_lengths_are_those_of_transformers(case: str, tmp_path: Path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from reference import random_paligemma

    config, generation = CASES[case]
    random_paligemma(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    text = {**written["text_config"], **{k: v for k, v in config.get("text_config", {}).items() if k != "model_type"}}
    (tmp_path / "config.json").write_text(json.dumps({**written, **config, "text_config": text}))
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    theirs = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path).generation_config
    ours = read_generation(json.loads((tmp_path / "config.json").read_text()), generation)
    ends = theirs.eos_token_id
    assert list(ours.stop) == (ends if isinstance(ends, list) else [ends])
    assert ours.max_new_tokens == theirs.max_new_tokens


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"eos_token_id": "1"}, "eos_token_id is '1'"),
        ({"eos_token_id": [1, None]}, "eos_token_id"),
        ({"eos_token_id": True}, "eos_token_id"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": 10**30}, "eos_token_id"),
        ({"eos_token_id": list(range(5000))}, "eos_token_id"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 10**12}, "max_new_tokens"),
        ({"max_new_tokens": "auto"}, "max_new_tokens"),
        ({"bad_words_ids": [[1]] * 50_000}, "bad_words_ids has more"),
    ],
)
def test_a_generation_config_that_is_none_is_refused_by_name(values: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        read_generation(CONFIG, values)


@pytest.mark.parametrize(
    ("values", "kept", "said"),
    [
        ({}, {}, []),
        (
            {"do_sample": False, "temperature": 1.0, "top_k": 50, "repetition_penalty": 1.0, "num_beams": 1, "pad_token_id": 0},
            {},
            [],
        ),
        ({"repetition_penalty": 1.2}, {"repetition_penalty": 1.2}, ["repetition_penalty"]),
        ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}, []),  # nothing without do_sample
        ({"do_sample": True, "temperature": 0.6}, {"do_sample": True, "temperature": 0.6}, ["do_sample", "temperature"]),
        ({"num_beams": 4, "length_penalty": 2.0}, {"num_beams": 4, "length_penalty": 2.0}, ["num_beams"]),
        ({"suppress_tokens": [5], "a_key_of_nobody": 1}, {"suppress_tokens": [5]}, ["suppress_tokens"]),
        ({"max_length": 300}, {"max_length": 300}, []),
    ],
)
def test_what_greedy_answers_do_not_heed_is_kept_and_said(values: dict[str, Any], kept: dict[str, Any], said: list[str]):
    read = read_generation(CONFIG, values)
    assert read.kept == kept
    assert unheeded(read) == said
    assert Generation.model_validate_json(read.model_dump_json()) == read


def test_the_lists_of_what_is_said_name_keys_that_are_kept():
    assert GenerationConfig.kept.keys() >= SAMPLING | SEARCH


# Pixels ------------------------------------------------------------------------------------------------------------------

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (97, 150, 3), np.uint8))
PROCESSORS: dict[str, dict[str, Any]] = {
    "PaliGemma's": {},
    "ImageNet's": {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
    "one number": {"image_mean": 0.4, "image_std": 0.3},
    "no normalization": {"do_normalize": False},
    "no rescaling": {"do_rescale": False},
    "neither": {"do_rescale": False, "do_normalize": False},
    "another factor": {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
    "no conversion": {"do_convert_rgb": False},
    **{f"resample {n}": {"resample": n} for n in range(6)},
}  # fmt: skip


@pytest.mark.parametrize("case", PROCESSORS)
@pytest.mark.parametrize("file", ["preprocessor_config.json", "processor_config.json"])
def test_pixels_are_those_of_transformers_processor(case: str, file: str):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    values = {"size": {"height": 224, "width": 224}, "image_seq_length": 256, **PROCESSORS[case]}
    theirs = SiglipImageProcessorPil(**values)(images=PICTURE, return_tensors="np")["pixel_values"][0]
    nested = file == "processor_config.json"
    # The nested object goes before the other file, which would be refused.
    pixels = read_pixels({"resample": 77} if nested else values, {"image_processor": values} if nested else None, SPEC)
    ours = pixel_values(PICTURE, 224, pixels)
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs).max() <= 1e-6 * max(1.0, np.abs(theirs).max())
    assert Pixels.model_validate_json(pixels.model_dump_json()) == pixels


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"image_std": [0.5, 0.0, 0.5]}, "image_std"),
        ({"image_std": 0}, "image_std"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_mean": "0.5"}, "image_mean"),
        ({"image_mean": [0.5, None, 0.5]}, "image_mean"),
        ({"resample": 6}, "resample is '6'"),
        ({"resample": True}, "resample"),
        ({"rescale_factor": 0}, "rescale_factor"),
        ({"rescale_factor": float("inf")}, "rescale_factor"),
        ({"do_normalize": "yes"}, "do_normalize"),
        ({"do_resize": False}, "as large as they are"),
        ({"do_center_crop": True}, "cuts pictures"),
        ({"do_pad": True}, "adds borders"),
        ({"image_processor_type": "CLIPImageProcessor"}, "CLIPImageProcessor"),
        ({"feature_extractor_type": "ViTFeatureExtractor"}, "ViTFeatureExtractor"),
        ({"size": {"shortest_edge": 224}}, "keeps the aspect"),
        ({"size": 224}, "size"),
        ({"size": {"height": 224, "width": 448}}, "224 × 448"),
        ({"size": {"height": 448, "width": 448}}, "reads 224 × 224"),
        ({"size": {"height": 10**12, "width": 10**12}}, "height"),
        ({"image_seq_length": 1024}, "image_seq_length is 1024"),
    ],
)
def test_a_processor_that_pgx_does_not_compute_is_refused_by_name(values: dict[str, Any], named: str):
    with pytest.raises(CheckpointError, match=named):
        read_pixels(values, None, SPEC)
    with pytest.raises(CheckpointError, match=named):
        read_pixels(None, {"image_processor": values}, SPEC)


@pytest.mark.parametrize("key", ["image_processor_type", "feature_extractor_type"])
@pytest.mark.parametrize(
    "name", ["SiglipImageProcessor", "SiglipImageProcessorFast", "SiglipImageProcessorPil", "ViTImageProcessor", None]
)
def test_a_class_is_read_where_transformers_takes_it_for_siglips(key: str, name: str | None, tmp_path: Path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    values = {"size": {"height": 224, "width": 224}, key: name}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "paligemma"}))
    theirs = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    if not type(theirs).__name__.startswith("SiglipImageProcessor"):
        with pytest.raises(CheckpointError, match=str(name)):
            read_pixels(values, None, SPEC)
        return
    pixels = np.asarray(theirs(images=PICTURE, return_tensors="np")["pixel_values"][0])
    assert np.abs(pixel_values(PICTURE, 224, read_pixels(values, None, SPEC)) - pixels).max() <= 1e-6


def test_without_either_file_pixels_are_paligemmas():
    assert read_pixels(None, None, SPEC) == read_pixels({}, {}, SPEC) == Pixels()


@pytest.mark.parametrize("values", [[], "x", None, {"text_config": 5}, {"model_type": "paligemma", "vision_config": "x"}])
def test_a_config_that_is_no_object_is_refused(values: Any):
    with pytest.raises(CheckpointError):
        read_config(values)


def test_the_document_says_what_the_schemas_say():
    tool = Path(__file__).parents[2] / "tools" / "checkpoint_keys.py"
    if not tool.exists():
        pytest.skip("the wheel is tested without the repository")
    done = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
