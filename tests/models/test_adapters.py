"""Models that are no plain torch network: the robust accuracy is that of an independent loop around the model."""

import importlib.util
import json
import warnings
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import nn

import robbench
from robbench.attacks import FGSM, PGD
from robbench.core.errors import ModelError, SuiteError
from robbench.evaluation.run import evaluate
from robbench.models.adapters import EstimatorModel, FunctionModel, OnnxModel, digest_object
from robbench.models.card import Registry
from robbench.models.load import load_model
from robbench.models.load_source import load_source
from robbench.models.sources import parse_source
from robbench.models.spec import ModelSpec
from support.commands import run
from support.independent import Corners, loop_corners, loop_fgsm

EPS, N = 0.15, 40


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"not installed: {package}")


@pytest.fixture(scope="module")
def images():
    return robbench.load_data("digits", N)


@pytest.fixture(scope="module")
def net():
    return load_model(Registry.default().find("digits/at")).module


@pytest.fixture(scope="module")
def rows():
    """Flat training images and labels."""
    x, y = robbench.load_data("digits", 500, split="train")
    return x.flatten(1).numpy(), y.numpy()


def ask(model, images, attacks=None, **how):
    x, y = images
    return evaluate(model, attacks or [Corners()], x=x, y=y, eps=EPS, **how)


# Without gradients.

