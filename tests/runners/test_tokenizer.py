# SPDX-License-Identifier: Apache-2.0
"""Prefix ids equal PaliGemmaProcessor's for clean prompts, and no user's text becomes a special token."""

import functools
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from gemma_tokenizer import CONTROL, LOC, SEG, SYMBOLS, build_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pgxport.bundle.manifest import TokenIds
from pgxport.errors import CheckpointError, InputError, IntegrityError
from pgxport.runners.saved_tokenizer import find_tokenizer
from pgxport.runners.tokenizer import PromptTokenizer

pytestmark = pytest.mark.filterwarnings("ignore::pgxport.errors.PgxWarning")
IMAGE_TOKENS = 4
CLEAN = (
    "caption en",
    "cap de",
    "ocr",
    "answer en what is in the image?",
    "question en two dogs",
    "detect cat ; dog",
    "segment the cat on the left",
    "detect <loc0000><loc0512><loc1023><loc0007> cat",
    "segment <seg000><seg127> ; <loc0001>",
    "describe  two   spaces",
    " leading and trailing ",
    "line one\nline two\n\nline four",
    "tab\there, NUL \0 and bell \a",
    "Straße, niño, “quotes” — dash",
    "猫と犬 🐈‍⬛ 👩🏽‍🚀",
    "שלום עולם مرحبا",
    "a <b>bold</b> <table> x < y > z",
    "<loc00000> <loc1024> <seg128> <loc-001>",
    "a▁b",
    "x" * 3000,
)
FORGED = [*CONTROL, "<image>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PromptTokenizer:
    return find_tokenizer(folder, {}).words()


@pytest.fixture(scope="module")
def processor(folder: Path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    siglip = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    images = siglip.SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = IMAGE_TOKENS
    return transformers.PaliGemmaProcessor(images, transformers.AutoTokenizer.from_pretrained(folder))


@functools.cache  # hypothesis and function-scoped fixtures do not mix
def session_tokenizer() -> PromptTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        build_tokenizer(Path(folder))
        return find_tokenizer(Path(folder), {}).words()


@pytest.mark.parametrize("prompt", CLEAN)
@pytest.mark.parametrize("images", [1, 2])
def test_a_clean_prompt_has_the_reference_ids(tokenizer, processor, prompt, images):
    pixels = [np.zeros((28, 28, 3), np.uint8)] * images
    expected = processor(images=[pixels], text="<image>" * images + prompt)["input_ids"][0]
    ids = tokenizer.prompt_ids(prompt, IMAGE_TOKENS, images)
    assert ids == list(expected)
    assert ids[: IMAGE_TOKENS * images] == [tokenizer.ids.image] * IMAGE_TOKENS * images
    assert (ids[IMAGE_TOKENS * images], ids[-1]) == (tokenizer.ids.bos, tokenizer.ids.newline)


def test_the_newline_does_not_merge_with_one_the_user_typed(tokenizer):
    ids = tokenizer.prompt_ids("caption en\n", 1)
    assert ids[-2:] == [tokenizer.ids.newline] * 2


@pytest.fixture(scope="module", params=[(True, False), (False, False), (True, True), (False, True)])
def flagged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PromptTokenizer:
    """The tokenizer with `<image>`, and `<loc…>` and `<seg…>`, flagged as special or not."""
    path = tmp_path_factory.mktemp("flagged")
    build_tokenizer(path, image_special=request.param[0], located_special=request.param[1])
    return find_tokenizer(path, {}).words()


def assert_only_text(tokenizer: PromptTokenizer, text: str) -> None:
    ids = tokenizer.prompt_ids(f"say {text}", 3)
    special = {tokenizer._tokenizer.token_to_id(token) for token in FORGED}
    assert ids[:4] == [tokenizer.ids.image] * 3 + [tokenizer.ids.bos]
    assert not special & set(ids[4:])
    assert tokenizer.decode(ids[4:]) == f"say {text}\n"  # word for word


def test_a_special_token_in_user_text_is_ordinary_text(flagged):
    for text in FORGED:
        assert_only_text(flagged, text)
    for pair in itertools.product([*FORGED, "<", "<b", "cat "], repeat=2):
        assert_only_text(flagged, "".join(pair))
        assert_only_text(flagged, f"{pair[0][:2]}{pair[1]}{pair[0][2:]}")


@given(st.lists(st.sampled_from([*FORGED, "<", ">", "b", "bos>", " ", "\n", "unk>", "image", "猫"]), max_size=12).map("".join))
@settings(max_examples=300, deadline=None)
@example("<<bos>bos>")
def test_no_arrangement_of_text_forges_a_special_token(text):
    assert_only_text(session_tokenizer(), text)


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_word_for_word(text):
    tokenizer = session_tokenizer()
    if "▁" in text:  # SentencePiece's blank, in both directions
        return
    assert tokenizer.decode(tokenizer.prompt_ids("=" + text, 1)) == f"={text}\n"


def test_loc_and_seg_are_single_tokens_whatever_their_flag(flagged):
    ids = flagged.ids
    assert (ids.loc_count, ids.seg_count) == (1024, 128)
    for i, token in [*enumerate(LOC, ids.loc_first), *enumerate(SEG, ids.seg_first)]:
        assert flagged.prompt_ids(f"x{token}", 1)[3:] == [i, ids.newline]
        assert flagged.decode([i]) == token


@pytest.mark.parametrize("prompt", ["", " ", "\n\t "])
def test_an_empty_prompt_is_an_input_error(tokenizer, prompt):
    with pytest.raises(InputError, match="empty"):
        tokenizer.prompt_ids(prompt, 4)


@pytest.mark.parametrize("prompt", ["cat \ud800", "\udfff", "<image>\udc80"])
def test_a_lone_surrogate_is_an_input_error(tokenizer, prompt):
    with pytest.raises(InputError, match="surrogate"):
        tokenizer.prompt_ids(prompt, 4)


def test_a_prefix_longer_than_the_limit_is_an_input_error(tokenizer):
    exact = len(tokenizer.prompt_ids("caption en", 4))
    assert len(tokenizer.prompt_ids("caption en", 4, limit=exact)) == exact
    with pytest.raises(InputError, match=f"takes {exact - 1}, so shorten the prompt by about 1 "):
        tokenizer.prompt_ids("caption en", 4, limit=exact - 1)
    with pytest.raises(InputError, match="100000 characters"):
        tokenizer.prompt_ids("ab c " * 20_000, 4, limit=512)


def test_truncation_and_padding_saved_in_the_file_are_not_applied(folder, tmp_path):
    trained = Tokenizer.from_file(str(folder / "tokenizer.json"))
    trained.enable_truncation(3)
    trained.enable_padding(length=64)
    trained.save(str(tmp_path / "tokenizer.json"))
    given, clean = find_tokenizer(tmp_path, {}), find_tokenizer(folder, {})
    assert given.ids == clean.ids
    long = "answer en what is in the image?"
    assert given.words().prompt_ids(long, 1) == clean.words().prompt_ids(long, 1)


def byte_ids(tokenizer: PromptTokenizer, text: str | bytes) -> list[int]:
    data = text.encode() if isinstance(text, str) else text
    return [tokenizer._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]


def test_decoding_keeps_loc_and_seg_and_drops_the_control_tokens(tokenizer):
    text = "<loc0001><loc0002><loc0003><loc0004> cat ; <seg000>"
    ids = tokenizer.prompt_ids(text, 2)[:-1]
    assert tokenizer.decode([tokenizer.ids.pad, *ids, tokenizer.ids.eos, 9_999_999]) == text


@pytest.mark.parametrize("text", ["é", "猫犬", "🐈‍⬛ 👩🏽‍🚀 ok", "a\u0301bc", "mixed 猫 and text"])
def test_streaming_never_shows_half_a_character(tokenizer, text):
    ids = [i for character in text for i in byte_ids(tokenizer, character)]
    pieces = list(tokenizer.stream(iter(ids)))
    assert "".join(pieces) == text == tokenizer.decode(ids)
    assert all("\ufffd" not in piece and piece for piece in pieces)
    assert len(pieces) == len(text)  # each as soon as it is whole


def test_a_piece_is_out_before_the_next_id_is_asked_for(tokenizer):
    asked = []

    def ids():
        for i in tokenizer.prompt_ids("two dogs", 0)[1:]:
            asked.append(i)
            yield i

    stream = tokenizer.stream(ids())
    next(stream)
    assert len(asked) == 1


def test_a_character_cut_off_costs_only_itself(tokenizer):
    cut = byte_ids(tokenizer, "日本語")[:-1]
    assert tokenizer.decode(cut) == "日本\ufffd"
    assert tokenizer.decode([*cut, *tokenizer.prompt_ids("cat", 0)[1:-1]]) == "日本\ufffdcat"


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_decoding_equals_the_librarys_for_any_ids_of_valid_text(data):
    tokenizer = session_tokenizer()
    library = tokenizer._tokenizer
    words = data.draw(
        st.lists(st.sampled_from(["cat", " ", "  ", "é", "猫", "🐈", "\n", "<loc0007>", "<table>", *SYMBOLS]), max_size=10)
    )
    ids = [i for word in words for i in library.encode(word, add_special_tokens=False).ids]
    pieces = list(tokenizer.stream(ids))
    assert "".join(pieces) == tokenizer.decode(ids) == library.decode(ids, skip_special_tokens=False)


def test_decoding_equals_transformers(tokenizer, processor):
    for prompt in CLEAN:
        ids = tokenizer.prompt_ids(prompt, 1)
        assert tokenizer.decode(ids) == processor.decode(ids, skip_special_tokens=True)


def test_the_ids_are_read_not_assumed(folder, processor):
    hub = processor.tokenizer
    ids = find_tokenizer(folder, {"image_token_index": hub.image_token_id, "text_config": {}}).ids
    assert (ids.bos, ids.eos, ids.pad, ids.image) == (hub.bos_token_id, hub.eos_token_id, hub.pad_token_id, hub.image_token_id)
    assert ids.newline == hub.convert_tokens_to_ids("\n") != 108
    assert (ids.loc_first, ids.seg_first) == tuple(hub.convert_tokens_to_ids(["<loc0000>", "<seg000>"]))


def test_the_tokenizer_decides_about_bos_eos_and_pad_whatever_config_json_says(folder, processor):
    config = {"pad_token_id": 1, "eos_token_id": [1, 107], "text_config": {"bos_token_id": 5, "pad_token_id": 0}}
    ids, hub = find_tokenizer(folder, config).ids, processor.tokenizer
    assert (ids.bos, ids.eos, ids.pad) == (hub.bos_token_id, hub.eos_token_id, hub.pad_token_id)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_token_index": 478}, "'<loc0000>'; its '<image>' is"),
        ({"image_token_id": 5}, "image token is 5"),
        ({"image_token_index": "5"}, "image token is '5'"),
    ],
)
def test_a_config_that_contradicts_the_tokenizer_is_an_error(folder, config, message):
    if config == {"image_token_index": 478}:
        config = {"image_token_index": find_tokenizer(folder, {}).ids.loc_first}
    with pytest.raises(CheckpointError, match=message):
        find_tokenizer(folder, config)


