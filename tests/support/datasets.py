"""Data sets in the official file formats, written byte by byte."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np


def pixels(count: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, *shape), np.uint8)


def labels(count: int) -> list[int]:
    return [(3 * i + 1) % 10 for i in range(count)]


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def python2_batch(x: np.ndarray, y: list[int], key: bytes = b"labels") -> bytes:
    """Write a batch opcode by opcode as Python 2 did in the official archives: byte strings, integer `align`."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<I", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + number(-1) + number(-1) + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + number(x.shape[0]) + number(x.shape[1]) + b"\x86" + dtype + b"\x89" + text(x.tobytes())
    array += b"tb"
    rows = b"](" + b"".join(map(number, y)) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(key) + rows + b"u."


def batches(
    name: str, x: np.ndarray, y: list[int], split: str = "test", write: Any = python2_batch
) -> dict[str, bytes]:
    """Make the files of one split: train of CIFAR-10 consists of five."""
    flat, key = x.reshape(len(x), -1), b"fine_labels" if name == "cifar100" else b"labels"
    names = [split] if name == "cifar100" else ["test_batch"]
    if (name, split) == ("cifar10", "train"):
        names = [f"data_batch_{i}" for i in range(1, 6)]
    parts = np.array_split(np.arange(len(x)), len(names))
    return {file: write(flat[rows], [y[i] for i in rows], key) for file, rows in zip(names, parts, strict=True)}
