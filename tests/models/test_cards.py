"""Model cards and registries: everything a card may get wrong is refused in words that help to put it right."""

import errno
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from robbench.core.errors import CardError, StorageError
from robbench.core.files import digest, write_atomically
from robbench.core.types import Threat
from robbench.models.card import (
    Entry,
    ModelCard,
    Registry,
    extract_identity,
    load_card,
    locate_builtin_cards,
    parse_card,
    write_training,
)
from support.cards import FULL, SHA

MINIMAL = """\
version = 1
title = "A model"
dataset = "digits"
architecture = { name = "linear" }
"""


RECIPE = MINIMAL + '[recipe]\niterations = 1\nbatch_size = 1\noptimizer = "adam"\nlr = 0.1\n'
SGD = RECIPE.replace("adam", "sgd")
ADVERSARY = RECIPE + "[recipe.adversary]\neps = 0.1\nstep_size = 0.1\nsteps = 1\n"
WEIGHTS = MINIMAL + f'[weights]\nsha256 = "{SHA}"\n'
STEPS = RECIPE + 'schedule = "steps"\n'


def put(root: Path, full_name: str, text: str = MINIMAL) -> Path:
    path = root / f"{full_name}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture(autouse=True)
def no_user_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROBBENCH_MODELS", raising=False)


