# SPDX-License-Identifier: Apache-2.0
"""The runner: on a scripted engine, where every answer depends on all that the cache holds, and on real bundles."""

import gc
import itertools
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gemma_tokenizer import build_tokenizer
from PIL import Image
from tokenizers import Tokenizer

from pgxport.bundle.manifest import Cache, GraphInfo, Manifest, TokenTable
from pgxport.bundle.reader import Bundle
from pgxport.errors import EngineError, InputError, IntegrityError, NumericError, UsageError
from pgxport.runners import pipeline as pipeline_module
from pgxport.runners.open_session import open_session
from pgxport.runners.runner import Runner
from pgxport.runners.saved_tokenizer import find_tokenizer

RES, IMAGE_TOKENS, WIDTH, CONTEXT, LIMIT = 28, 4, 8, 60, 12
RED, BLUE = Image.new("RGB", (50, 40), "red"), Image.new("RGB", (30, 30), "blue")


class Scripted:
    """An engine that needs no model: the decoder's next token is a function of every embedding in its cache."""

    def __init__(self, graph: Path, model: "FakeModel"):
        self.name, self.model, self.closed = graph.stem, model, False

    def new_cache(self, shapes: Mapping[str, tuple[int, ...]]) -> Any:
        return SimpleNamespace(arrays={name: np.full(shape, np.nan, np.float32) for name, shape in shapes.items()})

    def run(self, feeds: Mapping[str, np.ndarray], cache: Any = None) -> dict[str, np.ndarray]:
        self.model.runs.append(self.name)
        match self.name:
            case "vision_encoder":
                mean = feeds["pixel_values"].mean(axis=(2, 3))  # [B, 3]
                return {"image_hidden": np.repeat(mean[:, None], IMAGE_TOKENS, axis=1)}
            case "projector":
                hidden = feeds["image_hidden"]
                return {"image_features": np.concatenate([hidden, np.zeros((*hidden.shape[:2], WIDTH - 3), np.float32)], axis=2)}
            case "mask_decoder":
                return {"mask": np.ones((1, 64, 64), np.float32)}
        past = cache.arrays["past_key_values.0.key"]  # [1, 1, S, WIDTH]
        total, new = int(feeds["total_sequence_length"]), feeds["inputs_embeds"]
        past[0, 0, total - new.shape[1] : total] = new[0]
        return {"logits": self.model.logits(past[0, 0, :total])[None, None]}

    def close(self) -> None:
        self.closed = True


class FakeModel:
    """What the scripted decoder says: `words` in order if given, else something that every cached value has a part in."""

    def __init__(self, vocab: int):
        self.vocab, self.runs, self.sessions = vocab, [], []  # type: int, list[str], list[Scripted]
        self.words: list[int] | None = None
        self.poison: int | None = None  # the run of the decoder that goes wrong
        self.allowed: range = range(vocab)

    def logits(self, seen: np.ndarray) -> np.ndarray:
        count = self.runs.count("decoder_step")
        if self.words is not None:
            token = self.words[count - 1]
        else:
            weights = np.sin(np.arange(seen.size, dtype=np.float64)).reshape(seen.shape)
            token = self.allowed[int(abs((seen * weights).sum()) * 1e6) % len(self.allowed)]
        logits = np.zeros(self.vocab, np.float32)
        logits[token] = 1
        return logits * np.float32(np.nan) if count == self.poison else logits

    def open(self, engine: str, graph: Path, **options: object) -> Scripted:
        self.sessions.append(Scripted(graph, self))
        return self.sessions[-1]


@pytest.fixture(scope="module")
def fake_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    path = tmp_path_factory.mktemp("fake")
    build_tokenizer(path)
    ids = find_tokenizer(path, {}).ids
    vocab = Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab_size()
    table = np.random.default_rng(0).standard_normal((vocab, WIDTH), np.float32)
    table.tofile(path / "table.bin")
    graphs = {n: GraphInfo(file=f"{n}.onnx", inputs=(), outputs=()) for n in ("vision_encoder", "projector", "decoder_step")}
    # Only what a runner reads; the rest of a manifest is left out.
    manifest = Manifest.model_construct(
        resolution=RES, image_tokens=IMAGE_TOKENS, context_length=CONTEXT, max_new_tokens=LIMIT, local_window=None, target="cpu",
        token_ids=ids, token_table=TokenTable(file="table.bin", dtype="float32", shape=table.shape, scale=2.0),
        cache=Cache(layers=1, kv_heads=1, head_dim=WIDTH, dtype="float32"), graphs=graphs,
    )  # fmt: skip
    return Bundle(path, manifest)


