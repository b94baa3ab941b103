"""Files that make a parser wait for ever, or take time and memory out of proportion to their size."""

import contextlib
import gzip
import io
import json
import os
import resource
import socket
import struct
import subprocess
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from robbench.core.errors import RobbenchError, StorageError
from robbench.core.files import append_text, digest, load_toml, open_regular, read_bounded, read_json_lines
from robbench.core.parquet import read_flat_table
from robbench.core.parquet_footer import read_chunks, read_pages
from robbench.core.philox import draw_order
from robbench.data import encoded
from robbench.data import sets as data
from robbench.data.folder import read_mapping
from robbench.data.own import open_images
from robbench.gate.baseline import read_baseline
from robbench.linear.record import read_linear, read_linearization
from robbench.masking.record import read_sanity
from robbench.models.card import load_card
from robbench.models.load import parse_state
from robbench.models.load_source import load_source
from robbench.models.spec import ModelSpec
from robbench.report.curve import draw_curve
from robbench.report.spread import _choose_stem
from robbench.report.sweep import _read_points
from robbench.results.adversarials import list_entries, read
from robbench.results.judging_code import read_began
from robbench.results.locking import _read_holder
from robbench.results.records import COLUMNS, pack_rows, read_rows, read_run_id
from robbench.results.run_files import read_description
from robbench.results.schema import read_result
from robbench.results.summary import make_accuracy
from robbench.suite import load_suite
from support.fuzzing import bounded_memory

pytestmark = pytest.mark.usefixtures("limited_time")

MOST_SECONDS = 5  # a flood that is not stopped takes minutes; a slow machine that is busy must pass
SIZE = 990_000  # below a megabyte
SHORT = 130_000  # below the limit of cards and suites


@pytest.fixture(scope="module")
def example():
    return json.loads((Path(__file__).parent / "run_example.json").read_text())


def load_source_file(path):
    load_source(ModelSpec(f"file:{path}", architecture="digits_convnet"), (1, 8, 8), 10)


READERS = {
    "card.toml": [load_card],
    "result.json": [read_result, read_description, read_sanity, read_baseline, _read_holder],
    "run.json": [lambda path: read_began(path.parent)[1] or None],
    "linear.json": [lambda path: read_linear(path.parent)],
    "classes.parquet": [lambda path: read_linearization(path.parent)],
    "points.csv": [lambda path: _read_points(path) or None],
    "spread.json": [lambda path: _choose_stem(path.parent, path.stem, [], 1) and None],
    "log.jsonl": [lambda path: draw_curve(path, path.with_name("curve.png"), "")],
    "outcomes.parquet": [read_rows, read_run_id],
    "x.safetensors": [read, list_entries, load_source_file],
    "x.pt": [load_source_file],
}


@contextlib.contextmanager
def ended_at_last(path):
    """End a pipe after 10 s from outside: native code that opens a pipe without a writer obeys no alarm."""
    writer = subprocess.Popen(["sh", "-c", 'sleep 10; : > "$0"', path]) if path.is_fifo() else None
    try:
        yield
    finally:
        if writer is not None:
            writer.kill()
            writer.wait()


@pytest.mark.parametrize("kind", ["pipe", "socket", "zeros", "folder", "link to a pipe"])
@pytest.mark.parametrize("name", READERS)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, monkeypatch, name, kind):
    monkeypatch.chdir(tmp_path)  # the path of a socket is short
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"not a regular file|No such device|Is a directory"):
        read_bounded(path, 10)
    with ended_at_last(path):
        for reader in READERS[name]:
            begin = time.perf_counter()
            with bounded_memory(2**30), contextlib.suppress(RobbenchError):
                assert reader(path) is None  # a holder and a run_id that cannot be read are none
            assert time.perf_counter() - begin < MOST_SECONDS


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_data_sets_that_are_pipes_are_refused_at_once(tmp_path, name):
    place = {"mnist": "mnist/t10k-images-idx3-ubyte", "cifar10": "cifar10/cifar-10-python.tar.gz"}.get(
        name, "cifar100/cifar-100-python/test"
    )
    (tmp_path / place).parent.mkdir(parents=True)
    os.mkfifo(tmp_path / place)
    with pytest.raises(RobbenchError):
        data.load(name, "test", tmp_path)