ESTIMATORS = {
    "logistic": lambda: LogisticRegression(max_iter=300),
    "ridge": RidgeClassifier,
    "forest": lambda: RandomForestClassifier(20, random_state=0),
    "pipeline": lambda: make_pipeline(StandardScaler(), SVC()),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_are_attacked_by_queries(name, images, rows):
    estimator = ESTIMATORS[name]().fit(*rows)
    result = ask(estimator, images)
    assert result.robust_accuracy.value == loop_corners(
        lambda x: estimator.predict(x.reshape(len(x), -1)), *images, EPS
    )
    assert 0 < result.robust_accuracy.value < result.clean_accuracy.value
    assert result.model == type(estimator).__name__


def test_two_classes_of_an_estimator_have_one_score(images, rows):
    x, y = images
    pair = (x, (y > 4).long())
    estimator = LogisticRegression(max_iter=300).fit(rows[0], rows[1] > 4)
    assert estimator.decision_function(rows[0][:3]).shape == (3,)
    found = ask(LogisticRegression(max_iter=300).fit(rows[0], (rows[1] > 4).astype(int)), pair)
    predict = lambda x: estimator.predict(x.reshape(len(x), -1)).astype(int)  # noqa: E731
    assert found.robust_accuracy.value == loop_corners(predict, *pair, EPS)


def test_a_function_of_arrays_is_attacked_by_queries(images, rows):
    w = LogisticRegression(max_iter=300).fit(*rows).coef_.T.astype(np.float32)

    def scores(x):
        assert isinstance(x, np.ndarray) and x.dtype == np.float32
        return x.reshape(len(x), -1) @ w

    result = ask(scores, images)
    assert result.robust_accuracy.value == loop_corners(lambda x: scores(x).argmax(1), *images, EPS)
    assert result.model == "scores"


def test_a_function_of_tensors_keeps_its_gradient(images, net):
    result = ask(lambda x: net(x), images, [FGSM()])
    assert result.robust_accuracy.value == loop_fgsm(net, *images, EPS)


@needs("onnxruntime")
@needs("onnx")
@pytest.mark.parametrize("batch", ["dynamic", "fixed"])
def test_onnx_is_attacked_by_queries(batch, images, net, tmp_path):
    import onnxruntime

    path = export_onnx(net, tmp_path, {0: "n"} if batch == "dynamic" else None, 8)
    session = onnxruntime.InferenceSession(path)
    result = ask(str(path), images)

    def predict(x):
        parts = np.split(np.concatenate([x, x[: -len(x) % 8]]), -(-len(x) // 8))
        return np.concatenate([session.run(None, {"x": part})[0].argmax(1) for part in parts])[: len(x)]

    assert result.robust_accuracy.value == loop_corners(predict, *images, EPS)
    assert result.identity["model"]["source"] == "onnx:net.onnx"
    with pytest.raises(SuiteError, match=r"no gradient, and PGD need one.*--suite queries"):
        ask(str(path), images, [PGD(steps=2)])


def export_onnx(net, folder, axes, batch):
    path = folder / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = {"input_names": ["x"], "output_names": ["z"]}
        axes = axes and {"x": axes, "z": axes}
        torch.onnx.export(net, (torch.zeros(batch, 1, 8, 8),), path, dynamo=False, dynamic_axes=axes, **names)
    return path


@needs("onnxruntime")
@needs("onnx")
@pytest.mark.parametrize("length", [b"\x08", b"\x88\x00", b"\x88\x80\x80\x00"])
def test_a_graph_with_weights_in_other_files_is_refused(net, images, tmp_path, monkeypatch, length):
    """Nothing would say which weights were judged, and a graph of a stranger would read files of the current folder."""
    import onnx

    path = export_onnx(net, tmp_path, {0: "n"}, 8)
    plain = path.read_bytes()
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    path.write_bytes(path.read_bytes().replace(b"\x0a\x08location", b"\x0a" + length + b"location"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="in other files, which no digest covers"):
        ask(str(path), images)
    path.write_bytes(plain)
    onnx.save(onnx.load(path), path)
    assert OnnxModel(path.read_bytes()), "the remedy"


@needs("onnxruntime")
def test_a_file_that_is_no_onnx_is_a_sentence(images, tmp_path):
    (tmp_path / "a.onnx").write_text("no graph")
    with pytest.raises(ModelError, match=r"^.*a.onnx: loading failed"):
        ask(str(tmp_path / "a.onnx"), images)


def test_a_model_without_gradients_is_led_to_a_suite_that_works(images, rows, monkeypatch):
    estimator = LogisticRegression(max_iter=300).fit(*rows)
    with monkeypatch.context() as patched:
        patched.setattr("robbench.engine.engine.attack_samples", None)
        with pytest.raises(SuiteError, match="--suite queries"):
            ask(estimator, images, [Corners(), FGSM()])
    x, y = images
    result = evaluate(estimator, "blackbox", x=x[:8], y=y[:8], eps=EPS, samples=8)
    assert [a.name for a in result.attacks] == ["Square"]
    assert "BB-PGD-20-CW of the suite were left out" in result.flags["transfer_left_out"]
    given = evaluate(estimator, "blackbox", x=x[:8], y=y[:8], eps=EPS, samples=8, surrogate="digits/natural")
    assert [a.name for a in given.attacks][:1] == ["BB-FGSM-CW"] and "transfer_left_out" not in given.flags
    assert given.overrides["surrogate"] == "digits/natural"


def test_an_adapter_that_disagrees_with_the_model_is_refused(images, rows, monkeypatch):
    estimator = LogisticRegression(max_iter=300).fit(*rows)
    forward = EstimatorModel.forward
    adapted = EstimatorModel(estimator, images[0][:16])
    monkeypatch.setattr("robbench.evaluation.inputs.adapt", lambda model, x: adapted.eval())
    monkeypatch.setattr(EstimatorModel, "forward", lambda self, x: forward(self, x).flip(1))
    with pytest.raises(ModelError, match="disagree on 16 of 16 images"):
        ask(estimator, images)


def test_a_function_that_mixes_up_its_batch_is_refused(images, rows):
    w = LogisticRegression(max_iter=300).fit(*rows).coef_.T.astype(np.float32)
    with pytest.raises(ModelError, match="disagree on"):
        ask(lambda x: (np.asarray(x).reshape(len(x), -1) @ w)[::-1].copy(), images)


def test_classes_that_are_no_labels_are_refused(images, rows):
    estimator = LogisticRegression(max_iter=300).fit(rows[0], rows[1] + 1)
    with pytest.raises(ModelError, match=r"classes \[1, 2, 3, 4, 5\] .*expected: 0, 1, 2"):
        ask(estimator, images)
    names = np.array([f"class {k}" for k in range(10)])
    result = ask(LogisticRegression(max_iter=300).fit(rows[0], names[rows[1]]), images)
    assert result.clean_accuracy.value > 0.8


def test_other_fitted_values_are_another_model(images, rows):
    x, y = rows
    made = {digest_object(LogisticRegression(max_iter=300).fit(x[:n], y[:n])) for n in (400, 400, 450)}
    assert len(made) == 2
    w = np.ones(3)
    assert digest_object(lambda a: a @ w) == digest_object(lambda a: a @ w)
    old, w = digest_object(lambda a: a @ w), w + 1
    assert digest_object(lambda a: a @ w) != old
    assert digest_object(RandomForestClassifier(3, random_state=0).fit(x, y)) != digest_object(
        RandomForestClassifier(3, random_state=1).fit(x, y)
    )
    assert "lambda" in repr(FunctionModel(lambda a: a))


# With gradients.


class Answering(nn.Module):
    def __init__(self, net, kind):
        super().__init__()
        self.net, self.kind = net, kind

    def forward(self, x):
        z = self.net(x)
        pair = namedtuple("pair", "features logits")
        return {
            "object": lambda: SimpleNamespace(logits=z, hidden=x),
            "dict": lambda: {"aux": z[:, :3], "logits": z},
            "named tuple": lambda: pair(z[:, :3], z),
            "tuple": lambda: (x, z),
            "two tables": lambda: (z[:, :3], z),
            "no table": lambda: {"a": x},
        }[self.kind]()


@pytest.mark.parametrize("kind", ["object", "dict", "named tuple", "tuple"])
def test_logits_in_an_answer_are_taken_and_said_so(kind, images, net):
    result = ask(Answering(net, kind).eval(), images, [FGSM()])
    assert result.robust_accuracy.value == loop_fgsm(net, *images, EPS)
    assert "robbench took" in result.flags["output_part"]


def test_the_part_that_is_named_is_taken(images, net):
    model = Answering(net, "two tables").eval()
    with pytest.raises(ModelError, match=r"tuple of 0 \[N, 3\], 1 \[N, 10\]; each of 0, 1 can be .*--output NAME"):
        ask(model, images, [FGSM()])
    result = ask(model, images, [FGSM()], output="1")
    assert result.robust_accuracy.value == loop_fgsm(net, *images, EPS)
    assert "output_part" not in result.flags and result.identity["model"]["output"] == "1"
    with pytest.raises(ModelError, match=r"--output 2 given; the model answers with a tuple of"):
        ask(model, images, [FGSM()], output="2")
    with pytest.raises(ModelError, match="none of them can be the logits"):
        ask(Answering(net, "no table").eval(), images, [FGSM()])


@pytest.mark.parametrize("flat", [False, True])
def test_one_logit_is_two_classes(flat, images, net):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            z = self.net(x)
            lead = z[:, 5:].amax(1) - z[:, :5].amax(1)
            return lead if flat else lead[:, None]

    pair = (images[0], (images[1] > 4).long())
    result = ask(One().eval(), pair, [FGSM()], binary=True)
    two = lambda x: torch.stack([torch.zeros(len(x)), One()(x).reshape(-1)], 1)  # noqa: E731
    assert result.robust_accuracy.value == loop_fgsm(two, *pair, EPS)
    assert result.identity["model"]["binary"] is True
    with pytest.raises(ModelError, match="--binary"):
        ask(One().eval(), pair, [FGSM()])
    with pytest.raises(ModelError, match=r"--binary given; the model answers with shape \(\d+, 10\)"):
        ask(net, images, [FGSM()], binary=True)


@pytest.mark.parametrize("name", ["net.pt", "net.ts"])
def test_torchscript_needs_no_architecture(name, images, net, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(net).save(tmp_path / name)
        result = ask(str(tmp_path / name), images, [FGSM()])
    assert result.robust_accuracy.value == loop_fgsm(net, *images, EPS)
    assert result.identity["model"]["source"] == f"torchscript:{name}"


def test_weights_without_an_architecture_name_the_ways_to_a_network(images, net, tmp_path):
    torch.save(net.state_dict(), tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r"Give --architecture NAME.*--model package.module:function.*timm:NAME:PATH"):
        ask(str(tmp_path / "a.pt"), images)
    with pytest.raises(ModelError, match="A network of your own is a model by itself: --model mine:make_net"):
        ask(str(tmp_path / "a.pt"), images, architecture="mine:make_net")


def test_a_checkpoint_of_lightning_is_read(images, tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    state = {f"model.{key}": value for key, value in net.state_dict().items()}
    content = {"state_dict": state, "epoch": 3, "pytorch-lightning_version": "2.4.0", "optimizer_states": [{}]}
    torch.save(content, tmp_path / "last.ckpt")
    pair = (images[0], net(images[0]).argmax(1))
    result = ask(str(tmp_path / "last.ckpt"), pair, [FGSM()], architecture="linear:num_classes=10")
    assert result.robust_accuracy.value == loop_fgsm(net, *pair, EPS)


@needs("timm")
@pytest.mark.whole
def test_an_architecture_of_timm_takes_a_checkpoint(tmp_path):
    import timm

    torch.manual_seed(0)
    net = timm.create_model("test_resnet.r160_in1k", pretrained=False, num_classes=4).eval()
    safetensors.torch.save_file(net.state_dict(), tmp_path / "mine.safetensors")
    found = load_source(ModelSpec(f"timm:test_resnet:{tmp_path / 'mine.safetensors'}"), (3, 32, 32), None)
    x = torch.rand(4, 3, 32, 32)
    mean, std = (torch.tensor(net.pretrained_cfg[k]).view(-1, 1, 1) for k in ("mean", "std"))
    assert torch.allclose(found.module(x), net((x - mean) / std), atol=1e-5)
    with pytest.raises(ModelError, match="Unknown timm model 'test_resnt'"):
        load_source(ModelSpec(f"timm:test_resnt:{tmp_path / 'mine.safetensors'}"), (3, 32, 32), None)


@needs("transformers")
@pytest.mark.whole
def test_a_classifier_of_transformers_brings_its_normalization(images, tmp_path, monkeypatch):
    import transformers

    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4,
        num_channels=3, num_labels=10,
    )  # fmt: skip
    net = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        net.classifier.weight.mul_(50)
    folder = tmp_path / "tiny" / "vit"
    net.save_pretrained(folder)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    transformers.ViTImageProcessor(image_mean=mean, image_std=std, size={"height": 8, "width": 8}).save_pretrained(
        folder
    )
    monkeypatch.chdir(tmp_path)
    x = images[0].expand(-1, 3, -1, -1).contiguous()

    def own(x):
        return net((x - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)).logits

    pair = (x, own(x).argmax(1))
    result = ask("hf:tiny/vit", pair, [FGSM()])
    assert result.robust_accuracy.value == loop_fgsm(own, *pair, EPS)


# Sources.


@pytest.mark.parametrize(
    ("text", "kind", "name"),
    [
        ("a/net.onnx", "onnx", "onnx-net"),
        ("file:a/net.onnx", "onnx", "onnx-net"),
        ("onnx:net.bin", "onnx", "onnx-net"),
        ("net.ts", "torchscript", "torchscript-net"),
        ("torchscript:net.pt", "torchscript", "torchscript-net"),
        ("net.pt", "file", "file-net"),
        ("net.ckpt", "file", "file-net"),
        ("timm:resnet18:a/b.pt", "timm", "timm-resnet18-b"),
    ],
)
def test_files_of_models_are_sources(text, kind, name):
    source = parse_source(text)
    assert (source.kind, source.name, source.has_code) == (kind, name, kind != "file")


@pytest.mark.whole
def test_the_command_line_takes_estimators_functions_and_outputs(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import numpy as np, robbench\n"
        "from sklearn.linear_model import LogisticRegression\n"
        "def clf():\n"
        "    x, y = robbench.load_data('digits', 300, split='train')\n"
        "    return LogisticRegression(max_iter=300).fit(x.flatten(1).numpy(), y.numpy())\n"
        "W = np.random.default_rng(0).standard_normal((64, 10), np.float32)\n"
        "def scores(x):\n"
        "    return np.asarray(x).reshape(len(x), -1) @ W\n"
        "def two(x, y):\n"
        "    return x\n"
        "def number():\n"
        "    return 3\n"
    )
    for name in ("clf", "scores"):
        how = ("-m", f"mine:{name}", "--dataset", "digits", "-s", "blackbox", "--samples", 5)
        done = json.loads(run("eval", *how, "--json", cwd=tmp_path).stdout)
        assert done["n"] == 5 and len(done["attacks"]) == 4
    for name, words in (("two", "cannot be called without arguments"), ("number", "returned a int")):
        said = run("eval", "-m", f"mine:{name}", "--dataset", "digits", cwd=tmp_path, code=2).stderr
        assert words in said and "estimator" in said
