"""The audit of the paper's claims: what counts as usual and as best known, the page and its figure."""

from dataclasses import replace

import pytest

from robbench.papers.audit import audit_claims, read_references
from robbench.papers.audit_page import plan_audit_figure, render_audit_page
from robbench.results.reader import read_vouched_robust
from support.commands import run
from support.papers import SHA, attack, put, result

OK, LOST, WRONG = "robust", "broken", "misclassified"
TRAINED = """
[trained]
iterations = 100000
seconds = 1.0
hardware = "h"
versions = "v"
date = "2026-01-01"
seed = 0
"""


@pytest.fixture
def registry(cards):
    """Cards of MNIST and CIFAR-10; three have weights, one of them with the record of a training."""
    found = cards("ls095_sigma03", "natural", "at")
    return change_card(found, "mnist/ls095_sigma03", lambda text: text + TRAINED)


def change_card(registry, name, change):
    path = registry.find(name).path
    path.write_text(change(path.read_text()))
    return type(registry)(registry.roots)


def store(root, model, suite, status, **changed):
    """Store a result of one suite: attack to the statuses of samples 0, 1, ... Return the path of its result.json."""
    # The black-box columns count only with the surrogate that the card has now.
    more = {"kind": "transfer", "surrogate": "mnist/natural", "surrogate_weights": SHA["natural"]}
    attacks = [attack(name, 0, **(more if name.startswith("BB") else {})) for name in status]
    wanted = result(model, suite, 0, {}, len(next(iter(status.values()))), **changed)
    return put(root, wanted.model_copy(update={"attacks": attacks}), status)


PAPERS = {
    "WB-PGD-40-xent": [OK, OK, OK, WRONG],
    "WB-PGD-40-CW": [OK, OK, LOST, WRONG],
    "BB-FGSM-CW": [LOST, OK, OK, WRONG],
    "BB-PGD-40-CW": [OK, OK, OK, WRONG],
}


STANDING = dict.fromkeys(PAPERS, [OK] * 4)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


@pytest.fixture
def measured(registry, root):
    """Four images: the paper's PGD leaves 2, a transfer breaks one more, and APGD another."""
    store(root, "ls095_sigma03", "paper-mnist", PAPERS)
    store(root, "ls095_sigma03", "autoattack", {"APGD-CE": [OK, LOST, OK, WRONG]})
    return registry, root


def render(registry, root):
    return render_audit_page(audit_claims(registry, root), read_references(), "audit.png")


def test_the_usual_number_is_the_papers_attack_and_the_best_known_joins_all_suites(measured):
    registry, root = measured
    audit = audit_claims(registry, root)
    (row,) = audit.rows
    assert (row.table, row.labels, row.model) == ("5", "α 0.95, σ 0.3, 400k", "mnist/ls095_sigma03")
    assert row.paper == min(registry.find(row.model).card.paper.figures[f"wb_pgd40_{k}"] for k in ("xent", "cw"))
    # The lower of the two columns, not what withstands both, and not the black-box columns.
    assert (row.usual.value, row.autoattack.value, row.worst.value) == (0.5, 0.5, 0.0)
    assert (row.overstated, row.n, row.autoattack_n, row.verdict) == (50.0, 4, 4, "unchecked")
    assert [(c.table.number, c.threat, c.rows, c.measured) for c in audit.coverage] == [
        ("5", "Linf 0.3", 40, 3),  # the rows of 100k and 2M iterations show the same model
        ("6", "Linf 8/255", 20, 0),
    ]
    # The records that the reader keeps in memory are unchanged.
    assert read_vouched_robust(root / "mnist/ls095_sigma03/paper-mnist").tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    "changed",
    [
        {"eps": "0.4", "overrides": {"eps": "0.4"}},
        {"identity": {"weights": "e" * 64}},
        {"identity": {"weights": SHA["ls095_sigma03"], "data": "e" * 64}},
        {"identity": {"weights": SHA["ls095_sigma03"], "model": "other"}},
    ],
)
def test_breaks_at_another_radius_or_of_another_function_or_images_do_not_count(registry, root, changed):
    store(root, "ls095_sigma03", "paper-mnist", STANDING)
    store(root, "ls095_sigma03", "quick", {"APGD-CE": [LOST] * 4}, **changed)
    (row,) = audit_claims(registry, root).rows
    assert (row.worst.value, row.n) == (1.0, 4)


