"""The figures: what they plot is what is stored, twice the same, without torch, and what is missing has its command."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image
from typer.testing import CliRunner

from robbench.commands.app import app
from robbench.core.errors import ResultError
from robbench.data.sets import load
from robbench.evaluation.run import evaluate
from robbench.linear.record import read_linearization
from robbench.models.card import Registry
from robbench.papers.figures.definitions import FIGURES, find_figure
from robbench.papers.figures.histograms import _count_values
from robbench.papers.figures.write import write_figure, write_figures
from robbench.report.figures.canvas import DASHES, OKABE_ITO, make_figure, render_png, shrink_png
from robbench.report.figures.source import FigureData
from robbench.results.schema import read_result

NAMES = ("natural", "at")


@pytest.fixture
def tree(tmp_path, repo):
    """The stored results of two digits models."""
    for name in NAMES:
        for kind in ("whitebox", "linear"):
            shutil.copytree(repo / "results/digits" / name / kind, tmp_path / "results/digits" / name / kind)
    return tmp_path / "results"


def numbers(name, root, dataset="digits"):
    figure = find_figure(name)
    return figure.make(FigureData(Registry.default(), root), figure.format_heading(dataset), dataset).numbers


def run(*args, code=0):
    done = CliRunner().invoke(app, [*map(str, args)])
    if code == 2:
        assert isinstance(done.exception, ResultError), done.output
        return str(done.exception)
    assert done.exit_code == code, done.output
    return done.output


# ---- what is plotted is what is stored


@pytest.mark.parametrize(("figure", "panels"), [("1", 4), ("2", 1), ("6", 1)])
def test_histograms_count_every_value_once(tree, figure, panels):
    found = numbers(figure, tree).query("panel != 'claim'")
    assert found["panel"].nunique() == panels
    for (panel, model), rows in found.groupby(["panel", "model"]):
        measured = read_linearization(tree / model / "linear")
        wrong = np.arange(10) != measured.label[:, None]
        values = {
            "logit_gap": (measured.logits[np.arange(899), measured.label][:, None] - measured.logits)[wrong],
            "gradient_gap": measured.gradient_gap[wrong],
            "cosine": measured.cosine[wrong],
            "logits": np.abs(measured.logits),
            "gradient": measured.gradient,
        }
        values["radius"] = values["logit_gap"] / values["gradient_gap"]
        assert rows["count"].sum() == rows["total"].iloc[0] == values[panel].size
        edges = rows["low"].iloc[1:].to_numpy()  # the outer bins are open
        assert np.array_equal(np.histogram(values[panel], edges)[0][:-1], rows["count"].iloc[1:-2])
        assert rows["count"].iloc[0] == (values[panel] < edges[0]).sum()


def test_a_value_on_an_edge_count_values_to_the_right_and_infinity_beyond_the_last():
    edges = np.array([-np.inf, 0.0, 1.0, 2.0, np.inf])
    values = np.array([-np.inf, -1.0, 0.0, 1.0, 1.5, 2.0, np.inf, np.nan])
    counted = _count_values("radius", "m", values, edges, 8)
    assert counted["count"].tolist() == [2, 1, 2, 2] and counted["total"].iloc[0] == 8, "NaN is in no bin"


def test_activations_are_ordered(tree):
    for figure, neurons in (("8", 128), ("9", 10)):
        for _, rows in numbers(figure, tree).query("layer != 'claim'").groupby("model"):
            assert rows["rank"].tolist() == list(range(1, neurons + 1)) and sorted(rows["neuron"]) == list(
                range(neurons)
            )
            assert rows["mean"].is_monotonic_decreasing
            assert ((rows["mean"] == 0) == (rows["active"] == 0)).all()


def test_the_steps_end_at_the_stored_accuracies(tree):
    found = numbers("accuracy-steps", tree)
    for name in NAMES:
        stored = read_result(tree / f"digits/{name}/whitebox/result.json")
        for attack in stored.attacks:
            rows = found[(found["model"] == f"digits/{name}") & (found["attack"] == attack.name)]
            assert rows["value"].is_monotonic_decreasing
            assert rows["value"].iloc[-1] == pytest.approx(attack.robust_accuracy.value)
            assert (
                rows["step"].iloc[-1] == attack.config["steps"] and rows["value"].iloc[0] <= stored.clean_accuracy.value
            )
    fgsm = found[found["attack"] == "FGSM-CW"].groupby("model")["value"].first()
    assert fgsm["digits/at"] == read_result(tree / "digits/at/whitebox/result.json").clean_accuracy.value


def test_classes_add_up_to_the_worst_case(tree):
    found = numbers("per-class", tree).query("panel == 'A'")
    for name in NAMES:
        mine = found[found["model"] == f"digits/{name}"].set_index("class")
        worst = read_result(tree / f"digits/{name}/whitebox/result.json").robust_accuracy
        assert mine.loc["all", ["value", "low", "high"]].tolist() == [worst.value, worst.low, worst.high]
        each = mine.drop("all")
        assert len(each) == 10 and each["images"].sum() == 899
        assert (each["value"] * each["images"]).sum() == pytest.approx(worst.value * 899)


def test_the_prediction_over_the_radius_stands_beside_the_attacks(tree):
    found = numbers("accuracy-eps", tree)
    at = found[found["model"] == "digits/at"]
    predicted = at[at["series"] == "Equation 4"]
    radius = read_linearization(tree / "digits/at/linear").take_at_nearest("radius")
    assert predicted["value"].tolist() == [(radius > eps).mean() for eps in predicted["eps"]]
    stored = read_result(tree / "digits/at/whitebox/result.json")
    worst = at[at["series"] == "worst case"].set_index("eps")["value"]
    assert worst.to_dict() == {0.0: stored.clean_accuracy.value, 0.2: stored.robust_accuracy.value}


@pytest.mark.whole
def test_a_sweep_is_a_curve_and_a_weaker_suite_is_told_apart(tree):
    for eps in ("0.05", "0.2"):
        evaluate("digits/at", "quick", samples=40, eps=eps, results=tree)
    found = numbers("accuracy-eps", tree).query("panel == 'A'")
    at = found[(found["model"] == "digits/at") & (found["eps"] > 0)]
    series = at[at["suite"] != "linear"].set_index(["suite", "eps"])["series"]
    assert series["quick", 0.05] == series["quick", 0.2] == "worst case", "the strongest at 0.05: the only one"
    assert set(series["whitebox", 0.2]) == {"worst case", "FGSM-CW"}
    evaluate("digits/natural", "quick", samples=20, results=tree)
    few = numbers("accuracy-eps", tree).query(
        "panel == 'A' and model == 'digits/natural' and suite == 'quick' and eps > 0"
    )
    assert few["series"].tolist() == ["worst case of a weaker suite"], "20 images have a wide interval"


def test_other_weights_than_the_cards_are_not_drawn(tree):
    path = tree / "digits/at/linear/linear.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    stored["identity"]["weights"] = "0" * 64
    path.write_text(json.dumps(stored), encoding="utf-8")
    figure = find_figure("1")
    picture = figure.make(FigureData(Registry.default(), tree), "", "digits")
    assert set(picture.numbers["model"]) == {"digits/natural"}
    assert f"robbench measure linear -m digits/at --results {tree} --overwrite" in picture.missing


# ---- the gallery


@pytest.fixture
def kept(tmp_path):
    """A tree with adversarial examples."""
    evaluate("digits/natural", "quick", samples=60, results=tmp_path / "kept", save_adversarials=True)
    return tmp_path / "kept"


@pytest.mark.whole
def test_the_gallery_shows_the_stored_points_and_the_images_of_the_data_set(kept):
    from robbench.data.sets import load

    found, data = numbers("gallery", kept).query("panel == 'A'"), load("digits")
    pixels = [f"x{i}" for i in range(8)]
    assert found["example"].nunique() == 8 and found["label"].nunique() == 8
    for _, rows in found.groupby("example"):
        clean, adversarial = (rows.loc[rows["image"] == k, pixels].to_numpy() for k in ("clean", "adversarial"))
        position = int(np.flatnonzero(data.index == rows["sample"].iloc[0])[0])
        assert np.array_equal(clean * 16, data.x[position, 0])
        assert str(data.y[position]) == rows["label"].iloc[0] != rows["prediction"].iloc[0]
        assert np.abs(adversarial - clean).max() == pytest.approx(rows["distance"].iloc[0], abs=1e-3)
        assert 0 < rows["distance"].iloc[0] <= 0.2 + 1e-6
    written = write_figure(FigureData(Registry.default(), kept), FIGURES["gallery"], "digits", kept / "figures")
    with Image.open(written.paths[0]) as image:
        assert image.size[0] > 800


def test_the_gallery_refuses_other_images(kept, monkeypatch):
    others = replace(load("digits"), digest="0" * 64)
    monkeypatch.setattr("robbench.report.figures.gallery.load", lambda *about: others)
    with pytest.raises(ResultError, match="other images than those of the data set digits"):
        numbers("gallery", kept)


# ---- on disk


def test_written_again_they_are_the_same_and_check_tells_what_is_stale(tree):
    shown = run("figure", "per-class", "--dataset", "digits", "--results", tree)
    picture, table = (tree / f"figures/digits/per-class.{ending}" for ending in ("png", "csv"))
    assert f"{picture} written" in shown
    first = picture.read_bytes(), table.read_bytes()
    run("figure", "per-class", "--dataset", "digits", "--results", tree)
    assert (picture.read_bytes(), table.read_bytes()) == first
    check = ("figure", "per-class", "--dataset", "digits", "--results", tree, "--check")
    assert "up to date" in run(*check)
    with Image.open(picture) as image:
        assert sorted(image.text) == ["Description", "Numbers-SHA256", "Title"], "no date, no version"
        assert image.text["Description"] == FIGURES["per-class"].caption

    table.write_bytes(first[1].replace(b"digits/at", b"digits/AT"))
    again = f"robbench figure per-class --dataset digits --results {tree}"
    assert f"per-class.csv is stale: run `{again}`" in run(*check, code=1)
    table.write_bytes(first[1])
    picture.write_bytes(render_png(lambda: make_figure(2, 2), {"Title": "per-class", "Numbers-SHA256": "0" * 64}))
    assert "per-class.png was drawn from other numbers" in run(*check, code=1)
    picture.write_bytes(first[0][:200])
    assert "per-class.png is missing or damaged" in run(*check, code=1)


def test_a_matplotlibrc_changes_nothing(tree):
    data, figure = FigureData(Registry.default(), tree), FIGURES["per-class"]
    plain = write_figure(data, figure, "digits", tree / "a").paths[0].read_bytes()
    with mpl.rc_context({"font.size": 30, "savefig.dpi": 50, "axes.grid": False, "lines.linewidth": 9}):
        assert write_figure(data, figure, "digits", tree / "b").paths[0].read_bytes() == plain


def test_write_figures_is_listed_and_documented(repo):
    listed, page = run("list", "figures", "--json"), (repo / "docs/figures.md").read_text(encoding="utf-8")
    assert [row["figure"] for row in json.loads(listed)] == list(FIGURES)
    assert all(f"| `{name}` |" in page for name in FIGURES)


@pytest.mark.whole
def test_what_is_missing_has_its_command(tree, tmp_path):
    shutil.rmtree(tree / "digits/at/linear")
    shown = run("figure", "1", "--dataset", "digits", "--results", tree)
    assert "robbench measure linear -m digits/at" in shown and "shafahi2019-1.png written" in shown
    (tmp_path / "empty").mkdir()
    for name in FIGURES:
        said = run("figure", name, "--results", tmp_path / "empty", code=2)
        assert said.startswith("Nothing to draw") and "robbench " in said
    assert "robbench train mnist/at_weak && robbench measure linear -m mnist/at_weak --results" in run(
        "figure", "2", "--results", tmp_path / "empty", code=2
    )
    assert "up to date" not in run("figure", "all", "--check", "--results", tmp_path / "empty")
    assert "not drawn for 'cifar10'" in run("figure", "1", "--dataset", "cifar10", "--results", tree, code=2)
    assert "Did you mean per-class" in run("figure", "perclass", "--results", tree, code=2)


def test_a_figure_whose_images_are_not_here_leaves_the_others(tree, kept, tmp_path, monkeypatch):
    monkeypatch.setenv("ROBBENCH_DATA", str(tmp_path / "nowhere"))
    shutil.copytree(kept / "digits/natural/quick", tree / "mnist/someone/quick")
    path = tree / "mnist/someone/quick/result.json"
    stored = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**stored, "dataset": "mnist", "model": "someone"}), encoding="utf-8")
    found = {w.name: w for w in write_figures(FigureData(Registry.default(), tree), tree / "figures", check=True)}
    assert not found["gallery, mnist"].paths and "mnist" in found["gallery, mnist"].missing[0]
    assert found["per-class, digits"].paths


def test_every_model_has_a_colour_and_a_dash_of_its_own(repo):
    data = FigureData(Registry.default(), repo / "results")
    names = [f"mnist/{n}" for n in ("natural", "at", "ls095_sigma03", "lsq2", "lsq2_sigma05", "sigma05")]
    looks = data.choose_styles(names)
    assert len({look.colour for look in looks.values()}) == len(names) and len(set(map(str, DASHES))) == len(DASHES)
    assert looks["mnist/at"].colour == OKABE_ITO["blue"], "a kind of training has its colour in every figure"
    assert data.choose_styles(["mnist/at"])["mnist/at"].colour == OKABE_ITO["blue"]


# ---- everything a person reads


CODE = """
import sys

