"""A page of the runs of a results tree, made anew for each request, for this machine alone. Imports no torch."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd

from robbench.core.errors import ResultError, StorageError
from robbench.core.files import refuse_links
from robbench.report.site.page import Html, join, list_items, make_document, tag
from robbench.report.site.tables import Cell, make_table
from robbench.results.records import COLUMNS, read_run_rows
from robbench.results.run_files import StoredRun, find_runs
from robbench.results.summary import find_robust_samples

__all__ = ["make_live_page", "make_server"]

_HOST = "127.0.0.1"
_RELOAD = 5  # seconds
_FRESH = 2.0  # seconds for which a page is served again, however many readers ask
_FINISHED = 20  # most finished runs that are shown


def make_live_page(root: Path) -> str:
    """Make the page from what is on disk now.

    Runs in folders that a link leads to are left out, because they may be outside the tree.
    """
    runs = [run for run in find_runs(root) if _is_inside(root, run.folder)]
    open_runs = [run for run in runs if run.state in ("running", "unfinished")]
    damaged = [f"{run.folder.relative_to(root)}: {run.note}" for run in runs if run.state == "damaged"]
    dates = [(run.about.date, run) for run in runs if run.state == "finished" and run.about is not None]
    finished = [run for _, run in sorted(dates, key=lambda pair: pair[0], reverse=True)[:_FINISHED]]
    body = [tag("p", "Nothing is running, and no run is unfinished.")]
    if open_runs:
        body = [make_table("Runs that are not finished", [_show_open(root, run) for run in open_runs], stacked=True)]
    if finished:
        rows: list[dict[str, Cell | str]] = [
            {"Result": str(run.folder.relative_to(root)), "Date": run.about.date[:16] if run.about else ""}
            for run in finished
        ]
        body.append(make_table("Finished last", rows, stacked=True))
    if damaged:
        body += [tag("h2", "Damaged"), list_items(damaged)]
    control = tag("input", type="checkbox", id="reload", checked=True, data_seconds=str(_RELOAD))
    switch = tag("p", control, tag("label", f" Read again every {_RELOAD} seconds", for_="reload"), hidden=True)
    return make_document(f"Runs in {root.name}", switch, *body, depth=None)


def _is_inside(root: Path, folder: Path) -> bool:
    try:
        refuse_links(root, folder)
    except StorageError:
        return False
    return True


def _show_open(root: Path, run: StoredRun) -> dict[str, Cell | str]:
    rows, damaged = _read_rows(run)
    stages = [f"{name}: {count}" for name, count in rows.groupby("attack", sort=False).size().items()]
    robust = find_robust_samples(rows)
    n = "" if run.about is None else f" of {run.about.n}"
    notes = [run.note, f"damaged files, not counted: {damaged}" if damaged else ""]
    return {
        "Run": str(run.folder.relative_to(root)),
        "State": tag("b", run.state) if run.state == "running" else run.state,
        "Done": Cell(f"{100 * run.done:.0f} %", None, "number"),
        "Images seen": Cell(f"{len(robust)}{n}", None, "number"),
        "Lost so far": Cell(str(int((~robust).sum())), None, "number"),
        "Images per attack": _stack(stages),
        "Note": ". ".join(filter(None, notes)) or "–",
    }


def _stack(lines: list[str]) -> Html:
    return join(*[tag("span", line, class_="line") for line in lines]) if lines else Html("–")


def _read_rows(run: StoredRun) -> tuple[pd.DataFrame, int]:
    """Read the records of a run that is not finished, and count the files that cannot be read."""
    found, damaged = [pd.DataFrame({name: pd.Series(dtype=kind) for name, kind in COLUMNS.items()})], 0
    for shard in sorted((run.folder / ".partial" / run.run_id).glob("*.parquet")):
        try:
            refuse_links(run.folder, shard)
            found.append(read_run_rows(shard, run.run_id, list(COLUMNS)))
        except (ResultError, StorageError):
            damaged += shard.exists()  # a run that ends removes its shards
    return pd.concat(found[1:] or found), damaged


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, port: int, make_page: Callable[[], str]) -> None:
        super().__init__((_HOST, port), _Handler)
        self._make_page, self._lock = make_page, threading.Lock()
        self._page, self._made = b"", -_FRESH

    def read_page(self) -> bytes:
        with self._lock:
            if time.monotonic() - self._made >= _FRESH:
                self._page, self._made = self._make_page().encode(), time.monotonic()
            return self._page


class _Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of `/` and of no other page, and only if the browser asks for this machine by name."""

    server: _Server
    server_version, sys_version = "robbench", ""
    timeout = 10  # seconds for a client to send its request

    def do_GET(self) -> None:
        port = self.server.server_port
        # Another site can point its own name at 127.0.0.1. Then the browser sends that name, and lets that site read.
        if self.headers.get_all("Host") not in ([f"{_HOST}:{port}"], [f"localhost:{port}"]):
            self.send_error(HTTPStatus.MISDIRECTED_REQUEST, f"Open http://{_HOST}:{port}/")
        elif self.path == "/favicon.ico":  # every browser asks for it; an error would stand on its console
            self.send_response(HTTPStatus.NO_CONTENT)
            self.end_headers()
        elif self.path != "/":
            self.send_error(HTTPStatus.NOT_FOUND)
        else:
            page = self.server.read_page()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(page)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cross-Origin-Resource-Policy", "same-origin")
            self.end_headers()
            if self.command == "GET":
                with contextlib.suppress(ConnectionError):  # the reader left
                    self.wfile.write(page)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing for a request."""


def make_server(root: Path, port: int) -> ThreadingHTTPServer:
    """Make the server, bound to 127.0.0.1. It writes nothing, and serves the page of `make_live_page` alone.

    Args:
        root: the results tree.
        port: 0 takes a free one.

    Raises:
        StorageError: the port is taken or not allowed.
    """
    try:
        return _Server(port, lambda: make_live_page(root))
    except OSError as error:
        raise StorageError(f"--port: {port} cannot be used: {error.strerror or error}. Give another one.") from None
