"""Encoded images (JPEG, PNG, ...): read from disk when they are used, resized and cropped as declared.

All images are read once before a run. That pass hashes the files, finds the broken ones, and compares the sizes. No
decoded image is kept.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from robbench.core.errors import DataError
from robbench.core.files import digest

__all__ = ["Items", "Preparation", "StreamedImages", "describe_broken", "survey"]

_MOST_PIXELS = 2**26
# Pillow would choose by the content, and its reader of PostScript starts a program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")  # 8 bits a channel, or fewer
_MOST_BROKEN = 10_000  # a result names them all
_HOPELESS = 1000  # images without a readable one before them
_LARGEST = 2**16  # resize and crop
_SHOWN = 5  # broken files that a message names
_AT_ONCE = 64  # encoded images in memory
_T = TypeVar("_T")


class Items(Protocol):
    """Encoded images, by position."""

    @property
    def names(self) -> Sequence[str]:
        """What messages call each image."""

    @property
    def most_pixels(self) -> int | None:
        """How many pixels all images may have together; None where each has a file of its own."""

    def fetch(self, position: int) -> bytes:
        """Return an encoded image. Raises any exception where it cannot be read."""


@dataclass(frozen=True)
class Preparation:
    """How an encoded image becomes pixels, as torchvision's Resize and CenterCrop do it with Pillow.

    Attributes:
        resize: the length of the shorter side, bilinear and antialiased; None keeps the size.
        crop: the side of a square that is cut from the centre; None keeps the whole image.
        channels: 3 for RGB, 1 for grayscale.
    """

    resize: int | None = None
    crop: int | None = None
    channels: int = 3

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            DataError: one of them means nothing.
        """
        for name, given in (("resize", self.resize), ("crop", self.crop)):
            if given is not None and not (type(given) is int and 1 <= given <= _LARGEST):
                raise DataError(f"{name}: {given!r} given; allowed: a whole number from 1 to {_LARGEST}, or None.")
        if type(self.channels) is not int or self.channels not in (1, 3):
            raise DataError(f"channels: {self.channels!r} given; allowed: 3 for RGB, 1 for grayscale.")

    def describe(self) -> dict[str, Any]:
        """Return what identifies the preparation."""
        return {"resize": self.resize, "crop": self.crop, "channels": self.channels}

    def compute_size(self, width: int, height: int) -> tuple[int, int]:
        """Compute the width and height of the prepared image.

        Raises:
            ValueError: the image is smaller than the crop.
        """
        if self.resize is not None:
            short, long = min(width, height), max(width, height)
            scaled = int(self.resize * long / short)
            width, height = (self.resize, scaled) if width <= height else (scaled, self.resize)
            if width * height > _MOST_PIXELS:
                raise ValueError(f"--resize makes {width} × {height} pixels of it; allowed: {_MOST_PIXELS:,} in all")
        if self.crop is None:
            return width, height
        if min(width, height) < self.crop:
            raise ValueError(f"{width} × {height} pixels are too few for --crop {self.crop}; give a larger --resize")
        return self.crop, self.crop

    def decode(self, content: bytes) -> Image.Image:
        """Decode an image, and convert it to the channels.

        Raises:
            Exception: the image is damaged. A decoder can raise anything.
        """
        with _open(content) as image:
            if image.mode not in _MODES:
                raise ValueError(f"mode {image.mode} given; allowed: 8 bits a channel ({', '.join(_MODES)})")
            if image.width * image.height > _MOST_PIXELS:
                raise ValueError(f"{image.width} × {image.height} pixels given; allowed: {_MOST_PIXELS:,} in all")
            return image.convert("RGB" if self.channels == 3 else "L")

    def apply(self, content: bytes) -> Tensor:
        """Decode, resize and crop an image: [C, H, W] uint8."""
        image = self.decode(content)
        if self.resize is not None:
            size = Preparation(self.resize).compute_size(*image.size)
            image = image.resize(size, Image.Resampling.BILINEAR) if size != image.size else image
        if self.crop is not None:
            left, top = round((image.width - self.crop) / 2), round((image.height - self.crop) / 2)
            image = image.crop((left, top, left + self.crop, top + self.crop))
        pixels = torch.from_numpy(np.array(image))
        return pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)


def _open(content: bytes) -> Image.Image:
    """Open an encoded image of an allowed format. Pillow's own message holds an address, which differs each time."""
    try:
        return Image.open(io.BytesIO(content), formats=_FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"no image; allowed: {', '.join(_FORMATS)}") from None


