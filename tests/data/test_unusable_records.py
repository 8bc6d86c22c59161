# SPDX-License-Identifier: Apache-2.0
"""A record that cannot be used is a row: it is counted and named, and the others are read; too many are an error."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from pgxport.data import records
from pgxport.data.loader import DataOptions, DataSet, all_pictures, first_samples, load
from pgxport.data.pictures import find_pictures
from pgxport.errors import InputError, UsageError
from pgxport.metrics.sample import Sample
from pgxport.runners.many import PictureAnswer, read

GOOD = {"image": "day.png", "prompt": "ocr", "answer": "M31"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sound pictures, one cut short, one that is none, and one outside."""
    made = tmp_path / "data"
    (made / "night").mkdir(parents=True)
    Image.new("RGB", (40, 30), "red").save(made / "day.png")
    Image.effect_noise((64, 64), 90).convert("RGB").save(made / "night" / "moon.jpg")
    whole = (made / "night" / "moon.jpg").read_bytes()
    (made / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (made / "none.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    (tmp_path / "secret.png").write_bytes((made / "day.png").read_bytes())
    return made


def write(folder: Path, *rows: object, name: str = "rows.jsonl", end: str = "\n") -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    (folder / name).write_bytes("".join(line + end for line in lines).encode("utf-8"))
    return folder / name


UNUSABLE = {
    "a picture that is missing": ({"image": "dusk.png"}, "no image 'dusk.png'"),
    "a picture that is cut short": ({"image": "cut.jpg"}, "cut.jpg: JPEG of 64 × 64 cannot be decoded"),
    "a picture that is none": ({"image": "none.png"}, "none.png: not a readable"),
    "a picture outside": ({"image": "../secret.png"}, "leads out of"),
    "a picture outside, from Windows": ({"image": r"night\..\..\secret.png"}, "leads out of"),
    "a picture on a drive": ({"image": r"D:\shots\day.png"}, "leads out of"),
    "a picture on a server": ({"image": r"\\nas\shots\day.png"}, "leads out of"),
    "a picture of a wrong type": ({"image": 3.5}, "'image' is 3.5, and has to be the name"),
    "a name that is no text": ({"image": "\ud83d.png"}, "no path|no image"),
    "an empty prompt": ({"prompt": "  "}, "'prompt' is '  ', and has to be text"),
    "a prompt of a wrong type": ({"prompt": {"en": "ocr"}}, "'prompt' is {'en': 'ocr'}, and has to be text"),
    "half of a character": ({"prompt": "ocr \udc00"}, "'prompt' is .*, and has to be text"),
    "half of a character in an answer": ({"answer": "\udc00"}, "'answer' is .*, and has to be text"),
    "an unknown metric": ({"metric": "mot_a"}, "'metric' is 'mot_a', and has to be one of exact_match, "),
    "an unknown task": ({"task": "track"}, "'task' is 'track', and has to be one of vqa, "),
    "an answer of a wrong type": ({"answer": [1]}, r"'answer' is \[1\], and has to be text or a list of texts"),
    "no answer": ({"answer": []}, r"'answer' is \[\], and has to be text or a list of texts"),
    "a true box with its corners exchanged": ({"prompt": "detect bus", "answer": "<loc0500><loc0010><loc0400><loc0900> bus"}, "empty box"),
    "a line that is cut short": ('{"image": "day.png", "pro', "not JSON"),
    "a line that is a list": ("[1, 2]", "a JSON list"),
    "a number that Python does not convert": ('{"image": "day.png", "prompt": "ocr", "n": ' + "7" * 5000 + "}", "not JSON"),
}  # fmt: skip


def with_one(folder: Path, name: str, place: int = 5) -> Path:
    """Ten sound records, and the one of that name among them."""
    fields, _ = UNUSABLE[name]
    line = fields if isinstance(fields, str) else json.dumps({**GOOD, **fields})
    return write(folder, *[GOOD] * place, line, *[GOOD] * (10 - place))


@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.parametrize("place", [0, 5])
def test_one_is_counted_and_named_and_the_others_are_read(folder: Path, name: str, place: int):
    found = load(DataOptions(with_one(folder, name, place)))
    assert (found.records, len(found.samples), found.skipped, len(found.unusable)) == (11, 10, 1, 1)
    (record,) = found.unusable
    assert record.where == f"{folder}/rows.jsonl:{place + 1}"
    assert re.search(UNUSABLE[name][1], record.why)
    (remark,) = found.remarks
    assert remark == f"1 of the records cannot be used and are left out: {record.why}"
    assert record.why.startswith(record.where)


@pytest.mark.parametrize(
    "name", ["a picture that is missing", "a picture that is cut short", "an empty prompt", "a line that is a list"]
)
def test_calibration_takes_the_next_record_instead(folder: Path, name: str):
    found = first_samples(with_one(folder, name, place=2), 10)
    assert [sample.id for sample in found.samples] == [f"rows.jsonl:{n}" for n in (1, 2, *range(4, 12))]
    assert [record.where for record in found.unusable] == [f"{folder}/rows.jsonl:3"]
    with pytest.raises(InputError, match="1 of 6 records"):
        first_samples(folder / "rows.jsonl", 5)


def test_what_lies_behind_the_last_sample_is_not_counted(folder: Path):
    found = first_samples(with_one(folder, "a picture that is missing", place=10), 5)
    assert (len(found.samples), found.taken, found.unusable) == (5, 5, ())


def refuse(sample: Sample) -> None:
    if sample.id == "long":
        raise InputError("too many tokens")


def test_a_sample_that_the_caller_refuses_is_a_record_that_cannot_be_used(folder: Path):
    file = write(folder, *[GOOD] * 10, {**GOOD, "id": "long"})
    for found in (load(DataOptions(file), refuse), first_samples(file, 99, refuse)):
        assert [record.why for record in found.unusable] == [f"{file}:11: too many tokens"]


def test_a_tenth_may_be_unusable_and_no_more(folder: Path):
    missing = [{**GOOD, "image": f"gone-{n}.png"} for n in range(7)]
    assert len(load(DataOptions(write(folder, *missing[:1], *[GOOD] * 9))).samples) == 9
    with pytest.raises(InputError) as error:
        load(DataOptions(write(folder, *missing, *[GOOD] * 50)))
    text = str(error.value)
    assert "rows.jsonl: 7 of 57 records of format jsonl cannot be used, and at most 10% may be so: " in text
    assert all((f"'gone-{n}.png'" in text) == (n < 5) for n in range(7))
    assert text.endswith(" and 2 more")
    with pytest.raises(InputError, match=r"1 of 1 records .*rows\.jsonl:1: no image"):
        load(DataOptions(write(folder, missing[0])))


def test_only_what_the_limit_takes_is_counted(folder: Path):
    file = write(folder, *[GOOD, {**GOOD, "image": "gone.png"}] * 10)
    found = load(DataOptions(file, limit=10))  # every second
    assert (found.records, found.taken, len(found.samples), found.skipped) == (20, 10, 10, 0)


def test_a_picture_is_decoded_once_however_many_records_name_it(folder: Path, monkeypatch: pytest.MonkeyPatch):
    opened: list[object] = []
    decode = records.load_image
    monkeypatch.setattr(records, "load_image", lambda source: opened.append(source) or decode(source))
    located = {**GOOD, "prompt": "detect wall", "answer": "<loc0000><loc0000><loc0512><loc0512> wall"}
    load(DataOptions(write(folder, *[GOOD, located] * 10, *[{**GOOD, "image": "cut.jpg"}] * 2)))
    assert opened == [folder / "day.png", folder / "cut.jpg"]


def test_pictures_of_records_are_found_without_decoding_them(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records, "load_image", None)
    missing = {**GOOD, "image": "gone.png"}
    file = write(folder, *[GOOD] * 8, {**GOOD, "image": "cut.jpg"}, missing, GOOD)
    pictures, unusable = all_pictures(file)
    assert list(pictures) == [folder / "day.png", folder / "cut.jpg"]
    assert [record.where for record in unusable] == [f"{file}:10"]
    *found, row = find_pictures([str(file)])
    assert found == [folder / "day.png", folder / "cut.jpg"]
    assert isinstance(row, PictureAnswer)
    assert (row.image, row.exit_code, read(row)) == (f"{file}:10", 3, row)
    with pytest.raises(InputError, match="2 of 11 records"):
        find_pictures([str(write(folder, *[GOOD] * 9, missing, missing))])


def test_a_folder_with_too_many_files_is_no_fault_of_a_record(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(records, "MAX_FILES", 3)
    (folder / "list").mkdir()
    file = write(folder / "list", *[GOOD] * 30, {**GOOD, "image": "gone.png"})
    with pytest.raises(UsageError, match="holds more than 3 files"):
        load(DataOptions(file, images=folder))


def test_a_text_beside_a_picture_that_cannot_be_used_is_one(folder: Path):
    for n in range(10):
        Image.new("RGB", (8, 8)).save(folder / f"s{n}.png")
        (folder / f"s{n}.txt").write_bytes(b"ocr\r\nA\r\n")
    for name in ("day.png", "cut.jpg", "none.png"):
        (folder / name).unlink()
    Image.new("RGB", (8, 8)).save(folder / "alone.png")
    found = load(DataOptions(folder))
    assert {sample.answers for sample in found.samples} == {("A",)}
    assert [record.where for record in found.unusable] == [str(folder / "alone.png")]


# COCO --------------------------------------------------------------------------------------------------------------------


def coco(folder: Path, *, pictures: int = 12, **spoilt: list[object]) -> Path:
    """A picture without objects, and others with one; `spoilt` entries stand behind the sound ones."""
    categories = [{"id": 7, "name": "heron"}, {"id": 3, "name": "reed"}, {"id": 5, "name": "boat"}]
    images: list[object] = [{"id": n, "file_name": "night\\moon.jpg", "height": 64, "width": 64} for n in range(pictures)]
    found: list[object] = [{"id": n, "image_id": n, "category_id": 3, "bbox": [1, 2, 30, 4]} for n in range(1, pictures)]
    document = {"images": images, "annotations": found, "categories": categories}
    for key, entries in spoilt.items():
        document[key] = [*document[key], *entries]
    (folder / "birds.json").write_text(json.dumps(document))
    return folder / "birds.json"


def of_coco(file: Path) -> DataSet:
    return load(DataOptions(file))


def test_a_picture_without_objects_is_asked_for_what_it_lacks(folder: Path):
    found = of_coco(coco(folder))
    assert (len(found.samples), found.skipped) == (12, 0)
    first, second, *_ = found.samples
    # The most frequent label first, then those that no picture has in the file's order.
    assert (first.prompt, first.background, first.regions) == ("detect reed ; heron ; boat", True, ())
    assert (second.prompt, second.background, len(second.regions)) == ("detect reed", False, 1)


def test_a_file_of_pictures_without_objects_is_a_data_set(folder: Path):
    file = folder / "empty.json"
    document = {"images": [{"id": 0, "file_name": "day.png"}], "annotations": [], "categories": [{"id": 0, "name": "heron"}]}
    file.write_text(json.dumps(document))
    (sample,) = of_coco(file).samples
    assert (sample.prompt, sample.background) == ("detect heron", True)
    file.write_text(json.dumps({**document, "categories": []}))
    with pytest.raises(InputError, match=r"1 of 1 records .*'coco labels' is \[\]"):
        of_coco(file)


def test_no_more_labels_are_asked_for_than_a_prompt_takes(folder: Path):
    names = [{"id": 100 + n, "name": f"kind {n}"} for n in range(40)]
    (first, *_) = of_coco(coco(folder, categories=names)).samples
    assert first.prompt == "detect reed ; heron ; boat ; kind 0 ; kind 1 ; kind 2 ; kind 3 ; kind 4"


@pytest.mark.parametrize(
    ("spoilt", "why"),
    [
        ({"images": ["moon.jpg"]}, "image 12 is 'moon.jpg', and has to be an object"),
        ({"images": [{"file_name": "day.png"}]}, "image 12: 'id' is None"),
        ({"images": [{"id": 90, "file_name": "gone.jpg"}]}, "image 90: no image 'gone.jpg'"),
        ({"annotations": [None]}, "annotation 11 is None, and has to be an object"),
        ({"annotations": [{"id": 90, "category_id": 3, "bbox": [0, 0, 1, 1]}]}, "annotation 11: 'image_id' is None"),
        ({"annotations": [{"id": 90, "image_id": 2, "category_id": 3, "bbox": [0, 0, -1, 1]}]}, "image 2, coco objects 90: 'bbox' is"),
        ({"annotations": [{"id": 90, "image_id": 2, "category_id": 8, "bbox": [0, 0, 1, 1]}]}, "image 2, coco objects 90: 'name' is None"),
    ],
)  # fmt: skip
def test_an_entry_that_cannot_be_used_is_a_record_of_its_own_or_spoils_its_picture(folder: Path, spoilt, why):
    (record,) = of_coco(coco(folder, **spoilt)).unusable
    assert f"{folder}/birds.json: {why}" in record.why


def test_a_box_without_area_is_a_true_object(folder: Path):
    flat = [
        {"id": 90 + n, "image_id": 2, "category_id": 5, "bbox": [4, 5, *sides]}
        for n, sides in enumerate([(0, 9), (9, 0), (0, 0)])
    ]
    found = of_coco(coco(folder, annotations=flat))
    assert found.skipped == 0
    assert [r.box for r in found.samples[2].regions if r.label == "boat"] == [(5, 4, 14, 4), (5, 4, 5, 13), (5, 4, 5, 4)]


def test_a_crowd_alone_is_not_asked_and_is_no_fault(folder: Path):
    file = coco(folder)
    document = json.loads(file.read_text())
    document["annotations"][0]["iscrowd"] = 1
    file.write_text(json.dumps(document))
    found = of_coco(file)
    assert (len(found.samples), found.skipped, found.unusable) == (11, 1, ())


# A user's own ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["detect heron", "segment heron ; reed"])
@pytest.mark.parametrize("answer", [{"suffix": ""}, {"answer": " "}, {"answers": [""]}])
def test_an_empty_answer_of_a_locating_task_says_that_nothing_is_there(folder: Path, prompt: str, answer: dict[str, object]):
    (sample,) = load(DataOptions(write(folder, {"image": "day.png", "prefix": prompt, **answer}))).samples
    assert (sample.metric, sample.regions, sample.background) == ("box_accuracy", (), True)


def test_an_empty_answer_of_another_task_is_a_text(folder: Path):
    (sample,) = load(DataOptions(write(folder, {"image": "day.png", "prefix": "ocr", "suffix": ""}))).samples
    assert (sample.metric, sample.answers, sample.background) == ("exact_match", ("",), False)


def test_true_boxes_without_area_stand_beside_others(folder: Path):
    suffix = "<loc0512><loc0000><loc0512><loc1023> wire ; <loc0000><loc0000><loc0512><loc0512> wall ; <loc0256><loc0256><loc0256><loc0256> dot"
    (sample,) = load(
        DataOptions(write(folder, {"image": "day.png", "prefix": "detect wire ; wall ; dot", "suffix": suffix}))
    ).samples
    boxes = {region.label: region.box for region in sample.regions}
    assert boxes == {"wall": (0, 0, 15, 20), "wire": (15, 0, 15, 1023 / 1024 * 40), "dot": (7.5, 10, 7.5, 10)}


@pytest.mark.parametrize("image", ["image", "file_name", "image_path"])
@pytest.mark.parametrize("prompt", ["prompt", "prefix", "question"])
@pytest.mark.parametrize("answer", ["answer", "answers", "suffix"])
def test_every_reader_knows_every_name_of_a_key(folder: Path, image: str, prompt: str, answer: str):
    file = write(
        folder, {image: "night\\moon.jpg", prompt: "ocr", answer: "M31"}, {image: "day.png", prompt: "ocr", answer: ["M31"]}
    )
    for samples in (load(DataOptions(file)).samples, first_samples(file, 9).samples):
        assert [(s.image, s.prompt, s.answers) for s in samples] == [
            (folder / "night" / "moon.jpg", "ocr", ("M31",)),
            (folder / "day.png", "ocr", ("M31",)),
        ]
    assert find_pictures([str(file)]) == [folder / "night" / "moon.jpg", folder / "day.png"]


def test_a_prompt_of_the_command_holds_a_records_own(folder: Path):
    file = write(folder, {"image": "day.png", "question": "how many?", "answer": "2"})
    (sample,) = load(DataOptions(file, prompt="answer en {question}")).samples
    assert (sample.prompt, sample.task) == ("answer en how many?", "answer")


def test_a_name_with_a_backslash_of_its_own_is_that_file(folder: Path):
    Image.new("RGB", (8, 8)).save(folder / "night\\moon.jpg", "JPEG")
    (sample,) = load(DataOptions(write(folder, {**GOOD, "image": "night\\moon.jpg"}))).samples
    assert sample.image == folder / "night\\moon.jpg"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("breaks", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r"])
def test_a_line_ends_at_a_line_feed_and_nowhere_else(folder: Path, end: str, mark: str, breaks: str):
    row = '{"image": "day.png", "prompt": "ocr", "answer": "left' + breaks + 'right"}'
    file = write(folder, mark + row, row, end=end)
    for found in (load(DataOptions(file)), first_samples(file, 9)):
        assert [s.answers for s in found.samples] == [(f"left{breaks}right",)] * 2
        assert found.unusable == ()


# Another kind ------------------------------------------------------------------------------------------------------------

STRANGERS = {
    "chats of two lines": [{"messages": [{"role": "user", "content": "hi"}], "images": ["a.jpg"]}] * 2,
    "a chat of one line": [{"conversations": [{"from": "human", "value": "hi"}], "picture": "a.jpg"}],
    "shapes": [{"version": "5.0", "shapes": [{"label": "heron", "points": []}], "imagePath": "a.jpg"}],
    "key points": [{"images": [{"id": 1, "width": 2}], "annotations": [{"id": 1, "keypoints": []}]}],
}


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("listed", [False, True])
def test_data_of_another_kind_is_told_the_keys_that_it_has_and_those_that_are_expected(folder: Path, name: str, listed: bool):
    rows = STRANGERS[name]
    file = write(folder, json.dumps(rows), name="x.json") if listed else write(folder, *rows)
    readers = (lambda: load(DataOptions(file)), lambda: first_samples(file, 5), lambda: find_pictures([str(file)]))
    for reader in readers:
        with pytest.raises(UsageError) as error:
            reader()
        text = str(error.value)
        assert all(repr(key) in text for row in rows for key in row)
        assert all(
            repr(key) in text
            for key in ("image", "file_name", "prompt", "prefix", "question", "answers", "suffix", "annotations")
        )
        assert "no JSON" not in text
    if name == "key points":
        assert "'images' (of 'id', 'width'), 'annotations' (of 'id', 'keypoints')" in text


def test_a_stranger_beside_a_known_data_set_is_left_alone(folder: Path):
    write(folder, json.dumps({"splits": {"train": 3}}), name="about.json")
    assert len(load(DataOptions(write(folder, GOOD).parent)).samples) == 1
    (folder / "rows.jsonl").unlink()
    with pytest.raises(UsageError, match=r"about\.json has 'splits': no known data set"):
        load(DataOptions(folder))


def test_an_empty_file_is_said_to_have_no_record(folder: Path):
    for file in (write(folder), write(folder, "[]", name="x.json")):
        with pytest.raises(UsageError, match=rf"{file.name} has no record: no known data set"):
            load(DataOptions(file))


def test_a_damaged_document_is_not_taken_for_lines(folder: Path):
    broken = json.dumps([GOOD] * 3, indent=1).replace("]", "")
    with pytest.raises(InputError, match=r"rows\.jsonl:\d+: not JSON"):
        load(DataOptions(write(folder, broken)))
