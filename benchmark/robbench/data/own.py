"""Images that a user brings: a path, arrays, a torch Dataset or a DataLoader become one kind of object."""

from __future__ import annotations

import hashlib
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, default_collate

from robbench.core.errors import DataError
from robbench.core.files import digest, open_regular
from robbench.core.types import IMAGENET
from robbench.core.words import fold_name, format_count
from robbench.data.encoded import Preparation, describe_broken, survey
from robbench.data.folder import Listed, list_images
from robbench.data.formats import convert_errors
from robbench.data.imagenet import find_imagenet, list_imagenet
from robbench.data.sets import NAMES

__all__ = ["OwnImages", "digest_tensor", "find_known_name", "open_imagenet", "open_images"]

_MOST_NPZ_BYTES = 2**36
_FREE_NPZ_BYTES, _NPZ_RATIO = 2**26, 64
_SCALED = "x holds {kind} pixel values 0 to 255; robbench divided them by 255."


@dataclass(frozen=True, eq=False)
class OwnImages:
    """Images and labels that a user brings.

    Attributes:
        x: images [N, C, H, W] in memory, as they were given; None where they are read when they are used.
        read: positions [n] -> images [n, C, H, W], floating point; None where x is given.
        y: labels [N] as they were given.
        digest: SHA-256 of the content; empty where x is given.
        about: what identifies how the images were read, as JSON values.
        num_classes: the number of logits that the model must have; None where it is not known.
        flags: name of a problem -> sentence.
    """

    x: Tensor | None
    y: Tensor
    read: Callable[[NDArray[np.int64]], Tensor] | None = None
    digest: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    flags: Mapping[str, str] = field(default_factory=dict)


def open_images(
    data: object,
    *,
    resize: int | None = None,
    crop: int | None = None,
    channels: int | None = None,
    classes: str | Path | Mapping[str, int] | None = None,
    on_broken: str | None = None,
) -> OwnImages:
    """Open images that a user brings.

    Args:
        data: a path (`folder.list_images`, or an .npz with x and y); a pair of images and labels, tensors or NumPy
            arrays; a torch Dataset of pairs; or a DataLoader of batches of pairs.
        resize: see `encoded.Preparation`; for encoded images only, like crop and channels.
        crop: see resize.
        channels: 3 (the default) or 1.
        classes: see `folder.list_images`.
        on_broken: "stop" (the default) or "skip"; see `encoded.survey`.

    Raises:
        DataError: the images cannot be read, or do not fit the options. The message says which and why.
    """
    prepared = {"resize": resize, "crop": crop, "channels": channels, "classes": classes, "on_broken": on_broken}
    if isinstance(data, str | Path) and Path(data).suffix != ".npz":
        preparation = Preparation(resize, crop, 3 if channels is None else channels)
        return _open_encoded(Path(data).expanduser(), preparation, classes, on_broken or "stop")
    if given := [name for name, value in prepared.items() if value is not None]:
        raise DataError(
            f"{', '.join(given)} given with images that are decoded already; they go with a folder, a .csv or a "
            ".parquet file. Prepare the pixels yourself."
        )
    if isinstance(data, str | Path):
        return _open_npz(Path(data).expanduser())
    if isinstance(data, tuple | list) and len(data) == 2:
        return _take_pair(*data)
    if isinstance(data, DataLoader):
        return _open_loader(data)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset) and hasattr(data, "__len__"):
        return _open_dataset(data)
    raise DataError(
        f"data: {type(data).__module__}.{type(data).__qualname__} given; allowed: a path, a pair (x, y) of tensors or "
        "NumPy arrays, a torch Dataset with a length, or a DataLoader."
    )


def find_known_name(name: str) -> str:
    """Return the known data set that a name names or resembles (`MNIST`, `cifar-10`); "" if there is none."""
    return next((known for known in (*NAMES, IMAGENET) if fold_name(known) == fold_name(name)), "")