def test_breaks_of_every_run_on_the_weights_count(registry, root):
    store(root, "ls095_sigma03", "paper-mnist", STANDING)
    store(root, "ls095_sigma03", "quick", {"APGD-CE": [LOST] + [OK] * 3}, overrides={"seed": "1"})
    store(root, "ls095_sigma03", "masked", {"PGD": [OK, LOST]})  # on fewer images
    store(root, "ls095_sigma03", "fast", {"PGD": [OK] * 4 + [LOST]})  # on more images
    (row,) = audit_claims(registry, root).rows
    assert (row.usual.value, row.worst.value, row.n, row.autoattack) == (1.0, 0.5, 4, None)


def test_rows_go_by_overstatement_and_those_without_the_papers_attack_last(measured):
    registry, root = measured
    store(root, "at", "whitebox", {"APGD-CE": [OK, OK, OK, LOST]})
    rows = audit_claims(registry, root).rows
    assert [(r.model, r.overstated) for r in rows] == [("mnist/ls095_sigma03", 50.0), ("mnist/at", None)]
    assert rows[1].labels == "Madry et al. adv. tr."
    store(root, "at", "paper-mnist", STANDING)
    assert [r.overstated for r in audit_claims(registry, root).rows] == [50.0, 25.0]


def test_a_damaged_result_gives_no_number_and_is_named(measured):
    registry, root = measured
    path = root / "mnist/ls095_sigma03/autoattack/result.json"
    path.write_text(path.read_text().replace('"n": 4', '"n": 5'))
    (row,) = audit_claims(registry, root).rows
    assert (row.autoattack, row.worst.value) == (None, 0.25)
    page = render(registry, root)
    assert "**Damaged files.** 1 files" in page and "\n\n- mnist/ls095_sigma03/autoattack: damaged: " in page
    # A damaged result of the paper's suite: the images of the other result count.
    store(root, "ls095_sigma03", "fast", {"PGD": [OK, OK, LOST]})
    path = root / "mnist/ls095_sigma03/paper-mnist/result.json"
    path.write_text(path.read_text().replace('"n": 4', '"n": 5'))
    (row,) = audit_claims(registry, root).rows
    assert (row.usual, row.n, round(3 * row.worst.value)) == (None, 3, 2)


def test_the_page_says_first_what_it_cannot_and_then_every_number(measured):
    registry, root = measured
    store(root, "at", "paper-mnist", STANDING)
    page = render(registry, root)
    limits, findings = page.index("## What this audit cannot say"), page.index("## What it finds")
    assert limits < findings < page.index("![") < page.index("## The rows")
    for part in (
        "4 of the 40 rows of Table 5 (MNIST, white-box and black-box); 0 of the 20 rows of Table 6",
        "mnist 25.0 % of the recipe's (0 of 2 models have all)",
        "Ours: mnist madry_mnist.",
        "n a model: mnist 4.",
        "mnist/at 100.0 (theirs 88.00)",
        "Of the 1 models without adversarial training, none keeps more than 0.0 [0.0, 49.0] %",
        "up to 74.0 % for these rows",
        "overstates 1 of 1 of them by more than 10 points. The largest gap is 50.0 points (mnist/ls095_sigma03)",
        "mnist/at from 100.0 to 100.0",
        "in Table 5 WB-PGD-40-xent and WB-PGD-40-CW, Linf 0.3; in Table 6 WB-PGD-20-rand-xent",
        "70.6 (PGD-40, 1 start)",
        "2.6 (Square; 5.0 by PGD, 10,000 starts)",
        "27.0 (PGD, 1 start)",
        "The other 4 published models below lose at most 4.5 points",
    ):
        assert part in page, part
    assert "mnist/ls095_sigma03 †" not in page and "Damaged" not in page
    registry = change_card(registry, "mnist/ls095_sigma03", lambda t: t.replace("shipped = true", "shipped = false"))
    assert "mnist/ls095_sigma03 †" in render(registry, root)


