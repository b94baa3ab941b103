"""The pictures of a results tree that a model's page shows. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from robbench.core.errors import ResultError
from robbench.core.files import read_bounded, refuse_links
from robbench.masking.record import SHEET, sanity_folder
from robbench.report.escape import flatten_text
from robbench.report.figures.captions import CAPTIONS, SHEET_CAPTION, SWEEP_CAPTION
from robbench.report.site.standing import Standing

__all__ = ["list_pictures", "read_picture"]

_MOST = 2**25  # bytes of a picture
_PNG = b"\x89PNG\r\n\x1a\n"
_FIGURES = {
    "accuracy-eps": "Robust accuracy of all models of this data set over the radius.",
    "accuracy-steps": "Robust accuracy of all models of this data set over the steps of each attack.",
    "per-class": "Robust accuracy of all models of this data set, class by class.",
    "gallery": "Images, and their adversarial examples, for the models of this data set.",
}


def list_pictures(root: Path, standings: Sequence[Standing]) -> Iterator[tuple[Path, str]]:
    """Yield the pictures about one model, and captions.

    A picture of the gradient-masking checks counts only if their numbers can be vouched for. The caller leaves
    pictures of models and data sets out that have damaged results, because nothing says what they were drawn from.

    Args:
        root: the results tree.
        standings: what is known of the model; not empty.
    """
    for standing in standings:
        if (file := standing.sanity) is not None:
            path = sanity_folder(root, file) / SHEET
            if path.exists():
                yield path, f"The checks for gradient masking, {standing.threat}. {SHEET_CAPTION}"
    base = standings[0].base
    for path in sorted((root / base.dataset / base.model).glob("*.png")):
        yield path, f"Accuracy under each attack over the radius, {flatten_text(path.stem)}. {SWEEP_CAPTION}"
    for name, caption in _FIGURES.items():
        path = root / "figures" / base.dataset / f"{name}.png"
        if path.exists():
            yield path, f"{caption} {CAPTIONS[name]}"


def read_picture(root: Path, path: Path) -> bytes:
    """Read a picture of a results tree.

    Raises:
        ResultError: it is no PNG, or cannot be read.
        StorageError: a link leads to it.
    """
    refuse_links(root, path)
    try:
        data = read_bounded(path, _MOST)
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not data.startswith(_PNG):
        raise ResultError(f"{path} is no PNG.")
    return data
