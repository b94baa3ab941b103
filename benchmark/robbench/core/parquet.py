"""Parquet files: how the package writes them, and how it reads files that may be hostile.

What a file claims is checked before anything is unpacked.
"""

from __future__ import annotations

import io
import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robbench.core.files import open_regular
from robbench.core.parquet_footer import Chunks, read_chunks, read_pages

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    import pandas as pd
    import pyarrow as pa
    import pyarrow.parquet as pq

__all__ = ["encode_rows", "open_parquet", "read_flat_table"]

# Snappy unpacks to at most 22 times its size. Zstandard unpacks to thousands of times: its pages are counted.
_CODECS = ("UNCOMPRESSED", "SNAPPY", "ZSTD")
_LEVEL = 15  # 1,000,000 records take one second; level 19 takes four and saves 0.7 %
# With DELTA_BYTE_ARRAY, each string may repeat the one before it, so that a file unpacks to its square.
_ENCODINGS = ("PLAIN", "PLAIN_DICTIONARY", "RLE", "BIT_PACKED", "RLE_DICTIONARY", "BYTE_STREAM_SPLIT")
_MOST_COLUMNS = 64
# Equal rows take no space: records have up to 2 rows per byte, wall times up to 9. A row counts as at least 16 values,
# because readers make Python objects of some. 2,000,000 rows are 40,000 images under 50 attacks.
_FREE_VALUES, _VALUES_RATIO, _LEAST_COLUMNS = 2**25, 32, 16
_FREE_BYTES, _BYTES_RATIO = 2**24, 32
# A page holds 20,000 rows, or is large. The headers of small pages would take hours.
_PAGE_VALUES, _PAGE_BYTES = 10_000, 2**16


def encode_rows(rows: pd.DataFrame, about: dict[str, Any] | None = None) -> bytes:
    """Return the bytes of a Parquet file of numbers, booleans and texts. The same rows give the same bytes.

    Numbers are stored with the encoding BYTE_STREAM_SPLIT: first the first bytes of all, then the second bytes, and so
    on. Only in columns of floats that repeat, Zstandard finds more without it.

    Args:
        rows: the rows. Their index is not stored.
        about: a JSON object for the metadata of the file, with the key `robbench`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    # One chunk: the layout must not depend on how the rows were put together.
    table = pa.Table.from_pandas(rows, preserve_index=False).combine_chunks()
    texts = [field.name for field in table.schema if _is_text(field.type)]
    split = [name for name in table.column_names if _is_split(table[name])]
    out = io.BytesIO()
    # The types of PyArrow (`store_schema`) and of pandas take more bytes than a short table. No reader needs them.
    with pq.ParquetWriter(
        out,
        table.schema,
        compression="zstd",
        compression_level=_LEVEL,
        use_dictionary=texts,
        column_encoding=dict.fromkeys(split, "BYTE_STREAM_SPLIT"),
        write_statistics=False,
        store_schema=False,
    ) as writer:
        if len(rows):  # PyArrow would write dictionaries without pages
            writer.write_table(table)
        if about is not None:
            writer.add_key_value_metadata({"robbench": json.dumps(about, sort_keys=True)})
    return out.getvalue()


def _is_split(column: pa.ChunkedArray) -> bool:
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_floating(column.type):
        return bool(2 * pc.count_distinct(column).as_py() > len(column))
    return bool(pa.types.is_integer(column.type))


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
        chunks = read_chunks(stream)
        _check_chunks(chunks, size)
        _check_pages(stream, chunks.zstd, about.num_columns * about.num_rows, size)
        yield file


def _check_claims(columns: int, rows: int, groups: int, size: int) -> None:
    for what, claimed, most in (
        ("columns", columns, _MOST_COLUMNS),
        ("rows", rows, (_FREE_VALUES + _VALUES_RATIO * size) // max(columns, _LEAST_COLUMNS)),
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


def _check_pages(stream: BinaryIO, chunks: list[tuple[int, int]], values: int, size: int) -> None:
    # A chunk has a page of data, and a dictionary or none.
    pages = read_pages(stream, chunks, 2 * len(chunks) + values // _PAGE_VALUES + size // _PAGE_BYTES)
    if pages > (most := 8 * values + _FREE_BYTES + _BYTES_RATIO * size):
        raise ValueError(f"its pages claim {pages:,} bytes in {size:,}; allowed: {most:,}")


def read_flat_table(path: Path, most: int, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file of numbers, booleans and short texts. Texts are of the type large_string.

    Args:
        path: the file.
        most: size limit in bytes.
        columns: the columns to read; by default all.

    Raises:
        OSError, ValueError: see `open_parquet`; a column is nested, or the texts unpack out of proportion.
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
        length, most_text = 0, _FREE_BYTES + _BYTES_RATIO * (path.stat().st_size + table.num_rows)
        for name in texts:
            column = table[name]
            length += sum(
                pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0 for chunk in column.chunks
            )
            if length > most_text:
                raise ValueError(f"it unpacks to {length:,} bytes of text; allowed: {most_text:,}")
            at = table.schema.get_field_index(name)
            table = table.set_column(at, pa.field(name, pa.large_string()), column.cast(pa.large_string()))
    return table.replace_schema_metadata(schema.metadata)


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
