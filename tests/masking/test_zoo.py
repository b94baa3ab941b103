"""The labelled zoo: each wrapper hides what it says it hides, and the labels are borne out."""

import contextlib
import importlib.util
from collections import defaultdict

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from robbench.attacks import PGD
from robbench.core.errors import ModelError, RobbenchError, UnshippedError
from robbench.core.threat import Ball
from robbench.data.sets import load
from robbench.models.card import Registry
from robbench.models.families import list_stale_cards
from robbench.models.load import describe_module, digest_module
from support.attacks import run_attack
from zoo import HONEST_UP_TO, ZOO, find_entry, load_network, open_zoo_registry
from zoo.images import (
    InputNoise,
    Jpeg,
    MedianFilter,
    Quantize,
    RandomResizePad,
    Ripple,
    StraightThrough,
    Thermometer,
)
from zoo.networks import (
    Decoy,
    Dropout,
    KillGradient,
    KWinners,
    LogProbabilities,
    MeanOf,
    Probabilities,
    RandomMember,
    ReverseGradient,
    RoundedReLU,
    Scale,
    replace_activations,
)

pytestmark = pytest.mark.whole

EPS = 0.2
USUAL = PGD(objective="ce_scaled", steps=20)
NAMES = [entry.name for entry in ZOO]


def digits(n):
    data = load("digits")
    return torch.from_numpy(data.x[:n]).float() / data.scale, torch.from_numpy(data.y[:n])


def gradient(model, x, y):
    x = x.clone().requires_grad_(True)
    return torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)[0]


@pytest.fixture(scope="module")
def natural():
    return load_network("digits/natural")


# ---- the table


