"""Results are ranked only against results on the same images."""

import torch

from robbench.attacks import FGSM
from robbench.evaluation.run import evaluate
from robbench.report.leaderboard import group_results
from robbench.report.terminal import print_results
from support.leaderboard import read_leaderboard
from support.models import small

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
