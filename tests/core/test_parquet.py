"""Parquet files of the package: the same rows come back, the same rows give the same bytes, and claims are read."""

import io

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robbench.core.parquet import encode_rows, read_flat_table
from robbench.core.parquet_footer import read_chunks, read_pages

EDGES = [0.0, -0.0, np.nan, np.inf, -np.inf, 1.5]


def make_rows():
    """Make 300 rows of every type that a table of the package has."""
    n = 300
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "edges": np.tile(EDGES, n // 6),
            "edges_32": np.tile(EDGES, n // 6).astype("float32"),
            "tiny": np.full(n, 5e-324),
            "absent": np.full(n, np.nan),
            "unique": rng.random(n),
            "unique_32": rng.random(n).astype("float32"),
            "unique_16": (rng.random(n) * 1000).astype("float16"),
            "wide": rng.integers(-(2**63), 2**63, n, np.int64),
            "ends": np.tile([-(2**63), 2**63 - 1, 0], n // 3),
            "level": rng.integers(0, 256, n).astype("uint8"),
            "flag": rng.random(n) < 0.5,
            "text": pd.Series(np.tile(["a", "", "é∞", "a" * 100, "b", "c"], n // 6), dtype="str"),
        }
    )


def read(path, content):
    path.write_bytes(content)
    return read_flat_table(path, 2**26).to_pandas(ignore_metadata=True)


def assert_equal(found, rows):
    assert list(found.dtypes.astype(str)) == list(rows.dtypes.astype(str)) and list(found) == list(rows)
    for name in rows:
        if name == "text":
            assert found[name].tolist() == rows[name].tolist()
        else:
            assert found[name].to_numpy().tobytes() == rows[name].to_numpy().tobytes(), name


@pytest.mark.parametrize("n", [0, 1, 300])
def test_rows_come_back_bit_by_bit(tmp_path, n):
    rows = make_rows()[:n]
    assert_equal(read(tmp_path / "t", encode_rows(rows)), rows)


def test_files_of_older_versions_are_read(tmp_path):
    rows = make_rows()
    content = rows.to_parquet(index=False)
    assert read_chunks(io.BytesIO(content)).codecs == {"SNAPPY"}
    assert_equal(read(tmp_path / "t", content), rows)


def test_the_same_rows_give_the_same_bytes():
    rows = make_rows()
    parts = pd.concat([rows[:7], rows[7:100], rows[100:]])
    moved = rows.set_index(np.arange(len(rows)) ** 2)
    assert encode_rows(rows) == encode_rows(rows.copy()) == encode_rows(parts) == encode_rows(moved)
    assert encode_rows(rows) != encode_rows(rows.assign(flag=~rows["flag"]))
    texts = pd.DataFrame({"text": pd.Series([f"{i}" * 30 for i in range(20_000)], dtype="str")})
    parts = pd.concat([texts[i : i + 777] for i in range(0, len(texts), 777)])
    assert encode_rows(texts) == encode_rows(parts)


def test_the_metadata_are_those_given():
    about = {"run_id": "ab", "version": 1}
    stored = pq.read_schema(io.BytesIO(encode_rows(make_rows(), about))).metadata
    assert stored == {b"robbench": b'{"run_id": "ab", "version": 1}'}
    assert pq.read_schema(io.BytesIO(encode_rows(make_rows()))).metadata is None


def test_a_file_is_small():
    """Of float32 values between 1 and 2, the last byte is constant."""
    rng = np.random.default_rng(0)
    unique = pd.DataFrame({"x": rng.uniform(1, 2, 20_000).astype("float32")})
    assert len(encode_rows(unique)) < 20_000 * 3.1 < len(plain(unique))
    repeated = pd.DataFrame({"x": np.repeat(rng.random(100), 50)[rng.permutation(5000)]})
    assert len(encode_rows(repeated)) < 5000 * 2.2 < len(split(repeated))


def plain(rows):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pandas(rows), out, compression="zstd", compression_level=15, use_dictionary=False)
    return out.getvalue()


def split(rows):
    out = io.BytesIO()
    encoding = {"x": "BYTE_STREAM_SPLIT"}
    pq.write_table(pa.Table.from_pandas(rows), out, compression="zstd", use_dictionary=False, column_encoding=encoding)
    return out.getvalue()


def test_one_function_writes_parquet(repo):
    root = repo / "benchmark/robbench"
    writers = {"write_table(", "to_parquet(", "ParquetWriter("}
    found = {p.relative_to(root).as_posix() for p in root.rglob("*.py") if any(w in p.read_text() for w in writers)}
    assert found == {"core/parquet.py"}


# Structs of Thrift's compact protocol. The first byte of a field has the distance from the number of the field before
# it, and its type: 5 and 6 are integers of 32 and 64 bits, 9 a list, 12 a struct. An integer n >= 0 is stored as 2 n,
# and -n as 2 n - 1.
CODEC, SIZE, DATA = b"\x45\x0c", b"\x36\x28", b"\x26\x3c"  # ZSTD, 20 bytes, from byte 30 on


def footer_of(chunk):
    """Return the end of a Parquet file of one chunk."""
    content = b"\x49\x1c" + b"\x19\x1c" + b"\x3c" + chunk + bytes(4)
    return io.BytesIO(content + len(content).to_bytes(4, "little") + b"PAR1")


@pytest.mark.parametrize(("rest", "begin"), [(b"", 30), (b"\x26\x14", 10), (b"\x26\x50", 30), (b"\x26\x00", 30)])
def test_a_chunk_begins_at_its_dictionary_if_that_comes_first(rest, begin):
    assert read_chunks(footer_of(CODEC + SIZE + DATA + rest)).zstd == [(begin, 20)]


@pytest.mark.parametrize(
    "chunk",
    [
        CODEC + SIZE + DATA + b"\x25\x14",  # of 32 bits, which PyArrow skips
        CODEC + SIZE + DATA + b"\x26\x13",  # negative
        CODEC + SIZE + DATA + b"\x06\x12\x14",  # field 9 again
        CODEC + b"\x05\x08\x02" + SIZE + DATA,  # field 4 again
        b"\x46\x0c" + SIZE + DATA,  # a codec of 64 bits
        CODEC + b"\x36\x27" + DATA,  # a negative size
    ],
)
def test_a_footer_of_two_readings_is_refused(chunk):
    with pytest.raises(ValueError, match=r"field \d+ of a struct stands there twice, is negative or of another type"):
        read_chunks(footer_of(chunk))


# The type of a page, its 100 bytes after unpacking, and 3 bytes as stored.
KIND, UNPACKED, PACKED = b"\x15\x00", b"\x15\xc8\x01", b"\x15\x06"


def test_pages_are_counted():
    page = KIND + UNPACKED + PACKED + b"\x00" + b"abc"
    stream = io.BytesIO(b"PAR1" + page * 5)
    chunks = [(4, len(page) * 2), (4 + len(page) * 2, len(page) * 3)]
    assert read_pages(stream, chunks, 5) == 500
    with pytest.raises(ValueError, match="more than 4 pages"):
        read_pages(stream, chunks, 4)
    with pytest.raises(ValueError, match="claims the bytes 4 to 60 of 59"):
        read_pages(stream, [(4, len(page) * 5 + 1)], 5)
    with pytest.raises(ValueError, match="ends too early"):
        read_pages(stream, [(4, len(page) * 2 - 1)], 5)


@pytest.mark.parametrize(
    "header",
    [
        KIND + UNPACKED + b"\x05\x04\x00" + PACKED,  # field 2 again
        KIND + UNPACKED + PACKED + b"\x05\x06\x06",  # field 3 again
        KIND + b"\x16\xc8\x01" + PACKED,  # of 64 bits
        KIND + b"\x15\xc7\x01" + PACKED,  # negative
        KIND + UNPACKED + b"\x15\x05",  # a negative length
    ],
)
def test_a_page_of_two_readings_is_refused(header):
    content = header + b"\x00" + b"abc"
    with pytest.raises(ValueError, match="stands there twice, is negative or of another type"):
        read_pages(io.BytesIO(content), [(0, len(content))], 5)


@pytest.mark.parametrize("number", [b"\x84\x80\x08", b"\x00", b"\x03"])
def test_a_field_without_a_number_of_16_bits_is_refused(number):
    """65538, 0 and -2."""
    content = b"\x05" + number + UNPACKED[1:] + PACKED + b"\x00" + b"abc"
    with pytest.raises(ValueError, match="a struct has a field of number"):
        read_pages(io.BytesIO(content), [(0, len(content))], 5)
