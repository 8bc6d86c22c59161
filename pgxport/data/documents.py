# SPDX-License-Identifier: Apache-2.0
"""Find the tables of records below a path: related documents joined, the shards of a split in one.

Knows how data sets are laid out in files, not what their records mean.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pgxport.data.records import IMAGES, MAX_JSON, ArrowRows, ListRows, Record, Rows, files_below, is_arrow, read_json
from pgxport.errors import InputError, UsageError
from pgxport.files import read_text

LIST = "samples.jsonl"  # the file that is meant where a folder holds more than it


def tables(data: Path, split: str | None) -> list[Rows]:
    """Every table of records below a path.

    In a folder, the first of these that it holds: samples.jsonl, parquet or Arrow files, images with texts
    beside them, JSON files.

    Raises:
        UsageError: the split does not exist, or has to be chosen.
        InputError: a file cannot be read, or is a link out of the folder.
    """
    if data.is_file():
        if not is_arrow(data):
            return _split(_joined([data], _inside(data.parent, (".json",))), split)
        if split is not None:
            raise UsageError(f"{data}: is one split by itself; leave --split {split} out, or give the folder")
        return [ArrowRows(str(data), (data,))]
    if (data / LIST).is_file():
        return _split(_joined([file for file in _inside(data, (".jsonl",)) if file == data / LIST], []), split)
    if arrow := _arrow_tables(data, split):
        return arrow
    texts = _texts_beside(data)
    if any(texts.values()):
        return _split([_sidecars(data, texts)], split)
    documents = _inside(data, (".json", ".jsonl"))
    # Images and nothing else: the error names the first one's missing text.
    return _split(_joined(documents, []) if documents or not texts else [_sidecars(data, texts)], split)


def _inside(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """The data files of a folder; a link out of it is an error, as the folder may be a stranger's."""
    files = files_below(folder, suffixes)
    for file in files:
        _check_inside(file, folder)
    return files


def _check_inside(file: Path, folder: Path) -> None:
    if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{file}: is a link out of {folder}; copy the file (from the hub: hf download --local-dir), or name it")


def _arrow_tables(data: Path, split: str | None) -> list[Rows]:
    """The shards of each split as one table: val-00000-of-00004.parquet, or validation/data-….arrow."""
    shards: dict[str, list[Path]] = defaultdict(list)
    for file in _inside(data, (".parquet", ".arrow")):
        # `datasets` keeps what it computed beside what it saved.
        if file.name.startswith("cache-"):
            continue
        stem = file.stem.rsplit("-", 3)[0] if file.stem.count("-of-") else file.stem
        part = str(file.parent.relative_to(data)) if file.suffix == ".arrow" else str(file.relative_to(data).with_name(stem))
        shards[part].append(file)
    chosen = {part: files for part, files in shards.items() if split is None or split in Path(part).parts}
    if shards and not chosen:
        raise UsageError(f"{data}: has no split {split!r}; it has {', '.join(Path(part).name for part in list(shards)[:8])}")
    if len(chosen) > 1:
        raise UsageError(
            f"{data}: has the splits {', '.join(Path(part).name for part in list(chosen)[:8])}; choose with --split (pgx report), or give a file of one"
        )
    return [ArrowRows(f"{data}/{part}" if part != "." else str(data), tuple(files)) for part, files in chosen.items()]


def _texts_beside(folder: Path) -> dict[Path, list[Path]]:
    """The images of a folder by name, each with the .json and the .txt beside it."""
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)
    return {image: [text for suffix in (".json", ".txt") if (text := image.with_suffix(suffix)).is_file()] for image in images}


def _sidecars(folder: Path, texts: Mapping[Path, Sequence[Path]]) -> Rows:
    """A record an image: a .json of prompt and answer, or a .txt whose first line is the prompt and whose
    rest is the answer."""
    records = []
    for image, beside in texts.items():
        if len(beside) != 1:
            names = " and ".join(image.with_suffix(suffix).name for suffix in (".json", ".txt"))
            count = "both" if beside else "neither of"
            raise InputError(f"{image}: has {count} {names} beside it; one of them says what its prompt and answer are")
        _check_inside(beside[0], folder)
        records.append(Record(str(beside[0]), {**_fields_beside(beside[0]), "image": image.name}))
    return ListRows(str(folder), records)


