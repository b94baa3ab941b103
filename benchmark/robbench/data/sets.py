"""The data sets: find, read, check and download their files.

`load` returns a `Dataset` in official order with a content digest. `describe_datasets` lists which data sets are on
this machine. `fetch` downloads one. Files may be damaged or hostile. Any problem with a file raises a `DataError` that
names the file. At import time only numpy is loaded, so that listing the data sets is fast.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from robbench.core.errors import DataError, unknown_name
from robbench.core.files import open_regular
from robbench.core.types import Dataset
from robbench.data.formats import DatasetSpec, Reader, convert_errors, read_batches, read_digits, read_idx, read_parquet

if TYPE_CHECKING:
    from robbench.core.types import Int64Array

__all__ = ["NAMES", "DataInfo", "describe_datasets", "fetch", "find_index_bounds", "load", "resolve_data_dir"]

_MOST_BYTES = 2**29  # limit for a download; the largest archive has 170 MB
_DIGITS = tuple("0123456789")
_FASHION = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_KRIZHEVSKY = "Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images"


_SPECS = {
    "digits": DatasetSpec(
        "Handwritten digits, 8×8", (1, 8, 8), 10, {"train": 898, "test": 899},
        "Alpaydin, Kaynak 1998 (UCI), as shipped with scikit-learn", _DIGITS, scale=16,
    ),
    "mnist": DatasetSpec(
        "MNIST", (1, 28, 28), 10, {"train": 60_000, "test": 10_000}, "LeCun, Cortes, Burges 1998", _DIGITS,
        torchvision="MNIST", folders=("mnist", "MNIST/raw", "."),
    ),
    # The files have the names of MNIST's files, so the data directory itself is not searched for them.
    "fashion_mnist": DatasetSpec(
        "Fashion-MNIST", (1, 28, 28), 10, {"train": 60_000, "test": 10_000},
        "Xiao, Rasul, Vollgraf 2017, arXiv:1708.07747", _FASHION,
        torchvision="FashionMNIST", folders=("fashion_mnist", "FashionMNIST/raw"),
    ),
    "cifar10": DatasetSpec(
        "CIFAR-10", (3, 32, 32), 10, {"train": 50_000, "test": 10_000}, _KRIZHEVSKY, _CIFAR10,
        torchvision="CIFAR10", archive="cifar-10-python.tar.gz", unpacked="cifar-10-batches-py",
        batches={"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
    ),
    "cifar100": DatasetSpec(
        "CIFAR-100", (3, 32, 32), 100, {"train": 50_000, "test": 10_000}, _KRIZHEVSKY,
        torchvision="CIFAR100", archive="cifar-100-python.tar.gz", unpacked="cifar-100-python",
        batches={"train": ["train"], "test": ["test"]}, label="fine_label",
    ),
}  # fmt: skip

NAMES: tuple[str, ...] = tuple(_SPECS)
"""The names of all data sets."""


# Digest of a test set -> name and number of images. The copy of CIFAR-10 lacks 20 images.
_DIGESTS = {
    "ea1145f99ab13f12e87d1cb9d2d17af46d83c0f55f259e0cc241ca40a013cb7a": ("digits", 899),
    "58307ebf296d64db3d8a15e3d10912cb175f169f6a7001b0af629d10c8420c6d": ("mnist", 10_000),
    "d481cf372e3ff7efcdb1358c7f3fe6654b76b32c956102916ba14e8eb01fb8da": ("cifar10", 9_980),
}


@dataclass(frozen=True, slots=True)
class DataInfo:
    """One line of `robbench list data`: the official facts, and whether the files are on this machine."""

    name: str
    title: str
    shape: tuple[int, int, int]  # (C, H, W)
    num_classes: int
    train: int  # official number of images; a local copy may hold fewer
    test: int
    available: bool  # the files of the test split exist; they are not read
    where: str  # the folder of the files, or how to get them
    source: str  # the source to cite


def resolve_data_dir(path: str | Path | None = None) -> Path:
    """Return the data directory: `path`, or the variable ROBBENCH_DATA, or `~/.cache/robbench/data`."""
    return Path(path or os.environ.get("ROBBENCH_DATA") or "~/.cache/robbench/data").expanduser()


def load(name: str, split: Literal["train", "test"] = "test", data_dir: str | Path | None = None) -> Dataset:
    """Read one split: x [N, C, H, W] uint8, y [N] and index [N] int64, in official order.

    `digits` is split as in scikit-learn's example 'Recognizing hand-written digits', by `train_test_split` with
    `test_size=0.5, shuffle=False`: the first 898 images train, the last 899 test. That split is published, so it was
    not chosen to favour a defence. It also keeps the order, in which the digits of one writer follow each other. The
    two halves are therefore more likely to come from different writers than after a shuffle.

    Raises:
        DataError: the name or split is unknown, or the files are missing, incomplete or damaged.
    """
    spec = _spec(name)
    if split not in spec.sizes:
        raise DataError(unknown_name(f"split of {name}", split, spec.sizes))
    root = resolve_data_dir(data_dir)
    found = _find(name, split, root)
    if found is None:
        raise DataError(
            f"The {split} split of {name} is not in {root}.\nEither run `robbench data fetch {name}`, which "
            f"fills {root / name}, or set ROBBENCH_DATA or --data-dir to a directory that holds one of\n  "
            + "\n  ".join(_layouts(name, split))
        )
    read, files = found
    # The official indices of digits count through both splits.
    stop = sum(spec.sizes.values()) if name == "digits" else spec.sizes[split]
    xs, ys, indices = [], [], [np.full(1, -1, np.int64)]
    for where, images, labels, numbers in read(spec, split, files):
        first = int(indices[-1][-1]) + 1  # the lowest index that may come next
        numbers = range(first, first + len(images)) if numbers is None else numbers
        if not len(images) == len(labels) == len(numbers) > 0:
            raise DataError(f"{where}: {len(images)} images, {len(labels)} labels, {len(numbers)} indices.")
        xs.append(images)
        ys.append(_integers(labels, spec.num_classes, f"{where}: {spec.label}"))
        indices.append(_integers(numbers, stop, f"{where}: index"))
        unordered = np.flatnonzero(np.diff(indices[-1], prepend=first - 1) <= 0)
        if len(unordered):
            raise DataError(f"{where}: index in row {unordered[0]} is not above the index before it.")
    x, y, index = np.concatenate(xs), np.concatenate(ys), np.concatenate(indices[1:])
    # Canonical: scale and shape as text, then index and y as little-endian int64, then the pixels.
    digest = hashlib.sha256(" ".join(map(str, (spec.scale, *x.shape))).encode() + b"\n")
    for array in (index.astype("<i8"), y.astype("<i8"), x):
        digest.update(array.tobytes())
    return Dataset(name, split, x, y, index, spec.num_classes, spec.scale, digest.hexdigest(), spec.labels)


def find_index_bounds(name: str, digest: str, total: int) -> tuple[int, int]:
    """Return what is known of the official indices of a test set that need not be on this machine.

    Args:
        name: the data set, or what a user called images of their own.
        digest: digest of the test set.
        total: number of images that a result claims for the test set.

    Returns:
        The lowest index, and how many indices the test set leaves out at most.

    Raises:
        DataError: the digest is that of a test set with another name or another number of images. Or the images are
            not those of the named test set: of `digits` and `mnist`, the digest of the complete set is known.
    """
    known = _DIGESTS.get(digest, (name, total))
    if known != (name, total):
        raise DataError(f"a test set {name} of {total} images is named; the digest is that of {known[0]}, {known[1]}")
    spec = _SPECS.get(name)
    if spec and digest not in _DIGESTS and (name, spec.sizes["test"]) in _DIGESTS.values():
        raise DataError(f"the images are not those of the test set {name} (digest {digest[:8]})")
    if name == "digits":  # the official indices count through both splits
        return _SPECS[name].sizes["train"], 0
    lacking = 0 if spec is None else spec.sizes["test"] - total
    return 0, max(lacking, 0)  # more images than the official ones are the user's own


def describe_datasets(data_dir: str | Path | None = None) -> list[DataInfo]:
    """List all data sets and whether their files exist. Only file names are looked at."""
    root, rows = resolve_data_dir(data_dir), []
    for name, spec in _SPECS.items():
        try:
            test, train = _find(name, "test", root), _find(name, "train", root)
            where = f"run `robbench data fetch {name}`"
            if test:
                where = str(test[1][0].parent) if test[1] else "comes with scikit-learn"
                where += "" if train else " (test only)"
        except DataError as error:  # some shards are missing: name them, and go on with the other data sets
            test, where = None, str(error)
        info = DataInfo(
            name, spec.title, spec.shape, spec.num_classes, spec.sizes["train"], spec.sizes["test"],
            test is not None, where, spec.source,
        )  # fmt: skip
        rows.append(info)
    return rows


def fetch(name: str, data_dir: str | Path | None, report: Callable[[str], None]) -> list[Path]:
    """Download a data set into DIR/name and return its files. `report` gets one line of text per event.

    Addresses and MD5 checksums are those of torchvision. A file gets its final name only when it is complete and its
    checksum is right. An existing file with the right checksum is kept, and one with another checksum is replaced.

    Raises:
        DataError: the name is unknown, or no address gave a file with the right checksum.
    """
    spec = _spec(name)
    if not spec.torchvision:
        report(f"{name}: comes with scikit-learn, nothing to download")
        return []
    # Imported here, because the import takes seconds and no other function needs it.
    from torchvision import datasets

    table = getattr(datasets, spec.torchvision)
    wanted = [(table.filename, table.tgz_md5)] if spec.archive else table.resources
    folder = resolve_data_dir(data_dir) / name
    for file, md5 in wanted:
        target = folder / file
        with convert_errors(f"{target}: cannot be stored"):
            folder.mkdir(parents=True, exist_ok=True)
            if target.exists():
                with open_regular(target, _MOST_BYTES) as stream:
                    kept = hashlib.file_digest(stream, "md5").hexdigest() == md5
                report(f"{target}: {'kept, checksum right' if kept else 'wrong checksum, to be replaced'}")
                if kept:
                    continue
        failures = []
        for url in _addresses(table, file, bool(spec.archive)):
            report(f"{target}: downloading {url}")
            try:
                _download(url, target, md5)
                report(f"{target}: {target.stat().st_size:,} bytes, checksum right")
                break
            except DataError as error:
                failures.append(str(error))
        else:
            raise DataError(
                "\n  ".join([f"{name}: {file} could not be downloaded.", *failures])
                + f"\nTry again later, or put by hand into {folder}: {', '.join(file for file, _ in wanted)}."
            )
    return [folder / file for file, _ in wanted]


def _download(url: str, target: Path, md5: str) -> None:
    """Download to a temporary file beside `target`, check the checksum, then rename the file."""
    digest = hashlib.md5(usedforsecurity=False)
    with convert_errors(url), _open_url(url) as response:
        part = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
        out = part.open("xb")  # a new file: no link leads it elsewhere, and no pipe stops it
        try:
            with out:
                while block := response.read(1 << 20):
                    if out.tell() + len(block) > _MOST_BYTES:
                        raise ValueError(f"more than {_MOST_BYTES:,} bytes came; the download was stopped")
                    digest.update(block)
                    out.write(block)
                out.flush()
                os.fsync(out.fileno())
                size = out.tell()
            if digest.hexdigest() != md5:
                raise ValueError(f"wrong checksum, md5 {digest.hexdigest()} of {size:,} bytes, not {md5}")
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


class _Secure(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to an address that `_check_secure` allows."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        """Check the new address, then follow it."""
        _check_secure(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open_url(url: str) -> Any:
    """Open an address, with a time limit."""
    _check_secure(url)
    return urllib.request.build_opener(_Secure).open(url, timeout=60)


def _check_secure(url: str) -> None:
    """Refuse unencrypted downloads, because others could change them on the way. This machine itself is allowed."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "https" and (parts.scheme, parts.hostname) != ("http", "127.0.0.1"):
        raise ValueError("refused, downloads come over https only")


