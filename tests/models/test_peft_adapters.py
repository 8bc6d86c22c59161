# SPDX-License-Identifier: Apache-2.0
"""Adapters that PEFT writes, of every kind it can merge: the weights and logits are those of PEFT with the adapter loaded."""

import dataclasses
import json
import random
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("peft")
pytest.importorskip("torch")
pytest.importorskip("transformers")

import peft
import torch
import transformers
from reference import random_paligemma
from safetensors.torch import load_file, save_file

from pgxport.errors import CheckpointError
from pgxport.models import lora
from pgxport.models.adapter_config import IRRELEVANT, REFUSED, AdapterConfig
from pgxport.models.checkpoint import Checkpoint
from pgxport.models.safetensors import Tensor, read_header
from pgxport.models.weights import EMBEDDING, LM_HEAD, canonical

TEXT = ["self_attn.o_proj", "down_proj"]
EMBED = "model.language_model.embed_tokens"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folders = {family: tmp_path_factory.mktemp(family) for family in ("paligemma", "paligemma2")}
    for family, folder in folders.items():
        random_paligemma(folder, family=family, seed=9)
    return folders


@pytest.fixture(params=["paligemma", "paligemma2"])
def base(request: pytest.FixtureRequest, bases: dict[str, Path]) -> Path:
    return bases[request.param]


@pytest.fixture
def gemma2(bases: dict[str, Path]) -> Path:
    return bases["paligemma2"]


def fresh(base: Path) -> Any:
    return transformers.PaliGemmaForConditionalGeneration.from_pretrained(base, dtype=torch.float32)


def trained(base: Path, folder: Path, *, name: str = "default", seed: int = 11, **config: Any) -> Path:
    """Saves an adapter of random weights with PEFT; returns its folder."""
    kind = peft.AdaLoraConfig if "init_r" in config else peft.LoraConfig
    torch.manual_seed(seed)  # PEFT draws what A begins with from the generator that all tests share
    model = peft.get_peft_model(
        fresh(base), kind(**{"r": 3, "lora_alpha": 7, "target_modules": TEXT, **config}), adapter_name=name
    )
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_((0.1 if p.shape[0] > 100 else 0.2) * torch.randn(p.shape, generator=noise))
    model.save_pretrained(folder)
    return folder if name == "default" else folder / name


def loaded(base: Path, *folders: Path) -> Any:
    """The model that PEFT makes of a base and adapters one after the other; the last is not merged."""
    model = fresh(base)
    for folder in folders:
        model = peft.PeftModel.from_pretrained(model, folder)
        if folder != folders[-1]:
            model = model.merge_and_unload()
    return model.eval()


def merged(model: Any) -> dict[str, np.ndarray]:
    return {canonical(name): p.numpy() for name, p in model.merge_and_unload().state_dict().items()}


def stored(base: Path) -> dict[str, Tensor]:
    return {canonical(name): tensor for name, tensor in read_header(base / "model.safetensors").items()}


def adapted(base: Path, *folders: Path, tied: bool = True) -> dict[str, Tensor]:
    tensors: Mapping[str, Tensor] = stored(base)
    for folder in folders:
        tensors = lora.merge(tensors, folder, tied=tied).tensors
    return dict(tensors)


def rows(tensor: Tensor, block: int = 7) -> np.ndarray:
    return np.concatenate([tensor.rows(i, min(i + block, tensor.shape[0])) for i in range(0, tensor.shape[0], block)])


