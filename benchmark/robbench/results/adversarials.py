"""adversarials.safetensors: the adversarial example of every break, with a digest of each. Imports no torch.

A file has at most one group of tensors per number format, `float16/…` and `float32/…` (or `float64/…`):

- `x_adv` [n, C, H, W], the points;
- `sample` [n] int64, official indices;
- `attack` [n] int64, positions in the list `attacks` of the metadata;
- `sha256` [n, 32] uint8, the digest of each row (`row_digest`). It is computed once, when the point is found, and
  copied afterwards. So a merged file still shows that a point was changed before the merge.

The metadata has one key, `robbench`, with JSON: version, run_id, attacks, and the SHA-256 of every tensor.
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
from robbench.core.files import open_regular, parse_json

__all__ = ["FILE", "Adversarials", "Points", "list_entries", "merge", "pack", "read", "row_digest"]

FILE = "adversarials.safetensors"
_VERSION = 1
_MOST_BYTES = 2**36
_FORMATS = ("float16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class Points:
    """Adversarial examples of one number format.

    Attributes:
        sample: official indices, [n] int64.
        attack: names of the stages, [n].
        x: the points, [n, C, H, W].
        sha256: digest of each row, [n, 32] uint8, see `row_digest`.
    """

    sample: NDArray[np.int64]
    attack: NDArray[np.str_]
    x: NDArray[Any]
    sha256: NDArray[np.uint8]

    @classmethod
    def of(cls, run_id: str, sample: NDArray[np.int64], attack: NDArray[np.str_], x: NDArray[Any]) -> Points:
        """Make `Points` of points that were just found, with their digests."""
        digests = [
            row_digest(run_id, int(s), str(a), row) for s, a, row in zip(sample, attack, x, strict=True)
        ]  # fmt: skip
        sha256 = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
        return cls(sample, attack, x, sha256)

    def __len__(self) -> int:
        """Count the points."""
        return len(self.sample)


@dataclass(frozen=True, eq=False)
class Adversarials:
    """The content of a file.

    Attributes:
        run_id: the run of the file.
        points: one group per number format.
        altered: names of tensors whose SHA-256 is not the stored one.
    """

    run_id: str
    points: list[Points]
    altered: list[str]


def row_digest(run_id: str, sample: int, attack: str, x: NDArray[Any]) -> bytes:
    """SHA-256 of a row: run, sample, attack, dtype, shape and bytes of the point."""
    head = json.dumps([run_id, sample, attack, x.dtype.name, list(x.shape)])
    return hashlib.sha256(head.encode() + b"\0" + np.ascontiguousarray(x).tobytes()).digest()


def pack(points: Sequence[Points], run_id: str, attacks: Sequence[str]) -> bytes:
    """Return the bytes of a file of points. The same points give the same bytes.

    Args:
        points: the points, at most one group per number format.
        run_id: the run.
        attacks: names of the run's stages.
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
    # One key only, because the order of several keys would differ from run to run.
    packed: bytes = safetensors.numpy.save(tensors, {"robbench": json.dumps(about, sort_keys=True)})
    return packed


def read(path: Path) -> Adversarials:
    """Read a file.

    Raises:
        ResultError: the file cannot be read. A tensor that can be read but was changed is no error: see `altered`.
    """
    with _open(path) as file:
        about = _read_metadata(file, path)
        names = sorted(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    groups = sorted({name.partition("/")[0] for name in names})
    altered = [n for n in sorted({*names, *about["sha256"]}) if _is_altered(tensors.get(n), about["sha256"].get(n))]
    return Adversarials(about["run_id"], [_read_group(g, tensors, about["attacks"], path) for g in groups], altered)


def list_entries(path: Path) -> pd.DataFrame:
    """List the samples and attacks of a file's points, without reading the points: columns sample and attack.

    Raises:
        ResultError: the file cannot be read.
    """
    with _open(path) as file:
        attacks = _read_metadata(file, path)["attacks"]
        keys = sorted(name for name in file.keys() if name.endswith("/sample"))  # noqa: SIM118  # not a dictionary
        rows = [(file.get_tensor(k), file.get_tensor(k.replace("/sample", "/attack"))) for k in keys]
        # Within the block, because tensors of other shapes or dtypes make no table.
        tables = [pd.DataFrame({"sample": s, "attack": _attack_names(a, attacks)}) for s, a in rows]
    return pd.concat([_EMPTY, *tables], ignore_index=True)


def merge(parts: Iterable[Points], wanted: pd.DataFrame) -> list[Points]:
    """Select the points of the given rows, in the order of the rows.

    Args:
        parts: all points. If a row has two points, the first one counts.
        wanted: the rows, with columns sample and attack.

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


def _is_altered(value: NDArray[Any] | None, expected: object) -> bool:
    return value is None or _digest(value) != expected


def _attack_names(at: NDArray[np.int64], attacks: Sequence[str]) -> NDArray[np.str_]:
    """Map positions to names. An invalid position (in a forged file) becomes `attack number i`."""
    return np.array([attacks[i] if 0 <= i < len(attacks) else f"attack number {i}" for i in at.tolist()], dtype=np.str_)


def _read_metadata(file: Any, path: Path) -> dict[str, Any]:
    try:
        about = parse_json((file.metadata() or {})["robbench"])
        version, run_id, attacks, digests = (about[key] for key in ("version", "run_id", "attacks", "sha256"))
    except (KeyError, TypeError, ValueError):
        raise ResultError(
            f"{path} is not a file of adversarial examples: its metadata does not name the run."
        ) from None
    if version != _VERSION or not (isinstance(attacks, list) and isinstance(digests, dict)):
        raise ResultError(f"{path}: version {version!r} given; this robbench reads version {_VERSION}.")
    return {"run_id": str(run_id), "attacks": [str(a) for a in attacks], "sha256": digests}


def _read_group(name: str, tensors: dict[str, NDArray[Any]], attacks: Sequence[str], path: Path) -> Points:
    columns = [tensors.get(f"{name}/{key}") for key in ("x_adv", "sample", "attack", "sha256")]
    x, sample, attack, digests = columns
    if x is None or sample is None or attack is None or digests is None:
        raise ResultError(f"{path}: group {name!r} lacks one of x_adv, sample, attack, sha256.")
    n = len(sample) if sample.ndim else 0
    shapes = (x.shape[:1], sample.shape, attack.shape, digests.shape)
    kinds = (x.dtype.name, sample.dtype.name, attack.dtype.name, digests.dtype.name)
    if name not in _FORMATS or kinds != (name, "int64", "int64", "uint8") or shapes != ((n,), (n,), (n,), (n, 32)):
        raise ResultError(f"{path}: group {name!r} holds {kinds} of shapes {shapes}; see docs/files.md for the format.")
    return Points(sample, _attack_names(attack, attacks), x, digests)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Open a file. Any error of the parser becomes a ResultError."""
    try:
        open_regular(path, _MOST_BYTES).close()  # the library takes a path only, and would wait for a pipe
        with safetensors.safe_open(path, framework="numpy") as file:
            yield file
    except ResultError:
        raise
    except Exception as error:  # a damaged or hostile file can make the parser raise anything
        raise ResultError(f"{path} cannot be read ({error}): not a file of adversarial examples, or damaged.") from None
