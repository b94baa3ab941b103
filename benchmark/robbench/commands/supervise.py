"""A parent process for a command. It sees an end that the command did not report, and that must not count as success.

A model is code. It can end the process at any time, as by `os._exit(0)` or `os.execv`, and no exception tells of that.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType

__all__ = ["run_supervised"]

_UNREPORTED = 2
_FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP")
_SAME_INTERRUPT = 0.5  # seconds
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run_supervised(run: Callable[[], int]) -> int:
    """Run a command in a child process, and return its exit code.

    The child tells its exit code through a pipe before it ends. Without that, the exit code is 2. The child shares
    the terminal and all streams. A signal to the parent goes to the child, and the end of the parent ends the child
    (on Linux). Call this before anything starts a thread. On systems without `fork`, the command runs in this process.

    Args:
        run: the command; returns its exit code.
    """
    if not hasattr(os, "fork"):
        return run()
    signals = [getattr(signal, name) for name in _FORWARDED]
    reader, writer = os.pipe()
    parent = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # a signal waits until somebody handles it
    if child := os.fork():
        os.close(writer)
        for number in signals:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
                signal.signal(number, lambda number, _: _forward(child, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        _, status = os.waitpid(child, 0)
        return _choose_code(status, reader)
    os.close(reader)
    _end_with(parent)
    _ignore_repeated_interrupts()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    sys.exit(_run_and_report(run, writer))


def _run_and_report(run: Callable[[], int], writer: int) -> int:
    child, code = os.getpid(), 1
    try:
        code = run()
    finally:
        if os.getpid() == child:  # not a process that the model forked
            with contextlib.suppress(OSError):  # the model closed the pipe: the end stays unreported
                os.write(writer, str(code).encode())
    return code


def _choose_code(status: int, reader: int) -> int:
    """Return the exit code of the parent, given the child's status; or end like the child, by its signal."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os.set_blocking(reader, False)  # a process that the model started may hold the other end
    try:
        reported = os.read(reader, 16)
    except BlockingIOError:
        reported = b""
    if not reported:
        from robbench.report.console import protect_terminal

        with protect_terminal():
            print(
                f"robbench: the process ended with exit code {os.WEXITSTATUS(status)} before the command was done. "
                "The model, or other code that was imported, ended it. Nothing can be concluded.",
                file=sys.stderr,
            )
        return _UNREPORTED
    return os.WEXITSTATUS(status) or int(reported)


def _forward(child: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)


def _end_with(parent: int) -> None:
    """Have the system kill this process when its parent ends. Otherwise, a killed command would go on unseen."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        os.kill(os.getpid(), signal.SIGKILL)


def _ignore_repeated_interrupts() -> None:
    """Let one Ctrl-C count once. The terminal sends it to both processes, and the parent sends it on."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    last = -_SAME_INTERRUPT

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before >= _SAME_INTERRUPT:
            signal.default_int_handler(number, frame)

    signal.signal(signal.SIGINT, interrupt)
