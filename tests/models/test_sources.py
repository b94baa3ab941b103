"""Models without a card: every source loads what it says, and every way to fail ends in one useful sentence."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from base64 import urlsafe_b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import safetensors.torch
import torch

from robbench.core.errors import DataError, ModelError, RobbenchError
from robbench.evaluation.run import evaluate
from robbench.models import architectures
from robbench.models.architectures import Normalized, build
from robbench.models.load_source import load_source
from robbench.models.sources import parse_source
from robbench.models.spec import ModelSpec

pytestmark = pytest.mark.whole

DIGITS = (1, 8, 8)
COMMIT = "c0ffee" * 6 + "c0ff"


def needs(*packages):
    lacking = [p for p in packages if importlib.util.find_spec(p) is None]
    return pytest.mark.skipif(bool(lacking), reason=f"not installed: {', '.join(lacking)}")


def python(code, *args, path=(), cwd=None, **env):
    """Run code in a fresh interpreter, with further folders in front of everything it could import."""
    search = [*map(str, path), *(p for p in [os.environ.get("PYTHONPATH")] if p)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(search), **env}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )


CLI = "import sys\nfrom robbench.__main__ import main\nmain()"


def robbench(*args, code=0, **options):
    done = python(CLI, *args, **options)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def load(text, in_shape=DIGITS, num_classes=10, **how):
    return load_source(ModelSpec(text, **how), in_shape, num_classes)


def linear_weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"1.weight": torch.randn(10, 64, generator=generator), "1.bias": torch.randn(10, generator=generator)}


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "mine.safetensors"
    path.write_bytes(safetensors.torch.save(linear_weights()))
    return path


# What is a source, and what it is called.


@pytest.mark.parametrize("name", ["natural", "digits/natural", "a.b", ""])
def test_names_of_cards_are_no_sources(name):
    assert parse_source(name) is None


@pytest.mark.parametrize(
    ("text", "kind", "parts", "name"),
    [
        ("robustbench:A_b-1", "robustbench", ("cifar10", "Linf", "A_b-1"), "robustbench-A_b-1"),
        ("robustbench:cifar100/L2/A", "robustbench", ("cifar100", "L2", "A"), "robustbench-L2-A"),
        ("hf:o/r", "hf", ("o/r", "", "model.safetensors"), "hf-o-r"),
        ("hf:o/r@v1:x.safetensors", "hf", ("o/r", "v1", "x.safetensors"), "hf-o-r-v1-x"),
        ("hf:o/r@refs/pr/1", "hf", ("o/r", "refs/pr/1", "model.safetensors"), "hf-o-r-refs-pr-1"),
        ("hf:o/r:a/b.safetensors", "hf", ("o/r", "", "a/b.safetensors"), "hf-o-r-a-b"),
        ("timm:resnet18.a1_in1k", "timm", ("resnet18.a1_in1k", ""), "timm-resnet18.a1_in1k"),
        ("file:/tmp/a b/net 1.safetensors", "file", ("/tmp/a b/net 1.safetensors",), "file-net-1"),
        ("file:../../..", "file", ("../../..",), "file"),
        ("timm:../../etc/passwd", "timm", ("../../etc/passwd", ""), "timm-etc-passwd"),
        ("a.b:c", "function", ("a.b", "c"), "a.b-c"),
    ],
)
def test_sources_are_recognized_and_named_safely(text, kind, parts, name):
    source = parse_source(text)
    assert (source.text, source.kind, source.parts, source.name) == (text, kind, parts, name)
    assert Path("results", source.name).resolve().parent == Path("results").resolve()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("torchhub:owner/repo", "Unknown source 'torchhub:owner/repo'. Allowed: robustbench:NAME"),
        ("https://host/a.safetensors", "package.module:function"),
        ("mine:", "Unknown source"),
        ("robustbench:", "expected robustbench:NAME or robustbench:DATASET/THREAT/NAME"),
        ("robustbench:svhn/Linf/A", "datasets allowed: cifar10, cifar100, imagenet"),
        ("robustbench:cifar10/L1/A", "threats allowed: Linf, L2, corruptions"),
        ("robustbench:cifar10/A", "expected robustbench:NAME or"),
        ("hf:repo", "expected hf:OWNER/REPO or"),
        ("hf:o/r:model.bin", "'model.bin' given; allowed from a hub: the path of a .safetensors file"),
        ("hf:o/r:../x.safetensors", "in the repository. Such a file cannot run code"),
        ("timm:", "expected timm:NAME"),
        ("file:", "expected file:PATH"),
    ],
)
def test_what_is_no_source_says_what_is(text, message):
    with pytest.raises(ModelError) as caught:
        parse_source(text)
    assert message in str(caught.value)


# file:


def test_a_file_is_the_card_with_the_same_weights(tmp_path, repo):
    file = repo / "models/weights/digits/natural.safetensors"
    common = ["--suite", "quick", "--samples", "16", "--json"]
    command = ["eval", "--model", f"file:{file}", "--dataset", "digits", "--architecture", "digits_convnet", *common]
    first = robbench(*command, cwd=tmp_path)
    result = json.loads(first.stdout)
    assert (tmp_path / "results/digits/file-natural/quick/result.json").exists()
    again = robbench(*command, cwd=tmp_path)
    assert "known since" in again.stderr and json.loads(again.stdout) == result
    card = json.loads(robbench("eval", "--model", "digits/natural", *common, cwd=tmp_path).stdout)
    for key in ("clean_accuracy", "robust_accuracy", "threat", "n"):
        assert result[key] == card[key]
    assert [a["robust_accuracy"] for a in result["attacks"]] == [a["robust_accuracy"] for a in card["attacks"]]
    assert result["identity"]["weights"] == card["identity"]["weights"]
    assert result["identity"]["model"] == {
        "source": "file:natural.safetensors",
        "architecture": {"name": "digits_convnet", "args": {}, "num_classes": 10},
    }
    # The name of the folder is taken: other weights under it are told, not mixed in.
    other = tmp_path / "natural.safetensors"
    shutil.copy(repo / "models/weights/digits/at.safetensors", other)
    told = robbench(*[f"file:{other}" if a == f"file:{file}" else a for a in command], cwd=tmp_path, code=2)
    assert "different run" in told.stderr and "weights" in told.stderr


def test_a_file_and_a_card_side_by_side(weights, tmp_path):
    args = ["eval", "-m", f"file:{weights}", "-m", "digits/natural", "--dataset", "digits", "--architecture", "linear"]
    done = robbench(*args, "-s", "quick", "--samples", 8, "--mean", "0.5", "--std", "0.25", "--json", cwd=tmp_path)
    results = json.loads(done.stdout)
    assert [r["model"] for r in results] == ["file-mine", "natural"]
    assert results[0]["identity"]["model"]["preprocess"] == {"mean": [0.5], "std": [0.25]}


def test_normalization_and_arguments_reach_the_module(weights, tmp_path):
    x, state = torch.rand(3, *DIGITS), linear_weights()
    plain = x.flatten(1) @ state["1.weight"].T + state["1.bias"]
    before = torch.get_rng_state()
    found = load(f"file:{weights}", architecture="linear")
    assert torch.equal(before, torch.get_rng_state())
    assert torch.allclose(found.module(x), plain, atol=1e-5)
    assert found.weights == hashlib.sha256(weights.read_bytes()).hexdigest()
    moved = load(f"file:{weights}", architecture="linear", mean=(0.5,), std=(0.25,)).module
    assert isinstance(moved, Normalized)
    assert torch.allclose(moved(x), found.module((x - 0.5) / 0.25), atol=1e-5)
    small = build("digits_convnet", {"width": 4, "hidden": 8}, 10, DIGITS).eval()
    torch.save({"state_dict": small.state_dict()}, tmp_path / "small.pt")
    found = load(f"file:{tmp_path / 'small.pt'}", architecture="digits_convnet: width=4, hidden=8")
    assert torch.equal(found.module(x), small(x))
    assert found.identity["architecture"] == {
        "name": "digits_convnet", "args": {"width": 4, "hidden": 8}, "num_classes": 10
    }  # fmt: skip


def test_arguments_take_the_type_of_the_builder(weights, monkeypatch):
    seen = {}

    def net(num_classes, in_shape, *, whole=1, part=0.5, flag=True, word="a"):
        seen.update(whole=whole, part=part, flag=flag, word=word)
        return build("linear", {}, num_classes, in_shape)

    monkeypatch.setitem(architectures.ARCHITECTURES, "net", net)
    load(f"file:{weights}", architecture="net:whole=3,part=2,flag=false,word=7")
    assert seen == {"whole": 3, "part": 2.0, "flag": False, "word": "7"}
    assert [type(v) for v in seen.values()] == [int, float, bool, str]
    with pytest.raises(ModelError, match="flag: 'maybe' given; expected: bool"):
        load(f"file:{weights}", architecture="net:flag=maybe")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "weights without an architecture are no model. Give --architecture NAME"),
        ({"architecture": "linaer"}, "Unknown architecture 'linaer'. Did you mean linear"),
        ({"architecture": "linear:depth=3"}, "Unknown argument of architecture linear 'depth'"),
        ({"architecture": "digits_convnet:width=wide"}, "width: 'wide' given; expected: int"),
        ({"architecture": "digits_convnet:width"}, "'width' given; expected: name:key=value"),
        ({"architecture": "digits_convnet:width=3,width=4"}, "each key once"),
        ({"architecture": "digits_convnet"}, "the weights do not fit the architecture: missing: 0.bias"),
        ({"architecture": "linear:num_classes=9"}, "num_classes 9 given; the data set has 10"),
        ({"architecture": "linear", "mean": (0.5,)}, "mean [0.5] and std []"),
        ({"architecture": "linear", "mean": (0.5,) * 3, "std": (0.5,) * 3}, "the images have 1 channel."),
        ({"architecture": "linear", "mean": (0.5,), "std": (0.0,)}, "std above 0"),
        ({"architecture": "linear", "mean": (float("nan"),), "std": (1.0,)}, "finite"),
    ],
)
def test_wrong_builds_are_refused(weights, how, message):
    with pytest.raises(ModelError) as caught:
        load(f"file:{weights}", **how)
    assert message in str(caught.value) and str(caught.value).startswith(f"file:{weights}")


def test_wrong_files_are_refused(tmp_path):
    for name, data, message in [
        ("none.safetensors", None, "cannot be read (No such file or directory)"),
        ("net.pkl", b"x", "file type '.pkl' given; allowed: '.safetensors', '.pt', '.pth'"),
        ("net.pt", b"x", "not a readable state dict"),
    ]:
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelError) as caught:
            load(f"file:{tmp_path / name}", architecture="linear")
        assert message in str(caught.value)
    with pytest.raises(ModelError, match="Is a directory"):
        load(f"file:{tmp_path}", architecture="linear")


def test_images_of_ones_own(weights, tmp_path):
    x = torch.rand(6, *DIGITS)
    y = load(f"file:{weights}", architecture="linear").module(x).argmax(1)
    call = {"x": x, "y": y, "eps": 0.01, "results": tmp_path / "results"}
    result = evaluate(f"file:{weights}", "quick", architecture="linear:num_classes=10", **call)
    assert (result.n, result.clean_accuracy.value, result.model) == (6, 1.0, "file-mine")
    assert (tmp_path / "results" / "custom" / "file-mine").is_dir()
    named = evaluate(f"file:{weights}", "quick", architecture="linear:num_classes=10", name="n", dataset="d", **call)
    assert (named.model, named.dataset) == ("n", "d")
    with pytest.raises(ModelError, match="num_classes None given; for images of your own linear:num_classes=K"):
        evaluate(f"file:{weights}", "quick", architecture="linear", **call)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        ("file:x.safetensors", {}, DataError, "name of a data set (dataset=, --dataset): digits, mnist"),
        ("file:x.safetensors", {"dataset": "digts"}, DataError, "Did you mean digits"),
        ("file:x.safetensors", {"dataset": "cifar10", "data_dir": "/none"}, DataError, "robbench data fetch cifar10"),
        ("timm:resnet18", {"dataset": "digits", "architecture": "linear"}, ModelError, "go with file: and hf:"),
        ("robustbench:A", {"dataset": "digits"}, ModelError, "data set 'digits' given; this source means cifar10"),
        ("digits/natural", {"architecture": "linear"}, RobbenchError, "not with a registered name"),
        (torch.nn.Flatten().eval(), {"mean": [0.5]}, RobbenchError, "a model of your own is complete"),
    ],
)
def test_options_that_do_not_go_with_the_model(model, options, error, message):
    with pytest.raises(error) as caught:
        evaluate(model, "quick", **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-m", "digits/natural", "--dataset", "digits"], "--dataset given with a registered model"),
        (["-m", "digits/natural", "-m", "torchhub:a/b"], "Unknown source"),
        (
            ["-m", "file:x.pt", "--dataset", "digits", "--mean", "0.5;0.5"],
            "--mean: '0.5;0.5' given; allowed: one number per channel",
        ),
        (["-m", "file:x.pt"], "--dataset"),
    ],
)
def test_wrong_input_on_the_command_line(args, message):
    assert message in robbench("eval", *args, code=2).stderr


# package.module:function


MINE = """
import torch
print("importing")
from torch import nn