def test_full_card_is_exact_and_frozen() -> None:
    card = parse_card(FULL, "a.toml")
    assert card.recipe is not None and card.recipe.adversary is not None and card.threat is not None
    assert card.recipe.sigma == Fraction(30, 255)
    assert card.recipe.adversary.eps == Fraction(3, 10)
    assert card.recipe.adversary.step_size == Fraction(1, 100)
    assert card.recipe.adversary.mix == 1
    assert card.threat.threat() == Threat("Linf", Fraction(8, 255))
    assert card.architecture.args == {"width": 16, "note": "x", "rate": 0.5, "flag": True}
    assert card.architecture.args["flag"] is True
    with pytest.raises(Exception, match="frozen"):
        card.title = "other"  # type: ignore[misc]
    assert ModelCard.model_validate(card.model_dump()) == card


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (MINIMAL.replace("version = 1", "version = 2"), "version: 2 given; allowed: 1"),
        (MINIMAL.replace("version = 1\n", ""), "version: nothing given; required here: 'version', 'title', 'dataset'"),
        (MINIMAL.replace("A model", ""), "title: '' given; expected: text that is not empty"),
        (MINIMAL.replace("digits", "cifar"), "dataset: 'cifar' given; allowed: 'digits', 'mnist', 'fashion_mnist'"),
        ("licens = 'MIT'\n" + MINIMAL, "licens: unknown key 'licens'; did you mean 'licence'; allowed: 'version', 't"),
        ("zzzzzz = 1\n" + MINIMAL, "zzzzzz: unknown key 'zzzzzz'; allowed: 'version'"),
        (MINIMAL.replace('{ name = "linear" }', '"linear"'), "architecture: 'linear' given; expected: a table"),
        (MINIMAL.replace('"linear"', '"linear", args = [1]'), "architecture.args: [1] given; expected: a table"),
        (MINIMAL.replace('"linear"', '"linear", args = { w = [1] }'), "architecture.args.w: [1] given; allowed"),
        (MINIMAL.replace('"linear"', '"linear", args = { w = nan }'), "architecture.args.w: nan given; allowed"),
        (MINIMAL + "[preprocess]\nmean = 0.5\nstd = [1]", "preprocess.mean: 0.5 given; expected: a list"),
        (MINIMAL + "[preprocess]\nmean = [0, 0]\nstd = [1]", "preprocess: 2 means, 1 stds given; expected: as many"),
        (MINIMAL + "[preprocess]\nmean = [0]\nstd = [0]", "preprocess: std [0.0] given; every std must be > 0"),
        (
            MINIMAL + "[preprocess]\nmean = [0, 0, 0]\nstd = [1, 1, 1]",
            "a.toml: preprocess: 3 means given; expected: 1, the channels",
        ),
        (MINIMAL + "[threat]\nnorm = 'L3'\neps = 1", "threat.norm: 'L3' given; allowed: 'Linf', 'L2', 'L1'"),
        (MINIMAL + "[threat]\nnorm = 'L2'\neps = 'x'", "threat.eps: 'x' given; allowed: a fraction such as"),
        (MINIMAL + "[threat]\nnorm = 'L2'\neps = 0", "threat.eps: 0 given; expected: a number > 0"),
        (RECIPE.replace("adam", "adma"), "recipe.optimizer: 'adma' given; allowed: 'adam', 'sgd'"),
        (RECIPE + "sigma = '300/255'", "recipe.sigma: '300/255' given; expected: a number <= 1"),
        (RECIPE + "nesterov = 1", "recipe.nesterov: 1 given; expected: true or false"),
        (RECIPE.replace("iterations = 1", "iterations = 1.5"), "recipe.iterations: 1.5 given; expected: an integer"),
        (RECIPE.replace("iterations = 1", "iterations = true"), "recipe.iterations: True given; expected: an int"),
        (RECIPE + "momentum = 0.9", "recipe: momentum or nesterov given with optimizer 'adam'; allowed: with 'sgd'"),
        (SGD + "nesterov = true", "recipe: nesterov = true given without momentum; expected: momentum > 0"),
        (RECIPE + "milestones = [0.5]", "recipe: schedule 'constant' given with 1 milestones; expected"),
        (STEPS + "milestones = [0.5, 0.5]", "recipe: milestones [0.5, 0.5] given; expected: increasing, in (0, 1)"),
        (STEPS + "milestones = [1]", "recipe: milestones [1.0] given; expected: increasing, in (0, 1)"),
        (ADVERSARY + "mix = 0", "recipe: adversary.mix = 0 given; allowed: only with a pairing"),
        (ADVERSARY + "loss = 'cw'", "recipe.adversary.loss: 'cw' given; allowed: 'ce', 'margin', 'dlr', 'kl'"),
        (ADVERSARY + "loss = 'kl'\nrandom_start = false", "recipe.adversary: loss 'kl' given; allowed: with"),
        (RECIPE + "smoothing = 'boltzmann'", "recipe: smoothing 'boltzmann' given with alpha = 0; expected: alpha > 0"),
        (RECIPE + "[recipe.pairing]\nkind = 'alp'\nweight = 1", "recipe: pairing 'alp' given; allowed: 'clp' without"),
        (RECIPE + "alpha = 0.5\n[recipe.distillation]\nteacher = 't'", "recipe: alpha given with a teacher"),
        (RECIPE + "[cpu_budget]\nsteps = 2", "cpu_budget: steps given; the recipe has no adversary"),
        (MINIMAL + "[cpu_budget]\niterations = 2", "cpu_budget: given without a recipe"),
        (MINIMAL + "[gpu_budget]\nfactor = 2", "gpu_budget: given without a recipe"),
        (RECIPE + "[gpu_budget]\nfactor = 1", "gpu_budget.factor: 1 given"),
        (ADVERSARY.replace("steps = 1", "stepz = 1"), "recipe.adversary.stepz: unknown key 'stepz'; did you mean"),
        (WEIGHTS, "weights: no source given; expected: either path, or package and resource"),
        (WEIGHTS + "package = 'p'", "weights: package given; expected: either path, or package and resource"),
        (
            WEIGHTS + "path = 'a.pt'\npackage = 'p'\nresource = 'r'",
            "weights: path and package and resource given; expected: either path, or package and resource",
        ),
        (WEIGHTS.replace(SHA, "AB"), "weights.sha256: 'AB' given; expected: 64 lower-case hexadecimal digits"),
        (WEIGHTS + "package = 'os.path'", "weights.package: 'os.path' given; allowed: the name of a top-level"),
        (MINIMAL + "[trained]\ndate = 2024-01-01", "trained.date: datetime.date(2024, 1, 1) given; expected: text"),
    ],
)  # fmt: skip
def test_card_errors_name_file_key_given_and_allowed(text: str, sentence: str) -> None:
    with pytest.raises(CardError) as caught:
        parse_card(text, "models/a.toml")
    assert sentence in str(caught.value)
    assert all(line.startswith("models/a.toml: ") for line in str(caught.value).splitlines())


