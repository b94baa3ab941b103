"""Adversarial examples as PNG files: the same pixels up to 8 bits, one file each, and a sheet."""

import numpy as np
import pytest
from PIL import Image

import robbench
from robbench.attacks import FGSM
from robbench.core.errors import ResultError
from robbench.evaluation.run import evaluate
from robbench.report.pictures import SHEET, write_pictures
from robbench.results.adversarials import FILE, read
from support.commands import run


@pytest.fixture
def place(tmp_path):
    x, y = robbench.load_data("digits", 30)
    net = robbench.load_model("digits/natural")
    evaluate(net, [FGSM()], x=x, y=y, eps=0.2, results=tmp_path, name="net", save_adversarials=True)
    (found,) = tmp_path.glob("custom/net/*")
    return found


def test_every_stored_point_is_a_picture(place, tmp_path):
    said = run("export", place, "--pictures", tmp_path / "out").stdout
    (group,) = read(place / FILE).points
    assert f"{len(group.sample)} adversarial examples and {SHEET} written" in said and len(group.sample) > 3
    for sample, attack, x in zip(group.sample, group.attack, group.x, strict=True):
        levels = np.asarray(Image.open(tmp_path / "out" / f"{sample:06}-{attack}.png"))
        assert np.abs(levels / 255 - x[0]).max() <= 0.5 / 255 + 1e-6
    sheet = np.asarray(Image.open(tmp_path / "out" / SHEET))
    first = np.rint(group.x[np.argmin(group.sample)][0].astype(np.float64) * 255).astype(np.uint8)
    assert np.array_equal(sheet[2:66:8, 2:66:8], first), "images of 8 pixels are enlarged to 64"
    assert len([*(tmp_path / "out").iterdir()]) == len(group.sample) + 1


def test_points_on_levels_of_8_bits_are_not_rounded(tmp_path):
    x, y = robbench.load_data("digits", 12)
    net = robbench.load_model("digits/natural")
    for levels, is_rounded in ((255, False), (16, True), (None, True)):
        kept = {"results": tmp_path / str(levels), "name": "net", "save_adversarials": True, "levels": levels}
        evaluate(net, [FGSM()], x=x, y=y, eps=0.2, **kept)
        (found,) = (tmp_path / str(levels)).glob("custom/net/*")
        count, differing = write_pictures(found, tmp_path / f"out{levels}")
        assert count > 3 and (differing > 0) == is_rounded, levels


def test_a_result_without_points_or_with_others_is_refused(place, tmp_path):
    kept = (place / FILE).read_bytes()
    (place / FILE).write_bytes(kept[:-8] + bytes(8))
    with pytest.raises(ResultError):
        write_pictures(place, tmp_path / "out")
    (place / FILE).unlink()
    with pytest.raises(ResultError, match="Repeat the run with --save-adversarials"):
        write_pictures(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()
