# SPDX-License-Identifier: Apache-2.0
"""Data sets are read as they are distributed, known by their content, and wrong ones refused with the place and the fix."""

import io
import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pgxport.activations.encoding import answer_text
from pgxport.data import records
from pgxport.data.formats import FORMATS
from pgxport.data.loader import DataOptions, first_samples, load
from pgxport.data.pictures import find_pictures
from pgxport.errors import InputError, PgxError, UsageError
from pgxport.metrics.metrics import METRICS, TASKS
from pgxport.metrics.sample import Sample


def png(colour: str = "red", size: tuple[int, int] = (40, 30)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, "red").save(path)


def dump(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def lines(path: Path, *values: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def people(*answers: str) -> list[dict]:
    return [{"answer": a, "answer_confidence": "yes", "answer_id": n} for n, a in enumerate(answers, 1)]


# The files, in the layout and with the fields of the published ones ------------------------------------------------------


def vqav2(folder: Path, *, raw: bool = False) -> None:
    head = {
        "info": {"version": "2.0"},
        "task_type": "Open-Ended",
        "data_type": "mscoco",
        "data_subtype": "val2014",
        "license": {},
    }
    asked = [
        {"image_id": 42, "question": "What sport is this?", "question_id": 42000},
        {"image_id": 73, "question": "How many?", "question_id": 73001},
    ]
    dump(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {**head, "questions": asked})
    said = {42000: people(*["surfing"] * 8, "swimming", "waves"), 73001: people(*["2"] * 10)}
    if raw:
        said = {k: [{**a, "raw_answer": a["answer"] + "s"} for a in v] for k, v in said.items()}
    kind = {"question_type": "what sport is", "multiple_choice_answer": "surfing", "answer_type": "other"}
    annotations = [{**kind, "answers": said[n], "image_id": i, "question_id": n} for n, i in ((73001, 73), (42000, 42))]
    dump(folder / "v2_mscoco_val2014_annotations.json", {**head, "annotations": annotations})
    for number in (42, 73):
        picture(folder / "val2014" / f"COCO_val2014_{number:012}.jpg")


def okvqa(folder: Path) -> None:
    vqav2(folder, raw=True)


def textvqa(folder: Path) -> None:
    entry = {"question": "what is the brand?", "image_id": "003a8ae2ef43b901", "image_classes": ["Camera"], "question_id": 34602}
    more = {"image_width": 1024, "image_height": 664, "set_name": "val", "question_tokens": ["what"], "flickr_original_url": "u"}
    document = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1"}
    dump(folder / "TextVQA_0.5.1_val.json", {**document, "data": [{**entry, **more, "answers": ["nikon"] * 9 + ["the nikon"]}]})
    picture(folder / "train_images" / "003a8ae2ef43b901.jpg")


def docvqa(folder: Path) -> None:
    entry = {"questionId": 49153, "question": "What is the ‘actual’ value?", "image": "documents/pybv0228_81.png", "docId": 14465}
    more = {"ucsf_document_id": "pybv0228", "ucsf_document_page_no": "81", "answers": ["0.28", ".28"], "data_split": "val"}
    dump(
        folder / "val_v1.0.json",
        {"dataset_name": "docvqa", "dataset_version": "1.0", "dataset_split": "val", "data": [{**entry, **more}]},
    )
    picture(folder / "documents" / "pybv0228_81.png")


def chartqa(folder: Path) -> None:
    entry = {"imgname": "41699051005347.png", "query": "How many food items are shown?", "label": "14"}
    dump(folder / "val" / "val_human.json", [entry])
    picture(folder / "val" / "png" / "41699051005347.png")


def scienceqa(folder: Path) -> None:
    base = {
        "question": "Which is flexible?",
        "choices": ["a brick", "a spring"],
        "answer": 1,
        "hint": "",
        "task": "closed choice",
    }
    more = {"grade": "grade3", "subject": "natural science", "topic": "physics", "lecture": "", "solution": "", "split": "val"}
    problems = {"5": {**base, **more, "image": "image.png"}, "8": {**base, **more, "image": None}}
    dump(folder / "problems.json", problems)
    picture(folder / "images" / "val" / "5" / "image.png")
    picture(folder / "images" / "test" / "5" / "image.png")


def pope(folder: Path) -> None:
    first = {
        "question_id": 1,
        "image": "COCO_val2014_000000310196.jpg",
        "text": "Is there a snowboard in the image?",
        "label": "yes",
    }
    lines(
        folder / "coco_pope_random.json",
        first,
        {**first, "question_id": 2, "text": "Is there a car in the image?", "label": "no"},
    )
    picture(folder / "val2014" / "COCO_val2014_000000310196.jpg")


COCO_IMAGE = {"license": 4, "file_name": "000000397133.jpg", "height": 30, "width": 40, "id": 397133, "coco_url": "http://x"}


def coco_captions(folder: Path) -> None:
    said = [{"image_id": 397133, "id": n, "caption": c} for n, c in enumerate(["A man in a kitchen.", "A cook at work"])]
    dump(
        folder / "annotations" / "captions_val2017.json",
        {"info": {}, "images": [COCO_IMAGE], "licenses": [], "annotations": said},
    )
    picture(folder / "val2017" / "000000397133.jpg")


def coco_instances(folder: Path, name: str = "annotations/instances_val2017.json") -> None:
    found = [(1, [10.0, 5.0, 20.0, 10.0], 0), (44, [0, 0, 5, 8.5], 0), (1, [1, 1, 2, 2], 1)]
    annotations = [
        {
            "segmentation": {"counts": [0, 1200], "size": [30, 40]} if crowd else [[10.0, 5.0, 30.0, 5.0, 30.0, 15.0]],
            "area": 9.0,
            "iscrowd": crowd,
            "image_id": 397133,
            "bbox": b,
            "category_id": c,
            "id": n,
        }
        for n, (c, b, crowd) in enumerate(found, 100)
    ]
    categories = [
        {"supercategory": "person", "id": 1, "name": "person"},
        {"supercategory": "kitchen", "id": 44, "name": "bottle"},
    ]
    empty = {**COCO_IMAGE, "file_name": "000000000139.jpg", "id": 139}
    picture(folder / "val2017" / "000000000139.jpg")
    document = {"info": {}, "licenses": [], "images": [COCO_IMAGE, empty], "annotations": annotations, "categories": categories}
    dump(folder / name, document)
    picture(folder / "val2017" / "000000397133.jpg")


def refcoco(folder: Path) -> None:
    """refs(unc).p as a JSON list, beside its instances.json."""
    said = [
        {"tokens": s.split(), "raw": s.upper(), "sent_id": n, "sent": s} for n, s in enumerate(["the man on the left", "cook"])
    ]
    ref = {"sent_ids": [0, 1], "file_name": "COCO_train2014_000000397133_16.jpg", "ann_id": 100, "ref_id": 0, "image_id": 397133}
    dump(
        folder / "refs.json",
        [
            {**ref, "split": "val", "sentences": said, "category_id": 1},
            {**ref, "ref_id": 1, "split": "testA", "sentences": said[:1]},
        ],
    )
    coco_instances(folder, "instances.json")


def mdetr(folder: Path) -> None:
    image = {
        "file_name": "000000397133.jpg",
        "height": 30,
        "width": 40,
        "id": 0,
        "original_id": 397133,
        "caption": "the man on the left",
    }
    more = {"dataset_name": "refcoco", "tokens_negative": [[0, 19]], "sent_id": 1, "ref_id": 2}
    found = {
        "area": 200.0,
        "iscrowd": 0,
        "image_id": 0,
        "category_id": 1,
        "id": 0,
        "bbox": [10.0, 5.0, 20.0, 10.0],
        "original_id": 100,
    }
    document = {
        "info": {},
        "licenses": [],
        "images": [{**image, **more}],
        "annotations": [{**found, "tokens_positive": [[0, 7]]}],
    }
    dump(
        folder / "finetune_refcoco_val.json", {**document, "categories": [{"supercategory": "object", "id": 1, "name": "object"}]}
    )
    picture(folder / "000000397133.jpg")


def own(folder: Path) -> None:
    lines(
        folder / "samples.jsonl",
        {"image": "a.png", "prompt": "caption en", "answer": "a red wall"},
        {
            "image": "a.png",
            "prompt": "answer en what is it ?",
            "answers": ["wall", "a wall"],
            "metric": "textvqa_accuracy",
            "id": "w",
        },
        {"image": "a.png", "prefix": "detect wall", "suffix": "<loc0000><loc0000><loc0512><loc0512> wall"},
    )
    picture(folder / "a.png")


WRITERS = {
    "jsonl": own,
    "vqav2": vqav2,
    "okvqa": okvqa,
    "textvqa": textvqa,
    "docvqa": docvqa,
    "chartqa": chartqa,
    "scienceqa": scienceqa,
    "pope": pope,
    "coco-captions": coco_captions,
    "coco-instances": coco_instances,
    "refcoco": refcoco,
}
SPLIT = {"refcoco": "val"}


def read(folder: Path, **options) -> tuple[Sample, ...]:
    return load(DataOptions(folder, **options)).samples


def test_every_format_has_files_here():
    assert set(WRITERS) == set(FORMATS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_known_by_its_content_and_its_pictures_open(name, tmp_path):
    WRITERS[name](tmp_path)
    found = load(DataOptions(tmp_path, split=SPLIT.get(name)))
    assert found.format == name
    assert found.samples
    assert len({s.id for s in found.samples}) == len(found.samples)
    for sample in found.samples:
        assert sample.open().size == (40, 30)
        assert sample.task in TASKS
        needs = METRICS[sample.metric].needs
        assert sample.answers if needs == "answers" else sample.regions or sample.background
        assert sample.prompt == sample.prompt.strip() != ""


@pytest.mark.parametrize("name", FORMATS)
def test_no_name_of_a_file_says_what_it_holds(name, tmp_path):
    """The same files under names that mean nothing, or something else."""
    WRITERS[name](tmp_path)
    for n, file in enumerate(sorted(tmp_path.rglob("*.json"))):
        file.rename(file.with_name(f"captions_{n}.json"))
    assert load(DataOptions(tmp_path, split=SPLIT.get(name))).format == name


@pytest.mark.parametrize("name", FORMATS)
def test_what_report_reads_calibrate_and_run_read_too(name, tmp_path):
    (mdetr if name == "refcoco" else WRITERS[name])(tmp_path)
    judged = read(tmp_path)
    unjudged = first_samples(tmp_path, 99).samples
    assert [(s.prompt, s.answers, s.background) for s in unjudged] == [(s.prompt, s.answers, s.background) for s in judged]
    assert all(bool(answer_text(sample)) != sample.background for sample in unjudged)
    assert find_pictures([str(file) for file in data_files(tmp_path)]) == list(dict.fromkeys(s.image for s in judged))


def data_files(folder: Path) -> list[Path]:
    """A folder of records, or its file of records where it has pictures of its own."""
    return sorted(folder.glob("*.json*")) if list(folder.glob("*.png")) + list(folder.glob("*.jpg")) else [folder]


def test_vqav2(tmp_path):
    vqav2(tmp_path)
    first, second = read(tmp_path)
    assert (first.id, first.prompt, first.task, first.metric) == ("42000", "answer en What sport is this?", "vqa", "vqa_accuracy")
    assert first.answers == (*["surfing"] * 8, "swimming", "waves")
    assert first.image == tmp_path / "val2014" / "COCO_val2014_000000000042.jpg"
    assert second.answers == ("2",) * 10
    questions = tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json"
    assert read(questions) == read(tmp_path)  # the annotations are found beside it
    assert read(tmp_path, prompt="{question}")[0].prompt == "What sport is this?"


def test_textvqa_and_docvqa(tmp_path):
    textvqa(tmp_path / "text")
    docvqa(tmp_path / "doc")
    (text,), (document,) = read(tmp_path / "text"), read(tmp_path / "doc")
    assert (text.id, text.prompt, text.metric) == ("34602", "answer en what is the brand?", "textvqa_accuracy")
    assert len(text.answers) == 10
    assert (document.id, document.prompt, document.metric) == ("49153", "What is the ‘actual’ value?", "anls")
    assert document.answers == ("0.28", ".28")


def test_chartqa_and_pope(tmp_path):
    chartqa(tmp_path / "chart")
    pope(tmp_path / "pope")
    (chart,), answers = read(tmp_path / "chart"), read(tmp_path / "pope")
    assert (chart.prompt, chart.answers, chart.metric) == ("How many food items are shown?", ("14",), "relaxed_accuracy")
    assert [(s.id, s.answers, s.metric) for s in answers] == [
        ("1", ("yes",), "yes_no_accuracy"),
        ("2", ("no",), "yes_no_accuracy"),
    ]


def test_scienceqa_asks_only_what_has_a_picture_and_says_so(tmp_path):
    scienceqa(tmp_path)
    found = load(DataOptions(tmp_path))
    (sample,) = found.samples
    assert (found.records, found.skipped) == (2, 1)
    assert sample.prompt == "Question: Which is flexible?\nContext: N/A\nOptions: (A) a brick (B) a spring\nAnswer:"
    assert (sample.answers, sample.metric) == (("B", "a spring"), "choice_accuracy")
    assert sample.image == tmp_path / "images" / "val" / "5" / "image.png"


def test_coco_captions(tmp_path):
    coco_captions(tmp_path)
    (sample,) = read(tmp_path)
    assert (sample.prompt, sample.answers, sample.metric) == ("caption en", ("A man in a kitchen.", "A cook at work"), "rouge_l")


def test_coco_instances_ask_for_what_is_there(tmp_path):
    coco_instances(tmp_path)
    found = load(DataOptions(tmp_path))
    sample, empty = found.samples
    assert (found.skipped, found.unusable) == (0, ())
    assert (empty.prompt, empty.regions, empty.background) == ("detect person ; bottle", (), True)
    assert (sample.prompt, sample.task) == ("detect person ; bottle", "detect")
    assert [(r.label, r.box, r.crowd) for r in sample.regions] == [
        ("person", (5.0, 10.0, 15.0, 30.0), False),
        ("bottle", (0.0, 0.0, 8.5, 5.0), False),
        ("person", (1.0, 1.0, 3.0, 3.0), True),
    ]


def test_refcoco_of_json_refs(tmp_path):
    refcoco(tmp_path)
    left, cook = read(tmp_path, split="val")
    assert (left.prompt, cook.prompt, left.metric) == ("segment the man on the left", "segment cook", "mask_iou")
    assert left.regions[0].box == (5.0, 10.0, 15.0, 30.0)
    assert left.image == tmp_path / "val2017" / "000000397133.jpg"  # never the ref's own file name, which does not exist
    pytest.importorskip("pycocotools")
    mask = left.regions[0].segmentation.mask()
    assert mask.shape == (30, 40)
    assert 80 < mask.sum() < 120  # half of 20 × 10
    assert len(read(tmp_path, split="testA")) == 1
    with pytest.raises(UsageError, match="has the splits testA, val; choose with --split"):
        read(tmp_path)


def test_refcoco_of_mdetr_has_boxes_only(tmp_path):
    mdetr(tmp_path)
    (sample,) = read(tmp_path)
    assert (sample.prompt, sample.metric, sample.regions[0].segmentation) == (
        "detect the man on the left",
        "refer_accuracy",
        None,
    )


@pytest.mark.parametrize("name", ["refs(unc).p", "refs.json"])
def test_a_pickle_is_never_opened(name, tmp_path):
    refcoco(tmp_path)
    file = tmp_path / name
    file.write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(InputError, match=r"is a pickle, which pgx never opens.*MDETR's JSON, or the hub's parquet"):
        read(file)
    assert not (tmp_path / "pwned").exists()


def test_own_records(tmp_path):
    own(tmp_path)
    caption, wall, detect = read(tmp_path)
    assert (caption.id, caption.task, caption.metric) == ("samples.jsonl:1", "caption", "rouge_l")
    assert (wall.id, wall.task, wall.metric, wall.answers) == ("w", "answer", "textvqa_accuracy", ("wall", "a wall"))
    assert (detect.task, detect.metric) == ("detect", "box_accuracy")
    assert [(r.label, r.box) for r in detect.regions] == [("wall", (0.0, 0.0, 15.0, 20.0))]


def test_one_line_is_a_file_of_lines(tmp_path):
    picture(tmp_path / "a.png")
    assert len(read(lines(tmp_path / "one.jsonl", {"image": "a.png", "prompt": "ocr", "answer": "AB"}))) == 1


def test_images_with_texts_beside_them(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.jpg")
    dump(tmp_path / "a.json", {"prompt": "caption en", "answer": "a wall"})
    (tmp_path / "b.txt").write_text("ocr\nAB\n")
    assert [(s.prompt, s.answers, s.image.name) for s in read(tmp_path)] == [
        ("caption en", ("a wall",), "a.png"),
        ("ocr", ("AB",), "b.jpg"),
    ]


def test_an_image_without_its_text_is_not_dropped_in_silence(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "a.txt").write_text("ocr\nAB")
    with pytest.raises(InputError, match=r"b\.png: has neither of b\.json and b\.txt beside it"):
        read(tmp_path)
    dump(tmp_path / "a.json", {"prompt": "ocr", "answer": "AB"})
    with pytest.raises(InputError, match=r"a\.png: has both"):
        read(tmp_path)


def test_imagefolders_file_name_is_an_image(tmp_path):
    picture(tmp_path / "a.png")
    lines(tmp_path / "metadata.jsonl", {"file_name": "a.png", "prompt": "ocr", "answer": "AB"})
    assert read(tmp_path)[0].image == tmp_path / "a.png"


# Parquet and Arrow, as the hub stores them -------------------------------------------------------------------------------


def image_column(count: int) -> list[dict]:
    return [{"bytes": png(("red", "blue")[n % 2]), "path": f"{n}.png"} for n in range(count)]


HUB = {
    "vqav2": {"question_type": ["what"], "multiple_choice_answer": ["net"], "answers": [people(*["net"] * 10)], "image_id": [262148], "answer_type": ["other"], "question_id": [262148000], "question": ["Where?"]},
    "okvqa": {"question_id": ["7"], "question": ["Why?"], "answers": [["race"] * 10], "question_type": ["one"], "answer_type": ["other"]},
    "textvqa": {"image_id": ["a"], "question_id": [1], "question": ["brand?"], "image_classes": [["x"]], "answers": [["nikon"] * 10]},
    "docvqa": {"questionId": ["1"], "question": ["total?"], "question_types": [["form"]], "docId": [4], "ucsf_document_id": ["x"], "answers": [["5"]]},
    "chartqa": {"type": ["human_test"], "question": ["max?"], "answer": ["7"]},
    "scienceqa": {"question": ["q"], "choices": [["a", "b"]], "answer": [1], "hint": ["h"], "task": ["t"], "grade": ["g"]},
    "pope": {"id": ["0"], "question_id": ["1"], "question": ["Is there a cat?"], "answer": ["no"], "image_source": ["x"], "category": ["adversarial"]},
    "coco-captions": {"question_id": ["1"], "question": ["Please …"], "answer": [["a cat", "the cat"]], "id": [5], "coco_url": ["u"], "license": [1]},
    "refcoco": {"question_id": ["9"], "question": ["Please …"], "answer": [["left man", "man"]], "segmentation": [[1.0, 1, 9, 1, 9, 9]], "bbox": [[1.0, 1, 8, 8]], "iscrowd": [0], "file_name": ["x_0.jpg"]},
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_the_hubs_parquet(name, tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "data").mkdir()
    parquet.write_table(arrow.table({**HUB[name], "image": image_column(1)}), tmp_path / "data" / "val-00000-of-00001.parquet")
    found = load(DataOptions(tmp_path))
    assert found.format == name
    assert isinstance(found.samples[0].image, bytes)
    assert found.samples[0].open().size == (40, 30)
    assert load(DataOptions(tmp_path / "data" / "val-00000-of-00001.parquet")).samples == found.samples
    assert len(found.samples) == (2 if name == "refcoco" else 1)


def test_refcoco_of_the_hub_without_pictures(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    true = {"segmentation": [[10.0, 5.0, 30.0, 5.0, 30.0, 15.0]], "bbox": [10.0, 5.0, 20.0, 10.0], "iscrowd": 0, "id": 100}
    row = {
        "sentences": [{"raw": "LEFT", "sent": "left", "sent_id": 0, "tokens": ["left"]}],
        "ref_id": 3,
        "image_id": 397133,
        "split": "testA",
        "raw_anns": json.dumps(true),
        "raw_image_info": json.dumps(COCO_IMAGE),
        "image_path": "coco/train2014/COCO_train2014_000000397133.jpg",
        "bbox": [10.0, 5.0, 30.0, 15.0],  # here x1, y1, x2, y2
        "captions": ["left"],
    }
    parquet.write_table(arrow.Table.from_pylist([row]), tmp_path / "test-00000-of-00001.parquet")
    picture(tmp_path / "000000397133.jpg")
    (sample,) = read(tmp_path)
    assert sample.regions[0].box == (5.0, 10.0, 15.0, 30.0)
    assert (sample.prompt, sample.metric) == ("segment left", "mask_iou")


def test_shards_are_one_table_and_splits_are_chosen(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    for name, count in (("val-00000-of-00002", 3), ("val-00001-of-00002", 2), ("test-00000-of-00001", 1)):
        rows = {"prompt": ["ocr"] * count, "answer": [f"{name}{n}" for n in range(count)], "image": image_column(count)}
        parquet.write_table(arrow.table(rows), tmp_path / f"{name}.parquet", row_group_size=2)
    with pytest.raises(UsageError, match="has the splits test, val; choose with --split"):
        read(tmp_path)
    with pytest.raises(UsageError, match="has no split 'train'; it has test, val"):
        read(tmp_path, split="train")
    found = load(DataOptions(tmp_path, split="val", limit=3))
    assert [s.answers[0] for s in found.samples] == ["val-00000-of-000020", "val-00000-of-000021", "val-00001-of-000020"]
    assert found.records == 5


def test_what_datasets_saved_to_disk(tmp_path):
    """A folder written by datasets 5.2.0, DatasetDict.save_to_disk (goldens/saved, see its README)."""
    pytest.importorskip("pyarrow")
    folder = Path(shutil.copytree(Path(__file__).parents[1] / "goldens" / "saved", tmp_path / "saved"))
    found = load(DataOptions(folder, split="validation"))
    assert (found.format, [s.answers for s in found.samples]) == ("jsonl", [("a red wall",), ("a blue wall",)])
    assert found.samples[1].open().getpixel((0, 0)) == (0, 0, 255)
    assert load(DataOptions(folder / "validation")).samples == found.samples
    with pytest.raises(UsageError, match="has the splits train, validation"):
        read(folder)


def test_without_pyarrow_the_error_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1....PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r'needs pyarrow: pip install "pgxport\[report\]"'):
        read(tmp_path)


def test_a_damaged_parquet_file_is_an_error(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1" + b"\x00" * 50 + b"PAR1")
    with pytest.raises(InputError, match=r"a\.parquet: not a sound parquet or Arrow file"):
        read(tmp_path)


# What is refused ---------------------------------------------------------------------------------------------------------


def test_scenes_are_the_default():
    found = load(DataOptions(limit=2))
    assert (found.format, len(found.samples)) == ("scenes", 10)
    assert [s.task for s in found.samples[::2]] == ["caption", "ocr", "answer", "detect", "segment"]
    assert all(s.open().size == (224, 224) for s in found.samples)
    assert found.samples[-1].regions[0].segmentation.mask().any()


def test_two_data_sets_in_a_folder_are_ambiguous(tmp_path):
    coco_captions(tmp_path)
    coco_instances(tmp_path)
    with pytest.raises(
        UsageError, match=r"holds 2 data sets: .*coco-captions.*coco-instances.*give the file, or choose with --format"
    ):
        read(tmp_path)
    assert load(DataOptions(tmp_path, format="coco-captions")).format == "coco-captions"
    assert (
        load(DataOptions(tmp_path / "annotations" / "instances_val2017.json", images=tmp_path / "val2017")).format
        == "coco-instances"
    )


def test_records_of_no_known_format_are_an_error_that_names_their_fields(tmp_path):
    file = dump(tmp_path / "x.json", [{"picture": "a.png", "q": "?"}])
    with pytest.raises(
        UsageError, match=r"x\.json has 'picture', 'q': no known data set; say which it is with --format jsonl\|vqav2"
    ):
        read(file)
    with pytest.raises(
        InputError,
        match=r"x\.json: record 0: has no 'question' or 'query' or 'text', which has to be text; it has 'picture', 'q'",
    ):
        read(file, format="chartqa")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="no JSON, parquet or Arrow file"):
        read(tmp_path / "empty")
    with pytest.raises(UsageError, match="there is no such file or folder; pgx downloads no data set"):
        read(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="--format 'coco' does not exist; choose jsonl"):
        read(file, format="coco")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"answer": None}, r"own\.jsonl:2: 'answers?' .*has to be text or a list of texts|own\.jsonl:2: has no .*'answer'"),
        ({"answer": 5}, r"own\.jsonl:2: 'answer' is 5, and has to be text or a list of texts"),
        ({"prompt": ""}, r"own\.jsonl:2: 'prompt' is '', and has to be text"),
        ({"image": "b.png"}, r"own\.jsonl:2: no image 'b\.png' below .*--images"),
        ({"image": "../a.png"}, r"own\.jsonl:2: the image '\.\./a\.png' leads out of"),
        ({"image": "/etc/passwd"}, r"own\.jsonl:2: the image '/etc/passwd' leads out of"),
        ({"image": "link.png"}, r"own\.jsonl:2: .*link\.png is a link out of"),
        ({"metric": "f1"}, r"own\.jsonl:2: 'metric' is 'f1', and has to be one of exact_match, "),
        ({"task": "guess"}, r"own\.jsonl:2: 'task' is 'guess', and has to be one of vqa, "),
        ({"metrics": "anls"}, r"own\.jsonl:2: 'metrics' is no key of a record; did you mean 'metric'\?"),
        ({"metric": "mask_iou"}, r"own\.jsonl:2: mask_iou needs true masks"),
        ({"prompt": "detect cat"}, r"own\.jsonl:2: box_accuracy needs true regions, which the answer 'x' does not give"),
        (
            {"prompt": "detect cat", "answer": "<loc0001> cat"},
            r"own\.jsonl:2: the answer locates nothing, or is malformed: wrong count",
        ),
    ],
)
def test_a_wrong_record_is_an_error_with_its_line_and_the_fix(fields, message, tmp_path):
    folder = tmp_path / "data"
    good = {"image": "a.png", "prompt": "ocr", "answer": "x"}
    file = lines(folder / "own.jsonl", good, {**good, **fields})
    picture(folder / "a.png")
    picture(tmp_path / "a.png")
    (folder / "link.png").symlink_to(tmp_path / "a.png")
    with pytest.raises(InputError, match=message):
        read(file)


def test_a_data_file_that_is_a_link_out_of_the_folder_is_refused(tmp_path):
    own(tmp_path / "there")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "samples.jsonl").symlink_to(tmp_path / "there" / "samples.jsonl")
    with pytest.raises(InputError, match=r"samples\.jsonl: is a link out of .*here; copy the file"):
        read(tmp_path / "here")


def test_a_line_that_is_not_json_is_named(tmp_path):
    file = lines(tmp_path / "a.jsonl", {"image": "a.png", "prompt": "ocr", "answer": "x"})
    file.write_text(file.read_text() + "{oops\n")
    with pytest.raises(InputError, match=r"a\.jsonl:2: not JSON .*'\{oops'"):
        read(file)
    file.write_bytes(b'{"image": "\xff"}\n')
    with pytest.raises(InputError, match="not UTF-8 at byte 11"):
        read(file)
    file.write_text("[" * 100_000)
    with pytest.raises(InputError):
        read(file)


def test_questions_without_annotations_are_an_error(tmp_path):
    vqav2(tmp_path)
    (tmp_path / "v2_mscoco_val2014_annotations.json").unlink()
    with pytest.raises(
        InputError,
        match=r"record 0: question_id 42000 has no annotation in any JSON file below .*; put the matching vqa annotations",
    ):
        read(tmp_path)


def test_a_split_that_no_record_names_is_an_error(tmp_path):
    vqav2(tmp_path)
    with pytest.raises(UsageError, match="its records name no split; leave --split val out"):
        read(tmp_path, split="val")


def test_two_pictures_of_one_name_are_ambiguous(tmp_path):
    chartqa(tmp_path)
    picture(tmp_path / "test" / "png" / "41699051005347.png")
    with pytest.raises(InputError, match=r"2 images are called '41699051005347\.png'"):
        read(tmp_path)
    assert len(read(tmp_path, images=tmp_path / "val" / "png")) == 1


def test_sizes_are_bounded(tmp_path, monkeypatch):
    own(tmp_path)
    monkeypatch.setattr(records, "MAX_JSON", 10)
    with pytest.raises(InputError, match=r"more than the 0 MB of text pgx reads"):
        read(tmp_path / "samples.jsonl")
    monkeypatch.setattr(records, "MAX_FILES", 0)
    with pytest.raises(InputError, match="holds more than 0 files"):
        read(tmp_path)


def test_a_limit_takes_records_evenly(tmp_path):
    picture(tmp_path / "a.png")
    file = lines(tmp_path / "a.jsonl", *({"image": "a.png", "prompt": "ocr", "answer": str(n)} for n in range(10)))
    assert [s.answers[0] for s in read(file, limit=3)] == ["0", "3", "6"]
    assert len(read(file, limit=99)) == 10
    with pytest.raises(UsageError, match="--limit 0"):
        read(file, limit=0)


@pytest.mark.parametrize("prompt", ["{q}", "answer {question} {x}", "{"])
def test_a_prompt_with_another_placeholder_is_an_error(prompt, tmp_path):
    vqav2(tmp_path)
    with pytest.raises(UsageError, match=r"only \{question\} stands for something"):
        read(tmp_path, prompt=prompt)


WRONG = (None, [], {}, "", "x", -1, 1e400, True, [None], [[]], {"a": 1}, "../../etc/passwd", "\x00", 10**30)


@pytest.mark.parametrize("name", FORMATS)
def test_a_spoilt_document_is_refused_and_never_a_bug(name, tmp_path):
    """A record with any value in any place gives samples, or an error of ours."""
    WRITERS[name](tmp_path)
    files = [f for f in sorted(tmp_path.rglob("*")) if f.suffix in (".json", ".jsonl")]
    rng, refused = random.Random(0), 0
    for _ in range(40):
        file = rng.choice(files)
        before = file.read_text()
        whole = [json.loads(line) for line in before.splitlines()] if name in ("jsonl", "pope") else json.loads(before)
        places = [(box, key) for box in walk(whole) for key in (box if isinstance(box, dict) else range(len(box)))]
        box, key = rng.choice(places)
        if rng.random() < 0.3:
            del box[key]
        else:
            box[key] = rng.choice(WRONG)
        file.write_text("\n".join(map(json.dumps, whole)) if name in ("jsonl", "pope") else json.dumps(whole))
        try:
            for sample in load(DataOptions(tmp_path, split=SPLIT.get(name), format=rng.choice([None, name]))).samples:
                sample.open()
        except PgxError:
            refused += 1
        file.write_text(before)
    assert refused > 3


def walk(value):
    if isinstance(value, dict | list):
        if value:
            yield value
        for entry in value.values() if isinstance(value, dict) else value:
            yield from walk(entry)


def test_numbers_of_a_box_have_to_be_finite(tmp_path):
    coco_instances(tmp_path)
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace("8.5", "NaN"))
    with pytest.raises(InputError, match=r"coco objects 101: 'bbox' is \[0, 0, 5, nan\], and has to be 4 finite numbers"):
        read(tmp_path)
    assert np.isnan(json.loads(file.read_text())["annotations"][1]["bbox"][3])


