"""The common style of all figures, and their PNG files. A user's matplotlibrc has no effect."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text
    from matplotlib.transforms import Transform

__all__ = [
    "DASHES",
    "MARKERS",
    "OKABE_ITO",
    "add_caption",
    "add_footnote",
    "add_legend_below",
    "format_level",
    "make_figure",
    "make_panels",
    "plain_text",
    "render_png",
    "set_level_axis",
    "set_log_axis",
    "shift_marks",
    "shrink_png",
]

OKABE_ITO = {
    "black": "#000000",
    "blue": "#0072B2",
    "vermillion": "#D55E00",
    "green": "#009E73",
    "purple": "#CC79A7",
    "orange": "#E69F00",
    "sky": "#56B4E9",
    "grey": "#7F7F7F",
}
"""Colours that people with any colour vision can distinguish (Okabe & Ito 2008), with grey instead of yellow."""

DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (9, 3)))
"""Line styles. They distinguish lines without colours."""

MARKERS = "os^Dv<>"

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # part of matplotlib, so it is the same on every machine
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.titlesize": 10.5,
    "text.parse_math": False,  # a name from a file may hold $; our own formulas ask for it
}
_DPI = 110
_MIN_WIDTH = 7.6  # inches; holds a title and a legend of three columns
_NOTE_SIZE, _NOTE_COLOUR = 7.5, "#444444"
_NOTE_LINES = 4  # lines of a note that a figure has room for
_FEWEST_COLUMNS = 20  # a line is not made shorter


@contextmanager
def _common_style() -> Iterator[None]:
    import matplotlib as mpl

    defaults: dict[Any, Any] = {k: v for k, v in mpl.rcParamsDefault.items() if not k.startswith("backend")}
    with mpl.rc_context(defaults | _STYLE):
        yield


@contextmanager
def plain_text() -> Iterator[None]:
    """Draw the text of figures as it is. A name from a file, such as m$^$, is no formula."""
    import matplotlib as mpl

    with mpl.rc_context({"text.parse_math": False}):
        yield


def make_figure(width: float, height: float) -> Figure:
    """Make an empty figure. Sizes are in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def make_panels(
    panels: int, below: str, left: str, columns: int = 3, width: float = 3.4, height: float = 2.9
) -> tuple[Figure, list[Axes]]:
    """Make a figure of panels of the same size, row by row. They share both axes and labels. Sizes are in inches."""
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = make_figure(max(width * columns, _MIN_WIDTH), height * rows + 0.9)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten().tolist()
    for unused in axes[panels:]:
        unused.set_visible(False)
    for i, ax in enumerate(axes[:panels]):
        if i % columns == 0:
            ax.set_ylabel(left)
        if i + columns >= panels:  # the lowest panel of its column
            ax.set_xlabel(below)
            ax.tick_params(labelbottom=True)
    return figure, axes[:panels]


