# SPDX-License-Identifier: Apache-2.0
"""Generate greedily: prefill the prefix, then one token at a time. The only place that knows the mask and the cache.

Knows no words and no pixels: embeddings go in, token ids come out.

A prefix of three and two generated tokens; x is seen, and
in local layers w hides what is `window` or more behind:

        prefix    generated
    p   x x x     . .
    p   x x x     . .
    p   x x x     . .
    g   w x x     x .
    g   w w x     x x
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping

import numpy as np

from pgxport.bundle.manifest import Manifest
from pgxport.bundle.mask import visible
from pgxport.errors import InputError, NumericError
from pgxport.runners.session import Arrays, Session

HIDDEN = np.float32(-1e30)  # added to a score; finite, so that no product of it is NaN
EMPTY = 1  # rows of an empty past: hidden, and there because an engine's shapes begin at one
BLOCK = 128  # rows; an engine prepares itself for each capacity it meets, so that there are few


class Decoder:
    """The decoder graph and one KV cache: feed it embeddings in order, the whole prefix first.

    Args:
        capacity: Tokens of the cache, of prefix and answer together.
        rows: Sequences side by side, all of one length; several where the cache is of kind "shared".
    """

    def __init__(self, session: Session, manifest: Manifest, capacity: int, *, rows: int = 1):
        if capacity > manifest.context_length:
            raise InputError(
                f"prefix and answer together may have {manifest.context_length} tokens in this bundle, not {capacity}; "
                f"shorten the prompt, ask for fewer new tokens, or export with a larger --context"
            )
        self._session, self._kind, self._window = session, manifest.cache.kind, manifest.local_window
        heads, width = manifest.cache.kv_heads, manifest.cache.head_dim
        assert rows == 1 or self._kind == "shared", f"Bug: {rows} rows of a cache of kind {self._kind}"
        self._batch, self._rows = rows, cache_rows(manifest, capacity)
        shape = (1, self._rows, heads, width) if self._kind == "delta" else (rows, heads, self._rows, width)
        names = [f"past_key_values.{i}.{part}" for i in range(manifest.cache.layers) for part in ("key", "value")]
        self.cache = session.new_cache(dict.fromkeys(names, shape))
        self.length = 0  # tokens in the cache
        self._steps = 0  # after the prefill

    def feed(self, embeds: np.ndarray) -> np.ndarray:
        """embeds [1, T, H] -> logits of the last token [V], until the next feed; T is the prefix, later 1.

        Raises:
            NumericError: the logits are not finite.
        """
        return self._logits(self._run(embeds))

    def feed_rows(self, embeds: np.ndarray) -> np.ndarray:
        """embeds [B, T, H] -> logits of each row's last token [B, V], as `feed` gives them for one.

        Raises:
            NumericError: a logit is not finite.
        """
        logits = self._run(embeds)["logits"][:, -1]
        self._check(float(np.vdot(logits, logits)))
        return logits

    def next_token(self, embeds: np.ndarray) -> int:
        """Feed, and return the likeliest next token; where the graph finds it itself, the logits stay where they are.

        Raises:
            NumericError: the logits are not finite.
        """
        results = self._run(embeds)
        if "next_token" not in results:
            return int(self._logits(results).argmax())
        self._check(results["logits_square"][0])
        return int(results["next_token"][0, 0])

    def _run(self, embeds: np.ndarray) -> Mapping[str, np.ndarray]:
        tokens, past = embeds.shape[1], self.length
        assert past == 0 or tokens == 1, "Bug: a prefix sees itself, so it cannot be fed in parts"
        self.length += tokens
        self._steps += past > 0
        feeds = self._lengths(tokens) if self._kind == "shared" else self._masks(tokens, past)
        feeds["inputs_embeds"] = embeds
        return self._session.run(feeds, self.cache)

    def _lengths(self, tokens: int) -> Arrays:
        """For ONNX Runtime's attention, which makes its masks itself, but for the window."""
        feeds: Arrays = {
            "seqlens_k": np.full(self._batch, self.length - 1, np.int32),
            "total_sequence_length": np.array(self.length, np.int32),
        }
        if self._window is not None:
            feeds["local_bias"] = local_bias(tokens, self.length, self._window)
        return feeds

    def _masks(self, tokens: int, past: int) -> Arrays:
        """For attention over every row that is bound, whether it is filled or not."""
        columns = np.arange(self.length)  # of the mask, of each token
        feeds: Arrays = {"positions": columns[past:].copy()}
        width = self._rows
        if self._kind == "update":
            feeds["write_indices"] = np.array([past], np.int64)
        else:  # the new keys stand behind all rows of the past
            bound = self._rows if past else EMPTY
            columns[past:] += bound - past
            width = bound + tokens
        windows = {"visible": None} | ({} if self._window is None else {"local_visible": self._window})
        for name, window in windows.items():
            mask = np.zeros((tokens, width), np.bool_)
            mask[:, columns] = seen(tokens, self.length, window)
            feeds[name] = mask[None, None]
        return feeds

    def _logits(self, results: Mapping[str, np.ndarray]) -> np.ndarray:
        logits = results["logits"][0, -1]
        self._check(np.dot(logits, logits))  # no number that is not finite cancels out
        return logits

    def _check(self, square: float) -> None:
        if not math.isfinite(square):
            where = f"decode step {self._steps}" if self._steps else "the prefill"
            raise NumericError(f"decoder_step gave logits that are not finite at {where}; the bundle or its weights are unsound")


def cache_rows(manifest: Manifest, capacity: int) -> int:
    """Rows of a cache for so many tokens: of kind "update" as many as the graph was written with, of kind "delta" whole blocks."""
    rows = {"shared": capacity, "delta": -(-capacity // BLOCK) * BLOCK, "update": manifest.context_length}
    return min(rows[manifest.cache.kind], manifest.context_length)


def local_bias(tokens: int, total: int, window: int) -> np.ndarray:
    """[1, 1, T, S], added to the scores of local layers: nothing for a prefix, `HIDDEN` where a new token may not look."""
    return np.where(seen(tokens, total, window), np.float32(0), HIDDEN)[None, None]


def seen(tokens: int, total: int, window: int | None) -> np.ndarray:
    """[T, S] bool: what the last `tokens` of `total` look at; all of them are a prefix."""
    return visible(total if tokens == total else 0, total, window, first=total - tokens)


def generate(
    decoder: Decoder, prefix: np.ndarray, embed: Callable[[int], np.ndarray], *, stop: Collection[int], limit: int
) -> Iterator[int]:
    """Yield token ids, the likeliest each time, until one of `stop` (not yielded) or `limit` tokens.

    Args:
        prefix: [1, T, H], image features and scaled token embeddings.
        embed: A token id to its scaled embedding [1, 1, H].
    """
    token = decoder.next_token(prefix)
    for count in range(1, limit + 1):
        if token in stop:
            return
        yield token
        if count < limit:
            token = decoder.next_token(embed(token))
