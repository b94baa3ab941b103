"""Results are ranked only against results on the same images."""

from importlib import resources

import pytest
import torch

from robbench.attacks import FGSM, PGD
from robbench.core.errors import SuiteError
from robbench.evaluation.arguments import check_request
from robbench.evaluation.request import RunRequest
from robbench.evaluation.run import evaluate
from robbench.report.leaderboard import group_results
from robbench.report.terminal import print_results
from robbench.suite import load_suite
from support.leaderboard import read_leaderboard
from support.models import small
from support.papers import put, result

X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(3))
Y = small()(X).argmax(1)


def ask(results, name, model=None, x=X):
    return evaluate(model or small(), [FGSM()], x=x, y=Y, eps=0.02, results=results, name=name)


def test_models_on_different_images_are_not_ranked_against_each_other(tmp_path, capsys):
    ours = ask(tmp_path, "a")
    same = ask(tmp_path, "b", small(1))
    other = ask(tmp_path, "c", x=1 - X)
    (first, two), (second, one) = group_results([ours, same, other])
    assert {r.model for r in two} == {"a", "b"} and [r.model for r in one] == ["c"]
    assert first != second and first.split(", images")[0] == second.split(", images")[0]
    text = read_leaderboard(tmp_path)
    assert text.count("\n## ") == 4 and all([f"images {r.identity['data'][:8]}" in text for r in (ours, other)])
    assert group_results([ours, same])[0][0] == first.split(", images")[0], "one set of images needs no digest"
    print_results([ours, same, other], tmp_path)
    assert capsys.readouterr().out.count("images ") == 2


def test_other_attacks_under_one_name_are_not_ranked_against_each_other(tmp_path):
    """A strange tree may call a weak suite by any name, and older versions had other attacks under the same name."""
    strong = evaluate(small(), [PGD(steps=9)], x=X, y=Y, eps=0.02, name="a")
    same = evaluate(small(1), [PGD(steps=9)], x=X, y=Y, eps=0.02, name="b")
    weak = evaluate(small(1), [PGD(steps=1)], x=X, y=Y, eps=0.02, name="c")
    (first, two), (second, one) = group_results([strong, same, weak])
    assert {r.model for r in two} == {"a", "b"} and [r.model for r in one] == ["c"]
    assert first != second and first.split(", attacks")[0] == second.split(", attacks")[0]
    assert "attacks" not in group_results([strong, same])[0][0]
    final = strong.model_copy(update={"identity": strong.identity | {"suite": {"judge": "final"}}, "run_id": "0" * 64})
    assert len(group_results([strong, final])) == 2


@pytest.mark.parametrize("name", ["quick", "whitebox", "Quick"])
def test_a_suite_of_ones_own_has_no_name_of_a_built_in_one(tmp_path, name):
    path = tmp_path / f"{name}.toml"
    path.write_text("version = 1\n[[attack]]\nname = 'A'\nkind = 'fgsm'\nobjective = 'ce'\n")
    for suite in (str(path), load_suite(str(path))):
        with pytest.raises(SuiteError, match=f"{name.lower()} is a built-in suite"):
            evaluate(small(), suite, x=X, y=Y, eps=0.02)
        with pytest.raises(SuiteError, match="is a built-in suite"):
            check_request(RunRequest.of("digits/natural", suite, eps=0.02))
    text = (resources.files("robbench") / "suites/quick.toml").read_text()
    (tmp_path / "quick.toml").write_text(text)
    assert evaluate(small(), str(tmp_path / "quick.toml"), x=X, y=Y, eps=0.02, norm="Linf").n == 6, "a copy is the same"


def test_rows_of_one_model_say_how_they_differ(tmp_path):
    root = tmp_path / "results"
    for weights, suite, left in (("a", "whitebox", 4), ("b", "fast", 0)):
        about = {"identity": {"weights": weights * 64}}
        put(root, result("own", suite, left, {"A": left}, 5, "digits", "0.2", **about))
        put(root, result("own", "quick", left, {"A": left}, 5, "digits", "0.1", overrides={"eps": "0.1"}, **about))
    text = read_leaderboard(root)
    for letter, suite in (("a", "whitebox"), ("b", "fast")):
        assert f"| [own, weights {letter * 8}][" in text, "on the first page"
        assert f"| [own, weights {letter * 8}](own/quick@" in text, "in the table of a suite"
        assert f"| [own](own/{suite}/result.json)" in text, "one row needs no word"
