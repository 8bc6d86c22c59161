# SPDX-License-Identifier: Apache-2.0
"""Find the tables of records below a path: related documents joined, the shards of a split in one.

Knows how data sets are laid out in files, not what their records mean.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pgxport.data.records import (
    IMAGE_KEYS,
    IMAGES,
    MAX_JSON,
    PROMPT_KEYS,
    ArrowRows,
    ListRows,
    Record,
    Rows,
    files_below,
    is_arrow,
    read_json,
)
from pgxport.errors import InputError, UsageError
from pgxport.files import read_text

LIST = "samples.jsonl"  # the file that is meant where a folder holds more than it
LABELS = 8  # the most frequent of COCO's, by which a picture without objects is asked for what it lacks


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
        records.append(Record.read(str(beside[0] if len(beside) == 1 else image), partial(_fields_beside, folder, image, beside)))
    return ListRows(str(folder), records)


def _fields_beside(folder: Path, image: Path, beside: Sequence[Path]) -> dict[str, Any]:
    if len(beside) != 1:
        names = " and ".join(image.with_suffix(suffix).name for suffix in (".json", ".txt"))
        count = "both" if beside else "neither of"
        raise InputError(f"{image}: has {count} {names} beside it; one of them says what its prompt and answer are")
    _check_inside(beside[0], folder)
    return {**_fields_of(beside[0]), "image": image.name}


def _fields_of(file: Path) -> dict[str, Any]:
    if file.suffix == ".txt":
        prompt, _, answer = read_text(file, MAX_JSON).replace("\r\n", "\n").partition("\n")
        return {"prompt": prompt} | ({"answer": answer.strip()} if answer.strip() else {})
    value = read_json(file)
    if not isinstance(value, dict):
        raise InputError(f'{file}: a JSON {type(value).__name__}; it has to be {{"prompt": …, "answer": …}}')
    if image := set(IMAGE_KEYS) & value.keys():
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
            rows = ListRows(rows.where, [record for record in records if record.fault or record.fields.get("split") == split])
        elif split is not None:
            raise UsageError(f"{rows.where}: its records name no split; leave --split {split} out, and give the split's own file")
        elif len(names) > 1:
            raise UsageError(
                f"{rows.where}: has the splits {', '.join(sorted(names))}; choose with --split (pgx report), or give a file of one"
            )
        chosen.append(rows)
    return chosen


def _joined(files: list[Path], partners: list[Path]) -> list[Rows]:
    """The tables of `files`; a table that needs another document takes it from them or from `partners`.

    Where no document is of a known kind, each is a table, so that an error can name the keys that it has.
    """
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
    return joined or [ListRows(str(file), list(_listed(str(file), documents[file]))) for file in files]


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
        first = next((entry for entry in value if isinstance(entry, dict | Record)), None)
        refs = isinstance(first, dict) and {"ref_id", "ann_id", "sentences"} <= set(first)
        return "refs" if refs else None if first is None else "list"
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
    if images and ("bbox" in annotations or ("categories" in value and value.get("annotations") == [])):
        return "instances"
    if _peek(value, "data"):
        return "data"
    first = next(iter(value.values()), None)
    if isinstance(first, dict) and {"question", "choices", "answer"} <= set(first):
        return "problems"
    # JSON lines of one line.
    return "list" if {*PROMPT_KEYS, *IMAGE_KEYS} & set(value) else None


def _peek(document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    entries = document.get(key)
    return next((entry for entry in entries if isinstance(entry, dict)), {}) if isinstance(entries, list) else {}


def _join(file: Path, kind: str, value: Any, others: Mapping[Path, Any]) -> Rows:
    """Questions with their annotations, or referring expressions with their instances."""
    mine, theirs = {"vqa questions": ("question_id", "question_id"), "refs": ("ann_id", "id")}[kind]
    known: dict[Any, dict[str, Any]] = {}
    for other in others.values():
        pictures = _by_key(other.get("images"), "id")
        for number, entry in _by_key(other["annotations"], theirs).items():
            picture = pictures.get(_number(entry, "image_id"), {})
            sizes: dict[str, Any] = {name: picture[name] for name in ("file_name", "height", "width") if name in picture}
            known[number] = {**sizes, **entry}

    def fields(entry: Any, where: str) -> dict[str, Any]:
        number = _key(_object(entry, where), mine, where)
        if number not in known:
            beside = ", ".join(map(str, others)) or f"any JSON file below {file.parent}"
            raise InputError(
                f"{where}: {mine} {number!r} has no annotation in {beside}; put the matching {NEEDS[kind]} beside it"
            )
        return {**entry, **known[number]}

    entries = value["questions"] if kind == "vqa questions" else value
    return ListRows(str(file), list(_records(entries, f"{file}: record", fields)))


def _coco(key: str) -> Callable[[str, Any], Iterator[Record]]:
    """A record for each picture, with its annotations under `key`, and for each annotation that names no picture."""

    def records(where: str, value: Mapping[str, Any]) -> Iterator[Record]:
        names = {number: entry.get("name") for number, entry in _by_key(value.get("categories"), "id").items()}
        annotations: dict[Any, list[dict[str, Any]]] = defaultdict(list)
        for record in _records(value["annotations"], f"{where}: annotation", _with_key("image_id")):
            if record.fault:
                yield record
                continue
            category = {"name": names.get(_number(record.fields, "category_id"))} if names else {}
            annotations[record.fields["image_id"]].append({**record.fields, **category})
        counts = Counter(entry.get("name") for entries in annotations.values() for entry in entries if names)
        frequent = sorted((name for name in names.values() if isinstance(name, str)), key=lambda name: -counts[name])[:LABELS]
        for record in _records(value["images"], f"{where}: image", _with_key("id")):
            place = record.where if record.fault else f"{where}: image {record.fields['id']!r}"
            own = {} if record.fault else {key: annotations[record.fields["id"]], "coco labels": frequent}
            yield Record(place, {**record.fields, **own}, record.fault)

    return records


def _listed(where: str, value: Any) -> Iterator[Record]:
    if isinstance(value, list) and value and isinstance(value[0], Record):
        yield from value
    elif isinstance(value, dict):  # JSON lines of one line
        yield Record(f"{where}:1", value)
    else:
        yield from _records(value, f"{where}: record", _object)


def _problems(where: str, value: Mapping[str, Any]) -> Iterator[Record]:
    def fields(number: str, where: str) -> dict[str, Any]:
        entry = _object(value[number], where)
        image = entry.get("image")
        # ScienceQA keeps them as SPLIT/NUMBER/image.png.
        place = f"{entry.get('split')}/{number}/{image}" if isinstance(image, str) else None
        return {**entry, "id": number, "image": place}

    for number in value:
        place = f"{where}: problem {number!r}"
        yield Record.read(place, partial(fields, number, place))


def _records(entries: Any, where: str, fields: Callable[[Any, str], dict[str, Any]]) -> Iterator[Record]:
    """A record for each entry; one of which `fields` cannot be read has a fault."""
    for n, entry in enumerate(entries if isinstance(entries, list) else [entries]):
        yield Record.read(f"{where} {n}", partial(fields, entry, f"{where} {n}"))


def _with_key(name: str) -> Callable[[Any, str], dict[str, Any]]:
    def fields(entry: Any, where: str) -> dict[str, Any]:
        _key(_object(entry, where), name, where)
        return dict(entry)

    return fields


def _by_key(entries: Any, name: str) -> dict[Any, dict[str, Any]]:
    """The objects of a list by a number or text of theirs; those without one belong to nothing."""
    objects = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return {number: entry for entry in objects if (number := _number(entry, name)) is not None}


def _object(entry: Any, where: str) -> dict[str, Any]:
    if not isinstance(entry, dict):
        raise InputError(f"{where} is {entry!r:.100}, and has to be an object")
    return entry


def _key(entry: Mapping[str, Any], name: str, where: str) -> int | str:
    number = _number(entry, name)
    if number is None:
        raise InputError(f"{where}: {name!r} is {entry.get(name)!r:.100} in {dict(entry)!r:.100}, and has to be a number or text")
    return number


def _number(entry: Mapping[str, Any], name: str) -> int | str | None:
    value = entry.get(name)
    return value if isinstance(value, int | str) else None


# A document of the kind on the left is joined with one of the kind on the right.
NEEDS = {"vqa questions": "vqa annotations", "refs": "instances"}
# A document of this kind is a table by itself.
WHOLE: dict[str | None, Callable[[str, Any], Iterable[Record]]] = {
    "list": _listed,
    "data": lambda where, value: _listed(where, value["data"]),
    "captions": _coco("coco captions"),
    "instances": _coco("coco objects"),
    "mdetr": _coco("coco objects"),
    "problems": _problems,
}
