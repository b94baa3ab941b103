"""Files, names and addresses that mean harm: each is refused in words, and nothing outside is read, written or run."""

import ast
import gzip
import hashlib
import http.server
import io
import json
import os
import pickle
import tarfile
import threading
import time
import urllib.request
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision import datasets

import robbench
from robbench.commands.printing import print_table
from robbench.core.errors import CardError, DataError, ModelError, ResultError, RobbenchError, StorageError, SuiteError
from robbench.core.files import check_path_component, read_bounded
from robbench.core.numbers import parse_fraction
from robbench.data import sets as data
from robbench.evaluation.run import evaluate
from robbench.models import outside
from robbench.models.architectures import build
from robbench.models.card import Registry, load_card
from robbench.models.load import load_model, parse_state
from robbench.papers.trained import render_trained_page
from robbench.report.curve import draw_curve
from robbench.report.escape import escape_markdown
from robbench.results.places import locate_result
from robbench.results.schema import dump_result, read_result
from robbench.suite import load_suite
from support.commands import run
from support.datasets import idx, pixels
from support.fuzzing import bounded_memory
from support.leaderboard import read_leaderboard

HOSTILE = "<img src=x onerror=alert(1)>|[a](javascript)`c`"


# --- files ---------------------------------------------------------------------------------------------------


def test_zip_bombs_are_refused_before_they_are_unpacked():
    plain = io.BytesIO()
    torch.save({"a": torch.zeros(4)}, plain)
    bomb = io.BytesIO()
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        for member in source.infolist():
            packed.writestr(member.filename, source.read(member))
        packed.writestr("archive/data/1", bytes(10**7))
    with pytest.raises(ModelError, match=r"unpacks to 10,\d\d\d,\d\d\d"):
        parse_state(bomb.getvalue(), ".pt")
    assert parse_state(plain.getvalue(), ".pt")


def test_gzip_bombs_are_cut_off(tmp_path):
    (tmp_path / "mnist").mkdir()
    for kind, content in (("images-idx3", idx(pixels(3, 28, 28)) + bytes(10**7)), ("labels-idx1", b"")):
        (tmp_path / "mnist" / f"t10k-{kind}-ubyte.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=r"more than 7,840,016 bytes.*for 10,000 images"):
        data.load("mnist", "test", tmp_path)


@pytest.mark.parametrize("name", ["cifar-100-python/test", "../../test", "/etc/test"])
def test_members_of_archives_are_neither_huge_nor_unpacked(tmp_path, name):
    (tmp_path / "cifar100").mkdir()
    with tarfile.open(tmp_path / "cifar100" / "cifar-100-python.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = 10**9
        archive.addfile(info)  # the claim alone
    with pytest.raises(DataError, match=r"claims 1,000,000,000 bytes"):
        data.load("cifar100", "test", tmp_path)
    assert os.listdir(tmp_path) == ["cifar100"]


def registry(tmp_path, link=None):
    """A registry with the digits model `natural`; its weights may be a link."""
    repo = Path(__file__).resolve().parents[2]
    (tmp_path / "digits").mkdir(parents=True)
    (tmp_path / "weights/digits").mkdir(parents=True)
    (tmp_path / "digits/natural.toml").write_text((repo / "models/digits/natural.toml").read_text())
    content = (repo / "models/weights/digits/natural.safetensors").read_bytes()
    place = tmp_path / "weights/digits/natural.safetensors"
    if link:
        link.write_bytes(content)
        place.symlink_to(link)
    else:
        place.write_bytes(content)
    return Registry([tmp_path]).find("natural")


def test_weights_do_not_come_through_a_link_out_of_the_registry(tmp_path):
    with pytest.raises(ModelError, match="link out of the registry"):
        load_model(registry(tmp_path / "a", tmp_path / "outside.safetensors"))
    load_model(registry(tmp_path / "b"))


def test_a_card_does_not_ask_for_more_memory_than_its_weights_fill(tmp_path):
    entry = registry(tmp_path)
    text = entry.path.read_text().replace('name = "digits_convnet"', 'name = "wide_resnet"\nargs = {widen_factor = 40}')
    entry.path.write_text(text)
    with bounded_memory(2**30), pytest.raises(ModelError, match=r"has \d+,\d{3},\d{3} parameters; allowed: 16,777,216"):
        load_model(Registry([tmp_path]).find("natural"))


def programs():
    """Models that are programs: a traced network, and a graph as ONNX stores it, up to its weights."""
    out = io.BytesIO()
    torch.jit.save(torch.jit.trace(build("digits_convnet", {}, 10, (1, 8, 8)).eval(), torch.rand(2, 1, 8, 8)), out)
    stored = io.BytesIO()  # without compression, which is refused before anything else is looked at
    with zipfile.ZipFile(out) as source, zipfile.ZipFile(stored, "w") as packed:
        for member in source.infolist():
            packed.writestr(member.filename, source.read(member))
    return {"TorchScript": stored.getvalue(), "ONNX": b"\x08\x08\x12\x07pytorch\x1a\x052.9.0:\x00"}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".ts", ".onnx", ".safetensors", ""])
