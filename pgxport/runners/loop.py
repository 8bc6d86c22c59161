# SPDX-License-Identifier: Apache-2.0
"""Generate greedily: prefill the prefix, then one token at a time. The only place that knows the mask and the cache.

Knows no words and no pixels: embeddings go in, token ids come out.

A prefix of three and two generated tokens; x is seen, and in local layers w hides what is `window` or more behind:

        prefix    generated
    p   x x x     . .
    p   x x x     . .
    p   x x x     . .
    g   w x x     x .
    g   w w x     x x
"""

import math
from collections.abc import Callable, Iterator

import numpy as np

from pgxport.bundle import Manifest
from pgxport.errors import InputError, NumericError
from pgxport.runners.session import Arrays, Session

HIDDEN = np.float32(-1e30)  # added to a score; finite, so that no product of it is NaN


class Decoder:
    """The decoder graph and one KV cache: feed it embeddings in order, the whole prefix first."""

    def __init__(self, session: Session, manifest: Manifest, capacity: int):
        if capacity > manifest.context_length:
            raise InputError(
                f"prefix and answer together may have {manifest.context_length} tokens in this bundle, not {capacity}; "
                f"shorten the prompt, ask for fewer new tokens, or export with a larger --context"
            )
        self._session, self._window = session, manifest.local_window
        shape = (1, manifest.cache.kv_heads, capacity, manifest.cache.head_dim)
        names = [f"past_key_values.{i}.{part}" for i in range(manifest.cache.layers) for part in ("key", "value")]
        self.cache = session.new_cache(dict.fromkeys(names, shape))
        self.length = 0  # tokens in the cache
        self._steps = 0  # after the prefill

    def feed(self, embeds: np.ndarray) -> np.ndarray:
        """embeds [1, T, H] -> logits of the last token [V]; T is the prefix, later 1.

        Raises:
            NumericError: the logits are not finite.
        """
        tokens, past = embeds.shape[1], self.length
        assert past == 0 or tokens == 1, "Bug: a prefix sees itself, so it cannot be fed in parts"
        self.length += tokens
        self._steps += past > 0
        feeds: Arrays = {
            "inputs_embeds": embeds,
            "seqlens_k": np.array([self.length - 1], np.int32),
            "total_sequence_length": np.array(self.length, np.int32),
        }
        if self._window is not None:
            feeds["local_bias"] = local_bias(tokens, self.length, self._window)
        logits = self._session.run(feeds, self.cache)["logits"][0, -1]
        if not math.isfinite(float(np.dot(logits, logits))):  # no number that is not finite cancels out
            where = f"decode step {self._steps}" if self._steps else "the prefill"
            raise NumericError(f"decoder_step gave logits that are not finite at {where}; the bundle or its weights are unsound")
        return logits


def local_bias(tokens: int, total: int, window: int) -> np.ndarray:
    """[1, 1, T, S], added to the scores of local layers: nothing for a prefix, `HIDDEN` where a new token may not look."""
    seen = visible(total if tokens == total else 0, total, window, first=total - tokens)
    return np.where(seen, np.float32(0), HIDDEN)[None, None]


def visible(prefix: int, total: int, window: int | None = None, *, first: int = 0) -> np.ndarray:
    """[T, S] bool: which of `total` tokens each token from `first` on looks at; the first `prefix` ones see each other."""
    i, j = np.arange(first, total)[:, None], np.arange(total)[None, :]
    causal = (j <= i) if window is None else (j <= i) & (i - j < window)
    return causal | ((i < prefix) & (j < prefix))


def generate(decoder: Decoder, prefix: np.ndarray, embed: Callable[[int], np.ndarray], *, eos: int, limit: int) -> Iterator[int]:
    """Yield token ids, the likeliest each time, until `eos` (not yielded) or `limit` tokens.

    Args:
        prefix: [1, T, H], image features and scaled token embeddings.
        embed: A token id to its scaled embedding [1, 1, H].
    """
    logits = decoder.feed(prefix)
    for count in range(1, limit + 1):
        token = int(logits.argmax())
        if token == eos:
            return
        yield token
        if count < limit:
            logits = decoder.feed(embed(token))
