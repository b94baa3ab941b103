"""Wrong models and wrong inputs: each gives the right number, a flag, or a sentence that a user can act on."""

import argparse
import functools
import json
import warnings

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import robbench
from robbench.attacks import EOT, FGSM, PGD, Square
from robbench.core.errors import RobbenchError
from robbench.core.types import format_ids
from robbench.evaluation.progress import Silent
from robbench.evaluation.run import evaluate
from robbench.models.load import describe_module, digest_module
from support.commands import run
from support.models import small

N = 6
X = torch.rand(N, 1, 8, 8, generator=torch.Generator().manual_seed(3))
Y = small()(X).argmax(1)
ULP = 1.2e-7


def with_pixel(value, dtype=torch.float32):
    x = X.clone().to(dtype)
    x[0, 0, 0, 0] = value
    return x


def ask(model=None, x=X, y=Y, suite=None, eps=0.02, **options):
    return evaluate(small() if model is None else model, suite or [FGSM()], x=x, y=y, eps=eps, **options)


def plan(**options):
    return robbench.plan(small(), [FGSM()], x=X, y=Y, eps=0.02, **options)


class Answer(nn.Module):
    """A module around a function of the network and the images."""

    def __init__(self, function):
        super().__init__()
        self.net, self.function = small(), function

    def forward(self, x):
        return self.function(self.net, x)


def answering(function):
    return Answer(function).eval()


def lazy():
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(10)).eval()


def scripted(freeze=False):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch advises other tools; the files are still around
        made = torch.jit.script(small())
        return torch.jit.freeze(made) if freeze else made


def traced(net):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.jit.trace(net, X)


def under(mode, call):
    with mode:
        return call()


def sparse():
    net = small()
    net[1].weight = nn.Parameter(net[1].weight.detach().to_sparse())
    return net


class Raising(nn.Sequential):
    """A module that raises where it is read or moved."""

    def __init__(self, where):
        super().__init__(*small())
        self.where = where
        self.eval()

    def to(self, *args, **kwargs):
        return self.run("to", super().to, *args, **kwargs)

    def __repr__(self):
        return self.run("repr", super().__repr__)

    def named_modules(self, *args, **kwargs):
        return self.run("named_modules", super().named_modules, *args, **kwargs)

    def named_parameters(self, *args, **kwargs):
        return self.run("named_parameters", super().named_parameters, *args, **kwargs)

    def run(self, name, call, *args, **kwargs):
        if self.__dict__.get("where") == name:
            raise KeyError("boom")
        return call(*args, **kwargs)


