"""The figure of a training run, drawn from its log."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from robbench.core.errors import ResultError
from robbench.core.files import read_json_lines, write_atomically

__all__ = ["draw_curve"]

_MOST_BYTES = 2**24
_COLUMNS = ("iteration", "loss", "clean", "robust")


def draw_curve(log: Path, output: Path, title: str) -> None:
    """Draw the loss over iterations as a PNG, with clean and quick robust accuracy if the log has them.

    Raises:
        ResultError: the log is empty or damaged.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _read_log(log)
    if not lines:
        raise ResultError(f"The log {log} is empty. Train for at least one point of the log, then draw it again.")
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.subplots()
    left.plot([line["iteration"] for line in lines], [line["loss"] for line in lines], color="#444444", label="loss")
    left.set_xlabel("iteration")
    left.set_ylabel("loss (mean since the last point)")
    left.set_title(title)
    tested = [line for line in lines if "clean" in line]
    if tested:
        right = left.twinx()
        at = [line["iteration"] for line in tested]
        # Different markers and colours that people with any colour vision can distinguish.
        right.plot(at, [100 * line["clean"] for line in tested], "o-", color="#0072B2", label="clean accuracy")
        right.plot(at, [100 * line["robust"] for line in tested], "s--", color="#D55E00", label="quick robust accuracy")
        right.set_ylim(0, 100)
        right.set_ylabel("accuracy on 128 test images, %")
        right.legend(loc="center right", frameon=False)
    left.legend(loc="upper left", frameon=False)
    content = io.BytesIO()
    figure.savefig(content, dpi=120)
    write_atomically(output, content.getvalue())


def _read_log(log: Path) -> list[dict[str, Any]]:
    try:
        lines = read_json_lines(log, _MOST_BYTES)
        for line in lines:
            for key in _COLUMNS if "clean" in line else _COLUMNS[:2]:
                float(line[key])
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ResultError(f"The log {log} cannot be read ({type(error).__name__}: {error}).") from None
    return lines
