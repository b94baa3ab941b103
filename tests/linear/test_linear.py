"""The linear model of robustness: closed form, finite differences, storage, identity, and the command."""

import json
import os
import time

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from robbench.commands.app import app
from robbench.core.errors import ModelError, ResultError, RobbenchError, StorageError
from robbench.linear.measure import measure_linear
from robbench.linear.record import linear_folder, read_activations, read_linear, read_linearization
from robbench.linear.theory import Linearization
from robbench.report.linear import predict_accuracy
from robbench.results.locking import is_locked
from support.models import Linear, small

X = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def affine(seed=0, classes=5):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net.eval()


def measured(model, tmp_path, x=X, y=None, **options):
    y = model(x).argmax(1) if y is None else y
    file = measure_linear(model, x=x, y=y, name="net", results=tmp_path, **options)
    return file, read_linearization(linear_folder(tmp_path, "custom", "net"))


def test_an_affine_model_has_its_exact_radius_and_class(tmp_path):
    model = affine()
    y = model(X).argmax(1)
    y[::8] = (y[::8] + 1) % 5  # misclassified
    file, found = measured(model, tmp_path, y=y)
    w, b = (p.detach().numpy() for p in model[1].parameters())
    z = X.flatten(1).numpy() @ w.T + b
    for i, label in enumerate(y.tolist()):
        others = [k for k in range(5) if k != label]
        radius = {k: (z[i, label] - z[i, k]) / np.abs(w[label] - w[k]).sum() for k in others}
        nearest = min(radius, key=radius.get)
        assert found.nearest[i] == nearest
        assert found.take_at_nearest("radius")[i] == pytest.approx(radius[nearest], rel=1e-5)
        for k in others:
            cosine = w[label] @ w[k] / np.linalg.norm(w[label]) / np.linalg.norm(w[k])
            assert found.cosine[i, k] == pytest.approx(cosine, rel=1e-5)
            assert found.gradient[i, k] == pytest.approx(np.abs(w[k]).sum(), rel=1e-6)
    assert file.clean_accuracy.value == pytest.approx(35 / 40)
    misclassified = np.arange(40) % 8 == 0
    assert np.array_equal(found.take_at_nearest("radius") <= 0, misclassified), "L of misclassified images is above 0"


