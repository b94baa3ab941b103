"""The papers' tables: what each holds, which results fill it, what is said where there is none, and safe text."""

import csv
import io
import json
import re
import tomllib
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from markdown_it import MarkdownIt

from robbench.core.errors import ResultError
from robbench.models.card import Registry
from robbench.models.families import read_table
from robbench.papers.audit import audit_claims
from robbench.papers.layout import FORMATS, Commands, render_table
from robbench.papers.published import TABLES, find_table, read_paper_rows
from robbench.papers.tables import fill_table
from robbench.results.summary import make_accuracy
from robbench.suite import load_suite
from support.papers import SHA, attack, line_of, put, result

HOSTILE = (
    "<script>alert(1)</script> | `x` $\\input{/etc/passwd}$ & _b_ **c** [d](javascript:e) ![f](g) %h #i ~j^k\n## l\x1b"
)
PRINTABLE = "".join(c for c in HOSTILE if c.isprintable())  # no other name of an attack or title of a card can be read


PAPER_MNIST = {"WB-PGD-40-xent": 740, "WB-PGD-40-CW": 760, "BB-FGSM-CW": 900, "BB-PGD-40-CW": 880}


# ---- what the tables hold


@pytest.mark.parametrize(("excerpt", "whole"), [("2", "5"), ("3", "6"), ("4", "7")])
def test_excerpts_agree_with_the_complete_tables(excerpt, whole):
    rows = read_table(TABLES[f"shafahi2019-{excerpt}"].csv)
    complete = read_table(TABLES[f"shafahi2019-{whole}"].csv)
    assert 8 <= len(rows) < len(complete)
    assert all(row in complete for row in rows)


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda t: t.id)
def test_every_row_has_one_card_and_every_column_an_attack(table):
    rows = read_paper_rows(table, Registry.default().entries())
    mine = [
        row for row in rows if row.dataset != "cifar100" and "ALP" not in row.labels[0] and row.labels[0] != "50% AT"
    ]
    assert [len(row.cards) for row in mine] == [1] * len(mine)
    assert len({row.cards[0].full_name for row in rows if row.cards}) == sum(bool(row.cards) for row in rows)
    for row in rows:
        names = {s.name for s in load_suite(table.suite).stages(row.dataset)}
        assert {name for c in table.columns for name in c.attacks or ()} <= names
        for column in table.columns:
            for dataset, attacks in column.on.items():
                assert set(attacks) <= {s.name for s in load_suite(table.suite).stages(dataset)}


def test_rows_that_the_paper_has_twice_have_a_card_each():
    rows = read_paper_rows(TABLES["shafahi2019-5"], Registry.default().entries())
    twice = [row for row in rows if row.labels == ("0", "0", "0.3", "400k")]
    assert [row.cards[0].name for row in twice] == ["sigma03", "sigma03_seed1"]


def test_the_excerpts_of_the_wide_networks_also_know_the_small_ones():
    rows = read_paper_rows(TABLES["shafahi2019-4"], Registry.default().entries())
    assert [c.name for c in rows[0].cards] == ["ls095_sigma20_wrn28_10"]
    assert [c.name for c in rows[0].others] == ["ls095_sigma20"]


def test_a_number_alone_is_a_table_of_shafahi_and_unknown_ones_are_told():
    assert find_table("1").id == "shafahi2019-1" and find_table("7") is TABLES["shafahi2019-7"]
    with pytest.raises(ResultError, match="Did you mean shafahi2019-7"):
        find_table("shafahi2019-77")


# ---- what fills them


