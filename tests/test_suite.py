"""Suites: budgets per data set, and what an invalid file is answered with."""

import sys
from fractions import Fraction

import pytest

from robbench.attacks import describe
from robbench.core.errors import RobbenchError, SuiteError
from robbench.core.user_code import import_user_modules
from robbench.suite import PEERS, Stage, build_attack, load_suite, suite_names


def test_built_in_suites_build_on_every_data_set():
    assert {"whitebox", "quick"} <= set(suite_names())
    for name in suite_names():
        suite = load_suite(name)
        for dataset in (*suite.threats, "custom"):
            for stage in suite.stages(dataset):
                if stage.kind.partition(":")[0] in PEERS:  # an optional package
                    assert stage.optional
                    continue
                if stage.kind == "transfer":
                    rest = {k: v for k, v in stage.params.items() if k not in ("attack", "surrogate", "optional")}
                    stage = Stage(stage.name, stage.params["attack"], rest)
                assert build_attack(stage).trials >= 1


def test_whitebox_has_the_papers_budgets():
    suite = load_suite("whitebox")
    assert suite.threat("mnist").eps == Fraction(3, 10)
    assert suite.threat("cifar10").eps == Fraction(8, 255)
    names = [s.name for s in suite.stages("mnist")]
    assert names == ["FGSM-xent", "FGSM-CW", "PGD-40-xent", "PGD-40-CW", "APGD-CE", "APGD-DLR"]
    mnist = build_attack(suite.stages("mnist")[2])
    assert (mnist.steps, mnist.step_size, mnist.random_start) == (40, 0.01, True)
    cifar = build_attack(suite.stages("cifar10")[2])
    assert cifar.steps == 20
    assert cifar.relative_step * 8 / 255 == pytest.approx(2 / 255)


def test_autoattack_has_the_authors_budgets():
    """Restarts aside: 100 steps per gradient attack and 5000 queries of Square, as in Croce & Hein 2020."""
    stages = load_suite("autoattack").stages("digits")
    assert [build_attack(stage).steps for stage in stages] == [100, 100, 100, 5000]


def write(tmp_path, text):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return str(path)


GOOD = 'version = 1\n[threat.digits]\nnorm = "L2"\neps = "0.5"\n[[attack]]\nname = "a"\nkind = "pgd"\n'


def test_a_suite_of_ones_own(tmp_path):
    suite = load_suite(write(tmp_path, GOOD + 'step_size = "1/10"\non.mnist = { steps = 3 }\n'))
    assert suite.name == "mine"
    assert str(suite.threat("digits")) == "L2 0.5"
    attack = build_attack(suite.stages("mnist")[0])
    assert (attack.steps, attack.step_size) == (3, 0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version = ", "not valid TOML"),
        (GOOD.replace("version = 1", "version = 2"), "version: 2 given; allowed: 1"),
        (GOOD.replace("version = 1", 'version = 1\njudge = "best"'), "judge: 'best' given; allowed: any, final"),
        (GOOD.replace("version = 1", 'version = 1\nmodus = "full"'), "Unknown key 'modus'. Did you mean mode"),
        (GOOD.replace("version = 1", 'version = 1\nmode = "ful"'), "mode: 'ful' given; allowed: full, cascade"),
        ("version = 1\n", "at least one"),
        (GOOD.replace("L2", "L3"), "threat.digits"),
        (GOOD.replace("0.5", "half"), "eps: 'half' given"),
        (GOOD.replace("L2", "Linf").replace("0.5", "8"), "8/255"),
        (GOOD.replace('eps = "0.5"\n', ""), "expected norm and eps"),
        (GOOD + '[[attack]]\nname = "a"\nkind = "fgsm"\n', "two attacks are named 'a'"),
        (GOOD + '[[attack]]\nkind = "fgsm"\n', "no 'name'"),
    ],
)
def test_invalid_files_are_refused(tmp_path, text, message):
    with pytest.raises(SuiteError) as error:
        load_suite(write(tmp_path, text))
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('kind = "pdg"', "Did you mean pgd"),
        ('kind = "pgd"\nstpes = 3', "Did you mean steps"),
        ('kind = "pgd"\nsteps = "3"', "steps: '3' given; allowed: int"),
        ('kind = "pgd"\nsteps = true', "steps: True given; allowed: int"),
        ('kind = "pgd"\nrandom_start = 1', "random_start: 1 given; allowed: bool"),
        ('kind = "pgd"\nstep_size = "big"', "step_size: 'big' given"),
        ('kind = "pgd"\nobjective = "xent"', "Unknown objective 'xent'"),
    ],
)
def test_invalid_attacks_are_refused(tmp_path, line, message):
    suite = load_suite(write(tmp_path, GOOD.replace('kind = "pgd"', line)))
    with pytest.raises(SuiteError) as error:
        build_attack(suite.stages("digits")[0])
    assert message in str(error.value)