IN_MEMORY = {  # functions that take images
    "evaluate": lambda: ask(),
    "attack": lambda: robbench.attack(small(), FGSM(), X, Y, eps=0.02),
    "accuracy": lambda: robbench.clean_accuracy(small(), X, Y),
    "assert": lambda: robbench.assert_robust(small(), x=X, y=Y, eps=0.02, at_least=0.1, suite=[FGSM()]),
    "plan": plan,
    "sanity": lambda: robbench.sanity(small(), x=X, y=Y, eps=0.02),
}
MORE_REFUSED = {
    **{
        f"{name} in {word}": (lambda call=call, mode=mode: under(mode(), call), rf"Called inside torch.{word}")
        for name, call in IN_MEMORY.items()
        for word, mode in (
            ("inference_mode", torch.inference_mode),
            ("autocast", lambda: torch.autocast("cpu", torch.bfloat16)),
        )
    },
    "weights without values": (lambda: ask(small().to("meta")), r"no values \(1.weight is on the device meta"),
    "sparse weights": (lambda: ask(sparse()), r"layout torch.sparse_coo \(1.weight\).*to_dense"),
    **{
        f"a model whose {where} raises": (lambda where=where: ask(Raising(where)), r"cannot be read, or moved.*boom")
        for where in ("to", "repr", "named_modules", "named_parameters")
    },
    "sparse answers": (lambda: ask(answering(lambda net, x: net(x).to_sparse())), r"layout torch.sparse_coo; expected"),
    "nested answers": (
        lambda: ask(answering(lambda net, x: torch.nested.as_nested_tensor(list(net(x))))), r"a nested tensor; expected"
    ),
    "one logit of sense": (lambda: ask(answering(lambda net, x: net(x)[:, :1])), r"one logit per image.*--binary"),
    **{
        f"radius {eps!r}": (lambda eps=eps: ask(eps=eps), words)
        for eps, words in (
            (torch.tensor(0.1), r"eps: tensor\(0.1"), (torch.tensor([0.1]), r"eps: tensor\(\[0.1"),
            (1e-320, r"eps: 1e-320 given; allowed: 0, or"), ("1e-40", r"eps: '1e-40' given"),
            (1e-31, r"eps: 1e-31 given"),
        )
    },
    "a tensor of radii": (
        lambda: robbench.attack(small(), FGSM(), X, Y, eps=torch.tensor([0.1, 0.2])), r"eps.tolist\(\)"
    ),
    "a tensor of one radius": (lambda: robbench.evaluate(small(), x=X, y=Y, eps=torch.tensor(0.1)), r"eps.tolist"),
    "a list with a tiny radius": (lambda: robbench.evaluate(small(), [FGSM()], x=X, y=Y, eps=[0.1, 1e-320]), r"1e-320"),
    "PGD(step=)": (lambda: PGD(step=3), r"PGD: Unknown argument 'step'. Did you mean step"),
    "Square(query=)": (lambda: Square(query=3), r"Square: Unknown argument 'query'. .*Known: "),
    "EOT()": (lambda: EOT(), r"EOT: missing a required.*Required: "),
    "PGD(40)": (lambda: PGD(40), r"PGD: too many positional arguments.*by name"),
    "FGSM of restart": (lambda: FGSM(restart=2), r"Did you mean restarts"),
    "attack without eps": (lambda: robbench.attack(small(), FGSM(), X, Y), r"attack: missing a required.*eps"),
    "attack with epsilon": (lambda: robbench.attack(small(), FGSM(), X, Y, eps=0.1, lane=3), r"Did you mean lanes"),
    "assert_robust(epsilon=)": (
        lambda: robbench.assert_robust(small(), at_least=0.1, epsilon=0.1), r"assert_robust: Unknown argument 'epsilon'"
    ),
    "clean_accuracy(lane=)": (lambda: robbench.clean_accuracy(small(), X, Y, lane=3), r"Did you mean lanes"),
    "clean_accuracy without y": (lambda: robbench.clean_accuracy(small(), X), r"missing a required argument: 'y'"),
    "load_data(count=)": (lambda: robbench.load_data("digits", count=3), r"load_data: Unknown argument 'count'"),
    "load_model(data_set=)": (lambda: robbench.load_model("digits/at", data_set="digits"), r"Did you mean dataset"),
    "evaluate without a model": (lambda: robbench.evaluate(), r"evaluate: missing a required argument: 'model'"),
    "nested x": (lambda: ask(x=torch.nested.as_nested_tensor(list(X))), r"x is a nested tensor.*unbind"),
    "nested y": (lambda: ask(y=torch.nested.as_nested_tensor([Y[:2], Y[2:]])), r"y is a nested tensor"),
    "masked x": (lambda: ask(x=torch.masked.masked_tensor(X, X > 0)), r"x is a masked tensor.*get_data"),
    "masked y": (lambda: ask(y=torch.masked.masked_tensor(Y, Y >= 0)), r"y is a masked tensor"),
    "quantized x": (lambda: ask(x=torch.quantize_per_tensor(X, 1 / 255, 0, torch.quint8)), r"a quantized.*dequant"),
    "x of five dimensions": (lambda: ask(x=X[None]), r"^x is torch.float32 of shape \(1, 6, 1, 8, 8\)"),
    "x of three dimensions": (lambda: ask(x=X[:, 0]), r"^x is torch.float32 of shape \(6, 8, 8\)"),
    "x on meta": (lambda: ask(x=X.to("meta")), r"device meta, which holds no values; .* Load the values"),
    **{
        f"Normalized({mean}, {std})": (lambda mean=mean, std=std: robbench.Normalized(small(), mean, std), words)
        for mean, std, words in (
            ([0.0], [0.0], r"std: \[0.0\] given; .*above 0"), ([float("nan")], [1.0], r"mean: \[nan\] given"),
            ([0.0], [-1.0], r"std: \[-1.0\]"), ([0.0], [float("inf")], r"std: \[inf\]"), ([], [], r"mean: \[\]"),
            ([0.0, 0.0], [1.0], r"one number per channel in both"),
        )
    },
}  # fmt: skip

