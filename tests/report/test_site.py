"""`robbench report`: a site that loads nothing, obeys no text of a file, and shows no damaged number."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from html import unescape
from itertools import combinations
from urllib.parse import unquote, urlsplit

import pytest

import robbench as rb
from robbench.certify.interval import CertificateIndex
from robbench.core.errors import RobbenchError, StorageError
from robbench.core.stats import mcnemar, paired_difference
from robbench.core.version import PACKAGE
from robbench.masking.record import read_sanity
from robbench.masking.stored import VerdictIndex
from robbench.report.sheet import draw_sheet
from robbench.report.site import pictures as site_pictures
from robbench.report.site.build import MANIFEST
from robbench.report.site.card import describe_card
from robbench.report.site.compare import collect_pairs
from robbench.report.site.coverage import list_tested, list_untested
from robbench.report.site.page import Html, join, keep_whole, make_path, tag
from robbench.report.site.paper_page import PaperPage, make_paper_page
from robbench.report.site.standing import _find_usual, list_standings
from robbench.report.sweep import build_sweep, write_sweep
from robbench.report.terminal import summarize_result
from robbench.report.verdict import describe_verdict
from robbench.results.reader import read_results
from robbench.results.schema import read_result
from support.commands import run
from support.papers import attack, put, result
from support.site import Page, make_site

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</style></title><svg onload=alert(1)>",
    "<!--<script>",
    "javascript:alert(1)",
    "a\u202eb\u0007c",
    "&lt;b&gt;",
]
STATES = {"r": "robust", "b": "broken", "m": "misclassified"}


def store(root, model, suite, **outcomes):
    """Store a result: attack -> one letter per image, r, b or m."""
    status = {name: [STATES[c] for c in letters] for name, letters in outcomes.items()}
    n = len(next(iter(status.values())))
    attacks = [attack(name, 0, n, kind="pgd", objective="ce", restarts=1) for name in status]
    return put(root, result(model, suite, 0, {}, n=n).model_copy(update={"attacks": attacks}), status)


def standings(root):
    return list_standings(root, read_results(root).results, VerdictIndex(root), CertificateIndex(root))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A site in which every text is hostile."""
    tmp_path = tmp_path_factory.mktemp("hostile")
    root, cards = tmp_path / "results", tmp_path / "cards"
    (cards / "mnist").mkdir(parents=True)
    for i, text in enumerate(HOSTILE):
        text = "".join(c for c in text if c.isprintable())  # names with control characters are refused when read
        name = text.replace("/", "").replace(":", "")
        flags = {"memory": text, text: "It is a name."}
        about = {"attacks": [attack(text, 5, 10, kind=text)]}
        made = result(name, f"s{i}", 5, {}, n=10, flags=flags, hardware=text, date=text)
        put(root, made.model_copy(update=about))
        (cards / "mnist" / f"{name}.toml").write_text(
            f"version = 1\ntitle = {json.dumps(text)}\ndataset = 'mnist'\ndescription = {json.dumps(text)}\n"
            f"licence = {json.dumps(text)}\n[architecture]\nname = {json.dumps(text)}\n",
            encoding="utf-8",
        )
    for name, text in (("x", HOSTILE[0]), ("y", HOSTILE[3])):
        folder = root / "mnist" / name / "quick"
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({text: 1}), encoding="utf-8")
    papers = [PaperPage("p", t, t, [{"Card": t, t: t}], [t], [t]) for t in HOSTILE[:1]]
    pages, _ = make_site(root, tmp_path / "out", cards, papers)
    assert len(pages) == 4 + len(HOSTILE) + 2
    return pages


def test_no_text_of_a_file_becomes_an_element_or_an_attribute(hostile):
    for name, page in hostile.items():
        scripts = [about for tag_name, about in page.elements if tag_name == "script"]
        assert all(about in ({}, {"type": "application/json", "id": "data"}) for about in scripts), name
        assert "<" not in page.inside("script")[0] or len(scripts) == 1, "nothing in data can end its element"
        assert len(scripts) == (2 if name == "compare.html" else 1), name
        for element, about in page.elements:
            assert not [key for key in about if key.startswith("on") or key == "style"], (name, element, about)
            assert "javascript:" not in str(about.get("href")), name
        assert [e for e, _ in page.elements].count("style") == 1
        assert "\u202e" not in page.text and "\u0007" not in page.text
    shown = hostile["index.html"].text
    assert "onmouseover='alert(1)" in shown and "<!--<script>" in shown, "the text itself is shown"
    own = hostile["models/mnist/<!--<script>.html"].text
    assert own.count("<!--<script>") > 5, "card, attacks and flags are on the page of the model"


