"""Seeded mutations of valid files, and a watch over what a parser does with them."""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NASTY = [
    "nan", "inf", "-inf", "-1", "0", "-0.0", "1e999999999", "9" * 5000, "1" + "0" * 400, '"8/0"', '"-8/255"', "true",
    "[]", "{}", '""', '"../../../../etc/passwd"', '"/etc/passwd"', '"..\\\\..\\\\x"', '"\\u0000"',
    '"\\u202e\\u2066abc"', '"ﬀ\\u0301𝔘"',
    '"<script>alert(1)</script>"', '"[/bold]"', '"{{7*7}}"', '"__import__(\'os\').system(\'x\')"', "[" * 3000,
    "1979-05-27",
    "0x7fffffffffffffff", "18446744073709551616", '"' + "A" * 10000 + '"', "[[1, 2], [3]]", "{a = {b = {c = 1}}}",
    "\x00", "\ufeff",
]  # fmt: skip
NODES = [
    None, True, -1, 0, 1.5, -0.0, float("nan"), float("inf"), 10**30, "", "x", "../../x", "/etc/passwd",
    "<img src=x onerror=a()>",
    "\u202e", "\x00", "ﬀ𝔘", [], {}, [[]], {"a": 1}, ["x"], [1, "2"], "9" * 5000, "nan", "robust", "[/red]",
]  # fmt: skip
LENGTHS = [b"\x00" * 8, b"\xff" * 8, b"\xff" * 4, (2**62).to_bytes(8, "little"), (2**31).to_bytes(4, "little")]


def mutated_text(rng: random.Random, text: str) -> str:
    """Change a text file of keys and values in one to three places."""
    for _ in range(rng.randint(1, 3)):
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        kind = rng.randrange(7)
        if kind == 0 and "=" in lines[at]:
            lines[at] = f"{lines[at].split('=')[0]}= {rng.choice(NASTY)}"
        elif kind == 1:
            del lines[at]
        elif kind == 2:
            lines.insert(rng.randrange(len(lines)), lines[at])
        elif kind == 3:
            lines[at] = lines[at].replace("=", rng.choice(["==", ".", "", "=["]), 1)
        elif kind == 4 and lines[at]:
            where = rng.randrange(len(lines[at]))
            lines[at] = (
                lines[at][:where] + chr(rng.choice([0, 9, 34, 91, 93, 0x301, 0x202E, 0x1F600])) + lines[at][where:]
            )
        elif kind == 5 and "=" in lines[at]:
            other = rng.choice([line for line in lines if "=" in line])
            lines[at] = f"{lines[at].split('=')[0]}={other.split('=', 1)[1]}"
        else:
            lines = lines[: max(1, at)]
        text = "\n".join(lines)
    return text


def mutated_json(rng: random.Random, text: str) -> str:
    """Change one to three nodes of a JSON document, or its text."""
    if rng.random() < 0.2:
        return mutated_bytes(rng, text.encode()).decode("utf-8", "surrogateescape")
    value = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        holder, key = rng.choice(places) if places else (value, None)
        kind = rng.randrange(4)
        node = copy.deepcopy(rng.choice(NODES))  # one that is changed again must not change the next input
        if kind == 0 and isinstance(holder, dict) and key is not None:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[str(rng.choice(NODES))] = node
        elif key is not None:
            holder[key] = node
    return json.dumps(value, ensure_ascii=rng.random() < 0.5)


def _places(value: object) -> Iterator[tuple[object, object]]:
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _places(inner)


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, cut, insert, overwrite or repeat parts of a binary file."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, kind = rng.randrange(len(out) + 1), rng.randrange(6)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del out[at : at + rng.randrange(1, 64)]
        elif kind == 2:
            out[at:at] = rng.randbytes(rng.randrange(1, 64))
        elif kind == 3:
            length = rng.choice(LENGTHS)
            out[at : at + len(length)] = length
        elif kind == 4:
            out[at : at + rng.randrange(1, 256)] = rng.randbytes(rng.randrange(1, 256))
        elif rng.random() < 0.2:
            out = out[:at]
    return bytes(out)


@contextmanager
def bounded_memory(most: int) -> Iterator[None]:
    """Let the process take so many bytes more while the block runs, and no more.

    Raises:
        AssertionError: it came to half of that: some small input costs memory out of proportion.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before, limits = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < most / 2, f"memory grew by {grown:,} bytes"


class Watch:
    """Notes what a parser must not do: run code, start programs, connect, or open files outside of a folder.

    An audit hook of the interpreter cannot be removed, so it is installed once and switched.
    """

    def __init__(self) -> None:
        self.folder: str | None = None
        self.seen: list[str] = []
        libraries = {sysconfig.get_paths()[k] for k in ("stdlib", "purelib", "platlib")}
        self.readable = (*libraries, "/proc/", "/dev/null", str(Path(__file__).parents[2]))
        sys.addaudithook(self._heard)

    def _heard(self, event: str, args: tuple[object, ...]) -> None:
        if self.folder is None:
            return
        if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
            self.seen.append(f"{event} {args!r:.200}")
        elif event == "open" and isinstance(args[0], str | bytes):
            path, mode, flags = os.path.realpath(os.fsdecode(args[0])), args[1], args[2]
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (
                isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            )
            if not path.startswith(self.folder) and (writes or not path.startswith(self.readable)):
                self.seen.append(f"open {path} {mode}")
        elif event in ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink"):
            if not os.path.realpath(os.fsdecode(args[0])).startswith(self.folder):  # type: ignore[arg-type]
                self.seen.append(f"{event} {args!r:.200}")
        elif event == "exec" and "<string>" in repr(args[0]):
            self.seen.append(f"exec {args!r:.200}")

    @contextmanager
    def over(self, folder: Path) -> Iterator[None]:
        """Watch while the block runs.

        Raises:
            AssertionError: something forbidden was done; all of it is named.
        """
        self.folder, self.seen = os.path.realpath(folder), []
        try:
            yield
        finally:
            self.folder = None
        assert not self.seen, self.seen