@pytest.mark.parametrize("kind", ["TorchScript", "ONNX"])
def test_weights_of_a_card_are_no_program(tmp_path, monkeypatch, kind, suffix):
    """A card of a stranger's tree may name any file with its digest. Only the user can ask for a program."""
    entry, content = registry(tmp_path), programs()[kind]
    text = entry.path.read_text()
    place = entry.root / f"weights/digits/other{suffix}"
    place.write_bytes(content)
    text = text.replace("digits/natural.safetensors", f"digits/other{suffix}")
    entry.path.write_text(text.replace(entry.card.weights.sha256, hashlib.sha256(content).hexdigest()))
    ran = []
    monkeypatch.setattr(torch.jit, "load", lambda *a, **k: ran.append(a))
    monkeypatch.setattr(torch._C, "import_ir_module_from_buffer", lambda *a, **k: ran.append(a))
    monkeypatch.setattr(outside, "import_package", lambda *a, **k: ran.append(a))
    is_state = suffix in (".pt", ".pth", ".ckpt", ".safetensors")
    with pytest.raises(ModelError, match="not a readable state dict" if is_state else "file type"):
        load_model(Registry([tmp_path]).find("natural"))
    assert not ran


def test_results_are_not_written_through_a_link_out_of_the_tree(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("keep")
    (tmp_path / "r/digits/natural").mkdir(parents=True)
    (tmp_path / "r/digits/natural/quick").symlink_to(tmp_path / "precious")
    with pytest.raises(StorageError, match=r"quick is a link, to .*precious"):
        evaluate("digits/natural", "quick", samples=2, results=tmp_path / "r", overwrite=True)
    assert os.listdir(tmp_path / "precious") == ["file"]


@pytest.mark.parametrize(
    "link", ["custom", "custom/small", ".locks", "custom/small/quick@{}", "custom/small/quick@{}/.partial"]
)
def test_no_write_follows_a_link_within_the_tree(problem, tmp_path, link):
    """Whether the link leads outside or to another place in the tree; the tree itself may be a link."""
    model, x, y = problem
    call = {"x": x, "y": y, "name": "small", "eps": 0.05}
    run_id = evaluate(model, "quick", **call, results=tmp_path / "first").run_id
    for target in (tmp_path / "outside", tmp_path / "r/inside"):
        target.mkdir(parents=True)
        (target / "file").write_text("keep")
        place = tmp_path / "r" / link.format(run_id[:8])
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(target)
        with pytest.raises(StorageError, match=f"{place.name} is a link"):
            evaluate(model, "quick", **call, results=tmp_path / "r", overwrite=True)
        assert os.listdir(target) == ["file"] and (target / "file").read_text() == "keep"
        place.unlink()
    (tmp_path / "named").symlink_to(tmp_path / "r")
    assert evaluate(model, "quick", **call, results=tmp_path / "named").run_id == run_id


def test_files_that_are_links_are_replaced_and_their_targets_stay(problem, tmp_path):
    model, x, y = problem
    call = {"x": x, "y": y, "name": "small", "eps": 0.05, "results": tmp_path / "r"}
    (tmp_path / "precious").write_text("keep")
    folder = locate_result(tmp_path / "r", evaluate(model, "quick", **call))
    (lock,) = (tmp_path / "r/.locks").glob("*.lock")
    lock.with_suffix(".json").symlink_to(tmp_path / "precious")
    for name in ("result.json", "outcomes.parquet", "timings.parquet"):
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "precious")
    evaluate(model, "quick", **call)
    assert (tmp_path / "precious").read_text() == "keep"
    assert not (folder / "result.json").is_symlink() and read_result(folder / "result.json")
    lock.unlink()
    lock.symlink_to(tmp_path / "precious")  # opening a lock empties the file
    with pytest.raises(StorageError, match="is a link"):
        evaluate(model, "quick", **call)
    assert (tmp_path / "precious").read_text() == "keep"


def test_pages_and_figures_follow_no_link(tmp_path):
    (tmp_path / "precious").write_text("keep")
    (tmp_path / "outside").mkdir()
    (tmp_path / "r").mkdir()
    for name in ("tables", "figures"):
        (tmp_path / "r" / name).symlink_to(tmp_path / "outside")
    for command in (["table", "all"], ["figure", "all"]):
        assert "is a link" in run(*command, "--results", tmp_path / "r", code=2).stderr
    assert not os.listdir(tmp_path / "outside")
    log = tmp_path / "log.jsonl"
    log.write_text('{"iteration": 1, "loss": 2.0}\n')
    (tmp_path / "curve.png").symlink_to(tmp_path / "precious")
    draw_curve(log, tmp_path / "curve.png", "title")
    assert (tmp_path / "precious").read_text() == "keep" and (tmp_path / "curve.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..", "a/b", "a\x00b", "x" * 300, "a\u202eb"])
