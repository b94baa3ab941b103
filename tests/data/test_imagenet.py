"""ImageNet's validation set in its usual layouts, from a synthetic folder with the names of the real one."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from robbench.attacks import FGSM
from robbench.core.errors import DataError, ModelError
from robbench.data.imagenet import find_imagenet, list_imagenet
from robbench.evaluation.run import evaluate
from robbench.models.sources import parse_source
from support.commands import run

COLOURS = np.random.default_rng(0).permutation(1000)


def name(k):
    return f"ILSVRC2012_val_{k + 1:08}.JPEG"


def image(k):
    out = io.BytesIO()
    Image.new("RGB", (12, 9), (int(COLOURS[k] % 255), 40, 90)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """1000 folders with one image each. The official order is not that of the folders."""
    root = tmp_path_factory.mktemp("data")
    for k in range(1000):
        place = root / "imagenet" / "val" / f"n{10_000_000 + COLOURS[k]:08}"
        place.mkdir(parents=True)
        (place / name(k)).write_bytes(image(k))
    return root


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    root = tmp_path_factory.mktemp("flat")
    (root / "imagenet" / "val").mkdir(parents=True)
    for k in range(5):
        (root / "imagenet" / "val" / name(k)).write_bytes(image(k))
    (root / "imagenet" / "val.txt").write_text("".join(f"{name(k)} {COLOURS[k]}\n" for k in range(5)))
    return root


def test_the_order_is_official_in_both_layouts(folders, flat):
    for root, n in ((folders, 1000), (flat, 5)):
        found = list_imagenet(find_imagenet(root))
        assert [path.rpartition("/")[2] for path in found.items.names] == [name(k) for k in range(n)]
        assert found.y.tolist() == COLOURS[:n].tolist() and found.num_classes == 1000


def make_net():
    """A small network of 1000 classes that tells the first colours apart."""
    torch.manual_seed(0)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000)).eval()


def test_a_module_is_measured_at_the_usual_size_and_radius(flat):
    result = evaluate(make_net(), [FGSM()], dataset="imagenet", data_dir=flat, samples=4)
    assert (result.dataset, result.threat.norm, result.threat.eps) == ("imagenet", "Linf", "4/255")
    assert result.selection == "first 4 of 5"
    assert result.identity["images"] == {"resize": 256, "crop": 224, "channels": 3, "classes": None}
    other = evaluate(make_net(), [FGSM()], dataset="imagenet", data_dir=flat, norm="L2", eps="3")
    assert (other.threat.norm, other.threat.eps) == ("L2", "3")
    with pytest.raises(ModelError, match="10 classes; the data set has 1000"):
        net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)).eval()
        evaluate(net, [FGSM()], dataset="imagenet", data_dir=flat)


def test_the_command_line_knows_imagenet(flat, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n"
        "def net():\n"
        "    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 1000)).eval()\n"
    )
    how = ("-m", "mine:net", "--dataset", "imagenet", "--data-dir", flat, "--resize", 32, "--crop", 28, "-s", "quick")
    run("eval", *how, cwd=tmp_path)
    assert [*tmp_path.glob("results/imagenet/mine-net/quick@*/result.json")]
    source = parse_source("robustbench:imagenet/Linf/Salman2020Do_R50")
    assert source.test_set(None) == "imagenet"


def test_wrong_folders_are_a_sentence(tmp_path, flat):
    with pytest.raises(DataError, match=r"not in .*put them into one of imagenet/val"):
        find_imagenet(tmp_path)
    place = tmp_path / "imagenet"
    (place / "n00000001").mkdir(parents=True)
    with pytest.raises(DataError, match="1 folders of classes; expected: 1000"):
        list_imagenet(find_imagenet(tmp_path))
    (place / "n00000001").rmdir()
    (place / name(0)).write_bytes(b"")
    with pytest.raises(DataError, match=r"no val.txt; expected"):
        list_imagenet(find_imagenet(tmp_path))
    for text, words in ((f"{name(1)} 3", "no label of"), (f"{name(0)} 1000", "label 1000 given"), ("x", "not a list")):
        (place / "val.txt").write_text(text)
        with pytest.raises(DataError, match=words):
            list_imagenet(find_imagenet(tmp_path))
