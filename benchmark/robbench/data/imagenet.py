"""The validation set of ImageNet (ILSVRC 2012), as its usual folders hold it. It cannot be downloaded here."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from robbench.core.errors import DataError
from robbench.core.files import read_bounded
from robbench.data.folder import Files, Listed
from robbench.data.formats import convert_errors
from robbench.data.sets import resolve_data_dir

__all__ = ["CLASSES", "find_imagenet", "list_imagenet"]

CLASSES = 1000
_PLACES = ("imagenet/val", "imagenet/validation", "imagenet/ILSVRC2012_img_val", "imagenet", "ILSVRC2012_img_val")
_FOLDER, _IMAGE = re.compile(r"n\d{8}"), re.compile(r"ILSVRC2012_val_\d{8}\.JPEG")
_LABELS = "val.txt"
_MOST_BYTES = 2**24


def find_imagenet(data_dir: str | Path | None) -> Path:
    """Find the folder of the validation images.

    Raises:
        DataError: there is none in the data directory.
    """
    root = resolve_data_dir(data_dir)
    for place in _PLACES:
        folder = root / place
        if folder.is_dir() and any(_FOLDER.fullmatch(e.name) or _IMAGE.fullmatch(e.name) for e in folder.iterdir()):
            return folder
    raise DataError(
        f"The validation images of imagenet are not in {root}. They cannot be downloaded without an account: put them "
        f"into one of {', '.join(_PLACES)}, as 1000 folders n01440764, ... of images, or as ILSVRC2012_val_*.JPEG "
        f"beside a {_LABELS} with a name and a label from 0 to 999 in each line."
    )


def list_imagenet(folder: Path) -> Listed:
    """List the validation images in official order: that of the numbers in their names.

    Raises:
        DataError: the folder holds another number of classes, or a label is missing.
    """
    classes = sorted(e.name for e in folder.iterdir() if e.is_dir() and _FOLDER.fullmatch(e.name))
    if classes:
        if len(classes) != CLASSES:
            raise DataError(f"{folder}: {len(classes)} folders of classes; expected: {CLASSES}.")
        labels = {
            f"{name}/{path.name}": number
            for number, name in enumerate(classes)
            for path in (folder / name).iterdir()
            if _IMAGE.fullmatch(path.name)
        }
    else:
        labels = _read_labels(folder)
    if not labels:
        raise DataError(f"{folder}: no images; expected: files ILSVRC2012_val_00000001.JPEG, ...")
    names = sorted(labels, key=lambda name: name.rpartition("/")[2])
    return Listed(Files(folder, names), np.array([labels[name] for name in names], np.int64), None, CLASSES)


def _read_labels(folder: Path) -> dict[str, int]:
    found = [path for path in (folder / _LABELS, folder.parent / _LABELS) if path.is_file()]
    if not found:
        raise DataError(f"{folder}: no {_LABELS}; expected: a name and a label from 0 to 999 in each line.")
    with convert_errors(f"{found[0]}: not a list of names and labels"):
        pairs = [line.split() for line in read_bounded(found[0], _MOST_BYTES).decode().splitlines() if line.strip()]
        listed = {name: int(label) for name, label in pairs}
        if strange := [label for label in listed.values() if not 0 <= label < CLASSES]:
            raise ValueError(f"label {strange[0]} given; allowed: 0 to {CLASSES - 1}")
    names = sorted(path.name for path in folder.iterdir() if _IMAGE.fullmatch(path.name))
    if lacking := [name for name in names if name not in listed]:
        raise DataError(f"{found[0]}: no label of {lacking[0]}.")
    return {name: listed[name] for name in names}
