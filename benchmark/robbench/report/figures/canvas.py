"""The common style of all figures, and their PNG files. A user's matplotlibrc has no effect."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DASHES",
    "MARKERS",
    "OKABE_ITO",
    "add_footnote",
    "add_legend_below",
    "make_figure",
    "make_panels",
    "plain_text",
    "render_png",
    "set_log_axis",
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
    """Make an axis logarithmic, with tick labels such as 1, 3, 10, 30."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (axes.set_yscale if vertical else axes.set_xscale)("log")
    axis = axes.yaxis if vertical else axes.xaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def add_legend_below(figure: Figure, axes: Sequence[Axes], note: str = "", columns: int = 2) -> None:
    """Put one legend for all panels below the panels, with a note in small print above the legend."""
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
    legend.get_title().set_color(_NOTE_COLOUR)


def add_footnote(figure: Figure, note: str) -> None:
    """Put a note in small print below a figure without a legend."""
    figure.supxlabel(note, fontsize=_NOTE_SIZE, color=_NOTE_COLOUR)


def render_png(paint: Callable[[], Figure], text: dict[str, str]) -> bytes:
    """Paint a figure and return the bytes of a PNG.

    The file holds no date and no version. The same numbers give the same bytes with the same version of matplotlib.

    Args:
        paint: makes the figure.
        text: metadata of the file.
    """
    with _common_style():
        content = io.BytesIO()
        paint().savefig(content, dpi=_DPI, metadata={"Software": None, **text})
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
