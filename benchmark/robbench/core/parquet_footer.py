"""What the footer of a Parquet file says of its column chunks. PyArrow ends the process when a damaged one is asked.

The footer is a struct of Thrift's compact protocol: https://github.com/apache/thrift/blob/master/doc/specs. Names and
numbers of its fields are in the Parquet format's `parquet.thrift`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    _Field = tuple[tuple[int, ...], int]

__all__ = ["Chunks", "read_chunks"]

_CHUNK = (4, 1, 3)  # FileMetaData.row_groups, RowGroup.columns, ColumnChunk.meta_data
_ENCODINGS, _CODEC, _TOTAL_COMPRESSED_SIZE = 2, 4, 7  # of ColumnMetaData
_CODEC_NAMES = ("UNCOMPRESSED", "SNAPPY", "GZIP", "LZO", "BROTLI", "LZ4", "ZSTD", "LZ4_RAW")
_ENCODING_NAMES = (
    "PLAIN", "GROUP_VAR_INT", "PLAIN_DICTIONARY", "RLE", "BIT_PACKED", "DELTA_BINARY_PACKED", "DELTA_LENGTH_BYTE_ARRAY",
    "DELTA_BYTE_ARRAY", "RLE_DICTIONARY", "BYTE_STREAM_SPLIT",
)  # fmt: skip
_TRUE, _FALSE, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = 1, 2, 3, (4, 5, 6), 7, 8, (9, 10), 11, 12
_DEEPEST = 16  # the format nests seven deep
_TAIL = 8  # length of the footer, and the letters PAR1


class Chunks(NamedTuple):
    """What a footer says of all column chunks.

    Attributes:
        codecs: names of the codecs, or the numbers of unknown ones.
        encodings: names of the encodings, or the numbers of unknown ones.
        size: bytes of all chunks, as stored.
    """

    codecs: set[str]
    encodings: set[str]
    size: int


def read_chunks(stream: BinaryIO) -> Chunks:
    """Read what the footer of a Parquet file says of its column chunks.

    Raises:
        ValueError: the file ends too early, or has no footer that can be read.
    """
    end = stream.seek(0, 2)
    stream.seek(max(0, end - _TAIL))
    length = int.from_bytes(stream.read(4), "little")
    if length > end - _TAIL:
        raise ValueError(f"its footer claims {length:,} bytes of {end:,}")
    stream.seek(end - _TAIL - length)
    chunks: dict[int, list[int]] = {_ENCODINGS: [], _CODEC: [], _TOTAL_COMPRESSED_SIZE: []}
    for path, number in _Reader(stream.read(length)).read_struct(()):
        if path[:-1] == _CHUNK and path[-1] in chunks:
            chunks[path[-1]].append(number)
    codecs = {_find_name(_CODEC_NAMES, number) for number in chunks[_CODEC]}
    encodings = {_find_name(_ENCODING_NAMES, number) for number in chunks[_ENCODINGS]}
    return Chunks(codecs, encodings, sum(chunks[_TOTAL_COMPRESSED_SIZE]))


def _find_name(names: tuple[str, ...], number: int) -> str:
    return names[number] if 0 <= number < len(names) else str(number)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def read_struct(self, path: tuple[int, ...]) -> Iterator[_Field]:
        """Yield the integers of a struct, each with the numbers of the fields that lead to it."""
        if len(path) > _DEEPEST:
            raise ValueError("its footer is nested too deeply")
        field = 0
        while header := self._take(1)[0]:
            field = field + (header >> 4) if header >> 4 else self._read_zigzag()
            yield from self._read_value(header & 15, (*path, field))

    def _read_value(self, kind: int, path: tuple[int, ...], *, listed: bool = False) -> Iterator[_Field]:
        if kind in (_TRUE, _FALSE):
            self._take(int(listed))  # of a field, the header holds the value
        elif kind == _BYTE:
            self._take(1)
        elif kind in _INTEGERS:
            yield path, self._read_zigzag()
        elif kind == _DOUBLE:
            self._take(8)
        elif kind == _BINARY:
            self._take(self._read_varint())
        elif kind in _LISTS:
            header = self._take(1)[0]
            size = header >> 4 if header >> 4 < 15 else self._read_varint()
            yield from self._read_many([header & 15], size, path)
        elif kind == _MAP:
            if size := self._read_varint():
                kinds = self._take(1)[0]
                yield from self._read_many([kinds >> 4, kinds & 15], size, path)
        elif kind == _STRUCT:
            yield from self.read_struct(path)
        else:
            raise ValueError(f"its footer holds a value of type {kind}")

    def _read_many(self, kinds: list[int], size: int, path: tuple[int, ...]) -> Iterator[_Field]:
        if size > len(self.data):  # each takes at least one byte
            raise ValueError(f"its footer claims a list of {size:,} values")
        for _ in range(size):
            for kind in kinds:
                yield from self._read_value(kind, path, listed=True)

    def _read_varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("its footer holds an integer of more than 64 bits")

    def _read_zigzag(self) -> int:
        value = self._read_varint()
        return (value >> 1) ^ -(value & 1)

    def _take(self, count: int) -> bytes:
        taken = self.data[self.at : self.at + count]
        if len(taken) < count:
            raise ValueError("its footer ends too early")
        self.at += count
        return taken