@pytest.mark.parametrize("path", ["../../x.pt", "/etc/x", "a/../../x", "..", "", r"a\\..\\x", "C:/x", r"x\u0000"])
def test_weights_cannot_leave_their_folder(path: str) -> None:
    for source in (f'path = "{path}"', f'package = "p"\nresource = "{path}"'):
        with pytest.raises(CardError, match=r"given; allowed: a relative path with / that stays inside"):
            parse_card(WEIGHTS + source, "a.toml")


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(CardError) as caught:
        parse_card("versoin = 1\n" + RECIPE.replace("adam", "adma") + "beta = -1", "a.toml")
    assert len(str(caught.value).splitlines()) == 3


def test_unreadable_cards_are_named(tmp_path: Path) -> None:
    with pytest.raises(CardError, match=r"absent\.toml: cannot be read: No such file"):
        load_card(tmp_path / "absent.toml")
    (tmp_path / "bytes.toml").write_bytes(b"title = '\xff'")
    with pytest.raises(CardError, match=r"bytes\.toml: not UTF-8 text: .* at byte 9"):
        load_card(tmp_path / "bytes.toml")
    (tmp_path / "broken.toml").write_text("version = 1\ntitle\n")
    with pytest.raises(CardError, match=r"broken\.toml: not valid TOML: .*line 2"):
        load_card(tmp_path / "broken.toml")


def test_builtin_cards_are_all_valid() -> None:
    entries = Registry.default().entries()
    assert "cifar10/natural_resnet18" in [entry.full_name for entry in entries]
    for entry in entries:
        assert entry.card.title
        assert entry.root == locate_builtin_cards().resolve()


def test_registry_finds_by_full_or_unique_bare_name(tmp_path: Path) -> None:
    for name in ("mnist/b", "digits/b", "digits/a"):
        put(tmp_path, name)
    put(tmp_path, "weights/not_a_card")
    registry = Registry([tmp_path])
    assert [entry.full_name for entry in registry.entries()] == ["digits/a", "digits/b", "mnist/b"]
    assert registry.find("a") == Entry("a", "digits", tmp_path / "digits" / "a.toml", tmp_path)
    assert registry.find("mnist/b").dataset == "mnist"
    with pytest.raises(CardError, match=r"'b' is ambiguous; give the full name: digits/b, mnist/b\."):
        registry.find("b")
    with pytest.raises(CardError, match=r"Unknown model 'digit/a'\. The closest of 3: digits/a"):
        registry.find("digit/a")


def test_user_registries_from_environment_and_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("one", "two", "three"):
        put(tmp_path / folder, f"digits/of_{folder}")
    monkeypatch.setenv("ROBBENCH_MODELS", os.pathsep.join([str(tmp_path / "one"), "", str(tmp_path / "two")]))
    registry = Registry.default([tmp_path / "three", tmp_path / "one"])  # naming a root twice is harmless
    for folder in ("one", "two", "three"):
        assert registry.find(f"of_{folder}").root == tmp_path / folder
    assert registry.find("natural_resnet18").root == locate_builtin_cards().resolve()


def test_same_name_in_two_registries_is_refused(tmp_path: Path) -> None:
    first, second = put(tmp_path / "one", "digits/a"), put(tmp_path / "two", "digits/a")
    with pytest.raises(CardError) as caught:
        Registry([tmp_path / "one", tmp_path / "two"])
    assert str(first) in str(caught.value) and str(second) in str(caught.value)


def test_folders_that_are_no_registry_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CardError, match=r"absent: no such folder; expected: a folder of cards"):
        Registry.default([tmp_path / "absent"])
    put(tmp_path, "digits/a")
    monkeypatch.setenv("ROBBENCH_MODELS", str(tmp_path / "digits"))
    with pytest.raises(CardError, match=r"cards directly in this folder; expected: <dataset>/<name>\.toml"):
        Registry.default()


