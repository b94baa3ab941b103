"""Data sets: every official file format is read exactly, damaged files are refused, and downloads are verified."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import importlib
import importlib.util
import io
import os
import pickle
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from robbench.core.errors import DataError
from robbench.data import sets as data
from support.datasets import batches, idx, labels, pixels, python2_batch

CIFAR = ["cifar10", "cifar100"]


# --- writers of the official formats -------------------------------------------------------------------------


def write_idx(folder: Path, images: np.ndarray, y: list[int], prefix: str = "t10k", packed: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array in [("images-idx3", images), ("labels-idx1", np.array(y, np.uint8))]:
        raw, name = idx(array), f"{prefix}-{kind}-ubyte"
        (folder / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(raw) if packed else raw)


def encode(image: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0) if image.ndim == 3 else image).save(out, kind, **options)
    return out.getvalue()


def write_parquet(
    root: Path,
    name: str,
    encoded: list[bytes],
    y: list[Any],
    split: str = "test",
    index: list[Any] | None = None,
    shards: int = 1,
) -> list[Path]:
    (root / name).mkdir(parents=True, exist_ok=True)
    paths = []
    for shard, rows in enumerate(np.array_split(np.arange(len(y)), shards)):
        columns: dict[str, list[Any]] = {
            "img": [{"bytes": encoded[i], "path": None} for i in rows],
            "fine_label" if name == "cifar100" else "label": [y[i] for i in rows],
        }
        if index is not None:
            columns["index"] = [index[i] for i in rows]
        paths.append(root / name / f"{split}-{shard:05d}-of-{shards:05d}.parquet")
        pq.write_table(pa.table(columns), paths[-1])
    return paths


def python3_batch(x: np.ndarray, y: list[int], key: bytes = b"labels") -> bytes:
    return pickle.dumps({b"data": x, key: y, b"batch_label": b"made by Python 3"}, protocol=2)


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = "cifar-100-python" if "100" in path.name else "cifar-10-batches-py"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in {"readme.html": b"hello", **files}.items():
            member = tarfile.TarInfo(f"{folder}/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def archive_name(name: str) -> str:
    return "cifar-100-python.tar.gz" if name == "cifar100" else "cifar-10-python.tar.gz"


# --- digits --------------------------------------------------------------------------------------------------


def test_digits_are_split_as_in_the_scikit_learn_example() -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, target = load_digits(return_X_y=True)
    parts = train_test_split(images, target, test_size=0.5, shuffle=False)
    train, test = data.load("digits", "train"), data.load("digits", "test")
    for dataset, x, y in [(train, parts[0], parts[2]), (test, parts[1], parts[3])]:
        assert np.array_equal(dataset.x.reshape(-1, 64), x)
        assert np.array_equal(dataset.y, y)
        assert (dataset.x.dtype, dataset.y.dtype, dataset.scale, dataset.x.max()) == (np.uint8, np.int64, 16, 16)
        assert dataset.x.shape == (len(y), 1, 8, 8)
    assert (len(train), len(test)) == (898, 899)
    assert np.array_equal(np.concatenate([train.index, test.index]), np.arange(1797))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"1,2,3\n", r"a table of \(3,\), expected \(1797, 65\)"),
        (b"17" + b",0" * 64 + b"\n" + (b"0" + b",0" * 64 + b"\n") * 1796, "numbers from 0 to 17, expected 0 to 16"),
        (b"-1" + b",0" * 64 + b"\n" + (b"0" + b",0" * 64 + b"\n") * 1796, "numbers from -1 to 0"),
        (b"0.5" + b",0" * 64 + b"\n" + (b"0" + b",0" * 64 + b"\n") * 1796, "0.5"),
        (b"", "digits.csv.gz: cannot be read"),
    ],
)
def test_a_damaged_file_of_digits_is_named(
    content: bytes, problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "sklearn"
    (package / "datasets/data").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "datasets/data/digits.csv.gz").write_bytes(gzip.compress(content) if content else b"no archive")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "sklearn", raising=False)
    with pytest.raises(DataError, match=problem) as found:
        data.load("digits")
    assert str(package) in str(found.value) and "install that again" in str(found.value)


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        data.load("digits")


def test_digits_digest_is_pinned() -> None:
    assert data.load("digits").digest == "ea1145f99ab13f12e87d1cb9d2d17af46d83c0f55f259e0cc241ca40a013cb7a"
    assert data.load("digits", "train").digest.startswith("d761effd7de1468e")


def test_digest_is_the_documented_form() -> None:
    dataset = data.load("digits")
    content = b"16 899 1 8 8\n" + dataset.index.tobytes() + dataset.y.tobytes() + dataset.x.tobytes()
    assert dataset.digest == hashlib.sha256(content).hexdigest()


# --- idx -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [True, False], ids=["gz", "raw"])
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("mnist", "mnist"),
        ("mnist", "MNIST/raw"),
        ("mnist", "."),
        ("fashion_mnist", "fashion_mnist"),
        ("fashion_mnist", "FashionMNIST/raw"),
    ],
)
def test_idx_files_are_read_packed_or_not(tmp_path: Path, name: str, folder: str, packed: bool) -> None:
    images, y = pixels(7, 28, 28), labels(7)
    write_idx(tmp_path / folder, images, y, packed=packed)
    write_idx(tmp_path / folder, images[:3], y[:3], "train", packed)
    dataset = data.load(name, "test", tmp_path)
    assert np.array_equal(dataset.x, images[:, None])
    assert dataset.y.tolist() == y
    assert dataset.index.tolist() == list(range(7))
    assert dataset.x.flags.writeable and dataset.x.flags.c_contiguous
    assert (dataset.name, dataset.scale, dataset.num_classes, len(dataset.labels)) == (name, 255, 10, 10)
    assert len(data.load(name, "train", tmp_path)) == 3


def test_fashion_mnist_is_not_taken_from_files_that_may_be_mnist(tmp_path: Path) -> None:
    write_idx(tmp_path, pixels(2, 28, 28), labels(2))
    with pytest.raises(DataError, match="not in"):
        data.load("fashion_mnist", "test", tmp_path)


IMAGES = idx(pixels(4, 28, 28))


@pytest.mark.parametrize(
    ("images", "y", "message"),
    [
        (IMAGES[:-1], [0] * 4, r"images-idx3-ubyte: 3151 bytes, expected 3152 for sizes \(4, 28, 28\)"),
        (IMAGES + b"\0", [0] * 4, "3153 bytes, expected 3152"),
        (
            IMAGES[:10],
            [0] * 4,
            "10 bytes starting with 00000803, expected an idx header, 16 bytes starting with 00000803",
        ),
        (b"", [0] * 4, "images-idx3-ubyte: 0 bytes starting with , expected an idx header"),
        (b"\0\0\x0d" + IMAGES[3:], [0] * 4, "starting with 00000d03, expected .* 00000803"),
        (idx(np.zeros(4, np.uint8)), [0] * 4, "starting with 00000801, expected .* 00000803"),
        (idx(pixels(4, 28, 27)), [0] * 4, r"images of \(28, 27\) pixels, expected \(28, 28\)"),
        (IMAGES, [0] * 3, "labels-idx1-ubyte: 4 images, 3 labels"),
        (IMAGES, [0, 1, 10, 2], "labels-idx1-ubyte: label in row 2 is 10, expected an integer from 0 to 9"),
        (idx(pixels(0, 28, 28)), [], "0 images"),
    ],
    ids=["short", "long", "header", "empty", "float", "labels", "shape", "lengths", "label", "none"],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, images: bytes, y: list[int], message: str) -> None:
    write_idx(tmp_path / "mnist", pixels(1, 28, 28), y, packed=False)
    (tmp_path / "mnist" / "t10k-images-idx3-ubyte").write_bytes(images)
    with pytest.raises(DataError, match=message):
        data.load("mnist", "test", tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "not gzip"])
def test_damaged_gzip_files_are_refused(tmp_path: Path, damage: str) -> None:
    write_idx(tmp_path / "mnist", pixels(4, 28, 28), labels(4))
    path = tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz"
    raw = bytearray(path.read_bytes())
    if damage == "truncated":
        del raw[-100:]
    else:
        raw[-6 if damage == "flipped" else 0] ^= 255
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"images-idx3-ubyte\.gz: cannot be read"):
        data.load("mnist", "test", tmp_path)


# --- CIFAR ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_cifar_format_gives_the_same_content_and_digest(tmp_path: Path, name: str, split: Any) -> None:
    x, y = pixels(10, 3, 32, 32), labels(10)
    encoded = {kind: [encode(image, kind, lossless=True) for image in x] for kind in ("PNG", "WEBP")}
    write_parquet(tmp_path / "png", name, encoded["PNG"], y, split)
    write_parquet(tmp_path / "webp", name, encoded["WEBP"], y, split, index=list(range(10)), shards=3)
    write_parquet(tmp_path / "counted", name, encoded["PNG"], y, split, shards=2)
    for root, writer in [("python2", python2_batch), ("python3", python3_batch)]:
        write_archive(tmp_path / root / name / archive_name(name), batches(name, x, y, split, writer))
    write_archive(tmp_path / "torchvision" / archive_name(name), batches(name, x, y, split))
    for root in ("folder", f"folders/{name}"):
        folder = tmp_path / root / ("cifar-100-python" if name == "cifar100" else "cifar-10-batches-py")
        folder.mkdir(parents=True)
        for file, content in batches(name, x, y, split).items():
            (folder / file).write_bytes(content)
    roots = sorted(path.name for path in tmp_path.iterdir())
    loaded = {root: data.load(name, split, tmp_path / root) for root in roots}
    assert len(loaded) == 8
    assert len({dataset.digest for dataset in loaded.values()}) == 1
    for dataset in loaded.values():
        assert np.array_equal(dataset.x, x)
        assert dataset.y.tolist() == y
        assert dataset.index.tolist() == list(range(10))
        assert dataset.num_classes == (100 if name == "cifar100" else 10)
        assert dataset.x.flags.writeable


def test_digest_depends_on_pixels_labels_and_indices(tmp_path: Path) -> None:
    x, y = pixels(3, 3, 32, 32), labels(3)
    other = x.copy()
    other[2, 0, 0, 0] ^= 1
    variants = [(x, y, [0, 1, 2]), (other, y, [0, 1, 2]), (x, [1, 1, 1], [0, 1, 2]), (x, y, [0, 1, 3])]
    digests = set()
    for images, targets, index in variants:
        write_parquet(tmp_path, "cifar10", [encode(image) for image in images], targets, index=index)
        digests.add(data.load("cifar10", "test", tmp_path).digest)
    assert len(digests) == 4


def test_gaps_keep_official_indices(tmp_path: Path) -> None:
    encoded = [encode(image) for image in pixels(4, 3, 32, 32)]
    write_parquet(tmp_path, "cifar10", encoded, labels(4), index=[0, 5, 6, 9999], shards=2)
    assert data.load("cifar10", "test", tmp_path).index.tolist() == [0, 5, 6, 9999]


def test_the_official_archive_comes_before_parquet(tmp_path: Path) -> None:
    x = pixels(3, 3, 32, 32)
    write_parquet(tmp_path, "cifar10", [encode(image) for image in x[:2]], labels(2))
    write_archive(tmp_path / "cifar10" / archive_name("cifar10"), batches("cifar10", x, labels(3)))
    assert len(data.load("cifar10", "test", tmp_path)) == 3


@pytest.mark.parametrize(
    ("y", "index", "message"),
    [
        ([0, 10, 1], None, "test-00000-of-00001.parquet: label in row 1 is 10, expected an integer from 0 to 9"),
        ([0, 1, -1], None, "label in row 2 is -1"),
        ([0, None, 1], None, "label in row 1 is None"),
        ([0.0, 1.0, 2.5], None, "label in row 0 is 0.0"),
        ([0, 1, 2], [0, 2, 2], "index in row 2 is not above the index before it"),
        ([0, 1, 2], [4, 3, 5], "index in row 1 is not above the index before it"),
        ([0, 1, 2], [0, 1, 10_000], "index in row 2 is 10000, expected an integer from 0 to 9999"),
        ([0, 1, 2], [0, 1, None], "index in row 2 is None"),
    ],
)
def test_wrong_labels_and_indices_in_parquet_are_refused(
    tmp_path: Path, y: list[Any], index: list[Any] | None, message: str
) -> None:
    write_parquet(tmp_path, "cifar10", [encode(image) for image in pixels(3, 3, 32, 32)], y, index=index)
    with pytest.raises(DataError, match=message):
        data.load("cifar10", "test", tmp_path)


GOOD = encode(pixels(1, 3, 32, 32)[0])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (GOOD[:-60], "image in row 1"),
        (b"", "image in row 1"),
        (None, "image in row 1"),
        (b"GIF89a", "image in row 1"),
        (encode(pixels(1, 3, 32, 32)[0], "JPEG"), "image in row 1"),  # not lossless
        (encode(pixels(1, 3, 32, 31)[0]), r"image in row 1: RGB \(31, 32\), expected RGB \(32, 32\)"),
        (encode(pixels(1, 32, 32)[0]), r"image in row 1: L \(32, 32\), expected RGB"),
        (encode(pixels(1, 4, 32, 32)[0]), r"image in row 1: RGBA \(32, 32\), expected RGB"),
    ],
    ids=["truncated", "empty", "null", "garbage", "jpeg", "size", "gray", "rgba"],
)
def test_damaged_images_are_refused(tmp_path: Path, image: Any, message: str) -> None:
    write_parquet(tmp_path, "cifar10", [GOOD, image], labels(2))
    with pytest.raises(DataError, match=rf"test-00000-of-00001\.parquet: {message}"):
        data.load("cifar10", "test", tmp_path)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    encoded = [encode(image) for image in pixels(5, 3, 32, 32)]
    paths = write_parquet(tmp_path, "cifar10", encoded, labels(5), "train", shards=5)
    for number in (2, 4):
        paths[number].unlink()
    message = "2 files are missing: train-00002-of-00005.parquet, train-00004-of-00005.parquet"
    with pytest.raises(DataError, match=message):
        data.load("cifar10", "train", tmp_path)
    info = {row.name: row for row in data.describe_datasets(tmp_path)}["cifar10"]
    assert not info.available and "train-00002-of-00005.parquet" in info.where


def test_two_copies_in_one_place_are_refused(tmp_path: Path) -> None:
    for shards in (1, 2):
        write_parquet(tmp_path, "cifar10", [GOOD] * 2, labels(2), shards=shards)
    with pytest.raises(DataError, match="of different copies"):
        data.load("cifar10", "test", tmp_path)


@pytest.mark.parametrize("content", [b"PAR1 but no more", b""])
def test_damaged_parquet_files_are_refused(tmp_path: Path, content: bytes) -> None:
    write_parquet(tmp_path, "cifar10", [GOOD], [1])[0].write_bytes(content)
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet: not a Parquet file"):
        data.load("cifar10", "test", tmp_path)


def test_parquet_of_another_data_set(tmp_path: Path) -> None:
    path = write_parquet(tmp_path, "cifar10", [GOOD], [1])[0]
    (tmp_path / "cifar100").mkdir()
    path.rename(tmp_path / "cifar100" / path.name)
    with pytest.raises(DataError, match="fine_label"):
        data.load("cifar100", "test", tmp_path)


# --- hostile archives ----------------------------------------------------------------------------------------


class Touch:
    """Unpickled without care, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class System(Touch):
    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("attack", [Touch, System])
