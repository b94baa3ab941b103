"""A run on few images pays for few images: widths, waiting time, and what is said about chance and dark images."""

import numpy as np
import pytest
import torch
from torch import nn

from robbench.attacks import FGSM, PGD
from robbench.classifier.batch_width import BatchWidths
from robbench.engine.lanes import Lanes
from robbench.evaluation.attack_images import attack_images
from robbench.evaluation.precision import explain_bfloat16_cost
from robbench.evaluation.progress import Silent
from robbench.evaluation.run import evaluate
from robbench.recheck.reproduce import reproduce
from support.models import small


class Counting(nn.Module):
    """Answers each image alone, so that all widths give the same bits; counts the images that it is given."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = small(), []

    def forward(self, x):
        COUNTED.append(len(x))
        return torch.cat([self.net(row) for row in x.split(1)])


COUNTED = []


class Listening(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def few(n=6):
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    return x, small()(x).argmax(1)


@pytest.mark.parametrize("by", ["evaluate", "attack"])
def test_a_run_on_six_images_meets_the_full_width_once(by):
    x, y = few()
    COUNTED.clear()
    if by == "evaluate":
        evaluate(Counting().eval(), [PGD(steps=3)], x=x, y=y, eps=0.05)
    else:
        attack_images(Counting().eval(), PGD(steps=3), x, y, eps=0.05)
    assert COUNTED.count(256) == 1, "the one batch that narrower ones are compared with"
    assert max(n for n in COUNTED if n < 256) <= 24
    assert sum(COUNTED) < 2 * 256


@pytest.mark.parametrize("n", [1, 3, 6, 17, 40])
def test_at_most_a_tenth_of_the_images_in_a_pass_is_padding(n, monkeypatch):
    passes, through = [], Lanes.ask

    def ask(self, p, s, live, with_grad):
        passes.append((len(live), len(s["x"])))
        return through(self, p, s, live, with_grad)

    monkeypatch.setattr(Lanes, "ask", ask)
    x, y = few(n)
    evaluate(Counting().eval(), "quick", x=x, y=y, eps=0.003, lanes=8, norm="Linf")
    live, asked = np.sum(passes, axis=0)
    assert live >= 20 * n and asked <= 1.1 * live


def test_the_width_of_the_checks_is_compared_with_the_full_one(monkeypatch):
    """A model that answers otherwise in narrow batches is looked at in full ones."""

    class Narrow(Counting):
        def forward(self, x):
            return super().forward(x) * (1 + 1e-6 * (len(x) < 256))

    x, y = few()
    COUNTED.clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    evaluate(Narrow().eval(), [FGSM()], x=x, y=y, eps=0.05)
    assert COUNTED.count(256) > 5


def test_memory_that_runs_out_in_the_comparison_halves_the_lanes():
    class Huge(Counting):
        def forward(self, x):
            if len(x) > 100:
                raise MemoryError
            return super().forward(x)

    x, y = few()
    assert evaluate(Huge().eval(), [FGSM()], x=x, y=y, eps=0.05).lanes == 64
    assert evaluate(Huge().eval(), [FGSM()], x=x, y=y, eps=0.05, lanes=64).n == 6


def test_all_threads_need_a_width_that_was_compared(monkeypatch):
    widths = BatchWidths(small(), (1, 8, 8), 64, torch.float32)
    asked, good = [], set()

    def has_same_bits(width, threads):
        asked.append(width)
        return width in good

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(widths, "has_same_bits", has_same_bits)
    for same, threads, seen in (({6}, 4, [6]), ({64}, 4, [6, 64]), ({8}, 1, [6, 64])):
        asked.clear()
        good.clear()
        good.update(same)
        assert (widths.choose_threads(6), asked) == (threads, seen)


def test_the_result_says_what_a_person_waited(tmp_path):
    x, y = few()
    first = evaluate(small(), [FGSM()], x=x, y=y, eps=0.05, results=tmp_path, name="it")
    assert first.wall_seconds is not None and first.wall_seconds > first.seconds
    known = evaluate(small(), [FGSM()], x=x, y=y, eps=0.05, results=tmp_path, name="it")
    assert known.wall_seconds == first.wall_seconds, "nothing was computed"


USELESS = {
    "labels shifted by one": lambda net, x, y: (net, (y + 1) % 10),
    "classes in another order": lambda net, x, y: (nn.Sequential(net, Reversed()), y),
    "always one class": lambda net, x, y: (nn.Sequential(net, Biased()), y),
    "inputs in 0 to 255 expected": lambda net, x, y: (nn.Sequential(Scaled(1 / 255), net), y),
}


class Reversed(nn.Module):
    def forward(self, z):
        return z.flip(1)


class Biased(nn.Module):
    def forward(self, z):
        return z + 1e3 * nn.functional.one_hot(torch.tensor([4]), 10)


class Scaled(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return (x - 0.5) * self.by


@pytest.mark.parametrize("name", USELESS)
def test_a_model_at_chance_is_told_before_the_attacks_and_flagged(name, tmp_path):
    generator = torch.Generator().manual_seed(5)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    y = torch.arange(60) % 10
    x = 0.3 + 0.02 * torch.rand(60, 1, 8, 8, generator=generator)
    with torch.no_grad():  # class k is a bright pixel k; a bias that images scaled down do not overcome
        net[1].weight.copy_(10 * torch.eye(10, 64))
        net[1].bias.copy_(0.5 * torch.arange(10.0))
    x[torch.arange(60), 0, 0, y.clamp(max=7)] = 0.9
    x[y >= 8, 0, 0, 7] = 0.3
    x.view(60, 64)[torch.arange(60), y] = 0.9
    good = evaluate(net, [FGSM()], x=x, y=y, eps=0.01, results=tmp_path, name="good")
    assert good.clean_accuracy.value > 0.5 and "chance" not in good.flags
    broken, labels = USELESS[name](net, x, y)
    heard = Listening()
    found = evaluate(broken.eval(), [FGSM()], x=x, y=labels, eps=0.01, results=tmp_path, name="bad", reporter=heard)
    assert "at chance" in found.flags["chance"] and "at chance" in heard.notes[0]
    assert "chance" in attack_images(broken, FGSM(), x, labels, eps=0.01).flags


@pytest.mark.parametrize(("scale", "flagged"), [(1 / 255, True), (1.0, False), (2 / 255, False), (0.0, True)])
def test_images_divided_by_255_twice_are_flagged(scale, flagged):
    x, y = few()
    x = x / x.max() * scale
    assert ("dark" in attack_images(small(), FGSM(), x, y, eps=0.001).flags) == flagged


@pytest.fixture
def asked(monkeypatch, tmp_path):
    def ask(has, ratio, name="it", **options):
        monkeypatch.setattr("robbench.evaluation.precision.has_bfloat16_instructions", lambda: has)
        monkeypatch.setattr(
            "robbench.evaluation.precision._measure_seconds", lambda target, images, kind: ratio if kind else 1.0
        )
        heard, (x, y) = Listening(), few()
        options = {"gradients": "bfloat16", "results": tmp_path, "name": name, **options}
        return evaluate(small(), [FGSM()], x=x, y=y, eps=0.05, reporter=heard, **options), heard.notes

    return ask


@pytest.mark.parametrize(("has", "ratio"), [(False, 0.5), (True, 2.1), (None, 12.0)])
def test_bfloat16_that_only_costs_gives_the_float32_run(asked, has, ratio):
    found, notes = asked(has, ratio)
    assert "bfloat16" in notes[0] and "float32" in notes[0]
    assert found.overrides.get("gradients") is None and "gradients" not in found.identity
    assert found.run_id == asked(has, ratio, gradients=None, name="it")[0].run_id
    x, y = few()
    assert "float32" in attack_images(small(), FGSM(), x, y, eps=0.05, gradients="bfloat16").flags["gradients"]


def test_what_a_small_model_loses_does_not_count(monkeypatch):
    monkeypatch.setattr("robbench.evaluation.precision.has_bfloat16_instructions", lambda: True)
    monkeypatch.setattr(
        "robbench.evaluation.precision._measure_seconds", lambda target, images, kind: 1e-3 * (9 if kind else 1)
    )
    x, y = few()
    assert "gradients" not in attack_images(small(), FGSM(), x, y, eps=0.05, gradients="bfloat16").flags


@pytest.mark.parametrize(("has", "ratio"), [(True, 1.9), (None, 0.3)])
def test_bfloat16_that_is_worth_it_stays(asked, has, ratio):
    found, notes = asked(has, ratio)
    assert found.overrides["gradients"] == "bfloat16" == found.identity["gradients"]
    assert not [n for n in notes if "without --gradients" in n]


def test_a_run_in_bfloat16_is_repeated_in_it_wherever(asked, tmp_path):
    found, _ = asked(True, 1.0)
    (place,) = (tmp_path / "custom/it").iterdir()
    asked(False, 1.0, name="other")  # from here on, the processor has none
    x, y = few()
    again = reproduce(place, small(), suite=[FGSM()], x=x, y=y)
    assert again.again.run_id == found.run_id


def test_a_gpu_and_a_run_without_bfloat16_are_not_asked(monkeypatch):
    monkeypatch.setattr("robbench.evaluation.precision.has_bfloat16_instructions", lambda: 1 / 0)
    target, options = type("T", (), {"device": torch.device("cuda")}), type("O", (), {"gradients": None})
    images = type("I", (), {"dtype": torch.float32, "y": np.zeros(1)})
    assert explain_bfloat16_cost(target, images, options) is None
    options.gradients = "bfloat16"
    assert explain_bfloat16_cost(target, images, options) is None
