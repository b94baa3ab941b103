"""Stored logits: they are those of the model, breaks are real, and changed files are refused."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from robbench.analysis import measure
from robbench.analysis.measure import measure_logits
from robbench.analysis.record import logits_folder, read_logits, read_logits_files
from robbench.commands.app import app
from robbench.core.errors import ModelError, ResultError
from robbench.evaluation.options import Options
from robbench.models.spec import ModelSpec
from robbench.results.schema import seal
from support.models import small

SPEC = ModelSpec("digits/at")


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    root = tmp_path_factory.mktemp("logits")
    measure_logits(SPEC, Options(samples=40), root)
    return root


@pytest.fixture
def folder(stored, tmp_path):
    folder = logits_folder(tmp_path, "digits", "at")
    folder.mkdir(parents=True)
    for file in logits_folder(stored, "digits", "at").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_the_logits_are_those_of_the_model_and_the_breaks_are_real(stored):
    from robbench.data.sets import load
    from robbench.models.card import Registry
    from robbench.models.load import load_model

    file, found = read_logits(logits_folder(stored, "digits", "at"))
    data = load("digits", "test")
    module = load_model(Registry.default().find("digits/at")).module
    with torch.no_grad():
        logits = module(torch.from_numpy(data.x[:40]).float() / data.scale).numpy()
    assert found.clean == pytest.approx(logits, abs=1e-4)
    assert found.label.tolist() == data.y[:40].tolist()
    assert file.clean_accuracy.value == (logits.argmax(1) == data.y[:40]).mean()
    assert 0 < found.broken.sum() < 40
    assert (found.adversarial.argmax(1) != found.label)[found.broken].all()
    assert (found.adversarial == found.clean)[~found.broken].all()
    assert file.robust_accuracy.value == (found.correct & ~found.broken).mean()


def test_a_known_measurement_is_not_repeated_and_more_images_are(stored, folder, monkeypatch):
    root = folder.parents[2]
    said = []
    assert measure_logits(SPEC, Options(samples=30), root, note=said.append).n == 40
    assert "nothing to compute" in said[-1]
    assert measure_logits(SPEC, Options(samples=41), root).n == 41
    assert (read_logits(folder)[1].clean[:40] == read_logits(logits_folder(stored, "digits", "at"))[1].clean).all()
    monkeypatch.setattr(measure, "SEED", 1)
    with pytest.raises(ResultError, match="different run"):
        measure_logits(SPEC, Options(samples=30), root)
    assert measure_logits(SPEC, Options(samples=30), root, overwrite=True).n == 30


def rewrite(folder, change):
    """Change the table, and make the summary name its new digest, as a careful forger would."""
    from robbench.core.files import digest_file

    rows = pd.read_parquet(folder / "logits.parquet")
    rows = change(rows)
    rows.to_parquet(folder / "logits.parquet", index=False)
    fields = json.loads((folder / "logits.json").read_text())
    del fields["sha256"]
    fields["files"] = {"logits.parquet": digest_file(folder / "logits.parquet", 2**30)}
    (folder / "logits.json").write_bytes(seal(fields))


def heal(rows):
    clean = [c for c in rows if c.startswith("clean")]
    rows.loc[rows["broken"], [c.replace("clean", "adversarial") for c in clean]] = rows.loc[
        rows["broken"], clean
    ].values
    return rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.iloc[:-1], "n is 40"),
        (lambda rows: rows.assign(label=(rows["label"] + 1) % 10), "calls an image broken"),
        (lambda rows: rows.assign(broken=False), "moves one that is not broken"),
        (heal, "calls an image broken"),
        (lambda rows: rows.assign(clean_3=np.float32("nan")), "not finite"),
        (lambda rows: rows.assign(label=10), "no class"),
        (lambda rows: rows.drop(columns="clean_9"), "other columns"),
        (lambda rows: rows.assign(clean_0=rows["clean_0"].astype("float64")), "other columns or types"),
        (lambda rows: rows.iloc[::-1], "in place 1"),
    ],
)
def test_changed_tables_are_refused_even_with_a_new_seal(folder, change, message):
    rewrite(folder, change)
    with pytest.raises(ResultError, match=message) as error:
        read_logits(folder)
    assert "robbench measure logits --model digits/" in str(error.value)
    found, damaged = read_logits_files(folder.parents[2])
    assert not found
    assert len(damaged) == 1


def test_changed_files_and_foreign_folders_are_refused(folder):
    root, table = folder.parents[2], folder / "logits.parquet"
    content = table.read_bytes()
    table.write_bytes(content + b" ")
    with pytest.raises(ResultError, match="not as it was written"):
        read_logits(folder)
    table.write_bytes(content)
    assert list(read_logits_files(root)[0]) == ["digits/at"]
    text = (folder / "logits.json").read_text()
    (folder / "logits.json").write_text(text.replace('"lanes": ', '"lanes": 1'))
    with pytest.raises(ResultError, match="not as it was written"):
        read_logits(folder)
    (folder / "logits.json").write_text(text)
    folder.rename(folder.parent.with_name("natural"))
    other = root / "digits" / "natural"
    (root / "digits" / "x").mkdir()
    other.rename(root / "digits" / "x" / "logits")
    found, damaged = read_logits_files(root)
    assert not found
    assert "is the measurement of digits/at" in str(damaged[0])


def test_a_model_that_answers_nan_is_refused(tmp_path):
    class Nan(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small()

        def forward(self, x):
            z = self.inner(x)
            return torch.where(x.flatten(1)[:, :1] > 0, torch.nan, z)

    x = torch.zeros(6, 1, 8, 8)
    x[0] = 0.5
    with pytest.raises(ModelError, match="NaN or infinity"):
        measure.compute_logits(
            measure.resolve(ModelSpec(small(), x, torch.zeros(6).long(), "mine"), Options())[0].__class__(
                module=Nan(), name="n", device=torch.device("cpu"), weights="", identity={}
            ),
            x,
            4,
        )


def test_the_command_stores_and_prints(tmp_path):
    arguments = ["measure", "logits", "-m", "digits/at", "--samples", "20", "--results", str(tmp_path)]
    shown = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "PGD %" in shown.output
    file = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert file["n"] == 20
    wrong = CliRunner().invoke(app, [*arguments, "--eps", "0.1"])
    assert isinstance(wrong.exception, Exception)
    assert "--eps goes with linear" in f"{wrong.exception}{wrong.output}"