def net():
    print("building")
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()

def small(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 2)).eval()
def picky(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 10)).eval()
def training(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
def text(): return "a net"
def wants(depth): return net()
def fails(): raise ValueError("out of ideas")
class Asserting(nn.Module):
    def forward(self, x): assert False, "224 only"
def asserting(): return Asserting().eval()
NUMBER = 3
"""


def test_a_function_of_ones_own(tmp_path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "mine.py").write_text(MINE)
    args = ["eval", "-m", "pack.mine:net", "--dataset", "digits", "-s", "quick", "--samples", 8, "--json"]
    # The installed command does not have the current directory on its path; without -c neither has this one.
    entry = f"import sys; sys.path = [p for p in sys.path if p not in ('', {str(tmp_path)!r})]\n{CLI}"
    done = python(entry, *args, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # what the module prints goes elsewhere
    assert "importing" in done.stderr and "building" in done.stderr
    assert result["model"] == "pack.mine-net"
    assert result["identity"]["model"]["source"] == "pack.mine:net"
    assert "Linear(in_features=64" in result["identity"]["model"]["structure"]
    assert (tmp_path / "results/digits/pack.mine-net/quick").is_dir()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("small", "The model has 2 classes; the data set has 10."),
        ("picky", r"cannot be run on images of shape \(1, 8, 8\)"),
        ("asserting", r"cannot be run on images of shape .* 224 only"),
        ("training", r"training mode .* Call model\.eval\(\) first"),
        ("text", "mine:text returned a str; expected: a function without arguments that returns"),
        ("wants", r"wants cannot be called with images.*A function that makes the model takes no arguments"),
        ("NUMBER", "NUMBER cannot be called without arguments .*; expected: a function without arguments"),
        ("fails", r"loading failed: ValueError: out of ideas \(mine\.py, line \d+\)"),
        ("nett", "Unknown function of mine 'nett'. Did you mean net"),
    ],
)
def test_functions_that_give_no_model(tmp_path, monkeypatch, function, message):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ModelError, match=message):
        evaluate(f"mine:{function}", "quick", dataset="digits", samples=4)


@pytest.mark.parametrize(
    ("module", "code", "message"),
    [
        ("nowhere_to_be_found", None, "no module 'nowhere_to_be_found', neither in .* All sources: robustbench:NAME"),
        ("broken_syntax", "def net(:", "loading failed: SyntaxError: .*broken_syntax.py, line 1"),
        ("broken_import", "import nowhere_to_be_found", "loading failed: ModuleNotFoundError: .*nowhere_to_be_found"),
    ],
)
def test_modules_that_do_not_import(tmp_path, monkeypatch, module, code, message):
    if code:
        (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(ModelError, match=message):
        load(f"{module}:net")


# hf: and timm:, against a hub on this machine


@pytest.fixture
def hub():
    """A hub that knows the files put into `hub.files`: "OWNER/REPO/FILE" -> bytes, at one commit."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, body):
            repo, _, rest = self.path.removeprefix("/").partition("/resolve/")
            revision, _, file = rest.partition("/")
            data, problem = files.get(f"{repo}/{file}"), ""
            if not any(f.startswith(f"{repo}/") for f in files):
                problem = "RepoNotFound"
            elif revision not in ("main", "v1", COMMIT):
                problem = "RevisionNotFound"
            elif data is None:
                problem = "EntryNotFound"
            self.send_response(404 if problem else 200)
            if problem:
                self.send_header("X-Error-Code", problem)
            else:
                self.send_header("X-Repo-Commit", COMMIT)
                self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Length", str(len(data or b"")))
            self.end_headers()
            if body and data:
                self.wfile.write(data)

        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

    files = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.files = files
        yield server
        server.shutdown()


def hub_env(folder, server=None):
    # Without a server the client is told to stay offline: it would try for half a minute before it gives up.
    where = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}"} if server else {"HF_HUB_OFFLINE": "1"}
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return {**where, **quiet, "HF_HOME": str(folder), "NO_PROXY": "127.0.0.1"}


