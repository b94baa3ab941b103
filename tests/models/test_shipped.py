"""Cards whose weights are not in the repository, and what the repository tracks."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import safetensors.torch
import torch

from robbench.core.errors import CardError, ModelError, UnshippedError
from robbench.models.card import Registry, load_card, locate_builtin_cards, parse_card
from robbench.models.load import load_model
from robbench.training.missing import list_missing
from support.commands import run

CARD = """\
version = 1
title = "A"
dataset = "digits"
shipped = false

[architecture]
name = "linear"

[recipe]
iterations = 40
batch_size = 32
optimizer = "adam"
lr = 0.01
"""
DATA = safetensors.torch.save({"1.weight": torch.ones(10, 64), "1.bias": torch.zeros(10)})
SHA = hashlib.sha256(DATA).hexdigest()
TRAINED = f"""
[weights]
path = "digits/a.safetensors"
sha256 = "{SHA}"

[trained]
iterations = 40
seconds = 1562.5
hardware = "A GPU"
versions = "torch 2"
date = "2026-01-01"
seed = 0
command = "robbench train digits/a --budget full"
instead = "iterations 40 instead of 400"
"""


def put(root, text=CARD + TRAINED, weights=None):
    path = root / "digits" / "a.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    file = root / "weights" / "digits" / "a.safetensors"
    if weights is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(weights)
    return Registry([root]).find("digits/a")


def test_loading_says_how_to_make_what_is_not_shipped(tmp_path):
    entry = put(tmp_path)
    assert entry.needs_training
    with pytest.raises(UnshippedError) as caught:
        load_model(entry)
    for part in (
        "a.safetensors: no such file. The weights of digits/a are not in the repository",
        "Make them with `robbench train digits/a`",
        "made by `robbench train digits/a --budget full`: 40 iterations (iterations 40 instead of 400) in 1562 s",
        f"SHA-256 {SHA}",
    ):
        assert part in str(caught.value)


def test_weights_that_are_here_are_used_if_they_are_the_cards(tmp_path):
    entry = put(tmp_path, weights=DATA)
    assert not entry.needs_training and load_model(entry).weights_sha256 == SHA
    with pytest.raises(ModelError, match=r"are not the ones on the card: .* To get them: robbench train digits/a"):
        load_model(put(tmp_path, weights=DATA + b"\0"))


def test_shipped_weights_that_were_deleted_are_not_said_to_be_elsewhere(tmp_path):
    entry = put(tmp_path, (CARD + TRAINED).replace("shipped = false\n", ""))
    assert not entry.needs_training
    with pytest.raises(ModelError, match=r"cannot be read .*To get it: robbench train digits/a") as caught:
        load_model(entry)
    assert "repository" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        CARD[: CARD.index("[recipe]")],
        CARD + f'[weights]\npackage = "p"\nresource = "r.pt"\nsha256 = "{SHA}"\n',
        CARD[: CARD.index("[recipe]")] + f'[weights]\npath = "a.safetensors"\nsha256 = "{SHA}"\n',
    ],
)
def test_weights_that_nobody_can_make_are_shipped(text):
    with pytest.raises(CardError, match="shipped: false given without a way to make the weights"):
        parse_card(text, "a.toml")
    parse_card(text.replace("shipped = false", "shipped = true"), "a.toml")


def list_models(root):
    return json.loads(run("list", "models", "--json", "--models", root).stdout)


def test_the_commands_tell_them_from_others(tmp_path):
    put(tmp_path)
    shown = run("show", "digits/a", "--models", tmp_path)
    assert "The weights of digits/a are not in the repository. Make them with `robbench train digits/a`" in shown.stdout
    (row,) = [r for r in list_models(tmp_path) if r["model"] == "digits/a"]
    assert row["weights"] == (
        "not in the repository, made by `robbench train digits/a`; "
        "trained 40 of 40 iterations (iterations 40 instead of 400)"
    )
    put(tmp_path, weights=DATA)
    (row,) = [r for r in list_models(tmp_path) if r["model"] == "digits/a"]
    assert row["weights"].startswith("not in the repository, made here; trained 40")


def test_eval_of_all_leaves_them_out_and_says_so(tmp_path):
    put(tmp_path)
    (tmp_path / "fashion_mnist").mkdir()
    moved = (tmp_path / "digits" / "a.toml").read_text().replace('"digits"', '"fashion_mnist"')
    (tmp_path / "fashion_mnist" / "b.toml").write_text(moved)
    told = run("eval", "--all", "--dataset", "fashion_mnist", "--models", tmp_path, code=2).stderr
    assert "1 with weights that are not in the repository and left out (fashion_mnist/b)" in told
    assert "no registered model of it has weights here" in told


def test_training_makes_them_and_writes_their_digest(tmp_path):
    entry = put(tmp_path, (CARD + TRAINED).replace('instead = "iterations 40 instead of 400"', ""))
    assert list_missing(Registry([tmp_path])) == []  # --all-missing trains none because its weights are elsewhere
    args = ("train", "digits/a", "--models", tmp_path, "--runs", tmp_path / "runs", "--device", "cpu")
    assert f"The card had weights with SHA-256 {SHA}. They are replaced." in run(*args).stdout
    card = load_card(entry.path)
    assert card.weights.sha256 != SHA and card.trained.iterations == 40 and not card.shipped
    made = Registry([tmp_path]).find("digits/a")
    assert not made.needs_training and load_model(made).weights_sha256 == card.weights.sha256
    assert "They are replaced" not in run(*args).stdout  # the same weights again


# ---- what this repository tracks


def git(repo: Path, *args: str, given: str | None = None) -> list[str]:
    """Return the lines that git prints, separated by NUL."""
    if shutil.which("git") is None or not (repo / ".git").exists():
        pytest.skip("not a git checkout: what is tracked is not known")
    done = subprocess.run(["git", "-C", str(repo), *args], input=given, capture_output=True, text=True, check=False)
    assert done.returncode <= 1, done.stderr  # 1: check-ignore found none
    return done.stdout.rstrip("\0").split("\0")


def test_tracked_files_stay_small(repo):
    sizes = {name: (repo / name).stat().st_size for name in git(repo, "ls-files", "-z") if (repo / name).exists()}
    largest = sorted(sizes, key=sizes.__getitem__)[-5:]
    assert len(sizes) > 500 and sum(sizes.values()) < 60e6, f"{sum(sizes.values())} bytes; largest: {largest}"


def test_exactly_the_shipped_weights_are_tracked(repo):
    root = locate_builtin_cards()
    cards = [e.card for e in Registry([root]).entries()]
    shipped = {f"models/weights/{c.weights.path}" for c in cards if c.shipped and c.weights and c.weights.path}
    assert {*git(repo, "ls-files", "-z", "models/weights")} == shipped
    assert all((repo / name).exists() for name in shipped)


def test_git_ignores_exactly_the_weights_that_are_not_shipped(repo):
    entries = [e for e in Registry([locate_builtin_cards()]).entries() if e.card.is_trainable]
    names = {f"models/weights/{e.full_name}.safetensors": e.card.shipped for e in entries}
    ignored = git(repo, "check-ignore", "--no-index", "-z", "--stdin", given="\0".join(names))
    assert {*ignored} == {name for name, is_shipped in names.items() if not is_shipped}