def test_our_figure_the_papers_the_difference_and_the_worst_case(cards, tmp_path):
    registry, root = cards("ls095_sigma03", "natural"), tmp_path / "results"
    put(root, result("ls095_sigma03", "paper-mnist", 735, PAPER_MNIST, judge="final"))
    put(root, result("ls095_sigma03", "whitebox", 90, {"PGD-40-xent": 500, "APGD-DLR": 120}, flags={"x": "Y."}))
    put(root, result("ls095_sigma03", "quick", 9, {"FGSM-xent": 9}, n=900))  # the other 100 images may be the easy ones
    line = line_of(fill_table(TABLES["shafahi2019-5"], registry, root), "mnist/ls095_sigma03")
    assert (line.labels, line.network, line.trained, line.n) == (
        ("0.95", "0", "0.3", "400k"),
        "madry_mnist",
        "elsewhere",
        1000,
    )
    train, test, xent, cw, *_ = line.cells
    assert train.ours is None and train.paper.text == "99.99"
    assert test.ours.value == 0.99 and test.difference == pytest.approx(99.0 - 99.44)
    assert (xent.ours, xent.difference) == (make_accuracy(740, 1000), pytest.approx(74.0 - 74.02))
    assert cw.paper.value == 75.46
    assert (line.worst.suite, line.worst.attack.name, line.worst.n) == ("whitebox", "APGD-DLR", 1000)
    assert line.worst.accuracy == make_accuracy(90, 1000)
    assert not line.missing.runs


def test_only_results_on_the_weights_of_the_card_at_its_radius_count(cards, tmp_path):
    registry, root = cards("ls095_sigma03", "natural"), tmp_path / "results"
    put(root, result("ls095_sigma03", "paper-mnist", 735, PAPER_MNIST, identity={"weights": "e" * 64}))
    put(root, result("ls095_sigma03", "whitebox", 1, {"APGD-CE": 1}, eps="0.4", overrides={"eps": "0.4"}))
    sheet = fill_table(TABLES["shafahi2019-2"], registry, root)
    line = line_of(sheet, "mnist/ls095_sigma03")
    assert line.n is None and line.worst is None and all(cell.ours is None for cell in line.cells)
    assert list(Commands().list_commands(line.missing)) == [
        "robbench eval -m mnist/ls095_sigma03 --suite paper-mnist --overwrite",
        "robbench eval -m mnist/ls095_sigma03 --suite whitebox",
    ]
    assert [(run.model, run.suite) for run in sheet.list_possible_runs(registry)] == [
        ("mnist/ls095_sigma03", "paper-mnist"),
        ("mnist/ls095_sigma03", "whitebox"),
    ]


@pytest.mark.parametrize(("key", "value"), [("target", "next"), ("levels", 255)])
def test_what_does_not_ask_for_every_break_is_no_worst_case(cards, tmp_path, key, value):
    registry, root = cards("ls095_sigma03", "natural"), tmp_path / "results"
    about = {"weights": SHA["ls095_sigma03"], key: value}
    wanted = result("ls095_sigma03", "whitebox", 3, {}, 4, overrides={key: str(value)}, identity=about)
    put(root, wanted.model_copy(update={"attacks": [attack("APGD-CE", 3, 4)]}), {"APGD-CE": ["robust"] * 4})
    sheet = fill_table(TABLES["shafahi2019-5"], registry, root)
    line = line_of(sheet, "mnist/ls095_sigma03")
    assert line.worst is None and [run.suite for run in line.missing.runs] == ["paper-mnist", "whitebox"]
    assert not audit_claims(registry, root).rows


def test_a_result_made_with_another_surrogate_does_not_count(cards, tmp_path):
    registry, root = cards("ls095_sigma03", "natural"), tmp_path / "results"
    config = {"kind": "transfer", "surrogate": "mnist/natural"}
    for weights, n in (("f" * 64, None), (SHA["natural"], 1000)):
        about = config | {"surrogate_weights": weights}
        columns = [attack(name, left, **(about if name.startswith("BB") else {})) for name, left in PAPER_MNIST.items()]
        place = root / weights[:1]
        put(place, result("ls095_sigma03", "paper-mnist", 735, {}).model_copy(update={"attacks": columns}))
        assert line_of(fill_table(TABLES["shafahi2019-2"], registry, place), "mnist/ls095_sigma03").n == n


def test_commands_train_first_what_has_no_weights(cards, tmp_path):
    registry = cards("ls095_sigma03")
    sheet = fill_table(TABLES["shafahi2019-2"], registry, tmp_path / "results")
    here = Commands([tmp_path / "my models"], tmp_path / "elsewhere")
    ending = f" --models '{tmp_path}/my models'"
    assert list(here.list_commands(line_of(sheet, "mnist/lsq2_sigma03").missing)) == [
        f"robbench train mnist/natural{ending}",
        f"robbench train mnist/lsq2_sigma03{ending}",
        f"robbench eval -m mnist/lsq2_sigma03 --suite paper-mnist{ending} --results {tmp_path}/elsewhere",
        f"robbench eval -m mnist/lsq2_sigma03 --suite whitebox{ending} --results {tmp_path}/elsewhere",
    ]
    # Its own weights are there, the surrogate's are not: only the white-box suite can run now.
    possible = [(run.model, run.suite) for run in sheet.list_possible_runs(registry)]
    assert possible == [("mnist/ls095_sigma03", "whitebox")]


