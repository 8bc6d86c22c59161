# SPDX-License-Identifier: Apache-2.0
"""The files of a report: what a stranger's data can do to them (nothing), and that their numbers are report.json's."""

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hostile import MARK, PAYLOADS, Page, assert_harmless
from made_up_report import device, disagreement, failed, report, row
from PIL import Image

pytest.importorskip("altair")
pytest.importorskip("vl_convert")

from pgxport.errors import InputError, UsageError
from pgxport.reporting import chart, files, tables
from pgxport.reporting.disagreements import Album, named, word_diff
from pgxport.reporting.report import merge
from pgxport.reporting.schema import PICTURE, Fidelity, Report, schema

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def attacked() -> tuple[Report, dict[str, bytes]]:
    """A report in which every text that can come from data is an attack."""
    album = Album()
    picture = album.add(Image.new("RGB", (40, 30), "red"))
    rows = [row("fp32")]
    rows += [row(p, ms=5 + i, name=p, recipe=p, notes=(p,)) for i, p in enumerate(PAYLOADS)]
    shown = tuple(
        disagreement({"fp32": PAYLOADS[i - 1], p: p}, sample=p, prompt=p, truth=p, task=p, picture=picture)
        for i, p in enumerate(PAYLOADS)
    )
    made = device(*rows, failed("broken", PAYLOADS[0]), name=PAYLOADS[1], command=PAYLOADS[2], disagreements=shown)
    return report(made, device(row(PAYLOADS[3]), name=PAYLOADS[4])), album.files


@pytest.fixture(scope="module")
def written(attacked: tuple[Report, dict[str, bytes]]) -> dict[str, bytes]:
    return files.rendered(*attacked)


def test_nothing_of_the_data_becomes_an_element_or_an_attribute(written: dict[str, bytes]):
    assert_harmless(written["report.html"].decode())


def test_the_page_says_what_the_data_says(written: dict[str, bytes]):
    page = Page(written["report.html"].decode())
    names = [cells[0] for cells in page.tables[0][1:]]
    visible = [re.sub(r"\x1b\[31m|[\x00\u202e]", "", payload) for payload in PAYLOADS]
    assert names == ["fp32", *visible, "broken"]


def test_the_page_asks_no_network_and_needs_no_script(written: dict[str, bytes]):
    text = written["report.html"].decode()
    assert "<script" not in text.lower()
    assert "default-src 'none'" in text
    outside = re.findall(r"(?:src|href|url)\s*[=(]\s*[\"']?(?:https?:|//)", text)
    assert not outside


