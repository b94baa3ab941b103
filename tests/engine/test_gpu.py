"""What must hold on a GPU as well (pytest -m gpu)."""

import numpy as np
import pytest
import safetensors.torch
import torch

from robbench.core import rng
from robbench.evaluation.run import evaluate
from robbench.recheck.verify import verify
from robbench.results.store import RunStore

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_random_bits_are_those_of_the_cpu():
    sample, trial = torch.arange(100), torch.arange(100) % 3
    here = rng.bits((1, 2), sample, trial, 5, 101)
    there = rng.bits((1, 2), sample.cuda(), trial.cuda(), 5, 101)
    assert torch.equal(here, there.cpu())
    assert torch.equal(
        rng.uniform((1, 2), sample, trial, 5, 101), rng.uniform((1, 2), sample.cuda(), trial.cuda(), 5, 101).cpu()
    )


@pytest.mark.parametrize("model", ["digits/natural", "digits/at", "digits/ls095_sigma03"])
def test_verdicts_agree_with_the_cpu(model, tmp_path):
    results = {d: evaluate(model, "whitebox", samples=200, device=d, results=tmp_path / d) for d in ("cpu", "cuda")}
    assert results["cpu"].run_id == results["cuda"].run_id, "the device is not part of the identity"
    for cpu, gpu in zip(results["cpu"].attacks, results["cuda"].attacks, strict=True):
        assert abs(cpu.robust_accuracy.value - gpu.robust_accuracy.value) <= 0.02, cpu.name
    assert abs(results["cpu"].robust_accuracy.value - results["cuda"].robust_accuracy.value) <= 0.01


@pytest.mark.parametrize("model", ["digits/at", "digits/ls095_sigma03"])
def test_gradients_in_bfloat16_find_what_float32_finds(model, tmp_path):
    full, coarse = (
        evaluate(model, "whitebox", device="cuda", gradients=g, results=tmp_path / str(g), save_adversarials=True)
        for g in (None, "bfloat16")
    )
    for a, b in zip(full.attacks, coarse.attacks, strict=True):
        assert abs(a.robust_accuracy.value - b.robust_accuracy.value) <= 0.02, a.name
    found = verify(
        tmp_path / "bfloat16" / "digits" / model.split("/")[1] / f"whitebox@{coarse.run_id[:8]}", device="cuda"
    )
    assert not found.refuted


def test_float32_flips_between_widths_are_few(tmp_path):
    robust = []
    for lanes in (64, 256, 1024):
        result = evaluate("digits/at", "whitebox", device="cuda", lanes=lanes, results=tmp_path / str(lanes))
        store = RunStore(tmp_path / str(lanes), "digits", "at", "whitebox", result.identity, standard=True)
        rows = store.open()
        robust.append((rows.sort_values(["sample", "attack"])["status"] == "robust").to_numpy())
    flips = [int((robust[0] != other).sum()) for other in robust[1:]]
    print(f"float32 verdict flips against 64 lanes, of {len(robust[0])} records: {flips}")
    assert np.max(flips) <= 0.005 * len(robust[0])


CARD = """version = 1
title = "Test"
dataset = "digits"
architecture = { name = "digits_convnet" }

[recipe]
iterations = 60
batch_size = 32
optimizer = "OPTIMIZER"
lr = 0.01
schedule = "cosine"
alpha = 0.5
beta = 0.1
sigma = "0.1"
augment = "crop"
ema = 0.9

[recipe.adversary]
eps = "0.1"
step_size = "0.05"
steps = 2
"""


def steps(optimizer, graph, precision="float32"):
    from robbench.data.sets import load
    from robbench.models.architectures import build
    from robbench.models.schema import parse_card
    from robbench.training.draws import Draws
    from robbench.training.step import Step

    recipe = parse_card(CARD.replace("OPTIMIZER", optimizer), "card").recipe
    torch.manual_seed(0)
    module = build("digits_convnet", {}, 10, (1, 8, 8)).cuda().to(memory_format=torch.channels_last).train()
    step = Step(module, recipe, Draws(load("digits", "train"), recipe, torch.device("cuda")), precision=precision)
    if not graph:
        step.graph = None
    losses = [float(step(i, recipe.lr)) for i in range(60)]
    return losses, {k: v.clone() for k, v in module.state_dict().items()}, step


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_captured_iteration_trains_as_a_plain_one(optimizer):
    losses, weights, step = steps(optimizer, graph=True)
    assert step.graph.captured is not None
    plain_losses, plain, _ = steps(optimizer, graph=False)
    assert losses == pytest.approx(plain_losses, rel=1e-3)
    for name, value in weights.items():
        assert torch.allclose(value, plain[name], atol=1e-3), name
    with step.use_average(60):
        average = {k: v.clone() for k, v in step.module.state_dict().items()}
    assert any(not torch.equal(average[k], weights[k]) for k in weights)


def test_bfloat16_training_learns_with_float32_weights():
    losses, weights, _ = steps("adam", graph=True, precision="bfloat16")
    assert losses[-1] < losses[0]
    assert all(v.dtype == torch.float32 for v in weights.values())


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_resuming_on_a_gpu_goes_on_with_the_learning_rate(tmp_path, stop):
    from robbench.models.card import Registry
    from robbench.training.options import Options
    from robbench.training.train import train

    for name in ("whole", "parts"):
        (tmp_path / name / "digits").mkdir(parents=True)
        (tmp_path / name / "digits/m.toml").write_text(CARD.replace("OPTIMIZER", "adam"))
    whole = train(Registry([tmp_path / "whole"]).find("m"), Options(runs=tmp_path / "a", device="cuda"))
    for _ in range(stop):
        train(Registry([tmp_path / "parts"]).find("m"), Options(runs=tmp_path / "b", device="cuda", time_limit=1e-9))
    parts = train(Registry([tmp_path / "parts"]).find("m"), Options(runs=tmp_path / "b", device="cuda"))
    assert whole.table["iterations"] == parts.table["iterations"] == 60
    a, b = (safetensors.torch.load_file(tmp_path / n / "weights/digits/m.safetensors") for n in ("whole", "parts"))
    assert all(torch.allclose(a[key].float(), b[key].float(), atol=5e-3) for key in a)
