"""The pictures of a model's page. Imports no torch.

A page shows no picture of the results tree, because nothing says what such a picture was drawn from. Each picture of a
page is drawn from numbers that are vouched for. The files of the tree say only which pictures to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from robbench.core.errors import ResultError
from robbench.masking.record import LANDSCAPE, SHEET, sanity_folder
from robbench.report.escape import flatten_text
from robbench.report.figures.canvas import render_png
from robbench.report.figures.captions import CAPTIONS, SHEET_CAPTION, SWEEP_CAPTION
from robbench.report.figures.gallery import plan_gallery
from robbench.report.figures.robustness import plan_classes_figure, plan_eps_figure, plan_steps_figure
from robbench.report.figures.source import FigureData, FigurePlan
from robbench.report.sheet import draw_sheet
from robbench.report.site.standing import Standing
from robbench.report.sweep import draw_sweep, read_sweep
from robbench.results.schema import ResultFile

__all__ = ["Drawing", "list_drawings"]

_FIGURES: dict[str, tuple[Callable[[FigureData, str, str], FigurePlan], str]] = {
    "accuracy-eps": (plan_eps_figure, "Robust accuracy over the radius"),
    "accuracy-steps": (plan_steps_figure, "Robust accuracy over the number of steps of PGD"),
    "per-class": (plan_classes_figure, "Robust accuracy, class by class"),
    "gallery": (plan_gallery, "Images and their adversarial examples"),
}


class Drawing(NamedTuple):
    """A picture that is not drawn yet.

    Attributes:
        name: its path in the results tree.
        caption: what it shows.
        draw: returns the bytes of a PNG. Raises RobbenchError.
    """

    name: Path
    caption: str
    draw: Callable[[], bytes]


def list_drawings(data: FigureData, standings: Sequence[Standing], results: Sequence[ResultFile]) -> Iterator[Drawing]:
    """Yield the pictures of one model.

    Args:
        data: the data of figures.
        standings: what is known of the model; not empty.
        results: results of the tree that `read_results` vouched for.
    """
    for standing in standings:
        if (file := standing.sanity) is not None:
            folder = sanity_folder(data.root, file)
            caption = f"The checks for gradient masking, {standing.threat}. {SHEET_CAPTION}"
            name = (folder / SHEET).relative_to(data.root)
            yield Drawing(name, caption, partial(draw_sheet, file, folder / LANDSCAPE))
    base = standings[0].base
    own = [r for r in results if (r.dataset, r.model) == (base.dataset, base.model)]
    for path in sorted((data.root / base.dataset / base.model).glob("*@sweep-*.csv")):
        name = path.with_suffix(".png").relative_to(data.root)
        caption = f"Accuracy under each attack over the radius, {flatten_text(path.stem)}. {SWEEP_CAPTION}"
        yield Drawing(name, caption, partial(_draw_sweep, data.root, path, own))
    for figure, (_, caption) in _FIGURES.items():
        name = Path("figures", base.dataset, f"{figure}.png")
        if (data.root / name).exists():
            draw = partial(_draw_figure, data, figure, base.dataset)
            yield Drawing(name, f"{caption}, for the models of {base.dataset}. {CAPTIONS[figure]}", draw)


def _draw_sweep(root: Path, path: Path, results: Sequence[ResultFile]) -> bytes:
    return draw_sweep(read_sweep(root, path, results))


def _draw_figure(data: FigureData, figure: str, dataset: str) -> bytes:
    make, caption = _FIGURES[figure]
    try:
        plan = make(data, f"{caption}, {dataset}", dataset)
    except ModuleNotFoundError as error:
        raise ResultError(f"figures/{dataset}/{figure}.png: {error.name} is not installed here.") from None
    if plan.numbers is None:
        raise ResultError(f"figures/{dataset}/{figure}.png: nothing is stored to draw it from.")
    return render_png(plan.paint, {"Title": figure})
