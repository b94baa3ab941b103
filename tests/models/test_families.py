"""Many cards from one definition: every row of the papers' tables, and nothing lost that training wrote."""

import csv
import os
import re
import shutil
import time
from importlib import resources
from pathlib import Path

import pytest

import robbench
from robbench.core.errors import CardError, RobbenchError, StorageError
from robbench.models.card import Registry, load_card, locate_builtin_cards
from robbench.models.families import FAMILIES, expand_families, list_stale_cards, write_cards
from support.fuzzing import bounded_memory

pytestmark = pytest.mark.usefixtures("limited_time")

PAPERS = Path(robbench.__file__).parent / "papers"
DEFINITION = """
version = 1

[base.a]
dataset = "digits"
title = "T"
architecture = { name = "digits_convnet" }
recipe = { iterations = 5, batch_size = 2, optimizer = "adam", lr = 0.1 }

[base.b]
base = "a"
recipe = { lr = 0.2, alpha = 0.5 }

[[card]]
name = "digits/one"
base = "b"
recipe.adversary = { eps = "0.1", steps = 3 }

[change."digits/one"]
title = "Changed"
recipe.adversary = { steps = 4 }
"""


def rows(name):
    return list(csv.DictReader((PAPERS / name).read_text(encoding="utf-8").splitlines()))


def recipe_of(row):
    sigma = row["sigma"] if "sigma" in row else f"{row['sigma_255']}/255"
    thousand = {"k": 1000, "M": 1000000}
    return float(row["alpha"]), float(row["beta"]), sigma, int(row["iterations"][:-1]) * thousand[row["iterations"][-1]]


def same(recipe, alpha, beta, sigma, iterations):
    from fractions import Fraction

    return (recipe.alpha, recipe.beta, recipe.sigma, recipe.iterations) == (alpha, beta, Fraction(sigma), iterations)


@pytest.mark.parametrize(
    ("dataset", "table", "architecture"),
    [
        ("mnist", "shafahi2019_table5_mnist.csv", "madry_mnist"),
        ("cifar10", "shafahi2019_table6_cifar10_whitebox.csv", {"depth": 16, "widen_factor": 4}),
        ("cifar10", "shafahi2019_table7_cifar10_blackbox.csv", {"depth": 16, "widen_factor": 4}),
    ],
)
def test_every_row_of_the_papers_tables_has_a_card_with_its_figures(dataset, table, architecture):
    cards = [e.card for e in Registry.default().entries() if e.dataset == dataset]
    cards = [c for c in cards if architecture in (c.architecture.name, c.architecture.args)]
    black_box = "table7" in table
    used = set()
    for row in rows(table):
        parameters = {"alpha", "beta", "sigma", "sigma_255", "iterations"}
        figures = {("bb_" if black_box else "") + k: float(v.strip("*")) for k, v in row.items() if k not in parameters}
        found = [c for c in cards if c.paper and figures.items() <= c.paper.figures.items() and c.title not in used]
        assert len(found) == 1, row
        used.add(found[0].title)
        if row["iterations"]:
            assert same(found[0].recipe, *recipe_of(row))
        else:
            assert found[0].recipe.adversary is not None


def test_the_wide_cards_are_the_rows_of_table_3():
    wide = [e for e in Registry.default().entries() if e.card.architecture.args.get("widen_factor") == 10]
    names = {e.name for e in wide if e.card.paper.table.startswith("3")}
    assert names == {
        "ls095_sigma20_wrn28_10",
        "ls095_sigma30_wrn28_10",
        "ls095_sigma30_240k_wrn28_10",
        "ls08_sigma30_320k_wrn28_10",
        "lsq10_sigma20_wrn28_10",
        "lsq10_sigma30_80k_wrn28_10",
        "lsq10_sigma30_wrn28_10",
        "at_wrn28_10",
    }


def test_the_headline_model_is_the_papers():
    entry = Registry.default().find("ls095_sigma30")
    assert entry.full_name == "cifar10/ls095_sigma30"
    assert same(entry.card.recipe, 0.95, 0.0, "30/255", 160000)