def test_prediction_is_what_one_step_on_the_margin_does_to_an_affine_model(tmp_path):
    """Away from the borders of [0, 1], Eq. 3 is exact: below L nothing moves the class, above it this step does."""
    w = torch.randn(64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = Linear(w, -float(w.sum()) / 2).eval()
    x = 0.4 + 0.2 * X
    y = model(x).argmax(1)
    found = measured(model, tmp_path, x, y)[1]
    eps = float(np.median(found.take_at_nearest("radius")))
    sign = torch.where(y == 0, 1.0, -1.0)[:, None, None, None]
    for factor in (0.999, 1.001):
        moved = x - factor * eps * sign * w.sign().view(1, 1, 8, 8)
        assert moved.min() >= 0 and moved.max() <= 1
        assert np.array_equal((model(moved).argmax(1) == y).numpy(), found.predict_robust(factor * eps))
    assert predict_accuracy(found, eps).value == 0.5, "half of 40 lie above their median"


def test_gradient_gaps_agree_with_finite_differences(tmp_path):
    model = small().double()
    x, h = X[:3], 1e-5
    y = model(x).argmax(1)
    found = measured(model, tmp_path, x, y)[1]
    steps = torch.eye(64, dtype=torch.float64).view(64, 1, 8, 8) * h
    for i, label in enumerate(y.tolist()):
        slopes = ((model(x[i] + steps) - model(x[i] - steps)) / (2 * h)).detach()  # [pixels, classes]
        gaps = (slopes[:, [label]] - slopes).abs().sum(0)
        assert found.gradient_gap[i] == pytest.approx(gaps.numpy(), rel=1e-5, abs=1e-6)
        assert found.gradient[i] == pytest.approx(slopes.abs().sum(0).numpy(), rel=1e-5)


def test_numbers_do_not_depend_on_the_batch_width(tmp_path):
    model = small().double()
    y = model(X).argmax(1)
    frames = []
    for lanes in (3, 7, 64):
        measured(model, tmp_path / str(lanes), X, y, lanes=lanes)
        frames.append(pd.read_parquet(tmp_path / str(lanes) / "custom/net/linear/classes.parquet"))
    for frame in frames[1:]:
        pd.testing.assert_frame_equal(frame, frames[0])


def test_an_image_has_the_same_numbers_in_a_longer_run(tmp_path):
    model = small()
    x = X.float()
    y = model(x).argmax(1)
    assert measured(model, tmp_path, x, y, samples=9)[0].n == 9
    few = read_linearization(tmp_path / "custom/net/linear")
    file, many = measured(model, tmp_path, x, y)
    assert file.n == 40 and np.array_equal(many.logits[:9], few.logits)
    assert np.array_equal(many.gradient_gap[:9], few.gradient_gap)
    heard = []
    again = measured(model, tmp_path, x, y, samples=9, note=heard.append)[0]
    assert again == file and "nothing to compute" in heard[0], "what is stored is not thrown away"


def test_a_measurement_of_something_else_is_refused(tmp_path):
    y = torch.zeros(40, dtype=torch.int64)
    measured(small(), tmp_path, X.float(), y)
    with pytest.raises(ResultError, match=r"What differs:\n  weights: stored"):
        measured(small(1), tmp_path, X.float(), y)
    replaced = measured(small(1), tmp_path, X.float(), y, overwrite=True)[0]
    assert read_linear(tmp_path / "custom/net/linear") == replaced


def test_activations_are_those_of_the_last_linear_layer(tmp_path):
    model = small()
    with torch.no_grad():
        model[1].weight[4] = 0
        model[1].bias[4] = -1  # this neuron never fires
    measured(model, tmp_path, X.float(), lanes=16)
    rows = read_activations(tmp_path / "custom/net/linear")
    hidden = model[:3](X.float()).detach().double().numpy()
    inner = rows[rows["layer"] == "penultimate"]
    assert inner["mean"].to_numpy() == pytest.approx(hidden.mean(0), rel=1e-5)
    assert inner["active"].to_numpy() == pytest.approx((hidden > 0).mean(0)) and inner["active"].iloc[4] == 0
    logits = rows[rows["layer"] == "logits"]
    expected = model(X.float()).detach().abs().double().mean(0).numpy()
    assert logits["mean"].to_numpy() == pytest.approx(expected, rel=1e-5)


def test_a_model_without_a_last_linear_layer_has_no_activations(tmp_path):
    model = nn.Sequential(nn.Conv2d(1, 10, 8), nn.Flatten()).eval()
    measured(model, tmp_path, X.float())
    assert not len(read_activations(tmp_path / "custom/net/linear"))


class Rounded(nn.Module):
    """Answers that are constant almost everywhere: gradients are exactly zero."""

    def __init__(self, detach=False):
        super().__init__()
        self.inner, self.detach = small(), detach

    def forward(self, x):
        z = self.inner(x)
        return z.detach() if self.detach else z.detach() + 0 * z


def test_dead_gradients_are_flagged_and_missing_ones_refused(tmp_path):
    file, found = measured(Rounded().eval(), tmp_path, X.float())
    assert "360 of 360 pairs" in file.flags["zero_gradients"]
    assert np.isposinf(found.take_at_nearest("radius")).all() and file.medians["radius"] is None
    assert np.isnan(found.take_pairs("cosine")).all()
    with pytest.raises(ModelError, match="no gradient with respect to its input"):
        measured(Rounded(detach=True).eval(), tmp_path / "other", X.float())


def test_the_corners_of_equation_4():
    """Equal gradients: never (gap above 0), already (below), at once (0). NaN is never robust."""
    logits = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
    gap = np.array([[0, 0], [0, 0], [0, 0], [0, 4.0], [0, np.nan]])
    label = np.zeros(5, dtype=np.int64)
    found = Linearization(np.arange(5), label, logits, gap, gap, gap)
    assert found.take_at_nearest("radius")[:4].tolist() == [np.inf, -np.inf, 0.0, 0.25]
    assert found.predict_robust(0.0).tolist() == [True, False, False, True, False]
    assert found.predict_robust(0.25).tolist() == [True, False, False, False, False], "L must exceed the radius"


def test_a_class_that_nothing_is_known_of_makes_no_image_robust():
    gap = np.array([[0.0, 1.0, np.nan]])
    found = Linearization(np.zeros(1, np.int64), np.zeros(1, np.int64), np.array([[5.0, 1.0, 0.0]]), gap, gap, gap)
    assert found.nearest.tolist() == [2] and found.predict_robust(0.1).tolist() == [False]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(b"PAR1 no"), "cannot be read"),
        (lambda p: pd.DataFrame({"sample": [1]}).to_parquet(p), "has the columns"),
        (lambda p: pd.read_parquet(p).iloc[:-1].to_parquet(p), "one row per image and class"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, message):
    measured(small(), tmp_path, X.float())
    path = tmp_path / "custom/net/linear/classes.parquet"
    damage(path)
    with pytest.raises(ResultError, match=message):
        read_linearization(path.parent)
    (path.parent / "linear.json").write_text('{"schema_version": 9}', encoding="utf-8")
    with pytest.raises(ResultError, match=r"linear\.json: .*Measure it again"):
        read_linear(path.parent)


