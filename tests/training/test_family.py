"""Models that train together: each ends as if it had been trained alone."""

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from robbench.core.errors import CardError, ModelError
from robbench.data.sets import load
from robbench.models.architectures import build
from robbench.models.card import Recipe, Registry
from robbench.training import together
from robbench.training.draws import Draws
from robbench.training.missing import train_family
from robbench.training.options import Options
from robbench.training.step import Step
from robbench.training.together import Stack, can_stack
from robbench.training.train import train, train_together
from support.cards import SMALL
from support.commands import run

CARD = (
    SMALL
    + """[recipe]
iterations = 50
batch_size = 32
optimizer = "adam"
lr = 0.01
seed = 3
"""
)
MEMBERS = {
    "plain": CARD,
    "smooth": CARD.replace("lr = 0.01", 'lr = 0.003\nalpha = 0.95\nsigma = "0.3"'),
    "squeezed": CARD.replace("iterations = 50", 'iterations = 40\nbeta = 0.5\nsigma = "0.5"\nschedule = "cosine"'),
}
OTHERS = {
    "averaged": CARD.replace("seed = 3", "ema = 0.9\nseed = 3"),
    "other_seed": CARD.replace("seed = 3", "seed = 4"),
    "sgd": CARD.replace('"adam"', '"sgd"').replace("lr =", "momentum = 0.9\nweight_decay = 0.01\nlr ="),
    "robust": CARD + '\n[recipe.adversary]\neps = "0.1"\nstep_size = "0.05"\nsteps = 2\n',
}


