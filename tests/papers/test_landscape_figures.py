"""The figures of the loss around images: what they show is what `robbench sanity` stored and vouches for."""

import shutil
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest

from robbench.core.errors import ResultError
from robbench.masking.landscape_record import read_landscape
from robbench.masking.record import digest_landscape, read_sanity
from robbench.models.card import Registry
from robbench.papers.figures.definitions import FIGURES
from robbench.papers.figures.write import write_figure
from robbench.report.figures import source
from robbench.report.figures.source import FigureData
from robbench.results.schema import dump_sealed
from support.commands import run

NAMES = ("natural", "at", "lsq2_sigma03")
PLANES = ("random", "adversarial")


@pytest.fixture
def tree(tmp_path, repo):
    for name in NAMES:
        shutil.copytree(repo / "results/digits" / name / "sanity", tmp_path / "results/digits" / name / "sanity")
    return tmp_path / "results"


def plan(tree, plane, registry=None):
    data = FigureData(registry or Registry.default(), tree)
    return FIGURES[f"landscape-{plane}"].make(data, "title", "digits")


def read_stored(tree, name):
    return pd.read_parquet(tree / "digits" / name / "sanity/landscape.parquet")


def read_claims(tree, plane, name):
    return plan(tree, plane).numbers.query(f"panel == 'claim' and model == 'digits/{name}'")


@pytest.mark.parametrize("plane", PLANES)
def test_figures_are_drawn_twice_the_same_from_the_stored_losses(tree, plane, tmp_path):
    data, figure = FigureData(Registry.default(), tree), FIGURES[f"landscape-{plane}"]
    first, second = (write_figure(data, figure, "digits", tmp_path / folder).paths for folder in "ab")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    rows = pd.read_csv(first[1])
    claim, shown = rows[rows["panel"] == "claim"], rows[rows["panel"] == plane]
    assert (claim["low"] <= claim["value"]).all() and (claim["value"] <= claim["high"]).all()
    assert set(shown["model"]) == {f"digits/{name}" for name in NAMES}
    stored = read_stored(tree, "at")
    point = stored[(stored["plane"] == plane) & (stored["a"] == 0.5) & (stored["b"] == -1)].iloc[3]
    here = shown[(shown["model"] == "digits/at") & (shown["sample"] == point["sample"]) & (shown["a"] == 0.5)]
    assert here["b-1"].item() == pytest.approx(point["cross_entropy"], rel=6e-3)  # three digits


def test_claims_are_what_the_losses_say(tree):
    stored = read_stored(tree, "at")
    wide = stored[stored["plane"] == "adversarial"]
    ratios = []
    for _, image in wide.groupby("sample"):
        up, right = image[image["b"] == 0]["cross_entropy"], image[image["a"] == 0]["cross_entropy"]
        ratios.append((up.max() - up.min()) / (right.max() - right.min()))
    claim = read_claims(tree, "adversarial", "at")
    assert claim["value"].item() == pytest.approx(np.median(ratios)) and claim["n"].item() == 8
    assert (claim["low"].item(), claim["high"].item()) == pytest.approx((min(ratios), max(ratios)))


def test_wrong_points_count_inside_the_ball_alone_and_of_images_that_are_right(tree):
    path = tree / "digits/at/sanity/landscape.parquet"
    frame = pd.read_parquet(path).assign(margin=-1.0)
    first, second, third = frame["sample"].unique()[:3]
    random = frame["plane"] == "random"
    corner = (frame["a"] == 1) & (frame["b"] == 1)
    frame.loc[(frame["sample"] == first) & random & corner, "margin"] = 1.0  # at 2 eps
    frame.loc[(frame["sample"] == second) & random & (frame["a"] == 0.5) & (frame["b"] == -0.5), "margin"] = 1.0
    frame.loc[(frame["sample"] == third), "margin"] = 1.0  # the image itself is wrong
    reseal(tree, frame)
    claims = read_claims(tree, "random", "at").set_index("what")
    assert claims["value"].tolist() == [pytest.approx(1 / 7), 0] and claims["n"].tolist() == [7, 7]


