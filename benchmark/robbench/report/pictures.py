"""Writes the stored adversarial examples of a result as PNG files, with a contact sheet. Imports no torch."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from robbench.core.errors import ResultError
from robbench.core.files import write_atomically
from robbench.core.types import Status
from robbench.results.adversarials import FILE, read
from robbench.results.reader import read_vouched, read_vouched_rows

__all__ = ["SHEET", "write_pictures"]

SHEET = "contact-sheet.png"
_MOST_ON_SHEET = 100
_LEAST_SIDE = 64  # pixels of an image on the sheet: smaller images are enlarged by a whole factor
_GAP = 2


def write_pictures(path: Path, folder: Path) -> tuple[int, int]:
    """Write a PNG for each stored adversarial example, named by sample and attack, and a sheet of the first 100.

    Pixels are rounded to 8 bits. Rounding may undo a break, and may leave the ball by up to half a level.

    Args:
        path: a result.json or its folder, of a run with --save-adversarials.
        folder: where the files go.

    Returns:
        The number of PNG files beside the sheet, and how many of them differ from the stored points.

    Raises:
        ResultError: the result is missing or damaged, holds no adversarial examples, or they are no images of 1 or 3
            channels in [0, 1], one for each break.
    """
    result = read_vouched(path)
    stored = (path.parent if path.name == "result.json" else path) / FILE
    if not stored.exists():
        raise ResultError(f"{stored.parent} holds no {FILE}. Repeat the run with --save-adversarials.")
    kept = read(stored)
    if kept.run_id != result.run_id or kept.altered:
        raise ResultError(f"{stored} is not as this result wrote it. `robbench verify` says what differs.")
    found = [
        (int(sample), str(attack), x)
        for group in kept.points
        for sample, attack, x in zip(group.sample, group.attack, group.x, strict=True)
    ]
    found.sort(key=lambda entry: entry[:2])
    rows = read_vouched_rows(path)
    broken = rows[rows["status"] == Status.BROKEN]
    if problem := _find_problem(found, set(zip(broken["sample"], broken["attack"], strict=True))):
        raise ResultError(f"{stored} {problem}. `robbench verify` says what differs.")
    rounded, pixels, names = 0, [], _name_files([a.name for a in result.attacks])
    for sample, attack, x in found:
        pixels.append(levels := _round(x))
        rounded += not np.array_equal(levels.astype(x.dtype) / x.dtype.type(255), np.moveaxis(x, 0, 2))
        write_atomically(folder / f"{sample:06}-{names[attack]}.png", _encode(levels))
    if pixels:
        write_atomically(folder / SHEET, _encode(_arrange(pixels[:_MOST_ON_SHEET])))
    return len(pixels), rounded


def _find_problem(found: list[tuple[int, str, NDArray[Any]]], breaks: set[tuple[int, str]]) -> str:
    """Explain what is wrong with stored points; empty if each is an image of one shape and of another break.

    The digests of a file that somebody made anew fit whatever it holds.
    """
    entries = [entry[:2] for entry in found]
    if strange := set(entries) - breaks:
        sample, attack = min(strange)
        return f"holds a point of sample {sample}, {attack}, which is no break of the records"
    if len(set(entries)) < len(entries):
        return "holds two points of one break"
    shapes = {x.shape for _, _, x in found}
    if len(shapes) > 1 or any(len(shape) != 3 or 0 in shape for shape in shapes):
        return f"holds points of the shapes {sorted(shapes)[:3]}; expected: one shape (C, H, W)"
    if not all(((x >= 0) & (x <= 1)).all() for _, _, x in found):
        return "holds pixels outside [0, 1]"
    return ""


def _name_files(attacks: list[str]) -> dict[str, str]:
    """Return the part of a file's name that stands for each attack. Where two are alike, their places come first."""
    parts = [re.sub(r"[^A-Za-z0-9._-]+", "-", attack) for attack in attacks]
    alike = len({part.casefold() for part in parts}) < len(parts)
    return {a: f"{i}-{part}" if alike else part for i, (a, part) in enumerate(zip(attacks, parts, strict=True))}


def _round(x: NDArray[Any]) -> NDArray[np.uint8]:
    """Round an image [C, H, W] in [0, 1] to 8 bits: [H, W, C]."""
    if x.shape[0] not in (1, 3):
        raise ResultError(f"images of {x.shape[0]} channels are stored; a PNG holds 1 or 3.")
    levels: NDArray[np.uint8] = np.rint(np.moveaxis(x, 0, 2).astype(np.float64) * 255).clip(0, 255).astype(np.uint8)
    return levels


def _encode(levels: NDArray[np.uint8]) -> bytes:
    out = io.BytesIO()
    Image.fromarray(levels[..., 0] if levels.shape[2] == 1 else levels).save(out, "PNG")
    return out.getvalue()


def _arrange(images: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Lay images of one size out in a square grid on white."""
    height, width, channels = images[0].shape
    factor = max(1, _LEAST_SIDE // max(height, width))
    across = math.ceil(math.sqrt(len(images)))
    down = math.ceil(len(images) / across)
    step = height * factor + _GAP, width * factor + _GAP
    sheet = np.full((down * step[0] + _GAP, across * step[1] + _GAP, channels), 255, np.uint8)
    for place, image in enumerate(images):
        top, left = (_GAP + at * size for at, size in zip(divmod(place, across), step, strict=True))
        large = image.repeat(factor, 0).repeat(factor, 1)
        sheet[top : top + large.shape[0], left : left + large.shape[1]] = large
    return sheet