@pytest.mark.parametrize("packed", [True, False], ids=["archive", "folder"])
def test_malicious_pickles_are_refused_and_not_run(tmp_path: Path, attack: type[Touch], packed: bool) -> None:
    victim = tmp_path / "victim"
    content = pickle.dumps({b"data": attack(victim), b"labels": []}, protocol=2)
    if packed:
        write_archive(tmp_path / archive_name("cifar10"), {"test_batch": content})
    else:
        (tmp_path / "cifar-10-batches-py").mkdir()
        (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(DataError, match="test_batch: refused, it asks for "):
        data.load("cifar10", "test", tmp_path)
    assert not victim.exists()
    pickle.loads(content)  # it would have worked
    assert victim.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "test_batch: "),
        (b"no pickle", "test_batch: "),
        (python2_batch(pixels(3, 3072), [1, 2, 3])[:5000], "test_batch: "),
        (python2_batch(pixels(3, 3072), [1, 2]), "3 images, 2 labels"),
        (python2_batch(pixels(3, 3072), [1, 2, 10]), "test_batch: label in row 2 is 10"),
        (python2_batch(pixels(3, 3000), [1, 2, 3]), r"test_batch: data is uint8 \(3, 3000\), expected uint8"),
        (pickle.dumps([1, 2], 2), "test_batch: "),
        (pickle.dumps({b"data": 1, b"labels": [1]}, 2), "test_batch: "),
        (pickle.dumps({b"labels": [1]}, 2), "test_batch: "),
        (python3_batch(np.array([[Touch(Path("/x"))]], object), [1]), "test_batch: .*expected bytes"),
        (python3_batch(np.zeros((1, 3072)), [1]), "test_batch: it holds an array of 'f8', expected bytes"),
    ],
)
def test_damaged_batches_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    write_archive(tmp_path / archive_name("cifar10"), {"test_batch": content})
    with pytest.raises(DataError, match=message):
        data.load("cifar10", "test", tmp_path)


