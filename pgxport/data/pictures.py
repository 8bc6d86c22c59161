# SPDX-License-Identifier: Apache-2.0
"""The pictures that `pgx run --images` names: files, folders, patterns, and those of a data set's records."""

import glob
from collections.abc import Sequence
from pathlib import Path

from pgxport.data.records import IMAGES, holds_records
from pgxport.errors import InputError, UsageError
from pgxport.runners.many import AskedPicture, EmbeddedPicture, PictureAnswer


def find_pictures(patterns: Sequence[str]) -> list[AskedPicture]:
    """Find each picture once, in the order of the patterns: a folder's by name, a data set's in its order.

    A record that cannot be used is the row that says why, after the data set's pictures.

    Args:
        patterns: Files; folders of pictures, known by their suffix; what * ? [ match; files of records, or
            folders of them.

    Raises:
        UsageError: one of them finds nothing, or it is not certain which data set is meant.
        InputError: too many records cannot be used.
    """
    pictures: dict[AskedPicture, None] = {}
    for pattern in patterns:
        path = Path(pattern)
        matched: Sequence[AskedPicture]
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES)
            matched = files or _of_records(path)
        elif holds_records(path):
            matched = _of_records(path)
        elif not path.exists() and glob.has_magic(pattern):
            matched = sorted(file for file in map(Path, glob.glob(pattern, recursive=True)) if file.is_file())
        else:
            matched = [path]  # a file that does not exist is a row that says so
        if not matched:
            raise UsageError(
                f"--images {pattern!r} finds no picture; give a folder with {', '.join(IMAGES)}, a pattern, a file, or a data set"
            )
        pictures |= dict.fromkeys(matched)
    return list(pictures)


def _of_records(data: Path) -> list[AskedPicture]:
    """The pictures of a data set; none where the path holds no records at all."""
    # Imported here: a folder of pictures needs no data set.
    from pgxport.data.documents import tables
    from pgxport.data.loader import all_pictures

    if not tables(data, None):
        return []
    pictures, unusable = all_pictures(data)
    found = [picture if isinstance(picture, Path) else EmbeddedPicture(name, picture) for picture, name in pictures.items()]
    return [*found, *(PictureAnswer(record.where, None, record.why, InputError.exit_code) for record in unusable)]
