"""Whatever is edited in the files of a result: every reader names the file, or shows the numbers that it showed before.

ROBBENCH_EDITS multiplies the number of edits (3,000 in CI), ROBBENCH_FUZZ_SEED says where they begin.
"""

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from robbench.analysis.manifold_record import read_manifolds_files
from robbench.analysis.record import read_logits_files
from robbench.certify.record import ROWS, SUMMARY, read_certified_files
from robbench.core.errors import ResultError
from robbench.core.files import digest
from robbench.core.version import digest_judging_code
from robbench.evaluation.run import evaluate
from robbench.gate.decision import Policy, decide_gate
from robbench.gate.measure import read_stored_entry
from robbench.gate.paired import compare_entries
from robbench.linear.record import read_activations, read_linear, read_linear_files, read_linearization, write_linear
from robbench.linear.theory import Linearization
from robbench.masking.record import FILE as SANITY
from robbench.masking.record import LANDSCAPE, digest_landscape, read_sanity
from robbench.masking.stored import VerdictIndex
from robbench.models.card import Registry, locate_builtin_cards
from robbench.papers.audit import audit_claims, read_references
from robbench.papers.audit_page import render_audit_page
from robbench.papers.layout import Commands, render_table
from robbench.papers.published import find_table
from robbench.papers.tables import fill_table
from robbench.papers.trained import render_trained_page
from robbench.recheck.reproduce import reproduce
from robbench.recheck.verify import verify
from robbench.report.export import export_result
from robbench.report.figures.source import FigureData
from robbench.report.gate import format_markdown
from robbench.report.linear import make_linear_rows
from robbench.report.spread import build_spread
from robbench.report.sweep import build_sweep, extend_sweep, write_sweep
from robbench.results.adversarials import FILE as POINTS
from robbench.results.judging_code import read_began
from robbench.results.reader import read_results
from robbench.results.run_files import find_runs
from robbench.results.schema import dump_sealed, read_result, seal
from robbench.results.store import RunStore
from robbench.results.summary import make_accuracy
from support.evidence import write_evidence
from support.fuzzing import mutated_bytes, mutated_json
from support.leaderboard import read_leaderboard
from support.models import small
from support.papers import result
from support.stored import folder, write_suite

TIMES = int(os.environ.get("ROBBENCH_EDITS", "1"))
SEED = int(os.environ.get("ROBBENCH_FUZZ_SEED", "0"))
MODEL = "mnist/ls095"  # of a table of the paper
NAME = f"{MODEL}/whitebox"
CARDS = Registry([locate_builtin_cards()])

