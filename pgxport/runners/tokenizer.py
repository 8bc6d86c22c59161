# SPDX-License-Identifier: Apache-2.0
"""Turn a prompt into the prefix's token ids, and generated ids back into text.

Built by hand rather than by the tokenizer's own template, because
a user's text is data: `<image>` typed in it is seven letters.
"""

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pgxport.bundle.manifest import TokenIds
from pgxport.errors import CheckpointError, InputError, IntegrityError

HEAD_BYTES = 4 << 20  # of a tokenizer.json; its added tokens take a tenth of that
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how byte fallback writes a byte no piece covers


def read_token_ids(tokenizer_json: Path | bytes, config: Mapping[str, Any]) -> TokenIds:
    """Read the ids from a checkpoint's tokenizer.json and config.json, where config.json is silent by the tokens' names.

    Raises:
        CheckpointError: Some are missing, or the two files disagree about `<image>`.
    """
    known = _added_tokens(tokenizer_json)
    image = _stated(config, "image_token_index", "image_token_id")
    named = known.get("<image>")
    # 256000, the default of transformers' PaliGemmaConfig, is <loc0000> in the published vocabulary.
    if image is not None and named is not None and image != named:
        called = next((token for token, i in known.items() if i == image), "a piece of text")
        raise CheckpointError(
            f"config.json says that the image token is {image}, which tokenizer.json calls {called!r}; "
            f"its '<image>' is {named}. Set image_token_index to {named}, or use the tokenizer this model was trained with"
        )
    # Where no added token is the newline, what the whole tokenizer makes of it.
    newline = [known["\n"]] if "\n" in known else _load(tokenizer_json).encode("\n", add_special_tokens=False).ids
    loc, seg = _run(known, "<loc{:04}>"), _run(known, "<seg{:03}>")
    ids_or_none = {
        "bos": _stated(config, "bos_token_id", token=known.get("<bos>")),
        "eos": _stated(config, "eos_token_id", token=known.get("<eos>")),
        "pad": _stated(config, "pad_token_id", token=known.get("<pad>")),
        "newline": newline[0] if len(newline) == 1 else None,
        "image": named if image is None else image,
        "loc_first": loc[0] if loc else None,
        "seg_first": seg[0] if seg else None,
    }
    ids = {name: i for name, i in ids_or_none.items() if i is not None}
    if missing := [name.removesuffix("_first") for name in ids_or_none if name not in ids]:
        raise CheckpointError(
            f"tokenizer.json and config.json do not say which tokens are: {', '.join(missing)}. "
            f"This looks like a plain Gemma tokenizer; use the one published with PaliGemma"
        )
    return TokenIds(**ids, loc_count=len(loc), seg_count=len(seg))