SOURCES = """
import json, sys
from robbench.core.errors import ModelError
from robbench.models.load_source import load_source
from robbench.models.spec import ModelSpec
for text in sys.argv[2:]:
    try:
        found = load_source(ModelSpec(text, architecture=sys.argv[1] or None), (1, 8, 8), 10)
        print(json.dumps([found.identity["source"], found.weights]))
    except ModelError as error:
        print(json.dumps(str(error)))
"""


@needs("huggingface_hub")
def test_weights_from_a_hub(hub, tmp_path):
    data = safetensors.torch.save(linear_weights())
    hub.files.update({"owner/repo/model.safetensors": data, "owner/repo/sub/two.safetensors": data})
    common = ["--dataset", "digits", "--architecture", "linear", "-s", "quick", "--samples", 8, "--json"]
    env = hub_env(tmp_path / "cache", hub)
    result = json.loads(robbench("eval", "-m", "hf:owner/repo", *common, cwd=tmp_path, **env).stdout)
    assert result["model"] == "hf-owner-repo"
    assert result["identity"]["model"]["source"] == f"hf:owner/repo@{COMMIT}:model.safetensors"
    assert result["identity"]["weights"] == hashlib.sha256(data).hexdigest()
    wrong = {
        "hf:owner/other": "no such repository, or a private one",
        "hf:owner/repo@v2": "no such revision",
        "hf:owner/repo:three.safetensors": "no such file there",
    }
    done = python(SOURCES, "linear", "hf:owner/repo@v1:sub/two.safetensors", *wrong, **env)
    two, *told = map(json.loads, done.stdout.splitlines())
    assert two == [f"hf:owner/repo@{COMMIT}:sub/two.safetensors", result["identity"]["weights"]]
    for message, expected in zip(told, wrong.values(), strict=True):
        assert expected in message
    # What is in the cache needs no network.
    done = python(SOURCES, "linear", "hf:owner/repo", "hf:owner/repo:three.safetensors", **hub_env(tmp_path / "cache"))
    cached, told = map(json.loads, done.stdout.splitlines())
    assert cached == [result["identity"]["model"]["source"], result["identity"]["weights"]]
    assert "no network" in told and "hf:owner/repo:three.safetensors" in told


