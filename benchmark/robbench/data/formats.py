"""The file formats of the data sets: idx, Parquet with encoded images, and the official CIFAR pickles.

A reader yields the parts of one split. `sets.load` joins the parts and checks them against each other. Files may be
damaged or hostile. Any problem with a file raises a `DataError` that names the file.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import math
import pickle
import pickletools
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from robbench.core.errors import DataError
from robbench.core.files import open_regular, read_bounded
from robbench.core.parquet import open_parquet

if TYPE_CHECKING:
    from robbench.core.types import UInt8Array

__all__ = ["DatasetSpec", "Part", "Reader", "convert_errors", "read_batches", "read_digits", "read_idx", "read_parquet"]


_MOST_BYTES = 2**28  # limit for a file, and for an unpacked archive; the largest unpacks to 186 MB
_MOST_IMAGE_BYTES = 2**16  # limit for an encoded image of 32 × 32 pixels
_DIGITS_FILE = "data/digits.csv.gz"
_MOST_STEPS = 1_000_000  # limit for a pickle; the longest of a data set has 350,000 steps


@dataclass(frozen=True, slots=True)
class DatasetSpec:
    """The official facts about a data set, and the names of its files."""

    title: str
    shape: tuple[int, int, int]
    num_classes: int
    sizes: dict[str, int]
    source: str
    labels: tuple[str, ...] = ()
    scale: int = 255
    torchvision: str = ""  # the class of torchvision with addresses and checksums
    folders: tuple[str, ...] = ()  # folders that may hold the idx files
    archive: str = ""  # name of the archive with the official pickles
    unpacked: str = ""  # name of the folder in that archive
    batches: dict[str, list[str]] | None = None  # names of the pickles of each split
    label: str = "label"  # column in Parquet files; in pickles the key has an s at the end


# The file's name for messages, x, labels, and the official indices (None: they continue the numbers of the last part).
Part = tuple[str, "UInt8Array", Sequence[Any], Sequence[Any] | None]
Reader = Callable[[DatasetSpec, str, list[Path]], Iterator[Part]]


@contextmanager
def convert_errors(where: str) -> Iterator[None]:
    """Convert any exception to a `DataError` that begins with `where`. A damaged or hostile file can raise anything."""
    try:
        yield
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) else ""  # the whole text would name the path again
        raise DataError(f"{where}: {reason or str(error) or type(error).__name__}") from error


def read_digits(spec: DatasetSpec, split: str, files: list[Path]) -> Iterator[Part]:
    """Read the digits from the file that scikit-learn ships. The official indices count through both splits.

    A line of the file holds 64 pixels from 0 to 16, and the label. `sklearn.datasets.load_digits` reads the same file.
    Importing it takes seconds.
    """
    package = importlib.util.find_spec("sklearn")
    if package is None or package.origin is None:
        raise DataError("digits: scikit-learn, which holds the images, is not installed: pip install scikit-learn.")
    path, total = Path(package.origin).with_name("datasets") / _DIGITS_FILE, sum(spec.sizes.values())
    with convert_errors(f"{path}: cannot be read. It comes with scikit-learn; install that again"):
        raw = gzip.decompress(read_bounded(path, _MOST_BYTES))
        table = np.loadtxt(io.BytesIO(raw), np.int64, delimiter=",")
        if table.shape != (total, math.prod(spec.shape) + 1):
            raise ValueError(f"a table of {table.shape}, expected {(total, math.prod(spec.shape) + 1)}")
        if table.min() < 0 or table[:, :-1].max() > spec.scale:
            raise ValueError(f"numbers from {table.min()} to {table.max()}, expected 0 to {spec.scale}")
    start = 0 if split == "train" else spec.sizes["train"]
    rows = slice(start, start + spec.sizes[split])
    x = table[:, :-1].astype(np.uint8).reshape(-1, *spec.shape)
    yield str(path), x[rows], table[rows, -1].tolist(), range(total)[rows]


def read_idx(spec: DatasetSpec, split: str, files: list[Path]) -> Iterator[Part]:
    """Read the images and labels of MNIST or Fashion-MNIST, gzipped or raw."""
    n = spec.sizes[split]
    yield str(files[1]), _idx(files[0], n, spec.shape[1:])[:, None], _idx(files[1], n, ()).tolist(), None


def _idx(path: Path, n: int, shape: tuple[int, ...]) -> UInt8Array:
    """Parse an idx file: bytes 0, 0, type (8: uint8), number of sizes; then sizes (big-endian uint32); then values."""
    magic, start = bytes((0, 0, 8, 1 + len(shape))), 8 + 4 * len(shape)
    most = start + n * math.prod(shape)
    with convert_errors(f"{path}: cannot be read"), open_regular(path, most) as stream:
        with gzip.open(stream) if path.suffix == ".gz" else stream as file:
            raw = file.read(most + 1)
        if len(raw) > most:
            raise ValueError(f"more than {most:,} bytes; allowed: at most that many, for {n:,} images")
    if raw[:4] != magic or len(raw) < start:
        got = f"{len(raw)} bytes starting with {raw[:4].hex()}"
        raise DataError(f"{path}: {got}, expected an idx header, {start} bytes starting with {magic.hex()}.")
    sizes = tuple(np.frombuffer(raw[4:start], ">u4").tolist())
    if sizes[1:] != shape:
        raise DataError(f"{path}: images of {sizes[1:]} pixels, expected {shape}.")
    if len(raw) != start + math.prod(sizes):
        raise DataError(f"{path}: {len(raw)} bytes, expected {start + math.prod(sizes)} for sizes {sizes}.")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(sizes)


def read_parquet(spec: DatasetSpec, split: str, files: list[Path]) -> Iterator[Part]:
    """Read Parquet shards with losslessly encoded images. A column `index` with official indices is optional."""
    from PIL import Image

    for path in files:
        with (
            convert_errors(f"{path}: not a Parquet file with img{{bytes}} and {spec.label}"),
            open_parquet(path, _MOST_BYTES) as file,
        ):
            if file.metadata.num_rows > spec.sizes[split]:
                raise ValueError(f"{file.metadata.num_rows:,} rows; the split has {spec.sizes[split]:,}")
            images: list[bytes] = []
            for batch in file.iter_batches(16, columns=["img.bytes"]):  # few at a time: large images are refused early
                images += batch["img"].field("bytes").to_pylist()
                if max(len(image or b"") for image in images[-16:]) > _MOST_IMAGE_BYTES:
                    raise ValueError(f"an image of more than {_MOST_IMAGE_BYTES:,} bytes")
            table = file.read([name for name in (spec.label, "index") if name in file.schema_arrow.names])
            labels = table[spec.label].to_pylist()
            index = table["index"].to_pylist() if "index" in table.column_names else None
        x = np.empty((len(images), *spec.shape), np.uint8)
        for row, encoded in enumerate(images):
            # Lossless formats only. Mode and size are checked before decoding, so a huge image costs no memory.
            with (
                convert_errors(f"{path}: image in row {row}"),
                Image.open(io.BytesIO(encoded), formats=("PNG", "WEBP")) as image,
            ):
                if (image.mode, image.size) != ("RGB", spec.shape[:0:-1]):
                    raise ValueError(f"{image.mode} {image.size}, expected RGB {spec.shape[:0:-1]}")
                x[row] = np.asarray(image).transpose(2, 0, 1)
        yield str(path), x, labels, index


def read_batches(spec: DatasetSpec, split: str, files: list[Path]) -> Iterator[Part]:
    """Read the official python batches, from the archive or its folder. No code from a pickle is run."""
    names = (spec.batches or {})[split]
    raw = _members(files[0], spec.unpacked, names)
    for name in names:
        with convert_errors(f"{files[0]}: {name}"):
            _check_memo(raw[name])
            batch = _BytesOnly(io.BytesIO(raw[name]), encoding="bytes").load()
            x, labels = batch[b"data"], list(batch[f"{spec.label}s".encode()])
            if (x.dtype, x.shape[1:]) != (np.uint8, (math.prod(spec.shape),)):
                raise ValueError(f"data is {x.dtype} {x.shape}, expected uint8 [N, {math.prod(spec.shape)}]")
        yield f"{files[0]}: {name}", x.reshape(-1, *spec.shape), labels, None


def _members(source: Path, folder: str, names: Sequence[str]) -> dict[str, bytes]:
    """Read the named files of a folder or a tar archive. Nothing is unpacked to disk."""
    found = {}
    with convert_errors(f"{source}: cannot be read"):
        if source.is_dir():
            found = {name: read_bounded(source / name, _MOST_BYTES) for name in names}
        else:
            with (
                open_regular(source, _MOST_BYTES) as packed,
                gzip.open(packed) as stream,
                # A stream: one pass, in the order of the archive.
                tarfile.open(fileobj=cast(Any, _Limited(stream)), mode="r|") as archive,
            ):
                for member in archive:
                    if member.size > _MOST_BYTES:
                        raise ValueError(f"{member.name} claims {member.size:,} bytes; allowed: {_MOST_BYTES:,}")
                    place, _, name = member.name.rpartition("/")
                    if place == folder and name in names and member.isfile():
                        found[name] = archive.extractfile(member).read()  # type: ignore[union-attr]
        if missing := set(names) - set(found):
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    return found


class _Limited:
    """A stream that ends with an error after `_MOST_BYTES`: an archive may unpack to any size."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        self.stream, self.left = stream, _MOST_BYTES

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {_MOST_BYTES:,} bytes")
        return data