class PromptTokenizer:
    """Prompts to prefix ids and back, for one tokenizer.json."""

    def __init__(self, tokenizer_json: Path | bytes, ids: TokenIds) -> None:
        self.ids = ids
        self._tokenizer = _load(tokenizer_json)
        self._silent = {ids.bos, ids.eos, ids.pad, ids.image}
        self._reserved = self._reserved_tokens()
        # The longest first, or "<a>" hides "<a>b".
        longest_first = sorted(self._reserved.values(), key=len, reverse=True)
        self._literal = re.compile("|".join(map(re.escape, longest_first)))

    def prompt_ids(self, prompt: str, image_tokens: int, images: int = 1, *, limit: int | None = None) -> list[int]:
        """The prefix: image tokens, bos, the text, newline.

        Args:
            prompt: The user's text. `<loc…>` and `<seg…>` in it are tokens; every other special token is ordinary text.
            image_tokens: How many tokens one image takes.
            images: How many images.
            limit: The most ids the prefix may have.

        Raises:
            InputError: The prompt is empty, is not valid text, or makes the prefix longer than `limit`.
        """
        if not prompt.strip():
            given = f"{len(prompt)} blank characters" if prompt else "nothing"
            raise InputError(f"the prompt is empty ({given}); say what to do with the image, for example 'caption en'")
        # The newline is tokenized on its own, as in training:
        # appended to the text it would merge with one the user typed.
        prefix = [self.ids.image] * (image_tokens * images) + [self.ids.bos, *self._text_ids(prompt), self.ids.newline]
        if limit is not None and len(prefix) > limit:
            raise InputError(
                f"the prompt of {len(prompt)} characters makes a prefix of {len(prefix)} tokens ({image_tokens * images} of them "
                f"image); this bundle takes {limit}, so shorten the prompt by about {len(prefix) - limit} tokens"
            )
        return prefix

    def decode(self, ids: Iterable[int]) -> str:
        """The text of generated ids: `<locNNNN>` and `<segNNN>` stay, bos, eos and padding go."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the text in pieces, each as soon as it is certain: a character of several byte tokens comes out whole."""
        # Not tokenizers' DecodeStream: it turns a whole run of
        # bytes into U+FFFD when only the last character is cut off.
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            token = self._tokenizer.id_to_token(i)
            if token is None or i in self._silent:  # None: the table has more rows than the vocabulary has tokens
                continue
            if byte := BYTE.fullmatch(token):
                piece = utf8.decode(bytes.fromhex(byte[1]))
            else:
                piece = utf8.decode(b"", final=True) + self._tokenizer.decode([i], skip_special_tokens=False)
            if piece:
                yield piece
        if rest := utf8.decode(b"", final=True):
            yield rest

    def _text_ids(self, text: str) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"the prompt has a lone surrogate, {text[error.start]!r}, at character {error.start}, which is not text; "
                f"it was probably decoded from bytes that are not UTF-8"
            ) from error
        # Cut after its first character, a reserved token is two stretches of ordinary
        # text; neither the added tokens nor the merges can then put it together.
        # `encode_special_tokens` would miss tokens a checkpoint does not flag as special.
        cuts = [0, *(match.start() + 1 for match in self._literal.finditer(text)), len(text)]
        pieces = (text[a:b] for a, b in itertools.pairwise(cuts))
        ids = [i for piece in pieces for i in self._tokenizer.encode(piece, add_special_tokens=False).ids]
        if forged := sorted(self._reserved.keys() & ids):
            raise InputError(
                f"this tokenizer turns text of the prompt into {self._reserved[forged[0]]!r}, which only pgx may write; "
                f"reword the prompt"
            )
        return ids

    def _reserved_tokens(self) -> dict[int, str]:
        """Returns the tokens that a user's text may not become: control tokens, special ones and unk, but not `<loc…>` and `<seg…>`."""
        loc = range(self.ids.loc_first, self.ids.loc_first + self.ids.loc_count)
        seg = range(self.ids.seg_first, self.ids.seg_first + self.ids.seg_count)
        flagged = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        unk = self._tokenizer.token_to_id(getattr(self._tokenizer.model, "unk_token", None) or "<unk>")
        reserved = {i for i in {*self._silent, *flagged, unk} if i is not None and i not in loc and i not in seg}
        return {i: token for i in reserved if (token := self._tokenizer.id_to_token(i))}


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}; fetch it from the model's page") from error


def _load(tokenizer_json: Path | bytes) -> Tokenizer:
    name = "tokenizer.json" if isinstance(tokenizer_json, bytes) else str(tokenizer_json)
    data = tokenizer_json if isinstance(tokenizer_json, bytes) else _read(tokenizer_json)
    try:
        tokenizer = Tokenizer.from_buffer(data)
    except Exception as error:  # the only type tokenizers raises
        raise IntegrityError(f"{name}: not a tokenizer of the tokenizers library: {error}; fetch it again") from error
    # A file saved after training may carry both; a prefix is neither cut nor filled.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _stated(config: Mapping[str, Any], *keys: str, token: int | None = None) -> int | None:
    """Returns the id that config.json states, at its top or in its text_config; else `token`."""
    for section in (config, config.get("text_config") or {}):
        for key in keys:
            value = section.get(key)
            if isinstance(value, list) and value:  # several stop tokens, of which the first is the end of a text
                value = value[0]
            if value is None:
                continue
            if type(value) is not int or value < 0:
                raise CheckpointError(f"config.json: {key} is {value!r}; pgx needs one token id, an integer")
            return value
    return token


def _added_tokens(tokenizer_json: Path | bytes) -> dict[str, int]:
    """The tokens that tokenizer.json adds to its vocabulary: all that have a meaning of their own.

    They stand at its head. The published file has 35 MB, and to
    build the whole tokenizer from it takes 300 MB of memory.
    """
    name = "tokenizer.json" if isinstance(tokenizer_json, bytes) else str(tokenizer_json)
    data = tokenizer_json if isinstance(tokenizer_json, bytes) else _read(tokenizer_json)
    start = data.find(b"[", data.find(b'"added_tokens"'))
    try:
        rows, _ = json.JSONDecoder().raw_decode(data[start : start + HEAD_BYTES].decode(errors="ignore"))
        return {row["content"]: int(row["id"]) for row in rows}
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{name}: its added tokens cannot be read ({error}); fetch it from the model's page") from error


def _run(tokens: Mapping[str, int], pattern: str) -> list[int]:
    """The ids of pattern 0, 1, 2, …, as many as there are."""
    ids: list[int] = []
    while (i := tokens.get(pattern.format(len(ids)))) is not None:
        ids.append(i)
    if ids and ids != list(range(ids[0], ids[0] + len(ids))):
        raise CheckpointError(f"tokenizer.json: the ids from {pattern.format(0)!r} on are not consecutive, as PaliGemma's are")
    return ids