def test_the_page_says_whether_the_images_are_the_full_test_sets(measured):
    registry, root = measured
    audit = audit_claims(registry, root)
    (row,) = audit.rows
    other = replace(row, model="cifar10/at", card=registry.find("cifar10/at").card)
    for sizes, said in (
        ((4, 4), "n a model: mnist 4; cifar10 4. These are not the full test sets."),
        ((10_000, 4), "Not the full test set: cifar10."),
        ((10_000, 10_000), "These are the full test sets."),
    ):
        rows = tuple(replace(r, n=n) for r, n in zip((row, other), sizes, strict=True))
        assert said in render_audit_page(replace(audit, rows=rows), read_references(), "audit.png")


def test_hostile_text_is_escaped(measured):
    registry, root = measured
    evil = "<b>x</b> | [l](javascript:e)"
    evil_lines = f'instead = "iterations 1, {evil}"\nprecision = "{evil}"\n'
    registry = change_card(registry, "mnist/ls095_sigma03", lambda text: text + evil_lines)
    audit = audit_claims(registry, root)
    (row,) = audit.rows
    for claimed in (
        row,
        replace(row, card=registry.find("mnist/at").card),
    ):  # the texts differ for adversarial training
        hostile = replace(audit, rows=(replace(claimed, model=evil, network=evil, labels=evil, verdict=evil),))
        page = render_audit_page(hostile, read_references(), "audit.png")
        assert "<b>" not in page and "[l](" not in page
        assert page.count("&lt;b&gt;x&lt;/b&gt; \\| [l\\](javascript:e)") >= 6


def test_the_figure_holds_every_number_of_ours_and_of_others(measured):
    registry, root = measured
    references = read_references()
    plan = plan_audit_figure(audit_claims(registry, root), references)
    ours = plan.numbers[plan.numbers["model"] == "mnist/ls095_sigma03"]
    assert dict(zip(ours["number"], ours["percent"], strict=True)) == {
        "paper": 74.02, "same attack": 50.0, "AutoAttack": 50.0, "best known": 0.0,
    }  # fmt: skip
    assert len(set(plan.numbers["model"])) == 1 + len(references) == 7
    plan.paint()


def test_an_audit_without_results_says_so(registry, root):
    page = render(registry, root)
    for part in ("No row has a result.", "No model without adversarial training has a result.", "0 of the 40"):
        assert part in page
    plan_audit_figure(audit_claims(registry, root), read_references()).paint()


@pytest.mark.whole
def test_the_command_writes_three_files_and_notices_each_that_is_stale(root, tmp_path):
    (tmp_path / "docs").mkdir()
    run("table", "audit", cwd=tmp_path)
    assert sorted(p.name for p in (tmp_path / "docs").iterdir()) == ["audit.csv", "audit.md", "audit.png"]
    assert "up to date" in run("table", "audit", "--check", cwd=tmp_path).stdout
    for name in ("audit.csv", "audit.md", "audit.png"):
        file = tmp_path / "docs" / name
        before = file.read_bytes()
        file.write_bytes(b"something else")
        assert "run `robbench table audit`" in run("table", "audit", "--check", cwd=tmp_path, code=1).stderr
        file.write_bytes(before)
    assert "audit takes" in run("table", "audit", "--run", cwd=tmp_path, code=2).stderr
