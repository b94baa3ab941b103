"""Images with labels on disk: a folder of class folders, a table of paths, or Parquet files that hold the images."""

from __future__ import annotations

import csv
import hashlib
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from robbench.core.errors import DataError
from robbench.core.files import is_unicode, parse_json, read_bounded
from robbench.core.parquet import open_parquet, read_flat_table
from robbench.data.encoded import Items
from robbench.data.formats import convert_errors
from robbench.data.rows import MOST_PARQUET_BYTES, Rows, forget_files

__all__ = ["Files", "Listed", "list_images", "read_mapping"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_MOST_IMAGE_BYTES = 2**28
_MOST_TABLE_BYTES = 2**28
# No encoded image has fewer than 32 bytes. Equal images take no space in a Parquet file, and equal paths little.
_FREE_IMAGES, _LEAST_IMAGE_BYTES = 10_000, 32
_MOST_REPEATS = 100
_MOST_CLASSES = 100_000
_PATHS, _LABELS = ("path", "file", "file_name", "filename", "image"), ("label", "class", "target", "y")
_MAPPINGS = ("classes.txt", "classes.json")


@dataclass(frozen=True)
class Files:
    """Image files, by position.

    Attributes:
        root: the folder that the names are relative to.
        names: paths of the files.
    """

    root: Path
    names: Sequence[str]

    @property
    def most_pixels(self) -> None:
        """No limit: each image is limited by itself, and takes the space of its own file."""

    def fetch(self, position: int) -> bytes:
        """Read a file."""
        if not is_unicode(self.names[position]):
            raise ValueError("its name is not UTF-8; rename it")
        return read_bounded(self.root / self.names[position], _MOST_IMAGE_BYTES)


@dataclass(frozen=True, eq=False)
class Listed:
    """Encoded images with labels.

    Attributes:
        items: the images.
        y: labels, [N].
        classes: name of a class -> label; None where the labels are numbers without names.
        num_classes: the number of logits that the model must have; None where it is not known.
    """

    items: Items
    y: NDArray[np.int64]
    classes: dict[str, int] | None
    num_classes: int | None


def list_images(path: Path, classes: str | Path | Mapping[str, int] | None) -> Listed:
    """List the images of a folder, a table or Parquet files. No image is opened.

    Args:
        path: a folder of class folders; a .csv or .parquet file with a column of paths and a column of labels; a
            .parquet file, or a folder of them, with a column `image` of bytes and a column `label`.
        classes: names of classes and their labels (`read_mapping`). Without it, the labels are the places of the names
            in alphabetical order. A folder may hold a classes.txt or a classes.json of its own.

    Raises:
        DataError: there are no images, or a name or a label does not fit. The message says what was expected.
    """
    try:
        return _list_any(path, classes)
    except DataError:
        raise
    except Exception as error:  # names, labels and mappings of a stranger can make anything fail
        raise DataError(f"--data: {path}: {type(error).__name__}: {str(error)[:200]}") from error


def _list_any(path: Path, classes: str | Path | Mapping[str, int] | None) -> Listed:
    if not path.exists():
        raise DataError(f"--data: no {path}; expected: a folder of class folders, .csv, .parquet or .npz.")
    if not path.is_dir():
        return _read_table([path], path.parent, read_mapping(classes))
    own = [path / name for name in _MAPPINGS if (path / name).is_file()]
    mapping = read_mapping(own[0] if classes is None and own else classes)
    if shards := sorted(path.glob("*.parquet")):
        return _read_table(shards, path, mapping)
    return _list_folder(path, mapping)


def read_mapping(classes: str | Path | Mapping[str, int] | None) -> dict[str, int] | None:
    """Read which output of the model each class is.

    Args:
        classes: a text file with one name a line, whose first line is output 0; a JSON file with a list of names or an
            object of names and outputs; or such a mapping.

    Raises:
        DataError: it cannot be read, a name stands twice, or an output is no whole number from 0 on.
    """
    if classes is None or isinstance(classes, Mapping):
        found: Any = classes
        where = "classes"
    else:
        where = str(classes)
        with convert_errors(f"classes: {where} is not a mapping of classes, a text file with a name a line or .json"):
            text = read_bounded(Path(classes), _MOST_TABLE_BYTES).decode()
            found = parse_json(text) if where.endswith(".json") else [line.strip() for line in text.splitlines()]
            found = [name for name in found if name != ""] if isinstance(found, list) else found
    if found is None:
        return None
    # A file of a stranger may name this file, so no message repeats what stands in it.
    if isinstance(found, list):
        first: dict[str, int] = {}
        for number, name in enumerate(map(str, found)):
            if first.setdefault(name, number) != number:
                raise DataError(
                    f"{where}: names {first[name] + 1} and {number + 1} are equal; expected: each name once."
                )
        found = first
    if not isinstance(found, Mapping) or not found:
        raise DataError(f"{where}: expected: a list of names of classes, or an object of names and outputs.")
    if len(found) > _MOST_CLASSES:
        raise DataError(f"{where}: {len(found):,} classes given; allowed: {_MOST_CLASSES:,}.")
    for place, number in enumerate(found.values(), 1):
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
            raise DataError(f"{where}: the output of class {place} is no whole number from 0 on.")
    return _check_names({str(name): number for name, number in found.items()}, where)


def _check_names(known: dict[str, int], where: str) -> dict[str, int]:
    """Return classes whose names can be stored in a result.

    Raises:
        DataError: a name is not Unicode text.
    """
    for place, name in enumerate(known, 1):
        if not is_unicode(name):
            raise DataError(f"{where}: the name of class {place}, {name[:80]!a}, is not UTF-8. Rename it.")
    return known


def _list_folder(root: Path, mapping: dict[str, int] | None) -> Listed:
    """List a folder of class folders, with labels as torchvision's ImageFolder gives them.

    Images are in the order of the SHA-256 of their paths, so that the first N are of all classes.
    """
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not folders:
        raise DataError(
            f"--data: {root} holds no folders of classes and no .parquet files; expected: one folder for each class "
            "with its images in it."
        )
    labels: dict[str, int] = {}
    known = _number_classes([folder.name for folder in folders], mapping, str(root))
    for folder in folders:
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(f"--data: {folder} holds no images; allowed: {', '.join(SUFFIXES)}.")
        labels |= {p.relative_to(root).as_posix(): known[folder.name] for p in files}
    names = sorted(labels, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    y = np.array([labels[name] for name in names], np.int64)
    return Listed(Files(root, names), y, known, _count_outputs(mapping, known))


def _number_classes(names: Sequence[str], mapping: dict[str, int] | None, where: str) -> dict[str, int]:
    """Return the label of each class.

    Raises:
        DataError: the mapping lacks a name.
    """
    if mapping is None:
        return _check_names({name: number for number, name in enumerate(sorted(set(names)))}, where)
    if lacking := sorted(set(names) - set(mapping)):
        shown = ", ".join(name[:80] for name in lacking[:3]) + (" …" if len(lacking) > 3 else "")
        raise DataError(
            f"{where}: class {shown} is not in the mapping of {len(mapping)} classes. Add it to the mapping, or remove "
            "its images."
        )
    return mapping


def _count_outputs(mapping: dict[str, int] | None, known: dict[str, int]) -> int | None:
    """Return how many outputs the model must have: as many as classes, unless a mapping leaves some of them out."""
    return len(known) if mapping is None or sorted(mapping.values()) == [*range(len(mapping))] else None


def _read_table(paths: list[Path], root: Path, mapping: dict[str, int] | None) -> Listed:
    """Read a table of images and labels: .csv of paths, or .parquet of paths or of images."""
    where = str(paths[0] if len(paths) == 1 else root)
    items: Items
    if paths[0].suffix == ".csv":
        with convert_errors(f"{where}: not a table"):
            text = read_bounded(paths[0], _MOST_TABLE_BYTES).decode("utf-8-sig")
            rows = [row for row in csv.reader(io.StringIO(text)) if row]
        header, body = (rows[0], rows[1:]) if rows else ([], [])
        image, label = _find_columns(header, where)
        if bad := [n for n, row in enumerate(body, 2) if len(row) != len(header)]:
            raise DataError(f"{where}: line {bad[0]} has {len(body[bad[0] - 2])} fields; expected: {len(header)}.")
        items = _list_files(root, [row[header.index(image)] for row in body], where)
        labels: list[Any] = [row[header.index(label)] for row in body]
        labels = [int(v) for v in labels] if all(v.strip().lstrip("-").isdecimal() for v in labels) else labels
    elif paths[0].suffix == ".parquet":
        items, labels = _read_parquet(paths, root, where)
    else:
        raise DataError(f"--data: {where} given; expected: a folder of class folders, .csv, .parquet or .npz.")
    if not labels:
        raise DataError(f"--data: {where} holds no images.")
    if all(isinstance(v, str) for v in labels):
        if mapping is not None and (lacking := [n for n, v in enumerate(labels, 1) if v not in mapping]):
            raise DataError(
                f"{where}: the class of image {lacking[0]} is not in the mapping of {len(mapping)} classes. Add it to "
                "the mapping, or remove its images."
            )
        known = _number_classes(labels, mapping, where)
        return Listed(items, np.array([known[v] for v in labels], np.int64), known, _count_outputs(mapping, known))
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in labels):
        strange = next(n for n, v in enumerate(labels, 1) if not isinstance(v, int) or isinstance(v, bool))
        raise DataError(
            f"{where}: the label of image {strange} is neither a whole number nor text; allowed: whole numbers from 0 "
            "on, or names of classes."
        )
    return Listed(items, np.array(labels, np.int64), mapping, None)


def _find_columns(names: Sequence[str], where: str) -> tuple[str, str]:
    """Find the column of images or paths, and that of labels.

    A file of a stranger may name this one, so no message repeats what stands in it.

    Raises:
        DataError: one is missing, or two columns could be meant.
    """
    if len(set(names)) < len(names):
        raise DataError(f"{where}: two of its {len(names)} columns have one name; expected: different names.")
    found = []
    for what, known in (("images", _PATHS), ("labels", _LABELS)):
        if not (fitting := [name for name in known if name in names]):
            raise DataError(f"{where}: none of its {len(names)} columns is one of {what}: {', '.join(known)}.")
        found += fitting[:1]
    return found[0], found[1]


def _read_parquet(paths: list[Path], root: Path, where: str) -> tuple[Items, list[Any]]:
    """Read the labels of Parquet files, and either the paths of the images or the places of the images in the files."""
    import pyarrow as pa

    forget_files()  # they may have changed since they were last read
    labels: list[Any] = []
    names: list[str] = []
    places: list[tuple[int, int, int]] = []
    column = ""
    for number, path in enumerate(paths):
        with (
            convert_errors(f"{path}: not a Parquet file of images and labels"),
            open_parquet(path, MOST_PARQUET_BYTES) as file,
        ):
            schema = file.schema_arrow
            image, label = _find_columns(schema.names, str(path))
            kind = schema.field(image).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            labels += read_flat_table(path, MOST_PARQUET_BYTES, [label]).column(0).to_pylist()
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                names += read_flat_table(path, MOST_PARQUET_BYTES, [image]).column(0).to_pylist()
                continue
            if not (pa.types.is_struct(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
                raise ValueError(f"column {image} holds neither paths nor bytes")
            rows, size = file.metadata.num_rows, path.stat().st_size
            if rows > (most := _FREE_IMAGES + size // _LEAST_IMAGE_BYTES):
                raise ValueError(f"{rows:,} images in {size:,} bytes; allowed: {most:,}")
            column = f"{image}.bytes" if pa.types.is_struct(kind) else image
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                names += [f"{path.name}, row {len(names) + row}" for row in range(count)]
                places += [(number, group, row) for row in range(count)]
    if not column:
        return _list_files(root, names, where), labels
    return Rows(tuple(paths), column, names, np.array(places, np.int64).reshape(-1, 3)), labels


def _list_files(root: Path, names: list[str], where: str) -> Files:
    """List the files that a table names.

    Raises:
        DataError: it names one file again and again.
    """
    times = max(Counter(names).values(), default=0)
    if times > _MOST_REPEATS:
        raise DataError(f"{where}: one path stands in {times:,} rows; allowed: {_MOST_REPEATS}.")
    return Files(root, names)
