"""Terminals: consoles and streams that show text from files without obeying its control characters or its markup."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterable, Iterator
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from robbench.report.escape import escape_control

__all__ = ["SafeStream", "TerminalConsole", "make_console", "protect_terminal"]

_WIDTH = 200  # characters, if there is no terminal


class SafeStream:
    """A text stream in which control characters of the text arrive as escapes (`escape_control`).

    A carriage return at the start of a line stays, because progress bars of other libraries begin with one.

    Attributes:
        plain: the stream that gets the text.
    """

    def __init__(self, plain: IO[str]) -> None:
        self.plain = plain
        self._overwritable = True  # whether the present line is empty or a progress bar

    def write(self, text: str) -> int:
        """Write text with its control characters as escapes."""
        is_bar = text.startswith("\r") and self._overwritable
        self.plain.write("\r" * is_bar + escape_control(text[is_bar:]))
        if text:
            self._overwritable = is_bar or text.endswith("\n")
        return len(text)

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
        """Print. `soft_wrap` keeps a line whole where there is no terminal, and breaks it between words on one."""
        super().print(*objects, soft_wrap=soft_wrap and not self.is_terminal, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert text. The escapes count in the width of columns."""
        return super().render_str(escape_control(text), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Convert anything to segments, without control characters but those of the console."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else escape_control(text), style, control)

    def note(self, text: str) -> None:
        """Print a warning."""
        self.print(Text.assemble(("note:", "yellow"), " ", text), soft_wrap=True)


def make_console(**options: Any) -> TerminalConsole:
    """Make the console for results: as wide as the terminal; 200 characters if there is none.

    Args:
        **options: options of `rich.console.Console`, such as `file`.
    """
    console = TerminalConsole(**options)
    return console if console.is_terminal else TerminalConsole(**options, width=_WIDTH)


@contextlib.contextmanager
def protect_terminal() -> Iterator[None]:
    """Show control characters of everything that is printed as escapes, and characters that the terminal lacks too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with contextlib.redirect_stdout(SafeStream(sys.stdout)), contextlib.redirect_stderr(SafeStream(sys.stderr)):
        yield
