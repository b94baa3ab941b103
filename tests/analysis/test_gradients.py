"""Quantities of loss gradients have closed forms, and stored gradients are those of the model."""

import json

import numpy as np
import pytest
import torch

from robbench.analysis import measure_gradients as measure
from robbench.analysis.gradients import (
    align,
    clip_gradients,
    compute_contrasts,
    find_nearest,
    measure_roughness,
    measure_sparsity,
)
from robbench.analysis.gradients_record import gradients_folder, read_gradients, read_gradients_files, write_gradients
from robbench.analysis.measure_gradients import measure_gradients
from robbench.core.errors import ModelError, ResultError
from robbench.core.threat import Ball
from robbench.evaluation.inputs import resolve
from robbench.evaluation.options import Options
from robbench.models.spec import ModelSpec
from robbench.results.schema import seal

SPEC = ModelSpec("digits/at")
N = 14  # holds two images of some classes


def test_alignment_and_contrasts_by_hand():
    x, y = np.array([[1.0, 0], [3, 0], [0, 2]]), np.array([0, 0, 1])
    contrasts = compute_contrasts(x, y, 2)
    assert contrasts.tolist() == [[2, -2], [-2, 2]]
    assert align(np.array([[1.0, -1], [1, 0], [1, 1]]), contrasts[[0, 0, 0]]) == pytest.approx([1, 0.5**0.5, 0])


def test_roughness_of_noise_constant_and_chessboard():
    board = np.indices((8, 8)).sum(0) % 2 * 2.0 - 1
    noise = np.random.default_rng(0).normal(size=(200, 1, 8, 8))
    assert measure_roughness(np.stack([np.ones((1, 8, 8)), board[None]])) == pytest.approx([0, 2])
    assert measure_roughness(5 * noise).mean() == pytest.approx(1, abs=0.02)
    assert measure_roughness(np.array([[[[1.0, 2], [3, 4]]]])) == pytest.approx([10 / 8 / 7.5])


def test_sparsity_of_one_pixel_and_of_all():
    one, most, all_alike = np.eye(4)[0], np.array([3.0, 4, 0, 0]), np.ones(4)
    assert measure_sparsity(np.stack([one, -all_alike, most])) == pytest.approx([1, 0, 2 - 7 / 5])


def test_gradients_are_clipped_at_three_sigma():
    gradient = np.concatenate([np.zeros(98), [50.0, -50]])[None]  # sigma is 7.07
    assert clip_gradients(gradient)[0, 97:].tolist() == [127, 254, 0]
    assert clip_gradients(np.array([[-1.0, 0, 1]])).tolist() == [[75, 127, 179]]  # 127 / 3 / sqrt(2 / 3) = 51.8
    assert clip_gradients(np.zeros((1, 3))).tolist() == [[127, 127, 127]]


def test_the_nearest_row_is_that_of_a_search_by_hand(monkeypatch):
    random = np.random.default_rng(0)
    x, known = random.normal(size=(7, 5)), random.normal(size=(11, 5))
    distances = np.linalg.norm(x[:, None] - known[None], axis=2)
    monkeypatch.setattr("robbench.analysis.gradients._BYTES", 8 * 11 * 3)  # three rows at once
    at, distance = find_nearest(x, known)
    assert at.tolist() == distances.argmin(1).tolist()
    assert distance == pytest.approx(distances.min(1))


def test_gradients_have_the_direction_of_the_cross_entropy_and_survive_sure_models():
    target, images = resolve(SPEC, Options())
    x, y = images.x(np.arange(N)), images.y[:N]
    found = measure._compute_gradients(target, x, y, 5).reshape(N, -1)
    leaf = x.clone().requires_grad_()
    torch.nn.functional.cross_entropy(target.module(leaf), y, reduction="sum").backward()
    assert align(found, leaf.grad.flatten(1).double().numpy()) == pytest.approx(np.ones(N), abs=1e-4)
    sure = torch.nn.Sequential(target.module, torch.nn.Linear(10, 10, bias=False))
    sure[1].weight.data = 1e4 * torch.eye(10)
    leaf.grad = None
    torch.nn.functional.cross_entropy(sure(leaf), y, reduction="sum").backward()
    assert (leaf.grad.flatten(1) == 0).all(1).any()

    class Sure:
        module, device = sure, target.device

    assert np.abs(measure._compute_gradients(Sure(), x, y, 5)).reshape(N, -1).max(1).min() > 0
    sure[1].weight.data.zero_()
    with pytest.raises(ModelError, match="is 0, NaN or infinite"):
        measure._compute_gradients(Sure(), x, y, 5)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    root = tmp_path_factory.mktemp("gradients")
    measure_gradients(SPEC, Options(samples=N), root)
    return root


