"""Fuzzed files for every parser: only errors a user can mend, nothing touched outside, no code run from data.

ROBBENCH_FUZZ sets how many inputs each parser gets (1,000; 3,000 in CI), ROBBENCH_FUZZ_SEED where they begin.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import platform
import random
import shutil
import struct
import tarfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from PIL import Image

from robbench.certify.record import ROWS, SUMMARY, read_certified
from robbench.core.errors import ResultError, RobbenchError
from robbench.core.numbers import parse_radii, parse_threat
from robbench.data import sets as data
from robbench.data.folder import list_images
from robbench.data.own import open_images
from robbench.gate.baseline import read_baseline
from robbench.gate.decision import Policy, decide_gate
from robbench.gate.paired import compare_entries
from robbench.linear.record import read_linear
from robbench.masking.record import read_sanity
from robbench.models.architectures import build
from robbench.models.card import extract_identity, parse_card
from robbench.models.load import fit_state, parse_state
from robbench.models.load_source import _parse_architecture
from robbench.models.sources import parse_source
from robbench.report.gate import format_markdown
from robbench.report.sanity import print_sanity
from robbench.report.sweep import build_sweep, print_sweep
from robbench.results.adversarials import FILE as POINTS
from robbench.results.adversarials import Points, list_entries, pack, read
from robbench.results.locking import _format_holder, _lock_paths, _read_holder
from robbench.results.records import COLUMNS, pack_rows, read_rows, read_run_rows
from robbench.results.run_files import read_description
from robbench.results.schema import read_result, seal
from robbench.suite import build_attack, load_suite
from support.cards import FULL
from support.datasets import batches, idx, labels, pixels
from support.fuzzing import Watch, bounded_memory, mutated_bytes, mutated_json, mutated_text

INPUTS = int(os.environ.get("ROBBENCH_FUZZ", "1000"))
SECONDS = 5.0  # of one input, in processor time; generous, because machines are slow and busy
SEED = int(os.environ.get("ROBBENCH_FUZZ_SEED", "0"))
RUN = "ab" * 32
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
WATCH = Watch()
(CERTIFICATES,) = (Path(__file__).resolve().parents[2] / "results/digits/at/certified").glob("bounds@*")


def rows() -> pd.DataFrame:
    n = 40
    values = {
        name: np.arange(n) if kind == "int64" else np.linspace(0, 1, n) if kind == "float64" else np.zeros(n, bool)
        for name, kind in COLUMNS.items()
    }
    return pd.DataFrame({**values, "attack": ["FGSM", "PGD"] * 20, "status": ["robust", "broken"] * 20}).astype(COLUMNS)


def card(text: str, path: Path) -> None:
    made = parse_card(text, "card.toml")
    extract_identity(made)
    made.model_dump(mode="json")
    if made.architecture.args.get("width", 0) in range(64):  # a wide network takes longer to build than to refuse
        build(made.architecture.name, made.architecture.args, 10, (1, 8, 8))


def suite(text: str, path: Path) -> None:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    made = load_suite(str(path))
    for dataset in ("digits", "mnist"):
        for stage in made.stages(dataset):
            build_attack(stage)


def result(text: str, path: Path) -> None:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    read_result(path)


def description(text: str, path: Path) -> None:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    read_description(path)


def holder(text: str, path: Path) -> None:
    root, folder = path.parent, path.parent / "digits/m/s"
    _, about = _lock_paths(root, folder)
    about.parent.mkdir(exist_ok=True)
    about.write_bytes(text.encode("utf-8", "surrogateescape"))
    found = _read_holder(about)
    _format_holder(found)
    if not found:
        raise ResultError("no holder")  # the reader answers None


def sweep(text: str, path: Path) -> None:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    changed = read_result(path)
    root = Path(__file__).resolve().parents[2] / "results"
    place = {"dataset": "digits", "model": "at", "suite": "whitebox", "overrides": {}}
    made = build_sweep(root, [changed.model_copy(update=place)], clean=True)
    made.as_json()
    print_sweep(made)


def sanity(text: str, path: Path) -> None:
    path.write_bytes(seal_again(text))
    print_sanity(read_sanity(path), "")


def linear_file(text: str, path: Path) -> None:
    if not (path.parent / "classes.parquet").exists():
        shutil.copy(Path(__file__).resolve().parents[2] / "results/digits/at/linear/classes.parquet", path.parent)
    (path.parent / "linear.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    read_linear(path.parent)


def seal_again(text: str) -> bytes:
    """Return the bytes of a file with its digest, or what is inside is never looked at."""
    with contextlib.suppress(ValueError, TypeError, RecursionError):
        return seal(json.loads(text))
    return text.encode("utf-8", "surrogateescape")


def certified(text: str, path: Path) -> None:
    (path.parent / SUMMARY).write_bytes(seal_again(text))
    if not (path.parent / ROWS).exists():
        (path.parent / ROWS).write_bytes((CERTIFICATES / ROWS).read_bytes())
        (path.parent / POINTS).write_bytes((CERTIFICATES / POINTS).read_bytes())
    read_certified(path.parent)


def baseline(text: str, path: Path) -> None:
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    for entry in read_baseline(path).runs:
        compared = compare_entries(entry, entry)
        format_markdown(decide_gate([compared], Policy()))


def records(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    read_rows(path)
    read_run_rows(path, RUN)


def points(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    list_entries(path)
    read(path)


def weights(suffix: str) -> Callable[[bytes, Path], None]:
    module = build("linear", {}, 10, (1, 8, 8))

    def parse(content: bytes, path: Path) -> None:
        fit_state(parse_state(content, suffix), module)

    return parse


def arguments(text: str, path: Path) -> None:
    for part in text.split("\n"):
        for parse in (parse_source, _parse_architecture):
            try:
                parse(part)
            except RobbenchError:
                continue
        for read_number in (parse_radii, lambda t: parse_threat("Linf", t)):
            try:
                read_number(part)
            except ValueError:  # the callers word it
                continue


def pictures(content: bytes, path: Path) -> None:
    (path.parent / "mnist").mkdir(exist_ok=True)
    (path.parent / "mnist" / "t10k-images-idx3-ubyte").write_bytes(content)
    (path.parent / "mnist" / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array(labels(3), np.uint8)))
    data.load("mnist", "test", path.parent)


def pickles(content: bytes, path: Path) -> None:
    folder = path.parent / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "test_batch").write_bytes(content)
    data.load("cifar10", "test", path.parent)


def archives(content: bytes, path: Path) -> None:
    (path.parent / "cifar100").mkdir(exist_ok=True)
    (path.parent / "cifar100" / "cifar-100-python.tar.gz").write_bytes(content)
    data.load("cifar100", "test", path.parent)


def own(suffix: str) -> Callable[[str | bytes, Path], None]:
    """Return a parser of images of the user's own, or of the classes of such images."""
    Image.init()  # Pillow imports the readers of formats when it meets an unknown file

    def parse(content: str | bytes, path: Path) -> None:
        (path.parent / "a").mkdir(exist_ok=True)
        (path.parent / "a/a.png").write_bytes(PNG)
        (path.parent / f"x{suffix}").write_bytes(
            content if isinstance(content, bytes) else content.encode("utf-8", "surrogateescape")
        )
        if suffix == ".json":
            list_images(path.parent, path.parent / "x.json")
        else:
            open_images(path.parent / f"x{suffix}", on_broken=None if suffix == ".npz" else "skip")

    return parse


