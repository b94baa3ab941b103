"""Stored series: steps until a break, short trainings and their students; changed tables are refused."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from robbench.analysis import measure_training as training
from robbench.analysis.measure_steps import measure_steps
from robbench.analysis.series_record import read_series, read_series_files, series_folder
from robbench.attacks.pgd import PGD
from robbench.commands.app import app
from robbench.core.errors import ModelError, ResultError
from robbench.evaluation.options import Options
from robbench.models.card import Registry
from robbench.models.spec import ModelSpec
from robbench.results.schema import seal
from support.series import change_identity

SPEC = ModelSpec("digits/at")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    root = tmp_path_factory.mktemp("series")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_ITERATIONS", 6)
        patch.setattr(training, "_CHECKPOINTS", (2, 6))
        patch.setattr(training, "_SEEDS", (0, 1))
        patch.setattr(training, "_STUDENT_ITERATIONS", 3)
        patch.setattr(training, "_STUDENT_CHECKPOINTS", (2, 6))
        said = []
        training.measure_training(SPEC, Options(samples=12), root, note=said.append)
        training.measure_students(SPEC, Options(samples=12), root)
        training.measure_training(SPEC, Options(samples=10), root, note=said.append)
        assert "nothing to compute" in said[-1]
    measure_steps(SPEC, Options(samples=30), root)
    return root


@pytest.fixture
def copy(stored, tmp_path):
    for path in stored.glob("digits/at/*/*"):
        place = tmp_path / path.relative_to(stored)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes())
    return tmp_path


def table(root, kind):
    return read_series(series_folder(root, "digits", "at", kind))


def test_steps_are_those_at_which_pgd_breaks_an_image(stored):
    from robbench.classifier.batch_width import BatchWidths
    from robbench.core import rng
    from robbench.core.threat import Ball
    from robbench.core.types import Threat
    from robbench.data.sets import load
    from robbench.engine.engine import attack_samples
    from robbench.models.load import load_model

    file, rows = table(stored, "steps")
    assert file.n == 30 and sorted(rows["step_size"].unique()) == [0.01, 0.03, 0.1, 0.25, 0.5, 1.0]
    mine = rows[rows["step_size"] == 0.25].reset_index(drop=True)
    data = load("digits", "test")
    x, y = torch.from_numpy(data.x[:30]).float() / data.scale, torch.from_numpy(data.y[:30])
    module = load_model(Registry.default().find("digits/at")).module
    right = np.flatnonzero(mine["correct"])
    for steps in (3, 20):  # fewer steps break exactly the images whose step is at most that many
        found = attack_samples(
            module,
            PGD(steps=steps),
            x[right],
            y[right],
            data.index[right],
            Ball.of(Threat("Linf", 0.2)),
            key=rng.make_key(0, "steps"),
            widths=BatchWidths(module, x.shape[1:], 30, x.dtype),
        )
        broken = set(found.sample[found.broken].tolist())
        assert broken == set(mine[(mine["step"] >= 0) & (mine["step"] <= steps)]["sample"])
        assert 0 < len(broken) < 30


def test_a_training_keeps_logits_of_the_network_that_the_recipe_makes(stored, monkeypatch):
    file, rows = table(stored, "training")
    assert file.identity["shortened"]["adversary"]["steps"] == 3
    assert rows.groupby(["seed", "iteration", "split"], sort=False).size().to_dict() == {
        (0, 2, "train"): 898,
        (0, 2, "test"): 12,
        (0, 6, "train"): 898,
        (0, 6, "test"): 12,
        (1, 6, "test"): 12,
    }
    assert not rows[rows["split"] == "train"]["broken"].any()
    logits = [
        rows[(rows["seed"] == s) & (rows["split"] == "test")].filter(like="logit_").to_numpy()[-12:] for s in (0, 1)
    ]
    assert np.abs(logits[0] - logits[1]).max() > 0.01, "another seed is another network"
    mine = rows[(rows["split"] == "train") & (rows["seed"] == 0)]
    losses = []
    for _, part in mine.groupby("iteration"):
        z = torch.from_numpy(part.filter(like="logit_").to_numpy(np.float32).copy())
        losses.append(float(torch.nn.functional.cross_entropy(z, torch.from_numpy(part["label"].to_numpy(copy=True)))))
    assert losses[1] < losses[0] < 2.31, "the network learns"


def test_students_learn_the_stored_logits(stored, copy, monkeypatch):
    file, rows = table(stored, "students")
    assert file.identity["teacher"] == table(stored, "training")[0].run_id
    assert rows.groupby(["loss", "iteration"]).size().to_dict() == {
        (loss, i): 12 for loss in ("logits", "softmax") for i in (2, 6)
    }
    folder = series_folder(copy, "digits", "at", "training")
    for change in ({"recipe": file.identity["recipe"] | {"lr": 1.0}}, {"train": "other images"}):
        change_identity(folder, **change)
        with pytest.raises(ResultError, match="another recipe or other images"):
            training.measure_students(SPEC, Options(samples=12), copy)
        change_identity(folder, recipe=file.identity["recipe"], train=file.identity["train"])
    (copy / "digits/at/training/training.json").unlink()
    with pytest.raises(ResultError, match="robbench measure training"):
        training.measure_students(SPEC, Options(samples=12), copy)


def test_the_loss_of_a_softmax_student_is_zero_at_its_teacher():
    from robbench.training.draws import Batch

    z = torch.randn(4, 10)
    step = object.__new__(training._SoftmaxStep)
    step.target, step.logits = z, lambda x: z + 3  # softmax does not see a shift
    batch = Batch(torch.arange(4), torch.zeros(4), torch.zeros(4, 1, 8, 8), torch.zeros(4), None)
    assert float(step.compute_loss(batch)) == pytest.approx(0, abs=1e-6)
    assert float(step.compute_loss(batch, 2 * z)) > 0.01


def rewrite(root, kind, change):
    """Change the table, and make the summary name its new digest, as a careful forger would."""
    from robbench.core.files import digest_file

    folder = series_folder(root, "digits", "at", kind)
    path = folder / f"{kind}.parquet"
    change(pd.read_parquet(path)).to_parquet(path, index=False)
    fields = json.loads((folder / f"{kind}.json").read_text())
    del fields["sha256"]
    fields["files"] = {path.name: digest_file(path, 2**30)}
    (folder / f"{kind}.json").write_bytes(seal(fields))
    return folder


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("steps", lambda rows: rows.iloc[:-1], "other images"),
        ("steps", lambda rows: rows.assign(correct=False), "no measurement writes"),
        ("steps", lambda rows: rows.assign(label=10), "no measurement writes"),
        ("steps", lambda rows: rows.assign(sample=rows["sample"] + 1), "in place"),
        ("steps", lambda rows: rows.drop(columns="step"), "other columns"),
        ("students", lambda rows: rows.assign(robust=True, correct=False), "no measurement writes"),
        ("students", lambda rows: rows[rows["sample"] != rows["sample"].iloc[-1]], "n is 12"),
        ("training", lambda rows: rows.assign(logit_3=np.float16("nan")), "no measurement writes"),
        ("training", lambda rows: rows.assign(broken=True), "no measurement writes"),
        ("training", lambda rows: rows[rows["split"] == "train"], "no test image"),
        ("training", lambda rows: rows[~((rows["iteration"] == 2) & (rows["label"] == 3))], "other images"),
    ],
)
def test_changed_tables_are_refused_even_with_a_new_seal(copy, kind, change, message):
    folder = rewrite(copy, kind, change)
    with pytest.raises(ResultError, match=message) as error:
        read_series(folder)
    assert f"robbench measure {kind} --model digits/" in str(error.value)
    found, damaged = read_series_files(copy)
    assert len(found) == 2 and len(damaged) == 1


def test_a_changed_file_and_another_run_are_refused(copy):
    folder = series_folder(copy, "digits", "at", "training")
    path = folder / "training.parquet"
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ResultError, match="not as it was written"):
        read_series(folder)
    (copy / "digits/at").rename(copy / "digits/trades")
    with pytest.raises(ResultError, match="different run"):
        measure_steps(ModelSpec("digits/trades"), Options(samples=30), copy)


def test_models_without_a_recipe_are_told_so(tmp_path):
    with pytest.raises(ModelError, match="registered models"):
        training.measure_training(ModelSpec("file:x.safetensors"), Options(), tmp_path)


def test_the_command_prints_what_is_stored(copy):
    arguments = ["measure", "steps", "-m", "digits/at", "--samples", "30", "--results", str(copy)]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "steps" in shown.output and "30" in shown.output