def run(*args, code=0):
    done = CliRunner().invoke(app, [*map(str, args)])
    if code == 0:
        assert done.exit_code == 0, done.output
        return done.stdout
    assert isinstance(done.exception, RobbenchError)
    return str(done.exception)


@pytest.mark.whole
def test_the_measure_command_stores_and_prints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = run("measure", "linear", "-m", "digits/at", "--samples", 20, "--eps", "0.1")
    assert "digits/at" in shown and "at 0.1" in shown
    stored = json.loads((tmp_path / "results/digits/at/linear/linear.json").read_text(encoding="utf-8"))
    assert stored["n"] == 20 and stored["backwards"] == 20 * 11 and len(stored.pop("sha256")) == 64
    assert json.loads(run("measure", "linear", "-m", "digits/at", "--samples", 20, "--json")) == stored
    run("leaderboard")
    assert "No results" in (tmp_path / "leaderboard.md").read_text(encoding="utf-8"), "a measurement is no result"
    wrong = (
        (["measure", "linea", "-m", "digits/at"], "Did you mean linear"),
        (["measure", "linear", "-m", "digits/att"], ": digits/at, "),
        (["measure", "linear", "-m", "digits/at", "--eps", "8"], "lies in"),
    )
    for args, message in wrong:
        assert message in run(*args, code=2)


@pytest.mark.parametrize("link", ["custom", "custom/net", "custom/net/linear"])
def test_nothing_is_measured_into_a_linked_folder(tmp_path, link):
    outside, root = tmp_path / "outside", tmp_path / "results"
    outside.mkdir()
    (outside / "linear.json").write_text("precious")
    (root / link).parent.mkdir(parents=True)
    (root / link).symlink_to(outside)
    with pytest.raises(StorageError, match="is a link"):
        measured(affine(), root, overwrite=True)
    assert [p.name for p in outside.iterdir()] == ["linear.json"]
    assert (outside / "linear.json").read_text() == "precious"


def test_two_processes_do_not_measure_into_one_folder(tmp_path):
    seen = []
    model = affine()
    model.register_forward_hook(lambda *_: seen.append(is_locked(tmp_path, linear_folder(tmp_path, "custom", "net"))))
    measured(model, tmp_path)
    assert seen[-1] and not is_locked(tmp_path, linear_folder(tmp_path, "custom", "net"))


@pytest.mark.usefixtures("limited_time")
@pytest.mark.parametrize("name", ["linear.json", "classes.parquet", "activations.parquet"])
@pytest.mark.parametrize("kind", ["pipe", "sparse"])
def test_a_pipe_or_a_vast_file_is_refused_at_once(tmp_path, name, kind):
    measured(affine(), tmp_path)
    path = linear_folder(tmp_path, "custom", "net") / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    else:
        with path.open("wb") as file:
            file.truncate(2**38)
    begin = time.perf_counter()
    with pytest.raises(ResultError, match=r"not a regular file|larger than"):
        read_linear(path.parent)
    assert time.perf_counter() - begin < 2
