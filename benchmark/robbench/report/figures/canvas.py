"""How every figure looks, and how it becomes bytes: one style, whatever a user's matplotlibrc says, and no dates."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DASHES", "MARKERS", "OKABE_ITO", "blank", "footnote", "grid", "legend_below", "log_axis", "png"]

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
"""Colours that are told apart with any colour vision (Okabe & Ito 2008), and a grey in place of their yellow."""

DASHES = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (9, 3)))
"""Line styles, so that no reader needs the colours."""

MARKERS = "os^Dv<>"

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, so it is the same everywhere
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
}
_DPI = 110
_NARROWEST = 7.6  # inches: room for a title and three columns of a legend
_SMALL, _SOFT = 7.5, "#444444"


@contextmanager
def _house_style() -> Iterator[None]:
    import matplotlib as mpl

    defaults: dict[Any, Any] = {k: v for k, v in mpl.rcParamsDefault.items() if not k.startswith("backend")}
    with mpl.rc_context(defaults | _STYLE):
        yield


def blank(width: float, height: float) -> Figure:
    """Make an empty figure, sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def grid(
    panels: int, below: str, left: str, columns: int = 3, width: float = 3.4, height: float = 2.9
) -> tuple[Figure, list[Axes]]:
    """Make a figure of panels of one size (inches), row by row, that share both axes and their labels."""
    columns = min(columns, panels)
    rows = -(-panels // columns)
    figure = blank(max(width * columns, _NARROWEST), height * rows + 0.9)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten().tolist()
    for unused in axes[panels:]:
        unused.set_visible(False)
    for i, ax in enumerate(axes[:panels]):
        if i % columns == 0:
            ax.set_ylabel(left)
        if i + columns >= panels:  # the lowest of its column
            ax.set_xlabel(below)
            ax.tick_params(labelbottom=True)
    return figure, axes[:panels]


def log_axis(axes: Axes, vertical: bool = False) -> None:
    """Make an axis logarithmic, with its numbers written out: 1, 3, 10, 30."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    (axes.set_yscale if vertical else axes.set_xscale)("log")
    axis = axes.yaxis if vertical else axes.xaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_below(figure: Figure, axes: Sequence[Axes], note: str = "", columns: int = 2) -> None:
    """Put one legend for all panels below them, where it covers nothing, and a note in small print over it."""
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
        title_fontsize=_SMALL,
    )
    legend.get_title().set_color(_SOFT)


def footnote(figure: Figure, note: str) -> None:
    """Print a note in small print at the foot of a figure without a legend."""
    figure.supxlabel(note, fontsize=_SMALL, color=_SOFT)


def png(paint: Callable[[], Figure], text: dict[str, str]) -> bytes:
    """Paint a figure and return the bytes of a PNG.

    Args:
        paint: makes the figure.
        text: what the file says of itself beside the picture. Neither a date nor a version is added, so the same
            numbers give the same bytes with the same matplotlib.
    """
    with _house_style():
        content = io.BytesIO()
        paint().savefig(content, dpi=_DPI, metadata={"Software": None, **text})
    return content.getvalue()
