# SPDX-License-Identifier: Apache-2.0
"""Read a tokenizer.json strictly: its vocabulary, its merges and its added tokens.

The tokenizer is built from these checked values, and the tokenizers library never sees the file: on a stranger's it may
abort the process, hang, or take gigabytes. PaliGemma has Gemma's tokenizer, whose normalizer, pre-tokenizer, decoder and
kind of model are always the same, so that vocabulary, merges and added tokens are all that a file can choose. Those of
another kind are refused by name: transformers 5 ignores them and version 4 does not.
"""

from itertools import chain
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from pgxport.errors import CheckpointError
from pgxport.text import listed

UNK = "<unk>"
# About twice the published file: 35 MB, 257,000 tokens, 580,000 merges. Brackets and
# commas bound the memory of the parsed values before anything is parsed.
MAX_BYTES, MAX_TOKENS, MAX_MERGES = 64 << 20, 1 << 19, 1 << 20
MAX_BRACKETS, MAX_COMMAS = MAX_MERGES + (1 << 16), 3 * MAX_MERGES
MAX_LENGTH = 1000  # characters of a token
# The library puts all added tokens into one automaton: measured 3 to 5 µs and 100 to 240 bytes a character.
MAX_ADDED, MAX_ADDED_LENGTH = 1 << 15, 1 << 18

REPLACE: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SPLIT: dict[str, Any] = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
DECODERS: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
]  # fmt: skip
# What Gemma's files have there. No blank is left to split at once the normalizer has replaced them.
COMPONENTS: dict[str, list[Any]] = {
    "normalizer": [REPLACE],
    "pre_tokenizer": [SPLIT, None],
    "decoder": [{"type": "Sequence", "decoders": DECODERS}],
}

TRAINED_WITH = "use the tokenizer this model was trained with"
Schema = TypeVar("Schema", bound=BaseModel)
JSON: TypeAdapter[dict[str, Any]] = TypeAdapter(dict[str, Any])
TokenText = Annotated[str, Field(min_length=1, max_length=MAX_LENGTH)]


class TokenFlags(BaseModel):
    """A token that is found in text before the merges see it, and how."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    content: TokenText
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False

    def finds_as(self, other: "TokenFlags") -> bool:
        """Whether both are found in the same places of a text."""
        of_blanks = bool(set(" ▁") & set(self.content))  # what the normalizer leaves alone is the same before and after it
        same = (self.single_word, self.lstrip, self.rstrip) == (other.single_word, other.lstrip, other.rstrip)
        return same and (self.normalized == other.normalized or not of_blanks)


class AddedTokenRow(TokenFlags):
    """A row of a tokenizer.json's `added_tokens`."""

    id: Annotated[int, Field(ge=0, lt=MAX_TOKENS)]


class BytePairModel(BaseModel):
    """The settings of a tokenizer.json's `model`; its vocabulary and merges are checked apart."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    type: Literal["BPE"] = "BPE"
    unk_token: Literal["<unk>"]
    fuse_unk: Literal[True]
    byte_fallback: Literal[True]
    ignore_merges: Literal[False] = False
    dropout: None = None
    continuing_subword_prefix: Literal["", None] = None
    end_of_word_suffix: Literal["", None] = None


class TokenizerFile(NamedTuple):
    """The checked values of a tokenizer.json."""

    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added: list[AddedTokenRow]  # by their ids

    def ids(self) -> dict[str, int]:
        """The id of each token, as the library gives it: the vocabulary's, or else the next after all before it."""
        ids = dict(self.vocab)
        for row in self.added:
            ids.setdefault(row.content, len(ids))
        return ids


def parse_tokenizer(data: bytes, name: str) -> TokenizerFile:
    """Check a tokenizer.json; messages call it `name`.

    Raises:
        CheckpointError: it is not a tokenizer of Gemma's kind, or larger than any.
    """
    _check_size(data, name)
    try:
        whole = JSON.validate_json(data)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise CheckpointError(f"{name}: is not sound JSON: {reason}; give the file that was saved with the model") from None
    if not isinstance(model := whole.get("model"), dict):
        raise CheckpointError(f"{name}: has no model; give a tokenizer.json of the tokenizers library")
    for part, known in COMPONENTS.items():
        if (value := whole.get(part)) not in known:
            raise CheckpointError(f"{name}: its {part} is {shown(value)}, and Gemma's is {shown(known[0])}; {TRAINED_WITH}")
    vocab, merges = model.pop("vocab", None), model.pop("merges", None)
    rows = whole.get("added_tokens")
    if not isinstance(rows, list) or len(rows) > MAX_ADDED:
        raise CheckpointError(f"{name}: added_tokens is not a list of at most {MAX_ADDED:,} tokens")
    _checked(BytePairModel, model, f"{name}: model")
    added = sorted(
        (_checked(AddedTokenRow, row, f"{name}: added_tokens.{n}") for n, row in enumerate(rows)), key=lambda row: row.id
    )
    file = TokenizerFile(_checked_vocab(vocab, name), _checked_merges(merges, name), added)
    check_added(file, name)
    return file


