# SPDX-License-Identifier: Apache-2.0
"""Throughput at batch sizes: the rows of a batch are the answers that each gives alone, and the figures are what was measured."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from pgxport import cli
from pgxport.benchmarking import measure
from pgxport.benchmarking.bench import bench, render
from pgxport.benchmarking.measure import Batches, batch_sizes, open_bundle
from pgxport.bundle.reader import Bundle
from pgxport.errors import UsageError
from pgxport.models.tiny.scenes import draw
from pgxport.runners.runner import Runner

# float32 sums in another order where a product has more rows; the logits reach 25.
TOLERANCE = 5e-5
SHORT = Batches((1, 3), prompt_tokens=4, new_tokens=3)


@pytest.fixture(scope="module")
def int8_112(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx_ir")
    from pgxport.exporter.export import export
    from pgxport.exporter.prepare import ExportOptions

    output = tmp_path_factory.mktemp("int8") / "tiny-112-int8"
    return export(ExportOptions(output=output, size="tiny", res=112, precision="int8", parity=0)).path


@pytest.mark.parametrize("bundle", ["tiny_112", "int8_112"])
def test_a_row_of_a_batch_is_what_it_is_alone(bundle: str, request: pytest.FixtureRequest):
    with Runner.from_pretrained(request.getfixturevalue(bundle), threads=1) as runner:
        pipeline = runner
        ids = pipeline.prompt_ids("detect cross")
        prefixes = [pipeline.prefix(pipeline.encode([draw("test", i).image]), ids) for i in range(3)]
        capacity = prefixes[0].shape[1] + 8
        together = pipeline.decoder(capacity, rows=3)
        alone = [pipeline.decoder(capacity) for _ in prefixes]
        fed, rows = prefixes, np.concatenate(prefixes)
        for step in range(8):
            expected = np.stack([one.feed(embeds).copy() for one, embeds in zip(alone, fed, strict=True)])
            found = together.feed_rows(rows)
            assert found == pytest.approx(expected, abs=TOLERANCE), step
            fed = [pipeline.embed([int(token)]) for token in expected.argmax(-1)]
            rows = np.concatenate(fed)
        assert len({logits.tobytes() for logits in expected}) == 3  # three different answers


def test_each_size_is_measured_and_summed_up(tiny_112: Path):
    done = bench([tiny_112], SHORT, repetitions=2, threads=1)
    (m,) = done.measurements
    assert m.reason is None
    assert {stage for stage in m.seconds if "/" in stage} == {
        f"{s}/{n}" for s in ("first_token", "step", "answer") for n in (1, 3)
    }
    assert all(len(values) == 2 for stage, values in m.seconds.items() if "/" in stage)
    found = json.loads(json.dumps(done.to_json()))
    batches = found["bundles"][0]["batches"]
    assert set(batches) == {"1", "3"}
    for size, batch in batches.items():
        walls = sorted(m.seconds[f"answer/{size}"])
        assert batch["images_per_second"]["low"] == pytest.approx(int(size) / walls[-1])
        assert batch["tokens_per_second"]["high"] == pytest.approx(int(size) / min(m.seconds[f"step/{size}"]))
        assert batch["peak_vram"] is None
        assert batch["peak_resident"] is None or batch["peak_resident"] > 10e6
    text = render(done)
    assert "images a second, 3 at a time" in text
    assert "GPU" not in text  # of a bundle for the CPU there is nothing to say


def test_the_peak_of_a_size_is_not_that_of_a_larger_one(tiny_112: Path):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("the system does not forget a peak")
    done = bench([tiny_112], Batches((1, 48), prompt_tokens=4, new_tokens=2), repetitions=1, threads=1)
    peaks = done.measurements[0].facts["peaks"]
    assert peaks["1"]["resident"] * 1.1 < peaks["48"]["resident"]


def test_several_bundles_are_compared_at_each_size(tiny_112: Path):
    done = bench([tiny_112, tiny_112], SHORT, repetitions=2, threads=1)
    assert {stage for stage, *_ in done.comparisons()} == {f"{s}/{n}" for s in ("first_token", "step", "answer") for n in (1, 3)}
    assert re.search("whole answer, 3 at a time: [AB]", render(done))  # which is faster depends on what else the machine does


def test_a_batch_too_long_for_the_bundle_is_a_failed_row(tiny_112: Path):
    done = bench([tiny_112], Batches((1,), new_tokens=100_000), repetitions=1)
    assert "--context" in (done.measurements[0].reason or "")
    assert done.measurements[0].exit_code == 3
    assert "FAILED" in render(done)


def test_a_cache_of_one_sequence_is_refused(tiny_112: Path, monkeypatch: pytest.MonkeyPatch):
    opened = Bundle.open(tiny_112)
    cache = opened.manifest.cache.model_copy(update={"kind": "delta"})
    other = Bundle(opened.path, opened.manifest.model_copy(update={"cache": cache}))
    monkeypatch.setattr(measure.Bundle, "open", lambda _: other)
    with pytest.raises(UsageError, match="holds one sequence; measure it without --batch"):
        open_bundle({"bundle": str(tiny_112), "engine": "cpu", "threads": 1, "Batches": {"sizes": [1]}})


@pytest.mark.parametrize("text", ["", "0", "1,,2", "-1", "two", "1.5", "²", "5000"])
def test_what_is_no_batch_size_is_a_usage_error(text: str):
    with pytest.raises(UsageError, match="is not a batch size"):
        batch_sizes(text)


@pytest.mark.parametrize("more", [["--decoder-only"], ["--image", "a.png", "--image", "b.png"]])
def test_batches_go_with_one_picture(more: list[str]):
    import click

    with pytest.raises(click.UsageError, match="--batch repeats one image and prompt"):
        cli.cli.main(["bench", "b", "--batch", "1,2", *more], standalone_mode=False)


def test_a_report_shows_the_throughput_it_was_asked_for(tiny_112: Path, tmp_path: Path):
    for library in ("altair", "vl_convert", "sacrebleu", "rouge_score", "pycocotools"):
        pytest.importorskip(library)
    from pgxport.data.loader import DataOptions
    from pgxport.reporting import tables
    from pgxport.reporting.report import ReportOptions, report

    missing = str(tmp_path / "missing")
    given = ReportOptions((str(tiny_112), missing), tmp_path / "report", DataOptions(limit=1), threads=1, batch=(1, 2))
    (device,) = report(given).devices
    row, broken = device.rows
    assert [b.size for b in row.batches] == [1, 2]
    assert all(b.images_per_second.low <= b.images_per_second.median <= b.images_per_second.high for b in row.batches)
    assert (broken.status, broken.batches) == ("failed", ())
    assert "--batch 1,2" in device.command
    (table,) = [t for t in tables.all_tables(device) if t.id == "throughput"]
    assert [line[:2] for line in table.rows] == [(tiny_112.name, "1"), (tiny_112.name, "2")]
    assert table.rows[1][2] == tables.rate(row.batches[1].images_per_second)
    assert "Throughput" in (tmp_path / "report" / "report.html").read_text()
    with pytest.raises(UsageError, match="--batch measures this machine"):
        report(ReportOptions((str(tiny_112),), tmp_path / "other", batch=(1,), cluster="auto"))