def of_weights(base: Path, tensors: Mapping[str, Tensor]) -> Any:
    """The base with these weights in place of its own, by transformers."""
    model = fresh(base)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    state = {canonical(name): p for name, p in model.state_dict().items()}
    assert state.keys() == {*tensors, LM_HEAD}
    with torch.no_grad():
        for name, p in state.items():
            p.copy_(torch.from_numpy(rows(tensors.get(name, tensors[EMBEDDING]))))
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[310] * 9 + [2, 17, 44, 5, 300, 108]])
    pixels = torch.randn(1, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(input_ids=ids, pixel_values=pixels, token_type_ids=torch.zeros_like(ids)).logits


def equal(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


LORA: dict[str, dict[str, Any]] = {
    "text": {},
    "both towers": {"target_modules": ["q_proj", "v_proj", "fc1"]},
    "every linear layer": {"target_modules": "all-linear", "r": 2},
    "rank-stabilized": {"use_rslora": True, "r": 5},
    "ranks and alphas by name": {
        "target_modules": ["q_proj", "k_proj", "fc2"], "rank_pattern": {"layers.1.self_attn.q_proj": 5, "fc2": 1},
        "alpha_pattern": {"^model.language_model.layers.0.self_attn.k_proj": 11, "k_proj": 13},
    },
    "ranks and alphas by pattern": {
        "target_modules": ["q_proj", "up_proj", "fc2"], "rank_pattern": {r"layers\.[1-9]\.(self_attn|mlp)\.(q|up)_proj": 5, r".*fc\d": 1},
        "alpha_pattern": {r"^(?!.*vision).*q_proj": 11, r"layers.(0|7).mlp.+": 2.5},
    },
    "target pattern": {"target_modules": r"^(?!.*vision_tower).*\.(?:up_proj|v_proj)"},
    "one layer": {"target_modules": ["up_proj"], "layers_to_transform": [1]},
    "one layer of the decoder": {"target_modules": ["v_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "all but some": {"target_modules": ["q_proj"], "exclude_modules": r".*vision_tower.*"},
    "all but some names": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
    "modules by the end of their names": {"modules_to_save": ["projector", "norm1", "language_model.norm"]},
    "another start": {"init_lora_weights": "gaussian"},
    "an orthogonal start": {"init_lora_weights": "orthogonal", "r": 4},
    "a mica start": {"init_lora_weights": "mica"},
    "fan in, fan out": {"fan_in_fan_out": True},
    "convolution": {"target_modules": ["patch_embedding", "q_proj"]},
    "positions": {"target_modules": ["position_embedding", "q_proj"]},
    "dora": {"use_dora": True},
    "dora of every linear layer": {"use_dora": True, "target_modules": "all-linear"},
    "dora, rank-stabilized, by name": {"use_dora": True, "use_rslora": True, "rank_pattern": {"o_proj": 4}},
    "dora of a convolution": {"use_dora": True, "target_modules": ["patch_embedding"]},
    "dora of positions": {"use_dora": True, "target_modules": ["position_embedding"]},
    "bias of B": {"target_modules": ["fc1", "out_proj", "linear"], "lora_bias": True},
    "biases, all": {"target_modules": ["fc1", "q_proj"], "bias": "all"},
    "biases of adapted layers": {"target_modules": ["fc1", "down_proj"], "bias": "lora_only"},
    "biases, all, and of B": {"target_modules": ["fc1"], "bias": "all", "lora_bias": True},
    "pissa": {"init_lora_weights": "pissa", "target_modules": ["q_proj", "up_proj", "down_proj"]},
    "pissa with dora": {"init_lora_weights": "pissa", "use_dora": True},
    "olora": {"init_lora_weights": "olora", "target_modules": ["q_proj", "up_proj", "down_proj"]},
    "adalora": {"init_r": 4, "target_modules": ["q_proj", "up_proj"], "total_step": 10},
    "adalora of a convolution": {"init_r": 4, "target_modules": ["patch_embedding"], "total_step": 10, "lora_alpha": 5},
}  # fmt: skip


BOTH = ("text", "every linear layer", "ranks and alphas by pattern", "dora of every linear layer", "biases, all, and of B")
IN_TURN = [
    (kind, f) for i, kind in enumerate(LORA) for j, f in enumerate(("paligemma", "paligemma2")) if kind in BOTH or i % 2 == j
]


@pytest.mark.parametrize(("kind", "family"), IN_TURN)
def test_merged_weights_are_those_that_peft_merges(bases: dict[str, Path], tmp_path: Path, kind: str, family: str):
    base = bases[family]
    folder = trained(base, tmp_path / "a", **LORA[kind])
    model = loaded(base, folder)
    their_logits, theirs = logits(model), merged(model)
    ours, before = adapted(base, folder), stored(base)
    changed = [name for name in ours if not np.array_equal(theirs[name], rows(before[name]))]
    assert changed
    for name, tensor in ours.items():
        # PEFT finds the singular vectors in float32, and two that are near to one another are told apart by few bits.
        atol = 1e-4 if "pissa" in kind else 3e-6
        np.testing.assert_allclose(rows(tensor), theirs[name], rtol=1e-5, atol=atol, err_msg=name)
        assert rows(tensor).dtype == tensor.dtype
        assert name in changed or tensor == before[name]
    assert equal(logits(of_weights(base, ours)), their_logits)


# What changes the embedding, the lm_head or both, and whether the two are one afterwards.
PAIRS: dict[str, tuple[dict[str, Any], bool]] = {
    "embedding, tied": ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
    "embedding by another end, tied": ({"modules_to_save": ["tokens"], "ensure_weight_tying": True}, False),
    "lm_head, tied": ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, True),
    "embedding": ({"modules_to_save": ["embed_tokens"]}, False),
    "lm_head": ({"modules_to_save": ["lm_head"]}, False),
    "embedding and lm_head": ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
    "tokens": ({"trainable_token_indices": [5, 44, 300, 319]}, True),
    "tokens out of order": ({"trainable_token_indices": {"embed_tokens": [300, 5]}}, True),
    "tokens of both": ({"trainable_token_indices": {"embed_tokens": [5, 44], "lm_head": [5, 44]}}, True),
    "tokens of both, differing": ({"trainable_token_indices": {"embed_tokens": [5, 44], "lm_head": [44, 17]}}, False),
    "tokens of the lm_head": ({"trainable_token_indices": {"lm_head": [44, 17]}}, False),
    "tokens and dora": ({"trainable_token_indices": [2, 44], "use_dora": True}, True),
    "lora of the embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, False),
    "lora of the lm_head": ({"target_modules": ["q_proj", "lm_head"]}, False),
    "lora of both": ({"target_modules": ["embed_tokens", "lm_head"]}, False),
    "lora of both, tied": ({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, True),
    "lora of both by pattern, tied": ({"target_modules": r"embed_tokens|.*q_proj", "ensure_weight_tying": True}, True),
    "dora of the embedding": ({"target_modules": ["embed_tokens"], "use_dora": True}, False),
    "dora of the lm_head": ({"target_modules": ["lm_head"], "use_dora": True}, False),
    "lora of the embedding, whole lm_head": ({"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]}, False),
}  # fmt: skip


@pytest.mark.parametrize("kind", PAIRS)
def test_an_adapted_embedding_and_lm_head_give_the_logits_of_peft(base: Path, tmp_path: Path, kind: str):
    config, one = PAIRS[kind]
    folder = trained(base, tmp_path / "a", **config)
    ours, theirs = adapted(base, folder), logits(loaded(base, folder))
    assert equal(logits(of_weights(base, ours)), theirs)
    assert not equal(logits(fresh(base)), theirs, 1e-2)
    assert one == (LM_HEAD not in ours or np.allclose(rows(ours[LM_HEAD]), rows(ours[EMBEDDING]), rtol=0, atol=1e-6))
    if one:
        tables = Checkpoint.open(base, [folder])
        assert np.array_equal(tables.rows(EMBEDDING, 0, 320), rows(ours[EMBEDDING]))


@pytest.mark.parametrize(
    "config", [{}, {"trainable_token_indices": [5, 44]}, {"target_modules": ["lm_head"]}], ids=["text", "tokens", "lm_head"]
)
def test_embeddings_that_peft_saves_beside_the_adapter_are_those_of_the_base(
    gemma2: Path, tmp_path: Path, config: dict[str, Any]
):
    torch.manual_seed(0)  # PEFT draws from the generator that all tests share
    model = peft.get_peft_model(fresh(gemma2), peft.LoraConfig(**{"target_modules": TEXT, "init_lora_weights": False, **config}))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.1)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert equal(logits(of_weights(gemma2, adapted(gemma2, tmp_path))), logits(loaded(gemma2, tmp_path)))


def rewritten(folder: Path, change: Callable[[str], str]) -> Path:
    """Renames the tensors of an adapter."""
    file = folder / "adapter_model.safetensors"
    save_file({change(name): tensor for name, tensor in load_file(file).items()}, file)
    return folder


def test_ranks_that_adalora_took_away_are_gone(gemma2: Path, tmp_path: Path):
    config = peft.AdaLoraConfig(init_r=3, target_modules=["q_proj"], exclude_modules=".*vision.*", total_step=10, lora_alpha=5)
    torch.manual_seed(0)  # PEFT draws from the generator that all tests share
    model, noise = peft.get_peft_model(fresh(gemma2), config), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".lora_" in name:
                p.add_(0.2 * torch.randn(p.shape, generator=noise))
    stem = "model.language_model.layers.{}.self_attn.q_proj.lora_E.default"
    masks = {0: [True, False, True], 1: [False] * 3, 2: [True] * 3}
    model.peft_config["default"].rank_pattern = {stem.format(i): mask for i, mask in masks.items()}
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")[f"base_model.model.{stem.format(1)[:-8]}"].shape == (0, 1)
    theirs = logits(loaded(gemma2, tmp_path))
    assert equal(logits(of_weights(gemma2, adapted(gemma2, tmp_path))), theirs)
    assert not equal(logits(fresh(gemma2)), theirs, 1e-2)


KINDS: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True}, "bias of B": {"target_modules": ["fc1"], "lora_bias": True}, "tokens": {"trainable_token_indices": [5]},
    "embedding": {"target_modules": ["embed_tokens"]},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapters_name_in_the_keys_changes_nothing(gemma2: Path, tmp_path: Path, kind: str):
    folder = trained(gemma2, tmp_path / "a", **KINDS[kind])
    before = {name: rows(tensor) for name, tensor in adapted(gemma2, folder).items()}
    parts = "lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "trainable_tokens_delta"
    rewritten(folder, lambda key: re.sub(rf"\.({'|'.join(parts)})\b", r".\1.default", key))
    after = adapted(gemma2, folder)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], rows(after[name])) for name in before)


def test_an_adapter_of_another_name_lies_in_a_folder_of_its_own(gemma2: Path, tmp_path: Path):
    folder = trained(gemma2, tmp_path, name="second")
    assert folder.parent == tmp_path
    assert equal(logits(of_weights(gemma2, adapted(gemma2, folder))), logits(loaded(gemma2, folder)))
    trained(gemma2, tmp_path, name="third")
    with pytest.raises(CheckpointError, match=f"2 adapters in folders of their own, 'second', 'third'; .*{tmp_path / 'second'}"):
        lora.merge(stored(gemma2), tmp_path)


def test_names_of_transformers_4_are_those_of_the_same_layers(gemma2: Path, tmp_path: Path):
    folder = trained(gemma2, tmp_path / "a", target_modules=["k_proj", "up_proj", "fc1"])
    before = {name: rows(tensor) for name, tensor in adapted(gemma2, folder).items()}

    def old(key: str) -> str:
        key = key.replace("model.model.language_model.", "model.language_model.model.")
        return key.replace("model.model.vision_tower.", "model.vision_tower.vision_model.")

    rewritten(folder, old)
    patterns = {"target_modules": r"(?!vision_tower\.vision_model).*\.(k|up)_proj|vision.*\.vision_model\..*\.(fc1|k_proj)"}
    edit(folder, **patterns, alpha_pattern={r"language_model\.model\.layers\.0.+": 7, "^model.language_model.+": 99})
    after = adapted(gemma2, folder)
    assert all(np.array_equal(before[name], rows(after[name])) for name in before)


def edit(folder: Path, **changes: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


PAIRS_IN_TURN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    ({"use_dora": True}, {"use_dora": True, "r": 2}),
    ({"trainable_token_indices": [5, 44]}, {"trainable_token_indices": [44, 17], "use_dora": True}),
    ({"modules_to_save": ["multi_modal_projector"]}, {"target_modules": ["linear", "o_proj"]}),
    ({"bias": "all", "target_modules": ["fc1"]}, {"lora_bias": True, "target_modules": ["fc1"]}),
    ({"init_lora_weights": "olora"}, {"init_lora_weights": "olora", "r": 2}),
]


@pytest.mark.parametrize(("first", "second"), PAIRS_IN_TURN)
def test_two_adapters_are_merged_one_after_the_other(gemma2: Path, tmp_path: Path, first: dict[str, Any], second: dict[str, Any]):
    a, b = trained(gemma2, tmp_path / "a", **first), trained(gemma2, tmp_path / "b", seed=12, **second)
    theirs = merged(loaded(gemma2, a, b))
    checkpoint = Checkpoint.open(gemma2, [a, b])
    for name in checkpoint.names():
        ours = checkpoint.rows(name, 0, checkpoint.shape(name)[0])
        np.testing.assert_allclose(ours, theirs[name], rtol=1e-5, atol=5e-6, err_msg=name)
    assert [file.parent.name for file in checkpoint.files()[-4:]] == ["a", "a", "b", "b"]


@pytest.mark.parametrize("kind", ["tokens", "embedding, tied", "lora of the embedding"])
def test_what_a_base_with_an_lm_head_of_its_own_becomes(gemma2: Path, tmp_path: Path, kind: str):
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(gemma2, dtype=torch.float32, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight + 0.3)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path / "base")
    folder = trained(tmp_path / "base", tmp_path / "a", **PAIRS[kind][0])
    ours = adapted(tmp_path / "base", folder, tied=False)
    assert LM_HEAD in ours
    assert equal(logits(of_weights(tmp_path / "base", ours)), logits(loaded(tmp_path / "base", folder)))