def check_added(file: TokenizerFile, name: str) -> None:
    """Every added token stands once, where the library would place it.

    Raises:
        CheckpointError: one does not, or they are longer than those of any tokenizer.
    """
    if (length := sum(len(row.content) for row in file.added)) > MAX_ADDED_LENGTH:
        raise CheckpointError(f"{name}: its added tokens have {length:,} characters; pgx reads at most {MAX_ADDED_LENGTH:,}")
    if len({row.content for row in file.added}) < len(file.added):
        raise CheckpointError(f"{name}: a token stands twice among its added tokens; save the tokenizer again")
    new = [row.content for row in file.added if row.content not in file.vocab]
    if new and max(file.vocab.values()) >= len(file.vocab):
        raise CheckpointError(
            f"{name}: model.vocab leaves ids out, so that {new[0]!r}, which is added to it, has no certain id; {TRAINED_WITH}"
        )
    ids = file.ids()
    if moved := [row for row in file.added if ids[row.content] != row.id]:
        raise CheckpointError(
            f"{name}: {len(moved)} added tokens have other ids than their place gives them, as {moved[0].content!r}, "
            f"which is {moved[0].id} there and {ids[moved[0].content]} by its place; save the tokenizer again"
        )


def _checked(schema: type[Schema], value: Any, where: str) -> Schema:
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join([where, *map(str, first["loc"])])
        raise CheckpointError(f"{path} is {shown(first['input'])}: {first['msg']}; {TRAINED_WITH}") from None


def _check_size(data: bytes, name: str) -> None:
    brackets, commas = data.count(b"[") + data.count(b"{"), data.count(b",")
    limits = (("bytes", len(data), MAX_BYTES), ("brackets", brackets, MAX_BRACKETS), ("commas", commas, MAX_COMMAS))
    if large := [f"{count:,} {what}" for what, count, most in limits if count > most]:
        raise CheckpointError(
            f"{name}: has {listed(large)}, about twice those of Gemma's tokenizer or more; pgx does not read it"
        )


def _checked_vocab(vocab: Any, name: str) -> dict[str, int]:
    if not isinstance(vocab, dict) or not 0 < len(vocab) <= MAX_TOKENS:
        raise CheckpointError(f"{name}: model.vocab is not a table of 1 to {MAX_TOKENS:,} tokens")
    for token, i in vocab.items():
        if type(i) is not int or not 0 <= i < MAX_TOKENS or len(token) > MAX_LENGTH:
            raise CheckpointError(
                f"{name}: model.vocab has {shown(token)} with the id {shown(i)}; an id is an integer below {MAX_TOKENS:,}, "
                f"and a token has at most {MAX_LENGTH:,} characters"
            )
    if len(set(vocab.values())) < len(vocab):
        raise CheckpointError(f"{name}: model.vocab gives two tokens one id; {TRAINED_WITH}")
    if UNK not in vocab:
        raise CheckpointError(f"{name}: model.vocab has no {UNK!r}; {TRAINED_WITH}")
    return vocab


def _checked_merges(merges: Any, name: str) -> list[tuple[str, str]]:
    if not isinstance(merges, list) or len(merges) > MAX_MERGES:
        raise CheckpointError(f"{name}: model.merges is not a list of at most {MAX_MERGES:,} merges")
    kinds = set(map(type, merges))  # of half a million, so no loop of ours
    if kinds <= {str} or kinds <= {list}:
        pairs = [tuple(merge.split(" ")) for merge in merges] if kinds == {str} else list(map(tuple, merges))
        if set(map(len, pairs)) <= {2} and set(map(type, chain.from_iterable(pairs))) <= {str}:
            return pairs
    pair = next((merge for merge in merges if not _is_merge(merge)), merges[0])
    raise CheckpointError(f"{name}: model.merges has {shown(pair)}; each is two pieces, written as all the others are")


def _is_merge(merge: Any) -> bool:
    pieces = merge.split(" ") if isinstance(merge, str) else merge
    return isinstance(pieces, list) and len(pieces) == 2 and all(isinstance(piece, str) for piece in pieces)


def shown(value: Any) -> str:
    """A value from a file as a message gives it, cut after 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}…"