def test_unshipped_weights_are_named_and_trained_first_unless_they_are_here(cards, tmp_path):
    registry, root = cards("ls095_sigma03", "natural"), tmp_path / "results"
    path = registry.find("mnist/ls095_sigma03").path
    path.write_text(path.read_text().replace("shipped = true", "shipped = false"))
    registry = Registry(registry.roots)
    put(root, result("ls095_sigma03", "paper-mnist", 735, PAPER_MNIST))
    sheet = fill_table(TABLES["shafahi2019-2"], registry, root)
    note = f"these SHA-256): mnist/ls095_sigma03 {SHA['ls095_sigma03'][:12]}."
    assert note in sheet.notes[-1]
    commands = list(Commands().list_commands(line_of(sheet, "mnist/ls095_sigma03").missing))
    assert commands == ["robbench train mnist/ls095_sigma03", "robbench eval -m mnist/ls095_sigma03 --suite whitebox"]
    assert sheet.list_possible_runs(registry) == []
    weights = registry.roots[0] / "weights" / "x.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"")
    here = fill_table(TABLES["shafahi2019-2"], registry, root)
    assert here == sheet  # a table does not depend on the machine
    assert [run.suite for run in here.list_possible_runs(registry)] == ["whitebox"]


def test_the_surrogate_itself_and_flags_are_noted(cards, tmp_path):
    registry, root = cards("at"), tmp_path / "results"
    put(
        root,
        result("at", "paper-cifar10", 700, {"BB-FGSM-CW": 700}, dataset="cifar10", eps="8/255", flags={"dead": "Z."}),
    )
    sheet = fill_table(TABLES["shafahi2019-7"], registry, root)
    assert any("cifar10/at is the surrogate" in note for note in sheet.notes)
    assert "cifar10/at, suite paper-cifar10: dead: Z." in sheet.notes
    assert [cell.ours is None for cell in line_of(sheet, "cifar10/at").cells] == [True] * 5 + [False]


def test_an_accuracy_under_two_attacks_is_read_from_the_records(cards, tmp_path):
    registry, root = cards("st_resnet18"), tmp_path / "results"
    found = result(
        "st_resnet18", "whitebox", 1, {"APGD-CE": 2, "APGD-DLR": 2, "FGSM-CW": 3}, n=4, dataset="cifar10", eps="8/255"
    )
    path = put(
        root,
        found,
        {
            "APGD-CE": ["misclassified", "broken", "robust", "robust"],
            "APGD-DLR": ["misclassified", "robust", "broken", "robust"],
            "FGSM-CW": ["misclassified", "robust", "robust", "broken"],  # not a part of the paper's column
        },
    )
    line = line_of(fill_table(TABLES["seguin2021-1"], registry, root), "cifar10/st_resnet18")
    assert line.cells[1].ours == make_accuracy(1, 4)
    assert line.cells[1].paper.text == "0.00 ± 0.00"
    assert not line.missing.runs
    path.write_text(path.read_text().replace('"n": 4', '"n": 5'))
    sheet = fill_table(TABLES["seguin2021-1"], registry, root)
    assert line_of(sheet, "cifar10/st_resnet18").n is None
    assert any(note.startswith("cifar10/st_resnet18/whitebox: damaged: ") for note in sheet.notes)


def test_a_row_without_a_card_says_so(tmp_path):
    sheet = fill_table(TABLES["seguin2021-1"], Registry.default(), tmp_path)
    bare = [line for line in sheet.rows if not line.model]
    assert [line.labels[1] for line in bare] == ["cifar100", "cifar100"]
    assert "no card" in bare[0].missing.reason and "no card" in render_table(sheet, "markdown", Commands())


