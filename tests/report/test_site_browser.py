"""`robbench report` in headless Chromium, opened from file://."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from robbench.models.card import Registry, locate_builtin_cards
from robbench.report.site.build import write_site
from robbench.report.site.paper_page import PaperPage

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (extra: browser)")
CHROMIUM = shutil.which("chromium")
AXE = os.environ.get("ROBBENCH_AXE", "")  # path of axe.min.js, the accessibility checker; it is not in the repository
OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PAGES = ["index.html", "models/digits/at.html", "compare.html", "tables.html", "tables/p.html", "tables/wide.html"]
pytestmark = [pytest.mark.whole, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site of two models of this repository, under two radii."""
    folder = tmp_path_factory.mktemp("site")
    results = Path(__file__).resolve().parents[2] / "results"
    for model in ("at", "ls095_sigma03"):
        for path in results.glob(f"digits/{model}/*"):
            if path.name in ("whitebox", "sanity", "fast") or path.name.startswith("quick"):
                copy = shutil.copytree if path.is_dir() else shutil.copy
                (folder / "results/digits" / model).mkdir(parents=True, exist_ok=True)
                copy(path, folder / "results/digits" / model / path.name)
    rows = [{"Card": "digits/at", "Paper": "51.2", "Ours": "49.9 [46.7, 53.2]", "n": "899"}] * 2
    name = "mnist/lsq05_sigma05_100k"
    wide = {"α": "0", "β": "0.5", "σ": "0.5", "k": "400k", "Card": name, "Network": "madry_mnist", "n": "500"}
    wide |= {"Iterations": "25,000 of 100,000; see lsq05_sigma05", "Train": "– / 99.83"}
    attacks = ("Test", "WB-PGD-20-rand-xent", "WB-PGD-20-rand-CW", "WB-FGSM-xent", "WB-FGSM-CW")
    wide |= dict.fromkeys(attacks, "73.6 [69.6, 77.3] / 85.91 (-12.3)") | {"Worst case": "0.0 [0.0, 0.8]"}
    wide |= {"Strongest suite: its lowest": "fast: PGD-40-scaled 0.0", "Its n": "500", "Overestimation": "12.3 points"}
    papers = [
        PaperPage("p", "A table", "How to read it.", rows, ["A note."], ["robbench eval"]),
        PaperPage("wide", "A wide table", "How to read it.", [wide | {"Verdict": "suspicious"}] * 2, [], []),
    ]
    write_site(folder / "results", folder / "out", Registry([locate_builtin_cards()]), papers, pytest.fail)
    return folder / "out"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with playwright.sync_playwright() as p:
        profile = tmp_path_factory.mktemp("profile")
        context = p.chromium.launch_persistent_context(
            profile, executable_path=CHROMIUM, headless=True, chromium_sandbox=False, args=OPTIONS
        )
        yield context
        context.close()


@pytest.fixture
def page(browser, site):
    """A page that fails the test if anything is on its console, or it asks for anything outside the folder."""
    page, wrong = browser.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("request", lambda r: None if r.url.startswith(site.as_uri()) else wrong.append(r.url))
    page.set_default_timeout(10_000)
    page.goto(f"{site.as_uri()}/index.html")
    page.evaluate("localStorage.clear()")
    page.reload()
    yield page
    page.close()
    assert not wrong


def show(page, column):
    """Return the cells of a column in the rows that are shown."""
    rows = page.locator("table.sortable tbody tr:visible")
    return rows.locator(f'[data-label="{column}"]').all_inner_texts()


def first_numbers(page, column):
    return [float(re.search(r"\d+(\.\d+)?", text)[0]) for text in show(page, column)]


def test_sort(page):
    page.check("#filter-quick")
    head = page.get_by_role("columnheader", name="Worst case")
    for state, turned in (("descending", True), ("ascending", False)):
        head.get_by_role("button").press("Enter")  # with the keyboard
        assert head.get_attribute("aria-sort") == state
        numbers = first_numbers(page, "Worst case")
        assert len(numbers) == 10 and numbers == sorted(numbers, reverse=turned) and numbers[0] != numbers[-1]
    page.get_by_role("columnheader", name="Model").get_by_role("button").click()
    assert show(page, "Model") == sorted(show(page, "Model")) and head.get_attribute("aria-sort") is None


def test_filter(page):
    assert len(show(page, "Model")) == 2 and page.inner_text("#count") == "2 of 10 rows"
    page.check("#filter-quick")
    assert page.inner_text("#count") == "10 of 10 rows"
    page.select_option("#filter-threat", "Linf 0.1")
    assert set(show(page, "Threat")) == {"Linf 0.1"} and len(show(page, "Model")) == 2
    page.fill("#filter-text", "SIGMA digits")
    assert len(show(page, "Model")) == 1
    page.fill("#filter-text", "nothing like this")
    assert show(page, "Model") == [] and page.inner_text("#count") == "0 of 10 rows"


def test_find_a_model_from_any_page(page, site):
    page.goto(f"{site.as_uri()}/models/digits/at.html")
    page.fill("#find", "digits/ls095")
    page.press("#find", "Enter")
    page.wait_for_url("**/index.html?q=*")
    assert set(show(page, "Model")) and all("ls095" in name for name in show(page, "Model"))