def test_no_script_runs_even_without_the_policy(written: dict[str, bytes], tmp_path: Path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium is installed")
    page = re.sub(r"<meta http-equiv[^>]*>", "", written["report.html"].decode())

    def dom(content: str) -> str:
        (tmp_path / "page.html").write_text(content)
        command = [
            browser,
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            "--dump-dom",
        ]
        return subprocess.run(
            [*command, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120, check=True
        ).stdout

    assert "data-pwned" in dom(page.replace("<body>", f"<body><script>{MARK}</script>"))[:400]  # the trap works
    assert "data-pwned" not in dom(page)[:400]


def test_markdown_holds_no_html_and_no_link_of_the_data(written: dict[str, bytes]):
    text = written["report.md"].decode()
    assert "<" not in text
    assert re.findall(r"(?<!\\)\]\(([^)]*)\)", text) == ["chart.svg"]
    cells = 0
    for line in text.splitlines():
        columns = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert columns in (0, cells) or cells == 0, line  # no cell of the data ends its column
        cells = columns


def test_the_charts_texts_are_texts(written: dict[str, bytes]):
    svg = written["chart.svg"].decode()
    assert "<script" not in svg
    assert "onerror=" not in re.sub(r">[^<]*<|aria-label=\"[^\"]*\"", "", svg)
    assert written["chart.png"][:8] == b"\x89PNG\r\n\x1a\n"


def test_the_gate_is_drawn_where_a_bundle_would_fail_it():
    d = device(row("fp32", quality=0.9), row("int8", quality=0.891))  # 99 % of 0.9
    assert chart.gate_line(d) == pytest.approx(89.1)
    assert "gate, 0.99 of the reference's" in str(chart.device_svg(d))
    assert "The gate is at 89.1 %." in chart.describe(d)
    lost = device(failed("fp32", "gone"), row("int8"))
    assert chart.gate_line(lost) is None
    assert "gate" not in str(chart.device_svg(lost))


@pytest.mark.parametrize("devices", [1, 2])
def test_the_chart_is_one_that_vega_lite_knows(devices: int):
    import altair

    made = report(*(device(row("fp32"), row("int8", ms=5)) for _ in range(devices)))
    kind = altair.VConcatChart if devices > 1 else altair.LayerChart
    kind.from_dict(chart.spec(made.devices, background="white"), validate=True)


def test_a_spreadsheet_computes_nothing():
    made = report(device(row("fp32"), row("=HYPERLINK(1)"), row("@SUM(1)")))
    cells = [cells[1] for cells in csv.reader(io.StringIO(files.results_csv(made)))]
    assert cells == ["bundle", "fp32", "'=HYPERLINK(1)", "'@SUM(1)"]


def test_the_numbers_of_every_file_are_those_of_the_json():
    near = Fidelity(
        identical=0.5, token_agreement=0.9, first_divergence=1.0, diverged=25, answers=50, positions=9, kl=0.25, kl_worst=1.0
    )
    more = {"fidelity": near, "load_seconds": {"verify": 0.5, "load": 1.0}, "notes": ("not throttled",)}
    made = report(device(row("fp32", ms=31.4, fidelity=None), row("int8", ms=12.3, quality=0.87, **more)))
    written = files.rendered(made, {})
    read = Report.model_validate_json(written["report.json"])
    page = Page(written["report.html"].decode())
    expected = [*tables.all_tables(read.devices[0]), tables.environment(read.devices[0])]
    assert [[list(table.head), *map(list, table.rows)] for table in expected] == page.tables
    (bundles,) = [table for table in page.tables if table[0][0] == "bundle" and "answer, ms" in table[0]]
    assert bundles[2][bundles[0].index("answer, ms")].startswith("12.3 (")
    assert "| int8 | below 0.99 | 10 | 87.0" in written["report.md"].decode()
    rows = list(csv.DictReader(io.StringIO(written["results.csv"].decode())))
    for r, given in zip(rows, read.devices[0].rows, strict=True):
        assert float(r["answer_p50_seconds"]) == given.seconds["answer"].p50
        assert given.quality is not None
        assert float(r["quality"]) == given.quality.value
    assert (rows[1]["kl"], rows[1]["identical"], rows[1]["load_seconds"], rows[1]["clocks"]) == (
        "0.25",
        "0.5",
        "1.5",
        "not throttled",
    )
    assert (rows[0]["kl"], rows[0]["clocks"]) == ("", "")  # not measured


def test_the_json_has_the_published_schema(written: dict[str, bytes]):
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads(written["report.json"]), json.loads(schema()))
    published = ROOT / "docs" / "reference" / "report.schema.json"
    if published.exists():  # the wheel is tested without docs/
        assert published.read_text() == schema(), "python -m pgxport.reporting.schema > docs/reference/report.schema.json"


def test_a_picture_is_a_plain_file_beside_the_report_or_left_out(tmp_path: Path):
    album = Album()
    name = album.add(Image.new("RGB", (40, 30), "red"))
    shown = disagreement({"fp32": "a", "int8": "b"}, picture=name)
    made = report(device(row("fp32"), row("int8"), disagreements=(shown,)))
    files.write(made, album.files, tmp_path)
    assert files.read_pictures(files.read(tmp_path), tmp_path) == album.files
    (tmp_path / "pictures" / name).write_text("<svg onload=alert(1)>")
    assert files.read_pictures(made, tmp_path) == {}
    (tmp_path / "pictures" / name).unlink()
    (tmp_path / "pictures" / name).symlink_to("/etc/passwd")
    assert files.read_pictures(made, tmp_path) == {}


def saved(made: Report, pictures: dict[str, bytes], folder: Path) -> Path:
    """What `merge` reads of a report."""
    (folder / "pictures").mkdir(parents=True)
    (folder / "report.json").write_text(made.model_dump_json())
    for name, content in pictures.items():
        (folder / "pictures" / name).write_bytes(content)
    return folder


def test_joined_reports_are_at_most_5_mb_and_every_device_shows_its_worst(tmp_path: Path):
    random, paths, album = np.random.default_rng(0), [], Album()
    noise = [album.add(Image.fromarray(random.integers(0, 255, (320, 320, 3), np.uint8))) for _ in range(30)]
    shown = [disagreement({"fp32": "a", "int8": "b"}, sample=f"s{i}", picture=name) for i, name in enumerate(noise)]
    for n in range(3):
        one = report(device(row("fp32"), row("int8"), name=f"device {n}", disagreements=tuple(shown)))
        paths.append(saved(one, album.files, tmp_path / str(n)) / "report.json")
    made = merge(paths, tmp_path / "all")
    assert 3_000_000 < (tmp_path / "all" / "report.html").stat().st_size <= 5_000_000
    for given in made.devices:
        assert [d.sample for d in given.disagreements] == [f"s{i}" for i in range(len(given.disagreements))]
        assert len(given.disagreements) > 5
    written = {file.name for file in (tmp_path / "all" / "pictures").iterdir()}
    assert written == named([d for m in made.devices for d in m.disagreements])


def test_a_folder_that_is_joined_brings_its_pictures(tmp_path: Path):
    album = Album()
    shown = disagreement({"fp32": "a", "int8": "b"}, picture=album.add(Image.new("RGB", (40, 30), "red")))
    one = report(device(row("fp32"), row("int8"), disagreements=(shown,)))
    merge([saved(one, album.files, tmp_path / "a"), saved(one, {}, tmp_path / "b")], tmp_path / "both")
    assert (tmp_path / "both" / "report.html").read_text().count("data:image/webp") == 2
    assert {file.name for file in (tmp_path / "both" / "pictures").iterdir()} == set(album.files)


@pytest.mark.parametrize("name", ["../../etc/passwd", "a.webp", "0123456789abcdef.svg", "0123456789abcdef.webp\n"])
def test_a_report_that_names_another_file_is_refused(tmp_path: Path, name: str):
    made = json.loads(report(device(row("fp32"), disagreements=(disagreement({"fp32": "a"}),))).model_dump_json())
    made["devices"][0]["disagreements"][0]["picture"] = name
    (tmp_path / "report.json").write_text(json.dumps(made))
    with pytest.raises(InputError, match="picture"):
        files.read(tmp_path)
    assert not re.fullmatch(PICTURE, name)


def test_what_is_not_a_report_is_an_error(tmp_path: Path):
    with pytest.raises(UsageError, match="no such report"):
        files.read(tmp_path)
    (tmp_path / "report.json").write_text('{"format_version": 2}')
    with pytest.raises(InputError, match="format 1"):
        files.read(tmp_path)


def test_words_that_differ():
    assert word_diff("<loc0001><loc0002> cat", "<loc0001><loc0003> cat") == [
        ("same", "<loc0001>"),
        ("gone", "<loc0002>"),
        ("new", "<loc0003>"),
        ("same", " cat"),
    ]
    assert word_diff("", "a") == [("new", "a")]
    assert word_diff("", "") == []
    assert word_diff("a " * 500, "b") == [("gone", "a " * 500), ("new", "b")]


@pytest.mark.parametrize(("before", "after"), [("a <b>", "a < b >"), ("ä\nö", "ä ö"), ("", "x  y")])
def test_the_pieces_are_the_two_texts(before: str, after: str):
    pieces = word_diff(before, after)
    assert "".join(text for kind, text in pieces if kind != "new") == before
    assert "".join(text for kind, text in pieces if kind != "gone") == after
