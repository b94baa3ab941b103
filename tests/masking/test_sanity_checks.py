"""Every check of gradient masking: one model built to trip it, and one that must not."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from robbench.attacks import PGD
from robbench.classifier.batch_width import BatchWidths
from robbench.core.numbers import parse_threat
from robbench.core.threat import Ball
from robbench.evaluation.inputs import own_images, own_target
from robbench.evaluation.options import Options
from robbench.evaluation.request import RunRequest
from robbench.evaluation.run import EvaluationRun, run_here
from robbench.evaluation.stages import ready_stages
from robbench.masking import gradients, measure
from robbench.masking.binarization import run_binarization_test
from robbench.masking.checks import CHECKS, load_thresholds, run_checks
from robbench.masking.compare import compute_zero_share
from robbench.masking.gradient_probe import GradientProbe, ZeroGradientModel
from robbench.masking.run import examine
from robbench.models.card import Registry
from robbench.models.load import load_model
from robbench.models.spec import ModelSpec
from robbench.results.places import locate_result
from robbench.results.store import read_rows
from robbench.suite import load_suite
from support.masks import (
    KWTA,
    Cut,
    Inside,
    NoGradient,
    Noisy,
    NoisyGradient,
    OneRow,
    Periodic,
    Quantized,
    Reversed,
    Rippled,
    Softmax,
    Temperature,
)
from support.models import Linear

pytestmark = pytest.mark.whole

USUAL = PGD(objective="ce_scaled", steps=20)
CPU = torch.device("cpu")


def digits(name):
    return load_model(Registry.default([]).find(f"digits/{name}")).module


def kwta(share):
    net = digits("natural")
    for i, layer in enumerate(net):
        if isinstance(layer, nn.ReLU):
            net[i] = KWTA(share)
    return net


def plane(margin=20):
    """Images in the middle of the box and a hyperplane that noise does not cross, but every attack does."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(256, generator=generator).sign()
    x = 0.5 + 0.02 * torch.randn(40, 1, 16, 16, generator=generator)
    model = Linear(w, margin - float(x.flatten(1).mean(0) @ w), classes=3, scale=0.1)
    return model, x, w


def on_plane(wrapped, margin=20):
    """Put a wrapper around the hyperplane's model."""
    model, x, _ = plane(margin)
    return wrapped(model), x, model(x).argmax(1)


def spread(x):
    return x.flatten(1).std(1)


def columns(x):
    """Choose every other column of pixels."""
    return (torch.arange(x.shape[3]) % 2 == 0).expand_as(x)


# name -> (module, images, labels); images of the digits where None
MODELS = {
    "at": lambda: (digits("at"), None, None),
    "natural": lambda: (digits("natural"), None, None),
    "smoothed": lambda: (digits("ls095_sigma03"), None, None),
    "noisy": lambda: (Noisy(digits("natural"), 0.1), None, None),
    "softmax": lambda: (Softmax(digits("natural")), None, None),
    "hot softmax": lambda: (Softmax(Temperature(digits("natural"), 100.0)), None, None),
    "tanh": lambda: (nn.Sequential(digits("at"), nn.Tanh()), None, None),
    "noisy gradient": lambda: (NoisyGradient(digits("at"), lambda x: spread(x) > -1), None, None),
    "half a gradient": lambda: (Cut(digits("at"), columns), None, None),
    "inside": lambda: (Inside(digits("natural")), None, None),
    "hot": lambda: (Temperature(digits("natural"), 100.0), None, None),
    "warm": lambda: (Temperature(digits("natural"), 5.0), None, None),
    "stairs": lambda: (Quantized(digits("natural"), 4, straight=True), None, None),
    "flat stairs": lambda: (Quantized(digits("natural"), 4, straight=False), None, None),
    "cut": lambda: (NoGradient(Quantized(digits("trades"), 2, straight=False)), None, None),
    "cut natural": lambda: (NoGradient(digits("natural")), None, None),
    "kwta": lambda: (kwta(0.1), None, None),
    "rippled": lambda: (Rippled(digits("natural"), 0.02, 0.02), None, None),
    "turned": lambda: (Reversed(digits("natural"), lambda x: spread(x) > -1), None, None),
    # The digits' own pixels are sixteenths; anything else is an attack's.
    "turned off the data": lambda: (
        Reversed(digits("natural"), lambda x: ((x * 16) % 1 != 0).flatten(1).any(1)), None, None,
    ),
    "plane": lambda: on_plane(lambda m: m),
    "turned far off": lambda: on_plane(lambda m: Reversed(m, lambda x: spread(x) > 0.1)),
    "one row": lambda: on_plane(OneRow),
    "one row, far": lambda: on_plane(OneRow, margin=48),
}  # fmt: skip


