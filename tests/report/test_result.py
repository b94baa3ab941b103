"""What `robbench.evaluate` returns: its table, its HTML, its records, and its adversarial examples."""

import re

import pandas as pd
import pytest
import torch

import robbench as rb
from robbench.core.errors import ResultError
from robbench.report.progress import TerminalReporter
from robbench.results.schema import ResultFile
from support.models import small
from support.terminal import run_in_terminal

ATTACKS = [rb.attacks.FGSM(), rb.attacks.PGD(steps=4)]


@pytest.fixture(scope="module")
def case():
    model = small()
    x = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    y = model(x).argmax(1)
    y[::9] = (y[::9] + 1) % 10
    return {"model": model, "suite": ATTACKS, "x": x, "y": y, "eps": 0.03}


def test_a_result_prints_a_sentence_and_a_row_for_each_attack(case):
    result = rb.evaluate(**case)
    first, head, *rows, worst = str(result).splitlines()
    assert re.match(r"\w+: 87\.5 % clean, \d+\.\d % \[.*\] robust at Linf 0.03, unchecked, 40 images", first)
    assert repr(result) == f"<Result {first}>"
    assert head.split()[0] == "Attack" and worst.startswith("worst case")
    assert [row.split()[0] for row in rows] == [a.name for a in result.attacks]
    assert max(map(len, str(result).splitlines()[1:])) <= 80
    assert f"{result}" == str(result)


def test_attacks_have_names_and_numbers(case):
    result = rb.evaluate(**case)
    for i, attack in enumerate(result.attacks):
        assert result.attacks[attack.name] is attack is result.attacks[i]
    assert result.attacks[:1] == [result.attacks[0]] and len(result.attacks) == 2
    with pytest.raises(ResultError, match="Unknown attack of this result 'PGDD'"):
        result.attacks["PGDD"]


@pytest.mark.parametrize("kept", [False, True])
def test_the_records_are_those_of_the_images_of_the_result(case, tmp_path, kept):
    place = {"results": tmp_path} if kept else {}
    whole = rb.evaluate(**case, **place)
    part = rb.evaluate(**case, **place, samples=15)
    for result in (whole, part):
        rows = result.records
        assert isinstance(rows, pd.DataFrame) and set(rows["attack"]) == {a.name for a in result.attacks}
        assert rows["sample"].nunique() == result.n and len(rows) == 2 * result.n
        robust = ~rows["sample"].isin(rows.loc[rows["status"] != "robust", "sample"])
        assert rows[robust]["sample"].nunique() / result.n == result.worst_case.value
    rows["status"] = "changed"
    assert "changed" not in set(part.records["status"]), "a user's change does not change the result"


def test_adversarials_are_points_that_break_the_model(case, tmp_path):
    result = rb.evaluate(**case, results=tmp_path, save_adversarials=True)
    (points,) = result.adversarials()
    assert len(points.sample) and set(points.attack) <= {a.name for a in result.attacks}
    predicted = case["model"](torch.from_numpy(points.x)).argmax(1)
    assert (predicted != case["y"][points.sample]).all()
    assert (torch.from_numpy(points.x) - case["x"][points.sample]).abs().max() <= 0.03 + 1e-6
    with pytest.raises(ResultError, match="save_adversarials=True"):
        rb.evaluate(**case).adversarials()
    other = rb.evaluate(**case | {"eps": 0.02}, results=tmp_path, save_adversarials=True)
    result._points.write_bytes(other._points.read_bytes())
    with pytest.raises(ResultError, match="of another run"):
        result.adversarials()


def test_html_escapes_names_and_flags(case):
    result = rb.evaluate(**case)
    flags = {"<script>": "a <b>flag</b> & \x1b[31m"}
    bad = rb.Result.of(ResultFile.model_validate(result.model_dump() | {"flags": flags}), lambda: result.records, None)
    page = bad._repr_html_()
    assert "&lt;script&gt;" in page and "<script>" not in page and "<b>flag" not in page and "\x1b" not in page
    assert page.count("<tr>") == 1 + len(result.attacks) + 1
    assert "\x1b" not in str(bad)


def test_a_result_stores_and_compares_as_its_file_does(case, tmp_path):
    result = rb.evaluate(**case, results=tmp_path)
    (stored,) = rb_results(tmp_path)
    assert result.model_dump(mode="json") == stored.model_dump(mode="json")
    assert rb.Result.model_fields.keys() == ResultFile.model_fields.keys()


def rb_results(root):
    from robbench.results.reader import read_results

    return read_results(root).results


def test_there_is_no_progress_without_a_terminal(case, capsys):
    rb.evaluate(**case)
    assert capsys.readouterr().err == ""
    reporter = TerminalReporter(hint_samples=False)
    rb.evaluate(**case, reporter=reporter)
    reporter.close()
    assert "FGSM" in capsys.readouterr().err


@pytest.mark.whole
@pytest.mark.parametrize("progress", [True, False])
def test_a_terminal_shows_progress_unless_it_is_not_wanted(progress):
    code = f"import robbench as rb; rb.evaluate('digits/at', 'quick', samples=20, progress={progress})"
    text = run_in_terminal(code, 100)
    assert ("FGSM-xent" in text) == progress


def test_check_returns_the_decision(repo):
    model = rb.load_model("digits/at")
    with pytest.raises(rb.RobbenchError, match="allowed: the path of a file"):
        rb.check(model, 3)
    with pytest.raises(rb.RobbenchError, match="Give name= one of these"):
        rb.check(model, repo / "baselines" / "digits.json", name="digits/none")


def test_a_result_says_the_verdict_of_the_same_model_images_and_threat(case, tmp_path):
    about = case | {"suite": "quick", "results": tmp_path}
    assert rb.evaluate(**about).verdict == "unchecked"
    rest = {key: value for key, value in about.items() if key != "suite"}
    found = rb.sanity(**rest, samples=16)
    result = rb.evaluate(**about)
    assert result.verdict == found.verdict != "unchecked"
    assert (result.verdict_n, result.n) == (16, 40)
    named = f"{found.verdict} (n 16)"
    assert f", {named}, 40 images" in str(result) and named in result._repr_html_()
    same = rb.evaluate(**about | {"samples": 16})
    assert f", {found.verdict}, 16 images" in str(same) and same.verdict_n == 16
    assert rb.evaluate(**about | {"eps": 0.02}).verdict == "unchecked"
    assert rb.evaluate(**about | {"results": None}).verdict == "unchecked"

    said, page = str(found), found._repr_html_()
    assert len(said) < 5000 and said.splitlines()[0] in repr(found) and len(repr(found).splitlines()) == 1
    for check in found.checks:
        assert (f"  {check.name}: " in said) == (check.status in ("warn", "fail")) == (f">{check.name}<" in page)
    assert ("checks passed" in said and "<table" in page) or not found.decided_by
    bad = found.model_copy(update={"model": "<b>\x1b"})
    assert "<b>\x1b" not in bad._repr_html_() and "&lt;b&gt;" in bad._repr_html_() and "\x1b" not in str(bad)


def test_a_list_of_results_prints_a_sentence_each(case):
    results = rb.evaluate(**case | {"eps": [0.01, 0.03]})
    assert isinstance(results, list) and len(results) == 2
    first, second = str(results).splitlines()
    assert "robust at Linf 0.01, unchecked" in first and "robust at Linf 0.03, unchecked" in second
    assert results._repr_html_().count("<tr>") == 3
    assert max(map(len, str(results[:]).splitlines())) < 300, "a plain list of results is short, too"