def test_open_a_model_and_compare_it(page):
    page.locator("table.sortable").get_by_role("link", name="at", exact=True).first.click()
    page.wait_for_url("**/models/digits/at.html")
    assert page.inner_text("h1") == "digits/at"
    for picture in page.locator("img").all():
        picture.scroll_into_view_if_needed()
        page.wait_for_function("image => image.complete", arg=picture.element_handle())
        assert picture.evaluate("image => image.naturalWidth") > 100
    page.get_by_role("link", name="Compare with another model").click()
    page.wait_for_url(re.compile(r"/compare\.html#"))
    text = page.inner_text("#pair")
    assert page.locator("#choose-first option:checked").inner_text() == "at"
    points = float(re.search(r"A minus B: ([+−][\d.]+)", text)[1].replace("−", "-"))
    only_a, only_b = (int(re.search(rf"Only {m}, \S+, loses (\d+)", text)[1]) for m in "AB")
    n = int(re.search(r"(\d+) common images", text)[1])
    assert points == pytest.approx(100 * (only_b - only_a) / n, abs=0.051) and points > 0
    lists = [t.split(": ")[1].split(", ") if ": " in t else [] for t in page.locator(".ids").all_inner_texts()]
    assert [len(ids) for ids in lists] == [only_a, only_b], "each image is listed"
    page.select_option("#choose-first", label="ls095_sigma03")
    page.select_option("#choose-second", label="at")
    text = page.inner_text("#pair")
    assert f"Only A, ls095_sigma03, loses {only_b}." in text and f"Only B, at, loses {only_a}." in text
    assert f"A minus B: −{points}" in text
    page.select_option("#choose-first", label="at")
    assert page.inner_text("#pair") == "Choose two different models."


def test_dark_and_light(page, site):
    def darkness():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.emulate_media(color_scheme="light")
    light = darkness()
    page.emulate_media(color_scheme="dark")
    dark = darkness()
    assert light != dark
    page.click("#theme")
    assert darkness() == light, "the switch overrules the system"
    page.goto(f"{site.as_uri()}/compare.html")
    assert darkness() == light, "the next page keeps it"
    page.click("#theme")
    assert darkness() == dark
    page.emulate_media(media="print")
    assert darkness() == light and not page.locator("nav").is_visible(), "paper is light and has no controls"


@pytest.mark.parametrize("path", PAGES)
def test_a_narrow_screen_shows_all_text(page, site, path):
    page.set_viewport_size({"width": 360, "height": 800})
    page.goto(f"{site.as_uri()}/{path}")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    cut = page.evaluate(
        """() => [...document.querySelectorAll("main *")].filter(e => e.children.length === 0 && e.textContent.trim()
            && !e.closest(".frame") && !e.closest("svg") && e.getBoundingClientRect().right > 360)
            .map(e => e.outerHTML)"""
    )
    assert cut == []
    frames = page.locator(".frame").all()
    assert all(f.evaluate("frame => frame.scrollWidth <= frame.clientWidth") for f in frames), "no table is cut"
    if path == "index.html":
        assert page.locator("table.stacked td:visible", has_text="[").first.bounding_box()["x"] < 200, (
            "cells are stacked"
        )


@pytest.mark.parametrize("path", PAGES)
@pytest.mark.parametrize("width", [360, 1280])
def test_no_table_scrolls_sideways_and_no_word_is_broken(page, site, path, width):
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(f"{site.as_uri()}/{path}")
    for frame in page.locator(".frame").all():
        assert frame.evaluate("frame => frame.scrollWidth <= frame.clientWidth")
    broken = page.evaluate(
        """() => [...document.querySelectorAll(".whole")].filter(e => e.getClientRects().length > 1)
            .map(e => e.textContent)"""
    )
    assert broken == []
    if path == "tables/wide.html" and width == 360:
        labels = page.evaluate(
            """() => [...document.querySelectorAll(".stacked td")].filter(td => {
                const label = getComputedStyle(td, "::before");
                const canvas = document.createElement("canvas").getContext("2d");
                canvas.font = label.font;
                const longest = Math.max(...td.dataset.label.split(/[ -]/).map(w => canvas.measureText(w).width));
                return longest > parseFloat(label.width); }).map(td => td.dataset.label)"""
        )
        assert labels == []


def test_marks_of_a_chart_do_not_lie_on_each_other(page):
    boxes = page.locator(".claims li").evaluate_all(
        """rows => rows.map(row => [...row.querySelectorAll("path")].map(mark => {
            const box = mark.getBoundingClientRect(); return [box.left, box.right, box.top, box.bottom]; }))"""
    )
    assert [len(marks) for marks in boxes] == [2, 2]
    for a, b in boxes:
        assert a[3] <= b[2] or b[3] <= a[2], "one is above the other, however near their numbers are"


def test_a_model_page_prints_whole(page, site):
    page.goto(f"{site.as_uri()}/models/digits/at.html")
    page.emulate_media(media="print")
    page.set_viewport_size({"width": 700, "height": 1000})  # about A4
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    for frame in page.locator(".frame").all():
        assert frame.evaluate("frame => frame.scrollWidth <= frame.clientWidth"), "paper cannot scroll"


def test_the_overview_is_small(site):
    assert (site / "index.html").stat().st_size < 500_000, "the overview is one file"


def test_the_table_can_be_read_without_a_script(page, site):
    page.set_content((site / "index.html").read_text(encoding="utf-8").replace("<script>", '<script type="none">'))
    assert page.locator("table.sortable tbody tr:visible").count() == 10


@pytest.mark.skipif(not AXE, reason="axe-core is not here (ROBBENCH_AXE: path of axe.min.js)")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("path", PAGES)
def test_axe_finds_nothing(page, site, path, width, scheme):
    page.set_viewport_size({"width": width, "height": 800})
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{site.as_uri()}/{path}")
    page.evaluate(Path(AXE).read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    assert found["violations"] == [] and len(found["passes"]) > 10