def set_log_axis(axes: Axes, vertical: bool = False) -> None:
    """Make an axis logarithmic, with tick labels such as 1, 3, 10, 30. Draw the data first.

    An axis of less than a factor of 30 has more labels.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (axes.set_yscale if vertical else axes.set_xscale)("log")
    axis = axes.yaxis if vertical else axes.xaxis
    low, high = axes.get_ylim() if vertical else axes.get_xlim()
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0) if high >= 30 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: _format_tick(value)))
    axis.set_minor_formatter(NullFormatter())


def _format_tick(value: float) -> str:
    """Format a positive number as 0.0003, or as 3·10⁻⁷ if it has too many zeros."""
    if value >= 0.9e-4:
        return f"{value:,.6f}".rstrip("0").rstrip(".")
    lead, _, power = f"{value:.1e}".partition("e")
    ten = "10" + str(int(power)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return ten if lead == "1.0" else f"{lead.removesuffix('.0')}·{ten}"


def format_level(value: float) -> str:
    """Format a radius in [0, 1] as a number of pixel levels, such as 8/255."""
    return f"{255 * value:.3g}/255" if value else "0"


def set_level_axis(axes: Axes, top: float) -> None:
    """Give the horizontal axis labels such as 2/255 and 4/255, at most six up to `top`."""
    from matplotlib.ticker import FuncFormatter, MultipleLocator

    step = next(step for step in (1, 2, 4, 8, 16, 32, 64) if 255 * top < 6 * step or step == 64)
    axes.xaxis.set_major_locator(MultipleLocator(step / 255))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_level(round(255 * value) / 255)))


def shift_marks(axes: Axes, position: int, count: int) -> Transform:
    """Return the transform that draws the marks of one of `count` series beside those of the others.

    Marks with equal numbers would otherwise lie on each other. The shift is in points, so it changes no axis.
    """
    from matplotlib.transforms import ScaledTranslation

    points = 4.5 * (position - (count - 1) / 2)
    return axes.transData + ScaledTranslation(points / 72, 0, axes.figure.dpi_scale_trans)


def add_legend_below(figure: Figure, axes: Sequence[Axes], note: str = "", columns: int = 2) -> None:
    """Put one legend for all panels below the panels, with a note in small print above the legend.

    Long lines of the note are wrapped to the figure's width.
    """
    handles: dict[str, Any] = {}
    for panel in axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    legend = figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(columns, len(handles)),
        handlelength=3.2,
        title=note or None,
        title_fontsize=_NOTE_SIZE,
    )
    title = legend.get_title()
    title.set_color(_NOTE_COLOUR)
    title.set_text(_wrap_lines(figure, note, title))


def add_footnote(figure: Figure, note: str) -> None:
    """Put a note in small print below a figure without a legend. Long lines are wrapped to the figure's width.

    The figure grows by the height of the lines that `make_figure` has no room for.
    """
    label = figure.supxlabel("", fontsize=_NOTE_SIZE, color=_NOTE_COLOUR)
    label.set_text(_wrap_lines(figure, note, label))
    _grow(figure, label.get_text().count("\n") + 1 - _NOTE_LINES)


def _wrap_lines(figure: Figure, note: str, label: Text) -> str:
    """Wrap the lines of small print so that they fit into a figure. `label` has the font, and is changed."""
    canvas: Any = figure.canvas
    columns = int(17 * figure.get_size_inches()[0])
    while True:
        wrapped = "\n".join(textwrap.fill(line, columns) for line in note.splitlines())
        label.set_text(wrapped)
        if columns < _FEWEST_COLUMNS or label.get_window_extent(canvas.get_renderer()).width <= figure.bbox.width:
            return wrapped
        columns = 9 * columns // 10  # the letters of this note are wide


def _grow(figure: Figure, lines: int) -> None:
    """Make a figure higher by so many lines of small print."""
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.15 * max(lines, 0))


def add_caption(figure: Figure, caption: str) -> None:
    """Put a caption below the panels, above the small print. The figure grows by its height."""
    title = figure.legends[0].get_title() if figure.legends else None
    label = title or figure.supxlabel(figure.get_supxlabel(), fontsize=_NOTE_SIZE, color=_NOTE_COLOUR)
    note = label.get_text()
    label.set_fontsize(_NOTE_SIZE)
    label.set_color(_NOTE_COLOUR)
    text = _wrap_lines(figure, caption, label)
    _grow(figure, text.count("\n") + 1)
    text = "\n".join(filter(None, [text, note]))
    if title is None:
        label.set_text(text)
    else:
        figure.legends[0].set_title(text)
        title.set_fontsize(_NOTE_SIZE)


def render_png(paint: Callable[[], Figure], text: dict[str, str], caption: str = "") -> bytes:
    """Paint a figure and return the bytes of a PNG.

    The file holds no date and no version. The same numbers give the same bytes with the same version of matplotlib.

    Args:
        paint: makes the figure.
        text: metadata of the file.
        caption: what the figure shows, below it and in the metadata.
    """
    about = {"Software": None, **text} | ({"Description": caption} if caption else {})
    with _common_style():
        figure, content = paint(), io.BytesIO()
        if caption:
            add_caption(figure, caption)
        figure.savefig(content, dpi=_DPI, metadata=about)
    return shrink_png(content.getvalue())


def shrink_png(content: bytes) -> bytes:
    """Return a PNG with at most 256 colours, a third of the bytes. Its resolution and its texts are kept."""
    from PIL import Image, PngImagePlugin

    picture = Image.open(io.BytesIO(content))
    texts = PngImagePlugin.PngInfo()
    for key, value in picture.info.items():
        if isinstance(key, str) and isinstance(value, str):
            texts.add_text(key, value)
    shrunk = io.BytesIO()
    few = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(shrunk, "PNG", optimize=True, pnginfo=texts, dpi=picture.info["dpi"])
    return shrunk.getvalue()
