# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a fine-tune's files is the one that transformers makes of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gemma_tokenizer import build_tokenizer
from tokenizers import Tokenizer

from pgxport.errors import CheckpointError, PgxWarning
from pgxport.runners.saved_tokenizer import check_token_rows, find_tokenizer

transformers = pytest.importorskip("transformers")
pytest.importorskip("torch")

IMAGE_TOKENS = 4
WORDS, SPECIAL = ("<s_total>", "</s_total>", "<item 1>"), ("<sep/>", "<|yes|>")


def reference(folder: Path) -> Any:
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = IMAGE_TOKENS
    return transformers.PaliGemmaProcessor(images, transformers.AutoTokenizer.from_pretrained(folder))


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def saved_by_5(folder: Path) -> None:
    """Words and special tokens, as transformers 5 saves them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(WORDS))
    tokenizer.add_special_tokens({"additional_special_tokens": [SPECIAL[0]]})
    tokenizer.add_tokens([transformers.AddedToken(SPECIAL[1], special=True)])
    tokenizer.save_pretrained(folder)


def saved_by_4(folder: Path) -> None:
    """The same in the layout of transformers 4: every added token is in tokenizer_config.json, too."""
    saved_by_5(folder)
    rows = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    decoder = {str(row["id"]): {k: v for k, v in row.items() if k != "id"} for row in rows}
    named = [{k: v for k, v in row.items() if k not in ("id", "special")} for row in rows if row["content"] in SPECIAL]
    names = ("bos", "eos", "pad", "unk", "image")
    roles: dict[str, Any] = {f"{role}_token": {"content": f"<{role}>", "lstrip": False} for role in names}
    (folder / "special_tokens_map.json").write_text(json.dumps(roles | {"additional_special_tokens": named}))
    (folder / "added_tokens.json").write_text(json.dumps({token: row["id"] for row in rows if (token := row["content"])}))
    settings = {"tokenizer_class": "GemmaTokenizer", "additional_special_tokens": list(SPECIAL), "added_tokens_decoder": decoder}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {f"{r}_token": f"<{r}>" for r in ("bos", "eos", "pad")}))


def in_the_config_alone(folder: Path) -> None:
    """tokenizer.json is the base's; tokenizer_config.json has the added tokens."""
    plain = (folder / "tokenizer.json").read_bytes()
    saved_by_4(folder)
    (folder / "tokenizer.json").write_bytes(plain)