def packed(table: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table(table), out, store_schema=False)
    return out.getvalue()


def zipped(**arrays: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.savez(out, **arrays)
    return out.getvalue()


def saved(module: torch.nn.Module) -> bytes:
    out = io.BytesIO()
    torch.save(module.state_dict(), out)
    return out.getvalue()


def tarred(name: str) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz", compresslevel=1) as archive:
        for member, content in batches("cifar100", pixels(2, 3, 32, 32), labels(2)).items():
            info = tarfile.TarInfo(f"cifar-100-python/{member}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def remove_digest(path: Path) -> str:
    """Return the text of a stored file as older versions wrote it: what is inside is read although it was changed."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    fields.pop("sha256", None)
    return json.dumps(fields, indent=1)


def example(name: str, repo: Path) -> tuple[Callable[..., str | bytes], str | bytes, Callable[..., None]]:
    """Return how to change a valid input of a parser, the input, and the parser."""
    linear = build("linear", {}, 10, (1, 8, 8))
    some = Points.of(RUN, np.arange(3), np.array(["FGSM"] * 3), np.zeros((3, 1, 4, 4), np.float32))
    stored = remove_digest(repo / "results/digits/at/whitebox/result.json")
    described = Path(__file__).with_name("run_example.json").read_text()
    one_batch = next(iter(batches("cifar10", pixels(2, 3, 32, 32), labels(2)).values()))
    digits = repo / "results/digits/at"
    held = json.dumps({"pid": 2**22 + 1, "host": platform.node(), "since": "2026-01-01", "folder": "x"})
    runs = json.loads((repo / "baselines/digits.json").read_text())["runs"]
    suites = (repo / "benchmark/robbench/suites/whitebox.toml").read_text()
    spoken = "hf:a/b@c:d.safetensors\nfile:x.pt\nwide_resnet:depth=16,widen_factor=2\n0,2/255,8/255\nlinear:a=1\n1e-3"
    return {
        "card": (mutated_text, FULL.replace(', note = "x", rate = 0.5, flag = true', ""), card),
        "suite": (mutated_text, suites, suite),
        "arguments": (mutated_text, spoken, arguments),
        "result": (mutated_json, stored, result),
        "description": (mutated_json, described, description),
        "holder": (mutated_json, held, holder),
        "sweep": (mutated_json, stored, sweep),
        "sanity": (mutated_json, remove_digest(digits / "sanity/sanity.json"), sanity),
        "linear": (mutated_json, remove_digest(digits / "linear/linear.json"), linear_file),
        "certified": (mutated_json, remove_digest(CERTIFICATES / SUMMARY), certified),
        "baseline": (mutated_json, json.dumps({"schema_version": 1, "runs": runs[:1]}), baseline),
        "records": (mutated_bytes, pack_rows(rows(), RUN), records),
        "adversarials": (mutated_bytes, pack([some], RUN, ["FGSM"]), points),
        "safetensors": (mutated_bytes, safetensors.torch.save(linear.state_dict()), weights(".safetensors")),
        "pt": (mutated_bytes, saved(linear), weights(".pt")),
        "idx": (mutated_bytes, idx(pixels(3, 28, 28)), pictures),
        "pickle": (mutated_bytes, one_batch, pickles),
        "archive": (mutated_bytes, tarred("cifar100"), archives),
        "table": (mutated_text, "path,label\n" + "a/a.png,0\n" * 20, own(".csv")),
        "images": (mutated_bytes, packed({"image": [PNG] * 4, "label": [0, 1, 2, 3]}), own(".parquet")),
        "arrays": (mutated_bytes, zipped(x=np.zeros((4, 1, 8, 8), np.uint8), y=np.arange(4)), own(".npz")),
        "classes": (mutated_json, json.dumps({"a": 0, "b": 1, "c": 2}), own(".json")),
    }[name]


PARSERS = [
    "card", "suite", "arguments", "result", "description", "holder", "sweep", "sanity", "linear",
    "certified", "baseline", "records", "adversarials", "safetensors", "pt", "idx", "pickle", "archive",
    "table", "images", "arrays", "classes",
]  # fmt: skip
MOSTLY_READ = ("arguments", "holder", "baseline", "table", "arrays")  # most changes leave something readable


@pytest.mark.whole
@pytest.mark.filterwarnings("ignore")  # what a library warns of in a damaged file is its own affair
@pytest.mark.parametrize("name", PARSERS)
def test_damaged_inputs_raise_only_errors_that_a_user_can_mend(name: str, tmp_path: Path, repo: Path) -> None:
    mutate, valid, parse = example(name, repo)
    path = tmp_path / "s.toml"
    parse(valid, path)  # what is imported lazily is imported, and the example is one
    refused = 0
    with bounded_memory(2**31), WATCH.over(tmp_path):
        for i in range(INPUTS):
            content = mutate(random.Random(f"{name} {SEED} {i}"), valid)
            begin = time.process_time()
            try:
                parse(content, path)
            except RobbenchError as error:
                refused += 1
                assert str(error).strip(), f"input {i}: an error without a sentence"
            except Exception:
                pytest.fail(f"input {i} of {name}, seed {SEED}:\n{content[:3000]!r}\n{traceback.format_exc()}")
            assert time.process_time() - begin < SECONDS, f"input {i} of {name}, seed {SEED}, takes too long"
    assert refused > INPUTS / 5 or name in MOSTLY_READ, "the mutations must be able to do harm"


def test_the_watch_sees_what_is_forbidden(tmp_path: Path) -> None:
    for forbidden in (
        lambda: os.system("true"),
        lambda: (tmp_path.parent / "outside").write_text("x"),
        lambda: Path("/etc/hostname").read_bytes(),
        lambda: exec("1"),
    ):
        with pytest.raises(AssertionError), WATCH.over(tmp_path):
            forbidden()
    with WATCH.over(tmp_path):
        (tmp_path / "inside").write_text("x")


def test_a_header_that_claims_more_than_there_is() -> None:
    with pytest.raises(RobbenchError, match="not a readable state dict"):
        parse_state(struct.pack("<Q", 2**60) + b"{}", ".safetensors")
    with pytest.raises(ResultError):
        read_run_rows(Path("/nowhere"), RUN)


MILLION = 10**6
LARGE = {
    "keys": "".join(f"k{i} = 1\n" for i in range(80_000)),
    "a dotted key": "a." * (MILLION // 2 - 10) + "a = 1",
    "a dotted heading": "[" + '"a" . ' * (MILLION // 6 - 10) + "a]",
    "a deep list": "a = " + "[" * (MILLION // 2),
    "attacks": "version = 1\n" + "".join(f"[[attack]]\nname='a{i}'\nkind='pgd'\n" for i in range(25_000)),
    "data sets": "version = 1\n" + "".join(f"[[attack]]\nname='a{i}'\nkind='b'\non.d{i}={{}}\n" for i in range(3000)),
    "a long text": "title = '" + "A" * (MILLION - 50) + "'",
    "a long number": "a = " + "9" * (MILLION - 10),
    "numbers": "a = [" + "1," * (MILLION // 2 - 10) + "]",
}
LARGE_JSON = {
    "keys": json.dumps({f"k{i}": 1 for i in range(80_000)}),
    "a deep list": "[" * MILLION,
    "objects": '{"attacks": [' + ",".join(["{}"] * 300_000) + "]}",
    "numbers": '{"attacks": [' + ",".join(["1"] * 490_000) + "]}",
    "table of objects": '{"flags": {' + ",".join(f'"{i}": []' for i in range(80_000)) + "}}",
    "a long text": '{"model": "' + "A" * (MILLION - 30) + '"}',
    "a long number": '{"n": ' + "9" * (MILLION - 10) + "}",
}


@pytest.mark.parametrize(
    "parser", ["card", "suite", "result", "sanity", "linear", "certified", "baseline", "description"]
)
def test_no_file_of_a_megabyte_takes_long(parser: str, tmp_path: Path) -> None:
    parse = {
        "card": card, "suite": suite, "result": result, "sanity": sanity, "linear": linear_file,
        "certified": certified, "baseline": baseline, "description": description,
    }[parser]  # fmt: skip
    with bounded_memory(2**31):
        for what, text in (LARGE if parser in ("card", "suite") else LARGE_JSON).items():
            begin = time.process_time()
            try:
                parse(text, tmp_path / "s.toml")
            except RobbenchError as error:
                assert len(str(error)) < 30_000, what
            assert time.process_time() - begin < SECONDS, what


def test_records_that_unpack_to_more_than_their_size(tmp_path: Path) -> None:
    many = pa.table({"sample": pa.array(np.zeros(5_000_000, np.int64))})
    long = pa.table({"attack": pa.array(["x" * 100_000] * 10_000).dictionary_encode()})
    wide = pa.table({f"c{i}": [0] for i in range(1000)})
    for table, reason in (
        (many, "5,000,000 rows"),
        (long, "bytes of text"),
        (wide, "claims 1,000 columns"),
    ):
        pq.write_table(table, tmp_path / "r.parquet")
        assert (tmp_path / "r.parquet").stat().st_size < MILLION
        with bounded_memory(2**31), pytest.raises(ResultError, match=reason):
            read_rows(tmp_path / "r.parquet")
