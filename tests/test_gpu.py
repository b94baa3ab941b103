"""What must hold on a GPU as well (pytest -m gpu)."""

import numpy as np
import pytest
import torch

from robbench import evaluate, rng
from robbench.store import RunStore

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
    results = {d: evaluate(model, "whitebox", device=d, results=tmp_path / d) for d in ("cpu", "cuda")}
    assert results["cpu"].run_id == results["cuda"].run_id, "the device is not part of the identity"
    for cpu, gpu in zip(results["cpu"].attacks, results["cuda"].attacks, strict=True):
        assert abs(cpu.robust_accuracy.value - gpu.robust_accuracy.value) <= 0.02, cpu.name
    assert abs(results["cpu"].robust_accuracy.value - results["cuda"].robust_accuracy.value) <= 0.01


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
