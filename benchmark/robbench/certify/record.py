"""The files of certificates. Imports no torch.

```
results/<dataset>/<model>/certified/<method>@<run_id>/certified.json           the summary (`CertifiedFile`)
results/<dataset>/<model>/certified/<method>@<run_id>/certificates.parquet     one row per image (`COLUMNS`)
results/<dataset>/<model>/certified/<method>@<run_id>/adversarials.safetensors the points that break an image
```

The folder has the first 8 digits of the run_id. `identity` is what derives a certificate again: method, version, model,
weights, data, threat, and the settings of the method.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from robbench.certify.radius import smoothing_radius
from robbench.core.errors import ResultError
from robbench.core.files import digest, digest_file, parse_json, write_atomically
from robbench.core.numbers import parse_threat
from robbench.core.parquet import encode_rows, read_flat_table
from robbench.results.adversarials import FILE as POINTS
from robbench.results.differences import list_differences
from robbench.results.reader import Damage
from robbench.results.schema import Accuracy, Answers, Component, Count, StrictModel, dump_sealed, read_validated
from robbench.results.selection import find_selection_error
from robbench.results.summary import make_accuracy

__all__ = [
    "COLUMNS",
    "FOLDER",
    "ROWS",
    "SUMMARY",
    "VERDICTS",
    "VERSIONS",
    "Certificates",
    "CertifiedFile",
    "certified_folder",
    "find_certified",
    "make_empty_rows",
    "read_certified",
    "read_certified_files",
    "read_tampered",
    "read_unfinished",
    "summarize_certified",
    "write_certified",
]

FOLDER = "certified"
SUMMARY, ROWS = "certified.json", "certificates.parquet"
VERSIONS = {"exact": 2, "bounds": 2, "smoothing": 1}
"""Of each method; increased whenever the meaning of a verdict or a number of it changes."""
_MOST_BYTES = 2**30

Method = Literal["exact", "bounds", "smoothing"]
VERDICTS = ("proven", "broken", "open", "misclassified", "wrong")
"""proven: every point of the ball has the true class. broken: the judge confirmed a point. open: neither is known; of
smoothing, it abstains. misclassified: the model errs on the clean image. wrong: smoothing certifies another class."""

COLUMNS = {
    "sample": "int64",  # official index
    "label": "int64",  # true class
    "verdict": "str",  # one of `VERDICTS`
    "prediction": "int64",  # clean class; of a broken image the class at its point; of smoothing the class it votes for
    "margin": "float64",  # a lower bound of logit y minus any other logit over the ball; NaN if none is known
    "radius": "float64",  # radius that is certified, 0 if none is
    "count": "int64",  # smoothing: draws that voted for the class; 0 for the other methods
    "seconds": "float64",
    "limit": "float64",  # time limit of the image in seconds; 0 for smoothing
}
"""The columns of certificates.parquet, in order."""


class CertifiedFile(StrictModel):
    """The content of certified.json. Its numbers follow from certificates.parquet, `run_id` from `identity`."""

    schema_version: Literal[1]
    run_id: str
    model: Component
    dataset: Component
    method: Method
    n: Count
    total: Count
    """Number of images of the whole test set."""
    selection: str
    counts: dict[str, int]
    """Number of images of each verdict."""
    certified: Accuracy
    """Share of the images that are proven, with the 95 % interval."""
    identity: dict[str, Any]
    seconds: float
    hardware: str
    versions: dict[str, str]
    date: str
    answers: Answers = Field(default_factory=list)
    files: dict[str, str]
    """SHA-256 of certificates.parquet and, where an image is broken, of adversarials.safetensors."""

    @property
    def is_always_sealed(self) -> bool:
        """All versions seal."""
        return True

    @property
    def is_current(self) -> bool:
        """Whether the method is still the one that made the certificates."""
        return bool(self.identity.get("certify") == VERSIONS[self.method])

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of the method."""
        settings: dict[str, Any] = self.identity["settings"]
        return settings


def certified_folder(root: Path, dataset: str, model: str, identity: dict[str, Any]) -> Path:
    """Return the folder of a results tree that holds the certificates of an identity."""
    return root / dataset / model / FOLDER / f"{identity['method']}@{digest(identity)[:8]}"


def make_empty_rows() -> pd.DataFrame:
    """Make a frame with the columns of the certificates and no rows."""
    return pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in COLUMNS.items()})


def summarize_certified(rows: pd.DataFrame, identity: dict[str, Any], described: dict[str, Any]) -> CertifiedFile:
    """Compute the summary of certificates. `described` holds the fields that do not follow from them."""
    counts = {name: int((rows["verdict"] == name).sum()) for name in VERDICTS}
    return CertifiedFile(
        schema_version=1,
        run_id=digest(identity),
        identity=identity,
        method=identity["method"],
        n=len(rows),
        counts={name: count for name, count in counts.items() if count},
        certified=make_accuracy(counts["proven"], len(rows)),
        seconds=round(float(rows["seconds"].sum()), 3),
        **described,
    )


def write_certified(folder: Path, file: CertifiedFile, rows: pd.DataFrame, points: bytes | None) -> CertifiedFile:
    """Write certificates and points, then their summary with the digests of both, which is returned."""
    content = encode_rows(rows[list(COLUMNS)].astype(COLUMNS), {"run_id": file.run_id})
    data = {ROWS: content} | ({} if points is None else {POINTS: points})
    file = file.model_copy(update={"files": {n: hashlib.sha256(d).hexdigest() for n, d in data.items()}})
    (folder / SUMMARY).unlink(missing_ok=True)
    for name in (POINTS, ROWS):  # a row that is broken has its point on disk
        if name in data:
            write_atomically(folder / name, data[name])
    write_atomically(folder / SUMMARY, dump_sealed(file))
    return file