@pytest.mark.parametrize("text", [*HOSTILE, "<", '"', "'", "&amp;"])
def test_elements_escape_content_and_attributes(text):
    made = tag("p", text, title=text)
    assert not set("<>\"'") & set(made.removeprefix('<p title="').removesuffix("</p>").replace('">', "", 1))
    assert all(c.isprintable() for c in made)
    assert tag("p", Html("<b>")) == "<p><b></p>" and join("<", Html("<b>")) == "&lt;<b>"


def test_spaces_around_text_stay():
    assert tag("p", "a ", tag("b", "c"), " d") == "<p>a <b>c</b> d</p>"


def test_the_policy_allows_the_own_style_and_script_alone(hostile):
    def allow(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    for page in hostile.values():
        (policy,) = [a["content"] for e, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
        rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
        (style,), script = page.inside("style"), page.inside("script")[-1]
        assert rules == {
            "default-src": "'none'",
            "script-src": allow(script),
            "style-src": allow(style),
            "img-src": "'self' file:",
            "form-action": "'self' file:",
            "base-uri": "'none'",
        }
        place = [e for e, _ in page.elements].index
        assert place("meta") < place("style") < place("script")


def test_nothing_outside_the_folder_is_addressed(hostile):
    for page in hostile.values():
        for _, about in page.elements:
            for key in ("href", "src", "action"):
                parts = urlsplit(about.get(key) or "")
                assert not parts.scheme and not parts.netloc and not parts.path.startswith("/")
    for asset in sorted((PACKAGE / "report/site/assets").iterdir()):
        text = asset.read_text(encoding="utf-8")
        found = re.search(r"https?:|url\(|@import|//\w+\.|fetch\(|innerHTML|insertAdjacentHTML|eval\(", text)
        assert not found, (asset.name, found)


def test_every_link_leads_to_a_page(hostile):
    out = hostile["index.html"].path.parent
    keys = {m["key"] for g in collect_pairs(standings(out.parent / "results")) for m in g["models"]}
    seen = 0
    for page in hostile.values():
        ids = {about.get("id") for _, about in page.elements}
        for about in (about for _, about in page.elements if "href" in about):
            path, _, fragment = about["href"].partition("#")
            target = (page.path.parent / unquote(path)).resolve() if path else page.path
            assert target.is_file() and target.is_relative_to(out), about
            assert not fragment or fragment in ids or unquote(fragment) in keys, about
            seen += 1
    assert seen > 50


@pytest.mark.parametrize("name", ["a#b", "a?b", "a%2e", "..a", "a b", "ü"])
def test_names_of_models_are_escaped_in_addresses(tmp_path, name):
    store(tmp_path / "r", name, "whitebox", PGD="rbbb")
    pages, _ = make_site(tmp_path / "r", tmp_path / "out")
    assert f"models/mnist/{name}.html" in pages
    hrefs = [a["href"] for _, a in pages["index.html"].elements if "models" in a.get("href", "")]
    assert hrefs and set(hrefs) == {make_path("models", "mnist", f"{name}.html")}


@pytest.mark.whole
@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("99.0 [97.7, 99.6] / 98.97 (+0.0)", ["[97.7, 99.6] /", "98.97 (+0.0)"]),
        ("– / 99.97 and 5.18 (-5.2)", ["– / 99.97", "5.18 (-5.2)"]),
        ("PGD: PGD-20-xent, APGD-CE-20.", ["PGD-20-xent", "APGD-CE-20."]),
        ("leaves 45.5 % of 200 (p = 0.05), below 1e-20", ["45.5 %", "p = 0.05", "1e-20"]),
        ("robbench eval -m mnist/a --suite paper-mnist, then --json", ["--suite paper-mnist", "--json"]),
        ("robbench eval --suite paper-mnist", ["--suite paper-mnist"]),
        ("<b> [<i>, </i>] & a-" + "b" * 40, ["[<i>, </i>]"]),
        ("", []),
    ],
)
def test_names_intervals_and_units_stay_on_a_line(text, whole):
    html = keep_whole(text)
    found = [unescape(part) for part in re.findall(r'<span class="whole">(.*?)</span>', html)]
    assert found == whole
    assert unescape(re.sub(r'<span class="whole">|</span>', "", html)) == text
    assert "<b>" not in html and "<i>" not in html