def _byte_dtype(code: bytes | str, *_: int) -> np.dtype[Any]:
    """Stand in for `numpy.dtype` in pickles: bytes only, and without the integer `align` (numpy 2.4.0–2.4.4 warn)."""
    if code not in (b"u1", "u1"):
        raise pickle.UnpicklingError(f"it holds an array of {code!r}, expected bytes")
    return np.dtype("u1", copy=True)


_RECONSTRUCT = np.empty(0).__reduce__()[0]  # the function that numpy's pickles call
_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,  # since numpy 2
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): _byte_dtype,
    ("_codecs", "encode"): str.encode,  # Python 3 writes bytes for Python 2 with it
}


def _check_memo(content: bytes) -> None:
    """Refuse a pickle with a memo number above its own length: the memo table would use that much memory.

    Refuse one of more steps than lists of numbers and names can have, too: each takes time here.
    """
    for step, (code, number, _) in enumerate(pickletools.genops(content)):
        if step > _MOST_STEPS:
            raise pickle.UnpicklingError(f"refused, more than {_MOST_STEPS:,} steps")
        if "PUT" in code.name and not 0 <= int(number or 0) <= len(content):
            raise pickle.UnpicklingError(f"refused, memo number {number} given; allowed: 0 to {len(content)}")


class _BytesOnly(pickle.Unpickler):
    """Unpickles containers, numbers, strings and byte arrays. Refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a global if it is in `_ADMITTED`."""
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(f"refused, it asks for {module}.{name}, which no data set needs")
        return _ADMITTED[module, name]
