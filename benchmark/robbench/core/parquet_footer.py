"""What a Parquet file says of its column chunks and pages. PyArrow ends the process when a damaged footer is asked.

PyArrow checks no size of a page before it unpacks the page. The footer and the header of each page are structs of
Thrift's compact protocol: https://github.com/apache/thrift/blob/master/doc/specs. Names and numbers of their fields are
in the Parquet format's `parquet.thrift`.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

    _Field = tuple[tuple[int, ...], int, int]

__all__ = ["Chunks", "read_chunks", "read_pages"]

_CHUNK = (4, 1, 3)  # FileMetaData.row_groups, RowGroup.columns, ColumnChunk.meta_data
_ENCODINGS, _CODEC, _SIZE, _DATA_PAGE, _DICTIONARY_PAGE = 2, 4, 7, 9, 11  # of ColumnMetaData
_UNPACKED_SIZE, _PACKED_SIZE = 2, 3  # of PageHeader
_CODEC_NAMES = ("UNCOMPRESSED", "SNAPPY", "GZIP", "LZO", "BROTLI", "LZ4", "ZSTD", "LZ4_RAW")
_ENCODING_NAMES = (
    "PLAIN", "GROUP_VAR_INT", "PLAIN_DICTIONARY", "RLE", "BIT_PACKED", "DELTA_BINARY_PACKED", "DELTA_LENGTH_BYTE_ARRAY",
    "DELTA_BYTE_ARRAY", "RLE_DICTIONARY", "BYTE_STREAM_SPLIT",
)  # fmt: skip
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64 = 1, 2, 3, 4, 5, 6
_DOUBLE, _BINARY, _LISTS, _MAP, _STRUCT = 7, 8, (9, 10), 11, 12
_FIELDS = {_CODEC: _I32, _SIZE: _I64, _DATA_PAGE: _I64, _DICTIONARY_PAGE: _I64}
_MOST_FIELDS = 2**15  # a parser that keeps 16 bits would take the number 65540 for 4
_DEEPEST = 16  # the format nests seven deep
_TAIL = 8  # length of the footer, and the letters PAR1


class Chunks(NamedTuple):
    """What a footer says of all column chunks.

    Attributes:
        codecs: names of the codecs, or the numbers of unknown ones.
        encodings: names of the encodings, or the numbers of unknown ones.
        size: bytes of all chunks, as stored.
        zstd: where each chunk of the codec ZSTD begins, and its bytes as stored.
    """

    codecs: set[str]
    encodings: set[str]
    size: int
    zstd: list[tuple[int, int]]


def read_chunks(stream: BinaryIO) -> Chunks:
    """Read what the footer of a Parquet file says of its column chunks.

    Raises:
        ValueError: the file ends too early, or has no footer that can be read in one way only.
    """
    end = stream.seek(0, 2)
    stream.seek(max(0, end - _TAIL))
    length = int.from_bytes(stream.read(4), "little")
    if length > end - _TAIL:
        raise ValueError(f"its footer claims {length:,} bytes of {end:,}")
    stream.seek(end - _TAIL - length)
    chunk: dict[int, int] = {}
    codecs, encodings, size, zstd = set(), set(), 0, []
    # The struct at the end closes the last chunk.
    for path, kind, number in chain(_Reader(stream.read(length)).read_struct(()), [(_CHUNK[:2], _STRUCT, 0)]):
        if path == _CHUNK[:2]:
            size += chunk.get(_SIZE, 0)
            if chunk.get(_CODEC) == _CODEC_NAMES.index("ZSTD"):
                zstd.append((_find_begin(chunk), chunk.get(_SIZE, 0)))
            chunk = {}
        elif path[:-1] == _CHUNK and path[-1] in _FIELDS:
            _keep(chunk, path[-1], number, kind == _FIELDS[path[-1]])
            if path[-1] == _CODEC:
                codecs.add(_find_name(_CODEC_NAMES, number))
        elif path == (*_CHUNK, _ENCODINGS):
            encodings.add(_find_name(_ENCODING_NAMES, number))
    return Chunks(codecs, encodings, size, zstd)


def _keep(found: dict[int, int], field: int, number: int, fits: bool) -> None:
    """Keep an integer of a struct, unless another parser could read another one."""
    if field in found or not fits or number < 0:
        raise ValueError(f"field {field} of a struct stands there twice, is negative or of another type")
    found[field] = number


def _find_begin(chunk: dict[int, int]) -> int:
    """Return where PyArrow begins to read a chunk."""
    begin = chunk.get(_DATA_PAGE, 0)
    return min(begin, chunk.get(_DICTIONARY_PAGE, 0) or begin)


def read_pages(stream: BinaryIO, chunks: list[tuple[int, int]], most: int) -> int:
    """Return the number of bytes that the headers of the pages of chunks claim to unpack to.

    Args:
        stream: the file.
        chunks: where each chunk begins, and its bytes as stored.
        most: limit for the number of pages.

    Raises:
        ValueError: there are more pages, a page does not end in its chunk, or a header cannot be read in one way only.
    """
    end = stream.seek(0, 2)
    count = size = 0
    for begin, length in chunks:
        if begin + length > end:
            raise ValueError(f"a chunk claims the bytes {begin:,} to {begin + length:,} of {end:,}")
        stream.seek(begin)
        reader = _Reader(stream.read(length))
        while reader.at < len(reader.data):
            header: dict[int, int] = {}
            for path, kind, number in reader.read_struct(()):
                if path in ((_UNPACKED_SIZE,), (_PACKED_SIZE,)):
                    _keep(header, path[0], number, kind == _I32)
            reader.take(header.get(_PACKED_SIZE, 0))
            size += header.get(_UNPACKED_SIZE, 0)
            count += 1
            if count > most:
                raise ValueError(f"it has more than {most:,} pages")
    return size


def _find_name(names: tuple[str, ...], number: int) -> str:
    return names[number] if 0 <= number < len(names) else str(number)


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def read_struct(self, path: tuple[int, ...]) -> Iterator[_Field]:
        """Yield the integers of a struct and the beginnings of its structs: path, type, number (of a struct: 0).

        A path has the numbers of the fields that lead to the value.
        """
        if len(path) > _DEEPEST:
            raise ValueError("a struct is nested too deeply")
        field = 0
        while header := self.take(1)[0]:
            field = field + (header >> 4) if header >> 4 else self._read_zigzag()
            if not 0 < field < _MOST_FIELDS:
                raise ValueError(f"a struct has a field of number {field}")
            yield from self._read_value(header & 15, (*path, field))

    def _read_value(self, kind: int, path: tuple[int, ...], *, listed: bool = False) -> Iterator[_Field]:
        if kind in (_TRUE, _FALSE):
            self.take(int(listed))  # of a field, the header holds the value
        elif kind == _BYTE:
            self.take(1)
        elif kind in (_I16, _I32, _I64):
            yield path, kind, self._read_zigzag()
        elif kind == _DOUBLE:
            self.take(8)
        elif kind == _BINARY:
            self.take(self._read_varint())
        elif kind in _LISTS:
            header = self.take(1)[0]
            size = header >> 4 if header >> 4 < 15 else self._read_varint()
            yield from self._read_many([header & 15], size, path)
        elif kind == _MAP:
            if size := self._read_varint():
                kinds = self.take(1)[0]
                yield from self._read_many([kinds >> 4, kinds & 15], size, path)
        elif kind == _STRUCT:
            yield path, kind, 0
            yield from self.read_struct(path)
        else:
            raise ValueError(f"a struct holds a value of type {kind}")

    def _read_many(self, kinds: list[int], size: int, path: tuple[int, ...]) -> Iterator[_Field]:
        if size > len(self.data):  # each takes at least one byte
            raise ValueError(f"a struct claims a list of {size:,} values")
        for _ in range(size):
            for kind in kinds:
                yield from self._read_value(kind, path, listed=True)

    def _read_varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.take(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a struct holds an integer of more than 64 bits")

    def _read_zigzag(self) -> int:
        value = self._read_varint()
        return (value >> 1) ^ -(value & 1)

    def take(self, count: int) -> bytes:
        taken = self.data[self.at : self.at + count]
        if len(taken) < count:
            raise ValueError("a struct ends too early")
        self.at += count
        return taken