def test_a_wide_table_of_a_paper_becomes_two_with_the_same_cells():
    heads = ["α", "Card", "Network", "Iterations", "n", "Train", "Test", *(f"WB-{i}" for i in range(4))]
    heads += ["Worst case", "Its n", "Overestimation", "Verdict"]
    rows = [{h: f"{h} {i}" for h in heads} | {"Card": f"mnist/m{i}"} for i in range(3)]
    page = make_paper_page(PaperPage("p", "A table", "How.", rows, [], []), {"mnist/m1"})
    tables = page.split("<table")[1:]
    assert len(tables) == 2
    columns = [re.findall(r'scope="col"[^>]*><button[^>]*>(.*?)</button>', table) for table in tables]
    assert columns[1] == ["α", "Card", "Network", "Iterations", "n", "Its n", "Overestimation"]
    assert {*columns[0], *columns[1]} == {*heads} and columns[0][:2] == ["α", "Card"]
    assert all(len(c) <= 12 for c in columns) and page.count('href="../models/mnist/m1.html"') == 2
    small = PaperPage("p", "A table", "How.", [dict(list(row.items())[:12]) for row in rows], [], [])
    assert make_paper_page(small, set()).count("<table") == 1


def test_the_command_works_where_torch_is_not_installed(tmp_path, repo):
    for name in ("sanity", "whitebox"):
        shutil.copytree(repo / "results/digits/at" / name, tmp_path / "results/digits/at" / name)
    (tmp_path / "results/figures/digits").mkdir(parents=True)
    (tmp_path / "results/figures/digits/per-class.png").touch()
    code = "import sys; sys.modules['torch'] = None; sys.argv = ['robbench', 'report']\n"
    code += "from robbench.__main__ import run_in_process; sys.exit(run_in_process())"
    made = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    out = tmp_path / "build/report"
    assert made.stdout == f"{len(list(out.rglob('*.html')))} pages. Open build/report/index.html\n"
    mine = tmp_path / "mine"
    shutil.copytree(tmp_path / "results/digits", mine / "digits")
    run("report", cwd=tmp_path, ROBBENCH_RESULTS="mine")
    first = {path.name for path in (mine / "report").iterdir()}
    assert "index.html" in first
    again = run("report", "--results", "mine", cwd=tmp_path)
    assert "Open mine/report/index.html" in again.stdout and {p.name for p in (mine / "report").iterdir()} == first
    assert "amaged" not in run("show", "digits/at", "--results", "mine", cwd=tmp_path).stdout
    page = Page(out / "models/digits/at.html")
    for words in (
        "Not tested",
        "AutoAttack as its authors define it",
        "Adversarial training",
        "trustworthy",
        "APGD-CE",
    ):
        assert words in page.text
    assert len([a for e, a in page.elements if e == "img"]) == 2, "the sheet and a figure"


def test_the_same_results_give_the_same_bytes(tmp_path):
    store(tmp_path / "r", "a", "whitebox", PGD="rrbb")
    store(tmp_path / "r", "a", "fast", Hunt="rbrb")
    store(tmp_path / "r", "b", "whitebox", PGD="brbb")
    made = [make_site(tmp_path / "r", tmp_path / name)[0] for name in ("one", "two")]
    one, two = ({name: page.path.read_bytes() for name, page in pages.items()} for pages in made)
    assert one == two


def test_the_worst_case_is_over_all_suites(tmp_path):
    store(tmp_path, "at", "whitebox", PGD="rrrrbbbbmm")
    store(tmp_path, "at", "fast", Hunt="rrrbrrrrmm")
    store(tmp_path, "at", "quick", FGSM="brrrrrrrmm")
    (s,) = standings(tmp_path)
    assert (s.worst.value, s.clean.value, s.n) == (0.2, 0.8, 10)
    others = {"1 more image by fast", "1 more image by quick"}  # as many each, so that their order is that of the runs
    assert s.source.startswith("whitebox, and ") and {*s.source.removeprefix("whitebox, and ").split(", ")} == others
    assert s.usual == pytest.approx(40) and s.usual_n == 10