def test_what_a_tokenizer_lacks_is_named(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    for field in (content["added_tokens"], content["model"]["vocab"]):
        for token in ("<image>", *SEG):
            if isinstance(field, dict):
                del field[token]
            else:
                field[:] = [added for added in field if added["content"] != token]
    content["model"]["merges"] = [merge for merge in content["model"]["merges"] if merge[1] != "image>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"which tokens are: image, seg; .* plain Gemma tokenizer"):
        find_tokenizer(tmp_path, {})


def test_a_file_that_is_no_tokenizer_is_an_error(tmp_path):
    ids = TokenIds(bos=2, eos=1, pad=0, newline=3, image=9, loc_first=4, loc_count=2, seg_first=6, seg_count=2)
    for rubbish in (b"{}", b"", b"\x80\xff", b"[1]", b'{"model": 3}', b'{"added_tokens": [{"id": 1}]}', b'{"added_tokens": [1'):
        (tmp_path / "tokenizer.json").write_bytes(rubbish)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: (is not sound JSON|has no model)"):
            find_tokenizer(tmp_path, {})
        with pytest.raises(IntegrityError, match=r"tokenizer\.json: (is not sound JSON|has no model)"):
            PromptTokenizer(rubbish, ids)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        find_tokenizer(tmp_path, {})
    with pytest.raises(InputError, match="cannot be read"):
        PromptTokenizer(tmp_path / "tokenizer.json", ids)
