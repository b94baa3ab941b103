"""Families of small trainings: they resume, they are stored with a digest, and a changed declaration trains again."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from robbench.analysis.study import StudyOptions, train_study
from robbench.analysis.study_record import read_studies, read_study, write_study
from robbench.analysis.study_spec import StudySpec, load_studies
from robbench.commands.app import app
from robbench.core.errors import ModelError, ResultError, StorageError
from robbench.data.sets import describe_datasets
from robbench.results.schema import seal

PAIR = {"classes": [5, 7], "eps": "0.2", "strong": 0.5, "draws": 2, "most": 50, "iterations": 3}
NETWORKS = {
    "architecture": {"name": "linear"},
    "recipe": {"iterations": 2, "batch_size": 5, "optimizer": "adam", "lr": 0.01},
    "steps": 1,
    "seeds": 2,
    "groups": [{"norm": norm, "eps": ["0", "0.1"], "sizes": [5, 20]} for norm in ("Linf", "L2")],
}


def make_spec(**networks):
    return StudySpec.model_validate({"dataset": "digits", "pair": PAIR, "networks": NETWORKS | networks})


def run(folder, spec, **options):
    options = {"results": folder / "results", "runs": folder / "runs"} | options
    return train_study("small-digits", spec, StudyOptions(**options))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    run(folder, make_spec())
    return folder


def test_an_interrupted_study_ends_with_the_numbers_of_an_uninterrupted_one(whole, tmp_path):
    calls = 0
    while len(run(tmp_path, make_spec(), time_limit=1e-9)) < 2:  # each call trains one network
        calls += 1
        assert len((tmp_path / "runs/studies/small-digits.jsonl").read_text().splitlines()) == calls
    assert calls == 12 - 1  # per seed and size: one without an adversary, and one for each norm
    for part in ("pair", "networks"):
        first, second = (read_study(f / f"results/digits/small-{part}/study")[1] for f in (whole, tmp_path))
        assert first.equals(second)
    rows = read_study(whole / "results/digits/small-networks/study")[1]
    assert len(rows) == 16  # those without an adversary stand for both norms
    assert rows[rows["eps"] == 0].groupby(["at", "draw"])["value"].nunique().eq(1).all()


def test_another_seed_trains_only_the_new_networks_and_another_recipe_all(whole, tmp_path):
    lines = (whole / "runs/studies/small-digits.jsonl").read_text()
    (tmp_path / "runs/studies").mkdir(parents=True)
    (tmp_path / "runs/studies/small-digits.jsonl").write_text(lines)
    notes = []
    run(tmp_path, make_spec(seeds=3), note=notes.append)
    assert [note for note in notes if "images, seed" in note] == [note for note in notes if "seed 2:" in note]
    other = make_spec(recipe=NETWORKS["recipe"] | {"lr": 0.02})
    with pytest.raises(ResultError, match=r"(?s)spec.*--restart"):
        run(tmp_path, other)
    for results, restart in (("results", True), ("elsewhere", False)):
        notes.clear()
        lines = tmp_path / "runs/studies/small-digits.jsonl"
        run(tmp_path, other, restart=restart, results=tmp_path / results, note=notes.append)
        assert sum("images, seed" in note for note in notes) == (12 if restart else 0)
    notes.clear()
    lines.write_text((whole / "runs/studies/small-digits.jsonl").read_text())  # of the first recipe
    run(tmp_path, other, results=tmp_path / "third", note=notes.append)
    assert sum("images, seed" in note for note in notes) == 12


def test_a_stored_study_is_not_trained_again(whole):
    notes = []
    run(whole, make_spec(), note=notes.append)
    assert [note.partition(": ")[2][:11] for note in notes] == ["known since"] * 2


def test_changed_files_are_refused(whole, tmp_path):
    folder = tmp_path / "digits/small-pair/study"
    folder.mkdir(parents=True)
    source = whole / "results/digits/small-pair/study"
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    fields = json.loads((folder / "study.json").read_text())
    del fields["sha256"]
    fields["means"]["clean"] = 1.0
    (folder / "study.json").write_bytes(seal(fields))
    with pytest.raises(ResultError, match=r"means.clean is 1.0.*--restart"):
        read_study(folder)
    (folder / "study.json").write_bytes((source / "study.json").read_bytes())
    (folder / "study.parquet").write_bytes((source / "study.parquet").read_bytes() + b" ")
    assert "not as it was written" in str(read_studies(tmp_path)[1][0])


def test_a_line_that_was_cut_off_is_trained_again(whole, tmp_path):
    path = tmp_path / "runs/studies/small-digits.jsonl"
    path.parent.mkdir(parents=True)
    content = (whole / "runs/studies/small-digits.jsonl").read_text()
    path.write_text(content[:-10])
    notes = []
    run(tmp_path, make_spec(), note=notes.append)
    assert sum("images, seed" in note for note in notes) == 1
    assert path.read_text() == content


def test_a_damaged_file_of_trained_networks_is_named(tmp_path):
    path = tmp_path / "runs/studies/small-digits.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text('{"family": 1\n')
    with pytest.raises(StorageError, match=r"small-digits.jsonl cannot be read .*--restart"):
        run(tmp_path, make_spec())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"groups": [{"norm": "L2", "eps": ["0"], "sizes": [5, 899]}]}, "5 to 899 .*allowed: from 5, .*to 898"),
        ({"groups": [{"norm": "L2", "eps": ["0"], "sizes": [4]}]}, "4 to 4 .*allowed: from 5, the batch size"),
        ({"recipe": NETWORKS["recipe"] | {"lr": 3e38, "iterations": 4}}, "the recipe diverges"),
    ],
)
def test_what_cannot_be_trained_is_refused(tmp_path, changes, message):
    with pytest.raises(ModelError, match=message):
        run(tmp_path, make_spec(**changes))


def test_a_number_that_is_not_finite_is_refused(whole, tmp_path):
    file, rows = read_study(whole / "results/digits/small-networks/study")
    about = {key: getattr(file, key) for key in ("model", "dataset", "n", "seconds", "hardware", "versions", "date")}
    write_study(tmp_path, rows.assign(eps=rows["eps"].replace(0.1, np.inf)), file.identity, about)
    with pytest.raises(ResultError, match="not finite"):
        read_study(tmp_path)


def test_the_declared_studies_fit_their_data_sets():
    sizes = {info.name: info.train for info in describe_datasets()}
    for name, spec in load_studies().items():
        assert name.endswith(f"-{spec.dataset}")
        groups = spec.networks.groups
        assert max(size for group in groups for size in group.sizes) == sizes[spec.dataset]
        assert all(any(g.norm == norm and 0 in g.eps and len(g.sizes) > 1 for g in groups) for norm in ("L2", "Linf"))


def test_the_command_says_what_goes_with_a_study(tmp_path):
    short = ["--time-limit", "0.001s", "--results", str(tmp_path), "--runs", str(tmp_path)]
    answer = CliRunner().invoke(app, ["train", "--family", "tsipras2019-digits", "--fit", "1m", *short])
    assert "tsipras2019-digits is a study; allowed with it: --time-limit" in str(answer.exception or answer.output)
    answer = CliRunner().invoke(app, ["train", "--family", "tsipras2019"])
    assert "tsipras2019-digits" in str(answer.exception or answer.output)
