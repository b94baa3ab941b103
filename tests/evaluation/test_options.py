"""Options and model specs are checked when they are given: before a model is loaded, and with a sentence."""

from collections.abc import Sequence
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch

from robbench.core.errors import RobbenchError, SuiteError
from robbench.evaluation import inputs
from robbench.evaluation.options import OptionFields, Options
from robbench.evaluation.planning import plan
from robbench.evaluation.request import RunFields, RunRequest
from robbench.evaluation.run import evaluate
from robbench.masking.run import examine
from robbench.models.spec import ModelSpec, SpecFields
from robbench.recheck.reproduce import reproduce
from robbench.recheck.verify import verify
from robbench.testing import assert_robust
from support.models import small

WRONG_OPTIONS = [
    ({"samples": "3"}, "samples: '3' given; allowed: a whole number, at least 1, or None"),
    ({"samples": True}, "samples: True given; allowed: a whole number"),
    ({"samples": 0}, "samples: 0 given; allowed: a whole number, at least 1"),
    ({"samples": 5.0}, r"samples: 5\.0 given"),
    ({"seed": 1.5}, r"seed: 1\.5 given; allowed: a whole number, at least 0\."),
    ({"seed": None}, "seed: None given"),
    ({"seed": -1}, "seed: -1 given"),
    ({"sample_seed": "0"}, "sample_seed: '0' given"),
    ({"lanes": 2.5}, r"lanes: 2\.5 given"),
    ({"lanes": np.bool_(True)}, "lanes: np.True_ given"),
    ({"eps": [0.1]}, r'eps: \[0\.1\] given; allowed: one radius, such as "8/255" or 0\.3, or None'),
    ({"eps": True}, "eps: True given; allowed: one radius"),
    ({"eps": "8/0"}, "eps: '8/0' given; allowed: a fraction"),
    ({"eps": float("nan")}, "eps: nan given"),
    ({"eps": -0.1}, "it must not be negative"),
    ({"norm": "L3", "eps": 0.1}, "norm: 'L3' given; allowed: Linf, L2, L1, L0, or None"),
    ({"norm": np.zeros(2), "eps": 0.1}, "norm: array"),
    ({"norm": "L2"}, "--norm L2 given without --eps"),
    ({"norm": "Linf", "eps": 8}, r"an Linf radius lies in \[0, 1\]"),
    ({"gradients": "int8"}, "gradients: 'int8' given; allowed: bfloat16, or None"),
    ({"device": 0}, "device: 0 given; allowed: auto, cpu, cuda, cuda:i, or a torch.device"),
    ({"device": None}, "device: None given"),
    ({"data_dir": 3}, "data_dir: 3 given; allowed: a path, or None"),
    ({"results": True}, "results: True given; allowed: a path, or None"),
    ({"models": "cards"}, "models: 'cards' given; allowed: a list of paths"),
    ({"models": None}, "models: None given; allowed: a list of paths"),
    ({"models": [None]}, r"models: \[None\] given; allowed: a list of paths"),
    ({"models": ["a", 3]}, r"models\[1\]: 3 given; allowed: a path"),
    ({"overwrite": 1}, "overwrite: 1 given; allowed: True or False"),
    ({"wait": "yes"}, "wait: 'yes' given; allowed: True or False"),
    ({"save_adversarials": True}, "save_adversarials given without results"),
]


@pytest.fixture
def nothing_loaded(monkeypatch):
    """Fail where a model or images are loaded."""
    for name in ("load_model", "load_source", "load", "prepare"):
        monkeypatch.setattr(inputs, name, lambda *args, **more: pytest.fail("loaded before the options were checked"))


@pytest.mark.parametrize(("given", "message"), WRONG_OPTIONS)
def test_a_wrong_option_is_a_sentence_before_anything_is_loaded(given, message, nothing_loaded):
    for function in (evaluate, plan, examine):
        args = ("digits/at",) if function is examine else ("digits/at", "quick")
        with pytest.raises(RobbenchError, match=message):
            function(*args, **given)


def test_a_wrong_option_of_the_other_functions_is_a_sentence(tmp_path, nothing_loaded):
    for function in (verify, reproduce):
        with pytest.raises(RobbenchError, match="device: 3 given"):
            function(tmp_path, device=3)
        with pytest.raises(RobbenchError, match=r"Unknown option 'archtecture'\. Did you mean architecture"):
            function(tmp_path, archtecture="linear")
    with pytest.raises(RobbenchError, match="samples: '3' given"):
        reproduce(tmp_path, samples="3")
    with pytest.raises(RobbenchError, match="lanes: 0 given"):
        verify(tmp_path, lanes=0)
    with pytest.raises(RobbenchError, match="samples: '3' given"):
        assert_robust("digits/at", at_least=0.1, samples="3")