@cache
def extract_subject(name):
    """A prepared model, its test images, and the radius."""
    module, x, y = MODELS[name]()
    spec = ModelSpec(module.eval(), x, y)
    images = own_images(spec, "digits" if x is None else None, Options())
    target = own_target(spec, CPU, images, Options())
    inputs = images.x(np.arange(2)).requires_grad_(True)
    connected = target.module(inputs).requires_grad
    if not connected:
        target = own_target(ModelSpec(ZeroGradientModel(module).eval()), CPU, images, Options())
    return SimpleNamespace(target=target, images=images, eps="0.2", connected=connected)


@cache
def probe(name):
    s = extract_subject(name)
    x, y = s.images.x(np.arange(min(60, len(s.images.y)))), s.images.y[:60]
    with torch.no_grad():
        right = np.flatnonzero((s.target.module(x).argmax(1) == y).numpy())[:32]
    ball = Ball.of(parse_threat("Linf", s.eps))
    widths = BatchWidths(s.target.module, x.shape[1:], 64, x.dtype)
    return GradientProbe(s.target, x[right], y[right], s.images.index[right], ball, 0, widths)


@cache
def points(name):
    return gradients.choose_points(probe(name), USUAL)


@cache
def suite(name, eps="0.2"):
    """The suite's records on 48 images, as they enter the measurements."""
    import tempfile
    from pathlib import Path

    s = extract_subject(name)
    with tempfile.TemporaryDirectory() as folder:
        request = RunRequest.of(s.target.module, "sanity", samples=48, results=folder, norm="Linf", eps=eps)
        result = run_here(EvaluationRun(request, s.target, s.images, load_suite("sanity")))
        rows = read_rows(locate_result(Path(folder), result) / "outcomes.parquet")
    return {
        "n": result.n,
        "pgd": result.attacks[0].robust_accuracy,
        "best": result.robust_accuracy,
        "zero_gradients": compute_zero_share(result, rows),
        "challenges": measure.compare_attacks(result, rows),
    }


def transferred(name):
    s = extract_subject(name)
    stages = ready_stages(load_suite("sanity"), parse_threat("Linf", s.eps), s.target, s.images, Options())
    only = [
        s for s in stages if s.name == "BB-natural"
    ]  # what an adversarially trained surrogate finds carries further
    made = [measure._measure_transfer(probe(name), stage) for stage in only]
    return {"transferred": made, "differentiable": s.connected}


def linear(name):
    stands = torch.tensor([c.given > 0 for c in suite(name)["challenges"][:1]] * len(probe(name)))
    broken = probe(name).run_attack("standing", USUAL).broken
    return {"linear": gradients.measure_linear_estimate(probe(name), stands & ~torch.from_numpy(broken))}


PARTS = {
    "suite": suite,
    "large": lambda name: suite(name, "0.4" if name == "flat stairs" else "0.2"),
    "larger": lambda name: suite(name, "0.6" if name == "flat stairs" else "0.2"),
    "randomness": lambda name: {"randomness": gradients.measure_randomness(probe(name), points(name))},
    "outputs": lambda name: {
        "autograd_calls": gradients.count_autograd_calls(probe(name)),
        "probabilities": bool((probe(name).compute_logits(probe(name).x).sum(1) - 1).abs().max() < 1e-5),
        "classes": probe(name).compute_logits(probe(name).x).shape[1],
    },
    "scale": lambda name: {
        "scale": gradients.measure_logit_scale(probe(name)),
        "differentiable": extract_subject(name).connected,
    },
    "gradients": lambda name: {"gradients": gradients.measure_gradient_quality(probe(name), points(name))},
    "traces": lambda name: {"traces": measure._measure_traces(probe(name), USUAL, 8)},
    "curve": lambda name: {"curve": measure._measure_curve(probe(name), USUAL)},
    "grid": lambda name: {"grid": measure._measure_grid(probe(name))},
    "binarization": lambda name: {"binarization": run_binarization_test(probe(name).take_first(12), [USUAL])},
    "transferred": transferred,
    "linear": linear,
}

