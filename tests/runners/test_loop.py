# SPDX-License-Identifier: Apache-2.0
"""The greedy loop on a scripted engine: when it stops, what it feeds, and what it refuses."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pgxport.errors import InputError, NumericError
from pgxport.runners.loop import BLOCK, EMPTY, HIDDEN, Decoder, generate, local_bias

EOS, VOCAB, WIDTH = 1, 10, 4


@dataclass
class Script:
    """A session whose n-th run gives the n-th logits; a number stands for logits that choose that token."""

    steps: Sequence[int | np.ndarray]
    seen: list[dict[str, np.ndarray]] = field(default_factory=list)

    def new_cache(self, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        return SimpleNamespace(arrays={name: np.empty(shape, np.float32) for name, shape in shapes.items()})

    def run(self, feeds: Mapping[str, np.ndarray], cache: Any = None) -> dict[str, np.ndarray]:
        step = self.steps[len(self.seen)]
        self.seen.append(dict(feeds))
        return {"logits": (chooses(step) if isinstance(step, int) else step)[None, None]}

    def close(self) -> None:
        pass


def chooses(token: int) -> np.ndarray:
    return np.where(np.arange(VOCAB) == token, 1, -1).astype(np.float32)


def manifest(context: int = 20, window: int | None = None, kind: str = "shared") -> Any:
    return SimpleNamespace(
        context_length=context, local_window=window, cache=SimpleNamespace(kind=kind, layers=3, kv_heads=2, head_dim=WIDTH)
    )


def embed(token: int) -> np.ndarray:
    return np.full((1, 1, WIDTH), token, np.float32)


def answer(script: Script, limit: int, *, prefix: int = 5, window: int | None = None) -> list[int]:
    decoder = Decoder(script, manifest(window=window), prefix + limit)
    return list(generate(decoder, np.zeros((1, prefix, WIDTH), np.float32), embed, stop=(EOS,), limit=limit))


@pytest.mark.parametrize(
    ("steps", "limit", "tokens", "runs"),
    [
        ([EOS], 5, [], 1),
        ([7, EOS], 5, [7], 2),
        ([7, 8, 9, 2], 4, [7, 8, 9, 2], 4),
        ([7, 8, EOS], 2, [7, 8], 2),
        ([7], 1, [7], 1),
        ([EOS], 1, [], 1),
    ],
)
def test_the_answer_ends_with_eos_or_at_the_limit(steps: list[int], limit: int, tokens: list[int], runs: int):
    script = Script(steps)
    assert answer(script, limit) == tokens
    assert len(script.seen) == runs, "the graph was run for a token that nobody asked for"


def test_nothing_is_run_until_a_token_is_asked_for():
    script = Script([7, 8])
    tokens = generate(Decoder(script, manifest(), 10), np.zeros((1, 5, WIDTH), np.float32), embed, stop=(EOS,), limit=5)
    assert script.seen == []
    assert next(tokens) == 7
    assert len(script.seen) == 1


def test_each_step_is_fed_the_last_token_and_how_long_the_cache_is():
    script = Script([7, 8, EOS])
    answer(script, 5)
    assert [f["inputs_embeds"].shape for f in script.seen] == [(1, 5, WIDTH), (1, 1, WIDTH), (1, 1, WIDTH)]
    assert [f["inputs_embeds"][0, 0, 0] for f in script.seen] == [0, 7, 8]
    assert [f["total_sequence_length"].tolist() for f in script.seen] == [5, 6, 7]
    assert [f["seqlens_k"].tolist() for f in script.seen] == [[4], [5], [6]]
    assert all(f["seqlens_k"].dtype == f["total_sequence_length"].dtype == np.int32 for f in script.seen)
    assert all("local_bias" not in f for f in script.seen)


def test_a_bundle_with_a_window_is_fed_the_bias_of_each_step():
    script = Script([7, 8, EOS])
    answer(script, 5, window=4)
    assert [f["local_bias"].shape for f in script.seen] == [(1, 1, 5, 5), (1, 1, 1, 6), (1, 1, 1, 7)]


def test_the_cache_has_a_key_and_a_value_a_layer():
    cache = Decoder(Script([]), manifest(), 9).cache
    assert {name: array.shape for name, array in cache.arrays.items()} == {
        f"past_key_values.{layer}.{part}": (1, 2, 9, WIDTH) for layer in range(3) for part in ("key", "value")
    }


@pytest.mark.parametrize("tokens", ["prefix", 1])
@pytest.mark.parametrize("window", [1, 2, 3, 5, 8, 30])
@pytest.mark.parametrize("total", [1, 2, 3, 5, 8, 9, 21])
def test_the_bias_hides_what_is_a_window_or_more_behind_a_new_token(tokens: int | str, window: int, total: int):
    if tokens == "prefix" or total == 1:  # the prefix sees itself, however long
        bias = local_bias(total, total, window)
        assert np.array_equal(bias, np.zeros((1, 1, total, total)))
    else:
        new = total - 1
        rule = [HIDDEN if new - key >= window else 0 for key in range(total)]
        assert np.array_equal(local_bias(1, total, window), np.float32([[[rule]]]))


def test_what_is_hidden_stays_finite_in_any_product():
    with np.errstate(all="raise"):
        assert np.isfinite(HIDDEN * np.float32(1e8))
        assert not np.isnan(HIDDEN + HIDDEN - HIDDEN)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize(("at", "where"), [(0, "prefill"), (1, "step"), (2, "step")])
def test_logits_that_are_not_finite_are_an_error_naming_graph_and_step(at: int, where: str, wrong: float, everywhere: bool):
    logits = chooses(7)
    logits[slice(None) if everywhere else slice(3, 4)] = wrong
    steps: list[int | np.ndarray] = [7, 8, 9, EOS]
    steps[at] = logits
    tokens = []
    with np.errstate(all="ignore"), pytest.raises(NumericError, match=f"decoder_step.*{where}"):  # noqa: PT012
        decoder = Decoder(Script(steps), manifest(), 15)
        for token in generate(decoder, np.zeros((1, 5, WIDTH), np.float32), embed, stop=(EOS,), limit=10):
            tokens.append(token)
    assert tokens == [7, 8][:at]


def test_a_prefix_and_answer_longer_than_the_bundle_are_refused_before_the_engine():
    script = Script([])
    with pytest.raises(InputError, match=r"20 tokens.*not 21"):
        Decoder(script, manifest(context=20), 21)
    assert script.seen == []


def test_the_longest_prefix_and_answer_fit():
    script = Script([7] * 15)
    assert len(answer(script, 15)) == 15
    assert script.seen[-1]["total_sequence_length"] == 19


# Caches that the engine only reads ("delta"), or writes into where it is told ("update"): masks hide what is not filled.


@dataclass
class Greedy(Script):
    """A session whose graph finds the token itself; the logits may not be asked for."""

    def run(self, feeds: Mapping[str, np.ndarray], cache: Any = None) -> dict[str, np.ndarray]:
        logits = super().run(feeds, cache)["logits"]
        return {"next_token": logits.argmax(-1), "logits_square": np.square(logits).sum((1, 2))}


def fed(kind: str, steps: int, *, prefix: int = 5, window: int | None = None) -> list[dict[str, np.ndarray]]:
    script = Greedy([7] * (steps + 1))
    decoder = Decoder(script, manifest(1000, window, kind), prefix + steps + 1)
    list(generate(decoder, np.zeros((1, prefix, WIDTH), np.float32), embed, stop=(EOS,), limit=steps + 1))
    return script.seen


@pytest.mark.parametrize(
    ("kind", "rows", "shape"), [("delta", BLOCK, (1, BLOCK, 2, WIDTH)), ("update", 1000, (1, 2, 1000, WIDTH))]
)
def test_a_cache_has_the_rows_that_an_engine_is_made_for(kind: str, rows: int, shape: tuple[int, ...]):
    cache = Decoder(Script([]), manifest(1000, kind=kind), 9).cache
    assert {array.shape for array in cache.arrays.values()} == {shape}
    longest = Decoder(Script([]), manifest(1000, kind=kind), 1000).cache
    assert all(1000 in array.shape for array in longest.arrays.values())
    assert fed(kind, 1)[1]["visible"].shape[-1] == rows + (kind == "delta")


@pytest.mark.parametrize("kind", ["delta", "update"])
def test_tokens_have_the_positions_of_their_rows(kind: str):
    prefill, first, second = fed(kind, 2)
    assert [f["positions"].tolist() for f in (prefill, first, second)] == [[0, 1, 2, 3, 4], [5], [6]]
    assert all(f["positions"].dtype == np.int64 for f in (prefill, first, second))
    writes = [f["write_indices"].tolist() for f in (prefill, first, second) if "write_indices" in f]
    assert writes == ([[0], [5], [6]] if kind == "update" else [])
    assert not any({"seqlens_k", "total_sequence_length", "local_bias", "local_visible"} & f.keys() for f in (prefill, first))


@pytest.mark.parametrize("window", [None, 1, 3, 6, 50])
@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("kind", ["delta", "update"])
def test_masks_show_every_filled_row_and_no_other(kind: str, prefix: int, window: int | None):
    prefill, *steps = fed(kind, 6, prefix=prefix, window=window)
    name = "visible" if window is None else "local_visible"
    # A prefix sees itself; before its columns, where the past is apart, stands one hidden row.
    columns = EMPTY + prefix if kind == "delta" else 1000
    start = EMPTY if kind == "delta" else 0
    rule = [[start <= column < start + prefix for column in range(columns)]] * prefix
    assert prefill[name][0, 0].tolist() == rule
    for past, feeds in enumerate(steps, prefix):
        mask = feeds[name]
        assert (mask.dtype, mask.shape[:3]) == (np.bool_, (1, 1, 1))
        reach = past + 1 if window is None else min(window, past + 1)  # keys, the token's own among them
        own = mask.shape[-1] - 1 if kind == "delta" else past
        assert np.flatnonzero(mask[0, 0, 0]).tolist() == [*range(past + 1 - reach, past), own]


def test_a_token_that_the_device_found_is_taken_and_logits_are_not_asked_for():
    script = Greedy([7, 8, EOS])
    decoder = Decoder(script, manifest(1000, kind="delta"), 20)
    assert list(generate(decoder, np.zeros((1, 5, WIDTH), np.float32), embed, stop=(EOS,), limit=9)) == [7, 8]


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_square_that_is_not_finite_is_the_error_of_its_step(wrong: float):
    decoder = Decoder(Greedy([7, np.full(VOCAB, wrong, np.float32)]), manifest(1000, kind="update"), 20)
    assert decoder.next_token(np.zeros((1, 5, WIDTH), np.float32)) == 7
    with pytest.raises(NumericError, match=r"decoder_step.*decode step 1"):
        decoder.next_token(embed(7))
