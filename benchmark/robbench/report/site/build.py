"""Writes the site into a folder. The same results give the same bytes. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from robbench.certify.interval import CertificateIndex, find_contradictions
from robbench.core.errors import RobbenchError, StorageError
from robbench.core.files import read_bounded, refuse_links, write_atomically
from robbench.masking.stored import VerdictIndex
from robbench.models.card import Registry
from robbench.report.figures.source import FigureData
from robbench.report.site.card import describe_card
from robbench.report.site.compare import make_comparison
from robbench.report.site.model_page import Picture, make_model_page
from robbench.report.site.overview import make_model_path, make_overview
from robbench.report.site.page import make_path
from robbench.report.site.paper_page import PaperPage, make_paper_page, make_table_index
from robbench.report.site.pictures import Drawing, list_drawings
from robbench.report.site.standing import list_standings
from robbench.results.reader import read_results

__all__ = ["MANIFEST", "write_site"]

MANIFEST = "robbench-report.txt"
"""Lists the files of the site. The next report removes those that it does not write again."""
_MOST = 2**24  # bytes of the manifest


def write_site(
    root: Path, out: Path, registry: Registry, papers: Sequence[PaperPage], note: Callable[[str], None]
) -> int:
    """Write the site, and remove files of an older site in the folder. Other files stay.

    Args:
        root: the results tree.
        out: the folder of the site.
        registry: the cards.
        papers: the tables of papers.
        note: called with a sentence about each picture that is left out.

    Returns:
        Number of pages.

    Raises:
        RobbenchError: the folder has files, and none of them says that they are a site.
        StorageError: the folder cannot be written, or a link leads out of it.
    """
    old = _read_manifest(out)
    files = _make_files(root, registry, papers, note)
    for name in [*files, *old]:
        refuse_links(out, out / name)
    # First the list of all files, old and new: whatever happens next, the following report removes what is stale.
    _write_manifest(out, {*files, *old})
    for name, data in files.items():
        write_atomically(out / name, data)
    for name in old - set(files):
        (out / name).unlink(missing_ok=True)
    _write_manifest(out, set(files))
    return sum(name.endswith(".html") for name in files)


def _make_files(
    root: Path, registry: Registry, papers: Sequence[PaperPage], note: Callable[[str], None]
) -> dict[str, bytes]:
    """Make all files: path in the site's folder -> content."""
    stored = read_results(root)
    verdicts, certificates = VerdictIndex(root), CertificateIndex(root)
    damaged = [*stored.damaged, *verdicts.list_damaged(), *certificates.list_damaged()]
    damage = {f"{d.name}: {d.reason}": "/".join(PurePosixPath(d.name).parts[:2]) for d in damaged}
    standings = list_standings(root, stored.results, verdicts, certificates)
    names = sorted({s.full_name for s in standings} | set(damage.values()))
    pages = {
        "index.html": make_overview(standings, list(damage), find_contradictions(root)),
        "compare.html": make_comparison([s for s in standings if not s.is_quick]),
        "tables.html": make_table_index(papers),
    }
    pages |= {f"tables/{page.name}.html": make_paper_page(page, set(names)) for page in papers}
    drawn: dict[Path, bytes] = {}  # path in the results tree -> PNG; empty if it cannot be drawn
    data = FigureData(registry, root)
    for name in names:
        own = [s for s in standings if s.full_name == name]
        broken = [line for line, model in damage.items() if model == name]
        pictures = []
        for drawing in list_drawings(data, own, stored.results) if own else ():
            if drawing.name not in drawn:  # models share the figures of a data set
                drawn[drawing.name] = _draw(drawing, note)
            if drawn[drawing.name]:
                pictures.append(Picture(make_path("pictures", *drawing.name.parts), drawing.caption))
        card = describe_card(registry, name, {str(s.base.identity.get("weights")) for s in own})
        pages[unquote(make_model_path(name))] = make_model_page(name, own, card, pictures, broken)
    files = {"/".join(("pictures", *name.parts)): content for name, content in drawn.items() if content}
    return {name: text.encode() for name, text in pages.items()} | files


def _draw(drawing: Drawing, note: Callable[[str], None]) -> bytes:
    try:
        return drawing.draw()
    except RobbenchError as error:
        note(f"Left out: {error}")
        return b""


def _write_manifest(out: Path, names: set[str]) -> None:
    refuse_links(out, out / MANIFEST)
    write_atomically(out / MANIFEST, "".join(f"{name}\n" for name in sorted(names)).encode())


def _read_manifest(out: Path) -> set[str]:
    """Read which files of a folder are an older site.

    Raises:
        RobbenchError: the folder has files and no list, or the list names a file outside the folder.
        StorageError: the list cannot be read.
    """
    path = out / MANIFEST
    if not path.exists():
        if out.is_dir() and any(out.iterdir()):
            raise RobbenchError(f"--out: {out} has files and is no report; give an empty or a new folder.")
        return set()
    try:
        names = read_bounded(path, _MOST).decode().splitlines()
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read: {error}. Remove the folder.") from None
    for name in names:
        parts = PurePosixPath(name).parts
        if not parts or ".." in parts or PurePosixPath(name).is_absolute():
            raise RobbenchError(f"{path}: {name!r} is no file of a report. Remove the folder.")
    return set(names)