def _fields_beside(file: Path) -> dict[str, Any]:
    if file.suffix == ".txt":
        prompt, _, answer = read_text(file, MAX_JSON).partition("\n")
        return {"prompt": prompt} | ({"answer": answer.strip()} if answer.strip() else {})
    value = read_json(file)
    if not isinstance(value, dict):
        raise InputError(f'{file}: a JSON {type(value).__name__}; it has to be {{"prompt": …, "answer": …}}')
    if image := {"image", "file_name"} & value.keys():
        raise InputError(f"{file}: names an image, and the one beside it is meant; take {min(image)!r} out")
    return value


def _split(every: list[Rows], split: str | None) -> list[Rows]:
    """The tables, those whose records name their split cut to the one that is meant."""
    chosen: list[Rows] = []
    for rows in every:
        records = list(rows.at(range(len(rows))))
        names = {record.fields["split"] for record in records if isinstance(record.fields.get("split"), str)}
        if split is not None and names:
            if split not in names:
                raise UsageError(f"{rows.where}: has no split {split!r}; it has {', '.join(sorted(names))}")
            rows = ListRows(rows.where, [record for record in records if record.fields.get("split") == split])
        elif split is not None:
            raise UsageError(f"{rows.where}: its records name no split; leave --split {split} out, and give the split's own file")
        elif len(names) > 1:
            raise UsageError(
                f"{rows.where}: has the splits {', '.join(sorted(names))}; choose with --split (pgx report), or give a file of one"
            )
        chosen.append(rows)
    return chosen


def _joined(files: list[Path], partners: list[Path]) -> list[Rows]:
    """The tables of `files`; a table that needs another document takes it from them or from `partners`."""
    documents = _read(files)
    needed = {NEEDS[kind] for kind in map(_kind, documents.values()) if kind in NEEDS} - set(map(_kind, documents.values()))
    if needed:
        others = _read([file for file in partners if file not in documents])
        documents |= {file: value for file, value in others.items() if _kind(value) in needed}
    kinds = {file: _kind(value) for file, value in documents.items()}
    joined: list[Rows] = []
    # Instances that referring expressions speak of are no data set of their own here.
    used = {NEEDS[kind] for kind in kinds.values() if kind in NEEDS}
    for file, kind in kinds.items():
        if kind in NEEDS:
            beside = {f: documents[f] for f, k in kinds.items() if k == NEEDS[kind]}
            joined.append(_join(file, kind, documents[file], beside))
        elif kind in WHOLE and kind not in used:
            joined.append(ListRows(str(file), list(WHOLE[kind](str(file), documents[file]))))
    return joined


def _read(files: list[Path]) -> dict[Path, Any]:
    total = sum(file.stat().st_size for file in files)
    if total > MAX_JSON:
        raise UsageError(
            f"{files[0].parent}: {len(files)} JSON files of {total / 1e6:.0f} MB, more than the {MAX_JSON / 1e6:.0f} MB pgx reads "
            f"at once; put what belongs together into a folder of its own, and name the pictures' with --images"
        )
    return {file: read_json(file) for file in files}


def _kind(value: Any) -> str | None:
    """What a JSON document is, by its content."""
    if isinstance(value, list):
        first = value[0] if value else None
        if isinstance(first, Record):
            return "list"
        if isinstance(first, dict):
            return "refs" if {"ref_id", "ann_id", "sentences"} <= set(first) else "list"
        return None
    if not isinstance(value, dict):
        return None
    questions, annotations, images = (_peek(value, key) for key in ("questions", "annotations", "images"))
    if {"question_id", "image_id", "question"} <= set(questions):
        return "vqa questions"
    if {"question_id", "answers"} <= set(annotations):
        return "vqa annotations"
    if "caption" in images and "bbox" in annotations:
        return "mdetr"
    if images and "caption" in annotations:
        return "captions"
    if images and "bbox" in annotations:
        return "instances"
    if _peek(value, "data"):
        return "data"
    first = next(iter(value.values()), None)
    if isinstance(first, dict) and {"question", "choices", "answer"} <= set(first):
        return "problems"
    # JSON lines of one line.
    return "record" if {"prompt", "prefix", "image", "file_name"} & set(value) else None


