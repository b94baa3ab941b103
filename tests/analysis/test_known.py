"""Stored measurements stay those of the present code: no identity has changed, and nothing is computed again."""

from __future__ import annotations

import shutil

import pytest

from robbench.analysis.measure import measure_logits
from robbench.analysis.measure_gradients import measure_gradients
from robbench.analysis.measure_manifolds import measure_manifolds
from robbench.analysis.measure_steps import measure_steps
from robbench.analysis.measure_training import measure_students, measure_training
from robbench.core.errors import ResultError
from robbench.evaluation.options import Options
from robbench.linear.measure import measure_linear
from robbench.models.spec import ModelSpec

MEASURE = {
    "logits": measure_logits,
    "gradients": measure_gradients,
    "manifolds": measure_manifolds,
    "steps": measure_steps,
    "training": measure_training,
    "students": measure_students,
}


@pytest.mark.parametrize("kind", ["linear", *MEASURE])
def test_a_stored_measurement_is_known(kind, repo, tmp_path):
    for name in {kind, "training"}:  # students are of the stored training
        shutil.copytree(repo / "results/digits/at" / name, tmp_path / "digits/at" / name)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file()}
    told = []
    if kind == "linear":
        file = measure_linear("digits/at", results=tmp_path, note=told.append)
    else:
        file = MEASURE[kind](ModelSpec("digits/at"), Options(device="cpu"), tmp_path, note=told.append)
    assert "known since" in told[-1] and "nothing to compute" in told[-1]
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file() and p in before}
    assert file.identity


@pytest.mark.parametrize("kind", ["logits", "gradients", "manifolds", "steps"])
def test_a_measurement_of_other_weights_is_refused(kind, repo, tmp_path):
    shutil.copytree(repo / "results/digits/natural" / kind, tmp_path / "digits/at" / kind)
    with pytest.raises(ResultError, match="weights"):
        MEASURE[kind](ModelSpec("digits/at"), Options(device="cpu"), tmp_path)