@dataclass(frozen=True, eq=False)
class StreamedImages:
    """Encoded images that were surveyed. Calling it decodes images: positions [n] -> [n, C, H, W] float32 in [0, 1].

    Attributes:
        items: where the images are.
        at: positions of the readable images among the items, [N].
        preparation: how they are decoded.
    """

    items: Items
    at: NDArray[np.int64]
    preparation: Preparation

    def __call__(self, positions: NDArray[np.int64]) -> Tensor:
        """Decode images.

        Raises:
            DataError: a file changed since the survey, and cannot be read now.
        """
        # In the order of the files, because a Parquet file is read by row groups of many images.
        order = np.argsort(self.at[positions], kind="stable")
        at: list[int] = self.at[positions][order].tolist()
        x: Tensor | None = None
        for i, pixels in enumerate(_each(self.items, at, self.preparation.apply)):
            row = int(order[i])
            if isinstance(pixels, Exception):
                raise DataError(f"{_show(self.items.names[at[i]])}: cannot be read any more: {pixels}")
            x = torch.empty((len(at), *pixels.shape), dtype=torch.float32) if x is None else x
            if pixels.shape != x.shape[1:]:
                raise DataError(f"{_show(self.items.names[at[i]])}: has another size than when it was first read.")
            torch.div(pixels, 255, out=x[row])
        assert x is not None, "a run asks for at least one image"
        return x


def survey(
    items: Items, labels: NDArray[np.int64], preparation: Preparation, on_broken: str
) -> tuple[StreamedImages, str, list[str]]:
    """Read all images once: hash them, find broken ones, and compare their sizes.

    Args:
        items: the images.
        labels: their labels, [N].
        preparation: how they are decoded.
        on_broken: "stop" raises an error at a broken image; "skip" leaves it out.

    Returns:
        The images; the SHA-256 of the readable files, their labels and the preparation; and the names of the broken
        images, each with what is wrong.

    Raises:
        DataError: an image is broken; no image is left; or the sizes of the prepared images differ.
    """
    digests: list[str] = []
    kept: list[int] = []
    broken: list[str] = []
    first: tuple[tuple[int, int], str] | None = None
    pixels, most = 0, items.most_pixels

    def look(content: bytes) -> tuple[str, tuple[int, int], int]:
        image = preparation.decode(content)
        size = preparation.compute_size(*image.size)
        return hashlib.sha256(content).hexdigest(), size, image.width * image.height

    for position, seen in enumerate(_each(items, range(len(items.names)), look)):
        name = _show(items.names[position])
        if isinstance(seen, Exception):
            broken.append(f"{name}: {_first_line(seen)}")
            if not kept and len(broken) == _HOPELESS:
                raise DataError(f"None of the first {_HOPELESS:,} images can be read; the first: {broken[0]}.")
            if len(broken) > _MOST_BROKEN:
                raise DataError(f"More than {_MOST_BROKEN:,} images are broken, the first: {broken[0]}.")
            if on_broken == "stop":
                raise DataError(
                    f"{broken[0]}. Remove it, or leave such files out: --on-broken skip (in Python on_broken='skip'); "
                    "the result then names them."
                )
            continue
        pixels += seen[2]
        if most is not None and pixels > most:
            raise DataError(
                f"{name}: up to here the images have {pixels:,} pixels; allowed in so small a file: {most:,}."
            )
        first = first or (seen[1], name)
        if seen[1] != first[0]:
            sizes = " and ".join(f"{w} × {h} ({where})" for (w, h), where in (first, (seen[1], name)))
            raise DataError(
                f"The images have different sizes: {sizes}. Give --resize N (the shorter side) and --crop N (a square "
                "from the centre), with the numbers that the model was trained with."
            )
        digests.append(seen[0])
        kept.append(position)
    if not kept:
        raise DataError(f"None of {len(items.names)} images can be read; the first: {broken[0]}.")
    at = np.array(kept, np.int64)
    content = digest([preparation.describe(), labels[at].tolist(), digests])
    return StreamedImages(items, at, preparation), content, broken


def describe_broken(broken: Sequence[str], total: int) -> str:
    """Say which images were left out."""
    more = f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
    return (
        f"{len(broken)} of {total} images cannot be read and were left out: {'; '.join(broken[:_SHOWN])}{more}. All "
        "numbers are of the others."
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:  # its text would name the path again
        return error.strerror
    return _show((str(error).splitlines() or [type(error).__name__])[0])


def _show(name: object) -> str:
    """Write a name with what is not Unicode text as an escape. A result holds it, and a terminal prints it."""
    return str(name).encode(errors="backslashreplace").decode()


def _each(items: Items, at: Sequence[int], work: Callable[[bytes], _T]) -> Iterator[_T | Exception]:
    """Do the same work on many images, on all cores, in order. A failure is yielded as the exception."""

    def attempt(content: bytes | Exception) -> _T | Exception:
        if isinstance(content, Exception):
            return content
        try:
            return work(content)
        except Exception as error:  # a decoder can raise anything about a damaged file
            return error

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        try:
            for begin in range(0, len(at), _AT_ONCE):
                yield from pool.map(attempt, [_fetch(items, position) for position in at[begin : begin + _AT_ONCE]])
        finally:  # after an error, no image is decoded for nothing
            pool.shutdown(wait=False, cancel_futures=True)


def _fetch(items: Items, position: int) -> bytes | Exception:
    try:
        return items.fetch(position)
    except Exception as error:  # a link that leads nowhere, a file without rights, a damaged column
        return error
