# SPDX-License-Identifier: Apache-2.0
"""A stranger's tokenizer.json is refused by name, or read as the tokenizers library and transformers read it."""

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gemma_tokenizer import build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pgxport.bundle import tokenizer_file
from pgxport.bundle.tokenizer_file import AddedTokenRow, check_added, parse_tokenizer
from pgxport.errors import CheckpointError
from pgxport.runners.saved_tokenizer import find_tokenizer
from pgxport.runners.tokenizer import build_tokenizer as built
from pgxport.runners.tokenizer import library

TEXT = "detect cat <loc0001> <table>\n\n猫 x  y<seg127>"
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1 << 31, 1 << 40, 10**300, 0.5, float("nan"), "", "a", " ", "<pad>", "x" * 2000, "(a+)+$", [], {}, [[]], [1, 2],
    list(range(500)), {"type": "ByteLevel"}, {"Regex": "(a+)+$"}, {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build_tokenizer(path := tmp_path_factory.mktemp("tokenizer"))
    return path


@pytest.fixture(scope="module")
def sound(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "tokenizer.json").read_bytes())


def changed(sound: dict[str, Any], change: Callable[[dict[str, Any]], object]) -> bytes:
    content = copy.deepcopy(sound)
    change(content)
    return json.dumps(content).encode()


def ids(data: bytes) -> list[int]:
    return built(parse_tokenizer(data, "t.json"), "t.json").encode(TEXT, add_special_tokens=False).ids


