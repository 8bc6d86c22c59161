# SPDX-License-Identifier: Apache-2.0
"""The keys that the installed transformers reads from the files beside a PaliGemma's weights, by class, as JSON.

python tools/transformers_keys.py > tests/goldens/transformers-4.57-keys.json     # with that version in a venv of its own

Read from transformers itself: the parameters and fields of each class and its bases, what they take out of their keyword arguments
by name, what they write, and what the model's code asks its config for. transformers alone has to be installed, without torch.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TAKEN = re.compile(r"""kwargs\.(?:pop|get)\(\s*"(\w+)\"""")
ASKED = re.compile(r"""\bconfig\.(\w+)|getattr\(\s*(?:self\.)?\w*config,\s*"(\w+)\"""")
ROPE = re.compile(r"""rope_(?:parameters|parameters_dict|scaling)(?:\.get\(|\[)\s*"(\w+)\"""")
TAKERS = ("__init__", "__post_init__", "convert_rope_params_to_dict")  # the methods that are given a file's keys
CONFIGS = {
    "PaliGemmaConfig": "paligemma.modeling_paligemma", "GemmaConfig": "gemma.modeling_gemma", "Gemma2Config": "gemma2.modeling_gemma2",
    "SiglipVisionConfig": "siglip.modeling_siglip",
}  # fmt: skip
ARGUMENTS = {"self", "args", "kwargs"}


def taken(cls: type) -> set[str]:
    """What a class and its bases name of the keys they are given: parameters, fields, and keyword arguments they take out."""
    found: set[str] = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    for base in cls.__mro__:
        for method in (vars(base).get(name) for name in TAKERS):
            if inspect.isfunction(method) and method.__module__.startswith("transformers"):
                found |= set(inspect.signature(method).parameters)
                generated = inspect.unwrap(method).__code__.co_filename.startswith("<")  # a dataclass' own __init__ has no text
                found |= set() if generated else set(TAKEN.findall(inspect.getsource(method)))
    return found - ARGUMENTS


def source(module: str) -> str:
    """The text of a module of transformers, which is not imported: it may need torch."""
    spec = importlib.util.find_spec(f"transformers.{module}")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).read_text()


def config_keys(cls: Any, modelling: str) -> set[str]:
    """The keys of a config: what its class takes and writes, and what the model's code asks it for."""
    asked = {a or b for a, b in ASKED.findall(source(f"models.{modelling}"))}
    static = ((name, inspect.getattr_static(cls, name, None)) for name in asked)
    own = {name for name, of_class in static if not (callable(of_class) or isinstance(of_class, property))}
    return taken(cls) | set(cls().to_dict()) | set(cls.attribute_map) | own


def image_processor_keys() -> set[str]:
    """The keys of preprocessor_config.json, for the processor of either backend."""
    import transformers

    processor = transformers.SiglipImageProcessor
    found = taken(processor) | set(processor().to_dict())
    for module in ("transformers.processing_utils", "transformers.image_processing_utils_fast"):
        for name in ("ImagesKwargs", "DefaultFastImageProcessorKwargs"):
            found |= set(getattr(getattr(importlib.import_module(module), name, None), "__annotations__", ()))
    return found | set(re.findall(r"""image_processor_dict(?:\.pop|\.get)?[\[(]\s*"(\w+)\"""", source("image_processing_base")))


def processor_keys() -> set[str]:
    """The keys of processor_config.json."""
    import transformers

    read = re.findall(r"""processor_dict(?:\.pop|\.get)?[\[(]\s*"(\w+)\"|"(\w+)" in processor_dict""", source("processing_utils"))
    return taken(transformers.PaliGemmaProcessor) | {a or b for a, b in read} | {"processor_class", "auto_map"}


def sections() -> Iterator[tuple[str, set[str]]]:
    """Each class and its keys."""
    import transformers

    for name, modelling in CONFIGS.items():
        yield name, config_keys(getattr(transformers, name), modelling)
    yield "RopeParameters", set(ROPE.findall("".join(map(source, ("modeling_rope_utils", "models.gemma.modeling_gemma")))))
    yield "GenerationConfig", taken(transformers.GenerationConfig) | set(transformers.GenerationConfig().to_dict())
    yield "SiglipImageProcessor", image_processor_keys()
    yield "PaliGemmaProcessor", processor_keys()


def keys() -> dict[str, Any]:
    """The version of the installed transformers, and the keys of each class, sorted."""
    import transformers

    return {"transformers": transformers.__version__, "keys": {name: sorted(found) for name, found in sections()}}


if __name__ == "__main__":
    print(json.dumps(keys(), indent=1))
