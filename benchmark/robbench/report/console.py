"""Terminals: consoles and streams for text.

They show text from files without obeying its control characters or its markup. They break lines between words.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import IO, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from robbench.report.escape import escape_control
from robbench.report.wrapping import break_line, break_text

__all__ = [
    "SafeStream", "TerminalConsole", "find_width", "fit_terminal", "leave_out_python", "make_console",
    "protect_terminal",
]  # fmt: skip

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_ABOUT_PYTHON = re.compile(
    r" \(in Python\b[^()]*\)"  # --output NAME (in Python output=)
    r"|; in Python\b(?:[^().]|\([^()]*\)|\.(?=\S))*"  # (--model; in Python: model=)
    r"|, or in Python [^,]*"  # a class, or in Python a list, or None
    r"|,? or None(?=[.,]|$)"
)
_RESET = "\x1b[0m"
_WIDTH = 200  # characters, if there is no terminal


class SafeStream:
    """A text stream in which control characters of the text arrive as escapes (`escape_control`).

    A terminal gets line breaks between words. Lines that begin with a space or `|` stay as they are: they are laid out.
    A carriage return at the start of a line stays, because progress bars of other libraries begin with one.

    Attributes:
        plain: the stream that gets the text.
    """

    def __init__(self, plain: IO[str]) -> None:
        self.plain = plain
        self._overwritable = True  # whether the present line is empty or a progress bar
        self._laid_out = False  # whether the present line stays as it is
        self._column = 0  # where the present line ends

    def write(self, text: str) -> int:
        """Write text with its control characters as escapes."""
        if text == _RESET:  # Ray resets colours when the process ends. Nothing here is coloured.
            return len(text)
        width = _find_width(self.plain)
        for line in _LINE.findall(text):
            self._write_line(line, width)
        return len(text)

    def write_whole(self, text: str) -> None:
        """Write text whose line breaks count, such as CSV."""
        self.plain.write(escape_control(text))

    def _write_line(self, text: str, width: int | None) -> None:
        """Write a line, or a part of one."""
        is_bar = text.startswith("\r") and self._overwritable
        shown = escape_control(text[is_bar:])
        if is_bar or self._column == 0:
            self._laid_out, self._column = is_bar or shown.startswith((" ", "|")), 0
        if width is not None and not self._laid_out:
            shown = "\n".join(break_line(shown, width, self._column))
        self.plain.write("\r" * is_bar + shown)
        last = shown.rstrip("\n").rpartition("\n")[2]
        self._column = 0 if text.endswith("\n") else cell_len(last) + (0 if "\n" in shown else self._column)
        self._overwritable = is_bar or text.endswith("\n")

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the stream below."""
        return getattr(self.plain, name)


class TerminalConsole(Console):
    """A console of rich that reads no markup in text and obeys no control character of text.

    Colours come from `rich.text.Text` and from styles. A console writes its own codes past a `SafeStream`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    @property
    def file(self) -> IO[str]:
        """The stream that gets the text and the codes."""
        file = super().file
        return file.plain if isinstance(file, SafeStream) else file

    @file.setter
    def file(self, file: IO[str]) -> None:
        self._file = file

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:
        """Print. A terminal gets line breaks between words. `soft_wrap` keeps a line whole where there is none."""
        if self.is_terminal and len(objects) == 1 and isinstance(text := objects[0], str | Text):
            objects = (break_text(text if isinstance(text, Text) else self.render_str(text), self.width),)
            soft_wrap = True
        super().print(*objects, soft_wrap=soft_wrap, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert text. The escapes count in the width of columns."""
        return super().render_str(escape_control(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Convert anything to segments, without control characters but those of the console."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else escape_control(text), style, control)

    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError that is being handled, which ends the command. rich would exit with code 1."""
        raise

    def note(self, text: str) -> None:
        """Print a warning. A reader at the command line gets no words about Python."""
        if isinstance(super().file, SafeStream):
            text = leave_out_python(text)
        self.print(Text.assemble(("note:", "yellow"), " ", text), soft_wrap=True)


def make_console(**options: Any) -> TerminalConsole:
    """Make the console for results: as wide as the terminal; 200 characters if there is none.

    Args:
        **options: options of `rich.console.Console`, such as `file`.
    """
    console = TerminalConsole(**options)
    return console if console.is_terminal else TerminalConsole(**options, width=_WIDTH)


def _find_width(stream: IO[str]) -> int | None:
    """Return the width of the terminal that a stream writes to, in characters; None if it is no terminal."""
    if not stream.isatty():
        return None
    if (given := os.environ.get("COLUMNS", "")).isdecimal():
        return int(given) or None
    try:
        return os.get_terminal_size(stream.fileno()).columns or None
    except (OSError, ValueError):
        return None


def find_width() -> int | None:
    """Return the width of the terminal that `print` writes to, in characters; None if it writes elsewhere."""
    return None if sys.stdout is None else _find_width(sys.stdout)


def fit_terminal(text: str) -> str:
    """Break the lines of a text between words for the terminal that `print` writes to. Elsewhere it stays as it is."""
    width = find_width()
    if width is None:
        return text
    return "\n".join(part for line in text.split("\n") for part in break_line(line, width))


def leave_out_python(text: str) -> str:
    """Leave out what only a reader in Python can do: `(in Python data=)` and `or None`."""
    return _ABOUT_PYTHON.sub("", text)


@contextlib.contextmanager
def protect_terminal() -> Iterator[None]:
    """Show control characters of everything that is printed as escapes, and characters that the terminal lacks too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with contextlib.redirect_stdout(SafeStream(sys.stdout)), contextlib.redirect_stderr(SafeStream(sys.stderr)):
        yield