def _peek(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    entries = document.get(key)
    return entries[0] if isinstance(entries, list) and entries and isinstance(entries[0], dict) else {}


def _join(file: Path, kind: str, value: Any, others: Mapping[Path, Any]) -> Rows:
    """Questions with their annotations, or referring expressions with their instances."""
    mine, theirs = {"vqa questions": ("question_id", "question_id"), "refs": ("ann_id", "id")}[kind]
    known: dict[int | str, dict[str, Any]] = {}
    for path, other in others.items():
        pictures = {_key(p, "id", str(path)): p for p in _objects(other.get("images", []), f"{path}: image")}
        for entry in _objects(other["annotations"], f"{path}: annotation"):
            picture = pictures.get(_key(entry, "image_id", str(path)), {})
            sizes: dict[str, Any] = {name: picture[name] for name in ("file_name", "height", "width") if name in picture}
            known[_key(entry, theirs, str(path))] = {**sizes, **entry}
    records = []
    for n, entry in enumerate(_objects(value["questions"] if kind == "vqa questions" else value, f"{file}: record")):
        where = f"{file}: record {n}"
        number = _key(entry, mine, where)
        if number not in known:
            beside = ", ".join(map(str, others)) or f"any JSON file below {file.parent}"
            raise InputError(
                f"{where}: {mine} {number!r} has no annotation in {beside}; put the matching {NEEDS[kind]} beside it"
            )
        records.append(Record(where, {**entry, **known[number]}))
    return ListRows(str(file), records)


def _coco(key: str) -> Callable[[str, Any], Iterator[Record]]:
    """A record for each picture, with its annotations under `key`."""

    def records(where: str, value: Mapping[str, Any]) -> Iterator[Record]:
        names = {_key(c, "id", where): c.get("name") for c in _objects(value.get("categories", []), f"{where}: category")}
        annotations: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for entry in _objects(value["annotations"], f"{where}: annotation"):
            category = names.get(_key(entry, "category_id", where)) if names else None
            annotations[_key(entry, "image_id", where)].append({**entry, "name": category})
        for picture in _objects(value["images"], f"{where}: image"):
            number = _key(picture, "id", where)
            yield Record(f"{where}: image {number!r}", {**picture, key: annotations[number]})

    return records


def _listed(where: str, value: list[Any]) -> Iterator[Record]:
    if value and isinstance(value[0], Record):
        yield from value
    else:
        yield from (Record(f"{where}: record {n}", entry) for n, entry in enumerate(_objects(value, f"{where}: record")))


def _problems(where: str, value: Mapping[str, Any]) -> Iterator[Record]:
    for number, entry in zip(value, _objects(list(value.values()), f"{where}: problem"), strict=True):
        image = entry.get("image")
        # ScienceQA keeps them as SPLIT/NUMBER/image.png.
        place = f"{entry.get('split')}/{number}/{image}" if isinstance(image, str) else None
        yield Record(f"{where}: problem {number!r}", {**entry, "id": number, "image": place})


def _objects(entries: Any, where: str) -> Iterator[dict[str, Any]]:
    for n, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        if not isinstance(entry, dict):
            raise InputError(f"{where} {n} is {entry!r:.100}, and has to be an object")
        yield entry


def _key(entry: Mapping[str, Any], name: str, where: str) -> int | str:
    value = entry.get(name)
    if isinstance(value, int | str):
        return value
    raise InputError(f"{where}: {name!r} is {value!r:.100} in {dict(entry)!r:.100}, and has to be a number or text")


# A document of the kind on the left is joined with one of the kind on the right.
NEEDS = {"vqa questions": "vqa annotations", "refs": "instances"}
# A document of this kind is a table by itself.
WHOLE: dict[str | None, Callable[[str, Any], Iterable[Record]]] = {
    "list": _listed,
    "record": lambda where, value: [Record(f"{where}:1", value)],
    "data": lambda where, value: _listed(where, value["data"]),
    "captions": _coco("coco captions"),
    "instances": _coco("coco objects"),
    "mdetr": _coco("coco objects"),
    "problems": _problems,
}