class NoTorch:  # scipy looks into sys.modules, so a None there would not do
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoTorch())
from robbench.commands.app import app
for words in ("table all", "figure all", "leaderboard"):
    sys.argv = ["robbench", *words.split()]
    app(standalone_mode=False)
assert "torch" not in sys.modules
"""


@pytest.mark.whole
def test_everything_a_person_reads_comes_without_torch_and_twice_the_same(tree):
    def made():
        files = [p for p in Path(tree.parent).rglob("*") if p.suffix in (".md", ".csv", ".png")]
        return {str(p): p.read_bytes() for p in files}

    found = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", CODE], cwd=tree.parent, check=True, capture_output=True)
        found.append(made())
    names = {Path(p).name for p in found[0]}
    assert {
        "leaderboard.md",
        "shafahi2019-1.md",
        "shafahi2019-1.png",
        "accuracy-steps.csv",
        "shafahi2019-8.png",
    } <= names
    assert found[0] == found[1]


def test_open_bins_survive_the_csv(tree):
    written = write_figure(FigureData(Registry.default(), tree), FIGURES["shafahi2019-2"], "digits", tree / "figures")
    rows = pd.read_csv(io.BytesIO(written.paths[1].read_bytes()))
    assert np.isneginf(rows["low"].iloc[0]) and np.isposinf(rows["high"].max())
    assert rows["count"].sum() == 2 * 8990


def test_a_shrunk_png_looks_the_same_and_keeps_its_texts():
    figure = Figure(figsize=(4, 3), dpi=100)
    axes = figure.subplots()
    axes.imshow(np.linspace(0, 1, 400).reshape(20, 20), cmap="viridis")
    axes.plot(range(20), "o-", color="red")
    whole = io.BytesIO()
    figure.savefig(whole, metadata={"Title": "a figure"})
    small = shrink_png(whole.getvalue())
    before, after = Image.open(whole), Image.open(io.BytesIO(small))
    change = np.abs(np.asarray(before.convert("RGB"), int) - np.asarray(after.convert("RGB"), int))
    assert change.max() <= 24 and after.size == before.size and after.info["Title"] == "a figure"
    assert len(small) < 0.6 * len(whole.getvalue())
