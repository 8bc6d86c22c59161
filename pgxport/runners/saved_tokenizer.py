# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of a checkpoint or an adapter, with the tokens that transformers adds from the files beside tokenizer.json.

Follows AutoTokenizer and PaliGemmaProcessor of transformers 5.24, which read
`tokenizer_config.json`, and `special_tokens_map.json` and `added_tokens.json` of older versions.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, RootModel, ValidationError

from pgxport.bundle.manifest import TokenIds
from pgxport.bundle.tokenizer_file import (
    MAX_BYTES,
    AddedTokenRow,
    TokenFlags,
    TokenizerFile,
    TokenText,
    check_added,
    parse_tokenizer,
    shown,
)
from pgxport.errors import CheckpointError, InputError
from pgxport.runners.tokenizer import BASE, PromptTokenizer, build_tokenizer
from pgxport.text import listed

TOKENIZER, CONFIG, SPECIAL, ADDED = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
MAX_BESIDE = 16 << 20  # bytes of a file beside it; the published tokenizer_config.json has 0.25 MB
# The roles that GemmaTokenizer gives to tokens where no file does, in the order in which it adds what is missing.
ROLES: dict[str, str | None] = {
    "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "sep_token": None, "pad_token": "<pad>", "cls_token": None,
    "mask_token": "<mask>",
}  # fmt: skip
LOCATED = (*(f"<loc{i:04}>" for i in range(1024)), *(f"<seg{i:03}>" for i in range(128)))


class TokenName(BaseModel):
    """A token that a role was given to, as older versions write it."""

    model_config = ConfigDict(strict=True, extra="ignore")

    content: TokenText


Named = TokenText | TokenName


def _is_image(token: str | TokenName) -> str | TokenName:
    if _text(token) != "<image>":  # which PaliGemmaProcessor writes whatever this says
        raise ValueError("PaliGemma's is '<image>'")
    return token


class TokenRoles(BaseModel):
    """What special_tokens_map.json may say, and tokenizer_config.json too."""

    model_config = ConfigDict(strict=True, extra="allow")

    bos_token: Named | None = None
    eos_token: Named | None = None
    unk_token: Named | None = None
    sep_token: Named | None = None
    pad_token: Named | None = None
    cls_token: Named | None = None
    mask_token: Named | None = None
    image_token: Annotated[Named, AfterValidator(_is_image)] | None = None
    extra_special_tokens: list[Named] | dict[str, Named] | None = None
    additional_special_tokens: list[Named] | None = None
    model_specific_special_tokens: dict[str, Named] | None = None

    def roles(self) -> dict[str, str | None]:
        """The token of each role that is named."""
        named = {role: getattr(self, role) for role in ROLES if role in self.model_fields_set}
        return {role: token and _text(token) for role, token in named.items()}

    def specials(self) -> list[str]:
        """The special tokens without one of these roles: with a role of the model's own, which any key may name, then with none."""
        own = [token for key, token in (self.model_extra or {}).items() if key.endswith("_token") and isinstance(token, str)]
        extra = self.extra_special_tokens or self.additional_special_tokens or []
        listed = extra.values() if isinstance(extra, dict) else extra
        return own + [_text(token) for token in (*(self.model_specific_special_tokens or {}).values(), *listed)]


class TokenizerConfig(TokenRoles):
    """What pgx reads of tokenizer_config.json."""

    tokenizer_class: (
        Literal["GemmaTokenizer", "GemmaTokenizerFast", "TokenizersBackend", "PreTrainedTokenizerFast", "PreTrainedTokenizer"]
        | None
    ) = None
    added_tokens_decoder: dict[str, TokenFlags] | None = None
    split_special_tokens: Literal[False, None] = None


class AddedTokens(RootModel[dict[TokenText, int]]):
    """added_tokens.json, in which versions before 4.34 kept the ids of added tokens."""

    model_config = ConfigDict(strict=True)
    root: dict[TokenText, int] = {}


@dataclass(frozen=True)
class SavedTokenizer:
    """A tokenizer as a bundle keeps it.

    Attributes:
        name: For messages.
        content: Its tokenizer.json, with all tokens.
        highest: The token with the highest id, `<image>` aside, and its id.
        ids: Those with a meaning of their own.
        note: How it differs from the checkpoint's, where it is an adapter's; None where it is the checkpoint's.
    """

    name: str
    content: bytes
    highest: tuple[str, int]
    ids: TokenIds
    note: str | None = None

    def words(self) -> PromptTokenizer:
        """The tokenizer itself, which takes some seconds and 200 MB for a published one."""
        return PromptTokenizer(self.content, self.ids)