def test_names_are_unique_and_both_halves_hold_every_kind():
    assert len(set(NAMES)) == len(NAMES)
    halves, labels = defaultdict(set), defaultdict(set)
    for entry in ZOO:
        halves[entry.label, entry.kind].add(entry.half)
        labels[entry.label].add(entry.name)
    assert all(found == {"calibration", "held-out"} for found in halves.values()), dict(halves)
    assert len(labels["masked"]) >= 14 and len(labels["honest"]) >= 12


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_builds_and_answers_finite_logits(name):
    entry = find_entry(name)
    try:
        model = entry.build_model()
    except UnshippedError as error:
        pytest.skip(str(error))
    assert not any(part.training for part in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    x = digits(8)[0] if entry.dataset == "digits" else torch.rand(8, 1, 28, 28)
    with torch.no_grad():
        logits = model(x)
    assert logits.shape == (8, 10) and logits.isfinite().all() and logits.dtype == torch.float32
    assert entry.why.endswith(".") and entry.source


@pytest.mark.parametrize("name", [entry.name for entry in ZOO if entry.stand_in])
@torch.no_grad()
def test_a_stand_in_answers_like_the_model_and_has_a_gradient(name):
    entry = find_entry(name)
    x, y = digits(200)
    stand_in = entry.build_stand_in()
    model, expected = entry.build_model(), stand_in(x).argmax(1)
    torch.manual_seed(0)  # some models answer at random
    assert torch.stack([model(x).argmax(1) == expected for _ in range(10)]).float().mean() > 0.85
    with torch.enable_grad():
        assert (gradient(stand_in, x, y) != 0).flatten(1).any(1).float().mean() > 0.9


def test_no_two_models_share_an_identity():
    """Results are told apart by tensors and structure, so the numbers of a wrapper must show in its structure."""
    models = []
    for entry in ZOO:
        with contextlib.suppress(UnshippedError):
            models.append(entry.build_model())
    assert len({(digest_module(m), str(describe_module(m))) for m in models}) == len(models) >= len(ZOO) - 1
    assert str(Scale(10.0)) != str(Scale(100.0)) and "levels=8" in str(Quantize(8))


def test_an_unknown_entry_is_told_with_the_closest_name():
    with pytest.raises(RobbenchError, match=r"Unknown model of the zoo 'naturel'\. Did you mean natural"):
        find_entry("naturel")


def test_the_registry_is_current_small_and_not_among_the_users_models():
    builtin, ours = open_zoo_registry().roots
    assert list_stale_cards(ours) == []
    own = Registry([ours]).entries()
    assert not {e.full_name for e in own} & {e.full_name for e in Registry([builtin]).entries()}
    assert sum(file.stat().st_size for file in ours.rglob("*.safetensors")) < 3e6
    used = {e.full_name for e in own if e.card.weights is not None}
    assert used == {e.full_name for e in own}, "a card of the zoo without weights"


# ---- what each wrapper does


@pytest.mark.parametrize("hidden", [Quantize(8), Jpeg(0.1), KillGradient()])
def test_rounding_has_a_gradient_of_zero(natural, hidden):
    x, y = digits(20)
    assert (gradient(nn.Sequential(hidden, natural), x, y) == 0).all()
    assert (gradient(natural, x, y) != 0).any()


@pytest.mark.parametrize("cut", [Thermometer(16), MedianFilter(2)])
def test_comparisons_and_numpy_leave_no_graph(natural, cut):
    assert not nn.Sequential(cut, natural)(digits(2)[0].requires_grad_(True)).requires_grad


@pytest.mark.parametrize(
    ("wrapped", "least"),
    [
        (lambda base: nn.Sequential(base, Scale(1000)), 1.0),
        (lambda base: nn.Sequential(base, LogProbabilities()), 1.0),
        (lambda base: nn.Sequential(base, Probabilities()), 1.0),
        (lambda base: nn.Sequential(KillGradient(), base), 1.0),
        (lambda base: nn.Sequential(ReverseGradient(), base), 1.0),
        (lambda base: nn.Sequential(StraightThrough(Quantize(17)), base), 1.0),
        (lambda base: nn.Sequential(Ripple(0.002, 3000.0), base), 0.99),
        (lambda base: replace_activations(base, lambda: RoundedReLU(0.05)), 0.99),
        (lambda base: MeanOf([base, base]), 1.0),
    ],
)
@torch.no_grad()
def test_what_only_hides_the_gradient_keeps_the_predictions(natural, wrapped, least):
    x, _ = digits(200)
    assert (wrapped(natural)(x).argmax(1) == natural(x).argmax(1)).float().mean() >= least


def test_rounded_activations_and_huge_logits_have_a_gradient_of_zero(natural):
    x, y = digits(100)
    assert (gradient(replace_activations(natural, lambda: RoundedReLU(0.05)), x, y) == 0).all()
    # Where the margin is above 0.104, which is almost everywhere, exp(-1000 margin) is 0 in float32.
    dead = (gradient(nn.Sequential(natural, Scale(1000)), x, y) == 0).flatten(1).all(1)
    assert dead.float().mean() > 0.9


def test_a_reversed_gradient_is_the_negative_one(natural):
    x, y = digits(10)
    torch.testing.assert_close(gradient(nn.Sequential(ReverseGradient(), natural), x, y), -gradient(natural, x, y))


def test_a_ripple_gives_gradients_of_random_sign(natural):
    x, y = digits(50)
    x = (x + 0.01 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    true, shattered = gradient(natural, x, y), gradient(nn.Sequential(Ripple(0.002, 3000.0), natural), x, y)
    agree = (true.sign() == shattered.sign())[true != 0].float().mean()
    assert 0.45 < agree < 0.6


def test_a_straight_through_module_computes_its_inner_with_the_gradient_of_the_identity(natural):
    x, y = digits(10)
    inner = Quantize(3)
    torch.testing.assert_close(StraightThrough(inner)(x), inner(x))
    expected = gradient(natural, inner(x), y)
    torch.testing.assert_close(gradient(nn.Sequential(StraightThrough(inner), natural), x, y), expected)


def test_a_decoy_answers_by_one_network_and_points_by_another(natural):
    x, y = digits(10)
    other = load_network("digits/mlp")
    decoy = Decoy(natural, other).eval()
    torch.testing.assert_close(decoy(x), natural(x))
    weight = F.softmax(natural(x), 1) - F.one_hot(y, 10)
    x1 = x.clone().requires_grad_(True)
    expected = torch.autograd.grad((other(x1) * weight.detach()).sum(), x1)[0]
    torch.testing.assert_close(gradient(decoy, x, y), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "random",
    [
        lambda base: nn.Sequential(InputNoise(0.1), base),
        lambda base: nn.Sequential(RandomResizePad(7), base),
        lambda base: replace_activations(base, lambda: Dropout(0.3)),
        lambda base: RandomMember([base, load_network("digits/mlp")]),
    ],
)
@torch.no_grad()
def test_a_random_model_answers_anew_each_time_also_in_eval_mode(natural, random):
    x, _ = digits(20)
    model = random(natural).eval()
    torch.manual_seed(0)
    answers = [model(x) for _ in range(8)]
    assert any((answers[0] != other).any() for other in answers[1:])
    torch.manual_seed(0)
    assert all((before == model(x)).all() for before in answers)


def test_quantization_thermometer_and_jpeg_are_what_they_say():
    x, _ = digits(20)
    assert (Quantize(2)(x) == (x > 0.5)).all()
    torch.testing.assert_close(
        Thermometer(4)(x), ((x[..., None] > torch.tensor([0.125, 0.375, 0.625, 0.875])) / 4).sum(-1)
    )
    torch.testing.assert_close(Jpeg(1e-5)(x), x, atol=1e-3, rtol=0)
    coarse = Jpeg(1.0)(x)
    assert 0.02 < (coarse - x).abs().mean() < 0.3
    large = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    whole = Jpeg(0.3)(large)
    torch.testing.assert_close(whole[:, :, 8:, 16:], Jpeg(0.3)(large[:, :, 8:, 16:]))
    with pytest.raises(ModelError, match="28x28 given; allowed: multiples of 8"):
        Jpeg(0.1)(torch.rand(1, 1, 28, 28))


def test_a_median_filter_takes_the_median_within_an_image():
    x = torch.zeros(2, 1, 8, 8)
    x[1] = 1
    x[0, 0, 4, 4] = 1
    assert (MedianFilter(3)(x)[0] == 0).all() and (MedianFilter(3)(x)[1] == 1).all()


def test_k_winners_take_all_passes_only_the_winners():
    h = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    out = KWinners(0.25)(h).flatten(1)
    assert ((out != 0).sum(1) == 12).all()
    assert (out.amax(1) == h.flatten(1).amax(1)).all()


def test_a_padded_image_is_the_shrunk_one_somewhere():
    x = torch.ones(1, 1, 8, 8)
    torch.manual_seed(0)
    sizes = {int((RandomResizePad(6)(x) > 0).sum()) for _ in range(40)}
    assert sizes == {36, 49, 64}


def test_activations_are_replaced_in_a_copy(natural):
    x, _ = digits(5)
    before = natural(x)
    dead = replace_activations(natural, lambda: Scale(0.0))
    assert (dead(x) == dead(x[:1])).all()
    assert (natural(x) == before).all()
    with pytest.raises(ModelError, match=r"Flatten holds no nn\.ReLU"):
        replace_activations(nn.Flatten(), nn.Tanh)


# ---- labels, measured


def robust(model, attack, x, y):
    return float((~run_attack(model, attack, x, y, Ball("Linf", EPS)).broken).mean())


def transferred(stand_in, model, x, y):
    """Accuracy of the model on the stand-in's adversarial examples."""
    found = run_attack(stand_in, PGD(objective="margin", steps=40), x, y, Ball("Linf", EPS), keep_adversarials=True)
    points = x.clone()
    points[torch.from_numpy(np.flatnonzero(found.broken))] = found.x_adv[torch.from_numpy(found.broken)]
    with torch.no_grad():
        return float((model(points).argmax(1) == y).float().mean())


@pytest.mark.parametrize("name", ["natural_probabilities_t001", "natural_quantized", "natural_decoy"])
def test_the_usual_attack_overstates_a_masked_model(name):
    entry = find_entry(name)
    x, y = digits(60)
    model = entry.build_model()
    with torch.no_grad():
        right = model(x).argmax(1) == y
    x, y = x[right], y[right]
    assert robust(model, USUAL, x, y) > 0.6
    assert transferred(entry.build_stand_in(), model, x, y) < 0.4


def test_the_usual_attack_on_the_linear_model_is_near_the_exact_answer():
    """Under a linear map the worst point within ball and box is known in closed form."""
    x, y = digits(300)
    model = find_entry("linear").build_model()
    layer = next(part for part in model.modules() if isinstance(part, nn.Linear))
    flat = x.flatten(1)
    low, high = (flat - EPS).clamp(min=0), (flat + EPS).clamp(max=1)
    towards = layer.weight[None] - layer.weight[y][:, None]
    worst = torch.where(towards > 0, high[:, None], low[:, None])
    gap = (towards * worst).sum(2) + layer.bias[None] - layer.bias[y][:, None]
    exact = float((gap.scatter(1, y[:, None], -1) < 0).all(1).float().mean())
    with torch.no_grad():
        right = model(x).argmax(1) == y
    measured = robust(model, USUAL, x[right], y[right]) * float(right.float().mean())
    assert exact <= measured <= exact + HONEST_UP_TO / 100


# ---- the page


@pytest.fixture
def zoo_page(repo):
    spec = importlib.util.spec_from_file_location("zoo_page", repo / "perf" / "zoo_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(left, flags=(), warnings=(), verdict="unchecked"):
    return {
        "attack": {"n": 100, "clean": 90, "left": left, "flags": list(flags), "hardware": "a CPU"},
        "autoattack": {"n": 50, "warnings": dict.fromkeys(warnings, "")},
        "verdict": {"n": 100, "verdict": verdict, "deciding": ["scale"] if verdict == "masked" else []},
    }


def test_the_page_holds_both_halves_and_counts_who_is_flagged(zoo_page):
    records = {
        "natural_quantized": measured({"PGD": 88, "Square": 3}, verdict="masked"),
        "natural_thermometer": measured({"PGD": None, "Square": 10}, verdict="trustworthy"),
        "natural": measured({"PGD": 4, "Square": 2}, warnings=["dynamic"], verdict="trustworthy"),
        "wide": measured({"PGD": 40, "Square": 2}),
    }
    text = zoo_page.render_page(records, 0, {"robbench": "0"})
    calibration, held_out = text.split("## Held-out half")
    assert "| natural_quantized   | masked  | 90.0    | 88.0  | 3.0    | 85.0" in calibration
    assert "| natural_thermometer | masked  | 90.0    | none  | 10.0   | 80.0" in calibration
    assert "pyautoattack flags 0 of 2 masked and 1 of 1 honest models." in calibration
    assert "robbench flags 1 of 2 masked and 0 of 1 honest models." in calibration
    # 38 points are not honest, and the page says so.
    assert "| wide    | honest (not confirmed) | 90.0" in held_out and "robbench flags" not in held_out.split("##")[0]
    assert zoo_page.render_page(records, 0, {"robbench": "0"}) == text


def test_the_held_out_half_goes_between_the_marks_of_another_page(zoo_page):
    records = {"natural": measured({"PGD": 4}), "wide": measured({"PGD": 4}, warnings=["Square"], verdict="masked")}
    empty = f"before {zoo_page.BEGIN}old{zoo_page.END} after"
    text = zoo_page.insert_summary(empty, records, 0, {"robbench": "0"})
    assert text.startswith("before ") and text.endswith(" after") and "old" not in text
    assert "| wide    | honest  | 4.0   | 4.0          | Square" in text and "natural" not in text
    assert "pyautoattack flags 0 of 0 masked and 1 of 1 honest models. robbench flags 0 of 0 masked and 1 of 1" in text
    assert zoo_page.insert_summary(text, records, 0, {"robbench": "0"}) == text


@pytest.mark.parametrize(
    ("name", "left", "flags", "borne_out"),
    [
        ("natural", 82, (), True),
        ("natural", 81, (), False),
        ("natural", 90, ("randomized",), False),
        ("natural_quantized", 78, (), True),
        ("natural_quantized", 79, (), False),
        ("natural_dropout", 90, ("randomized",), True),
        ("natural_jpeg_straight", 90, (), True),
    ],
)
def test_a_label_is_borne_out_by_the_rule(zoo_page, name, left, flags, borne_out):
    record = measured({"PGD": 90, "Square": left}, flags)["attack"]
    assert zoo_page.is_confirmed(find_entry(name), record) is borne_out
