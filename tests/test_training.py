"""Recipes by hand, and a loop that ends with the same weights however often it is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from robbench import rng
from robbench.data import load
from robbench.errors import CardError, ModelError
from robbench.models.architectures import build
from robbench.models.card import Adversary, Recipe, Registry
from robbench.models.load import load_model
from robbench.training import recipe as terms
from robbench.training.train import train

CARD = """version = 1
title = "Test"
dataset = "digits"

[architecture]
name = "digits_convnet"
args = { width = 4, hidden = 8 }

[recipe]
iterations = 40
batch_size = 32
optimizer = "adam"
lr = 0.01
seed = 3
"""
ADVERSARY = '\n[recipe.adversary]\neps = "0.1"\nstep_size = "0.05"\nsteps = 2\n'


def recipe(**given):
    return Recipe(iterations=100, batch_size=4, optimizer="sgd", lr=0.1, **given)


def put(root, text=CARD, name="m"):
    path = root / "digits" / f"{name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return Registry([root]).find(f"digits/{name}")


def test_label_smoothing_by_hand():
    smooth = terms.smooth_labels(torch.tensor([1, 0]), 0.9, 3)
    assert smooth.tolist() == [pytest.approx([0.3, 0.4, 0.3]), pytest.approx([0.4, 0.3, 0.3])]
    assert terms.smooth_labels(torch.tensor([1]), 0.0, 3).tolist() == [[0, 1, 0]]


def test_squeezing_by_hand():
    assert float(terms.squeeze(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))) == pytest.approx(5 / 2)


@pytest.mark.parametrize(("beta", "stuck"), [(6.0, False), (7.5, True)])
def test_squeezing_collapses_where_table_5_does(beta, stuck):
    """All logits zero is a minimum exactly from β = 0.949 √N on: 6.7 for N = 50, between the paper's 5 and 10."""
    y = torch.arange(50) % 10
    towards_labels = 1e-3 * F.one_hot(y, 10).float()
    at_zero = float(terms.objective(torch.zeros(50, 10), y, recipe(beta=beta)))
    near = float(terms.objective(towards_labels - towards_labels.mean(1, keepdim=True), y, recipe(beta=beta)))
    assert (near > at_zero) is stuck


def test_objective_by_hand():
    z, y = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0]]), torch.tensor([0, 1])
    log_p = z.log_softmax(1)
    assert torch.equal(terms.objective(z, y, recipe()), F.cross_entropy(z, y))
    warm = torch.tensor([[0.7, 0.15, 0.15], [0.15, 0.7, 0.15]])
    expected = -(warm * log_p).sum(1).mean() + 0.5 * torch.tensor(6.0).sqrt() / 2
    assert float(terms.objective(z, y, recipe(alpha=0.45, beta=0.5))) == pytest.approx(float(expected))


def test_noise_has_its_sigma_and_depends_on_sample_and_iteration_alone():
    x, sample = torch.zeros(200, 1, 8, 8), torch.arange(200)
    noisy = terms.add_noise(x, 0.3, sample, 7, (1, 2))
    assert float(noisy.std()) == pytest.approx(0.3, rel=0.03)
    assert float(noisy.min()) < 0, "not clipped"
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(terms.add_noise(x, 0.3, sample[order], 7, (1, 2)), noisy[order])
    assert not torch.equal(terms.add_noise(x, 0.3, sample, 8, (1, 2)), noisy)


