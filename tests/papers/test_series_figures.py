"""The figures of trainings, students, step sizes, images and noise: the captions hold what the stored numbers say."""

import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from robbench.analysis.logits import Estimate, compare_shares, compute_gaps
from robbench.analysis.record import read_logits
from robbench.analysis.series_record import read_series
from robbench.core.errors import ResultError
from robbench.core.stats import paired_difference, wilson
from robbench.data.sets import load
from robbench.models.card import Registry
from robbench.papers.figures import images, noise, steps, students, training
from robbench.papers.figures.definitions import FIGURES
from robbench.papers.figures.logits import describe_likeness
from robbench.papers.figures.write import write_figure
from robbench.report.figures.source import FigureData
from support.papers import put, result
from support.series import change_identity

KINDS = ("logits", "training", "students", "steps", "fast", "whitebox", "certified")
NEW = ("seguin2021-1", "seguin2021-A.6", "seguin2021-B.1", "seguin2021-B.2", "seguin2021-B.3", "seguin2021-B.5",
       "seguin2021-B.6", "mosbach2018", "noise-certified", "noise-accuracy")  # fmt: skip


@pytest.fixture
def tree(tmp_path, repo):
    for name in ("natural", "at", "lsq2_sigma03"):
        for kind in KINDS:
            if (folder := repo / "results/digits" / name / kind).exists():
                shutil.copytree(folder, tmp_path / "digits" / name / kind)
    return tmp_path


def plan(tree, name):
    return FIGURES[name].make(FigureData(Registry.default(), tree), "title", "digits")


def claims(tree, name):
    numbers = plan(tree, name).numbers
    rows = numbers[numbers["panel"] == "claim"]
    return {row.other if hasattr(row, "other") else row.group: row for row in rows.itertuples()}


def series(tree, model, kind):
    return read_series(tree / "digits" / model / kind)[1]


@pytest.mark.parametrize("name", NEW)
def test_figures_are_drawn_twice_the_same_and_name_what_is_missing(tree, name, tmp_path):
    data = FigureData(Registry.default(), tree)
    first, second = (write_figure(data, FIGURES[name], "digits", tmp_path / folder).paths for folder in "ab")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    rows = pd.read_csv(first[1])
    claim = rows[rows["panel"] == "claim"]
    assert len(claim) and (claim["low"] <= claim["value"]).all() and (claim["value"] <= claim["high"]).all()
    for kind in KINDS:
        shutil.rmtree(tree / "digits/natural" / kind, ignore_errors=True)
        shutil.rmtree(tree / "digits/at" / kind, ignore_errors=True)
    assert plan(tree, name).numbers is None
    assert any(command.startswith("robbench ") for command in plan(tree, name).missing)