@pytest.mark.parametrize("where", ["name", "dataset"])
def test_names_of_models_and_data_sets_lead_nowhere_else(problem, tmp_path, name, where):
    model, x, y = problem
    call = {"name": "small", "dataset": "custom", where: name}
    with pytest.raises(RobbenchError, match="printable text"):
        evaluate(model, "quick", x=x, y=y, eps=0.05, results=tmp_path / "r", **call)
    assert not (tmp_path / "r").exists() or not list((tmp_path / "r").rglob("*.json"))


def test_a_result_that_names_a_place_outside_is_refused(repo, tmp_path):
    stored = json.loads((repo / "results/digits/at/fast/result.json").read_text())
    for field in ("model", "dataset", "suite"):
        (tmp_path / "result.json").write_text(json.dumps({**stored, field: "../../../etc"}))
        with pytest.raises(ResultError, match=f"{field}: .*without /"):
            read_result(tmp_path / "result.json")
    (tmp_path / "result.json").write_text(json.dumps({**stored, "seconds": float("nan")}))
    with pytest.raises(ResultError, match="seconds"):
        read_result(tmp_path / "result.json")


def test_what_is_no_file_or_too_large_is_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(CardError, match="not a regular file"):
        load_card(tmp_path / "pipe.toml")
    (tmp_path / "large.toml").write_bytes(b"#" * (2**17 + 1))
    with pytest.raises(CardError, match="larger than 131,072 bytes"):
        load_card(tmp_path / "large.toml")
    with pytest.raises(SuiteError, match="larger than"):
        load_suite(str(tmp_path / "large.toml"))
    with pytest.raises(OSError, match="larger"):
        read_bounded(tmp_path / "large.toml", 10)


@pytest.mark.parametrize("text", ["1e999999999", "9" * 101, "1e-99999999999999", 10**200])
def test_a_few_characters_cost_no_billion_digits(text):
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="at most 100 digits"):
        parse_fraction(text)
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize(
    ("name", "args"),
    [("wide_resnet", {"depth": 10**6}), ("digits_convnet", {"width": 4096, "hidden": 10**9}), ("linear", {"x": -1})],
)
def test_architectures_beyond_reason_are_refused_before_they_are_built(name, args):
    begin = time.perf_counter()
    with pytest.raises(ModelError):
        build(name, args, 10, (3, 32, 32))
    assert time.perf_counter() - begin < 5


NEGATIVE = ["steps = -1", "steps = 0", "restarts = -3", "step_size = -0.1", "step_size = inf", "eot = -1"]


@pytest.mark.parametrize("budget", NEGATIVE)
def test_budgets_that_mean_nothing_are_refused(tmp_path, budget):
    from robbench.suite import build_attack

    (tmp_path / "s.toml").write_text(f'version = 1\n[[attack]]\nname = "a"\nkind = "pgd"\n{budget}\n')
    with pytest.raises(SuiteError):
        build_attack(load_suite(str(tmp_path / "s.toml")).stages("digits")[0])


# --- downloads -----------------------------------------------------------------------------------------------


class Redirect(http.server.BaseHTTPRequestHandler):
    """Sends everybody to an address without encryption, or sends without end."""

    def do_GET(self):
        if "endless" in self.path:
            self.send_response(200)
            self.end_headers()
            with pytest.MonkeyPatch.context():
                try:
                    while True:
                        self.wfile.write(bytes(1 << 16))
                except OSError:
                    return
        self.send_response(302)
        self.send_header("Location", "http://example.org/file")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def address():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Redirect) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def fetch_from(url, monkeypatch, folder):
    """Fetch a data set that lies at this address."""
    monkeypatch.setattr(datasets.CIFAR100, "url", url)
    data.fetch("cifar100", folder, lambda line: None)


@pytest.mark.parametrize("url", ["http://example.org/x", "ftp://example.org/x", "file:///etc/passwd", "{}/redirect"])
def test_downloads_come_over_https_only_even_after_a_redirect(tmp_path, address, monkeypatch, url):
    with pytest.raises(DataError, match="https only"):
        fetch_from(url.format(address), monkeypatch, tmp_path)
    assert os.listdir(tmp_path / "cifar100") == []


