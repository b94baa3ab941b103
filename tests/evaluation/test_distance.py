"""The suite `distance`: exact distances on linear models, bounds elsewhere, and results that are stored and checked."""

import itertools
import json
import math
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import robbench
from robbench.attacks import FAB, PGD, Nearest
from robbench.core.errors import ResultError, RobbenchError, SuiteError
from robbench.core.threat import Ball
from robbench.evaluation.options import Options
from robbench.gate.measure import measure_entry, read_stored_entry
from robbench.masking.stored import VerdictIndex
from robbench.models.card import Registry
from robbench.models.spec import ModelSpec
from robbench.report.distance import NEAREST, find_distances, trace_survival
from robbench.report.export import export_result
from robbench.report.figures.source import FigureData
from robbench.report.leaderboard_pages import render_leaderboard
from robbench.results.adversarials import read
from robbench.results.reader import read_results, read_vouched
from support.attacks import queried, run_attack, smallest
from support.commands import run
from support.models import DUAL, small

X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))
Y = small()(X).argmax(1)
SUITE = """version = 1
judge = "nearest"
[[attack]]
name = "PGD"
kind = "pgd"
objective = "ce_scaled"
steps = 10
restarts = 5
relative_step = 2.0
anneal = true
[[attack]]
name = "DeepFool"
kind = "deepfool"
iterations = 3
optional = true
"""