def open_imagenet(
    data_dir: str | Path | None, *, resize: int | None = None, crop: int | None = None, on_broken: str | None = None
) -> OwnImages:
    """Open the validation set of ImageNet, at the usual size of 256 and a crop of 224 unless others are given.

    Raises:
        DataError: it is not in the data directory, or a file is broken.
    """
    folder = find_imagenet(data_dir)
    preparation = Preparation(256 if resize is None else resize, 224 if crop is None else crop)
    return _survey(list_imagenet(folder), preparation, on_broken or "stop")


def digest_tensor(t: Tensor) -> str:
    """Return the SHA-256 of the values, without a copy of them."""
    return hashlib.sha256(np.ascontiguousarray(t.numpy()).reshape(-1).view(np.uint8).data).hexdigest()


def _open_encoded(
    path: Path, preparation: Preparation, classes: str | Path | Mapping[str, int] | None, on_broken: str
) -> OwnImages:
    found = list_images(path, classes)
    if (least := int(found.y.min())) < 0:
        raise DataError(f"--data: {path} holds the label {least}; labels are 0 or more.")
    return _survey(found, preparation, on_broken)


def _survey(found: Listed, preparation: Preparation, on_broken: str) -> OwnImages:
    read, content, broken = survey(found.items, found.y, preparation, on_broken)
    about: dict[str, Any] = preparation.describe() | {"classes": found.classes}
    flags = {}
    if broken:
        about["skipped"] = broken
        flags["skipped_images"] = describe_broken(broken, len(found.y))
    return OwnImages(None, torch.from_numpy(found.y[read.at]), read, content, about, found.num_classes, flags)


def _open_npz(path: Path) -> OwnImages:
    if not path.exists():
        raise DataError(f"--data: no {path}; expected: an .npz file with arrays x and y.")
    with (
        convert_errors(f"{path}: not an .npz file of images"),
        open_regular(path, _MOST_NPZ_BYTES) as file,
        zipfile.ZipFile(file) as archive,
    ):
        _check_members(archive, path.stat().st_size)
        file.seek(0)
        arrays = np.load(file, allow_pickle=False)
        if missing := {"x", "y"} - set(arrays.files):
            given, lacking = format_count(len(arrays.files), "array"), ", ".join(sorted(missing))
            raise ValueError(f"{given} given; lacking: {lacking}. numpy.savez(path, x=images, y=labels) writes both.")
        return _take_pair(arrays["x"], arrays["y"])


def _check_members(archive: zipfile.ZipFile, size: int) -> None:
    """Check what an archive of arrays claims, before an array is unpacked.

    Raises:
        ValueError: it unpacks out of proportion, two members have one name, or a shape is not that of its bytes.
    """
    members, most = archive.infolist(), _FREE_NPZ_BYTES + _NPZ_RATIO * size
    if (claimed := sum(member.file_size for member in members)) > most:
        raise ValueError(f"it unpacks to {claimed:,} bytes; allowed: {most:,}. Write it with np.savez, uncompressed")
    if len({member.filename for member in members}) < len(members):
        raise ValueError("two arrays have one name")
    for member in members:
        with archive.open(member) as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, kind = read(stream)
            if kind.hasobject:
                raise ValueError("an array holds objects; expected numbers")
            if (needed := math.prod(shape) * kind.itemsize) != (held := member.file_size - stream.tell()):
                raise ValueError(f"an array claims {needed:,} bytes, shape {shape!s:.80}, and holds {held:,}")


def _take_pair(x: object, y: object) -> OwnImages:
    """Take images and labels in memory. Images of shape [N, H, W, C] or [N, H, W] get the shape [N, C, H, W]."""
    about: dict[str, Any] = {}
    images, labels = (_as_tensor(name, value) for name, value in (("x", x), ("y", y)))
    if isinstance(x, np.ndarray):
        if images.dim() == 3:
            images = images[:, None]
        elif images.dim() == 4 and images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
            images, about = images.permute(0, 3, 1, 2), {"layout": "NHWC"}
    flags = {"uint8": _SCALED.format(kind="uint8")} if images.dtype == torch.uint8 else {}
    return OwnImages(images, labels, about=about, flags=flags)