DESCRIPTION = {
    "version": 1, "model": "digits/at", "own_images": False, "suite": "quick", "dataset": None, "name": None,
    "architecture": None, "mean": None, "std": None, "norm": None, "eps": None, "samples": 40, "sample_seed": None,
    "seed": 0, "lanes": None, "models": [], "data_dir": None, "save_adversarials": False, "n": 40, "stages": 2,
    "date": "2026-01-02",
}  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Two results, a verdict, a linear measurement and an unfinished run, all as robbench writes them now."""
    repo, root = Path(__file__).parents[2], tmp_path_factory.mktemp("tree")
    for model, worst in (("ls095", 9), ("other", 20)):
        counts = {"PGD": worst + 5, "APGD": worst + 3}
        write_evidence(root, result(model, "whitebox", worst, counts, n=40, flags={"randomized": "It rolls dice."}))
    shutil.copytree(repo / "results/digits/natural/sanity", root / "digits/natural/sanity")
    path = root / "digits/natural/sanity" / SANITY
    verdict = read_sanity(path)
    path.write_bytes(dump_sealed(verdict.model_copy(update={"landscape": digest_landscape(path.parent)})))
    shutil.copytree(repo / "results/digits/at/certified", root / "digits/at/certified")
    place = repo / "results/digits/natural/linear"
    m, k = read_linearization(place), slice(0, 20)
    few = Linearization(m.sample[k], m.label[k], m.logits[k], m.gradient[k], m.gradient_gap[k], m.cosine[k])
    summary = read_linear(place)
    correct = int((few.logits.argmax(1) == few.label).sum())
    medians = {name: float(f"{v:.6g}") for name, v in few_medians(few).items()}
    about = {"n": 20, "clean_accuracy": make_accuracy(correct, 20), "medians": medians, "flags": {}}
    write_linear(root / "digits/natural/linear", summary.model_copy(update=about), few, read_activations(place))
    identity = {"attacks": [{"name": "A"}, {"name": "B"}], "seed": 0}
    RunStore(root, "digits", "begun", "quick", identity, standard=True).begin(DESCRIPTION)
    return root


def few_medians(measured):
    return {
        name: np.median(measured.take_at_nearest(name)) for name in ("logit_gap", "gradient_gap", "radius", "cosine")
    }


def show(root):
    stored, damaged = read_results(root)
    return repr([r.model_dump() for r in stored]) + " ".join(map(str, damaged))


def list_runs(root):
    return repr([r.as_row(root) for r in find_runs(root)])


def tell_verdict(root):
    """What tables and pages say of a verdict. The result of its suite is not edited here."""
    verdicts = VerdictIndex(root)
    (examined,) = read_results(root, "digits/natural").results
    return f"{verdicts.find(examined)} {' '.join(map(str, verdicts.list_damaged()))}"


def tell_certificates(root):
    files, damaged = read_certified_files(root)
    return f"{[(file.model_dump(), rows.to_csv()) for file, rows in files]} {' '.join(map(str, damaged))}"


def tell_linear(root):
    files, damaged = read_linear_files(root)
    return f"{make_linear_rows(list(files.values()), root, None)} {' '.join(map(str, damaged))}"


def tell_logits(root):
    files, damaged = read_logits_files(root)
    told = {
        name: (file.model_dump(), [repr(v.tolist()) for v in vars(m).values()]) for name, (file, m) in files.items()
    }
    return f"{told} {' '.join(map(str, damaged))}"


def tell_manifolds(root):
    files, damaged = read_manifolds_files(root)
    told = {name: (file.model_dump(), rows.to_csv()) for name, (file, rows) in files.items()}
    return f"{told} {' '.join(map(str, damaged))}"


def compare_seeds(root):
    return repr(build_spread(root, read_results(root, MODEL).results or [_known(root)]))


def compare_radii(root):
    return repr(build_sweep(root, read_results(root, MODEL).results or [_known(root)]))


def _known(root):
    """A reader that had the summary in its hands before the file was edited."""
    (other,) = read_results(root, "mnist/other").results
    return other.model_copy(update={"model": "ls095"})


def compare_with_baseline(root):
    (other,) = (read_stored_entry(root / "mnist/other/whitebox"),)
    return format_markdown(decide_gate([compare_entries(other, read_stored_entry(root / NAME))], Policy(max_drop=99)))


def tell_figure_data(root):
    data = FigureData(CARDS, root, None)
    return f"{[r.model_dump() for r in data.results]} {' '.join(map(str, data.damaged))}"


READERS = {
    "show": show,
    "leaderboard": read_leaderboard,
    "runs": list_runs,
    "export": lambda root: export_result(root / NAME, "robustbench", Registry([]))[0],
    "baseline": lambda root: repr(read_stored_entry(root / NAME)),
    "sweep": compare_radii,
    "spread": compare_seeds,
    "gate": compare_with_baseline,
    "table": lambda root: render_table(fill_table(find_table("5"), CARDS, root), "markdown", Commands()),
    "audit": lambda root: render_audit_page(audit_claims(CARDS, root), read_references(), "audit.png"),
    "trained": lambda root: render_trained_page(CARDS.entries(), root),
    "figure": tell_figure_data,
}


def ask(reader, root):
    try:
        return reader(root)
    except ResultError as error:
        return str(error)


def edit(rng, path, data):
    """Change one to three fields of a JSON file, or one to four places of another one."""
    if path.suffix == ".json":
        text = mutated_json(rng, data.decode())
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
    else:
        path.write_bytes(mutated_bytes(rng, data))


def bend(path, root, times, readers, seed):
    """Edit a file many times, ask the readers in turn, and return how often a file was named."""
    data, rng, named = path.read_bytes(), random.Random(SEED + seed), 0
    before = {name: ask(reader, root) for name, reader in readers.items()}
    for i in range(times * TIMES):
        edit(rng, path, data)
        name = list(readers)[i % len(readers)]
        said = ask(readers[name], root)
        if said != before[name]:
            named += 1
            assert path.name in said or path.parent.name in said, (name, path.read_bytes(), said)
            assert "damaged" in said or path.name in said, (name, path.read_bytes(), said)
            assert not shows_a_changed_number(said, before[name]), (name, path.read_bytes(), said)
    path.write_bytes(data)
    assert {name: ask(reader, root) for name, reader in readers.items()} == before, "an undone edit leaves no trace"
    return named


def shows_a_changed_number(said, before):
    """Tell whether a line of a table holds something that no line held before."""
    lines = [line for line in said.splitlines() if line.startswith("| ") and "ls095" in line]
    return any(line not in before for line in lines)


@pytest.mark.parametrize(("name", "times"), [("result.json", 500), ("outcomes.parquet", 500), ("timings.parquet", 140)])
def test_edited_results_are_named_by_every_reader(tree, name, times):
    assert bend(tree / NAME / name, tree, times, READERS, 1) > times * TIMES / 2


def test_edited_verdicts_are_named(tree):
    path = tree / "digits/natural/sanity" / SANITY
    assert bend(path, tree, 140, {"verdict": tell_verdict}, 2) > 70 * TIMES


@pytest.mark.parametrize("name", ["linear.json", "classes.parquet", "activations.parquet"])
def test_edited_linear_measurements_are_named(tree, name, times=170):
    assert bend(tree / "digits/natural/linear" / name, tree, times, {"linear": tell_linear}, 3) > times * TIMES / 2


def test_edited_descriptions_of_runs_are_named(tree):
    (path,) = tree.glob("digits/begun/quick/.partial/*/run.json")
    assert bend(path, tree, 150, {"runs": list_runs}, 4) > 75 * TIMES


def test_edited_landscapes_are_named(tree):
    path = tree / "digits/natural/sanity" / LANDSCAPE
    assert bend(path, tree, 30, {"verdict": tell_verdict}, 6) > 15 * TIMES


@pytest.mark.parametrize(("name", "times"), [(SUMMARY, 150), (ROWS, 60), (POINTS, 40)])
def test_edited_certificates_are_named(tree, name, times):
    (path,) = tree.glob(f"digits/at/certified/bounds@*/{name}")
    readers = {"certified": tell_certificates, "leaderboard": read_leaderboard}
    assert bend(path, tree, times, readers, 7) > times * TIMES / 2


@pytest.mark.parametrize(
    ("kind", "tell"), [("logits", tell_logits), ("manifolds", tell_manifolds)], ids=["logits", "manifolds"]
)
def test_edited_measurements_of_inner_values_are_named(tree, kind, tell):
    source = Path(__file__).parents[2] / "results/digits/natural" / kind
    place = shutil.copytree(source, tree / "digits/natural" / kind)
    for suffix, times in (("json", 120), ("parquet", 60)):
        assert bend(place / f"{kind}.{suffix}", tree, times, {kind: tell}, 10) > times * TIMES / 2
    shutil.rmtree(place)


@pytest.mark.parametrize(
    ("kind", "tell"), [("logits", tell_logits), ("manifolds", tell_manifolds)], ids=["logits", "manifolds"]
)
def test_numbers_of_inner_values_follow_from_their_table(tree, tmp_path, kind, tell):
    """Also where somebody made the digest of the summary anew."""
    source = Path(__file__).parents[2] / "results/digits/natural" / kind
    path = shutil.copytree(source, tmp_path / "digits/natural" / kind) / f"{kind}.json"
    fields = json.loads(path.read_text())
    del fields["sha256"]
    changes = [{"n": fields["n"] - 1}, {"run_id": "0" * 64}, {"files": {}}, {"model": "at"}, {"total": 1000}]
    changes += [{"identity": fields["identity"] | {"data": "0" * 64}}]
    if kind == "logits":
        changes += [
            {name: make_accuracy(1, fields["n"]).model_dump()} for name in ("clean_accuracy", "robust_accuracy")
        ]
        changes += [{"classes": 9}]
    else:
        first, *others = fields["layers"]
        changes += [{"layers": [first | {name: 9.0}, *others]} for name in ("cost", "radius", "dimension")]
        changes += [{"layers": others}, {"layers": [first | {"kind": "adversarial"}, *others]}]
    for change in changes:
        path.write_bytes(seal(fields | change))
        assert tell(tmp_path).startswith("{} ") and f"{kind}" in tell(tmp_path), change
    path.write_bytes(seal(fields))
    assert "damaged" not in tell(tmp_path)


def test_no_edited_sweep_changes_a_number(tree, tmp_path):
    """The file of a sweep says which results belong together. Every number comes from these."""
    root = shutil.copytree(tree, tmp_path / "tree")
    stored = read_results(root, MODEL).results
    before = extend_sweep(root, stored, clean=True)
    path, _ = write_sweep(before, root)
    data, rng, named = path.read_bytes(), random.Random(SEED + 8), 0
    for _ in range(100 * TIMES):
        edit(rng, path, data)
        sweep = extend_sweep(root, stored, clean=True)
        aside = path.with_name(f"{path.name}.damaged")
        named += aside.exists() or path.name in " ".join(sweep.notes)
        aside.unlink(missing_ok=True)
        assert (sweep.points, sweep.n, sweep.title) == (before.points, before.n, before.title), path.read_bytes()
    assert named > 50 * TIMES


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """A result with its adversarial examples, and what it takes to check it."""
    root = tmp_path_factory.mktemp("attacked")
    x = torch.rand(16, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = small()(x).argmax(1)
    evaluate(small(), write_suite(root), x=x, y=y, name="s", eps=0.05, results=root, save_adversarials=True)
    return folder(root), {"x": x, "y": y}


@pytest.mark.parametrize(
    ("name", "times"), [(POINTS, 60), ("result.json", 60), ("outcomes.parquet", 60), ("timings.parquet", 20)]
)
def test_edits_are_found_by_verify(attacked, name, times):
    place, images = attacked
    path, rng, found = place / name, random.Random(SEED), 0
    data, before = path.read_bytes(), verify(place, small(), **images)
    assert before.breaks == before.confirmed > 0 and not before.refuted
    for _ in range(times * TIMES):
        edit(rng, path, data)
        try:
            now = verify(place, small(), **images)
        except ResultError as error:
            assert path.name in str(error)
            found += 1
            continue
        found += bool(now.refuted)
        assert now.refuted or (now.confirmed, now.result) == (before.confirmed, before.result), path.read_bytes()
    path.write_bytes(data)
    assert found > times * TIMES / 2


@pytest.mark.parametrize("name", [POINTS, "result.json", "outcomes.parquet"])
def test_edits_are_found_by_reproduce(attacked, name, times=15):
    place, images = attacked
    path, rng, found = place / name, random.Random(SEED + 9), 0
    data, suite = path.read_bytes(), str(place.parents[2] / "s.toml")
    for _ in range(times * TIMES):
        edit(rng, path, data)
        try:
            now = reproduce(place, small(), suite=suite, **images)
        except ResultError as error:
            assert path.name in str(error)
            found += 1
            continue
        found += bool(now.matters)
        assert now.matters or not now.verdicts, path.read_bytes()
    path.write_bytes(data)
    assert not reproduce(place, small(), suite=suite, **images).matters
    assert found > times * TIMES / 2


def test_without_a_digest_of_the_file_every_number_of_robustness_is_vouched_for(tree, tmp_path):
    """Files of older versions have none. What then follows from nothing else is a statement, not a number."""
    root = shutil.copytree(tree, tmp_path / "tree")
    path = root / NAME / "result.json"
    fields = json.loads(path.read_bytes())
    del fields["sha256"], fields["wall_seconds"]
    data, rng, named = json.dumps(fields).encode(), random.Random(SEED + 5), 0

    def numbers():
        free = {"date", "hardware", "versions", "environment", "lanes", "paper", "flags"}
        free |= {"wall_seconds", "answers", "code"}
        return [r.model_dump(exclude=free) for r in read_results(root, MODEL).results]

    path.write_bytes(data)
    before = numbers()
    assert before
    for _ in range(300 * TIMES):
        edit(rng, path, data)
        damaged = read_results(root, MODEL).damaged
        named += bool(damaged)
        assert damaged or numbers() == before, path.read_bytes()
    assert named > 100 * TIMES


@pytest.mark.parametrize("name", [f"{NAME}/result.json", "digits/natural/linear/linear.json", "digits/begun"])
def test_a_digest_shows_edits_of_mere_statements(tree, tmp_path, name):
    root = shutil.copytree(tree, tmp_path / "tree")
    path = root / name if name.endswith(".json") else next((root / name).glob("quick/.partial/*/run.json"))
    path.write_text(path.read_text().replace('"date": "20', '"date": "19'))
    said = list_runs(root) + tell_linear(root)
    assert f"{path.name}: not as it was written (SHA-256)" in said


def seal_with(path, **changed):
    """Write a file as the present version writes it."""
    fields = json.loads(path.read_bytes()) | changed
    del fields["sha256"]
    path.write_bytes(seal(fields))


def without(*keys):
    def edit(path, **changed):
        fields = {key: value for key, value in json.loads(path.read_bytes()).items() if key not in keys}
        path.write_text(json.dumps(fields | changed))

    return edit


@pytest.mark.parametrize("changed", [{}, {"date": "2001-01-01"}, {"hardware": "H100"}, {"lanes": 7}, {"seconds": 0.1}])
def test_the_digest_cannot_be_left_out(tree, tmp_path, changed):
    root = shutil.copytree(tree, tmp_path / "tree")
    path = root / NAME / "result.json"
    seal_with(path, wall_seconds=2.0)
    assert not read_results(root, MODEL).damaged
    without("sha256")(path, **changed)
    (damage,) = read_results(root, MODEL).damaged
    assert "result.json: not as it was written (SHA-256)" in str(damage)
    linear = root / "digits/natural/linear/linear.json"
    without("sha256")(linear)
    assert "linear.json: not as it was written (SHA-256)" in tell_linear(root)


def test_the_digest_of_a_verdict_cannot_be_left_out(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "tree")
    path = root / "digits/natural/sanity" / SANITY
    data = path.read_bytes()
    older = json.loads(data)["identity"] | {"probes": 2}
    text = {"identity": older | {"probes": "2"}, "landscape": ""}
    for changed in ({}, {"landscape": ""}, {"landscape": "", "date": "2001-01-01"}, {"identity": older}, text):
        path.write_bytes(data)
        without("sha256")(path, **changed)
        assert "sanity.json: not as it was written (SHA-256)" in tell_verdict(root), changed
    without("sha256")(path, landscape="", identity=older, run_id=digest(older))
    assert tell_verdict(root).strip() == tell_verdict(tree).strip() != "damaged", "an older version wrote no digest"


def test_files_copied_to_another_model_are_named(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "tree")
    for name, kind in (("natural", "linear"), ("natural", "sanity"), ("at", "certified")):
        shutil.copytree(root / "digits" / name / kind, root / "digits/thief" / kind)
    said = [*read_linear_files(root)[1], *VerdictIndex(root).list_damaged(), *read_certified_files(root)[1]]
    assert len(said) == 4 and all(
        "digits/thief" in str(d) and f" of digits/{m}" in str(d)
        for d, m in zip(said, ("natural", "natural", "at", "at"), strict=True)
    )
    assert [damage.name for damage in read_results(root).damaged] == ["digits/thief/sanity"]


@pytest.mark.parametrize("name", ["digits/natural/linear/linear.json", f"digits/at/certified/*/{SUMMARY}"])
def test_no_file_outside_is_asked_for(tree, tmp_path, name):
    """Whether a file outside has the digest that a stranger's file says."""
    root = shutil.copytree(tree, tmp_path / "tree")
    (tmp_path / "secret").write_bytes(b"x")
    path = next(root.glob(name))
    files = json.loads(path.read_bytes())["files"]
    for outside in (os.path.relpath(tmp_path / "secret", path.parent), str(tmp_path / "secret")):
        seal_with(path, files=files | {outside: hashlib.sha256(b"x").hexdigest()})
        assert "secret: not as it was written" in tell_linear(root) + tell_certificates(root)


