"""adversarials.safetensors: the adversarial example of every break, and a digest of each. Imports no torch.

A file has up to one group of tensors per number format, `float16/…` and `float32/…` (or `float64/…`):

- `x_adv` [n, C, H, W], the points;
- `sample` [n] int64, official indices;
- `attack` [n] int64, positions in the list `attacks` of the metadata;
- `sha256` [n, 32] uint8, what `row_digest` makes of each row. It is made once, when the point is found, and carried on
  from there: a file that is merged or extended does not vouch for what was changed in between.

The metadata hold one key, `robbench`, with JSON: version, run_id, attacks, and the SHA-256 of every tensor.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from robbench.core.errors import ResultError

__all__ = ["FILE", "Adversarials", "Points", "list_entries", "merge", "pack", "read", "row_digest"]

FILE = "adversarials.safetensors"
_VERSION = 1
_FORMATS = ("float16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class Points:
    """Adversarial examples of one number format.

    Attributes:
        sample: official indices, [n] int64.
        attack: names of the stages, [n].
        x: the points, [n, C, H, W].
        sha256: digest of each row, [n, 32] uint8.
    """

    sample: NDArray[np.int64]
    attack: NDArray[np.str_]
    x: NDArray[Any]
    sha256: NDArray[np.uint8]

    @classmethod
    def of(cls, run_id: str, sample: NDArray[np.int64], attack: NDArray[np.str_], x: NDArray[Any]) -> Points:
        """Take points that were just found."""
        digests = [
            row_digest(run_id, int(s), str(a), row) for s, a, row in zip(sample, attack, x, strict=True)
        ]  # fmt: skip
        made = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
        return cls(sample, attack, x, made)

    def __len__(self) -> int:
        """Count the points."""
        return len(self.sample)


@dataclass(frozen=True, eq=False)
class Adversarials:
    """What a file holds.

    Attributes:
        run_id: of the run that it belongs to.
        points: by number format.
        altered: names of tensors that are not those that were written.
    """

    run_id: str
    points: list[Points]
    altered: list[str]


def row_digest(run_id: str, sample: int, attack: str, x: NDArray[Any]) -> bytes:
    """SHA-256 over what a row says: whose break, by which attack of which run, and the point's bytes."""
    head = json.dumps([run_id, sample, attack, x.dtype.name, list(x.shape)])
    return hashlib.sha256(head.encode() + b"\0" + np.ascontiguousarray(x).tobytes()).digest()


def pack(points: Sequence[Points], run_id: str, attacks: Sequence[str]) -> bytes:
    """Make a file of points, at most one group per number format; the same points give the same bytes.

    Args:
        points: what it is to hold.
        run_id: of the run.
        attacks: names of its stages.
    """
    place = {name: i for i, name in enumerate(attacks)}
    tensors: dict[str, NDArray[Any]] = {}
    for group in points:
        at = np.array([place[a] for a in group.attack.tolist()], dtype=np.int64)
        columns = {"x_adv": group.x, "sample": group.sample, "attack": at, "sha256": group.sha256}
        tensors |= {f"{group.x.dtype.name}/{key}": np.ascontiguousarray(value) for key, value in columns.items()}
    about = {
        "version": _VERSION,
        "run_id": run_id,
        "attacks": list(attacks),
        "sha256": {name: _digest(value) for name, value in tensors.items()},
    }
    # One key only: the order of several would differ from run to run.
    packed: bytes = safetensors.numpy.save(tensors, {"robbench": json.dumps(about, sort_keys=True)})
    return packed


