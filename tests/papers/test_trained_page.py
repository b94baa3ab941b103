"""The page of trained models: whose results stand in its rows."""

import shutil

from robbench.models.card import Registry
from robbench.papers.trained import render_trained_page
from support.papers import put, result


def test_the_same_weights_under_another_name_or_on_other_images_are_another_row(tmp_path, repo):
    root, entry = tmp_path / "results", Registry.default().find("digits/natural")
    shutil.copytree(repo / "results/digits/natural/whitebox", root / "digits/natural/whitebox")
    before = render_trained_page([entry], root)
    identity = {"weights": entry.card.weights.sha256}
    put(root, result("mine", "whitebox", 3, {"PGD-20-xent": 3}, 4, dataset="photos", identity=identity))
    assert render_trained_page([entry], root) == before and "/ –" in before
    shutil.rmtree(root / "digits")
    assert "not measured" in render_trained_page([entry], root)