def test_a_parameter_that_the_config_does_not_list_is_loaded_as_peft_does(gemma2: Path, tmp_path: Path):
    folder = trained(gemma2, tmp_path / "a")
    file = folder / "adapter_model.safetensors"
    norm = {"base_model.model.model.language_model.norm.weight": torch.full((fresh(gemma2).config.text_config.hidden_size,), 0.5)}
    save_file(load_file(file) | norm, file)
    assert equal(logits(of_weights(gemma2, adapted(gemma2, folder))), logits(loaded(gemma2, folder)))


def test_an_embedding_that_grew_in_training_is_refused_with_the_fix(gemma2: Path, tmp_path: Path):
    model = fresh(gemma2)
    model.resize_token_embeddings(330)
    torch.manual_seed(0)  # PEFT draws from the generator that all tests share
    peft.get_peft_model(model, peft.LoraConfig(target_modules=TEXT, modules_to_save=["embed_tokens", "lm_head"])).save_pretrained(
        tmp_path
    )
    with pytest.raises(CheckpointError, match=r"\[330, \d+\] does not fit .* is \[320, \d+\] there; .*resize_token_embeddings"):
        lora.merge(stored(gemma2), tmp_path)


def test_a_bias_that_a_layer_cannot_take_is_refused_as_by_peft(gemma2: Path, tmp_path: Path):
    folder = trained(gemma2, tmp_path / "a", lora_bias=True)
    with pytest.raises(RuntimeError, match="Impossible to merge"):
        merged(loaded(gemma2, folder))
    with pytest.raises(CheckpointError, match="no bias"):
        lora.merge(stored(gemma2), folder)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"trainable_token_indices": [5, 5]}, "2 different tokens"), ({"trainable_token_indices": [5, 320]}, "2 different tokens"),
        ({"trainable_token_indices": [5]}, "1 different tokens"), ({"trainable_token_indices": None}, "trainable_token_indices"),
        ({"trainable_token_indices": {"norm": [5, 44]}}, "trainable_token_indices"),
        ({"trainable_token_indices": {"embed_tokens": [5, 44], "lm_head": [5, 43]}}, "no rows of 'lm_head'"),
    ],
)  # fmt: skip
def test_tokens_that_do_not_fit_are_refused(gemma2: Path, tmp_path: Path, changes: dict[str, Any], why: str):
    folder = edit(trained(gemma2, tmp_path / "a", trainable_token_indices=[5, 44]), **changes)
    with pytest.raises(CheckpointError, match=why):
        lora.merge(stored(gemma2), folder)