def test_stored_pictures_and_answers_are_those_of_the_model(stored):
    file, (rows, pictures) = read_gradients(gradients_folder(stored, "digits", "at"))
    target, images = resolve(SPEC, Options())
    x, y = images.x(np.arange(N)), images.y[:N]
    first = [y.tolist().index(k) for k in sorted(set(y.tolist()))]
    assert file.shown == images.index[first].tolist()
    assert pictures[:, 0].tolist() == (255 * x[first]).round().byte().tolist()
    assert pictures[:, 1].tolist() == clip_gradients(measure._compute_gradients(target, x, y, N)[first]).tolist()
    for i, norm in enumerate(("L2", "Linf")):
        ball = Ball(norm, {"L2": 2.4, "Linf": 0.5}[norm])
        moved = measure._perturb(target, x, y, images.index[:N], ball, N)
        assert ball.contains(x, moved).all()
        assert pictures[:, 2 + i].tolist() == (255 * moved[first]).round().byte().tolist()
        with torch.no_grad():
            assert rows[norm].tolist() == target.module(moved).argmax(1).tolist()
    assert file.judge.value == (rows["near_0"] == rows["label"]).mean()
    # The way ends at the L2 example.
    train, moved = measure.load("digits", "train"), measure._perturb(target, x, y, images.index[:N], Ball("L2", 2.4), N)
    at, distance = find_nearest(moved.flatten(1).double().numpy(), train.x.reshape(len(train), -1) / train.scale)
    assert rows["near_5"].tolist() == train.y[at].tolist()
    assert rows["distance_5"].to_numpy() == pytest.approx(distance)


def test_a_measurement_is_known_and_a_smaller_one_is_part_of_it(stored):
    notes = []
    measure_gradients(SPEC, Options(samples=5), stored, note=notes.append)
    assert "known since" in notes[-1]


@pytest.mark.parametrize("name", ["gradients.parquet", "pictures.parquet"])
def test_changed_files_are_refused(stored, tmp_path, name):
    folder = gradients_folder(tmp_path, "digits", "at")
    folder.mkdir(parents=True)
    source = gradients_folder(stored, "digits", "at")
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / name).write_bytes((source / name).read_bytes() + b" ")
    assert "not as it was written" in str(read_gradients_files(tmp_path)[1][0])
    (folder / name).write_bytes((source / name).read_bytes())
    fields = json.loads((folder / "gradients.json").read_text())
    del fields["sha256"]
    rest = fields["shown"][:-1]
    for change, message in (
        ({"means": fields["means"] | {"alignment": 0.9}}, "means.alignment is 0.9"),
        ({"shown": rest}, f"does not hold {len(rest)} images of 64 pixels with 4 pictures each"),
    ):
        (folder / "gradients.json").write_bytes(seal(fields | change))
        with pytest.raises(ResultError, match=message):
            read_gradients(folder)


def test_a_number_that_is_not_finite_is_refused(stored, tmp_path):
    file, (rows, pictures) = read_gradients(gradients_folder(stored, "digits", "at"))
    rows = rows.assign(alignment=rows["alignment"].where(rows.index > 0, np.inf))
    write_gradients(tmp_path, file, rows, pictures)
    with pytest.raises(ResultError, match="not finite"):
        read_gradients(tmp_path)


def test_own_images_have_no_training_images():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    spec = ModelSpec(model, x=torch.rand(4, 1, 8, 8), y=torch.arange(4))
    with pytest.raises(ModelError, match="allowed: a data set with training images"):
        measure_gradients(spec, Options(), None)