def test_rows_of_another_data_set_have_no_difference_and_the_worst_case_fills_its_column(repo):
    sheet = fill_table(TABLES["mosbach2018"], Registry.default(), repo / "results")
    plain, here = line_of(sheet, "mnist/natural"), line_of(sheet, "digits/clp05_sigma03")
    assert plain.cells[1].difference == pytest.approx(100 * plain.cells[1].ours.value - 0.0)
    assert [cell.difference for cell in here.cells] == [None] * 3
    assert here.cells[1].ours is not None, "PGD has another name on digits"
    assert here.cells[2].ours == here.worst.accuracy and here.cells[2].paper.value == 4.1
    text = render_table(sheet, "markdown", Commands())
    assert text.startswith("# Mosbach et al. 2018: logit pairing")
    assert re.search(r"\| CLP .* 32\.5 \[26\.4, 39\.3\] / 62\.4 +\|", text)


def test_numbers_of_a_paper_that_we_lack_are_left_empty(repo):
    sheet = fill_table(TABLES["goibert2019"], Registry.default(), repo / "results")
    assert [line.labels[0] for line in sheet.rows] == ["no smoothing"] * 2 + ["SLS"] * 2 + ["ALS", "BLS", "SBLS"]
    rows = list(csv.DictReader(io.StringIO(render_table(sheet, "csv", Commands()))))
    assert {row["BIM paper"] for row in rows} == {""} == {row["BIM difference"] for row in rows}
    assert all(float(row["BIM"]) >= 0 for row in rows)
    assert " / – |" in re.sub(" +", " ", render_table(sheet, "markdown", Commands()))


# ---- as text


@pytest.fixture
def filled(cards, tmp_path):
    root = tmp_path / "results"
    registry = cards("ls095_sigma03", "natural")
    put(root, result("ls095_sigma03", "paper-mnist", 735, PAPER_MNIST))
    put(root, result("ls095_sigma03", "whitebox", 90, {"PGD-40-xent": 500, "APGD-DLR": 120}))
    return lambda: fill_table(TABLES["shafahi2019-2"], registry, root)


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_results_give_the_same_bytes(filled, kind):
    first = render_table(filled(), kind, Commands())
    assert first == render_table(filled(), kind, Commands()) and first.endswith("\n")
    for part in ("74.0", "74.02", "APGD-DLR", "paper-mnist"):
        assert part in first, part


def test_markdown_and_terminal_show_both_figures_and_the_commands(filled):
    text = render_table(filled(), "markdown", Commands())
    assert "| 74.0 [71.2, 76.6] / 74.02 (+0.0) |" in re.sub(" +", " ", text)
    assert "whitebox: APGD-DLR 12.0" in text and "9.0 [7.4, 10.9]" in text
    assert "`robbench train mnist/lsq2`, then `robbench eval -m mnist/lsq2 --suite paper-mnist`" in text
    shown = render_table(filled(), "terminal", Commands())
    assert "74.0 [71.2, 76.6]" in shown and "74.02 (+0.0)" in shown and "robbench train mnist/lsq2 &&" in shown
    assert (
        max(map(len, render_table(filled(), "terminal", Commands(), width=120).split("Percent")[0].splitlines())) <= 120
    )


def test_csv_has_numbers_in_columns_of_their_own(filled):
    rows = list(csv.DictReader(io.StringIO(render_table(filled(), "csv", Commands()))))
    row = next(r for r in rows if r["card"] == "mnist/ls095_sigma03")
    assert (row["α"], row["n"], row["WB-PGD-40-xent"], row["WB-PGD-40-xent paper"]) == (
        "0.95",
        "1000",
        "74.00",
        "74.02",
    )
    assert row["WB-PGD-40-xent difference"] == "-0.02" and float(row["WB-PGD-40-xent low"]) == pytest.approx(
        71.19, abs=0.01
    )
    assert (row["worst case"], row["strongest suite"], row["lowest attack"]) == ("9.00", "whitebox", "APGD-DLR")
    assert row["missing"] == "" and row["Train"] == ""


def test_an_unknown_format_is_refused(filled):
    with pytest.raises(ResultError, match="Did you mean latex"):
        render_table(filled(), "latx", Commands())


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.seen, self.text = set(), ""

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)

    def handle_data(self, data):
        self.text += data