def test_wall_times_of_older_versions_are_not_bent_by_leaving_out_the_rows(tree, tmp_path):
    root = shutil.copytree(tree, tmp_path / "tree")
    path = root / NAME / "result.json"
    seal_with(path, wall_seconds=2.0)
    (path.with_name("timings.parquet")).unlink()
    assert not read_results(root, MODEL).damaged, "the digest of result.json vouches for them"
    without("sha256", "wall_seconds")(path, seconds=0.001)
    (damage,) = read_results(root, MODEL).damaged
    assert "seconds is" in str(damage) and "follows from outcomes.parquet" in str(damage)


@pytest.mark.parametrize("left_out", [["sha256"], ["sha256", "wall_seconds"], []])
def test_code_that_anybody_may_have_written_counts_for_nothing(tree, tmp_path, left_out):
    root = shutil.copytree(tree, tmp_path / "tree")
    path = root / NAME / "result.json"
    seal_with(path, wall_seconds=2.0, code=digest_judging_code())
    assert read_result(path).code == digest_judging_code()
    without(*left_out)(path, code=digest_judging_code(), date="2001-01-01")
    assert read_result(path, changed=True).code == ""
    (about,) = root.glob("digits/begun/quick/.partial/*/run.json")
    seal_with(about, code=digest_judging_code())
    assert read_began(about.parent)[1] == digest_judging_code()
    without(*left_out)(about, code=digest_judging_code(), date="2001-01-01")
    assert read_began(about.parent)[1] == ""
