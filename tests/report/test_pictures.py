"""Adversarial examples as PNG files: the same pixels up to 8 bits, one file each, and a sheet."""

import numpy as np
import pytest
from PIL import Image

import robbench
from robbench.attacks import FGSM
from robbench.core.errors import ResultError
from robbench.evaluation.run import evaluate
from robbench.report.pictures import SHEET, write_pictures
from robbench.results.adversarials import FILE, Points, pack, read
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


def forge(place, change):
    """Write other points with digests that fit them."""
    path = place / FILE
    kept = read(path)
    (group,) = kept.points
    about = {"sample": group.sample.copy(), "attack": group.attack.astype("U99"), "x": group.x.copy()} | change(group)
    path.write_bytes(pack([Points.of(kept.run_id, **about)], kept.run_id, sorted(set(about["attack"].tolist()))))
    assert not read(path).altered


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda g: {"x": g.x * np.nan}, "pixels outside"),
        (lambda g: {"x": g.x + 1}, "pixels outside"),
        (lambda g: {"x": -g.x}, "pixels outside"),
        (lambda g: {"x": g.x.reshape(len(g), -1)}, "shapes"),
        (lambda g: {"x": g.x[:, 0, 0, 0]}, "shapes"),
        (lambda g: {"x": g.x[..., None]}, "shapes"),
        (lambda g: {"x": g.x[..., :0]}, "shapes"),
        (lambda g: {"x": np.repeat(g.x, 2, 1)}, "2 channels"),
        (lambda g: {"sample": g.sample + 10_000}, "no break of the records"),
        (lambda g: {"sample": -1 - g.sample}, "no break of the records"),
        (lambda g: {"sample": np.full_like(g.sample, g.sample[0])}, "two points of one break"),
        (lambda g: {"attack": np.full(len(g), "../../x")}, "no break of the records"),
        (lambda g: {k: np.concatenate([v] * 400) for k, v in vars(g).items() if k != "sha256"}, "two points"),
    ],
)
def test_hostile_points_write_nothing(place, tmp_path, change, problem):
    forge(place, change)
    with pytest.raises(ResultError, match=problem):
        write_pictures(place, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_points_of_two_formats_have_one_shape(place, tmp_path):
    kept = read(place / FILE)
    (group,) = kept.points
    parts = [
        Points.of(kept.run_id, group.sample[at], group.attack[at], x)
        for at, x in ((slice(0, 2), group.x[:2].astype(np.float64)), (slice(2, 4), group.x[2:4, :, :3]))
    ]
    (place / FILE).write_bytes(pack(parts, kept.run_id, ["FGSM"]))
    with pytest.raises(ResultError, match="shapes"):
        write_pictures(place, tmp_path / "out")


def test_attacks_with_names_alike_have_files_of_their_own(tmp_path):
    x, y = robbench.load_data("digits", 8)
    suite = tmp_path / "s.toml"
    text = "version = 1\nmode = 'full'\n"
    for name in ("a/b", "a b", "A b", "ä" * 100):
        text += f"[[attack]]\nname = '{name}'\nkind = 'fgsm'\nobjective = 'ce'\n"
    suite.write_text(text)
    net = robbench.load_model("digits/natural")
    evaluate(net, str(suite), x=x, y=y, norm="Linf", eps=0.2, results=tmp_path, name="net", save_adversarials=True)
    (place,) = tmp_path.glob("custom/net/*")
    count, _ = write_pictures(place, tmp_path / "out")
    assert count == sum(len(g) for g in read(place / FILE).points) > 8
    assert len([*(tmp_path / "out").iterdir()]) == count + 1


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
