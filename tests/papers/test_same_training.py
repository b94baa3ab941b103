"""Rows of the papers' tables whose model another recipe makes on its way."""

import re

import pytest

from robbench.models.card import Registry
from robbench.papers.audit import audit_claims, read_references
from robbench.papers.audit_page import render_audit_page
from robbench.papers.published import TABLES
from robbench.papers.tables import fill_table
from support.papers import line_of, put, result


@pytest.fixture
def put_card(tmp_path):
    """Write a card of Table 5 into a registry of its own: the iterations that were trained, and changed lines."""

    def put_card(name, done=None, sha="", **changed):
        text = Registry.default().find(f"mnist/{name}").path.read_text(encoding="utf-8")
        text = re.split(r"\n\[(?:weights|trained)\]", text)[0] + "\n"
        for key, value in changed.items():
            text, count = re.subn(rf"(?m)^{key} = .*", f"{key} = {value}", text)
            assert count
        if done:
            text += f'\n[weights]\npath = "x.safetensors"\nsha256 = "{sha * 64}"\n\n[trained]\niterations = {done}\n'
            text += 'seconds = 1.0\nhardware = "h"\nversions = "v"\ndate = "2026-01-02"\nseed = 0\ncommand = "c"\n'
            text += 'precision = "float32"\ninstead = "iterations 1 instead of 2"\n'
        path = tmp_path / "cards" / "mnist" / f"{name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return Registry([tmp_path / "cards"])

    return put_card


def test_a_recipe_that_is_longer_alone_shows_the_model_on_its_way(put_card, tmp_path):
    put_card("sigma05", 25000, "d")
    put_card("natural")
    registry, root = put_card("sigma05_100k"), tmp_path / "results"
    put(root, result("sigma05", "whitebox", 90, {"APGD-CE": 100}))
    sheet = fill_table(TABLES["shafahi2019-5"], registry, root)
    short, long = line_of(sheet, "mnist/sigma05_100k"), line_of(sheet, "mnist/sigma05")
    assert short.trained == "25,000 of 100,000; see sigma05" and long.trained == "25,000 of 400,000"
    assert short.worst == long.worst and short.worst is not None
    assert short.cells[2].paper.text == "5.18" and long.cells[2].paper.text == "11.24"
    assert short.missing.runs == long.missing.runs != ()
    assert any(
        note.startswith("mnist/sigma05_100k shows the results of mnist/sigma05, trained for 25,000 iterations")
        for note in sheet.notes
    )
    assert [row.model for row in audit_claims(registry, root).rows] == ["mnist/sigma05"]


def test_a_precision_other_than_float32_stands_beside_the_iterations(put_card, tmp_path):
    put_card("natural")
    registry, root = put_card("sigma05", 25000, "d"), tmp_path / "results"
    card = registry.find("mnist/sigma05").path
    card.write_text(card.read_text(encoding="utf-8").replace('"float32"', '"bfloat16"'), encoding="utf-8")
    put(root, result("sigma05", "whitebox", 90, {"APGD-CE": 100}))
    registry = Registry([tmp_path / "cards"])
    sheet = fill_table(TABLES["shafahi2019-5"], registry, root)
    assert line_of(sheet, "mnist/sigma05").trained == "25,000 of 400,000; in bfloat16"
    assert "Precision of the gradients: 1 in bfloat16." in render_audit_page(
        audit_claims(registry, root), read_references(), "a.png"
    )


@pytest.mark.parametrize(
    ("done", "changed"),
    [
        (150000, {}),
        (25000, {"seed": 1}),
        (25000, {"lr": 0.001}),
        (25000, {"sigma": '"0.4"'}),
        (25000, {"lr": '0.0001\nschedule = "cosine"'}),
    ],
)
def test_a_model_of_another_or_longer_training_does_not_stand_in(put_card, tmp_path, done, changed):
    put_card("sigma05", done, "d")
    put_card("natural")
    registry, root = put_card("sigma05_100k", **changed), tmp_path / "results"
    put(root, result("sigma05", "whitebox", 90, {"APGD-CE": 100}))
    assert line_of(fill_table(TABLES["shafahi2019-5"], registry, root), "mnist/sigma05_100k").worst is None