@pytest.fixture
def model(fake_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    model = FakeModel(fake_bundle.manifest.token_table.shape[0])
    # Byte tokens and letters, so that characters in several pieces come up; never an end.
    model.allowed = range(fake_bundle.manifest.token_ids.newline + 3, fake_bundle.manifest.token_ids.loc_first)
    monkeypatch.setattr(pipeline_module, "open_session", model.open)
    # Its graphs are on no disk, and nothing is compiled of them.
    monkeypatch.setattr(
        pipeline_module, "graph_files", lambda engine, bundle: {n: bundle.graph(n) for n in bundle.manifest.graphs}
    )
    return model


@pytest.fixture
def runner(fake_bundle: Bundle, model: FakeModel) -> Iterator[Runner]:
    with Runner(fake_bundle) as runner:
        yield runner


def piece(bundle: Bundle, text: str) -> list[int]:
    return Tokenizer.from_file(str(bundle.path / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def test_an_answer_ends_with_eos(runner: Runner, model: FakeModel, fake_bundle: Bundle):
    words = piece(fake_bundle, "a cat")
    model.words = [*words, fake_bundle.manifest.token_ids.eos]
    answer = runner.answer(RED, "caption en")
    assert (answer.text, answer.token_ids, answer.truncated) == ("a cat", tuple(words), False)
    assert model.runs == ["vision_encoder", "projector", *["decoder_step"] * (len(words) + 1)]
    assert list(answer.timings) == ["preprocess", "vision", "projector", "prefill", "decode", "post"]


def test_an_answer_that_the_limit_cuts_off_says_so(runner: Runner, model: FakeModel):
    assert len(runner.answer(RED, "caption en").token_ids) == LIMIT
    one = runner.answer(RED, "caption en", max_new_tokens=1)
    assert (len(one.token_ids), one.truncated) == (1, True)
    assert model.runs[-3:] == ["vision_encoder", "projector", "decoder_step"]


def test_an_empty_answer_is_an_answer(runner: Runner, model: FakeModel, fake_bundle: Bundle):
    model.words = [fake_bundle.manifest.token_ids.eos]
    answer = runner.answer(RED, "caption en")
    assert (answer.text, answer.token_ids, answer.truncated) == ("", (), False)


def test_boxes_are_in_pixels_of_the_first_image(runner: Runner, model: FakeModel, fake_bundle: Bundle):
    model.words = [
        *piece(fake_bundle, "<loc0000><loc0512><loc0512><loc1023> cat ; <loc0001> dog"),
        fake_bundle.manifest.token_ids.eos,
    ]
    answer = runner.answer([RED, BLUE], "detect cat", max_new_tokens=40)
    assert [(b.label, b.y1, b.x1, b.y2) for b in answer.boxes] == [("cat", 0, 25, 20)]
    assert len(answer.warnings) == 1


@pytest.mark.parametrize("asked", [0, -1])
def test_a_limit_below_one_is_refused(runner: Runner, asked: int):
    with pytest.raises(UsageError, match="at least 1"):
        runner.answer(RED, "caption en", max_new_tokens=asked)


def test_what_does_not_fit_the_bundle_is_refused(runner: Runner, model: FakeModel):
    with pytest.raises(InputError, match="--context"):
        runner.answer(RED, "caption en", max_new_tokens=CONTEXT)
    with pytest.raises(InputError, match="shorten the prompt"):
        runner.answer(RED, "caption " * CONTEXT)
    with pytest.raises(InputError, match="image"):
        runner.answer([RED] * 20, "caption en")
    assert "decoder_step" not in model.runs


def test_a_long_prompt_gets_as_long_an_answer_as_there_is_room(runner: Runner, fake_bundle: Bundle):
    words = CONTEXT - IMAGE_TOKENS - 2 - 3
    prompt = next(p for n in range(1, 200) if len(piece(fake_bundle, p := "x " * n)) >= words)
    room = CONTEXT - IMAGE_TOKENS - 2 - len(piece(fake_bundle, prompt))
    answer = runner.answer(RED, prompt)
    assert (len(answer.token_ids), answer.truncated) == (room, True)


@pytest.mark.parametrize("images", [[], ()])
def test_an_answer_is_about_at_least_one_image(runner: Runner, images: Any):
    with pytest.raises(UsageError, match="no image"):
        runner.answer(images, "caption en")


def test_images_count_in_their_order(runner: Runner):
    both, other, alone = (runner.answer(i, "caption en").token_ids for i in ([RED, BLUE], [BLUE, RED], RED))
    assert len({both, other, alone}) == 3
    assert runner.answer([RED], "caption en").token_ids == alone


@pytest.mark.parametrize("poison", [1, 2, 5])
def test_numbers_that_are_not_finite_end_one_answer_and_not_the_next(runner: Runner, model: FakeModel, poison: int):
    sound = runner.answer(RED, "caption en")
    model.poison = len([r for r in model.runs if r == "decoder_step"]) + poison
    with pytest.raises(NumericError, match="decoder_step"):
        runner.answer(RED, "caption en")
    assert runner.answer(RED, "caption en") == sound


def test_the_pieces_of_a_stream_are_the_answers_text(runner: Runner):
    for prompt in ("caption en", "ocr", "answer en what is this?"):
        pieces = list(runner.stream(RED, prompt))
        assert "".join(pieces) == runner.answer(RED, prompt).text
        assert len(pieces) > 1


def test_a_stream_refuses_what_it_cannot_answer_when_it_is_made(runner: Runner):
    with pytest.raises(InputError):
        runner.stream(RED, "")


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_stream_that_is_left_does_not_change_the_next_answer(runner: Runner, after: int):
    alone = runner.answer(BLUE, "ocr")
    stream = runner.stream(RED, "caption en")
    list(itertools.islice(stream, after))
    assert runner.answer(BLUE, "ocr") == alone
    del stream
    assert runner.answer(BLUE, "ocr") == alone


def test_streams_of_one_runner_do_not_disturb_each_other(runner: Runner):
    asked = [(RED, "caption en"), (BLUE, "caption en"), (RED, "ocr")]
    alone = [runner.answer(*a).text for a in asked]
    streams = [runner.stream(*a) for a in asked]
    together = ["".join(filter(None, column)) for column in zip(*itertools.zip_longest(*streams), strict=True)]
    assert together == alone
    assert len(set(alone)) == 3


def test_closing_closes_every_session(fake_bundle: Bundle, model: FakeModel):
    with Runner(fake_bundle) as runner:
        assert [s.name for s in model.sessions] == list(fake_bundle.manifest.graphs)
        assert not any(s.closed for s in model.sessions)
    assert all(s.closed for s in model.sessions)
    runner.close()  # again is harmless


def test_an_engine_that_pgx_does_not_know_is_refused(tmp_path: Path):
    with pytest.raises(EngineError, match="'tpu'"):
        open_session("tpu", tmp_path / "graph.onnx")


# Real bundles


@pytest.fixture(params=["random_bundle", "tiny_112", "tiny_224"])
def real(request: pytest.FixtureRequest) -> Iterator[Runner]:
    pytest.importorskip("onnxruntime")
    with Runner.from_pretrained(request.getfixturevalue(request.param), threads=1) as runner:
        yield runner


def test_a_real_bundle_answers_the_same_however_it_is_asked(real: Runner):
    asked = [(RED, "caption en"), (BLUE, "ocr"), ([RED, BLUE], "detect red circle")]
    alone = [real.answer(*a, max_new_tokens=12) for a in asked]
    assert [real.answer(*a, max_new_tokens=12) for a in asked] == alone
    assert [len(a.token_ids) for a in alone] == [len(a.token_ids[:12]) for a in alone]
    left = real.stream(RED, "ocr", max_new_tokens=12)
    next(left, None)
    streams = [real.stream(*a, max_new_tokens=12) for a in asked]
    together = ["".join(filter(None, column)) for column in zip(*itertools.zip_longest(*streams), strict=True)]
    assert together == [a.text for a in alone]


def test_the_first_tokens_do_not_depend_on_the_limit(real: Runner):
    long = real.answer(RED, "caption en", max_new_tokens=12).token_ids
    for limit in (1, 2, 7):
        assert real.answer(RED, "caption en", max_new_tokens=limit).token_ids == long[:limit]


def test_closing_frees_the_engines_memory(a_bundle: Path):
    pytest.importorskip("onnxruntime")
    runner = Runner.from_pretrained(a_bundle)
    sessions = [weakref.ref(runner.session(name)) for name in runner.loaded]
    runner.answer(RED, "caption en", max_new_tokens=2)
    runner.close()
    gc.collect()
    assert sessions
    assert [session() for session in sessions] == [None] * len(sessions)


def test_a_graph_that_the_engine_refuses_is_an_integrity_error(tmp_path: Path):
    pytest.importorskip("onnxruntime")
    (tmp_path / "g.onnx").write_bytes(b"\x08\x08:\x03bad")
    with pytest.raises(IntegrityError, match=r"cannot load .*g\.onnx"):
        open_session("cpu", tmp_path / "g.onnx")


def test_a_graph_that_takes_other_arrays_is_an_integrity_error(tmp_path: Path):
    pytest.importorskip("onnxruntime")
    from pgxport.runners.open_session import PROBE

    (tmp_path / "probe.onnx").write_bytes(PROBE)
    session = open_session("cpu", tmp_path / "probe.onnx")
    assert session.run({"x": np.ones(1, np.float32)})["y"] == 2
    for feeds in ({"x": np.ones(7, np.float32)}, {"x": np.ones(1, np.int64)}, {"z": np.ones(1, np.float32)}, {}):
        with pytest.raises((IntegrityError, EngineError), match=r"cannot run .*probe\.onnx"):
            session.run(feeds)
    with pytest.raises((IntegrityError, EngineError), match="cache"):
        session.new_cache({"past_key_values.0.key": (1, 1, 4, 4)})