def test_augmentation_shifts_and_flips():
    x = torch.arange(1.0, 65).view(1, 1, 8, 8).expand(300, 1, 8, 8)
    moved = terms.augment(x, "crop_flip", torch.arange(300), 0, (1, 2))
    padded = F.pad(x[0, 0], (1, 1, 1, 1))
    windows = [padded[i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    allowed = {tuple(w.flatten().tolist()) for w in windows}
    flipped = {tuple(w.flip(1).flatten().tolist()) for w in windows}
    seen = [tuple(m.flatten().tolist()) for m in moved]
    assert set(seen) == allowed | flipped
    assert 100 < sum(s in flipped for s in seen) < 200
    assert set(map(tuple, terms.augment(x, "crop", torch.arange(300), 0, (1, 2)).flatten(1).tolist())) == allowed


def test_schedules_by_hand():
    assert terms.learning_rate(recipe(), 99) == 0.1
    assert terms.learning_rate(recipe(schedule="cosine"), 50) == pytest.approx(0.05)
    steps = recipe(schedule="steps", milestones=(0.5, 0.75), gamma=0.1)
    assert [terms.learning_rate(steps, i) for i in (49, 50, 75)] == pytest.approx([0.1, 0.01, 0.001])


def test_the_inner_attack_is_the_cards():
    attack = terms.inner_attack(
        Adversary(eps=Fraction(3, 10), step_size=Fraction(1, 100), steps=40, random_start=False, loss="margin")
    )
    assert (attack.steps, attack.step_size, attack.random_start, attack.objective) == (40, 0.01, False, "margin")


def test_without_terms_the_loop_is_plain_training(tmp_path):
    entry = put(tmp_path)
    train(entry, runs=tmp_path / "runs")
    data = load("digits", "train")
    torch.manual_seed(3)
    module = build("digits_convnet", {"width": 4, "hidden": 8}, 10, (1, 8, 8)).to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    key, n = rng.make_key(3, "train-order"), len(data)
    position = torch.arange(n)
    for i in range(40):
        epoch, place = divmod(i, n // 32)
        order = rng.bits(key, position, torch.full_like(position, epoch), 0, 1).squeeze(1).argsort(stable=True)
        batch = order[place * 32 : place * 32 + 32]
        x = (torch.from_numpy(data.x)[batch].float() / 16).contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        F.cross_entropy(module(x), torch.from_numpy(data.y)[batch]).backward()
        optimizer.step()
    ours = load_model(Registry([tmp_path]).find("m")).module.state_dict()
    for name, value in module.state_dict().items():
        assert torch.equal(ours[name], value.half().float()), name


def test_every_epoch_sees_every_image_once(tmp_path):
    from robbench.training.train import _Training

    entry = put(tmp_path)
    run = _Training(entry, entry.card.recipe, load("digits", "train"), torch.device("cpu"), tmp_path / "runs")
    seen = []
    for _ in range(2 * (898 // 32)):
        seen.append(run.batch())
        run.iteration += 1
    first, second = torch.cat(seen[:28]), torch.cat(seen[28:])
    assert len(first.unique()) == len(second.unique()) == 28 * 32
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "text", [CARD, CARD + ADVERSARY, CARD.replace("lr =", 'alpha = 0.5\nbeta = 0.1\nsigma = "0.2"\nlr =')]
)
def test_stopping_and_going_on_ends_with_the_same_weights(tmp_path, text):
    whole, parts = put(tmp_path / "a", text), put(tmp_path / "b", text)
    train(whole, runs=tmp_path / "runs-a")
    for _ in range(200):
        done = train(parts, runs=tmp_path / "runs-b", time_limit=1e-9)  # one iteration a call
        if done["iterations"] == 40:
            break
        assert Registry([tmp_path / "b"]).find("m").card.trained.iterations == done["iterations"]
    a, b = (Registry([tmp_path / d]).find("m").card for d in "ab")
    assert a.weights.sha256 == b.weights.sha256
    assert a.trained.iterations == b.trained.iterations == 40
    lines = [json.loads(line) for line in (tmp_path / "runs-b/digits/m/log.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == list(range(1, 41))


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from robbench.models.card import Registry
from robbench.training import train as t
t._CHECKPOINT_SECONDS = 0.0
root = Path(sys.argv[1])
t.train(Registry([root]).find("m"), runs=root / "runs", report=lambda p: print(p.iteration, flush=True))
"""


def test_sigkill_in_the_middle_ends_with_the_same_weights(tmp_path):
    put(tmp_path / "a"), put(tmp_path / "b")
    train(Registry([tmp_path / "a"]).find("m"), runs=tmp_path / "runs-a")
    for stop in (5, 23, None):
        with subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "b")], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            first = None
            for line in child.stdout:
                first = first or int(line)
                if stop is not None and int(line) >= stop:
                    child.send_signal(signal.SIGKILL)
                    break
            child.wait()
        if stop == 23:
            assert first is not None and first >= 5, "the second call went on where the first was killed"
    a, b = (Registry([tmp_path / d]).find("m").card for d in "ab")
    assert a.weights.sha256 == b.weights.sha256


def test_a_changed_recipe_does_not_continue_an_old_run(tmp_path):
    train(put(tmp_path), runs=tmp_path / "runs", time_limit=1e-9)
    changed = put(tmp_path, CARD.replace("0.01", "0.02"))
    with pytest.raises(ModelError, match="--restart"):
        train(changed, runs=tmp_path / "runs")
    assert train(changed, runs=tmp_path / "runs", restart=True)["iterations"] == 40


def test_what_cannot_be_trained_says_why(tmp_path):
    with pytest.raises(CardError, match="no recipe"):
        train(Registry.default().find("cifar10/natural_resnet18"), runs=tmp_path)
    with pytest.raises(ModelError, match="batch_size 1000 given; the training set has 898"):
        train(put(tmp_path, CARD.replace("32", "1000")), runs=tmp_path / "runs")
    diverging = CARD.replace('"adam"', '"sgd"').replace("0.01", "1e30")
    with pytest.raises(ModelError, match="diverges"):
        train(put(tmp_path, diverging, "d"), runs=tmp_path / "runs")
    assert Registry([tmp_path]).find("d").card.weights is None


def test_training_on_digits_learns(tmp_path):
    entry = put(
        tmp_path, CARD.replace("iterations = 40", "iterations = 300").replace("= 4, hidden = 8", "= 16, hidden = 32")
    )
    begin = time.monotonic()
    train(entry, runs=tmp_path / "runs")
    loaded, data = load_model(Registry([tmp_path]).find("m")), load("digits")
    logits = loaded.module(torch.from_numpy(data.x).float() / data.scale)
    assert float((logits.argmax(1) == torch.from_numpy(data.y)).float().mean()) > 0.85
    assert time.monotonic() - begin < 60


def test_committed_weights_match_their_cards():
    entries = [e for e in Registry.default().entries() if e.card.weights and e.card.weights.path]
    assert {"natural", "at", "ls095_sigma30", "lsq2_sigma30"} <= {e.name for e in entries if e.dataset == "digits"}
    for entry in entries:
        loaded = load_model(entry)
        data_free = torch.zeros(1, *loaded.in_shape)
        assert loaded.module(data_free).shape == (1, loaded.num_classes)
    folder = entries[0].root / "weights"
    files = [p for p in Path(folder).rglob("*") if p.is_file()]
    assert sum(os.path.getsize(p) for p in files) < 60e6
    assert np.all([p.suffix == ".safetensors" for p in files])