def test_the_usual_number_is_of_the_same_images_or_says_its_n():
    usual = [attack("PGD", 4, 10, kind="pgd", objective="ce", restarts=1)]
    base = result("a", "fast", 2, {"Hunt": 2}, 10, selection="first 10 of 99")
    drawn = base.model_copy(update={"attacks": usual, "selection": "10 of 99 drawn with sample seed 1", "run_id": "b"})
    assert _find_usual(base, [drawn]) == (None, 0)
    more = drawn.model_copy(update={"n": 20, "selection": "first 20 of 99", "run_id": "c"})
    assert _find_usual(base, [drawn, more]) == (pytest.approx(40), 20)
    same = drawn.model_copy(update={"selection": base.selection, "run_id": "d"})
    assert _find_usual(base, [drawn, more, same]) == (pytest.approx(40), 10)


def test_other_weights_images_or_threats_do_not_count(tmp_path):
    for changed in ({"eps": "0.2"}, {"identity": {"weights": "e" * 64}}, {"identity": {"data": "f" * 64}}):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        put(root, result("at", "whitebox", 5, {"PGD": 5}, n=10, dataset="mine"))
        put(root, result("at", "fast", 0, {"Hunt": 0}, n=10, dataset="mine", **changed))
        assert sorted(s.worst.value for s in standings(root)) == [0, 0.5]


def test_a_weak_suite_on_more_images_does_not_hide_a_strong_one(tmp_path):
    store(tmp_path, "at", "own-fgsm", FGSM="r" * 150 + "b" * 50)
    store(tmp_path, "at", "autoattack", AA="r" * 10 + "b" * 90)
    (s,) = standings(tmp_path)
    assert s.base.suite == "autoattack" and s.worst.value == 0.1
    store(tmp_path, "at", "quick", FGSM="r" * 10 + "b" * 100)
    (s,) = standings(tmp_path)
    assert s.base.suite == "autoattack", "quick is no base where another suite was run"


def test_what_was_not_tested_is_named(tmp_path):
    path = store(tmp_path, "at", "whitebox", PGD="rb")
    (s,) = standings(tmp_path)
    assert list(list_tested(s)) == ["Gradient steps on cross-entropy (PGD, APGD-CE): PGD."]
    missing = "\n".join(list_untested(s, []))
    for words in ("L2 or L1", "than Linf 0.3.", "margin", "Square", "AutoAttack", "sanity", "certify", "rotation"):
        assert words in missing
    assert "cross-entropy" not in missing and "EOT" not in missing
    shutil.rmtree(path.parent)
    store(tmp_path, "at", "autoattack", PGD="rb")
    (s,) = standings(tmp_path)
    missing = "\n".join(list_untested(s, ["L2 0.5"]))
    assert "AutoAttack" not in missing and "measured in L1" in missing and "Linf 0.3, L2 0.5." in missing


def test_pairs_are_compared_image_by_image(tmp_path):
    store(tmp_path, "a", "whitebox", PGD="rrrrrrbbbm")
    store(tmp_path, "b", "whitebox", PGD="rrbbbbbbrr")
    store(tmp_path, "c", "whitebox", PGD="rb")
    (group,) = collect_pairs(standings(tmp_path))
    assert [m["name"] for m in group["models"]] == ["a", "b", "c"]
    for (first, second), pair in zip(combinations(group["models"], 2), group["pairs"], strict=True):
        both = list(zip(first["robust"], second["robust"], strict=False))
        only = both.count(("1", "0")), both.count(("0", "1"))
        interval = [round(100 * x, 2) for x in paired_difference(*only, len(both))]
        points = round(100 * (only[0] - only[1]) / len(both), 2)
        assert pair == [len(both), *only, both.count(("0", "0")), points, *interval, mcnemar(*only)]


def test_models_on_other_images_are_in_no_pair(tmp_path):
    store(tmp_path, "a", "whitebox", PGD="rb")
    put(tmp_path, result("b", "whitebox", 1, {"PGD": 1}, n=2, identity={"data": "f" * 64}))
    put(tmp_path, result("c", "whitebox", 1, {"PGD": 1}, n=2, eps="0.1"))
    assert collect_pairs(standings(tmp_path)) == []


def damage_number(path):
    path.write_text(path.read_text().replace('"value": 0.5', '"value": 0.75'), encoding="utf-8")


def damage_records(path):
    (path.parent / "outcomes.parquet").write_bytes(b"PAR1")