def _addresses(table: Any, file: str, packed: bool) -> list[str]:
    """List the addresses of a file. A bucket that torchvision names by its http web site gets its https address."""
    urls = [table.url] if packed else [mirror + file for mirror in table.mirrors]
    return [re.sub(r"^http://([^/]+)\.s3-website\.([^/]+)/", r"https://\1.s3.\2/", url) for url in urls]


def _spec(name: str) -> DatasetSpec:
    if name not in _SPECS:
        raise DataError(unknown_name("data set", name, NAMES))
    return _SPECS[name]


def _idx_names(split: str) -> tuple[str, str]:
    prefix = "t10k" if split == "test" else split
    return f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"


def _layouts(name: str, split: str) -> list[str]:
    """Describe the files that `_find` looks for, in the same order."""
    spec = _SPECS[name]
    if spec.folders:
        files = " and ".join(f"{file}[.gz]" for file in _idx_names(split))
        return [f"{folder}/ with {files}" for folder in spec.folders]
    official = [f"{place}{what}" for place in (f"{name}/", "") for what in (spec.unpacked, spec.archive)]
    return [*official, f"{name}/{split}-*-of-*.parquet"]


def _find(name: str, split: str, root: Path) -> tuple[Reader, list[Path]] | None:
    """Find the files of one split and their reader.

    The official archive has priority over Parquet files: it is complete, and `fetch` downloads it.
    """
    spec = _SPECS[name]
    if name == "digits":
        return read_digits, []
    for folder in (root / place for place in spec.folders):
        both = [[p for p in (folder / f"{s}.gz", folder / s) if p.is_file()] for s in _idx_names(split)]
        if all(both):
            return read_idx, [either[0] for either in both]
    if not spec.archive:
        return None
    for path in (place / what for place in (root / name, root) for what in (spec.unpacked, spec.archive)):
        if path.exists():
            return read_batches, [path]
    shards = sorted((root / name).glob(f"{split}-{'[0-9]' * 5}-of-{'[0-9]' * 5}.parquet"))
    if not shards:
        return None
    total = shards[-1].stem[-5:]
    complete = [root / name / f"{split}-{i:05d}-of-{total}.parquet" for i in range(int(total))]
    missing = [path.name for path in complete if path not in shards]
    if missing:
        raise DataError(f"{root / name}: {len(missing)} files are missing: {', '.join(missing[:5])}")
    if len(shards) > len(complete):
        raise DataError(f"{root / name}: {shards[0].name} and {shards[-1].name} are of different copies.")
    return read_parquet, shards


def _integers(values: Sequence[Any], stop: int, what: str) -> Int64Array:
    """Check that all values are integers in [0, stop)."""
    for row, value in enumerate(values):
        if not isinstance(value, int) or not 0 <= value < stop:
            raise DataError(f"{what} in row {row} is {value!r}, expected an integer from 0 to {stop - 1}.")
    return np.asarray(values, np.int64)