OWN = """
from dataclasses import dataclass
from robbench.attacks import PGD

@dataclass(frozen=True, kw_only=True)
class Mine(PGD):
    kind = "mine"
    boost: float = 2.0
"""


def test_an_attack_of_ones_own(tmp_path, monkeypatch):
    """Its module is imported because a person asks for it; what a file names is looked for in there only."""
    (tmp_path / "own_attack_of_a_test.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    line = 'kind = "own_attack_of_a_test:Mine"\nsteps = 3\nboost = "1/2"'
    stage = load_suite(write(tmp_path, GOOD.replace('kind = "pgd"', line))).stages("digits")[0]
    with pytest.raises(SuiteError, match=r"A file alone never imports code: .* --import own_attack_of_a_test"):
        build_attack(stage)
    assert "own_attack_of_a_test" not in sys.modules
    import_user_modules(["own_attack_of_a_test"])
    attack = build_attack(stage)
    assert (attack.kind, attack.steps, attack.boost) == ("mine", 3, 0.5)
    assert describe(attack)["boost"] == 0.5
    for wrong, message in (
        ("own_attack_of_a_test:Yours", "is not an attack"),
        ("no_such_module_here:Mine", "not imported"),
        ("pathlib:Path", "is not an attack"),
        ("own_attack_of_a_test:dataclass", "is not an attack"),
    ):
        suite = load_suite(write(tmp_path, GOOD.replace('kind = "pgd"', f'kind = "{wrong}"')))
        with pytest.raises(SuiteError, match=message):
            build_attack(suite.stages("digits")[0])


def test_a_module_that_cannot_be_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_module_of_a_test.py").write_text("1 / 0")
    for name, message in (("nowhere_to_be_seen", "ModuleNotFoundError"), ("broken_module_of_a_test", "ZeroDivision")):
        with pytest.raises(RobbenchError, match=f"--import {name}: {message}.*Expected a module"):
            import_user_modules([name])


def test_unknown_suites_and_data_sets_are_named():
    with pytest.raises(SuiteError, match="Did you mean whitebox"):
        load_suite("whitbox")
    with pytest.raises(SuiteError, match="--eps 8/255"):
        load_suite("whitebox").threat("imagenet")
    with pytest.raises(SuiteError, match="No suite file"):
        load_suite("nowhere.toml")


@pytest.mark.parametrize(
    "given",
    [
        f"steps = {10**18}",
        f"steps = {2 * 10**7}",
        f"steps = 1\neot = {10**15}",
        f"restarts = {10**15}",
        "steps = 1000000\nrestarts = 1000000",
        f"on.digits = {{ steps = {10**18} }}",
        "steps = 100000\neot = 100000",
    ],
)
def test_a_file_does_not_ask_for_work_without_end(tmp_path, given):
    path = tmp_path / "s.toml"
    path.write_text(
        f'version = 1\n[threat.digits]\nnorm = "Linf"\neps = "0.1"\n[[attack]]\nname = "a"\nkind = "pgd"\n{given}'
    )
    with pytest.raises(SuiteError, match="given; allowed: at most"):
        [build_attack(stage) for stage in load_suite(path).stages("digits")]