@pytest.mark.parametrize("function", [evaluate, plan, examine])
def test_an_unknown_option_is_told_with_its_neighbours(function, nothing_loaded):
    with pytest.raises(RobbenchError, match=r"Unknown option 'smaples'\. Did you mean samples"):
        function("digits/at", smaples=3)
    with pytest.raises(RobbenchError, match=r"Unknown option 'datset'\. Did you mean dataset"):
        function(small(), datset="digits")


def test_numbers_and_devices_of_other_libraries_are_taken():
    taken = Options(samples=np.int64(3), seed=np.uint8(2), eps=np.float32(0.1), device=torch.device("cpu"))
    assert taken == Options(samples=3, seed=2, eps=0.1, device="cpu")
    assert [type(v) for v in (taken.samples, taken.seed, taken.eps, taken.device)] == [int, int, float, str]
    assert Options(eps=np.float64(0.1)).eps == 0.1 and Options(eps=1).eps == "1"
    assert Options(device=torch.device("cuda", 1)).device == "cuda:1"
    assert Options(models=["a", Path("b")]).models == ("a", Path("b"))


def test_the_options_of_public_functions_are_those_of_the_dataclass():
    given = get_type_hints(OptionFields, localns={"torch": torch})
    own = get_type_hints(Options)
    assert given.pop("device") == str | torch.device and own.pop("device") is str  # a torch.device becomes its name
    assert given.pop("target") == str | int | Sequence[int] | None  # a class becomes text, and a list a tuple
    assert own.pop("target") == str | tuple[int, ...] | None
    assert given == own
    given = get_type_hints(SpecFields, localns={"Tensor": torch.Tensor})
    own = get_type_hints(ModelSpec, localns={"Tensor": torch.Tensor, "nn": torch.nn})
    assert own.pop("model") == str | torch.nn.Module
    assert given == own
    assert {*RunFields.__annotations__} == {*SpecFields.__annotations__, *OptionFields.__annotations__}


WRONG_SPECS = [
    ({"model": 3}, "model: builtins.int given; allowed: a torch.nn.Module, a function of arrays of images"),
    ({"model": dict}, "model: builtins.type given.*This is a class"),
    ({"name": "a/b"}, "name: 'a/b' given; allowed: up to 200 bytes of printable text without /"),
    ({"name": ""}, "name: '' given"),
    ({"name": 3}, "name: 3 given; allowed: text, or None"),
    ({"dataset": "../x"}, "dataset: '../x' given"),
    ({"architecture": 3}, "architecture: 3 given; allowed: text"),
    ({"x": [np.zeros((1, 8, 8))]}, "x: builtins.list given; allowed: a torch.Tensor or a NumPy array"),
    ({"data": "d", "x": np.zeros((1, 1, 8, 8))}, "data given with x or y"),
    ({"resize": 8}, "resize given without data"),
    ({"data": "d", "crop": 0}, "crop: 0 given; allowed: a whole number from 1 on"),
    ({"data": "d", "channels": 2}, "channels: 2 given; allowed: 1 or 3"),
    ({"data": "d", "on_broken": "go"}, "on_broken: 'go' given; allowed: stop, skip"),
    ({"y": [1]}, "y: builtins.list given; allowed: a torch.Tensor"),
    ({"model": "file:a.pt", "mean": "0.5"}, "mean: '0.5' given; allowed: a list with one number per channel"),
    ({"model": "file:a.pt", "std": [True]}, r"std: \[True\] given"),
    ({"model": "file:a.pt", "mean": 0.5}, r"mean: 0\.5 given"),
    ({"mean": [0.5]}, "a model of your own is complete"),
    ({"model": "digits/at", "dataset": "digits"}, "not with a registered name"),
    ({"model": "odd:thing:else"}, "Unknown source"),
]


@pytest.mark.parametrize(("given", "message"), WRONG_SPECS)
def test_a_wrong_spec_is_a_sentence_before_anything_is_loaded(given, message, nothing_loaded, tmp_path):
    fields = {"model": small(), **given}
    with pytest.raises(RobbenchError, match=message):
        evaluate(fields.pop("model"), "quick", **fields, results=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_a_spec_takes_numbers_of_other_libraries():
    spec = ModelSpec("file:a.pt", architecture="linear", mean=np.array([0.5]), std=torch.tensor([0.25]))
    assert spec.mean == (0.5,) and spec.std == (0.25,)


def test_a_request_describes_itself_as_before(tmp_path):
    request = RunRequest.of("digits/at", "quick", samples=np.int64(3), eps=0.1, models=[tmp_path], results=tmp_path)
    about = request.describe()
    assert about["eps"] == "0.1" and about["samples"] == 3 and about["models"] == [str(tmp_path)]
    assert about["model"] == "digits/at" and about["suite"] == "quick" and about["own_images"] is False
    own = RunRequest.of(small(), "quick", x=torch.zeros(1, 1, 8, 8), y=torch.zeros(1).long()).describe()
    assert own["model"] is None and own["own_images"] is True
    with pytest.raises(SuiteError, match="without --eps"):
        RunRequest.of("digits/at", norm="L2")