def test_a_download_without_end_is_cut_off(tmp_path, address, monkeypatch):
    monkeypatch.setattr(data, "_MOST_BYTES", 10**6)
    with pytest.raises(DataError, match="more than 1,000,000 bytes came"):
        fetch_from(f"{address}/endless", monkeypatch, tmp_path)
    assert os.listdir(tmp_path / "cifar100") == []


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100"])
def test_every_data_set_has_an_address_with_https(tmp_path, monkeypatch, name):
    def offline(*args, **kwargs):
        raise OSError("no network in tests")

    told = []
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", offline)
    with pytest.raises(DataError, match="could not be downloaded"):
        data.fetch(name, tmp_path, told.append)
    assert any("downloading https://" in line for line in told), told


# --- code ----------------------------------------------------------------------------------------------------

ROOT = Path(robbench.__file__).parent
# On a Ray cluster, a worker takes its job from the driver that started it, in Ray's own format; no file is read so.
ALLOWED = {
    ("data/formats.py", "pickle"),
    ("core/machine.py", "subprocess"),
    ("evaluation/ray_actor.py", "pickle"),
    ("evaluation/ray_actor.py", "pickle.loads"),
}


def test_the_package_runs_no_text_no_pickle_and_no_shell():
    """`eval`, `exec` and `os.system` nowhere; `pickle` only where a subclass admits names; no shell; weights only."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            file = path.relative_to(ROOT).as_posix()
            place = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
                for module in {"pickle", "marshal", "shelve", "dill", "subprocess", "yaml", "joblib"} & set(names):
                    if (file, module) not in ALLOWED:
                        found.append(f"{place} imports {module}")
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                given_ = {k.arg: ast.unparse(k.value) for k in node.keywords}
                if called in ("eval", "exec", "compile", "os.system", "os.popen") or "shell" in given_:
                    found.append(f"{place} calls {called}")
                safe = ("allow_pickle", "False") if called != "torch.load" else ("weights_only", "True")
                if called in ("torch.load", "np.load", "numpy.load") and safe not in given_.items():
                    found.append(f"{place} loads what may run code")
                if called in ("pickle.load", "pickle.loads", "pickle.Unpickler") and (file, called) not in ALLOWED:
                    found.append(f"{place} calls {called}")
    assert not found


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_no_pickle_is_obeyed_whatever_its_protocol(tmp_path, protocol):
    content = pickle.dumps({"w": Touch(tmp_path / "ran")}, protocol)
    with pytest.raises(ModelError):
        parse_state(content, ".pt")
    assert not (tmp_path / "ran").exists()


def test_a_pickle_that_asks_for_a_huge_table_is_refused_before_it_is_made(tmp_path):
    folder = tmp_path / "cifar10" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number in (2**28).to_bytes(4, "little"), b"\xff\xff\xff\xff":
        (folder / "test_batch").write_bytes(b"\x80\x02}r" + number + b".")
        with pytest.raises(DataError, match="memo number"):
            data.load("cifar10", "test", tmp_path)


# --- what we write -------------------------------------------------------------------------------------------


def test_pages_hold_names_as_text(repo, tmp_path):
    stored = read_result(repo / "results/digits/at/fast/result.json")
    hostile = stored.model_copy(update={"model": HOSTILE, "suite": HOSTILE, "flags": {HOSTILE: HOSTILE}})
    place = tmp_path / "digits" / "m" / "s" / "result.json"
    place.parent.mkdir(parents=True)
    place.write_text(dump_result(hostile))
    page = read_leaderboard(tmp_path)
    assert "<img" not in page and "](javascript" not in page.replace("\\](", "")


def test_the_page_of_trained_models_holds_cards_as_text(tmp_path):
    entry = registry(tmp_path)
    text = entry.path.read_text().replace('hardware = "', f'hardware = "{HOSTILE} ')
    assert HOSTILE in text
    entry.path.write_text(text)
    page = render_trained_page(Registry([tmp_path]).entries(), tmp_path)
    assert "onerror" in page and "<img" not in page


def test_tables_in_the_terminal_show_markup_as_text(capsys):
    print_table([{"title": "[bold]x[/bold] [/nothing] \x1b[31m"}], as_json=False)
    shown = capsys.readouterr().out
    assert "[bold]x[/bold] [/nothing]" in shown and "\x1b[31m" not in shown


@pytest.mark.whole
@given(st.text(max_size=80))
def test_escaped_text_has_no_tag_and_no_cell(text):
    out = escape_markdown(text)
    assert "<" not in out.replace("&lt;", "") and "\n" not in out
    assert all(out[i - 1] == "\\" for i, c in enumerate(out) if c == "|")


@given(st.text(max_size=40))
def test_a_component_never_leaves_its_folder(text):
    root = Path("/a/b").resolve()
    try:
        name = check_path_component(text, "name")
    except ValueError:
        return
    assert Path(os.path.normpath(root / name)).parent == root