TIMM = """
import sys
import safetensors.torch, timm, torch
from robbench.core.errors import ModelError
from robbench.models.load_source import load_source
from robbench.models.spec import ModelSpec
reference = timm.create_model("test_vit", pretrained=False).eval()
reference.load_state_dict(safetensors.torch.load_file(sys.argv[1]))
found = load_source(ModelSpec("timm:test_vit"), (3, 160, 160), None)
x = torch.rand(2, 3, 160, 160)
assert torch.allclose(found.module(x), reference((x - 0.5) / 0.5), atol=1e-5)
assert not torch.allclose(found.module(x), reference(x), atol=1e-3)
import robbench
y = found.module(x).argmax(1)
result = robbench.evaluate("timm:test_vit", "quick", x=x, y=y, eps=0.001)
assert (result.model, result.clean_accuracy.value) == ("timm-test_vit", 1.0)
for shape in ((1, 160, 160), (3, 32, 32)):
    try:
        robbench.evaluate("timm:test_vit", "quick", x=torch.rand(2, *shape), y=y, eps=0.001)
        raise SystemExit("not refused")
    except ModelError as error:
        assert "takes images of shape (3, 160, 160)" in str(error), error
"""


@needs("timm", "huggingface_hub")
def test_timm_with_its_normalization_inside(hub, tmp_path):
    make = (
        "import sys, timm, torch, safetensors.torch as s\ntorch.manual_seed(0)\n"
        "s.save_file(timm.create_model('test_vit').state_dict(), sys.argv[1])"
    )
    file = tmp_path / "vit.safetensors"
    assert python(make, file).returncode == 0
    hub.files["timm/test_vit.r160_in1k/model.safetensors"] = file.read_bytes()
    done = python(TIMM, file, **hub_env(tmp_path / "cache", hub))
    assert done.returncode == 0, done.stderr
    done = python(
        SOURCES, "", "timm:resnet18", "timm:test_vlt", "timm:hf-hub:owner/repo", **hub_env(tmp_path / "empty")
    )
    offline, typo, other = map(json.loads, done.stdout.splitlines())
    assert "no network" in offline
    assert "Unknown pretrained timm model 'test_vlt'. Did you mean test_vit" in typo
    assert "Unknown pretrained timm model 'hf-hub:owner/repo'" in other