@pytest.fixture(autouse=True)
def few_probes(monkeypatch):
    monkeypatch.setattr("robbench.training.run._PROBES", 1)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of all members, each trained by itself."""
    root = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robbench.training.run._PROBES", 1)
        for entry in put(root, MEMBERS | OTHERS):
            train(entry, Options(runs=root / "runs", precision="float64", device="cpu"))
    return root / "runs"


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 2, "new threads begin as before"
    torch.set_num_threads(before)


def put(root, cards):
    (root / "digits").mkdir(parents=True, exist_ok=True)
    for name, text in cards.items():
        (root / "digits" / f"{name}.toml").write_text(text)
    return [Registry([root]).find(f"digits/{name}") for name in cards]


def checkpoint(root, name):
    return torch.load(root / "digits" / name / "checkpoint.pt", weights_only=True)


def assert_equal_checkpoints(root, other, names, atol):
    for name in names:
        ours, alone = checkpoint(root, name), checkpoint(other, name)
        assert ours["iteration"] == alone["iteration"] and ours["identity"] == alone["identity"]
        for part in ("module", "average"):
            assert ours[part].keys() == alone[part].keys()
            for key, value in ours[part].items():
                assert torch.allclose(value, alone[part][key], rtol=0, atol=atol), (name, key)


def skip_nothing(entry, result):
    pass


@pytest.mark.whole
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("stacked", [False, True])
def test_every_member_equals_its_own_training(tmp_path, alone, monkeypatch, stacked):
    cards = MEMBERS | OTHERS
    seen = []
    if stacked:
        monkeypatch.setattr(together, "_is_stacked", lambda device: True)
        original = Stack.__init__
        monkeypatch.setattr(Stack, "__init__", lambda self, steps: (seen.append(len(steps)), original(self, steps))[1])
    finished = []
    options = Options(runs=tmp_path / "runs", precision="float64", device="cpu")
    train_together(
        put(tmp_path, cards), options, lambda entry, result: finished.append((entry.name, result.table["iterations"]))
    )
    assert finished[0] == ("squeezed", 40) and dict(finished) == dict.fromkeys(cards, 50) | {"squeezed": 40}
    assert_equal_checkpoints(tmp_path / "runs", alone, cards, 1e-9)
    # "robust" has an adversary and "other_seed" other batches; "squeezed" ends first.
    assert seen == ([5, 4] if stacked else [])
    for name in cards:
        sizes = [(root / "digits" / name / "checkpoint.pt").stat().st_size for root in (alone, tmp_path / "runs")]
        assert sizes[1] < 1.1 * sizes[0], "a checkpoint has the weights of one model"
        record = Registry([tmp_path]).find(f"digits/{name}").card
        assert record.trained.iterations == dict(finished)[name]
        assert record.weights.path == f"digits/{name}.safetensors"


def test_a_draw_is_shared_and_scaled_for_each(tmp_path, monkeypatch):
    drawn = []
    original = Draws.draw
    monkeypatch.setattr(Draws, "draw", lambda self, *args: (drawn.append(args[2]), original(self, *args))[1])
    train_together(put(tmp_path, MEMBERS), Options(runs=tmp_path / "runs", device="cpu"), skip_nothing)
    assert drawn == [True] * 40 + [True] * 10
    drawn.clear()
    train(put(tmp_path / "alone", {"plain": CARD})[0], Options(runs=tmp_path / "runs-alone", device="cpu"))
    assert drawn == [False] * 50, "no noise for a recipe without"


@pytest.mark.whole
@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("stacked", [False, True])
def test_stopped_members_go_on_alone_or_together(tmp_path, alone, monkeypatch, stacked):
    monkeypatch.setattr(together, "_is_stacked", lambda device: stacked)
    options = Options(runs=tmp_path / "runs-b", precision="float64", device="cpu")
    stop = Options(runs=tmp_path / "runs-b", precision="float64", device="cpu", time_limit=1e-9)
    for _ in range(5):
        train_together(put(tmp_path / "b", MEMBERS), stop, skip_nothing)
    assert [checkpoint(tmp_path / "runs-b", name)["iteration"] for name in MEMBERS] == [5, 5, 5]
    for _ in range(3):
        train(put(tmp_path / "b", MEMBERS)[1], stop)
    train_together(put(tmp_path / "b", MEMBERS), stop, skip_nothing)
    assert [checkpoint(tmp_path / "runs-b", name)["iteration"] for name in MEMBERS] == [6, 8, 6]
    train(put(tmp_path / "b", MEMBERS)[0], options)
    train_together(put(tmp_path / "b", MEMBERS), options, skip_nothing)
    assert_equal_checkpoints(tmp_path / "runs-b", alone, MEMBERS, 1e-9)
    lines = (tmp_path / "runs-b/digits/smooth/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == list(range(1, 51))


SCRIPT = """
import sys, torch
torch.set_num_threads(2)
from pathlib import Path
from robbench.models.card import Registry
from robbench.training import options, run, train
run._CHECKPOINT_SECONDS, run._PROBES = 0.0, 1
root = Path(sys.argv[1])
entries = [Registry([root]).find(f"digits/{name}") for name in sys.argv[2:]]
report = lambda p: print(p.iteration, flush=True)
given = options.Options(runs=root / "runs", device="cpu", precision="float64", report=report)
train.train_together(entries, given, lambda entry, result: None)
"""


@pytest.mark.whole
def test_sigkill_in_the_middle_changes_no_member(tmp_path, alone):
    put(tmp_path, MEMBERS)
    for stop in (20, None):
        args = [sys.executable, "-c", SCRIPT, str(tmp_path), *MEMBERS]
        with subprocess.Popen(args, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            seen = []
            for line in child.stdout:
                seen.append(int(line))
                if stop is not None and seen[-1] >= stop:
                    child.send_signal(signal.SIGKILL)
                    break
            child.wait()
    assert 18 < seen[0] <= 21, "the second call went on where the first was killed"
    assert_equal_checkpoints(tmp_path / "runs", alone, MEMBERS, 1e-9)


def test_a_member_that_diverges_stops_no_other(tmp_path):
    bad = CARD.replace('"adam"', '"sgd"').replace("0.01", "1e30")
    entries = put(tmp_path, {"bad": bad, "plain": CARD})
    finished = []
    with pytest.raises(ModelError, match="digits/bad: the loss is nan"):
        train_together(
            entries, Options(runs=tmp_path / "runs", device="cpu"), lambda entry, result: finished.append(entry.name)
        )
    assert finished == ["plain"]
    assert Registry([tmp_path]).find("bad").card.weights is None


def make_step(architecture, shape=(1, 8, 8), precision="float32", args=None, **given):
    recipe = Recipe(iterations=9, batch_size=4, optimizer="sgd", lr=0.1, **given)
    draws = Draws(load("digits", "train"), recipe, torch.device("cpu"))
    return Step(build(architecture, args or {}, 10, shape), recipe, draws, precision=precision)


def test_what_cannot_be_stacked_is_known():
    assert can_stack(make_step("digits_convnet", beta=1.0))
    assert not can_stack(make_step("wide_resnet", (3, 32, 32), args={"depth": 10, "widen_factor": 1})), "batch norm"
    assert not can_stack(make_step("linear", precision="bfloat16"))
    adversary = {"eps": "0.1", "steps": 2}
    assert not can_stack(make_step("linear", adversary=adversary))
    dropped = make_step("linear")
    dropped.module.append(torch.nn.Dropout(0.1))
    assert not can_stack(dropped)


@pytest.mark.whole
def test_a_family_from_the_command_line_leaves_out_what_is_trained(tmp_path):
    put(tmp_path, MEMBERS)
    names = ",".join(MEMBERS)
    args = ("train", "--family", names, "--models", tmp_path, "--device", "cpu")
    run("train", "digits/smooth", "--models", tmp_path, "--device", "cpu", cwd=tmp_path)
    before = Registry([tmp_path]).find("smooth").card
    done = run(*args, cwd=tmp_path)
    assert "digits/smooth is trained already (50 iterations). --restart trains it again." in done.stdout
    assert Registry([tmp_path]).find("smooth").card == before
    assert "digits/squeezed: 40 of 40 iterations" in done.stdout and "digits/plain: 50 of 50" in done.stdout
    assert "digits/plain " in done.stderr
    record = Registry([tmp_path]).find("plain").card.trained
    assert record.command == f"robbench train --family {names}"
    assert (tmp_path / "runs/digits/plain/curve.png").exists()
    again = run(*args, cwd=tmp_path)
    assert again.stdout.count("is trained already") == 3 and "iterations in" not in again.stdout
    anew = run(*args, "--restart", "--iterations", "7", cwd=tmp_path)
    assert anew.stdout.count("7 of 7 iterations") == 3


@pytest.mark.whole
def test_members_share_the_time_of_a_fit(tmp_path):
    entries = put(tmp_path, MEMBERS)
    begin = time.monotonic()
    train_family(entries, Options(runs=tmp_path / "runs", device="cpu", fit=9.0))
    assert 6.5 < time.monotonic() - begin < 11.5
    records = [Registry([tmp_path]).find(name).card.trained for name in MEMBERS]
    assert [record.fit for record in records] == [3.0] * 3 and all(record.plan for record in records)
    assert sum(record.seconds for record in records) < 11


def test_members_of_different_kinds_are_refused(tmp_path):
    other = CARD.replace("width = 4", "width = 5")
    normalized = CARD + "\n[preprocess]\nmean = [0.5]\nstd = [0.5]\n"
    entries = put(tmp_path, {"plain": CARD, "wider": other, "normalized": normalized})
    for pair in (entries[:2], [entries[0], entries[2]]):
        with pytest.raises(CardError, match=rf"digits/plain .* and digits/{pair[1].name} .* given; models that train"):
            train_family(pair, Options(runs=tmp_path / "runs", device="cpu"))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("shafahi2019-55", "Did you mean shafahi2019-5"),
        ("99", "Unknown family '99'"),
        ("", "Unknown family ''"),
        ("nobody", "Unknown family 'nobody'"),
        ("digits/natural,digits/nobody", "Unknown model 'digits/nobody'"),
        ("digits/natural,", "Unknown model ''"),
        ("digits/natural,mnist/natural", "have one architecture, normalization and data set"),
        ("digits/natural,cifar10/natural", "(wide_resnet, depth 16, widen_factor 4)"),
        ("1", "have one architecture, normalization and data set"),
        ("cifar10/natural_resnet18,cifar10/natural_resnet18", "no recipe of its own"),
    ],
)
def test_wrong_families_are_refused(tmp_path, family, message):
    args = ("--device", "cpu", "--iterations", "1", "--runs", tmp_path)  # short, should one be taken
    assert message in run("train", "--family", family, *args, code=2).stderr


def test_a_card_and_a_family_are_refused():
    for args in (("digits/at", "--family", "5"), ("--family", "5", "--all-missing"), ()):
        assert "either the name of a card to train, or --family" in run("train", *args, code=2).stderr


def test_a_table_names_its_cards():
    from robbench.commands.train import _find_family

    registry = Registry.default()
    members = _find_family("5", registry)
    assert members == _find_family("shafahi2019-5", registry)
    assert len(members) >= 38 and {e.card.architecture.name for e in members} == {"madry_mnist"}
    assert [e.full_name for e in _find_family("digits/at, digits/natural,digits/at", registry)] == [
        "digits/at",
        "digits/natural",
    ]