def damage_all(path):
    path.write_text("{", encoding="utf-8")


@pytest.mark.parametrize("damage", [damage_number, damage_records, damage_all])
def test_a_damaged_result_is_named_and_shows_no_number(tmp_path, damage):
    root = tmp_path / "results"
    store(root, "good", "whitebox", PGD="rrrb")
    path = store(root, "bad", "whitebox", PGD="rrbb")
    write_sweep(build_sweep(root, [read_result(path)]), root)
    pages, notes = make_site(root, tmp_path / "out")
    assert "img" in {e for e, _ in pages["models/mnist/bad.html"].elements} and not notes
    damage(path)
    pages, _ = make_site(root, tmp_path / "out")
    for name in ("index.html", "models/mnist/bad.html"):
        assert "mnist/bad/whitebox: " in pages[name].text and "No number is taken" in pages[name].text
    assert "50.0" not in pages["index.html"].text and "%" not in pages["models/mnist/bad.html"].text
    assert "mnist/bad" not in pages["models/mnist/good.html"].text
    for page in pages.values():
        assert not [e for e, _ in page.elements if e == "img"], "a picture may be drawn from the damaged result"
    assert not list((tmp_path / "out").rglob("*.png"))


def test_a_damaged_verdict_shows_no_picture_of_its_checks(tmp_path, repo):
    root = tmp_path / "results"
    shutil.copytree(repo / "results/digits/natural/sanity", root / "digits/natural/sanity")
    pages, _ = make_site(root, tmp_path / "out")
    page = pages["models/digits/natural.html"]
    assert "trustworthy" in page.text and "Evidence of the verdict" in page.text and "sheet" in str(page.elements)
    path = root / "digits/natural/sanity/sanity.json"
    path.write_text(path.read_text().replace('"verdict": "trustworthy"', '"verdict": "masked"'), encoding="utf-8")
    pages, _ = make_site(root, tmp_path / "out")
    page = pages["models/digits/natural.html"]
    assert "damaged" in page.text and "sheet.png" not in str(page.elements)
    assert "trustworthy" not in page.text.replace("'trustworthy'", ""), "the reason alone has the word"
    assert "verdict masked" not in str(page.elements) and "Evidence of the verdict" not in page.text


def test_no_picture_of_the_tree_is_shown(tmp_path, repo):
    """What is shown is drawn from numbers that are vouched for. What stands in its place in the tree is not read."""
    root = tmp_path / "results"
    shutil.copytree(repo / "results/digits/natural/sanity", root / "digits/natural/sanity")
    for suite in ("quick", "whitebox"):
        shutil.copytree(repo / f"results/digits/natural/{suite}", root / f"digits/natural/{suite}")
    write_sweep(build_sweep(root, [read_result(root / "digits/natural/quick/result.json")]), root)
    names = [f"figures/digits/{name}.png" for name in ("accuracy-eps", "accuracy-steps", "per-class")]
    names += ["digits/natural/sanity/sheet.png", "digits/natural/quick@sweep-Linf.png"]
    (root / "figures/digits").mkdir(parents=True)
    (root / names[0]).touch()
    (root / names[1]).symlink_to("/etc/hostname")
    os.mkfifo(root / names[2])
    pages, notes = make_site(root, tmp_path / "out")
    before = [(tmp_path / "out/pictures" / name).read_bytes() for name in names]
    assert not notes and before[4] == (root / names[4]).read_bytes()
    for name in ("at", "natural"):  # a picture of another model, and one that nothing asked for
        (root / f"digits/natural/{name}.png").write_bytes((repo / "results/digits/at/sanity/sheet.png").read_bytes())
    for name in (names[0], *names[3:]):
        shutil.copy(repo / "results/digits/at/sanity/sheet.png", root / name)
    pages, notes = make_site(root, tmp_path / "out")
    assert before == [(tmp_path / "out/pictures" / name).read_bytes() for name in names] and not notes
    shown = [unquote(a["src"]) for e, a in pages["models/digits/natural.html"].elements if e == "img"]
    assert sorted(shown) == sorted(f"../../pictures/{name}" for name in names)


