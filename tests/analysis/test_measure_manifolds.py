"""Stored manifold geometry: it is that of the model's layers, and changed files are refused."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from robbench.analysis import measure_manifolds as measure
from robbench.analysis.manifold_record import manifolds_folder, read_manifolds, read_manifolds_files
from robbench.analysis.manifolds import analyze_manifolds
from robbench.analysis.measure_manifolds import measure_manifolds
from robbench.commands.app import app
from robbench.core.errors import ModelError, ResultError
from robbench.core.files import digest_file
from robbench.core.threat import Ball
from robbench.core.types import Threat
from robbench.evaluation.inputs import resolve
from robbench.evaluation.options import Options
from robbench.models.spec import ModelSpec
from robbench.results.schema import seal

SPEC = ModelSpec("digits/at")
P = 4


@pytest.fixture(scope="module", autouse=True)
def few():
    """Few points and directions, so that a measurement takes a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_POINTS", 4)
        patch.setattr(measure, "_DRAWS", 20)
        patch.setattr(measure, "_TRIALS", 1)
        yield


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    root = tmp_path_factory.mktemp("manifolds")
    measure_manifolds(SPEC, Options(samples=P), root)
    return root


@pytest.fixture
def folder(stored, tmp_path):
    folder = manifolds_folder(tmp_path, "digits", "at")
    folder.mkdir(parents=True)
    for file in manifolds_folder(stored, "digits", "at").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def clouds():
    target, images = resolve(SPEC, Options())
    return target, images, measure._make_clouds(target, images, np.arange(P), 6, Threat("Linf", 0.2))


def test_the_points_are_in_the_ball_and_the_attack_raises_the_loss():
    target, images, (clean, adversarial) = clouds()
    x = images.x(np.repeat(np.arange(P), 4))
    y = images.y[np.repeat(np.arange(P), 4)]
    ball = Ball.of(Threat("Linf", 0.2))
    for points in (clean, adversarial):
        assert ball.contains(x, points).all()
        assert len(points.flatten(1).unique(dim=0)) == len(x), "every point is another one"
    loss = torch.nn.functional.cross_entropy
    with torch.no_grad():
        assert loss(target.module(adversarial), y) > 2 * loss(target.module(clean), y)


def test_the_numbers_are_those_of_the_layers(stored):
    file, rows = read_manifolds(manifolds_folder(stored, "digits", "at"))
    names = [g.layer for g in file.layers if g.kind == "clean"]
    assert names == [
        "0 pixels",
        "1 Conv2d",
        "2 ReLU",
        "3 Conv2d",
        "4 MaxPool2d",
        "5 ReLU",
        "6 Linear",
        "7 ReLU",
        "8 logits",
    ]
    assert [g.features for g in file.layers[::2]] == [64, 2048, 2048, 4096, 1024, 1024, 128, 128, 10]
    target, _, (clean, adversarial) = clouds()
    with torch.no_grad():
        logits = target.module(adversarial).double().numpy()
    for points, i in ((clean.flatten(1).double().numpy(), 0), (logits, len(file.layers) - 1)):
        found = analyze_manifolds(np.split(points, P), 20)
        g = file.layers[i]
        assert g.correlation == pytest.approx(found.correlation, rel=1e-4)
        mine = rows[(rows["layer"] == i // 2) & (rows["kind"] == g.kind)]
        # The pixels are turned into their span first, so their directions are drawn anew.
        assert mine["radius"].to_numpy() == pytest.approx(found.radius, rel=0.6 if i == 0 else 1e-3)
        assert g.cost == pytest.approx(np.mean(mine["cost"]))
    assert (rows[rows["layer"] == 0]["kind"].value_counts() == P).all()


def test_a_known_measurement_is_not_repeated_and_another_number_of_images_is(stored, folder, monkeypatch):
    root, said = folder.parents[2], []
    assert measure_manifolds(SPEC, Options(samples=P), root, note=said.append).n == P
    assert "nothing to compute" in said[-1]
    assert measure_manifolds(SPEC, Options(samples=P - 1), root).n == P - 1
    monkeypatch.setattr(measure, "_DRAWS", 10)
    with pytest.raises(ResultError, match="different run"):
        measure_manifolds(SPEC, Options(samples=P - 1), root)
    with pytest.raises(ModelError, match="2 or more"):
        measure_manifolds(SPEC, Options(samples=1), root)


def rewrite(folder, change=lambda rows: rows, change_summary=lambda fields: None):
    """Change the files, and make the summary name the new digest, as a careful forger would."""
    table = folder / "manifolds.parquet"
    change(pd.read_parquet(table)).to_parquet(table, index=False)
    fields = json.loads((folder / "manifolds.json").read_text())
    del fields["sha256"]
    fields["files"] = {"manifolds.parquet": digest_file(table, 2**30)}
    change_summary(fields)
    (folder / "manifolds.json").write_bytes(seal(fields))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.iloc[:-1], "rows for"),
        (lambda rows: rows.iloc[::-1], "in order"),
        (lambda rows: rows.assign(kind=rows["kind"].to_numpy()[::-1]), "in order"),
        (lambda rows: rows.assign(sample=rows["sample"] + 1), "place"),
        (lambda rows: rows.assign(radius=rows["radius"] * 2), "radius is"),
        (lambda rows: rows.assign(cost=np.nan), "not finite"),
        (lambda rows: rows.assign(dimension=-1.0), "negative"),
        (lambda rows: rows.drop(columns="cost"), "other columns"),
        (lambda rows: rows.assign(layer=rows["layer"].astype("int32")), "other columns or types"),
    ],
)
def test_changed_tables_are_refused_even_with_a_new_seal(folder, change, message):
    rewrite(folder)
    read_manifolds(folder)  # the forger's own steps are no reason to refuse
    rewrite(folder, change)
    with pytest.raises(ResultError, match=message) as error:
        read_manifolds(folder)
    assert "robbench measure manifolds --model digits/" in str(error.value)
    found, damaged = read_manifolds_files(folder.parents[2])
    assert not found
    assert len(damaged) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields["layers"].pop(),
        lambda fields: fields["layers"].reverse(),
        lambda fields: fields["layers"][0].update(cost=0.5),
        lambda fields: fields["layers"][0].update(correlation=-0.5),
        lambda fields: fields.update(layers=[]),
        lambda fields: fields.update(n=3),
    ],
)
def test_changed_summaries_are_refused_even_with_a_new_seal(folder, change):
    rewrite(folder, change_summary=change)
    with pytest.raises(ResultError):
        read_manifolds(folder)


def test_changed_bytes_and_foreign_folders_are_refused(folder):
    table = folder / "manifolds.parquet"
    content = table.read_bytes()
    table.write_bytes(content + b" ")
    with pytest.raises(ResultError, match="not as it was written"):
        read_manifolds(folder)
    table.write_bytes(content)
    folder.parent.rename(folder.parent.with_name("natural"))
    found, damaged = read_manifolds_files(folder.parents[2])
    assert not found
    assert "is the measurement of digits/at" in str(damaged[0])


def test_the_command_prints_every_layer(stored):
    arguments = ["measure", "manifolds", "-m", "digits/at", "--samples", str(P), "--results", str(stored)]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "8 logits" in shown.output
    file = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert len(file["layers"]) == 18