def test_a_sound_file_is_read_as_the_library_reads_it(folder: Path):
    data = (folder / "tokenizer.json").read_bytes()
    read, theirs = parse_tokenizer(data, "t.json"), Tokenizer.from_buffer(data)
    assert read.ids() == theirs.get_vocab(with_added_tokens=True) == built(read, "t.json").get_vocab(with_added_tokens=True)
    assert ids(data) == theirs.encode(TEXT, add_special_tokens=False).ids


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.update(post_processor={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": 1}),
        lambda c: c.update(padding={"strategy": {"Fixed": 1 << 40}}, truncation={"max_length": 1, "stride": 1 << 60}),
        lambda c: c.update(pre_tokenizer=None),
        lambda c: [c["model"].pop(key) for key in ("type", "ignore_merges", "dropout")],
        lambda c: c["model"].update(merges=[" ".join(pair) for pair in c["model"]["merges"]], end_of_word_suffix=""),
    ],
    ids=["post-processor", "padding", "no pre-tokenizer", "an old file", "merges as text"],
)
def test_what_changes_no_token_of_a_prompt_is_read(sound: dict[str, Any], change: Callable[[dict[str, Any]], object]):
    assert ids(changed(sound, change)) == ids(json.dumps(sound).encode())


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "normalizer": (
        lambda c: c.update(normalizer={"type": "Lowercase"}),
        "its normalizer is {'type': 'Lowercase'}, and Gemma's is",
    ),
    "no normalizer": (lambda c: c.pop("normalizer"), "its normalizer is None"),
    "pattern": (lambda c: c["pre_tokenizer"].update(pattern={"Regex": "(a+)+$"}), r"its pre_tokenizer is .*\(a\+\)"),
    "decoder": (lambda c: c.update(decoder={"type": "Metaspace"}), "its decoder is {'type': 'Metaspace'}"),
    "model": (lambda c: c["model"].update(type="Unigram"), "model.type is 'Unigram'"),
    "dropout": (lambda c: c["model"].update(dropout=0.5), "model.dropout is 0.5"),
    "prefix": (lambda c: c["model"].update(continuing_subword_prefix="##"), "model.continuing_subword_prefix is '##'"),
    "unk": (lambda c: c["model"].update(unk_token="<loc0000>"), "model.unk_token is '<loc0000>'"),
    "no bytes": (lambda c: c["model"].update(byte_fallback=False), "model.byte_fallback is False"),
    "a key": (lambda c: c["model"].update(cache=1), "model.cache is 1"),
    "a large id": (lambda c: c["model"]["vocab"].update(cat=1 << 31), "'cat' with the id 2147483648"),
    "an id twice": (lambda c: c["model"]["vocab"].update({"<pad>": 2}), "gives two tokens one id"),
    "a long piece": (lambda c: c["model"]["vocab"].update({"x" * 1001: 5000}), "at most 1,000 characters"),
    "no unk": (lambda c: c["model"]["vocab"].update({"<none>": c["model"]["vocab"].pop("<unk>")}), "has no '<unk>'"),
    "a merge": (lambda c: c["model"]["merges"].append(["a"]), r"model\.merges has \['a'\]"),
    "merges of two kinds": (lambda c: c["model"]["merges"].append("a b"), "model.merges has"),
    "an added id": (lambda c: c["added_tokens"][3].update(id=1 << 31), r"added_tokens\.3\.id is 2147483648"),
    "a flag": (lambda c: c["added_tokens"][3].update(lstrip="no"), r"added_tokens\.3\.lstrip is 'no'"),
    "an empty token": (lambda c: c["added_tokens"][3].update(content=""), r"added_tokens\.3\.content is ''"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_a_tokenizer_of_another_kind_is_refused_by_name(sound: dict[str, Any], change: Any, message: str):
    with pytest.raises(CheckpointError, match=rf"^t\.json.*{message}"):
        parse_tokenizer(changed(sound, change), "t.json")


def test_a_vocabulary_that_leaves_ids_out_is_read_and_takes_no_new_token(sound: dict[str, Any]):
    """Its added tokens have ids of their own there; one that the library would have to number has none for certain."""
    holed = parse_tokenizer(changed(sound, lambda c: c["model"]["vocab"].update(cat=9000)), "t.json")
    check_added(holed, "t.json")
    assert built(holed, "t.json").token_to_id("cat") == 9000
    row = AddedTokenRow(content="<new>", id=9001)
    with pytest.raises(CheckpointError, match="leaves ids out, so that '<new>'"):
        check_added(holed._replace(added=[*holed.added, row]), "t.json")


def test_the_last_of_two_equal_keys_counts_as_everywhere(sound: dict[str, Any]):
    data = json.dumps(sound).encode()
    with pytest.raises(CheckpointError, match="its normalizer is"):
        parse_tokenizer(data[:-1] + b', "normalizer": {"type": "Lowercase"}}', "t.json")


@pytest.mark.parametrize("data", [b"[" * 3_000_000, b"," * 5_000_000, b" " * (65 << 20)], ids=["brackets", "commas", "bytes"])
def test_a_file_larger_than_any_is_refused_before_it_is_parsed(data: bytes, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer_file, "JSON", None)
    with pytest.raises(CheckpointError, match=r"twice those of Gemma's"):
        parse_tokenizer(data, "t.json")


def test_a_file_that_nests_without_end_is_refused():
    with pytest.raises(CheckpointError, match="recursion"):
        parse_tokenizer(b'{"model":' + b"[" * 1_000_000, "t.json")


def test_more_added_tokens_than_any_has_are_refused(sound: dict[str, Any]):
    row = sound["added_tokens"][-1]
    for more in ([{**row, "content": f"<{i}>"} for i in range(1 << 15)], [{**row, "content": f"{i:01000}"} for i in range(300)]):
        with pytest.raises(CheckpointError, match="at most"):
            parse_tokenizer(changed(sound, lambda c, more=more: c["added_tokens"].extend(more)), "t.json")


def test_an_error_and_a_panic_of_the_library_are_errors_of_the_checkpoint(sound: dict[str, Any]):
    def lose(content: dict[str, Any]) -> None:
        left, right = content["model"]["merges"][0]
        vocab = content["model"]["vocab"]
        vocab["another"] = vocab.pop(left + right)

    with pytest.raises(CheckpointError, match=r"t\.json: not a sound tokenizer: .*out of vocabulary"):
        ids(changed(sound, lose))
    panic = type("PanicException", (BaseException,), {})  # the library's cannot be made from Python
    with pytest.raises(CheckpointError, match="doing it: the tokenizers library panicked: byte index 1"), library("doing it"):
        raise panic("byte index 1")
    with pytest.raises(KeyboardInterrupt), library("doing it"):
        raise KeyboardInterrupt


@given(
    st.lists(st.sampled_from("abcdefgh"), unique=True),
    st.lists(st.sampled_from("efghijkl"), unique=True),
)
@settings(max_examples=100, deadline=None)
def test_an_added_token_has_the_id_that_the_library_gives_it(vocab: list[str], added: list[str]):
    rows = [tokenizer_file.AddedTokenRow(content=token, id=i) for i, token in enumerate(added)]
    file = tokenizer_file.TokenizerFile({token: i for i, token in enumerate(["<unk>", *vocab])}, [], rows)
    theirs = built(file, "t.json")
    assert {row.content: file.ids()[row.content] for row in rows} == {
        row.content: theirs.token_to_id(row.content) for row in rows
    }


def mutated(sound: dict[str, Any], seed: int) -> str:
    """The file with one value gone, doubled or another, or with some bytes of it."""
    chance, content = random.Random(seed), copy.deepcopy(sound)
    at, key = content, chance.choice(["normalizer", "pre_tokenizer", "decoder", *["model", "added_tokens"] * 3])
    while isinstance(at[key], dict | list) and at[key] and chance.random() < 0.8:
        at = at[key]
        key = chance.choice(list(at)) if isinstance(at, dict) else chance.randrange(len(at))
    match chance.randrange(4):
        case 0:
            del at[key]
        case 1 if isinstance(at, list):
            at.append(at[key])
        case 2:
            at[key], other = chance.choice(VALUES), chance.choice(VALUES)
            content[chance.choice(["truncation", "padding", "post_processor", "version"])] = other
        case _:
            at[key] = chance.choice(VALUES)
    text = json.dumps(content)
    return text if chance.random() < 0.9 else text[: chance.randrange(len(text))] + chance.choice("{}[]\"',0")


@pytest.mark.parametrize("seed", range(50))
def test_a_mutated_file_is_refused_or_read_as_transformers_reads_it(
    sound: dict[str, Any], folder: Path, tmp_path: Path, seed: int
):
    transformers = pytest.importorskip("transformers")
    shutil.copy(folder / "tokenizer_config.json", tmp_path)
    (tmp_path / "tokenizer.json").write_text(mutated(sound, seed))
    try:
        words = find_tokenizer(tmp_path, {}).words()
    except CheckpointError:
        return
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert words.prompt_ids(TEXT, 0)[1:-1] == theirs.encode(TEXT, add_special_tokens=False)