# robustbench:, by a package of that name made here


def stub_robustbench(folder):
    zoo = folder / "robustbench" / "model_zoo"
    zoo.mkdir(parents=True)
    (folder / "pkg_resources.py").write_text("")
    (zoo.parent / "__init__.py").write_text(
        "import pkg_resources\nfrom autoattack import AutoAttack\nfrom autoattack.state import EvaluationState\n"
        "import warnings; warnings.warn('noise')\n"
    )
    (zoo / "__init__.py").write_text(
        "import enum\nclass D(enum.Enum):\n    a = 'cifar10'\nclass T(enum.Enum):\n    a = 'Linf'\n    b = 'L2'\n"
        "model_dicts = {D.a: {T.a: {'Good2020': 0, 'Offline2021': 0}, T.b: {'Good2020': 0}}}\n"
    )
    (zoo.parent / "utils.py").write_text(
        "from torch import nn\n"
        "def load_model(name, model_dir, dataset, threat_model):\n"
        "    print(f'Downloading {name} ({dataset}, {threat_model}) to {model_dir}')\n"
        "    if name == 'Offline2021':\n"
        "        try: raise ConnectionRefusedError('nobody there')\n"
        "        except OSError: raise RuntimeError('gave up')\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))\n"
    )
    return folder


ROBUSTBENCH = """
import sys, torch, robbench
from robbench.core.errors import RobbenchError
x = torch.rand(4, 3, 32, 32)
for source in sys.argv[1:]:
    try:
        r = robbench.evaluate(source, "quick", x=x, y=torch.arange(4), norm="Linf", eps="8/255", samples=2)
        print(r.dataset, r.model, r.threat.norm, r.identity["model"]["source"])
    except RobbenchError as error:
        print(f"{type(error).__name__}: {error}")
"""