def test_the_students_have_their_teachers():
    registry = Registry.default()
    for name in ("normal", "fix1", "correct_fix1", "hybrid"):
        distillation = registry.find(f"cifar10/student_{name}").card.recipe.distillation
        assert registry.find(distillation.teacher).card.recipe.adversary is not None
    assert registry.find(distillation.ranks_from).card.recipe.adversary is None


def test_the_committed_cards_are_up_to_date():
    assert not list_stale_cards(locate_builtin_cards())


def test_what_training_wrote_stays(tmp_path):
    (tmp_path / FAMILIES).write_text(DEFINITION)
    (path,) = write_cards(tmp_path)
    card = load_card(path)
    assert (card.title, card.recipe.lr, card.recipe.alpha) == ("Changed", 0.2, 0.5)
    assert (str(card.recipe.adversary.eps), card.recipe.adversary.steps) == ("1/10", 4)
    trained = '\n[weights]\npath = "x.safetensors"\nsha256 = "' + "a" * 64 + '"\n'
    path.write_text(path.read_text() + trained)
    assert not list_stale_cards(tmp_path)
    (tmp_path / FAMILIES).write_text(DEFINITION.replace("Changed", "Again"))
    assert write_cards(tmp_path) == [path]
    assert (load_card(path).title, load_card(path).weights.path) == ("Again", "x.safetensors")
    assert write_cards(tmp_path) == []


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('base = "b"\nrecipe.adv', 'base = "bb"\nrecipe.adv', "bb"),
        ('[change."digits/one"]', '[change."digits/two"]', "digits/two"),
        ("[[card]]", "[[cards]]", "cards"),
        ("version = 1", "version = ", "not valid TOML"),
        ("lr = 0.2", "lr = -1", "recipe.lr: -1 given"),
        ("[change", '[[card]]\nname = "digits/one"\nbase = "a"\n\n[change', "digits/one is defined twice"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(tmp_path, before, after, message):
    (tmp_path / FAMILIES).write_text(DEFINITION.replace(before, after))
    with pytest.raises(CardError, match=re.escape(message)):
        write_cards(tmp_path)
    assert not list(tmp_path.glob("*/*.toml"))


def test_without_a_definition_the_error_names_the_file(tmp_path):
    with pytest.raises(CardError, match=r"families\.toml: cannot be read"):
        expand_families(tmp_path)


def test_the_definition_alone_makes_all_cards_again(tmp_path):
    shutil.copy(locate_builtin_cards() / FAMILIES, tmp_path)
    written = write_cards(tmp_path)
    assert len(written) == len(expand_families(locate_builtin_cards())) > 80
    assert len(Registry([tmp_path]).entries()) == len(written)


@pytest.mark.parametrize(
    "name", ["../../outside/evil", "/outside/evil", "digits", "digits/", "digits/../x", "a/b/c", "../x", "digits/a\\b"]
)
def test_the_name_of_a_card_cannot_leave_the_registry(tmp_path, name):
    (tmp_path / "outside").mkdir()
    root = tmp_path / "a" / "b"
    root.mkdir(parents=True)
    (root / FAMILIES).write_text(DEFINITION.partition("[change")[0].replace('"digits/one"', f"'{name}'"))
    before = sorted(tmp_path.rglob("*"))
    for function in (write_cards, list_stale_cards):
        with pytest.raises(CardError, match="expected: DATASET/NAME"):
            function(root)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("link", ["digits", "digits/one.toml"])
def test_cards_are_not_written_through_a_link(tmp_path, link):
    outside, root = tmp_path / "outside", tmp_path / "root"
    outside.mkdir()
    (outside / "one.toml").write_text("version = 1")
    (root / link).parent.mkdir(parents=True)
    (root / link).symlink_to(outside if link == "digits" else outside / "one.toml")
    (root / FAMILIES).write_text(DEFINITION)
    with pytest.raises(StorageError, match="is a link"):
        write_cards(root)
    assert (outside / "one.toml").read_text() == "version = 1" and len(list(outside.iterdir())) == 1


CARD = '[[card]]\nbase = "a"\n'
FAMILY = '[[family]]\nbase = "a"\nsource = "S"\nusual_iterations = 1\nsigma_unit = "1"\n'
FAMILY += 'tables = [{ table = "5", csv = "X" }]'
HOSTILE = {
    "keys": "a" + ".a" * 60_000 + " = 1",
    "nested": "x = " + "[" * 100_000,
    "circle": '[base.a]\nbase = "b"\n[base.b]\nbase = "a"\n' + CARD + 'name = "digits/x"',
    "itself": '[base.a]\nbase = "a"\n' + CARD + 'name = "digits/x"',
    "no list": "card = 1",
    "no table": "card = [1]",
    "base is a number": 'base = 1\n' + CARD + 'name = "digits/x"',
    "a base is a number": '[base]\na = 1\n' + CARD + 'name = "digits/x"',
    "the base's name is a list": '[base.a]\n[[card]]\nname = "digits/x"\nbase = [1]',
    "no name": "[base.a]\n" + CARD,
    "the name is a number": "[base.a]\n" + CARD + "name = 1",
    "change is a number": "change = 1",
    "a change is a number": DEFINITION.replace('[change."digits/one"]', '[change]\n"digits/one" = 1\n[x]'),
    "family is a number": "family = 1",
    "no source": '[base.a]\n[[family]]\nbase = "a"',
    "a table outside": "[base.a]\n" + FAMILY.replace('"X"', '"/etc/passwd"'),
    "another table": "[base.a]\n" + FAMILY.replace('"X"', '"seguin2021_table1_accuracy.csv"'),
    "no such table": "[base.a]\n" + FAMILY,
    "many cards of a large base": "[base.a]\n" + "".join(f"k{i} = 1\n" for i in range(6_000))
    + "".join(f'{CARD}name = "digits/c{i}"\n' for i in range(1_000)),
    "many families": "[base.a]\n" + f"{FAMILY}\nonly = []\n".replace('"X"', '"shafahi2019_table5_mnist.csv"') * 600,
    "large": "#" * 2**18,
    "a list too deep to be written": f"[base.a]\nx = {'[' * 400}{']' * 400}\n{CARD}name = 'digits/x'",
    "deep by dots": "[base.a]\nx = " + ("{" + "a." * 98 + "a = ") * 30 + "1" + "}" * 30 + f"\n{CARD}name = 'digits/x'",
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_a_hostile_definition_is_refused_at_once(tmp_path, text):
    (tmp_path / FAMILIES).write_text(text)
    begin = time.perf_counter()
    with bounded_memory(2**29), pytest.raises(CardError, match=re.escape(str(tmp_path))):
        write_cards(tmp_path)
    assert time.perf_counter() - begin < 2
    if "[base.a]\nbase" in text:
        with pytest.raises(CardError, match="or itself"):
            write_cards(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [FAMILIES]


def test_a_table_comes_from_the_package_alone(tmp_path):
    secret = tmp_path / "secret.csv"
    secret.write_bytes((resources.files("robbench") / "papers/shafahi2019_table5_mnist.csv").read_bytes())
    papers = Path(str(resources.files("robbench") / "papers"))
    for outside in (str(secret), os.path.relpath(secret, papers)):
        (tmp_path / FAMILIES).write_text('[base.a]\ndataset = "mnist"\n' + FAMILY.replace('"X"', f'"{outside}"'))
        with pytest.raises(CardError, match=r"csv: .* given; allowed"):
            expand_families(tmp_path)


@pytest.mark.parametrize("name", [FAMILIES, "digits/one.toml"])
def test_a_pipe_is_not_read(tmp_path, name):
    (tmp_path / "digits").mkdir()
    if name != FAMILIES:
        (tmp_path / FAMILIES).write_text(DEFINITION)
    os.mkfifo(tmp_path / name)
    with pytest.raises(RobbenchError, match="not a regular file"):
        write_cards(tmp_path)