Certificates = tuple[CertifiedFile, pd.DataFrame]
"""A summary and its rows."""


def read_certified_files(root: Path, model: str = "*/*") -> tuple[list[Certificates], list[Damage]]:
    """Read all certificates of a results tree, or of one model of it, and list the damaged ones."""
    files, damaged = [], []
    for path in sorted(root.glob(f"{model}/{FOLDER}/*/{SUMMARY}")):
        try:
            file, rows = read_certified(path.parent)
            if certified_folder(root, file.dataset, file.model, file.identity) != path.parent:
                raise ResultError(f"{path} is of {file.dataset}/{file.model}, run {file.run_id[:8]}.")
            files.append((file, rows))
        except ResultError as error:
            damaged.append(Damage.of(root, path.parent, error))
    return files, damaged


def read_certified(folder: Path) -> Certificates:
    """Read certificates. The summary must follow from the rows, the radii of smoothing from the counts.

    Raises:
        ResultError: a file is missing or damaged, or the parts contradict each other.
    """
    path = folder / SUMMARY
    try:
        file = read_validated(path, CertifiedFile, 2**26)
        for name in {ROWS, *file.files}:
            if name not in (ROWS, POINTS) or _digest(folder / name) != file.files.get(name):
                raise ResultError(f"{folder / name}: not as it was written (SHA-256).")
        rows = _read_rows(folder / ROWS, file.run_id)
        kept = {name: getattr(file, name) for name in _KEPT}
        again = summarize_certified(rows, file.identity, kept)
        for field, given, derived in list_differences("", file.model_dump(), again.model_dump()):
            raise ResultError(f"{path}: {field} is {given!r}; {derived!r} follows from {ROWS}.")
        if problem := _find_wrong_row(file, rows):
            raise ResultError(f"{folder / ROWS}: {problem}.")
    except (KeyError, TypeError, ValueError) as error:
        raise ResultError(f"{path}: its identity cannot be read ({type(error).__name__}: {error}).") from None
    except ResultError as error:
        raise ResultError(f"{error} Certify again: give its `robbench certify` command with --overwrite.") from None
    return file, rows


_KEPT = ("model", "dataset", "total", "selection", "hardware", "versions", "date", "answers", "files")
"""Fields that do not follow from other data. They are taken as stored."""


def _find_wrong_row(file: CertifiedFile, rows: pd.DataFrame) -> str:
    """Explain which row contradicts the identity; empty if none does."""
    verdict, radius = rows["verdict"], rows["radius"].to_numpy()
    if not verdict.isin(VERDICTS).all():
        return f"verdict {verdict[~verdict.isin(VERDICTS)].iloc[0]!r} given; allowed: {', '.join(VERDICTS)}"
    error = find_selection_error(
        rows["sample"].to_numpy(),
        selection=file.selection,
        sample_seed=None,
        dataset=file.dataset,
        data=file.identity["data"],
    )
    if error:
        return error
    right = rows["prediction"] == rows["label"]
    if file.method == "smoothing":
        given = file.settings
        expected = np.array([
            smoothing_radius(int(c), given["draws"], given["alpha"], given["sigma"]) for c in rows["count"]
        ])  # fmt: skip
        voted = np.where(expected == 0, "open", np.where(right, "proven", "wrong"))
    else:
        threat = parse_threat(file.identity["threat"]["norm"], file.identity["threat"]["eps"])
        expected = np.where(verdict == "proven", float(threat.eps), 0.0)
        voted = verdict.where((verdict != "proven") | (right & (rows["margin"] > 0)), "open").to_numpy()
        voted = np.where((verdict == "misclassified") & right, "open", voted)
    for wrong, what in ((voted != verdict.to_numpy(), "verdict"), (np.abs(radius - expected) > 1e-9, "radius")):
        if wrong.any():
            at = int(np.argmax(wrong))
            return f"sample {rows['sample'].iloc[at]}: {what} {rows[what].iloc[at]} does not follow from its row"
    return ""


def read_tampered(folder: Path) -> Certificates:
    """Read certificates that were changed after they were written, as far as they can be read.

    Raises:
        ResultError: a file is missing or cannot be parsed.
    """
    file = read_validated(folder / SUMMARY, CertifiedFile, 2**26, changed=True)
    return file, _read_rows(folder / ROWS, file.run_id)


def read_unfinished(folder: Path, run_id: str) -> pd.DataFrame | None:
    """Read the rows of a run that was stopped while it wrote its summary; None if there are none of this run."""
    try:
        return _read_rows(folder / ROWS, run_id)
    except ResultError:
        return None


def _digest(path: Path) -> str:
    try:
        return digest_file(path, _MOST_BYTES)
    except OSError as error:
        raise ResultError(f"{path} cannot be read: {error.strerror or error}.") from None


def _read_rows(path: Path, run_id: str) -> pd.DataFrame:
    try:
        table = read_flat_table(path, _MOST_BYTES)
        about = parse_json((table.schema.metadata or {}).get(b"robbench", b"{}"))
        frame = table.to_pandas(ignore_metadata=True)
        if list(frame.columns) != list(COLUMNS):
            raise ValueError(f"columns {list(frame.columns)} given; expected {list(COLUMNS)}")
        rows: pd.DataFrame = frame.astype(COLUMNS)
    except Exception as error:  # a damaged or hostile file can make the reader raise anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ResultError(f"{path} cannot be read ({reason}).") from None
    if not isinstance(about, dict) or about.get("run_id") != run_id:
        raise ResultError(f"{path}: of another run.")
    return rows


def find_certified(path: Path) -> Path | None:
    """Return the folder of certificates that a path names, or None."""
    folder = path.parent if path.name == SUMMARY else path
    return folder if (folder / SUMMARY).is_file() else None
