"""Encoded images in a column of Parquet files. A file may be hostile: a few bytes can stand for many large images."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from robbench.core.parquet import open_parquet

if TYPE_CHECKING:
    import pyarrow.parquet as pq

__all__ = ["MOST_PARQUET_BYTES", "Rows", "forget_files"]

MOST_PARQUET_BYTES = 2**36
"""Size limit of a Parquet file."""
_FREE_BYTES, _UNPACKED_BYTES = 2**24, 32  # of the images of a row group, and for each byte of the file
_FREE_PIXELS, _PIXELS_OF_BYTE = 2**26, 128


@dataclass(frozen=True)
class Rows:
    """Images in a binary column of Parquet files, by position. The row group that was read last is kept in memory.

    Attributes:
        paths: the files.
        column: `image.bytes`, or the name of a binary column.
        names: what messages call each image.
        places: file, row group and row in the group of each image, [N, 3].
    """

    paths: tuple[Path, ...]
    column: str
    names: Sequence[str]
    places: NDArray[np.int64]

    @property
    def most_pixels(self) -> int:
        """How many pixels all images may have: a small file can hold many images that are large and empty."""
        return _FREE_PIXELS + _PIXELS_OF_BYTE * sum(path.stat().st_size for path in self.paths)

    def fetch(self, position: int) -> bytes:
        """Read an image."""
        file, group, row = self.places[position].tolist()
        content = _read_group(self.paths[file], group, self.column)[row].as_py()
        if not isinstance(content, bytes):
            raise ValueError("the row holds no bytes")
        return content


@functools.lru_cache(maxsize=1)
def _read_group(path: Path, group: int, column: str) -> Any:
    """Read a row group as an array of bytes. An image that many rows repeat is held once."""
    import pyarrow.compute as pc

    values = _open_rows(path, column).read_row_group(group, columns=[column]).column(0).combine_chunks()
    for part in column.split(".")[1:]:
        values = values.field(part)
    lengths = pc.binary_length(values.dictionary).take(values.indices)
    if (unpacked := pc.sum(lengths).as_py() or 0) > _FREE_BYTES + _UNPACKED_BYTES * path.stat().st_size:
        raise ValueError(f"{path}: row group {group} holds {unpacked:,} bytes of images, out of proportion to the file")
    return values


@functools.lru_cache(maxsize=1)
def _open_rows(path: Path, column: str) -> pq.ParquetFile:
    """Open a file once for all its row groups: its footer takes time, and it may have thousands of them."""
    import pyarrow.parquet as pq

    with open_parquet(path, MOST_PARQUET_BYTES):
        return pq.ParquetFile(path, read_dictionary=[column])


def forget_files() -> None:
    """Close what is open, and forget what was read."""
    _read_group.cache_clear()
    _open_rows.cache_clear()
