"""Numbers with their nouns, and targets, in what commands print."""

import re

import pytest

from robbench.core.words import format_count, format_goal
from support.commands import run

NOUNS = "images|attacks|runs|tests|models|breaks|mismatches|records|workers|threads|lanes"
LONELY = re.compile(rf"(?<!of )(?<![\d.,])1 ({NOUNS})\b")


def test_a_number_has_its_noun():
    assert [format_count(n, "image") for n in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
    assert format_count(2, "pass") == "2 passes" and format_count(3, "mismatch") == "3 mismatches"


def test_a_target_stands_behind_the_threat():
    assert format_goal({"target": "next"}) == ", target next"
    assert format_goal({"target": None}) == format_goal({}) == ""


@pytest.mark.whole
def test_one_image_is_no_images_and_every_title_names_the_target(tmp_path):
    asked = ("-m", "digits/at", "-s", "quick", "--samples", 1, "--target", "next")
    kept = ("--results", "r", "--save-adversarials")
    baseline = ("baseline", *asked, "--out", "b.json")
    commands = {
        "eval": ("eval", *asked, *kept),
        "seeds": ("eval", *asked, "--results", "r", "--seeds", 2),
        "sweep": ("eval", *asked, "--results", "r", "--eps", "0.1,0.2"),
        "plan": ("plan", "-m", "digits/at", "-s", "quick", "--samples", 3, "--pilot", 2, "--results", "r"),
        "baseline": baseline,
        "check": ("check", "--baseline", "b.json"),
        "sanity": ("sanity", "digits/at", "--samples", 1, "--results", "r"),
    }
    said = {name: run(*command, cwd=tmp_path) for name, command in commands.items()}
    stored = next((tmp_path / "r/digits/at").glob("quick@*/adversarials.safetensors")).parent
    for name in ("verify", "reproduce", "export"):
        said[name] = run(name, stored, cwd=tmp_path)
    for name, text in said.items():
        assert not LONELY.search(text.stdout + text.stderr), name
        assert ("target next" in text.stdout) == (name not in ("plan", "sanity")), name