class Planes(nn.Module):
    """K random linear logits in float32."""

    def __init__(self, classes, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.w = nn.Parameter(torch.randn(classes, 16, generator=generator))
        self.b = nn.Parameter(-0.5 * self.w.detach().sum(1))  # no class leads in the middle of the box

    def forward(self, x):
        return x.flatten(1) @ self.w.T + self.b


def linear_problem(norm, classes, n=4):
    """A linear model, images near the middle of the box, their classes, and the exact distances in float64."""
    model = Planes(classes, seed=classes).eval()
    x = 0.5 + 0.08 * torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    w, b = model.w.detach().double(), model.b.detach().double()
    z = x.double().flatten(1) @ w.T + b
    y = z.argmax(1)
    gap, slope = z.gather(1, y[:, None]) - z, w[y][:, None] - w[None]
    exact = gap / torch.linalg.vector_norm(slope, ord=DUAL[norm], dim=2)
    exact = exact.scatter(1, y[:, None], torch.inf).amin(1)
    assert exact.max() < torch.minimum(x, 1 - x).min(), "the nearest point is inside the box"
    return model, x, y, exact.numpy()


def every_class_count(norms=("Linf", "L2", "L1")):
    return [
        pytest.param(norm, k, marks=[pytest.mark.whole] if (norm, k) != ("L2", 3) else [])
        for norm, k in itertools.product(norms, (2, 3, 10))
    ]


@pytest.mark.filterwarnings("ignore:peers_left_out:robbench.RobustnessWarning")
@pytest.mark.parametrize(("norm", "classes"), every_class_count())
def test_distances_of_linear_models_are_exact_within_1e_3(norm, classes):
    model, x, y, exact = linear_problem(norm, classes)
    result = robbench.evaluate(model, "distance", x=x, y=y, norm=norm)
    found = result.distances
    assert (np.abs(found[NEAREST] / exact - 1) < 1e-3).all()
    assert (found.drop(columns=NEAREST) >= exact.reshape(-1, 1) * (1 - 1e-3)).all(axis=None), "no point is nearer"
    for name in {"FAB", "DeepFool", "PGD-bisection"} & set(found):
        assert (np.abs(found[name] / exact - 1) < 1e-3).all(), name
    assert {"L2": "CW"}.get(norm, "FAB") in found


@pytest.mark.parametrize("classes", [2, pytest.param(10, marks=pytest.mark.whole)])
def test_l0_counts_the_pixel_values_that_must_change(tmp_path, classes):
    """The pixels that move the margin most go to the end of the box, until the plane is crossed."""
    pytest.importorskip("adv_lib", reason="adv-lib is not installed (robbench[more-peers])")
    model, x, y, _ = linear_problem("L2", classes)
    with torch.no_grad():
        model.w *= 4
        model.b.copy_(-0.5 * model.w.sum(1))
        model.b[0] += 14.0  # several pixels are needed
    y = torch.zeros_like(y)
    exact = []
    for image in x.flatten(1):
        z = model(image[None])[0]
        counts = []
        for k in range(1, classes):
            slope = model.w[k] - model.w[0]
            gain = (slope * torch.where(slope > 0, 1 - image, -image)).sort(descending=True).values.cumsum(0)
            counts.append(int((gain <= z[0] - z[k]).sum()) + 1)
        exact.append(min(counts))
    assert min(exact) > 1
    kept = {"results": tmp_path, "save_adversarials": True}
    result = robbench.evaluate(model, "distance", x=x, y=y, norm="L0", **kept)
    for points in result.adversarials():  # rounded ones would differ in every pixel
        recorded = [result.distances.loc[i, name] for i, name in zip(points.sample, points.attack, strict=True)]
        assert Ball("L0", 16).distance(x[points.sample], torch.from_numpy(points.x)).tolist() == recorded
    assert [a.name for a in result.attacks] == ["FMN", "sigma-zero"] and result.threat.norm == "L0"
    found = result.distances
    assert (found["sigma-zero"] >= exact).all()
    assert (found["sigma-zero"] == exact).mean() >= 0.75, "sigma-zero is no exact method"


@pytest.mark.parametrize(
    ("attack", "norm"),
    [(FAB(targets=3, steps=12), "L2"), (PGD(steps=8, restarts=4, anneal=True, relative_step=2.0), "L1")],
)
def test_an_attack_ends_at_most_as_far_as_the_nearest_break_that_it_queries(attack, norm):
    """And not nearer than the nearest query: the record is about a point that was seen."""
    model, ball = small(), Ball(norm, {"L2": 8.0, "L1": 64.0}[norm])
    points, wrong = queried(model, Nearest(inner=attack), X, Y, ball)
    rows = run_attack(model, Nearest(inner=attack), X, Y, ball, judge="nearest", keep_adversarials=True)
    assert rows.broken.all() and (rows.trial == 0).all()
    assert np.allclose(rows.distance, smallest(points, wrong, X, ball), rtol=2e-3)
    first = smallest(*queried(model, attack, X, Y, ball), X, ball)
    assert (rows.distance <= first.numpy() * (1 + 1e-3)).all()
    assert np.allclose(ball.distance(X, rows.x_adv), rows.distance)


def test_restarts_bisect_the_radius():
    """PGD alone ends on the surface of the ball, so only smaller balls lead it close to the boundary."""
    model, x, y, exact = linear_problem("Linf", 2)
    radii = []

    class Watched(PGD):
        def init(self, p, ball):
            radii.append(ball.eps.clone())
            return super().init(p, ball)

    attack = Nearest(inner=Watched(steps=10, restarts=16, anneal=True, relative_step=2.0))
    rows = run_attack(model, attack, x, y, Ball("Linf", 1.0), judge="nearest", lanes=len(x))
    radii = torch.stack(radii).numpy()[: attack.inner.trials]
    assert (radii[0] == 1).all() and (radii[1] < 0.51).all()
    assert (radii[-1] > 0.9 * exact).all() and (radii[-1] <= 1.001 * rows.distance).all()
    assert (np.abs(rows.distance / exact - 1) < 1e-2).all()


def test_what_a_gradient_query_alone_takes_for_a_break_does_not_end_the_search():
    """With gradients on, the model errs by rounding in favour of another class. The judge asks without them."""

    _, x, y, _ = linear_problem("L2", 2)
    lead = Planes(2, seed=2)(x).detach().diff(dim=1).abs().min()

    class Rounding(Planes):
        def forward(self, x):
            z = super().forward(x)
            return z + 0.5e-4 * lead * torch.is_grad_enabled() * (nn.functional.one_hot(1 - y, 2)[: len(x)])

    model = Rounding(2, seed=2).eval()
    attack = Nearest(inner=FAB(targets=1, steps=20))
    rows = run_attack(model, attack, x, y, Ball("L2", 4.0), judge="nearest", lanes=len(x))
    assert rows.broken.all()


def test_a_misclassified_image_has_distance_0_and_an_unbroken_one_infinity():
    rows = pd.DataFrame(
        {
            "sample": [0, 1, 2, 0, 1, 2], "attack": ["a"] * 3 + ["b"] * 3,
            "status": ["misclassified", "broken", "robust", "misclassified", "broken", "robust"],
            "distance": [np.nan, 0.5, np.nan, np.nan, 0.25, np.nan],
        }
    )  # fmt: skip
    table = find_distances(rows)
    assert table[NEAREST].tolist() == [0, 0.25, math.inf] and table["a"].tolist() == [0, 0.5, math.inf]


def test_the_curve_is_the_share_of_images_beyond_each_radius_with_wilson_bands():
    distances = pd.Series([0.0, 0.2, 0.2, 0.7, math.inf])
    curve = trace_survival(distances)
    assert curve["radius"].tolist() == [0, 0.2, 0.7] and curve["value"].tolist() == [0.8, 0.4, 0.2]
    z, n = 1.959963984540054, 5
    for p, low, high in curve[["value", "low", "high"]].to_numpy():
        middle, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        assert low == pytest.approx((middle - spread) / (1 + z * z / n), abs=1e-6)
        assert high == pytest.approx((middle + spread) / (1 + z * z / n), abs=1e-6)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A results tree with a small suite of distances on the digits, and what the command printed at 80 columns."""
    folder = tmp_path_factory.mktemp("distance")
    (folder / "near.toml").write_text(SUITE)
    args = ["eval", "-m", "digits/at", "-s", folder / "near.toml", "--norm", "L2", "--save-adversarials", "--results"]
    run(*args, folder / "r", "--samples", 5, COLUMNS="80")
    said = run(*args, folder / "r", "--samples", 12, COLUMNS="80").stdout
    run(*args, folder / "fresh", "--samples", 12)
    return folder, said


def stored(folder):
    (path,) = (folder / "digits" / "at").glob("near@*/result.json")
    return path.parent


def test_a_run_goes_on_and_its_points_are_verified(tree):
    folder, _ = tree
    here, fresh = stored(folder / "r"), stored(folder / "fresh")
    assert (here / "outcomes.parquet").read_bytes() == (fresh / "outcomes.parquet").read_bytes()
    assert (here / "adversarials.safetensors").read_bytes() == (fresh / "adversarials.safetensors").read_bytes()
    points = read(here / "adversarials.safetensors").points
    assert [group.x.dtype for group in points] == [np.float32], "unrounded, as rounding changes the distance"
    said = run("verify", here).stdout
    assert "of 12 images confirmed, 0 mismatches" in said
    run("reproduce", here, "--suite", folder / "near.toml", "--samples", 4)


def test_the_table_fits_and_the_curve_lies_beside_the_result(tree):
    folder, said = tree
    here = stored(folder / "r")
    table = said[said.index("digits/at · near · L2: distance") :]
    assert "nearest of all" in table and "upper bounds" in table
    curve = pd.read_csv(here.with_name(here.name + ".csv"))
    result = read_vouched(here)
    rows = pd.read_parquet(here / "outcomes.parquet")
    broken = rows[rows["status"] == "broken"].groupby("sample")["distance"].min()
    lost = rows[rows["status"] == "misclassified"]["sample"].nunique()
    for radius, value in curve[["radius", "value"]].to_numpy():
        assert value == pytest.approx((12 - lost - (broken <= radius).sum()) / 12)
    assert (curve["run_id"] == result.run_id).all() and here.with_name(here.name + ".png").stat().st_size > 5000
    shown = json.loads(run("show", "digits/at", "--results", folder / "r", "--json").stdout)["results"][0]
    assert shown["distances"]["attacks"][NEAREST]["median"] == np.quantile(
        [*[0.0] * lost, *broken], 0.5, method="inverted_cdf"
    )
    assert [p["radius"] for p in shown["distances"]["survival"]] == pytest.approx(curve["radius"].tolist())


def test_the_results_of_two_seeds_have_titles_of_their_own(tree):
    folder, _ = tree
    args = ["eval", "-m", "digits/at", "-s", folder / "near.toml", "--norm", "L2", "--samples", 3, "--results"]
    for seed in (0, 1):
        run(*args, folder / "seeds", "--seed", seed)
    said = run("show", "digits/at", "--results", folder / "seeds", COLUMNS="80").stdout
    assert said.count("L2: distances of breaks") == said.count("L2, seed 1: distances of breaks") == 1
    plain = run(*args, folder / "s", "--seeds", 2, code=2)
    assert "--seeds 2 given with suite" in plain.stderr and not (folder / "s").exists()


def test_nothing_that_ranks_at_a_radius_takes_it(tree, tmp_path):
    folder, _ = tree
    here = stored(folder / "r")
    results = read_results(folder / "r").results
    assert len(results) == 1 and not results[0].has_radius
    assert FigureData(Registry.default(), folder / "r").results == []
    pages = render_leaderboard(folder / "r", folder / "r" / "leaderboard.md")
    assert all("0.0 [" not in text for text in pages.values())
    with pytest.raises(ResultError, match="distances of nearest breaks given"):
        export_result(here, "robustbench", Registry.default())
    with pytest.raises(ResultError, match="Suite near given for a baseline"):
        read_stored_entry(here)
    with pytest.raises(RobbenchError, match="given for a baseline"):
        measure_entry(ModelSpec("digits/at"), "distance", Options(results=tmp_path))
    assert VerdictIndex(folder / "r").find(results[0]) == "unchecked"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"eps": "0.1"}, "eps: 0.1 given with suite 'distance', which looks for the nearest break"),
        ({"eps": "0.1", "norm": "L2"}, "given with suite 'distance'"),
        ({"norm": "L3"}, "norm: 'L3' given; allowed: 'Linf', 'L2', 'L1', 'L0'|norm: 'L3' given"),
    ],
)
def test_a_radius_is_refused_before_anything_runs(monkeypatch, given, message):
    monkeypatch.setattr("robbench.evaluation.run.Worker", None)
    with pytest.raises(SuiteError, match=message):
        robbench.evaluate(small(), "distance", x=X, y=Y, **given)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('[threat.digits]\nnorm = "L2"\neps = "1"', "threat: given with judge 'nearest'"),
        ('mode = "cascade"', "mode: 'cascade' given with judge 'nearest'"),
        ('mode = "challenge"', "mode: 'challenge' given with judge 'nearest'"),
    ],
)
def test_a_suite_of_near_breaks_has_no_radius_and_no_cascade(tmp_path, line, message):
    (tmp_path / "near.toml").write_text(SUITE.replace('judge = "nearest"', f'judge = "nearest"\n{line}'))
    with pytest.raises(SuiteError, match=message):
        robbench.evaluate(small(), str(tmp_path / "near.toml"), x=X, y=Y)


def test_a_norm_alone_is_still_refused_with_other_suites():
    for suite in ("quick", [PGD()]):
        with pytest.raises(SuiteError, match="--norm L2 given without --eps"):
            robbench.evaluate(small(), suite, x=X, y=Y, norm="L2")


def test_without_the_library_its_attacks_are_left_out_with_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "adv_lib", None)
    more = '[[attack]]\nname = "DDN"\nkind = "advlib:ddn"\n'
    (tmp_path / "near.toml").write_text(SUITE + more + "optional = true\n")
    with pytest.warns(robbench.RobustnessWarning, match="peers_left_out"):
        result = robbench.evaluate(small(), str(tmp_path / "near.toml"), x=X, y=Y, norm="L2")
    assert [a.name for a in result.attacks] == ["PGD", "DeepFool"]
    assert "DDN" in result.flags["peers_left_out"] and "not installed" in result.flags["peers_left_out"]
    with pytest.raises(SuiteError, match=r"No attack of the suite 'distance' is made for L0\. .*not installed"):
        robbench.evaluate(small(), "distance", x=X, y=Y, norm="L0")
    (tmp_path / "must.toml").write_text(SUITE + more)
    with pytest.raises(SuiteError, match="not installed"):
        robbench.evaluate(small(), str(tmp_path / "must.toml"), x=X, y=Y, norm="L2")


def test_a_result_of_another_suite_has_no_distances():
    result = robbench.evaluate(small(), [PGD(steps=2)], x=X, y=Y, eps="0.1")
    with pytest.raises(ResultError, match='Use suite="distance"'):
        result.distances  # noqa: B018
