"""Parquet files of the package: the same rows come back, and the same rows give the same bytes."""

import io

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robbench.core.parquet import encode_rows, read_flat_table
from robbench.core.parquet_footer import read_chunks

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
    moved = rows.set_index(rows.index[::-1] + 5)
    assert encode_rows(rows) == encode_rows(rows.copy()) == encode_rows(parts) == encode_rows(moved)
    assert encode_rows(rows) != encode_rows(rows.assign(flag=~rows["flag"]))


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