# check -> (what measures it, the model that trips it, how badly, the model that must not)
CASES = {
    "randomized": ("randomness", "noisy", "fail", "at"),
    "probabilities": ("outputs", "softmax", "fail", "at"),
    "classes": ("outputs", "plane", "warn", "at"),
    "autograd_inside": ("outputs", "inside", "fail", "at"),
    "unavailable_gradients": ("scale", "cut", "fail", "at"),
    "zero_gradients": ("suite", "hot softmax", "fail", "at"),
    "repeated_gradients": ("gradients", "noisy gradient", "fail", "at"),
    "underflow": ("scale", "warm", "fail", "natural"),
    "logit_range": ("scale", "warm", "fail", "natural"),
    "squeezed_logits": ("scale", "smoothed", "fail", "natural"),
    "finite_differences": ("gradients", "stairs", "fail", "natural"),
    "partial_gradients": ("gradients", "half a gradient", "fail", "natural"),
    "nearby_gradients": ("gradients", "rippled", "fail", "natural"),
    "local_linearity": ("gradients", "rippled", "warn", "natural"),
    "loss_disagreement": ("suite", "tanh", "fail", "at"),
    "single_step": ("suite", "turned off the data", "fail", "at"),
    "noise": ("large", "flat stairs", "fail", "at"),
    "transfer": ("suite", "flat stairs", "fail", "at"),
    "square": ("suite", "flat stairs", "fail", "at"),
    "restarts": ("larger", "flat stairs", "warn", "at"),
    "steps": ("suite", "one row", "fail", "at"),
    "step_sizes": ("suite", "rippled", "fail", "at"),
    "grid": ("grid", "one row", "fail", "at"),
    "monotone": ("curve", "turned far off", "fail", "at"),
    "unbounded": ("curve", "turned", "fail", "at"),
    "unstable_predictions": ("traces", "noisy", "warn", "at"),
    "silent_success": ("traces", "periodic", "warn", "at"),
    "incomplete_optimization": ("traces", "one row, far", "warn", "at"),
    "transfer_failure": ("transferred", "cut", "warn", "cut natural"),
    "binarization": ("binarization", "flat stairs", "fail", "at"),
    "linear_estimate": ("linear", "turned", "fail", "at"),
    "overestimation": ("suite", "tanh", "fail", "at"),
}


def periodic():
    """Each step of the usual PGD at 0.2 goes half a period: from right to wrong and back."""
    _, x, w = plane()
    step = 0.25 * 0.2 * 256
    return Periodic(w, -float(x.flatten(1).mean(0) @ w), 2 * step), x, torch.zeros(len(x), dtype=torch.int64)


MODELS["periodic"] = periodic


@pytest.fixture(scope="module")
def base():
    """Measurements of an honest model, of which each test replaces a part."""
    few = measure.CheckBudget(curve=8, grid=8, traces=8, binarization=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robbench.masking.measure.CheckBudget", lambda: few)
        return examine("digits/at", samples=16).measurements


def status(base, check, part, model):
    found = {c.name: c for c in run_checks(base.model_copy(update=PARTS[part](model)))}
    return found[check]


def test_every_check_has_a_case():
    assert list(CASES) == list(CHECKS)


@pytest.mark.parametrize("check", CASES)
def test_a_model_built_to_trip_it(base, check):
    part, model, expected, _ = CASES[check]
    found = status(base, check, part, model)
    assert found.status == expected, found.reason
    limit = load_thresholds().check[check]
    assert found.decides == (limit.on_fail if expected == "fail" else limit.on_warn)


@pytest.mark.parametrize("check", CASES)
def test_a_model_that_must_not(base, check):
    part, _, _, model = CASES[check]
    found = status(base, check, part, model)
    assert found.status == "pass" or (found.status == "warn" and not found.decides), found.reason


def test_a_model_that_calls_autograd_marks_no_later_one():
    assert gradients.count_autograd_calls(probe("inside"))
    assert not gradients.count_autograd_calls(probe("at"))