def test_a_model_of_robustbench(tmp_path):
    stub = stub_robustbench(tmp_path / "stub")
    cases = {
        "robustbench:Good2020": "custom robustbench-Good2020 Linf robustbench:cifar10/Linf/Good2020",
        "robustbench:cifar10/L2/Good2020": "custom robustbench-L2-Good2020 Linf robustbench:cifar10/L2/Good2020",
        "robustbench:Godo2020": "Unknown robustbench model for cifar10, Linf 'Godo2020'. Did you mean Good2020",
        "robustbench:cifar10/corruptions/Good2020": "0 are known",
        "robustbench:Offline2021": "no network, or the server does not answer. Try again later. [RuntimeError",
    }
    done = python(ROBUSTBENCH, *cases, path=[stub], ROBBENCH_ZOO=str(tmp_path / "zoo"))
    for line, expected in zip(done.stdout.splitlines(), cases.values(), strict=True):
        assert expected in line, done.stderr
    assert f"Downloading Good2020 (cifar10, L2) to {tmp_path / 'zoo'}" in done.stderr
    assert "noise" not in done.stderr


def test_robustbench_without_what_setuptools_had(tmp_path):
    code = f"import sys; sys.modules['pkg_resources'] = None\n{ROBUSTBENCH}"
    done = python(code, "robustbench:Good2020", path=[stub_robustbench(tmp_path)])
    assert 'setuptools no longer has from release 81 on: pip install "setuptools<81"' in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("source", "package", "extra"),
    [
        ("robustbench:A", "robustbench", "zoo"),
        ("timm:resnet18", "timm", "hub"),
        ("hf:o/r", "huggingface_hub", "hub"),
    ],
)
def test_missing_packages_say_how_to_get_them(monkeypatch, source, package, extra):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "autoattack", torch)  # set by the loader otherwise, and kept
    how = {"architecture": "linear"} if source.startswith("hf:") else {}
    with pytest.raises(ModelError) as caught:
        load(source, **how)
    assert str(caught.value) == (
        f'{source} needs the package {package!r}, which is not installed: pip install "robbench[{extra}]"'
    )