def tags(page):
    parser = Tags()
    parser.feed(page)
    return parser


@pytest.fixture
def hostile(cards, tmp_path):
    """A table in which everything that others wrote is an attempt to be markup."""
    registry, root = cards(without=("ls095_sigma03",)), tmp_path / "results"
    text = (Registry.default().find("mnist/ls095_sigma03").path).read_text(encoding="utf-8")
    text = re.split(r"\n\[(?:weights|trained)\]", text)[0]
    quoted = "".join(f"\\u{ord(c):04x}" for c in HOSTILE)
    trained = {"iterations": 9, "seconds": 1.0, "hardware": "", "versions": "", "date": "", "seed": 0}
    text = re.sub(r"title = .*", lambda _: f"title = {json.dumps(PRINTABLE)}", text, count=1)
    text += f'\n[weights]\npath = "x"\nsha256 = "{"d" * 64}"\n[trained]\ninstead = "{quoted}"\n'
    text += "".join(f"{k} = {v!r}\n" for k, v in trained.items())
    card = tomllib.loads(text)
    assert card["title"] == PRINTABLE and card["trained"]["instead"] == HOSTILE
    name = "a`b|c$d&e<i>[f](g)_h_"
    (registry.roots[0] / "mnist" / f"{name}.toml").write_text(text, encoding="utf-8")
    put(root, result(name, "whitebox", 90, {PRINTABLE: 120}, flags={HOSTILE: HOSTILE}))
    return fill_table(TABLES["shafahi2019-2"], Registry([registry.roots[0]]), root)


def test_html_holds_no_markup_of_others(hostile):
    page = tags(render_table(hostile, "html", Commands()))
    assert page.seen == {
        "html", "meta", "title", "style", "h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li",
        "code",
    }  # fmt: skip
    assert "<script>alert(1)</script>" in page.text and "\x1b" not in page.text


def test_markdown_holds_no_markup_of_others(hostile):
    text = render_table(hostile, "markdown", Commands())
    page = tags(MarkdownIt("commonmark").enable("table").render(text))
    assert page.seen == {"h1", "h2", "p", "table", "thead", "tbody", "tr", "th", "td", "ul", "li", "code"}
    assert "<script>alert(1)</script> | `x` $\\input" in page.text
    assert page.text.count("a`b|c$d&e<i>[f](g)_h_") >= 2  # in the table, and whole in a command


def test_latex_holds_no_commands_of_others(hostile):
    text = render_table(hostile, "latex", Commands())
    allowed = {
        "begin", "end", "caption", "toprule", "midrule", "bottomrule", "item", "texttt", "textbackslash", "usepackage",
        "textasciitilde", "textasciicircum", "textless", "textgreater", "textasciigrave", "alpha", "beta", "sigma",
        "pm", "cdot",
    }  # fmt: skip
    body = text.split("\n", 1)[1]
    assert set(re.findall(r"\\([A-Za-z]+)", body)) <= allowed
    bare = re.sub(r"\\[\\&%$#_{}]", "", re.sub(r"\$\\(alpha|beta|sigma|pm|cdot)\$", "", body))
    assert not set("$%#_^~") & set(bare)
    rows = [line for line in body.splitlines() if line.endswith(r"\\")]
    assert len({re.sub(r"\\&", "", row).count("&") for row in rows}) == 1
    assert bare.count("{") == bare.count("}")


def test_a_spreadsheet_finds_no_formula(hostile):
    rows = list(csv.DictReader(io.StringIO(render_table(hostile, "csv", Commands()))))
    assert len({len(row) for row in rows}) == 1
    line = hostile.rows[0]
    worst = line_of(hostile, "mnist/a`b|c$d&e<i>[f](g)_h_").worst
    formula = replace(worst, attack=worst.attack.model_copy(update={"name": '=HYPERLINK("x")'}))
    sheet = replace(hostile, rows=(replace(line, worst=formula),))
    (row,) = csv.DictReader(io.StringIO(render_table(sheet, "csv", Commands())))
    assert row["lowest attack"] == '\'=HYPERLINK("x")'


def test_a_terminal_gets_no_control_characters(hostile):
    text = render_table(hostile, "terminal", Commands())
    assert "\x1b" not in text and "alert(1)" in text
