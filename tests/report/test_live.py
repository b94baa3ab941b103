"""`robbench serve`: the runs on disk, read anew, for a browser of this machine alone."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import signal
import subprocess
import sys
import threading

import pytest

from robbench.attacks import FGSM, PGD
from robbench.core.errors import StorageError
from robbench.evaluation.run import EvaluationRun, evaluate
from robbench.report.site import live
from robbench.report.site.live import make_live_page, make_server
from robbench.results.run_files import find_runs
from support.papers import put, result
from support.site import Page


class Stop(Exception):
    pass


def begin(problem, root, monkeypatch, name="begun"):
    """Leave an unfinished run, with all its shards."""
    model, x, y = problem

    def stop(self, flags):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(EvaluationRun, "finish", stop)
        with pytest.raises(Stop):
            evaluate(model, [FGSM(), PGD(steps=3)], x=x, y=y, eps=0.1, results=root, name=name)
    return next((root / "custom" / name).glob("*/.partial/*"))


@contextlib.contextmanager
def serving(root):
    with make_server(root, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def ask(port, path="/", host=None, method="GET"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    for value in [f"127.0.0.1:{port}"] if host is None else host:
        connection.putheader("Host", value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer, body


def cells(tmp_path, text):
    """Return the cells of the first row of the first table: heading -> text."""
    (path := tmp_path / "page.html").write_text(text, encoding="utf-8")
    row = re.search(r"<tbody.*?</tr>", text, re.S)[0]
    found = re.findall(r'data-label="([^"]*)"[^>]*>(.*?)</t[hd]>', row)
    assert Page(path).inside("h1")
    return {name: re.sub(r"<[^>]*>", " ", cell).strip() for name, cell in found}


def test_a_run_is_shown_from_its_shards(problem, tmp_path, monkeypatch):
    root = tmp_path / "results"
    partial = begin(problem, root, monkeypatch)
    row = cells(tmp_path, make_live_page(root))
    assert row["Run"] == str(partial.parents[1].relative_to(root)) and row["State"] == "unfinished"
    assert row["Done"] == "100 %" and row["Images seen"] == "60 of 60"
    assert int(row["Lost so far"]) >= 6, "every tenth image is misclassified"
    assert "FGSM: 60" in row["Images per attack"] and "call evaluate again" in row["Note"]
    model, x, y = problem
    done = evaluate(model, [FGSM(), PGD(steps=3)], x=x, y=y, eps=0.1, results=root, name="begun")
    assert int(row["Lost so far"]) == 60 - round(60 * done.robust_accuracy.value)
    text = make_live_page(root)
    assert "Nothing is running" in text and "Finished last" in text and "custom/begun" in text


def test_a_damaged_shard_is_named_and_not_counted(problem, tmp_path, monkeypatch):
    root = tmp_path / "results"
    partial = begin(problem, root, monkeypatch)
    (partial / "x.parquet").write_bytes(b"PAR1")
    assert "damaged files, not counted: 1" in cells(tmp_path, make_live_page(root))["Note"]
    for shard in partial.glob("*.parquet"):
        shard.write_bytes(shard.read_bytes()[:-9])
    row = cells(tmp_path, make_live_page(root))
    assert row["Images seen"] == "0 of 60" and row["Lost so far"] == "0" and row["Images per attack"] == "–"


@pytest.mark.parametrize("place", ["model", "suite", "shard"])
def test_what_a_link_leads_to_is_not_shown(problem, tmp_path, monkeypatch, place):
    root, other = tmp_path / "results", tmp_path / "other"
    partial = begin(problem, other, monkeypatch)
    folder = partial.parents[1]
    if place == "model":
        (root / "custom").mkdir(parents=True)
        (root / "custom/begun").symlink_to(folder.parent)
    elif place == "suite":
        (root / "custom/begun").mkdir(parents=True)
        (root / "custom/begun" / folder.name).symlink_to(folder)
    else:
        own = begin(problem, root, monkeypatch)
        for shard in own.glob("*.parquet"):
            shard.unlink()
            shard.symlink_to(next(partial.glob("*.parquet")))
        assert cells(tmp_path, make_live_page(root))["Images seen"] == "0 of 60"
        return
    assert find_runs(root)
    assert "Nothing is running" in make_live_page(root) and "begun" not in make_live_page(root)


def test_hostile_names_are_escaped(tmp_path):
    root = tmp_path / "results"
    put(root, result("<img src=x onerror=alert(1)>", "quick", 1, {"PGD": 1}, n=2))
    (root / "mnist/<script>/s").mkdir(parents=True)
    (root / "mnist/<script>/s/result.json").write_text("{", encoding="utf-8")
    (path := tmp_path / "page.html").write_text(make_live_page(root), encoding="utf-8")
    page = Page(path)
    assert "<img src=x onerror=alert(1)>" in page.text and "<script>" in page.text
    assert [e for e, _ in page.elements if e in ("img", "script")] == ["script"]


def test_only_the_page_is_served(tmp_path):
    root = tmp_path / "results"
    path = put(root, result("at", "quick", 1, {"PGD": 1}, n=2))
    with serving(root) as port:
        answer, body = ask(port)
        assert answer.status == 200 and "mnist/at/quick" in body and "Content-Security-Policy" in body
        assert answer.headers["Cache-Control"] == "no-store" and answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert not [key for key in answer.headers if key.startswith("Access-Control")]
        inside = f"/{path.relative_to(root)}"
        for wrong in (inside, "/../secret", "/%2e%2e/secret", "//etc/passwd", "/?x", f"http://127.0.0.1:{port}/", "*"):
            assert ask(port, wrong)[0].status == 404
        answer, body = ask(port, "/favicon.ico")
        assert answer.status == 204 and not body, "a browser asks for it, and must not print an error"
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH"):
            assert ask(port, method=method)[0].status == 501
        answer, body = ask(port, method="HEAD")
        assert answer.status == 200 and not body


@pytest.mark.parametrize(
    "host",
    [["evil.example"], ["evil.example:PORT"], ["127.0.0.1"], ["127.0.0.1:1"], ["localhost.evil.example:PORT"],
     ["127.0.0.1:PORT", "evil.example"], ["evil.example", "127.0.0.1:PORT"], [], [""], ["0.0.0.0:PORT"]],
)  # fmt: skip
def test_other_names_of_this_machine_are_refused(tmp_path, host):
    (tmp_path / "results").mkdir()
    with serving(tmp_path / "results") as port:
        answer, body = ask(port, host=[name.replace("PORT", str(port)) for name in host])
        assert answer.status == 421 and "Runs in" not in body
        assert ask(port, host=[f"localhost:{port}"])[0].status == 200


def test_the_server_is_bound_to_this_machine_and_reads_at_most_every_two_seconds(tmp_path, monkeypatch):
    (tmp_path / "results").mkdir()
    made = []
    monkeypatch.setattr(live, "make_live_page", lambda root: made.append(root) or "page")
    with make_server(tmp_path / "results", 0) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert server.read_page() == server.read_page() == b"page" and len(made) == 1
        server._made -= 2
        server.read_page()
        assert len(made) == 2
        with pytest.raises(StorageError, match="cannot be used"):
            make_server(tmp_path / "results", server.server_port)


def test_nothing_is_written(problem, tmp_path, monkeypatch):
    root = tmp_path / "results"
    begin(problem, root, monkeypatch)

    def look():
        paths = sorted(p for p in root.rglob("*") if p.is_file())
        return [(p, hashlib.sha256(p.read_bytes()).hexdigest()) for p in paths]

    before = look()
    with serving(root) as port:
        assert ask(port)[0].status == 200
    assert look() == before


@pytest.mark.whole
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_command_serves_without_torch_until_ctrl_c(tmp_path):
    (tmp_path / "results").mkdir()
    code = "import signal, sys; sys.modules['torch'] = None; sys.argv = ['robbench', 'serve', '--port', '0']\n"
    # A job in the background of a shell, such as these tests, ignores SIGINT, and so would what it starts.
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "from robbench.__main__ import run_in_process; sys.exit(run_in_process())"
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            port = int(re.search(r":(\d+)/", process.stdout.readline())[1])
            assert "Runs in results" in ask(port)[1]
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
        finally:
            process.kill()