def test_missing_data_of_a_source_says_how_to_get_it(tmp_path):
    with pytest.raises(DataError, match="robbench data fetch cifar10"):
        evaluate("robustbench:A", "quick", data_dir=tmp_path)


def test_the_robustbench_of_torchattacks_is_told_apart(tmp_path):
    stub = stub_robustbench(tmp_path)
    utils = stub / "robustbench" / "utils.py"
    digest = urlsafe_b64encode(hashlib.sha256(utils.read_bytes()).digest()).decode().rstrip("=")
    info = stub / "torchattacks-3.5.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchattacks\nVersion: 3.5.1\n")
    (info / "RECORD").write_text(f"robustbench/utils.py,sha256={digest},{utils.stat().st_size}\n")
    done = python(ROBUSTBENCH, "robustbench:Good2020", path=[stub])
    assert "is not the real one" in done.stdout and '"robustbench==1.1.1"' in done.stdout, done.stderr
    # The real one put back over it: torchattacks still lists the file, but these are other bytes.
    utils.write_text(utils.read_text() + "# release 1.1.1\n")
    assert "robustbench-Good2020" in python(ROBUSTBENCH, "robustbench:Good2020", path=[stub]).stdout


def test_telling_a_source_imports_nothing_heavy():
    code = (
        "import sys\nfrom robbench.models.sources import parse_source\n"
        "[parse_source(t) for t in ('hf:o/r', 'timm:x', 'robustbench:x', 'file:x', 'a:b', 'natural')]\n"
        "assert not {'torch', 'timm', 'huggingface_hub', 'robustbench'} & set(sys.modules)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