REFUSED = {  # name: (what is asked for, words of the sentence)
    "x of objects": (lambda: ask(x=X.numpy().astype(object)), r"x: an array of object given; allowed: numbers"),
    "y of texts": (lambda: ask(y=Y.numpy().astype(str)), r"y: an array of <U\d+ given; allowed: numbers"),
    "x list": (lambda: ask(x=X.tolist()), r"x: builtins.list given.*torch.tensor\(x\)"),
    "y list": (lambda: ask(y=Y.tolist()), r"y: builtins.list given.*torch.tensor\(y\)"),
    "y tuple": (lambda: ask(y=tuple(Y.tolist())), r"y: builtins.tuple given.*torch.tensor\(y\)"),
    "y range": (lambda: ask(y=range(N)), r"y: builtins.range given"),
    "x text": (lambda: ask(x="images.npy"), r"x: builtins.str given"),
    "loader": (lambda: ask(x=DataLoader(TensorDataset(X, Y)), y=None), r"DataLoader given.*goes into data="),
    "data set": (lambda: ask(x=TensorDataset(X, Y)), r"x: torch.utils.data.dataset.TensorDataset given"),
    "x alone": (lambda: ask(y=None), r"x and y go together"),
    "function of two": (lambda: ask(lambda x, y: x), r"cannot be called with images, .*6, 1, 8, 8\): TypeError"),
    "class": (lambda: ask(nn.Flatten), r"This is a class: give an object of it"),
    "estimator": (lambda: ask(LogisticRegression()), r"LogisticRegression has no classes_; expected: a fitted"),
    "pipeline": (lambda: ask(make_pipeline(LogisticRegression())), r"Pipeline has no classes_"),
    "state dict": (lambda: ask(small().state_dict()), r"OrderedDict given.*load_state_dict"),
    "no model": (lambda: ask(3), r"builtins.int given; allowed: a torch.nn.Module"),
    "suite of names": (lambda: ask(suite=["fgsm"]), r"'fgsm' given in a list of attacks.*without a list: .*whitebox"),
    "suite of classes": (lambda: ask(suite=[FGSM]), r"FGSM.* given as an attack; allowed: objects"),
    "frozen": (lambda: ask(scripted(freeze=True)), r"constants of its code.*before torch.jit.freeze"),
    "lazy": (lambda: ask(lazy()), r"layers that never ran .*1\.weight"),
    "lazy convolution": (
        lambda: ask(nn.Sequential(nn.LazyConv2d(2, 3), nn.Flatten(), nn.LazyLinear(10)).eval()),
        r"layers that never ran",
    ),
    "float labels": (lambda: ask(y=Y + 0.9), r"y is torch.float32 .*integer labels \[N\].*y.long\(\)"),
    "whole float labels": (lambda: ask(y=Y.double()), r"y is torch.float64"),
    "half labels": (lambda: ask(y=Y.half()), r"y is torch.float16"),
    "complex labels": (lambda: ask(y=Y.to(torch.complex64)), r"y is torch.complex64"),
    "NaN labels": (lambda: ask(y=torch.full((N,), torch.nan)), r"y is torch.float32"),
    "soft labels": (lambda: ask(y=torch.eye(10)[Y] * 0.9 + 0.01), r"soft labels, take y.argmax\(1\)"),
    "one-hot labels": (lambda: ask(y=torch.eye(10)[Y].long()), r"shape \(6, 10\).*y.argmax\(1\)"),
    "bool labels": (lambda: ask(y=Y > 3), r"y is torch.bool.*y.long\(\)"),
    "label column": (lambda: ask(y=Y[:, None]), r"shape \(6, 1\).*y.squeeze\(1\)"),
    "label row": (lambda: ask(y=Y[None]), r"shape \(1, 6\); expected 6 integer labels"),
    "one label": (lambda: ask(y=torch.tensor(3)), r"shape \(\); expected 6 integer labels"),
    "too few labels": (lambda: ask(y=Y[:-1]), r"shape \(5,\); expected 6 integer labels"),
    "negative label": (lambda: ask(y=Y - 20), r"y holds the label -\d+; labels are 0 or more"),
    "too large label": (lambda: ask(y=Y + 20), r"The model has 10 classes; the labels go up to 2\d"),
    "ignored label": (lambda: ask(y=torch.where(Y[0] == Y, -100, Y)), r"y holds the label -100"),
    "huge label": (lambda: ask(y=Y + 2**62), r"labels go up to 46116"),
    "sparse labels": (lambda: ask(y=Y.to_sparse()), r"y is a tensor of layout torch.sparse_coo.*to_dense"),
    "labels without values": (lambda: ask(y=Y.to("meta")), r"y is on the device meta"),
    "images without values": (lambda: ask(x=X.to("meta")), r"x is on the device meta"),
    "sparse images": (lambda: ask(x=X.to_sparse()), r"x is a tensor of layout"),
    "bfloat16 images": (lambda: ask(x=X.bfloat16()), r"x is torch.bfloat16 .*float16, float32 or float64"),
    "complex images": (lambda: ask(x=X.to(torch.complex64)), r"x is torch.complex64"),
    "pixel values": (lambda: ask(x=(X * 255).to(torch.int16)), r"x is torch.int16 .*x.float\(\) / 255"),
    "float pixel values": (lambda: ask(x=X * 255), r"x spans \[\d.*Divide pixel values by 255"),
    "normalized": (lambda: ask(x=(X - 0.5) / 0.5), r"put mean/std normalization inside the model"),
    "NaN pixel": (lambda: ask(x=with_pixel(torch.nan)), r"x holds NaN or infinity in 1 of 6 images, the first at pos"),
    "infinite pixel": (lambda: ask(x=with_pixel(torch.inf)), r"x holds NaN or infinity in 1 of 6 images"),
    "pixel a little too bright": (lambda: ask(x=with_pixel(1 + 4 * ULP)), r"x spans \[.*, 1\.00000047\d+\]; expected"),
    "pixel a little too dark": (lambda: ask(x=with_pixel(-1e-6)), r"x spans \[-1e-06"),
    "one image": (lambda: ask(x=X[0], y=Y[:1]), r"x is torch.float32 of shape|y has shape"),
    "no images": (lambda: ask(x=X[:0], y=Y[:0]), r"x holds no images"),
    "images without pixels": (lambda: ask(x=X[:, :0]), r"x holds no images: its shape is \(6, 0, 8, 8\)"),
    "flat images": (lambda: ask(x=X.flatten(1)), r"expected images \[N, C, H, W\]"),
    "wrong size": (lambda: ask(x=X[..., :4]), r"cannot be run on images of shape \(1, 8, 4\)"),
    "channels last": (lambda: ask(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()).eval(), x=X.permute(0, 2, 3, 1)),
                      r"cannot be run on images of shape \(8, 8, 1\)"),
    "half model": (lambda: ask(small().half(), X.half()), r"weights are torch.float16; attacks need float32: call mod"),
    "one answer for all": (
        lambda: ask(answering(lambda net, x: net(x).mean(0, keepdim=True))), r"shape \(1, 10\) to a batch of .*padded"
    ),
    "tuple of answers": (lambda: ask(answering(lambda net, x: (net(x), net(x)))), r"a tuple of .*--output"),
    "one logit": (lambda: ask(answering(lambda net, x: net(x)[:, :1])), r"one logit per image"),
    "flat answer": (lambda: ask(answering(lambda net, x: net(x)[:, 0])), r"answers with shape \(\d+,\) to a batch"),
    "answers of NaN": (lambda: ask(answering(lambda net, x: net(x) * torch.nan)), r"NaN or infinity to every clean"),
    "class numbers": (lambda: ask(answering(lambda net, x: net(x).argmax(1, keepdim=True))), r"torch.int64"),
    "training mode": (lambda: ask(small().train()), r"training mode"),
    "L2 radius of pixel values": (lambda: ask(eps=128, norm="L2"), r"L2 128 given.*L2 8, .*0 to 255\?.*L2 0\.502"),
    "L2 radius of the diameter": (lambda: ask(eps=8, norm="L2"), r"L2 8 given; no two images of 64 values"),
    "L1 radius of the diameter": (lambda: ask(eps=64, norm="L1"), r"L1 64 given; no two images of 64 values"),
    "Linf radius of pixel values": (lambda: ask(eps=8), r'write 8 of 255 levels as "8/255"'),
    "negative radius": (lambda: ask(eps=-0.1), r"eps: -0.1 given; it must not be negative"),
    "NaN radius": (lambda: ask(eps=float("nan")), r"eps: nan given; allowed: a fraction"),
    "radius of an attack in memory": (
        lambda: robbench.attack(small(), FGSM(), X, Y, eps=9, norm="L2"), r"L2 9 given; no two images"
    ),
    "accuracy of lists": (lambda: robbench.clean_accuracy(small(), X.tolist(), Y), r"torch.tensor\(x\)"),
    "accuracy of no scores": (lambda: robbench.clean_accuracy(lambda x: x, X, Y), r"answers with shape .*1, 8, 8"),
    "accuracy with soft labels": (lambda: robbench.clean_accuracy(small(), X, Y + 0.5), r"y is torch.float32"),
    "accuracy with large labels": (lambda: robbench.clean_accuracy(small(), X, Y + 20), r"labels go up to"),
    "accuracy without a batch": (lambda: robbench.clean_accuracy(small(), X, Y, lanes=0), r"lanes: 0 given"),
    "accuracy in training mode": (lambda: robbench.clean_accuracy(small().train(), X, Y), r"model.eval\(\)"),
    "accuracy of a wrong shape": (lambda: robbench.clean_accuracy(small(), X[..., :4], Y), r"shape \(1, 8, 4\)"),
    "reporter is a number": (lambda: ask(reporter=5), r"reporter: 5 given; allowed: None, or an object with"),
    "reporter is a function": (lambda: ask(reporter=print), r"reporter: <.*print.*> given"),
    "reporter is a class": (lambda: ask(reporter=Silent), r"reporter: a class given; give an object of it"),
    "reporter lacks a method": (lambda: ask(reporter=argparse.Namespace(note=print)), r"methods plan, stage, p"),
    "reporter of sanity": (lambda: robbench.sanity(small(), x=X, y=Y, eps=0.02, reporter=5), r"reporter: 5 given"),
    "pilot is text": (lambda: plan(pilot="3"), r"pilot: '3' given; allowed: a whole number, at least 2, or None"),
    "pilot is a fraction": (lambda: plan(pilot=2.5), r"pilot: 2.5 given; allowed: a whole number"),
    "pilot is a boolean": (lambda: plan(pilot=True), r"pilot: True given; allowed: a whole number"),
    "pilot of one": (lambda: plan(pilot=1), r"pilot: 1 given; allowed: a whole number, at least 2"),
    "results is empty": (lambda: ask(results=""), r"results: '' given; allowed: a path, or None"),
    "results is a blank": (lambda: ask(results=" "), r"results: ' ' given; allowed: a path"),
    "data_dir is empty": (lambda: ask(data_dir=""), r"data_dir: '' given; allowed: a path"),
    "a folder of models is empty": (lambda: ask(models=[""]), r"models\[0\]: '' given; allowed: a path"),
    "no radius for a list of attacks": (lambda: ask(eps=None), r"eps: no radius given. A list of attacks has no"),
    "no radius for a suite": (
        lambda: ask(eps=None, suite="quick"), r"Suite 'quick' has no radius for data set 'custom' \(it has one"
    ),
    "images of another precision": (lambda: ask(x=X.double()), r"Its weights are torch.float32; x.to\(torch"),
    "several NaN images": (
        lambda: ask(x=torch.where(torch.arange(N).view(-1, 1, 1, 1) > 3, torch.nan, X)),
        r"NaN or infinity in 2 of 6 images, the first at position 4",
    ),
    **{
        f"{name} of {path!r:.20}": (lambda call=call, path=path: call(path), rf"result: {words} given; allowed")
        for name, call in (("verify", robbench.verify), ("reproduce", robbench.reproduce))
        for path, words in (
            (None, "None"), (5, "5"), (True, "True"), (robbench, "an object of type module"),
            ([], "an object of type list"), (["a"], "an object of type list"), (b"a", "an object of type bytes"),
        )
    },
    **{
        f"{name} of no result {path[:9]!r}": (lambda call=call, path=path: call(path), r"^No .*expected: the folder")
        for name, call in (("verify", robbench.verify), ("reproduce", robbench.reproduce))
        for path in ("", "nowhere", "nowhere/result.json", "a\0b", "n" * 400)
    },
    "unknown model": (
        lambda: robbench.load_model("digits/natrual"), r"closest of \d+: digits/natural(, [^,]+){4}\. `robbench list"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # of torch, about nested and masked tensors
@pytest.mark.parametrize("name", [*REFUSED, *MORE_REFUSED])
def test_what_is_wrong_is_refused_in_a_sentence(name):
    call, words = (REFUSED | MORE_REFUSED)[name]
    with pytest.raises(RobbenchError, match=words) as told:
        call()
    assert len(str(told.value)) < 600 and "Traceback" not in str(told.value)


@pytest.mark.parametrize(
    ("model", "x", "y"),
    [
        (None, X, Y.to(torch.uint8)),
        (None, X, Y.to(torch.int32)),
        (None, X[:, :, :, :].clone().requires_grad_(True), Y),
        (None, X.transpose(2, 3).contiguous().transpose(2, 3), Y),
        (None, X.expand(N, 1, 8, 8), Y),
        (scripted(), X, Y),
        (traced(small()), X, Y),
        (answering(lambda net, x: net(x) + 3), X, Y),
    ],
    ids=[
        "uint8 labels",
        "int32 labels",
        "gradient",
        "strided x",
        "expanded x",
        "scripted",
        "traced",
        "offset",
    ],
)
def test_what_is_unusual_gives_the_right_number(model, x, y):
    expected, found = ask(), ask(model, x, y)
    assert found.clean_accuracy.value == expected.clean_accuracy.value == 1.0
    assert found.robust_accuracy == expected.robust_accuracy and found.flags == {}


@pytest.mark.gpu
def test_images_and_labels_may_lie_on_a_gpu():
    assert ask(x=X.cuda(), y=Y.cuda()).clean_accuracy.value == 1.0


def test_torchscript_modules_that_compute_different_things_have_different_identities():
    class Act(nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.sign, self.lin = sign, nn.Linear(64, 10)

        def forward(self, x):
            return self.sign * self.lin(x.flatten(1))

    plus = Act(1.0).eval()
    minus = Act(-1.0).eval()
    minus.load_state_dict(plus.state_dict())
    a, b, again = (traced(net) for net in (plus, minus, plus))
    assert digest_module(a) == digest_module(b)
    assert describe_module(a) == describe_module(again) != describe_module(b)


def test_sample_numbers_are_listed_as_ranges():
    assert format_ids(range(40)) == "samples 0–39"
    assert format_ids([7, 3, 12]) == "samples 3, 7, 12"
    assert format_ids([1, 2, 3, 9, 20, 21, 22, 23]) == "samples 1, 2, 3, 9, 20–23"
    assert format_ids(range(0, 100, 2)).endswith("38 and 30 more") and format_ids([5]) == "sample 5"
    x, y = X.repeat(7, 1, 1, 1), Y.repeat(7)

    def fail(net, z):
        raise ValueError("no")

    with pytest.raises(RobbenchError, match=r"clean images, samples 0–41: it fails on samples 0–41"):
        ask(answering(fail), x=x, y=y)


def test_json_stays_parseable_when_the_model_prints(tmp_path, monkeypatch):
    (tmp_path / "talkative.py").write_text(
        "import torch\nprint('imported')\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.lin = torch.nn.Linear(64, 10)\n"
        "    def forward(self, x):\n        print('hello', len(x))\n        return self.lin(x.flatten(1))\n"
        "def make():\n    torch.manual_seed(0)\n    print('made')\n    return Net().eval()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    args = ("-m", "talkative:make", "--dataset", "digits", "-s", "quick", "--samples", 10)
    done = run("eval", *args, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["n"] == 10
    assert {"imported", "made"} <= set(done.stderr.split()) and "hello" in done.stderr
    shown = run("plan", *args[:-2], "--samples", 40, "--json", cwd=tmp_path)
    assert json.loads(shown.stdout)["plans"][0]["n"] == 40


def test_a_negative_radius_and_an_unknown_model_on_the_command_line():
    assert (
        "--eps: '-0.1' given; it must not be negative."
        in run("eval", "-m", "digits/at", "--eps", "-0.1", code=2).stderr
    )
    told = run("eval", "-m", "digits/naturl", code=2).stderr
    assert "digits/natural" in told and "`robbench list models`" in told and told.count("/") == 6


def test_a_result_on_images_of_ones_own_needs_them_again(tmp_path):
    ask(results=tmp_path, name="small", save_adversarials=True)
    (place,) = tmp_path.glob("custom/small/*")
    for call in (robbench.verify, functools.partial(robbench.reproduce, suite=[FGSM()])):
        with pytest.raises(RobbenchError, match=r"images of your own .data set 'custom'.*Give them: --data PATH"):
            call(place, small())
        call(place, small(), x=X, y=Y)


WRONG_COMMANDS = {  # what is typed: words of the sentence
    "eval": "What to measure? --model NAME",
    "eval -m digits/at --all --suite none": "--model digits/at and --all given; allowed: one of them",
    "eval --nope": "No such option: --nope",
    "eval -m digits/at --samples x": "--samples: 'x' given; allowed: a whole number, such as 200",
    "eval -m digits/at --samples 0": "--samples: 0 given; allowed: a whole number, at least 1",
    "eval -m digits/at --sample-seed=-1": "--sample-seed: -1 given; allowed: a whole number, at least 0",
    "eval -m digits/at --executor x": "--executor: 'x' given; allowed: process, ray",
    "plan -m digits/at --pilot 1": "--pilot: 1 given; allowed: a whole number, at least 2",
    "nope": "No such command 'nope'. See `robbench --help`.",
    "list": "Missing argument",
    "export x --pictures a --output b": "--pictures and --output given; allowed: one of them",
    "verify": "Missing argument",
    "measure linear": "Give --model: a registered model, or a source.",
    "table 99": "Unknown table '99'.",
    "table 0": "Unknown table '0'.",
    "table shafahi2019-99": "Unknown table 'shafahi2019-99'.",
    "reproduce nowhere": "No nowhere; expected: the folder of a finished result",
}


@pytest.mark.parametrize("typed", WRONG_COMMANDS)
def test_every_error_of_the_command_line_is_one_sentence_of_one_style(typed, tmp_path):
    told = run(*typed.split(), cwd=tmp_path, code=2)
    assert told.stdout == "" and told.stderr.startswith("robbench: ") and told.stderr.count("\n") == 1
    assert WRONG_COMMANDS[typed] in told.stderr


def test_help_is_no_error_and_exit_codes_stay():
    assert run("eval", "--help").stdout.startswith("Usage: robbench eval")
    assert run("--version").stdout.startswith("robbench ")
    assert run(code=2).stderr.startswith("Usage: robbench")