def read(path: Path) -> Adversarials:
    """Read a file.

    Raises:
        ResultError: it is not readable as one. Tensors that are readable and were changed are named, not refused.
    """
    with _reading(path) as file:
        about = _about(file, path)
        names = sorted(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    groups = sorted({name.partition("/")[0] for name in names})
    altered = [n for n in sorted({*names, *about["sha256"]}) if _changed(tensors.get(n), about["sha256"].get(n))]
    return Adversarials(about["run_id"], [_group(g, tensors, about["attacks"], path) for g in groups], altered)


def list_entries(path: Path) -> pd.DataFrame:
    """List which points a file holds, without reading them: columns sample and attack.

    Raises:
        ResultError: it is not readable.
    """
    with _reading(path) as file:
        attacks = _about(file, path)["attacks"]
        keys = sorted(name for name in file.keys() if name.endswith("/sample"))  # noqa: SIM118  # not a dictionary
        rows = [(file.get_tensor(k), file.get_tensor(k.replace("/sample", "/attack"))) for k in keys]
    return pd.concat(
        [_EMPTY, *(pd.DataFrame({"sample": s, "attack": _named(a, attacks)}) for s, a in rows)], ignore_index=True
    )


def merge(parts: Iterable[Points], wanted: pd.DataFrame) -> list[Points]:
    """Pick the points of these rows, in their order.

    Args:
        parts: where to look; of two points of the same row the first counts.
        wanted: columns sample and attack.

    Returns:
        One group per number format. Rows without a point are left out.
    """
    parts = list(parts)
    where = [
        pd.DataFrame({"sample": p.sample, "attack": p.attack, "part": i, "row": np.arange(len(p))})
        for i, p in enumerate(parts)
    ]
    found = pd.concat([_EMPTY.assign(part=0, row=0), *where]).drop_duplicates(["sample", "attack"])
    chosen = wanted[["sample", "attack"]].merge(found, on=["sample", "attack"])
    format_of = chosen["part"].map({i: p.x.dtype.name for i, p in enumerate(parts)})
    groups = []
    for _, rows in chosen.groupby(format_of):
        at = list(zip(rows["part"].astype(int), rows["row"].astype(int), strict=True))
        groups.append(
            Points(
                rows["sample"].to_numpy(np.int64),
                rows["attack"].to_numpy(np.str_),
                np.stack([parts[p].x[r] for p, r in at]),
                np.stack([parts[p].sha256[r] for p, r in at]),
            )
        )
    return groups


_EMPTY = pd.DataFrame({"sample": pd.Series(dtype="int64"), "attack": pd.Series(dtype="str")})


def _digest(value: NDArray[Any]) -> str:
    return hashlib.sha256(value.tobytes()).hexdigest()


def _changed(value: NDArray[Any] | None, expected: object) -> bool:
    return value is None or _digest(value) != expected


def _named(at: NDArray[np.int64], attacks: Sequence[str]) -> NDArray[np.str_]:
    """Turn positions into names; a position that is none (a file that was tampered with) keeps its number."""
    return np.array([attacks[i] if 0 <= i < len(attacks) else f"attack number {i}" for i in at.tolist()], dtype=np.str_)


def _about(file: Any, path: Path) -> dict[str, Any]:
    try:
        about = json.loads((file.metadata() or {})["robbench"])
        version, run_id, attacks, digests = (about[key] for key in ("version", "run_id", "attacks", "sha256"))
    except (KeyError, TypeError, ValueError):
        raise ResultError(
            f"{path} is not a file of adversarial examples: its metadata do not say of which run."
        ) from None
    if version != _VERSION or not (isinstance(attacks, list) and isinstance(digests, dict)):
        raise ResultError(f"{path}: version {version!r} given; this robbench reads version {_VERSION}.")
    return {"run_id": str(run_id), "attacks": [str(a) for a in attacks], "sha256": digests}


def _group(name: str, tensors: dict[str, NDArray[Any]], attacks: Sequence[str], path: Path) -> Points:
    columns = [tensors.get(f"{name}/{key}") for key in ("x_adv", "sample", "attack", "sha256")]
    x, sample, attack, digests = columns
    if x is None or sample is None or attack is None or digests is None:
        raise ResultError(f"{path}: group {name!r} lacks one of x_adv, sample, attack, sha256.")
    n = len(sample) if sample.ndim else 0
    shapes = (x.shape[:1], sample.shape, attack.shape, digests.shape)
    kinds = (x.dtype.name, sample.dtype.name, attack.dtype.name, digests.dtype.name)
    if name not in _FORMATS or kinds != (name, "int64", "int64", "uint8") or shapes != ((n,), (n,), (n,), (n, 32)):
        raise ResultError(f"{path}: group {name!r} holds {kinds} of shapes {shapes}; see docs/files.md for the format.")
    return Points(sample, _named(attack, attacks), x, digests)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Open a file; whatever a damaged one provokes in the parser becomes a ResultError."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except ResultError:
        raise
    except Exception as error:  # whatever a damaged or hostile file provokes in the parser
        raise ResultError(f"{path} cannot be read ({error}): not a file of adversarial examples, or damaged.") from None