def refused_cheaply(reader, path, content):
    """Read content that floods a parser, within the limits of time and memory. It may be an error, or no flood."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert path.stat().st_size < 2**20
    begin = time.process_time()
    with bounded_memory(2**30):
        try:
            reader(path)
            said = "taken"
        except RobbenchError as error:
            said = str(error)
    assert time.process_time() - begin < MOST_SECONDS
    assert len(said) < 20_000
    return said


TOML = {
    "one deep key": "a" + ".a" * (SHORT // 2) + " = 1",
    "one deep table": "[a" + ".a" * (SHORT // 2 - 1) + "]",
    "deep keys": "\n".join("a." * 31 + f"b{i} = 1" for i in range(SHORT // 72)),
    "quoted keys": "'a'" + ".'a'" * (SHORT // 4) + "=1",
    "keys in a list": "a = [" + "{a.b.c = 1}, " * (SHORT // 13) + "]",
    "brackets": "a = " + "[" * SHORT,
    "braces": "a = " + "{a=" * (SHORT // 3),
    "unknown keys": "\n".join(f"a{i}=1" for i in range(SHORT // 8)),
    "tables": "\n".join(f"[a{i}]" for i in range(SHORT // 8)),
    "wrong values": "[preprocess]\nmean=[" + "'a'," * (SHORT // 4) + "]",
}


@pytest.mark.parametrize("name", TOML)
@pytest.mark.parametrize("reader", [load_card, lambda path: load_suite(str(path))], ids=["card", "suite"])
def test_toml_costs_in_proportion(tmp_path, name, reader):
    said = refused_cheaply(reader, tmp_path / "mine.toml", TOML[name])
    assert said != "taken"


def test_dots_in_texts_are_no_nesting():
    assert load_toml('a = "1.2.3"\nb.c.d = 1')["b"] == {"c": {"d": 1}}
    with pytest.raises(ValueError, match="more than 100 parts"):
        load_toml(TOML["one deep key"])


def flood_json(name, example):
    def field(key, text):
        return json.dumps({**example, key: None}).replace(f'"{key}": null', f'"{key}": {text}', 1)

    return {
        "brackets": "[" * SIZE,
        "braces": '{"a":' * (SIZE // 5),
        "attacks": field("attacks", "[" + "{}," * (SIZE // 3) + "{}]"),
        "few attacks": field("attacks", "[" + "{}," * 60_000 + "{}]"),
        "runs": '{"schema_version":1,"runs":[' + "{}," * (SIZE // 3) + "{}]}",
        "few runs": '{"schema_version":1,"runs":[' + "{}," * 50_000 + "{}]}",
        "few checks": '{"checks":[' + "{}," * 50_000 + "{}]}",
        "unknown keys": "{" + ",".join(f'"k{i}":1' for i in range(SIZE // 12)) + "}",
        "digits": '{"n":' + "9" * SIZE + "}",
        "deep identity": field("identity", '{"a":' + "[" * SIZE),
        "wrong answers": field("answers", "[" + "1," * (SIZE // 2) + "1]"),
        "wrong versions": field("versions", "{" + ",".join(f'"{i}":1' for i in range(SIZE // 12)) + "}"),
    }[name]


FLOODS = [
    "brackets", "braces", "attacks", "few attacks", "runs", "few runs", "few checks", "unknown keys", "digits",
    "deep identity", "wrong answers", "wrong versions",
]  # fmt: skip


@pytest.mark.parametrize("name", FLOODS)
def test_json_costs_in_proportion(tmp_path, example, name):
    content = flood_json(name, example)
    for file in ("result.json", "run.json"):
        for reader in READERS[file]:
            refused_cheaply(reader, tmp_path / file, content)


@pytest.mark.parametrize("content", ["[]", "1", "null", '"x"', "true"])
def test_json_that_is_no_object_is_refused(tmp_path, content):
    for reader in READERS["result.json"][:4]:
        assert "expected: a JSON object" in refused_cheaply(reader, tmp_path / "result.json", content)


@pytest.mark.parametrize(
    ("inner", "message"),
    [("9" * 30, "an integer of 100 bits"), ("[[]" + ",[]" * 10_000 + "]", "more than 10,000 lists")],
)
def test_json_of_sizes_that_no_computation_takes_is_refused(tmp_path, example, inner, message):
    content = json.dumps({**example, "identity": None}).replace('"identity": null', f'"identity": {{"a": {inner}}}')
    assert message in refused_cheaply(read_description, tmp_path / "run.json", content)


@pytest.mark.parametrize(
    "content", ["[" * SIZE, "[]", "1", '{"run_ids": [[]], "n": 1}', '{"run_ids": [], "n": []}', "\xff"]
)
def test_a_damaged_table_of_seeds_is_set_aside(tmp_path, content):
    refused_cheaply(READERS["spread.json"][0], tmp_path / "spread.json", content)
    assert [path.name for path in tmp_path.iterdir()] == ["spread.json.damaged"]


CSV = {
    "columns": ",".join(f"c{i}" for i in range(120_000)) + "\n" + "1" + "," * 119_999 + "\n",
    "columns and rows": "run_id,n" + "," * 400_000 + "\n" + "1,\n" * 180_000,
    "rows": "run_id,n\n" + "\n" * 900_000,
    "digits": "run_id,n\na," + "9" * SIZE,
    "long field": "run_id,n\n" + "a" * SIZE + ",1",
    "quote": 'run_id,n\n"' + "abc,1\n" * (SIZE // 6),
    "bytes": b"\xff\x00",
    "nothing": "",
    "other columns": "a,b\n1,2",
}


@pytest.mark.parametrize("name", CSV)
def test_a_hostile_sweep_is_refused(tmp_path, name):
    assert "is no sweep" in refused_cheaply(_read_points, tmp_path / "points.csv", CSV[name])


@pytest.mark.parametrize(
    "content",
    ["[" * SIZE, "1", "{}", '{"iteration": 1, "loss": "x"}', '{"iteration": 1, "loss": 1, "clean": 1}', b"\xff", "{"],
)
def test_a_damaged_log_draws_no_curve(tmp_path, content):
    said = refused_cheaply(READERS["log.jsonl"][0], tmp_path / "log.jsonl", content)
    assert "cannot be read" in said


def test_a_line_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "log").write_text('{"a": 1}\n[1]\n')
    with pytest.raises(ValueError, match="not an object"):
        read_json_lines(tmp_path / "log", 100)


def test_text_is_appended_to_regular_files_only(tmp_path):
    append_text(tmp_path / "a/log", "1\n")
    append_text(tmp_path / "a/log", "2\n")
    assert (tmp_path / "a/log").read_text() == "1\n2\n"
    (tmp_path / "link").symlink_to(tmp_path / "a/log")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    os.mkfifo(tmp_path / "unread")
    for name in ("link", "pipe", "unread", "a"):
        with pytest.raises(StorageError, match="cannot be written"):
            append_text(tmp_path / name, "3\n")
    os.close(reader)
    assert (tmp_path / "a/log").read_text() == "1\n2\n"


@pytest.mark.parametrize("totals", [[2**23], [2**22, 2**22 - 1], [2**19 + i for i in range(20)]])
def test_random_orders_cost_in_proportion(repo, tmp_path, totals):
    """One that claims a vast test set is refused before it is drawn, and equal orders are drawn once."""
    entry = json.loads((repo / "baselines/digits.json").read_text())["runs"][0]
    firsts = {total: str(draw_order(total, 5)[0]) for total in {min(t, 2**22) for t in (*totals, 2**21, 2**19)}}

    def write(path, totals):
        runs = []
        for i, total in enumerate(totals):
            identity = {**entry["identity"], "sample_seed": 5, "dataset": "custom", "data": "x"}
            whole = make_accuracy(1, 1).model_dump()
            runs.append(entry | {
                "n": 1, "selection": f"1 of {total} drawn with sample seed 5", "sample_seed": 5, "identity": identity,
                "dataset": "custom", "model": f"m{i}", "run_id": digest(identity), "clean_accuracy": whole,
                "robust_accuracy": whole, "verdicts": dict.fromkeys(entry["attacks"], "r"),
                "samples": firsts[min(total, 2**22)],
            })  # fmt: skip
        path.write_text(json.dumps({"schema_version": 1, "runs": runs}))
        return path.read_bytes()

    path = tmp_path / "baseline.json"
    assert "allowed in one file: 4,194,304 images" in refused_cheaply(read_baseline, path, write(path, totals))
    assert refused_cheaply(read_baseline, path, write(path, [2**21, 2**19] * 40)) == "taken"


def frame(n):
    values = {name: np.zeros(n, kind) for name, kind in COLUMNS.items() if kind != "str"}
    return pd.DataFrame({**values, "attack": ["a"] * n, "status": ["robust"] * n}).astype(COLUMNS)[list(COLUMNS)]


def table(n=200_000, options=None, **columns):
    out = io.BytesIO()
    made = {name: pa.array(values) for name, values in frame(n).items()} | columns
    pq.write_table(pa.table(made), out, store_schema=False, **(options or {}))
    return out.getvalue()


def zstd(n, options=None, **columns):
    return table(n, {"compression": "zstd"} | (options or {}), **columns)


def with_footer(content, change):
    """Return a Parquet file with a changed footer."""
    begin = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    footer = change(content[begin:-8])
    return content[:begin] + footer + struct.pack("<I", len(footer)) + b"PAR1"


def hide_codecs(footer):
    """Give the field `codec`, of number 4, the number 65540. A parser that keeps 16 bits of it still reads 4."""
    for codec in (b"\x04", b"\x0c"):  # GZIP and ZSTD
        footer = footer.replace(b"\x15" + codec + b"\x16", b"\x05\x88\x80\x08" + codec + b"\x16")
    return footer


def understate(content):
    """Let the header of a page say that its 100,000,010 bytes are 4,000. Both numbers take four bytes."""
    assert content.count(b"\x15\x94\x84\xaf\x5f") == 1
    return content.replace(b"\x15\x94\x84\xaf\x5f", b"\x15\xc0\xbe\x80\x00")


def repeated(text, n=200_000):
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([text]))


PARQUET = {
    "rows": (lambda: pack_rows(frame(5_000_000), "ab" * 32), "claims 5,000,000 rows"),
    "a repeated text": (lambda: table(attack=repeated(os.urandom(150_000).hex())), "60,000,000,000 bytes of text"),
    "a short repeated text": (lambda: table(attack=repeated("x" * 5000)), "1,000,000,000 bytes of text"),
    "two repeated texts": (
        lambda: table(attack=repeated("x" * 80), status=repeated("y" * 80)), "32,000,000 bytes of text",
    ),
    "zstd": (lambda: zstd(1, {"use_dictionary": False}, attack=pa.array(["x" * 10**8])), "its pages claim 100,000,"),
    "an understated zstd": (
        lambda: understate(zstd(1, {"use_dictionary": False}, attack=pa.array(["x" * 10**8]))), "decompression failed",
    ),
    "a dictionary in zstd": (lambda: zstd(1, attack=pa.array(["x" * 10**8])), "its pages claim 100,000,"),
    "parts in zstd": (
        lambda: zstd(20, {"row_group_size": 1}, attack=pa.array(["x" * (5 * 10**6 + i) for i in range(20)])),
        "its pages claim 100,0",
    ),
    "pages in zstd": (lambda: zstd(900, {"data_page_size": 1, "write_batch_size": 1}), "it has more than 4"),
    "a hidden gzip": (
        lambda: with_footer(table(1, {"compression": "gzip"}, attack=pa.array(["x" * 10**8])), hide_codecs),
        "field of number 65540",
    ),
    "a hidden zstd": (
        lambda: with_footer(zstd(1, attack=pa.array(["x" * 10**8])), hide_codecs), "field of number 65540",
    ),
    "gzip": (lambda: table(1, {"compression": "gzip"}, attack=pa.array(["x" * 10**8])), "codec GZIP given"),
    "delta": (
        lambda: table(
            500, {"use_dictionary": False, "column_encoding": {"attack": "DELTA_BYTE_ARRAY"}},
            attack=pa.array(["x" * i for i in range(0, 500_000, 1000)]),
        ),
        "DELTA_BYTE_ARRAY given",
    ),
    "columns": (lambda: table(1, None, **{f"c{i}": pa.array([1]) for i in range(1000)}), "claims 1,014 columns"),
    "lists": (lambda: table(2, None, sample=pa.array([[1], [2]])), "expected numbers, booleans or text"),
}  # fmt: skip


@pytest.mark.parametrize("name", PARQUET)
def test_parquet_costs_in_proportion(tmp_path, name):
    make, message = PARQUET[name]
    content = make()
    for file, reader in (("outcomes.parquet", read_rows), ("classes.parquet", lambda p: read_linearization(p.parent))):
        assert message in refused_cheaply(reader, tmp_path / file, content)


def test_records_of_many_images_are_read(tmp_path):
    rows = frame(1_000_000).assign(attack="a-long-name-of-an-attack")
    (tmp_path / "outcomes.parquet").write_bytes(pack_rows(rows, "ab" * 32))
    assert len(read_rows(tmp_path / "outcomes.parquet")) == 1_000_000


def test_images_in_parquet_cost_in_proportion(tmp_path):
    (tmp_path / "cifar10").mkdir()
    place = tmp_path / "cifar10/test-00000-of-00001.parquet"

    def write(n, encoded):
        images = pa.StructArray.from_arrays([repeated(encoded, n).cast(pa.binary())], ["bytes"])
        pq.write_table(pa.table({"img": images, "label": np.zeros(n, np.int64)}), place)
        return place.read_bytes()

    def load(path):
        data.load("cifar10", "test", tmp_path)

    assert "an image of more than 65,536 bytes" in refused_cheaply(load, place, write(500, "x" * 500_000))
    assert "10,001 rows; the split has 10,000" in refused_cheaply(load, place, write(10_001, "x"))


def test_archives_cost_in_proportion(tmp_path):
    (tmp_path / "cifar100").mkdir()
    place = tmp_path / "cifar100/cifar-100-python.tar.gz"

    def packed(name, content, times=1):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w|") as archive:
            for _ in range(times):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        return gzip.compress(out.getvalue(), 9)

    def load(path):
        data.load("cifar100", "test", tmp_path)

    steps = packed("cifar-100-python/test", b"\x80\x02" + b"N0" * 2_000_000 + b"N.")
    assert "more than 1,000,000 steps" in refused_cheaply(load, place, steps)
    assert "unpacks to more than 268,435,456 bytes" in refused_cheaply(load, place, packed("other", bytes(10**7), 28))


PICKLES = {
    "nothing": b"\x80\x02" + b"N0" * (SIZE // 2) + b"N.",
    "lists": b"\x80\x02" + b"]" * SIZE + b".",
    "marks": b"\x80\x02" + b"(" * SIZE + b".",
    "bytes": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "memo": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "safetensors": struct.pack("<Q", SIZE) + b'{"a":' * (SIZE // 5),
    "tensor": struct.pack("<Q", 63) + b'{"t":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("name", PICKLES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_cost_in_proportion(tmp_path, name, suffix):
    said = refused_cheaply(lambda path: parse_state(path.read_bytes(), suffix), tmp_path / "x", PICKLES[name])
    if (name, suffix) in (("nothing", ".pt"), ("lists", ".pt")):
        assert "more than 200,000 steps" in said


def test_archives_of_weights_cost_in_proportion(tmp_path):
    def pack(content, times=1):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.filelist *= times  # members that share their bytes
        return out.getvalue()

    def read_state(path):
        parse_state(path.read_bytes(), ".pt")

    assert "more than 200,000 steps" in refused_cheaply(read_state, tmp_path / "x", pack(PICKLES["nothing"]))
    assert "unpacks to 2,700,000;" in refused_cheaply(read_state, tmp_path / "x", pack(bytes(900_000), 3))


def test_a_file_that_is_too_large_is_not_opened(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(2**40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OSError, match="larger than 10 bytes"), open_regular(path, 10):
        pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16


def test_a_file_that_grows_while_it_is_read_is_too_large():
    path = Path("/proc/self/maps")  # a regular file of size 0 that has content
    if not path.is_file():
        pytest.skip("this system has no file of size 0 with content")
    with pytest.raises(OSError, match="larger than 10 bytes"):
        read_bounded(path, 10)


def test_a_limit_of_size_costs_no_memory(tmp_path):
    """A system that promises no more memory than it has would refuse what a limit of 16 GiB asks for."""
    (tmp_path / "a").write_bytes(b"abc")
    with bounded_memory(2**26):
        assert read_bounded(tmp_path / "a", 2**40) == b"abc"


def test_a_footer_tells_what_pyarrow_tells(tmp_path):
    path = tmp_path / "t.parquet"
    table = pa.table({"a": range(100), "b": ["x", None] * 50, "c": [1.5] * 100, "d": [True] * 100, "e": [[1, 2]] * 100})
    for codec in ("none", "snappy", "gzip", "zstd"):
        pq.write_table(table, path, compression=codec, row_group_size=30, write_page_index=True)
        about = pq.read_metadata(path)
        chunks = [about.row_group(g).column(c) for g in range(4) for c in range(5)]
        with path.open("rb") as stream:
            found = read_chunks(stream)
        assert found.codecs == {chunk.compression for chunk in chunks}
        assert found.encodings == set().union(*(chunk.encodings for chunk in chunks))
        assert found.size == sum(chunk.total_compressed_size for chunk in chunks)
        places = [(c.dictionary_page_offset or c.data_page_offset, c.total_compressed_size) for c in chunks]
        assert found.zstd == (places if codec == "zstd" else [])
        with path.open("rb") as stream:
            unpacked = read_pages(stream, places, 2 * len(places))
        with_headers = sum(chunk.total_uncompressed_size for chunk in chunks)
        assert with_headers - 200 * len(places) < unpacked < with_headers


@pytest.mark.parametrize("value", [0x22, 0xFF, 0x00])
def test_no_footer_ends_the_process(tmp_path, value):
    """PyArrow calls std::terminate when it is asked for a codec that it does not know. Codec 17 is stored as 0x22."""
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"a": [1, 2], "b": ["x", "y"]}), path, compression="snappy", store_schema=False)
    data = path.read_bytes()
    for at in range(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data)):
        path.write_bytes(data[:at] + bytes([value]) + data[at + 1 :])
        with contextlib.suppress(OSError, ValueError, pa.ArrowException):
            read_flat_table(path, 10_000)


def png(side, mode="L"):
    out = io.BytesIO()
    Image.new(mode, (side, side)).save(out, "PNG")
    return out.getvalue()


def packed_images(image, n, label=None, options=None):
    out = io.BytesIO()
    images = pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([image]))
    labels = np.zeros(n, np.int64) if label is None else repeated(label, n)
    pq.write_table(pa.table({"image": images, "label": labels}), out, store_schema=False, **(options or {}))
    return out.getvalue()


OWN = {
    "rows of one image": ("x.parquet", lambda: packed_images(png(8), 450_000), "450,000 images in"),
    "a large image": ("x.parquet", lambda: packed_images(os.urandom(400_000), 10_000), "out of proportion to the file"),
    "an empty image": ("x.parquet", lambda: packed_images(png(4096, "1"), 5000), "allowed in so small a file"),
    "a long label": ("x.parquet", lambda: packed_images(png(8), 9000, "x" * 50_000), "bytes of text"),
    "rows of one path": ("x.csv", lambda: "path,label\n" + "a.png,0\n" * 120_000, "one path stands in 120,000 rows"),
    "a large image in zstd": (
        "x.parquet", lambda: packed_images(bytes(10**8), 1, None, {"compression": "zstd"}), "its pages claim 100,000,",
    ),
    "many paths in Parquet": ("x.parquet", lambda: packed_images("a.png", 2_000_000), "one path stands in 2,000,000"),
    "a path in Parquet": ("x.parquet", lambda: packed_images("a.png", 400_000), "one path stands in 400,000 rows"),
    "missing files": (
        "x.csv", lambda: "path,label\n" + "".join(f"{i},0\n" for i in range(120_000)), "None of the first 1,000 images",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN)
def test_own_images_cost_in_proportion(tmp_path, name):
    file, make, message = OWN[name]
    (tmp_path / "a.png").write_bytes(png(8))
    said = refused_cheaply(lambda path: open_images(path, on_broken="skip"), tmp_path / file, make())
    assert message in said


def test_images_in_zstd_are_read(tmp_path):
    (tmp_path / "x.parquet").write_bytes(packed_images(png(8), 50, options={"compression": "zstd"}))
    found = open_images(tmp_path / "x.parquet")
    assert found.read(np.arange(50)).shape[0] == len(found.y) == 50


def test_a_result_names_a_bounded_number_of_broken_images(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(8))
    (tmp_path / "x.csv").write_text("path,label\na.png,0\n" + "".join(f"{i},0\n" for i in range(5)))
    monkeypatch.setattr(encoded, "_MOST_BROKEN", 5)
    assert len(open_images(tmp_path / "x.csv", on_broken="skip").about["skipped"]) == 5
    monkeypatch.setattr(encoded, "_MOST_BROKEN", 4)
    with pytest.raises(RobbenchError, match="More than 4 images are broken"):
        open_images(tmp_path / "x.csv", on_broken="skip")


def test_row_groups_are_read_with_one_look_at_the_footer(tmp_path):
    table = pa.table({"image": pa.array([png(8)] * 2500), "label": np.zeros(2500, np.int64)})
    pq.write_table(table, tmp_path / "x", row_group_size=1, store_schema=False, write_statistics=False)
    content = (tmp_path / "x").read_bytes()
    assert refused_cheaply(lambda path: open_images(path, on_broken="skip"), tmp_path / "x.parquet", content) == "taken"


def archive_of(**members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in members.items():
            packed.writestr(f"{name}.npy", content)
    return out.getvalue()


def array_of(values):
    out = io.BytesIO()
    np.save(out, values, allow_pickle=True)
    return out.getvalue()


def claiming(shape, kind="|u1"):
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": kind, "fortran_order": False, "shape": shape})
    return out.getvalue()


Y = array_of(np.zeros(2, np.int64))
NPZ = {
    "a bomb": (lambda: archive_of(x=bytes(2 * 10**8), y=Y), "unpacks to 200,000"),
    "another member": (lambda: archive_of(x=Y, y=Y, z=bytes(2 * 10**8)), "unpacks to 200,000"),
    "a huge shape": (lambda: archive_of(x=claiming((2**40,)), y=Y), "claims 1,099,511,627,776 bytes"),
    "a negative shape": (lambda: archive_of(x=claiming((-1, 5)) + bytes(5), y=Y), "claims -5 bytes"),
    "objects": (lambda: archive_of(x=array_of(np.array([{}, []], object)), y=Y), "holds objects"),
    "no array": (lambda: archive_of(x=b"abc", y=Y), "not an .npz file"),
    "a long header": (lambda: archive_of(x=b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b"(" * 10**6, y=Y), "not an .npz"),
}


@pytest.mark.parametrize("name", NPZ)
def test_arrays_cost_in_proportion(tmp_path, name):
    make, message = NPZ[name]
    assert message in refused_cheaply(open_images, tmp_path / "x.npz", make())


def test_arrays_in_a_pipe_are_named_as_such(tmp_path):
    os.mkfifo(tmp_path / "x.npz")
    with ended_at_last(tmp_path / "x.npz"), pytest.raises(RobbenchError, match="not a regular file"):
        open_images(tmp_path / "x.npz")


def test_names_of_classes_cost_in_proportion(tmp_path):
    names = "\n".join(str(i) for i in range(140_000))
    assert "140,000 classes given" in refused_cheaply(read_mapping, tmp_path / "c.txt", names)
    names = "\n".join(str(i) for i in range(90_000)) + "\n7"
    assert "names 8 and 90001 are equal" in refused_cheaply(read_mapping, tmp_path / "c.txt", names)
    twice = '{"a": 0, "b": 1, "a": 2}'
    assert "an object holds a key twice" in refused_cheaply(read_mapping, tmp_path / "c.json", twice)


@pytest.mark.parametrize("name", ["result.json", "run.json", "log.jsonl"])
def test_a_repeated_key_is_refused(tmp_path, name, example):
    twice = json.dumps(example)[:-1] + ', "n": 1, "n": 2}'
    for reader in READERS[name]:
        said = refused_cheaply(reader, tmp_path / name, twice)
        assert "holds a key twice" in said or said == "taken"
    with pytest.raises(RobbenchError, match="holds a key twice"):
        read_result(tmp_path / name)


def test_the_package_parses_json_with_one_function(repo):
    """`parse_json` refuses repeated keys. What the package itself has just written may be parsed without it."""
    allowed = {"core/files.py": 1, "results/store.py": 1}
    root = repo / "benchmark/robbench"
    found = {}
    for path in root.rglob("*.py"):
        text = path.read_text()
        if times := text.count("json.loads(") + text.count("json.load(") + text.count("from_json("):
            found[path.relative_to(root).as_posix()] = times
    assert found == allowed


def test_a_repeated_column_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("path,label,label\na,0,1\n")
    with pytest.raises(RobbenchError, match="have one name"):
        open_images(tmp_path / "x.csv")
    for columns in (["image", "label", "label"], ["image", "image", "label"]):
        table = pa.Table.from_arrays([pa.array([0])] * 3, columns)
        pq.write_table(table, tmp_path / "x.parquet", store_schema=False)
        with pytest.raises(RobbenchError, match="columns have one name"):
            open_images(tmp_path / "x.parquet")


@pytest.mark.parametrize("given", [{"resize": -1}, {"resize": 0}, {"crop": -3}, {"crop": 2**40}, {"channels": 7},
                                   {"channels": True}, {"resize": 2.5}, {"crop": "8"}])  # fmt: skip
def test_preparations_that_mean_nothing_are_refused(tmp_path, given):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.png").write_bytes(png(8))
    with pytest.raises(RobbenchError, match=f"^{next(iter(given))}: .* given; allowed"):
        open_images(tmp_path, **given)


def test_names_that_are_not_unicode_are_broken_images(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.png").write_bytes(png(8))
    (tmp_path / os.fsdecode(b"a/\xff.png")).write_bytes(png(8))
    with pytest.raises(RobbenchError, match="its name is not UTF-8"):
        open_images(tmp_path)
    found = open_images(tmp_path, on_broken="skip")
    assert len(found.y) == 1 and "its name is not UTF-8" in found.flags["skipped_images"]
    json.dumps([found.about, dict(found.flags)], ensure_ascii=False).encode()


@pytest.mark.parametrize("where", ["folder", "list", "object", "argument"])
def test_classes_that_are_not_unicode_are_refused(tmp_path, where):
    (tmp_path / "d/a").mkdir(parents=True)
    (tmp_path / "d/a/x.png").write_bytes(png(8))
    classes = None
    if where == "folder":
        (tmp_path / os.fsdecode(b"d/\xff")).mkdir()
        (tmp_path / os.fsdecode(b"d/\xff/x.png")).write_bytes(png(8))
    elif where == "argument":
        classes = {"a": 0, "\ud800": 1}
    else:
        classes = tmp_path / "c.json"
        classes.write_text(json.dumps(["a", "\ud800"] if where == "list" else {"a": 0, "\ud800": 1}))
    with pytest.raises(RobbenchError, match="is not UTF-8"):
        open_images(tmp_path / "d", classes=classes, on_broken="skip")


def test_no_message_repeats_a_file_that_names_classes(tmp_path):
    (tmp_path / "d/a").mkdir(parents=True)
    (tmp_path / "d/a/x.png").write_bytes(png(8))
    for content in ("canary\nb\n", "canary\ncanary\n", "b\ncanary\ncanary", '{"canary": -1}', '{"canary": "canary"}',
                    '["canary", 1', '"canary"', '["canary", "canary"]'):  # fmt: skip
        for name in ("c.txt", "c.json"):
            (tmp_path / name).write_text(content)
            with pytest.raises(RobbenchError) as error:
                open_images(tmp_path / "d", classes=tmp_path / name)
            assert "canary" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.csv", "canary,label\nx.png,0\n", "none of its 2 columns is one of images"),
        ("a.csv", "path,canary\nx.png,0\n", "none of its 2 columns is one of labels"),
        ("a.csv", "canary\n" * 9, "none of its 1 columns"),
        ("a.csv", "canary,canary\n", "have one name"),
        ("a.csv", "path,label\ncanary", "line 2 has 1 fields"),
        ("a.csv", "path,label\nx.png,canary\n", "the class of image 1 is not in the mapping"),
        ("a.csv", b"path,label\nx.png,canary\xff\n", "can't decode"),
        ("a.csv", 'path,label\n"canary' + "y" * 200_000, "field larger"),
        ("a.parquet", {"canary": ["x"], "label": [0]}, "none of its 2 columns is one of images"),
        ("a.parquet", {"path": ["x"], "canary": [0]}, "none of its 2 columns is one of labels"),
        ("a.parquet", {"path": ["x"], "label": ["canary"]}, "the class of image 1 is not in the mapping"),
        ("a.parquet", {"path": ["x"], "label": [None]}, "expected numbers"),
        ("a.parquet", {"path": ["x"], "label": [[{"canary": 1}]]}, "expected numbers"),
        ("a.npz", {"canary": np.zeros(3), "x": np.zeros(3)}, "2 arrays given; lacking: y"),
        ("a.npz", {"canary": np.array(["canary", {}], object), "x": np.zeros(3)}, "objects"),
        ("a.npz", b"canary", "not an .npz file"),
    ],
)
def test_no_message_repeats_a_table_that_a_baseline_may_name(tmp_path, name, content, reason):
    path = tmp_path / name
    if name.endswith(".parquet"):
        pq.write_table(pa.table(content), path)
    elif isinstance(content, dict):
        np.savez(path, **content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RobbenchError, match=reason) as error:
        open_images(path, classes=None if name.endswith(".npz") else {"a": 0})
    assert "canary" not in str(error.value)


def test_a_repeated_column_of_records_is_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array([0])] * 2, ["label", "label"])
    pq.write_table(table, tmp_path / "x.parquet", store_schema=False)
    with pytest.raises(ValueError, match="two columns have one name"):
        read_flat_table(tmp_path / "x.parquet", 10_000)
