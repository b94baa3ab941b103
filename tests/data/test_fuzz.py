"""Fuzzed files for every parser: only errors a user can mend, nothing touched outside, no code run from data.

ROBBENCH_FUZZ sets how many inputs each parser gets (10,000 in CI), ROBBENCH_FUZZ_SEED where they begin.
"""

from __future__ import annotations

import io
import os
import random
import struct
import tarfile
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from robbench.core.errors import ResultError, RobbenchError
from robbench.core.numbers import parse_radii, parse_threat
from robbench.data import sets as data
from robbench.models.architectures import build
from robbench.models.card import extract_identity, parse_card
from robbench.models.load import fit_state, parse_state
from robbench.models.load_source import _parse_architecture
from robbench.models.sources import parse_source
from robbench.results.adversarials import Points, list_entries, pack, read
from robbench.results.records import COLUMNS, pack_rows, read_rows, read_run_rows
from robbench.results.run_files import read_description
from robbench.results.schema import read_result
from robbench.suite import build_attack, load_suite
from support.cards import FULL
from support.datasets import batches, idx, labels, pixels
from support.fuzzing import Watch, bounded_memory, mutated_bytes, mutated_json, mutated_text

INPUTS = int(os.environ.get("ROBBENCH_FUZZ", "1000"))
SEED = int(os.environ.get("ROBBENCH_FUZZ_SEED", "0"))
RUN = "ab" * 32
WATCH = Watch()


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


def example(name: str, repo: Path) -> tuple[Callable[..., str | bytes], str | bytes, Callable[..., None]]:
    """Return how to change a valid input of a parser, the input, and the parser."""
    linear = build("linear", {}, 10, (1, 8, 8))
    some = Points.of(RUN, np.arange(3), np.array(["FGSM"] * 3), np.zeros((3, 1, 4, 4), np.float32))
    stored = (repo / "results/digits/at/whitebox/result.json").read_text()
    described = Path(__file__).with_name("run_example.json").read_text()
    one_batch = next(iter(batches("cifar10", pixels(2, 3, 32, 32), labels(2)).values()))
    suites = (repo / "benchmark/robbench/suites/whitebox.toml").read_text()
    spoken = "hf:a/b@c:d.safetensors\nfile:x.pt\nwide_resnet:depth=16,widen_factor=2\n0,2/255,8/255\nlinear:a=1\n1e-3"
    return {
        "card": (mutated_text, FULL.replace(', note = "x", rate = 0.5, flag = true', ""), card),
        "suite": (mutated_text, suites, suite),
        "arguments": (mutated_text, spoken, arguments),
        "result": (mutated_json, stored, result),
        "description": (mutated_json, described, description),
        "records": (mutated_bytes, pack_rows(rows(), RUN), records),
        "adversarials": (mutated_bytes, pack([some], RUN, ["FGSM"]), points),
        "safetensors": (mutated_bytes, safetensors.torch.save(linear.state_dict()), weights(".safetensors")),
        "pt": (mutated_bytes, saved(linear), weights(".pt")),
        "idx": (mutated_bytes, idx(pixels(3, 28, 28)), pictures),
        "pickle": (mutated_bytes, one_batch, pickles),
        "archive": (mutated_bytes, tarred("cifar100"), archives),
    }[name]


PARSERS = [
    "card", "suite", "arguments", "result", "description", "records", "adversarials", "safetensors", "pt", "idx",
    "pickle", "archive",
]  # fmt: skip


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
            try:
                parse(content, path)
            except RobbenchError as error:
                refused += 1
                assert str(error).strip(), f"input {i}: an error without a sentence"
            except Exception:
                pytest.fail(f"input {i} of {name}, seed {SEED}:\n{content[:3000]!r}\n{traceback.format_exc()}")
    assert refused > INPUTS / 5 or name == "arguments", "the mutations must be able to do harm"


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