def in_added_tokens_alone(folder: Path) -> None:
    """tokenizer.json is the base's; added_tokens.json of an old version has the added tokens, of which a map names one as special."""
    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    (folder / "added_tokens.json").write_text(json.dumps({token: size + i for i, token in enumerate((*WORDS, SPECIAL[0]))}))
    edit(folder / "tokenizer_config.json", lambda c: c.pop("extra_special_tokens"))
    (folder / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": [SPECIAL[0]]}))


def named_alone(folder: Path) -> None:
    """A token that a list names, and no file adds."""
    edit(folder / "tokenizer_config.json", lambda c: c.update(extra_special_tokens=[SPECIAL[0]], image_token="<image>"))


def other_roles(folder: Path) -> None:
    """Roles of other tokens: a new pad and a new mask token, and bos that is `<mask>`."""
    edit(folder / "tokenizer_config.json", lambda c: c.update(pad_token="<filler>", bos_token="<mask>", mask_token="<m>"))


LAYOUTS = (saved_by_5, saved_by_4, in_the_config_alone, in_added_tokens_alone, named_alone, other_roles)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    build_tokenizer(path := tmp_path_factory.mktemp("trained"))
    return path


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A tokenizer as on the hub, to be changed."""
    return shutil.copytree(trained, tmp_path / "folder")


@pytest.mark.filterwarnings("ignore::pgxport.errors.PgxWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_prompts_and_answers_are_those_of_transformers(layout: Any, folder: Path):
    layout(folder)
    processor, words = reference(folder), find_tokenizer(folder, {}).words()
    hub = processor.tokenizer
    assert (words.ids.bos, words.ids.eos, words.ids.pad) == (hub.bos_token_id, hub.eos_token_id, hub.pad_token_id)
    special = {t for t in SPECIAL if t in hub.get_vocab()}
    assert {hub.convert_ids_to_tokens(i) for i in words.ids.special} >= special
    for text in ("parse <s_total>", "<s_total>12</s_total><item 1>", "a <item 1> b", "<sep/> and <|yes|>", "x <loc0007>", "<m>"):
        expected = processor(images=[[np.zeros((28, 28, 3), np.uint8)]], text="<image>" + text)["input_ids"][0]
        assert words.prompt_ids(text, IMAGE_TOKENS, special_tokens=True) == list(expected), text
        answer = [i for i in expected[IMAGE_TOKENS + 1 : -1] if i not in words.ids.special]
        assert words.decode(answer) == hub.decode(answer, skip_special_tokens=True)


@pytest.mark.parametrize("layout", [saved_by_5, saved_by_4, in_the_config_alone, in_added_tokens_alone])
def test_a_special_token_of_the_fine_tune_is_text_unless_it_is_asked_for(layout: Any, folder: Path):
    layout(folder)
    words, hub = find_tokenizer(folder, {}).words(), transformers.AutoTokenizer.from_pretrained(folder)
    i = hub.convert_tokens_to_ids(SPECIAL[0])
    assert i in words.ids.special
    with pytest.warns(PgxWarning, match="as 6 letters.*pgx run --special-tokens"):
        ids = words.prompt_ids(f"a {SPECIAL[0]} b", 1)
    assert i not in ids
    assert words.decode(ids[1:]) == f"a {SPECIAL[0]} b\n"
    assert i in words.prompt_ids(f"a {SPECIAL[0]} b", 1, special_tokens=True)
    assert words.decode([i]) == SPECIAL[0]


def test_no_prompt_uses_a_special_token_of_paligemma(folder: Path):
    saved_by_5(folder)
    saved = find_tokenizer(folder, {})
    hub = transformers.AutoTokenizer.from_pretrained(folder)
    control = hub.convert_tokens_to_ids(["<pad>", "<eos>", "<bos>", "<unk>", "<image>"])
    assert not set(control) & set(saved.ids.special)
    forged = saved.ids.model_copy(update={"special": tuple(control)})  # what a stranger's manifest may say
    for ids in (saved.ids, forged):
        words = type(saved.words())(saved.content, ids)
        with pytest.warns(PgxWarning):
            prompt = words.prompt_ids("<pad><eos><bos><unk><image>", 0, special_tokens=True)
        assert not set(control) & set(prompt[1:])


def test_files_that_add_nothing_leave_tokenizer_json_as_it_is(folder: Path):
    content = (folder / "tokenizer.json").read_bytes()
    assert find_tokenizer(folder, {}).content == content
    saved_by_4(folder)
    assert find_tokenizer(folder, {}).content == (folder / "tokenizer.json").read_bytes()


def test_the_last_adapter_with_a_tokenizer_gives_it(folder: Path):
    base, first, second = (shutil.copytree(folder, folder.parent / name) for name in ("base", "first", "second"))
    (third := folder / "third").mkdir()
    (third / "adapter_config.json").write_text("{}")
    saved_by_5(second)
    assert find_tokenizer(base, {}).note is None
    assert find_tokenizer(base, {}, [third]).note is None
    found = find_tokenizer(base, {}, [first, second, third])
    assert found.content == (second / "tokenizer.json").read_bytes()
    assert (
        found.note
        == "of adapter second: adds 5 tokens to the checkpoint's ('<s_total>', '</s_total>', '<item 1>', '<sep/>', '<|yes|>')"
    )
    assert find_tokenizer(base, {}, [second, first]).note == "of adapter first: adds 0 tokens to the checkpoint's"
    (base / "tokenizer.json").unlink()
    assert find_tokenizer(base, {}, [first]).note == "of adapter first; the checkpoint has none"


def test_an_adapter_with_part_of_a_tokenizer_is_an_error(folder: Path):
    (folder / "adapter").mkdir()
    (folder / "adapter" / "added_tokens.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"has added_tokens\.json and no tokenizer\.json"):
        find_tokenizer(folder, {}, [folder / "adapter"])


def test_every_token_but_image_needs_a_row(folder: Path):
    size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    found = find_tokenizer(folder, {})
    assert found.ids.image == size - 1
    check_token_rows(found, size)
    check_token_rows(found, size - 1)
    with pytest.raises(CheckpointError, match=rf"'<seg127>' has the id {size - 2}, and the token table {size - 2} rows"):
        check_token_rows(found, size - 2)
    saved_by_5(folder)
    with pytest.raises(CheckpointError, match=r"'<\|yes\|>' has the id"):
        check_token_rows(find_tokenizer(folder, {}), size + 1)


def contradictions() -> list[tuple[str, Callable[[Path], object], str]]:
    config, whole = "tokenizer_config.json", "tokenizer.json"
    some = {"9": {"content": "<x>", "special": False}}
    return [
        (
            "lacking",
            lambda f: edit(f / config, lambda c: c.update(added_tokens_decoder=some)),
            "added_tokens_decoder has no '<pad>'",
        ),
        ("another id", lambda f: (f / "added_tokens.json").write_text('{"<table>": 77}'), "'<table>' has the id '77'"),
        (
            "a hole",
            lambda f: (f / "added_tokens.json").write_text('{"<x>": 99999}'),
            r"other ids than their place.*'<x>'.* is 99999",
        ),
        ("no id", lambda f: (f / "added_tokens.json").write_text('{"<x>": -3}'), "'<x>' has the id '-3'"),
        (
            "another class",
            lambda f: edit(f / config, lambda c: c.update(tokenizer_class="LlamaTokenizer")),
            "is 'LlamaTokenizer'",
        ),
        ("split", lambda f: edit(f / config, lambda c: c.update(split_special_tokens=True)), "split_special_tokens is True"),
        (
            "image",
            lambda f: edit(f / config, lambda c: c.update(image_token="<img>")),
            "image_token.* is '<img>'.*PaliGemma's is '<image>'",
        ),
        ("no bos", lambda f: edit(f / config, lambda c: c.update(bos_token=None)), "which tokens are: bos"),
        ("a type", lambda f: edit(f / config, lambda c: c.update(eos_token=[1, 2])), r"eos_token\S* is \[1, 2\]"),
        ("no JSON", lambda f: (f / config).write_text("{"), "tokenizer_config.json: the whole"),
        ("twice", lambda f: edit(f / whole, lambda c: c["added_tokens"].append(c["added_tokens"][-1])), "stands twice"),
        ("moved", lambda f: edit(f / whole, lambda c: c["added_tokens"][-1].update(id=5)), "other ids than their place"),
        ("same id", lambda f: edit(f / whole, lambda c: c["model"]["vocab"].update({"<pad>": 1})), "gives two tokens one id"),
    ]


@pytest.mark.parametrize(("change", "message"), [row[1:] for row in contradictions()], ids=[row[0] for row in contradictions()])
def test_files_that_contradict_each_other_are_an_error(change: Callable[[Path], object], message: str, folder: Path):
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        find_tokenizer(folder, {})