def reseal(tree, frame, name="at"):
    """Write a landscape that its sanity.json vouches for."""
    folder = tree / "digits" / name / "sanity"
    if isinstance(frame, bytes):
        (folder / "landscape.parquet").write_bytes(frame)
    else:
        frame.to_parquet(folder / "landscape.parquet", index=False)
    file = read_sanity(folder / "sanity.json")
    content = dump_sealed(file.model_copy(update={"landscape": digest_landscape(folder)}))
    (folder / "sanity.json").write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: f.assign(cross_entropy=np.nan),
        lambda f: f.assign(margin=np.inf),
        lambda f: f.drop(columns="margin"),
        lambda f: f.drop(columns="plane"),
        lambda f: f.assign(extra=1.0),
        lambda f: f.assign(sample="image"),
        lambda f: f.assign(cross_entropy="0"),
        lambda f: f[f["plane"] == "random"],
        lambda f: f[f["plane"] == "adversarial"],
        lambda f: f.assign(plane="other"),
        lambda f: f[:0],
        lambda f: f[1:],
        lambda f: pd.concat([f, f[:1]]),
        lambda f: f.assign(a=3 * f["a"]),
        lambda f: b"",
        lambda f: b"PAR1 and no more",
    ],
)
def test_a_damaged_landscape_is_named_and_the_others_are_drawn(tree, damage):
    reseal(tree, damage(read_stored(tree, "at")))
    for plane in PLANES:
        assert set(plan(tree, plane).numbers["model"]) == {"digits/natural", "digits/lsq2_sigma03"}
    (found,) = FigureData(Registry.default(), tree).damaged
    assert found.name == "digits/at/sanity/landscape.parquet" and "robbench sanity" in found.reason
    with pytest.raises(ResultError):
        read_landscape(tree / found.name)


def test_a_landscape_that_nothing_vouches_for_is_not_drawn(tree):
    path = tree / "digits/at/sanity/landscape.parquet"
    pd.read_parquet(path).assign(cross_entropy=0.0).to_parquet(path, index=False)
    found = plan(tree, "random")
    assert set(found.numbers["model"]) == {"digits/natural", "digits/lsq2_sigma03"}
    where = f"--results {tree}"
    again = f"robbench sanity digits/at {where} --overwrite"
    assert list(found.missing) == [again, f"robbench sanity digits/ls095_sigma03 {where}"]
    assert any("landscape.parquet" in damage.reason for damage in FigureData(Registry.default(), tree).damaged)
    path.unlink()
    assert set(plan(tree, "random").numbers["model"]) == {"digits/natural", "digits/lsq2_sigma03"}
    assert any("is missing" in damage.reason for damage in FigureData(Registry.default(), tree).damaged)


def test_a_landscape_of_other_weights_or_of_another_radius_is_not_drawn(tree, tmp_path, repo, monkeypatch):
    cards = tmp_path / "models"
    shutil.copytree(repo / "models/digits", cards / "digits")
    card = cards / "digits/at.toml"
    text = card.read_text(encoding="utf-8")
    digest = text.partition('sha256 = "')[2].partition('"')[0]
    card.write_text(text.replace(digest, "0" * 64), encoding="utf-8")
    assert "digits/at" not in set(plan(tree, "random", Registry([cards])).numbers["model"])
    monkeypatch.setattr(source, "find_standard_radius", lambda dataset: Fraction(1, 20))
    assert plan(tree, "random").numbers is None


def test_a_person_chooses_the_models(tree, tmp_path):
    shutil.copytree(tree / "digits/lsq2_sigma03", tree / "digits/mine")
    given = ("figure", "landscape-random", "--results", tree)
    out = tmp_path / "out"
    run(*given, "-m", "digits/at", "-m", "digits/natural", "--output", out)
    rows = pd.read_csv(out / "digits/landscape-random.csv")
    assert list(rows["model"].unique()) == ["digits/at", "digits/natural"]
    said = run(*given, "-m", "digits/nobody", "--output", out, code=2).stderr
    assert said.count("robbench sanity digits/nobody") == 1
    assert "must not replace" in run(*given, "-m", "digits/at", code=2).stderr
    assert "one data set" in run(*given, "-m", "digits/at", "-m", "mnist/at", "--output", out, code=2).stderr
    assert "one data set" in run(*given, "-m", "at", "--output", out, code=2).stderr
    said = run("figure", "shafahi2019-1", "-m", "digits/at", "--output", out, "--results", tree, code=2).stderr
    assert "landscape-random, landscape-adversarial" in said
