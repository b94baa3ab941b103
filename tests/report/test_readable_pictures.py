"""Pictures are readable: what a verdict is about, radii as k/255, marks beside each other, captions, no empty chart."""

from __future__ import annotations

import io
import re

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from robbench.masking.record import LANDSCAPE, read_sanity
from robbench.models.card import Registry
from robbench.papers.audit import audit_claims, read_references
from robbench.papers.audit_page import plan_audit_figure
from robbench.papers.figures.definitions import FIGURES
from robbench.report.figures.canvas import (
    add_caption,
    add_footnote,
    add_legend_below,
    make_figure,
    render_png,
    set_log_axis,
)
from robbench.report.figures.robustness import plan_eps_figure
from robbench.report.figures.source import FigureData
from robbench.report.sheet import paint_sheet
from robbench.report.verdict import describe_verdict

WHOLE = pytest.mark.whole
VERDICTS = ["trustworthy", "masked", "undecided"]


@pytest.fixture
def sheet(repo):
    """Paint the stored sheet of a model, after changes of its file and measurements."""

    def paint(model, measurements=None, **changes):
        folder = repo / "results" / model / "sanity"
        file = read_sanity(folder / "sanity.json")
        changed = file.measurements.model_copy(update=measurements or {})
        return paint_sheet(
            file.model_copy(update={"measurements": changed, **changes}), pd.read_parquet(folder / LANDSCAPE)
        )

    return paint


@pytest.fixture(scope="module")
def data(repo):
    return FigureData(Registry.default(), repo / "results")


def read_texts(figure):
    """Return the texts of a figure: text -> colour. Labels of axes are known after the figure was drawn."""
    return {t.get_text(): to_hex(t.get_color()) for t in figure.findobj(Text) if t.get_visible() and t.get_text()}


def is_green(colour):
    red, green, blue = to_rgb(colour)
    return green > 1.3 * max(red, blue)


@pytest.mark.parametrize("verdict", VERDICTS)
def test_the_sheet_says_what_the_verdict_is_about(sheet, verdict):
    texts = read_texts(sheet("cifar10/natural", verdict=verdict))
    (statement,) = [text for text in texts if text.startswith("The usual PGD leaves 0.0% robust: ")]
    assert statement.endswith(describe_verdict(verdict)) and "this number" in statement
    assert not is_green(texts[statement]), "a model of 0 % is not praised"
    assert verdict.upper() not in texts
    assert ("can be trusted" in statement) == (verdict == "trustworthy")


@pytest.mark.parametrize(
    ("model", "shown"),
    [("cifar10/natural", ["0", "2/255", "4/255", "8/255", "16/255", "32/255", "whole box"]), ("digits/at", None)],
)
def test_radii_of_the_sheet_are_written_as_the_threat_is(sheet, model, shown):
    figure = sheet(model)
    axis = next(a for a in figure.get_axes() if a.get_xlabel().startswith("eps"))
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == (shown or ["0", "0.05", "0.1", "0.2", "0.4", "0.8", "whole box"])


@WHOLE
def test_a_chart_without_bars_is_a_sentence(sheet, repo):
    def read_chart(broken, given):
        original = sheet_file.measurements.challenges
        challenges = [c.model_copy(update={"broken": broken, "alone": 0, "given": given}) for c in original]
        figure = sheet("digits/at", {"challenges": challenges})
        axis = next(a for a in figure.get_axes() if a.get_title().startswith("What other attacks break"))
        bars = [p for p in axis.patches if isinstance(p, Rectangle)]
        return bars, " ".join(t.get_text().replace("\n", " ") for t in axis.texts), axis.axison

    sheet_file = read_sanity(repo / "results/digits/at/sanity/sanity.json")
    bars, text, framed = read_chart(0, 91)
    assert not bars and not framed and "None of the 91 images" in text and "Square-500" in text
    bars, text, framed = read_chart(0, 0)
    assert not bars and not framed and "left no image" in text
    bars, text, framed = read_chart(3, 91)
    assert len(bars) == len(sheet_file.measurements.challenges) and framed and "None of" not in text