def find_tokenizer(checkpoint: Path, config: Mapping[str, Any], adapters: Sequence[Path] = ()) -> SavedTokenizer:
    """The tokenizer of the last adapter that has one, or else of the checkpoint.

    Args:
        checkpoint: Its folder, or the npz whose folder it is.
        config: Its config.json.
        adapters: The folders of the adapters, in the order in which they are merged.

    Raises:
        CheckpointError: there is none, it is not a tokenizer of PaliGemma's kind, or its files contradict each other.
    """
    base = checkpoint if checkpoint.is_dir() else checkpoint.parent
    own = [folder for folder in adapters if _has_tokenizer(folder)]
    folder = own[-1] if own else base
    if not (folder / TOKENIZER).is_file():
        raise CheckpointError(f"{folder}: {TOKENIZER} is missing; put the one that was saved with the weights beside them")
    file, content, roles = _read(folder)
    built = build_tokenizer(file, str(folder / TOKENIZER))
    newline = built.encode("\n", add_special_tokens=False).ids
    content = built.to_str().encode() if content is None else content
    ids, tokens = _token_ids(file, newline, roles, config), file.ids()
    del built, file  # what they take is the most that a short export takes
    note = _difference(folder, tokens, _read(base)[0].ids() if (base / TOKENIZER).is_file() else {}) if own else None
    highest = max((item for item in tokens.items() if item[1] != ids.image), key=lambda item: item[1])
    return SavedTokenizer(str(folder / TOKENIZER), content, highest, ids, note)


def check_token_rows(tokenizer: SavedTokenizer, rows: int) -> None:
    """Every token has a row in the token table; `<image>` needs none, for image features stand in its place.

    Raises:
        CheckpointError: one has none.
    """
    token, i = tokenizer.highest
    if i >= rows:
        raise CheckpointError(
            f"{tokenizer.name}: {token!r} has the id {i}, and the token table {rows} rows; give the weights that were trained with "
            f"this tokenizer, after resize_token_embeddings({i + 1}) or more, or the tokenizer that belongs to these"
        )


def _has_tokenizer(folder: Path) -> bool:
    if (folder / TOKENIZER).is_file():
        return True
    if parts := [name for name in (CONFIG, ADDED, "tokenizer.model") if (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder}: has {listed(parts)} and no {TOKENIZER}, which pgx reads; save its tokenizer again with transformers, "
            f"or move these files away if the checkpoint's tokenizer is the right one"
        )
    return False


def _read(folder: Path) -> tuple[TokenizerFile, bytes | None, dict[str, str | None]]:
    """The tokenizer of a folder with the tokens of the files beside it, its bytes where none was added, and the tokens' roles."""
    path = folder / TOKENIZER
    data = _bytes(path, MAX_BYTES)
    file = parse_tokenizer(data, str(path))
    config = _schema(TokenizerConfig, folder / CONFIG)
    beside = config.added_tokens_decoder
    roles, specials = ROLES | config.roles(), config.specials()
    if beside is None:  # as versions before 4.34 wrote it, and 5.x again, but all in tokenizer.json
        mapped = _schema(TokenRoles, folder / SPECIAL)
        roles, specials = roles | mapped.roles(), specials or mapped.specials()
        named = {*roles.values(), *specials}
        ids = _schema(AddedTokens, folder / ADDED).root
        beside = {str(i): TokenFlags(content=t, special=t in named, normalized=t not in named) for t, i in ids.items()}
    elif lacking := [row.content for row in file.added if row.content not in {token.content for token in beside.values()}]:
        raise CheckpointError(
            f"{folder / CONFIG}: its added_tokens_decoder has no {listed(map(repr, lacking))}, which {TOKENIZER} adds: transformers 5 "
            f"would not know them and 4 would; save the tokenizer again"
        )
    added = _together(file, beside, folder / CONFIG)
    # What a role or a list names without being an added token becomes one, and so do PaliGemma's own tokens.
    late = [*filter(None, roles.values()), *specials, *(t for t in ("<image>", *LOCATED) if t in file.vocab)]
    whole = _with_special(added, late)
    if [row.content for row in whole.added[len(added.added) :]] == ["<mask>"] and "<mask>" not in file.vocab:
        whole = added  # that GemmaTokenizer adds one at the end changes no prompt and no answer
    check_added(whole, str(path))
    return whole, data if whole.added == file.added else None, roles


def _together(file: TokenizerFile, beside: Mapping[str, TokenFlags], where: Path) -> TokenizerFile:
    """The tokens that tokenizer.json adds and those beside it, by their ids."""
    rows = {row.content: row for row in file.added}
    for key, token in beside.items():
        i = int(key) if key.isdecimal() and len(key) < 10 else -1
        row = rows.setdefault(token.content, AddedTokenRow.model_construct(**token.model_dump(), id=i))
        if i < 0 or row.id != i or not row.finds_as(token):
            raise CheckpointError(
                f"{where}: {shown(token.content)} has the id {shown(key)} and is {shown(token)}, which in {TOKENIZER} is "
                f"{shown(row)}; save the tokenizer again"
            )
    return file._replace(added=sorted(rows.values(), key=lambda row: row.id))