def test_a_broken_card_spoils_no_other(tmp_path: Path) -> None:
    put(tmp_path, "digits/good")
    put(tmp_path, "digits/broken", "version =")
    put(tmp_path, "mnist/moved")
    registry = Registry([tmp_path])
    assert registry.find("good").card.title == "A model"
    assert len(registry.entries()) == 3
    with pytest.raises(CardError, match=r"broken\.toml: not valid TOML"):
        assert registry.find("broken").card
    with pytest.raises(CardError, match=r"moved\.toml: dataset: 'digits' given; expected: 'mnist', the folder"):
        assert registry.find("moved").card


TRAINED = {"iterations": 100, "seconds": 1.5, "hardware": "2 CPU cores", "versions": "torch 2", "date": "2024-01-01"}


def test_write_training_keeps_the_rest_of_the_card(tmp_path: Path) -> None:
    path = put(tmp_path, "digits/a", FULL)
    new = "f" * 64
    for seed in (3, 4):  # a second training replaces the first
        record = {**TRAINED, "seed": seed}
        write_training(path, weights_path="digits/a.safetensors", sha256=new, trained=record)
    assert path.read_text().startswith(FULL.replace("digits/old", "digits/a").replace(SHA, new) + "\n[trained]\n")
    card = load_card(path)
    assert card.weights is not None and card.trained is not None
    assert (card.weights.path, card.weights.sha256, card.trained.seed) == ("digits/a.safetensors", new, 4)
    assert os.listdir(path.parent) == ["a.toml"]


def test_write_training_adds_missing_tables(tmp_path: Path) -> None:
    path = put(tmp_path, "digits/a", RECIPE.rstrip("\n"))
    write_training(path, weights_path="digits/a.safetensors", sha256=SHA, trained={**TRAINED, "seed": 0})
    assert path.read_text().startswith(RECIPE + "\n[weights]\npath =")
    assert load_card(path).trained is not None


def test_write_training_never_leaves_an_invalid_card(tmp_path: Path) -> None:
    path = put(tmp_path, "digits/a", FULL)
    with pytest.raises(CardError, match=r"trained\.seed: nothing given"):
        write_training(path, weights_path="digits/a.safetensors", sha256=SHA, trained=TRAINED)
    assert path.read_text() == FULL
    foreign = put(tmp_path, "digits/b", WEIGHTS + "package = 'p'\nresource = 'r.pt'")
    with pytest.raises(CardError, match=r"weights\.package: 'p' given; only weights by path can be trained"):
        write_training(foreign, weights_path="b.safetensors", sha256=SHA, trained={**TRAINED, "seed": 0})


def test_write_atomically_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full_disk(_: int) -> None:
        raise OSError(errno.ENOSPC, "disk full")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match=r"file cannot be written: disk full\. Free some space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_identity_is_the_function_and_nothing_else() -> None:
    full = parse_card(FULL, "a.toml")
    assert extract_identity(full) == {
        "dataset": "digits",
        "architecture": {"name": "digits_convnet", "args": {"width": 16, "note": "x", "rate": 0.5, "flag": True}},
        "preprocess": {"mean": [0.5], "std": [0.25]},
    }
    retitled = parse_card(FULL.replace("Smoothed", "Smooth").replace("lr = 0.1", "lr = 0.2"), "a.toml")
    assert digest(extract_identity(retitled)) == digest(extract_identity(full))
    wider = parse_card(FULL.replace("width = 16", "width = 17"), "a.toml")
    assert digest(extract_identity(wider)) != digest(extract_identity(full))


def test_digest_is_canonical() -> None:
    assert digest({"b": [1, "é"], "a": None}) == digest({"a": None, "b": [1, "é"]})
    # Fixed forever: stored results are found again by digests like this one.
    assert digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    with pytest.raises(ValueError, match="JSON"):
        digest(float("nan"))


@pytest.mark.whole
def test_indexing_imports_no_torch() -> None:
    code = (
        "import sys; from robbench.models.card import Registry; "
        "[e.card for e in Registry.default().entries()]; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