@WHOLE
def test_no_label_of_a_sheet_is_a_power_with_decimals(sheet):
    figure = sheet("cifar10/natural")
    figure.canvas.draw()
    texts = read_texts(figure)
    assert "0.01" in texts and not [text for text in texts if re.search(r"\\times|mathdefault|\de-?\d|×10", text)]


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ((0.4, 8), {"0.5", "1", "1.5", "2", "3", "5", "7"}),
        ((0.00002, 0.4), {"0.0001", "0.0003", "0.01", "3·10⁻⁵"}),
        ((1e-12, 1e-9), {"10⁻¹⁰", "3·10⁻¹¹"}),
        ((20, 5000), {"30", "100", "1,000"}),
    ],
)
@pytest.mark.parametrize("vertical", [False, True])
def test_labels_of_a_logarithmic_axis_are_plain_numbers(values, labels, vertical):
    figure = make_figure(5, 5)
    axes = figure.subplots()
    axes.plot(values, values)
    set_log_axis(axes, vertical)
    figure.canvas.draw()
    axis = axes.yaxis if vertical else axes.xaxis
    shown = {label.get_text() for label in axis.get_ticklabels()}
    assert labels <= shown and not [text for text in shown if "e" in text or "$" in text]


@WHOLE
@pytest.mark.parametrize(("dataset", "in_levels"), [("cifar10", True), ("digits", False)])
def test_radii_of_figures_are_levels_where_the_usual_radius_is(data, dataset, in_levels):
    figure = plan_eps_figure(data, "title", dataset).paint()
    figure.canvas.draw()
    axes = [a for a in figure.get_axes() if a.get_visible() and a.get_xlabel()]
    labels = [label.get_text() for a in axes for label in a.get_xticklabels()]
    assert len(axes) > 1 and labels
    assert all(re.fullmatch(r"\d+/255|0|-.*", text) for text in labels) == in_levels
    assert ("8/255" in labels) == in_levels


@WHOLE
def test_marks_of_one_radius_are_beside_each_other(data):
    figure = plan_eps_figure(data, "title", "cifar10").paint()
    axes = next(a for a in figure.get_axes() if "ls095_sigma30" in a.get_title())
    marks = np.array([c.lines[0].get_xydata()[0] for c in axes.containers])
    at_radius = np.sort(marks[marks[:, 0] > 0.01, 0])
    assert len(at_radius) == 5, "FGSM-CW, and the worst case of four suites"
    assert (np.diff(at_radius) > 0.0005).all() and at_radius.mean() == pytest.approx(8 / 255)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_says_what_to_see(name):
    caption = FIGURES[name].caption
    assert caption.startswith("What to see: ") and caption.endswith(".") and 60 < len(caption) < 400


@pytest.mark.parametrize("with_legend", [True, False])
def test_a_caption_is_below_the_panels_and_covers_nothing(with_legend):
    caption = "What to see: " + "a long sentence " * 20
    figure = make_figure(6, 4)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label="a line")
    if with_legend:
        add_legend_below(figure, [axes], "A note.")
    add_caption(figure, caption)
    figure.canvas.draw()
    (text,) = [t for t in figure.findobj(Text) if t.get_text().startswith("What to see")]
    box, plot = text.get_window_extent(), axes.get_tightbbox()
    assert " ".join(text.get_text().split()).startswith(caption.strip())
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 and box.y1 <= plot.y0


@pytest.mark.parametrize("word", ["a long sentence ", "WIDE LETTERS "])
@pytest.mark.parametrize("with_legend", [True, False])
def test_a_long_line_of_a_footnote_is_wrapped_and_short_ones_stay(with_legend, word):
    figure = make_figure(6, 4)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], label="a line")
    note = "A first line.\n" + word * 20
    add_legend_below(figure, [axes], note) if with_legend else add_footnote(figure, note)
    figure.canvas.draw()
    (text,) = [t for t in figure.findobj(Text) if t.get_text().startswith("A first")]
    box = text.get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and text.get_text().startswith(f"A first line.\n{word}")


def test_the_caption_is_also_in_the_file():
    with Image.open(io.BytesIO(render_png(lambda: make_figure(3, 3), {"Title": "t"}, "What to see."))) as image:
        assert image.text["Description"] == "What to see."


def test_the_figure_of_the_audit_spreads_equal_numbers(tmp_path):
    plan = plan_audit_figure(audit_claims(Registry.default(), tmp_path), read_references())
    assert plan.caption
    (axes,) = plan.paint().get_axes()
    points = [tuple(point) for marks in axes.collections for point in marks.get_offsets()]
    heights = {round(float(y) % 1, 3) for _, y in points}
    assert len(points) == len(set(points)) and len(heights) == 3, "the usual, the best and the AutoAttack number"
