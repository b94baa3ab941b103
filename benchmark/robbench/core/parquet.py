"""Parquet files that may be hostile: what a file claims is checked before anything is unpacked."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from robbench.core.files import open_regular
from robbench.core.parquet_footer import Chunks, read_chunks

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["open_parquet", "read_flat_table"]

# Snappy unpacks to at most 22 times its size; other codecs to a thousand times and more.
_CODECS = ("UNCOMPRESSED", "SNAPPY")
# With DELTA_BYTE_ARRAY, each string may repeat the one before it, so that a file unpacks to its square.
_ENCODINGS = ("PLAIN", "PLAIN_DICTIONARY", "RLE", "BIT_PACKED", "RLE_DICTIONARY")
_MOST_COLUMNS = 64
# Equal rows take no space: files of this package have up to 1.3 rows per byte. 500,000 rows are 10,000 images under 50
# attacks.
_FREE_ROWS, _FREE_TEXT, _TEXT_RATIO = 500_000, 2**24, 32


@contextmanager
def open_parquet(path: Path, most: int) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file of at most `most` bytes whose claims are in proportion to its size.

    Raises:
        OSError: the file is not a regular file, or is larger.
        ValueError: it claims too much, or uses a codec or an encoding that can unpack to any size.
    """
    import pyarrow.parquet as pq

    with open_regular(path, most) as stream, pq.ParquetFile(stream) as file:
        size = path.stat().st_size
        about = file.metadata
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise ValueError("two columns have one name")
        _check_claims(about.num_columns, about.num_rows, about.num_row_groups, size)
        _check_chunks(read_chunks(stream), size)
        yield file


def _check_claims(columns: int, rows: int, groups: int, size: int) -> None:
    for what, claimed, most in (
        ("columns", columns, _MOST_COLUMNS),
        ("rows", rows, _FREE_ROWS + size // 2),
        ("row groups", groups, 1 + min(rows, 10_000)),
    ):
        if claimed > most:
            raise ValueError(f"it claims {claimed:,} {what} in {size:,} bytes; allowed: {most:,}")


def _check_chunks(chunks: Chunks, size: int) -> None:
    for what, given, allowed in (("codec", chunks.codecs, _CODECS), ("encoding", chunks.encodings, _ENCODINGS)):
        if strange := given - set(allowed):
            raise ValueError(f"{what} {min(strange)} given; allowed: {', '.join(allowed)}")
    if chunks.size > size:
        raise ValueError(f"its parts claim {chunks.size:,} bytes of {size:,}")


def read_flat_table(path: Path, most: int, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file of numbers, booleans and short texts. Texts are of the type large_string.

    Args:
        path: the file.
        most: size limit in bytes.
        columns: the columns to read; by default all.

    Raises:
        OSError, ValueError: see `open_parquet`; a column is nested, or texts unpack out of proportion.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with open_parquet(path, most) as file:
        schema = file.schema_arrow
        fields = [field for field in schema if columns is None or field.name in columns]
        texts = [field.name for field in fields if _is_text(field.type)]
        for field in fields:
            if field.name not in texts and not pa.types.is_primitive(field.type):
                raise ValueError(f"column {field.name} is of another type; expected numbers, booleans or text")
    with open_regular(path, most) as stream, pq.ParquetFile(stream, read_dictionary=texts) as file:
        table = file.read(columns)
        # A text that many rows repeat is stored once. It is counted before it is repeated.
        for name in texts:
            column = table[name]
            length = sum(
                pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0 for chunk in column.chunks
            )
            if length > _FREE_TEXT + _TEXT_RATIO * path.stat().st_size:
                raise ValueError(f"column {name} unpacks to {length:,} bytes of text")
            at = table.schema.get_field_index(name)
            table = table.set_column(at, pa.field(name, pa.large_string()), column.cast(pa.large_string()))
    return table.replace_schema_metadata(schema.metadata)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