def _as_tensor(name: str, value: object) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray):
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        raise DataError(f"{name}: {kind} given; allowed: a torch.Tensor or a NumPy array.")
    try:
        return torch.from_numpy(np.ascontiguousarray(value))
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: an array of {value.dtype} given; allowed: numbers ({error}).") from None


@dataclass(frozen=True, eq=False)
class _Indexed:
    """A Dataset that is asked for its images when they are used."""

    data: Any

    def __call__(self, positions: NDArray[np.int64]) -> Tensor:
        """Ask for images: positions [n] -> [n, C, H, W] float."""
        return torch.stack([_take_item(self.data, position)[0] for position in positions.tolist()])


def _take_item(data: Any, position: int) -> tuple[Tensor, int]:
    """Take an image [C, H, W], float in [0, 1], and its label from a Dataset.

    Raises:
        DataError: the item is no such pair, or the Dataset raises.
    """
    with convert_errors(f"data[{position}] of the Dataset"):
        image, label = data[position]
        if isinstance(image, Image.Image):
            image = np.array(image)
        if isinstance(image, np.ndarray):
            image = torch.from_numpy(image[None] if image.ndim == 2 else np.moveaxis(image, 2, 0))
        if not isinstance(image, Tensor) or image.dim() != 3:
            raise ValueError(f"{type(image).__name__} given; expected: an image [C, H, W] and a label")
        if image.dtype == torch.uint8:
            image = image.div(255)
        elif image.dtype in (torch.float16, torch.bfloat16):  # see `own_images.check_own_images`
            image = image.float()
        return image, int(label)


def _open_dataset(data: Any) -> OwnImages:
    """Open a Dataset. All its items are read once: to hash them, to check them, and for the labels."""
    hasher, labels = hashlib.sha256(), []
    first: Tensor | None = None
    for position in range(len(data)):
        image, label = _take_item(data, position)
        first = image if first is None else first
        if (image.shape, image.dtype) != (first.shape, first.dtype):
            raise DataError(
                f"data[{position}] is {image.dtype} of shape {tuple(image.shape)}, and data[0] is {first.dtype} of "
                f"shape {tuple(first.shape)}; expected: images of one shape and type. Resize and crop them."
            )
        low, high = float(image.min()), float(image.max())
        if not (low >= 0 and high <= 1):
            raise DataError(
                f"data[{position}] spans [{low:g}, {high:g}]; expected [0, 1]. Leave normalization out of the "
                "Dataset's transform, and put it inside the model: eps is measured on what the model is given."
            )
        hasher.update(digest_tensor(image).encode())
        labels.append(label)
    if first is None:
        raise DataError("data: the Dataset holds no images.")
    if not torch.equal(_take_item(data, 0)[0], first):
        raise DataError(
            "data[0] of the Dataset differs from one time to the next: its transform is random. Use the transform of "
            "the test set."
        )
    y = torch.tensor(labels)
    content = digest([list(first.shape), str(first.dtype), hasher.hexdigest(), digest_tensor(y)])
    return OwnImages(None, y, _Indexed(data), content)


def _open_loader(loader: DataLoader[Any]) -> OwnImages:
    """Open the Dataset of a DataLoader in its own order. A loader that does more than batching is read once."""
    plain = isinstance(loader.sampler, SequentialSampler | RandomSampler) and loader.collate_fn is default_collate
    if plain and hasattr(loader.dataset, "__len__"):
        return _open_dataset(loader.dataset)
    with convert_errors("data: the DataLoader"):
        batches = [(batch[0], batch[1]) for batch in loader]
        if not batches:
            raise ValueError("it holds no images")
        return _take_pair(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))