def test_a_landscape_without_a_digest_is_not_drawn(tmp_path, repo):
    stored = read_sanity(repo / "results/digits/natural/sanity/sanity.json")
    file = stored.model_copy(update={"landscape": ""})
    sheets = {draw_sheet(file, repo / f"results/digits/{name}/sanity/landscape.parquet") for name in ("natural", "at")}
    assert len(sheets) == 1, "an exchanged one would not be noticed"
    sealed = file.model_copy(update={"landscape": "0" * 64})
    assert draw_sheet(sealed, repo / "results/digits/natural/sanity/landscape.parquet") not in sheets


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ("run_id,n\n{0},9\n" + "0" * 64 + ",9", "damaged or not here"),
        ("run_id,n\n,9", "damaged or not here"),
        ("run_id,n\n{0},9\n{1},9", "of different runs"),
        ("run_id\n{0}", "is no sweep"),
        ("", "is no sweep"),
    ],
)
def test_a_sweep_that_does_not_follow_from_results_is_named(tmp_path, rows, reason):
    root = tmp_path / "results"
    ids = [read_result(store(root, "at", suite, PGD="rrb")).run_id for suite in ("whitebox", "quick")]
    path = root / "mnist/at/whitebox@sweep-Linf.csv"
    path.write_text(rows.format(*ids), encoding="utf-8")
    pages, notes = make_site(root, tmp_path / "out")
    assert len(notes) == 1 and reason in notes[0] and "whitebox@sweep-Linf.csv" in notes[0]
    assert "img" not in [e for e, _ in pages["models/mnist/at.html"].elements] and path.exists()


def test_pages_of_an_older_report_are_removed_and_other_files_stay(tmp_path):
    root, out = tmp_path / "results", tmp_path / "out"
    path = store(root, "old", "whitebox", PGD="rb")
    store(root, "at", "whitebox", PGD="rb")
    pages, _ = make_site(root, out)
    assert "models/mnist/old.html" in pages
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    shutil.rmtree(path.parents[1])
    pages, _ = make_site(root, out)
    assert "models/mnist/old.html" not in pages and (out / "notes.txt").exists()


def test_a_folder_that_is_no_report_is_left_alone(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "index.html").write_text("mine", encoding="utf-8")
    with pytest.raises(RobbenchError, match="has files and is no report"):
        make_site(tmp_path / "results", out)
    assert [p.name for p in out.iterdir()] == ["index.html"]


@pytest.mark.parametrize("line", ["../precious", "a/../../precious", "ABSOLUTE"])
def test_a_list_of_files_cannot_remove_a_file_outside(tmp_path, line):
    out, precious = tmp_path / "out", tmp_path / "precious"
    out.mkdir()
    precious.write_text("mine", encoding="utf-8")
    (out / MANIFEST).write_text(line.replace("ABSOLUTE", str(precious)), encoding="utf-8")
    with pytest.raises(RobbenchError, match="is no file of a report"):
        make_site(tmp_path / "results", out)
    assert precious.exists()


@pytest.mark.parametrize("name", ["index.html", "models", MANIFEST])
def test_nothing_is_written_through_a_link(tmp_path, name):
    root, out, other = tmp_path / "results", tmp_path / "out", tmp_path / "other"
    store(root, "at", "whitebox", PGD="rb")
    make_site(root, out)
    (out / name).rename(other)
    (out / name).symlink_to(other)
    before = other.read_bytes() if other.is_file() else sorted(p.stat().st_mtime_ns for p in other.rglob("*"))
    with pytest.raises(StorageError, match="is a link"):
        make_site(root, out)
    assert before == (other.read_bytes() if other.is_file() else sorted(p.stat().st_mtime_ns for p in other.rglob("*")))


def test_an_empty_tree_says_how_to_make_a_result(tmp_path):
    (tmp_path / "results").mkdir()
    pages, _ = make_site(tmp_path / "results", tmp_path / "out")
    assert "robbench eval --model digits/natural" in pages["index.html"].text
    assert sorted(pages) == ["compare.html", "index.html", "tables.html"]


def test_cards_are_told_in_words(repo, tmp_path):
    from robbench.models.card import Registry

    registry = Registry([repo / "models"])
    told = " ".join(describe_card(registry, "digits/ls095_sigma03", {"0" * 64}))
    for words in ("Label smoothing, α 0.95.", "σ 0.3.", "of other weights", "Trained here for 4,000", "Licence: MIT."):
        assert words in told
    assert describe_card(registry, "digits/none", set()) == ["The model has no card here."]
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits/x.toml").write_text("version = 7", encoding="utf-8")
    (told,) = describe_card(Registry([tmp_path]), "digits/x", set())
    assert told.startswith("The card is damaged: ")