# The page that documents them ----------------------------------------------------------------------------------------


@pytest.fixture
def page() -> str:
    file = Path(__file__).parents[2] / "docs" / "reference" / "data.md"
    if not file.exists():
        pytest.skip("the wheel is tested without docs/")
    return file.read_text()


def table(page: str, title: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_page_has_every_format_task_and_metric_as_they_are(page):
    formats = {cells[0].strip("`"): cells for cells in table(page, "As they are distributed")}
    assert formats.keys() == FORMATS.keys()
    for name, known in FORMATS.items():
        if name not in ("jsonl", "scienceqa"):
            assert formats[name][2:] == [f"`{known.prompt}`", f"`{known.task}`"]
    tasks = {cells[0].strip("`"): tuple(re.findall(r"`(\w+)`", cells[1])) for cells in table(page, "Tasks")}
    assert tasks == TASKS
    assert {name for cells in table(page, "Metrics") for name in re.findall(r"`(\w+)`", cells[0])} == METRICS.keys()


def test_the_pages_own_records_are_read(page, tmp_path):
    (tmp_path / "data.jsonl").write_text(re.findall(r"```json\n(.*?)```", page, re.DOTALL)[0])
    for name in ("cats/1.png", "cats/2.png"):
        picture(tmp_path / name)
    caption, count, detect = load(DataOptions(tmp_path / "data.jsonl")).samples
    assert (caption.task, count.metric, detect.task) == ("caption", "vqa_accuracy", "detect")
    assert [region.label for region in detect.regions] == ["cat", "dog"]