def test_a_figure_imports_no_torch(tree, tmp_path):
    code = (
        "import sys\n"
        "class NoTorch:  # scipy looks into sys.modules, so a None there would not do\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'torch':\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, NoTorch())\n"
        "from pathlib import Path\n"
        "from robbench.models.card import Registry\n"
        "from robbench.papers.figures.definitions import FIGURES\n"
        "from robbench.papers.figures.write import write_figure\n"
        "from robbench.report.figures.source import FigureData\n"
        f"data = FigureData(Registry.default(), Path({str(tree)!r}))\n"
        f"for name in {NEW!r}:\n"
        f"    assert write_figure(data, FIGURES[name], 'digits', Path({str(tmp_path / 'out')!r})).paths, name\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_claims_of_trainings_are_those_of_the_stored_logits(tree):
    natural, at = (series(tree, name, "training") for name in ("natural", "at"))

    def logits(rows, split, seed=0):
        mine = rows[(rows["split"] == split) & (rows["iteration"] == 400) & (rows["seed"] == seed)]
        return mine.filter(like="logit_").to_numpy(np.float64), mine["label"].to_numpy(), mine["broken"].to_numpy()

    top = [logits(rows, "train")[0].max(1) for rows in (natural, at)]
    found = claims(tree, "seguin2021-1")
    assert found["mean at the end minus that of at"].value == pytest.approx(top[0].mean() - top[1].mean())
    skew = [((t - t.mean()) ** 3).mean() / t.std() ** 3 for t in top]
    assert found["skewness at the end minus that of natural"].value == pytest.approx(skew[1] - skew[0])
    gaps = [compute_gaps(logits(at, split)[0]).mean() for split in ("train", "test")]
    found = claims(tree, "seguin2021-B.1")["training images minus test images"]
    assert found.value == pytest.approx(gaps[0] - gaps[1])
    above = []
    for seed in range(3):
        z, label, broken = logits(at, "test", seed)
        robust, gap = (z.argmax(1) == label) & ~broken, compute_gaps(z)
        above.append(robust[gap >= np.median(gap)].mean() - robust[gap < np.median(gap)].mean())
    found = claims(tree, "seguin2021-B.5")["robust, above minus below the median gap"]
    assert found.value == pytest.approx(np.mean(above))
    assert found.high - found.value == pytest.approx(4.303 * np.std(above, ddof=1) / 3**0.5)


def test_captions_of_trainings_say_when_the_finding_does_not_show(tree):
    tables = {name: series(tree, name, "training") for name in ("natural", "at")}
    swapped = {"natural": tables["at"], "at": tables["natural"]}
    assert "finding shows" in training._compute_logit_evolution("digits", tables)[1]
    assert "does not show" in training._compute_logit_evolution("digits", swapped)[1]
    assert "finding shows" in training._compute_overlaps("digits", tables)[1]
    assert "does not show" in training._compute_overlaps("digits", {"natural": tables["at"], "at": tables["at"]})[1]
    taught = {"students": series(tree, "at", "students"), "at": tables["at"]}
    other = taught["students"].assign(loss=taught["students"]["loss"].map({"logits": "softmax", "softmax": "logits"}))
    assert "A.7" in students._compute_students("digits", taught)[1]
    assert "does not show" in students._compute_students("digits", {**taught, "students": other})[1].split("A.7")[1]


def test_studies_of_another_recipe_or_other_weights_are_not_drawn(tree):
    folder = tree / "digits/at/training"
    recipe = read_series(folder)[0].identity["recipe"]
    change_identity(folder, recipe=recipe | {"lr": 1.0})
    assert list(plan(tree, "seguin2021-1").missing) == [
        f"robbench measure training -m digits/at --results {tree} --overwrite"
    ]
    change_identity(folder, recipe=recipe)
    assert not plan(tree, "seguin2021-1").missing
    change_identity(tree / "digits/at/steps", weights="0" * 64)
    assert list(plan(tree, "mosbach2018").missing) == [
        f"robbench measure steps -m digits/at --results {tree} --overwrite"
    ]


def test_the_grid_of_steps_counts_the_stored_breaks(tree):
    rows = series(tree, "at", "steps")
    numbers = plan(tree, "mosbach2018").numbers
    cell = numbers[
        (numbers["model"] == "digits/at") & (numbers["other"] == "step size 0.25 eps") & (numbers["x"] == 10)
    ]
    mine = rows[rows["step_size"] == 0.25]
    kept = mine["correct"] & ~mine["step"].between(0, 10)
    assert (cell["value"].item(), cell["low"].item()) == (kept.mean(), wilson(kept.sum(), len(kept))[0])
    shares = numbers[numbers["panel"] == "A"].pivot_table(index=["model", "other"], columns="x", values="value")
    assert (np.diff(shares.to_numpy(), axis=1) <= 0).all(), "more steps break no fewer images"


def test_students_and_models_are_compared_image_by_image():
    first, second = np.array([1, 1, 1, 0], bool), np.array([0, 0, 1, 1], bool)
    found = compare_shares(first, second)
    assert (found.value, found.low, found.high) == (0.25, *paired_difference(2, 1, 4))


def test_neighbours_have_the_largest_cosine_and_other_images_are_refused(tree):
    z = np.array([[1.0, 0], [2, 0.1], [0, 1], [0.1, 3], [-1, 0], [5, 5], [1, -1]])
    nearest = images._find_nearest(z)
    assert nearest[0].tolist() == [1, 5, 6, 3, 2]
    assert (nearest != np.arange(7)[:, None]).all()
    stored = read_logits(tree / "digits/at/logits")[1]
    data = load("digits", "test")
    assert images._pick_images(data, stored.take_first(5)).shape == (5, 1, 8, 8)
    with pytest.raises(ResultError, match="other images"):
        images._pick_images(load("digits", "train"), stored)


def test_the_least_squeezed_model_that_was_measured_stands_for_squeezing(tree):
    assert steps._SQUEEZED[0] == "lsq05_sigma03"
    rows = plan(tree, "mosbach2018").numbers
    assert set(rows[rows["other"].str.contains("minus that of at")]["model"]) == {"digits/lsq2_sigma03"}


def test_without_a_model_with_noise_nothing_is_claimed_about_noise(tree):
    found = plan(tree, "noise-certified")
    assert found.numbers["panel"].eq("claim").sum() == 1
    shutil.rmtree(tree / "digits/lsq2_sigma03/certified")
    alone = plan(tree, "noise-certified")
    assert set(alone.numbers["panel"]) == {"A"} and set(alone.numbers["model"]) == {"digits/natural", "digits/at"}
    assert "nothing is claimed of noise" in alone.paint().legends[0].get_title().get_text()


def test_certificates_of_other_draws_are_not_compared():
    settings = {"sigma": 0.3, "draws": 10_000, "alpha": 0.001, "seed": 0}
    assert noise._is_alike(settings, settings | {"seed": 1})
    assert not any(noise._is_alike(settings, settings | {key: 1}) for key in ("sigma", "draws", "alpha"))


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (-0.04, 0.3, "finding shows here"),
        (-0.04, -0.01, "finding shows here"),
        (-0.9, 0.3, "too wide"),
        (-0.9, -0.1, "does not show"),
    ],
)
def test_a_wide_interval_around_0_shows_no_likeness(low, high, said):
    assert said in describe_likeness(Estimate((low + high) / 2, low, high, 4), -0.05, 1.0)


def test_a_few_images_do_not_show_that_noise_is_as_robust_as_training_on_attacks(tmp_path):
    for name, left in (("natural", 0), ("at", 3), ("lsq2_sigma03", 1)):
        about = {"identity": {"weights": Registry.default().find(f"digits/{name}").card.weights.sha256}}
        for suite, attack in (("whitebox", "PGD-20-xent"), ("fast", "FAST")):
            put(tmp_path, result(name, suite, left, {attack: left}, 4, "digits", "0.2", **about))
    note = plan(tmp_path, "noise-accuracy").paint().legends[0].get_title().get_text()
    assert "-50.0 points" in note and "too wide" in note