def test_runs_with_a_target_are_no_part_of_the_worst_case(tmp_path):
    plain = rb.evaluate("digits/natural", "quick", samples=20, results=tmp_path)
    other = rb.evaluate("digits/natural", "quick", samples=40, target="next", results=tmp_path)
    assert other.robust_accuracy.value > plain.robust_accuracy.value
    (standing,) = standings(tmp_path)
    assert standing.n == 20 and standing.worst.value == plain.robust_accuracy.value
    assert "Linf 0.2, target next" in summarize_result(other, "unchecked")
    assert VerdictIndex(tmp_path).find(other) == "unchecked"


def test_runs_with_levels_are_no_part_of_the_worst_case(tmp_path):
    rb.evaluate("digits/natural", "quick", samples=20, results=tmp_path)
    other = rb.evaluate("digits/natural", "quick", samples=40, levels=255, results=tmp_path)
    (standing,) = standings(tmp_path)
    assert standing.n == 20 and ", 255 levels" in summarize_result(other, "unchecked")


def test_attacks_on_predicted_classes_are_named_where_they_ran(tmp_path):
    rb.evaluate("digits/natural", [rb.attacks.RayS(steps=20)], samples=4, eps=0.2, results=tmp_path)
    (standing,) = standings(tmp_path)
    family = "From predicted classes alone (RayS, HopSkipJump)"
    assert any(line.startswith(family) for line in list_tested(standing))
    assert not any(line.startswith(family) for line in list_untested(standing, []))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"data": "e" * 64}, ("images all 3", "images all 2", "data eeeeeeee", "data dddddddd")),
        ({"weights": "f" * 64}, ("weights ffffffff", "weights dddddddd")),
        ({"dtype": "torch.float64"}, ("dtype torch.float64", "dtype None")),
    ],
)
def test_two_blocks_of_one_threat_say_what_they_are_of(tmp_path, changed, words):
    root, first = tmp_path / "results", {"weights": "d" * 64, "data": "d" * 64}
    put(root, result("a", "whitebox", 1, {"PGD": 1}, n=2, dataset="mine", identity=first))
    put(root, result("a", "fast", 2, {"PGD": 2}, n=3, dataset="mine", identity=first | changed))
    found = standings(root)
    assert len(found) == 2 and all(any(word in s.title for s in found) for word in words)
    pages, _ = make_site(root, tmp_path / "out")
    for name in ("models/mine/a.html", "index.html"):
        assert all(word in pages[name].text for word in words), name
    headings = [text for text in pages["models/mine/a.html"].inside("h2") if text.startswith("Linf")]
    assert len(headings) == len(set(headings)) == 8, "each block has headings of its own"
    names = [model["name"] for group in collect_pairs(found) for model in group["models"]]
    assert len(names) == len(set(names))


def test_one_block_says_no_more_than_its_threat(tmp_path):
    store(tmp_path / "results", "a", "whitebox", PGD="rb")
    (found,) = standings(tmp_path / "results")
    assert found.apart == "" and found.title == found.threat == "Linf 0.3"
    pages, _ = make_site(tmp_path / "results", tmp_path / "out")
    assert "Verdict on the number of the usual PGD" in pages["models/mnist/a.html"].text
    assert describe_verdict("unchecked") in pages["models/mnist/a.html"].text


def test_a_figure_that_cannot_be_drawn_is_named_and_the_pages_stay(tmp_path, monkeypatch):
    """A tree may hold any file of the name of a figure. The gallery needs torch, which the report does not."""
    root = tmp_path / "results"
    store(root, "at", "whitebox", PGD="rb")
    (root / "figures/mnist").mkdir(parents=True)
    for name in ("accuracy-steps", "gallery"):
        (root / f"figures/mnist/{name}.png").touch()

    def make(*given):
        raise ModuleNotFoundError("no module", name="torch")

    monkeypatch.setitem(site_pictures._FIGURES, "gallery", (make, "Images"))
    pages, notes = make_site(root, tmp_path / "out")
    text = " ".join(notes)
    assert "figures/mnist/accuracy-steps.png: nothing is stored to draw it from" in text
    assert "figures/mnist/gallery.png: torch is not installed here" in text and len(notes) == 2
    assert "img" not in [e for e, _ in pages["models/mnist/at.html"].elements]