def test_every_field_of_pefts_configs_is_honoured_without_effect_or_refused():
    fields = {field.name for kind in (peft.LoraConfig, peft.AdaLoraConfig) for field in dataclasses.fields(kind)}
    assert fields == AdapterConfig.model_fields.keys() | IRRELEVANT.keys() | REFUSED.keys()
    assert not AdapterConfig.model_fields.keys() & (IRRELEVANT.keys() | REFUSED.keys())
    config = AdapterConfig.read(peft.LoraConfig().to_dict() | {"peft_type": "LORA"}, "here")
    defaults = {field.name: field for field in dataclasses.fields(peft.LoraConfig)}
    for key in AdapterConfig.model_fields.keys() & defaults.keys() - {"peft_type"}:
        assert (getattr(config, key) or None) == (getattr(peft.LoraConfig(), key) or None), key
        assert (AdapterConfig.model_fields[key].default or None) == (getattr(peft.LoraConfig(), key) or None), key


def test_a_config_of_any_values_is_read_or_refused(gemma2: Path, tmp_path: Path):
    folder, rng = trained(gemma2, tmp_path / "a", trainable_token_indices=[5]), random.Random(3)
    whole = json.loads((folder / "adapter_config.json").read_text())
    values = [
        None,
        True,
        0,
        -1,
        3,
        1 << 40,
        2.5,
        1e300,
        "",
        "q_proj",
        "(a|b)*c",
        "\0",
        [],
        ["down_proj"],
        [[]],
        [1, -2],
        {},
        {"a": 1},
        {"(": 3},
    ]
    for _ in range(200):
        changes = {rng.choice(list(whole)): rng.choice(values) for _ in range(rng.randint(1, 3))}
        (folder / "adapter_config.json").write_text(json.dumps({**whole, **changes}))
        with suppress(CheckpointError):
            for tensor in lora.merge(stored(gemma2), folder).tensors.values():
                tensor.rows(0, 1)