def _with_special(file: TokenizerFile, tokens: Iterable[str]) -> TokenizerFile:
    """The tokenizer with these special tokens, each after all others unless the vocabulary has it."""
    rows, ids = {row.content: row for row in file.added}, file.ids()
    for token in tokens:
        if token not in rows:
            i = ids.setdefault(token, len(ids))
            rows[token] = AddedTokenRow(content=token, id=i, normalized=False, special=token not in LOCATED)
    return file._replace(added=list(rows.values()))


def _token_ids(file: TokenizerFile, newline: list[int], roles: Mapping[str, str | None], config: Mapping[str, Any]) -> TokenIds:
    """The ids with a meaning of their own. bos, eos and pad are the tokenizer's: PaliGemmaProcessor asks no config.json."""
    known = file.ids()
    image = _image(known, config)
    loc, seg = _run(known, "<loc{:04}>"), _run(known, "<seg{:03}>")
    ids_or_none = {
        "bos": known.get(roles["bos_token"] or ""),
        "eos": known.get(roles["eos_token"] or ""),
        "pad": known.get(roles["pad_token"] or ""),
        "newline": newline[0] if len(newline) == 1 else None,
        "image": image,
        "loc_first": loc[0] if loc else None,
        "seg_first": seg[0] if seg else None,
    }
    ids = {name: i for name, i in ids_or_none.items() if i is not None}
    if missing := [name.removesuffix("_first") for name in ids_or_none if name not in ids]:
        raise CheckpointError(
            f"{TOKENIZER} does not say which tokens are: {', '.join(missing)}; PaliGemma's has them all, a plain Gemma tokenizer has "
            f"not: use the tokenizer this model was trained with"
        )
    taken = {*loc, *seg, *(known[t] for t in BASE if t in known), ids["bos"], ids["eos"], ids["pad"]}
    special = tuple(row.id for row in file.added if row.special and row.id not in taken)
    return TokenIds(**ids, loc_count=len(loc), seg_count=len(seg), special=special)


def _image(known: Mapping[str, int], config: Mapping[str, Any]) -> int | None:
    named, stated = known.get("<image>"), config.get("image_token_index", config.get("image_token_id"))
    # 256000, the default of transformers' PaliGemmaConfig, is <loc0000> in the published vocabulary.
    if stated is not None and named is not None and stated != named:
        called = next((token for token, i in known.items() if i == stated), None)
        raise CheckpointError(
            f"config.json says that the image token is {shown(stated)}, which {TOKENIZER} calls {shown(called)}; "
            f"its '<image>' is {named}. Set image_token_index to {named}, or use the tokenizer this model was trained with"
        )
    return named


def _run(tokens: Mapping[str, int], pattern: str) -> list[int]:
    """The ids of pattern 0, 1, 2, …, as many as there are."""
    ids: list[int] = []
    while (i := tokens.get(pattern.format(len(ids)))) is not None:
        ids.append(i)
    if ids and ids != list(range(ids[0], ids[0] + len(ids))):
        raise CheckpointError(f"{TOKENIZER}: the ids from {pattern.format(0)!r} on are not consecutive, as PaliGemma's are")
    return ids


def _difference(folder: Path, own: Mapping[str, int], base: Mapping[str, int]) -> str:
    if not base:
        return f"of adapter {folder.resolve().name}; the checkpoint has none"
    more, fewer = own.keys() - base.keys(), base.keys() - own.keys()
    moved = sum(own[token] != base[token] for token in own.keys() & base.keys())
    says = f"of adapter {folder.resolve().name}: adds {len(more)} tokens to the checkpoint's"
    says += f" ({listed(map(repr, sorted(more, key=own.__getitem__)))})" if more else ""
    return says + (f"; it lacks {len(fewer)} of them, and {moved} have other ids" if fewer or moved else "")


Schema = TypeVar("Schema", bound=BaseModel)


def _schema(schema: type[Schema], path: Path) -> Schema:
    """A file beside tokenizer.json, where there is one; its defaults where there is none."""
    if not path.is_file():
        return schema()
    try:
        return schema.model_validate_json(_bytes(path, MAX_BESIDE))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise CheckpointError(
            f"{path}: {where} is {shown(first['input'])}: {first['msg']}; save the tokenizer again, or use the one this model was "
            f"trained with"
        ) from None


def _bytes(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as f:
            data = f.read(most + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}; put the model's own there") from error
    if len(data) > most:
        raise CheckpointError(f"{path}: has more than {most:,} bytes; no tokenizer's takes that many")
    return data


def _text(token: str | TokenName) -> str:
    return token if isinstance(token, str) else token.content