def test_incomplete_archives_are_refused(tmp_path: Path) -> None:
    path = tmp_path / archive_name("cifar10")
    files = batches("cifar10", pixels(5, 3, 32, 32), labels(5), "train")
    write_archive(path, {name: content for name, content in files.items() if name != "data_batch_4"})
    with pytest.raises(DataError, match="it lacks data_batch_4"):
        data.load("cifar10", "train", tmp_path)
    write_archive(path, files)
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: cannot be read"):
        data.load("cifar10", "train", tmp_path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(DataError, match=r"cifar-10-python\.tar\.gz: cannot be read"):
        data.load("cifar10", "train", tmp_path)


def test_links_in_an_archive_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(python2_batch(pixels(1, 3072), [1]))
    with tarfile.open(tmp_path / archive_name("cifar10"), "w:gz") as archive:
        member = tarfile.TarInfo("cifar-10-batches-py/test_batch")
        member.type, member.linkname = tarfile.SYMTYPE, str(secret)
        archive.addfile(member)
    with pytest.raises(DataError, match="it lacks test_batch"):
        data.load("cifar10", "test", tmp_path)


# --- what is missing, what is there --------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in data.NAMES if name != "digits"])
def test_missing_data_says_both_ways_out(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        data.load(name, "train", tmp_path)
    message = str(caught.value)
    for part in (f"`robbench data fetch {name}`", str(tmp_path / name), "ROBBENCH_DATA", "--data-dir"):
        assert part in message
    if name.startswith("cifar"):
        layouts = [f"{name}/{archive_name(name)}", f"{name}/train-*-of-*.parquet"]
    else:
        layouts = [f"{name}/ with train-images-idx3-ubyte[.gz] and train-labels-idx1-ubyte[.gz]"]
    for layout in layouts:
        assert layout in message


def test_unknown_data_sets_and_splits_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Unknown data set 'cifar'.* Did you mean cifar10"):
        data.load("cifar")
    with pytest.raises(DataError, match="Unknown data set 'imagenet'"):
        data.fetch("imagenet", tmp_path, print)
    with pytest.raises(DataError, match=r"Unknown split of digits 'validation'.*Known: test, train"):
        data.load("digits", "validation")  # type: ignore[arg-type]


def test_the_data_folder_is_the_given_one_or_the_environments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("ROBBENCH_DATA", "~/data")
    assert data.resolve_data_dir("here") == Path("here")
    assert data.resolve_data_dir() == Path("/home/someone/data")
    monkeypatch.delenv("ROBBENCH_DATA")
    assert data.resolve_data_dir() == Path("/home/someone/.cache/robbench/data")


def test_data_dir_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path / "mnist", pixels(2, 28, 28), labels(2))
    monkeypatch.setenv("ROBBENCH_DATA", str(tmp_path))
    assert len(data.load("mnist")) == 2


def test_every_data_set_is_described_with_its_place(tmp_path: Path) -> None:
    write_idx(tmp_path / "mnist", pixels(2, 28, 28), labels(2))
    infos = data.describe_datasets(tmp_path)
    assert tuple(info.name for info in infos) == data.NAMES
    assert [info.available for info in infos] == [True, True, False, False, False]
    assert infos[0].where == "comes with scikit-learn"
    assert infos[1].where == f"{tmp_path / 'mnist'} (test only)"
    assert infos[2].where == "run `robbench data fetch fashion_mnist`"
    assert (infos[3].shape, infos[3].train, infos[3].test, infos[4].num_classes) == ((3, 32, 32), 50000, 10000, 100)
    assert all(info.source for info in infos)


# --- fetch ---------------------------------------------------------------------------------------------------


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Serve a folder on this machine: its address and place."""
    place = tmp_path / "server"
    place.mkdir()
    handler = functools.partial(Handler, directory=str(place))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}/", place
        running.shutdown()
        thread.join()


@pytest.fixture
def mnist_server(server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """Serve a small MNIST whose checksums and mirrors torchvision's table tells; the first mirror has nothing."""
    from torchvision.datasets import MNIST

    address, place = server
    write_idx(place / "good", pixels(3, 28, 28), labels(3))
    write_idx(place / "good", pixels(5, 28, 28), labels(5), "train")
    resources = [(p.name, hashlib.md5(p.read_bytes()).hexdigest()) for p in sorted((place / "good").iterdir())]
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.setattr(MNIST, "mirrors", [f"{address}empty/", f"{address}good/"])
    return address, place / "good"


def test_fetch_downloads_every_file_from_the_mirror_that_has_it(tmp_path: Path, mnist_server: tuple[str, Path]) -> None:
    lines: list[str] = []
    root = tmp_path / "data"
    paths = data.fetch("mnist", root, lines.append)
    assert sorted(path.name for path in paths) == sorted(path.name for path in (root / "mnist").iterdir())
    assert len(paths) == 4
    assert (len(data.load("mnist", "test", root)), len(data.load("mnist", "train", root))) == (3, 5)
    assert sum("downloading" in line for line in lines) == 8  # both mirrors, for every file
    umask = os.umask(0)
    os.umask(umask)
    assert paths[0].stat().st_mode & 0o777 == 0o666 & ~umask  # as readable for others as any file


def test_fetch_keeps_what_is_right_and_replaces_what_is_not(tmp_path: Path, mnist_server: tuple[str, Path]) -> None:
    paths = data.fetch("mnist", tmp_path, lambda line: None)
    stamps = [path.stat().st_mtime_ns for path in paths]
    paths[1].write_bytes(b"torn")
    lines: list[str] = []
    assert data.fetch("mnist", tmp_path, lines.append) == paths
    assert sum("kept, checksum right" in line for line in lines) == 3
    assert sum("wrong checksum, to be replaced" in line for line in lines) == 1
    assert [path.stat().st_mtime_ns for path in paths][2:] == stamps[2:]
    assert len(data.load("mnist", "test", tmp_path)) == 3


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_a_download_follows_no_link_and_waits_for_no_pipe(
    tmp_path: Path, mnist_server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda length: "guessed")
    folder, precious = tmp_path / "data/mnist", tmp_path / "precious"
    folder.mkdir(parents=True)
    precious.write_text("keep")
    for served in mnist_server[1].iterdir():
        path = folder / f".{served.name}.guessed.part"
        {"link": lambda p: p.symlink_to(precious), "pipe": os.mkfifo, "folder": Path.mkdir}[kind](path)
    with pytest.raises(DataError, match="File exists"):
        data.fetch("mnist", tmp_path / "data", lambda line: None)
    assert precious.read_text() == "keep" and path.exists()


def test_fetch_refuses_a_wrong_checksum(tmp_path: Path, mnist_server: tuple[str, Path]) -> None:
    address, place = mnist_server
    path = place / "t10k-images-idx3-ubyte.gz"
    right = hashlib.md5(path.read_bytes()).hexdigest()
    path.write_bytes(b"something else")
    root = tmp_path / "data"
    with pytest.raises(DataError) as caught:
        data.fetch("mnist", root, lambda line: None)
    message = str(caught.value)
    wrong = hashlib.md5(b"something else").hexdigest()
    assert f"{address}good/{path.name}: wrong checksum, md5 {wrong} of 14 bytes, not {right}" in message
    assert f"{address}empty/{path.name}: HTTP Error 404" in message
    assert f"by hand into {root / 'mnist'}: t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz, " in message
    assert list((root / "mnist").iterdir()) == []


def test_fetch_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as closed:
        url = f"http://127.0.0.1:{closed.server_address[1]}/x.tar.gz"
    monkeypatch.setattr(CIFAR10, "url", url)
    with pytest.raises(DataError, match=f"{url}: .*refused"):
        data.fetch("cifar10", tmp_path, lambda line: None)
    assert list((tmp_path / "cifar10").iterdir()) == []


@pytest.mark.parametrize("name", CIFAR)
def test_fetch_puts_the_archive_where_load_finds_it(
    tmp_path: Path, name: str, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = getattr(importlib.import_module("torchvision.datasets"), name.upper())
    address, place = server
    archive = place / archive_name(name)
    write_archive(archive, batches(name, pixels(4, 3, 32, 32), labels(4)))
    monkeypatch.setattr(table, "url", address + archive.name)
    monkeypatch.setattr(table, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    assert data.fetch(name, tmp_path / "data", lambda line: None) == [tmp_path / "data" / name / archive.name]
    assert len(data.load(name, "test", tmp_path / "data")) == 4


def test_fetch_into_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="cannot be stored"):
        data.fetch("mnist", tmp_path / "file", lambda line: None)


def test_digits_need_no_download(tmp_path: Path) -> None:
    lines: list[str] = []
    assert data.fetch("digits", tmp_path, lines.append) == []
    assert lines == ["digits: comes with scikit-learn, nothing to download"]
    assert list(tmp_path.iterdir()) == []


def test_torchvision_still_has_the_tables_that_fetch_reads() -> None:
    from torchvision import datasets

    for name in ("MNIST", "FashionMNIST"):
        table = getattr(datasets, name)
        assert len(table.resources) == 4
        assert all(file.endswith("-ubyte.gz") and len(md5) == 32 for file, md5 in table.resources)
        assert all(mirror.endswith("/") for mirror in table.mirrors)
    for name in CIFAR:
        table = getattr(datasets, name.upper())
        assert table.url.endswith(archive_name(name)) and table.filename == archive_name(name)
        assert len(table.tgz_md5) == 32


@pytest.mark.whole
def test_importing_and_describing_does_not_import_torch() -> None:
    import subprocess

    code = "import sys; from robbench.data import sets; sets.describe_datasets(); sys.exit('torch' in sys.modules)"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )


# --- the real files ------------------------------------------------------------------------------------------


@functools.cache
def real(name: str, split: Any) -> Any:
    place = os.environ.get("ROBBENCH_DATA")
    if not place:
        pytest.skip("ROBBENCH_DATA is not set")
    try:
        return data.load(name, split)
    except DataError as error:
        if "is not in" not in str(error):
            raise
        pytest.skip(f"ROBBENCH_DATA has no {name} ({split})")


@pytest.mark.whole
def test_mnist_on_this_machine_has_the_official_classes() -> None:
    test, train = real("mnist", "test"), real("mnist", "train")
    assert np.bincount(test.y).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(train.y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert abs(train.x.mean() / 255 - 0.1307) < 5e-5


@pytest.mark.whole
def test_cifar10_test_images_on_this_machine_have_official_indices() -> None:
    dataset = real("cifar10", "test")
    assert len(dataset) in (9_980, 10_000)
    assert (dataset.index[0], dataset.index[-1]) == (0, 9_999)
    assert dataset.y[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    absent = set(range(10_000)) - set(dataset.index.tolist())
    assert len(absent) == 10_000 - len(dataset)
    if absent:
        assert (min(absent), max(absent)) == (1259, 9254)


@pytest.mark.slow
def test_cifar10_training_images_on_this_machine_have_the_published_mean() -> None:
    dataset = real("cifar10", "train")
    assert np.bincount(dataset.y).tolist() == [5_000] * 10
    pixel = dataset.x.astype(np.float64).transpose(1, 0, 2, 3).reshape(3, -1) / 255
    assert np.allclose(pixel.mean(1), [0.49139968, 0.48215841, 0.44653091], atol=1e-8)
    assert np.allclose(pixel.std(1), [0.24703223, 0.24348513, 0.26158784], atol=1e-8)
