# SPDX-License-Identifier: Apache-2.0
"""Turn a prompt into the prefix's token ids, and generated ids back into text.

Built by hand rather than by the tokenizer's own template, because
a user's text is data: `<image>` typed in it is seven letters.
"""

import codecs
import itertools
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from pgxport.bundle.manifest import TokenIds
from pgxport.bundle.tokenizer_file import UNK, TokenizerFile, parse_tokenizer
from pgxport.errors import CheckpointError, InputError, IntegrityError, PgxWarning

# Gemma's and PaliGemma's own special tokens, and the one id that ends a turn of a chat: a fine-tune's are all others.
BASE = ("<pad>", "<eos>", "<bos>", UNK, "<mask>", "<2mass>", "[@BOS@]", "<start_of_turn>", "<end_of_turn>", "<image>")
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how byte fallback writes a byte no piece covers


class PromptTokenizer:
    """Prompts to prefix ids and back, for one tokenizer.json.

    Raises:
        IntegrityError: The file is not a tokenizer of Gemma's kind.
    """

    def __init__(self, tokenizer_json: Path | bytes, ids: TokenIds) -> None:
        self.ids = ids
        self._tokenizer = _load(tokenizer_json)
        token_of = self._tokenizer.id_to_token
        flagged = {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        base = {i for token in BASE if (i := self._tokenizer.token_to_id(token)) is not None}
        unk = self._tokenizer.token_to_id(UNK)
        assert unk is not None, "Bug: a checked vocabulary has it"
        control = {ids.bos, ids.eos, ids.pad, ids.image, unk}
        # What an answer does not show: as transformers' skip_special_tokens, but that a fine-tune's own are words of its answers.
        self._silent = control | (flagged & base)
        self._own = (flagged & set(ids.special)) - base - control
        located = {*range(ids.loc_first, ids.loc_first + ids.loc_count), *range(ids.seg_first, ids.seg_first + ids.seg_count)}
        reserved = (control | flagged) - located - self._own
        self._reserved = {i: token for i in reserved if (token := token_of(i))}
        own = {i: token for i in self._own if (token := token_of(i))}
        self._literal = {True: _any_of(self._reserved.values()), False: _any_of([*self._reserved.values(), *own.values()])}

    def prompt_ids(
        self, prompt: str, image_tokens: int, images: int = 1, *, limit: int | None = None, special_tokens: bool = False
    ) -> list[int]:
        """The prefix: image tokens, bos, the text, newline.

        A special token that the text spells is ordinary text; a PgxWarning says so, once for each token.

        Args:
            prompt: The user's text. `<loc…>`, `<seg…>` and what a fine-tune added as words are tokens in it.
            image_tokens: How many tokens one image takes.
            images: How many images.
            limit: The most ids the prefix may have.
            special_tokens: The fine-tune's own special tokens are tokens in it, too; never those of PaliGemma.

        Raises:
            InputError: The prompt is empty, is not valid text, or makes the prefix longer than `limit`.
        """
        if not prompt.strip():
            given = f"{len(prompt)} blank characters" if prompt else "nothing"
            raise InputError(f"the prompt is empty ({given}); say what to do with the image, for example 'caption en'")
        # The newline is tokenized on its own, as in training:
        # appended to the text it would merge with one the user typed.
        text = self._text_ids(prompt, special_tokens=special_tokens)
        prefix = [self.ids.image] * (image_tokens * images) + [self.ids.bos, *text, self.ids.newline]
        if limit is not None and len(prefix) > limit:
            raise InputError(
                f"the prompt of {len(prompt)} characters makes a prefix of {len(prefix)} tokens ({image_tokens * images} of them "
                f"image); this bundle takes {limit}, so shorten the prompt by about {len(prefix) - limit} tokens"
            )
        return prefix

    def warn_of_special(self, prompts: Iterable[str]) -> None:
        """Say which special tokens these prompts spell, as `prompt_ids` does, for those whose ids are made in other processes."""
        self._warn(match[0] for prompt in prompts for match in self._literal[False].finditer(prompt))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of generated ids: `<locNNNN>` and `<segNNN>` stay, and what a fine-tune added; PaliGemma's special tokens go."""
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

    def _text_ids(self, text: str, *, special_tokens: bool) -> list[int]:
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
        spelled = list(self._literal[special_tokens].finditer(text))
        self._warn(match[0] for match in spelled)
        cuts = [0, *(match.start() + 1 for match in spelled), len(text)]
        pieces = (text[a:b] for a, b in itertools.pairwise(cuts))
        with library("the prompt cannot be tokenized"):
            ids = [i for piece in pieces for i in self._tokenizer.encode(piece, add_special_tokens=False).ids]
        forbidden = self._reserved.keys() if special_tokens else self._reserved.keys() | self._own
        if forged := sorted(forbidden & set(ids)):
            raise InputError(
                f"this tokenizer turns text of the prompt into {self._tokenizer.id_to_token(forged[0])!r}, which only pgx may write; "
                f"reword the prompt"
            )
        return ids

    def _warn(self, spelled: Iterable[str]) -> None:
        for token in dict.fromkeys(spelled):
            warnings.warn(self._hint(token), PgxWarning, stacklevel=1)  # from one place, so that each token is named once

    def _hint(self, token: str) -> str:
        """What to do about a special token that a prompt spells."""
        seen = f"the prompt has {token!r} as {len(token)} letters, not as a token"
        if self._tokenizer.token_to_id(token) in self._own:
            return f"{seen}; `pgx run --special-tokens` lets a prompt use this model's own (special_tokens=True in Python)"
        if self._tokenizer.token_to_id(token) == self.ids.image:
            return f"{seen}; pgx puts the image before the prompt itself, so leave it out"
        return f"{seen}; pgx writes this model's special tokens itself, so leave it out"


def build_tokenizer(file: TokenizerFile, name: str) -> Tokenizer:
    """The tokenizer of checked values.

    Raises:
        CheckpointError: a merge is of pieces that the vocabulary does not have.
    """
    with library(f"{name}: not a sound tokenizer"):
        model = BPE(vocab=file.vocab, merges=file.merges, unk_token=UNK, fuse_unk=True, byte_fallback=True)
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        tokenizer.add_tokens([AddedToken(**row.model_dump(exclude={"id"})) for row in file.added])
    return tokenizer


@contextmanager
def library(doing: str) -> Iterator[None]:
    """Turn an error of the tokenizers library into one of ours, and a panic of it, which is no Exception.

    Raises:
        CheckpointError: the library failed.
    """
    try:
        yield
    except Exception as error:  # the only type it raises
        raise CheckpointError(f"{doing}: {error}; use the tokenizer this model was trained with") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # its class cannot be imported
            raise
        raise CheckpointError(
            f"{doing}: the tokenizers library panicked: {error}; use the tokenizer this model was trained with"
        ) from error


def _load(tokenizer_json: Path | bytes) -> Tokenizer:
    name = "tokenizer.json" if isinstance(tokenizer_json, bytes) else str(tokenizer_json)
    try:
        data = tokenizer_json if isinstance(tokenizer_json, bytes) else tokenizer_json.read_bytes()
        return build_tokenizer(parse_tokenizer(data, name), name)
    except OSError as error:
        raise InputError(f"{name}: cannot be read: {error.strerror or error}; put the model's own there") from error
    except CheckpointError as error:  # of a bundle, which pgx wrote
        raise IntegrityError(str(error)) from error


def _any_of(tokens: Collection[str]) -> re.Pattern[str]:
    # The longest first, or "<a>" hides "<a>b".
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))
