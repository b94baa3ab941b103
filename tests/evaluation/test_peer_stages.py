"""Other libraries' attacks as stages of a suite: fixed batches, and nothing they claim is believed."""

import sys
from types import ModuleType

import numpy as np
import pandas as pd
import pytest
import torch

from robbench.core.errors import SuiteError
from robbench.evaluation.run import evaluate
from robbench.results.reader import read_results
from robbench.results.schema import AttackResult
from robbench.results.store import RunStore
from robbench.results.summary import find_measured_flags, make_accuracy

pytestmark = [pytest.mark.whole, pytest.mark.filterwarnings("ignore:there are .* points with zero gradient:Warning")]

SUITE = """
version = 1
[threat]
digits = { norm = "Linf", eps = "0.2" }

[[attack]]
name = "A"
kind = "KIND"
"""


def run(tmp_path, kind, model="digits/at", more="", **options):
    path = tmp_path / "s.toml"
    path.write_text(SUITE.replace("KIND", kind) + more)
    return evaluate(model, str(path), **options)


def rows(root, result):
    store = RunStore(root, result.dataset, result.model, result.suite, result.identity, standard=True)
    return store.open().sort_values("sample")


def test_autoattack_is_judged_like_ours(tmp_path):
    state = torch.random.get_rng_state()
    result = run(tmp_path, "autoattack:APGD-CE", samples=100, results=tmp_path / "r")
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is put back"
    ours = evaluate("digits/at", "whitebox", samples=100)
    apgd = next(a for a in ours.attacks if a.name == "APGD-CE")
    assert abs(result.robust_accuracy.value - apgd.robust_accuracy.value) <= 0.03
    assert result.attacks[0].refuted == 0
    assert result.attacks[0].config["batch_coupled"] == 100
    assert result.attacks[0].config["package"].startswith("pyautoattack ")


def test_records_do_not_depend_on_how_many_were_asked_for(tmp_path):
    more = "batch = 32\n"
    whole = run(tmp_path, "autoattack:APGD-DLR", more=more, samples=80, results=tmp_path / "a")
    for samples in (10, 45, 80):
        parts = run(tmp_path, "autoattack:APGD-DLR", more=more, samples=samples, results=tmp_path / "b")
    a, b = rows(tmp_path / "a", whole), rows(tmp_path / "b", parts)
    for column in ("sample", "status", "claimed", "prediction"):
        assert np.array_equal(a[column], b[column]), column
    assert a["distance"].equals(b["distance"])


@pytest.fixture
def liar(monkeypatch):
    """A torchattacks whose attacks leave the ball, leave the box, answer with NaN, or do as they should."""
    module = ModuleType("torchattacks")

    class Base:
        def __init__(self, model, eps=0.1, steps=1):
            self.model, self.eps, self.steps = model, eps, steps

    class Far(Base):
        def __call__(self, x, y):
            return 1 - x

    class Bright(Base):
        def __call__(self, x, y):
            return x + 100 * torch.rand_like(x)

    class Nothing(Base):
        def __call__(self, x, y):
            return x * torch.nan

    class Honest(Base):
        def __call__(self, x, y):
            x = x.detach().requires_grad_(True)
            (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(self.model(x), y), x)
            return (x + self.eps * grad.sign()).clamp(0, 1)

    class Near(Base):
        """Crosses a boundary of `Sum` by a tenth of a level of 8 bits, and takes no radius."""

        def __init__(self, model):
            self.model = model

        def __call__(self, x, y):
            return x + 0.51 / 255

    class Edge(Near):
        """The same, and it takes the radius."""

        def __init__(self, model, eps):
            self.model = model

    for cls in (Far, Bright, Nothing, Honest, Near, Edge):
        setattr(module, cls.__name__, cls)
    monkeypatch.setitem(sys.modules, "torchattacks", module)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0")


@pytest.mark.parametrize("name", ["Far", "Bright", "Nothing"])
def test_claims_that_do_not_hold_are_refuted_and_told(tmp_path, liar, name):
    result = run(tmp_path, f"torchattacks:{name}", samples=60, results=tmp_path / "r")
    assert result.robust_accuracy == result.clean_accuracy, "nothing was broken"
    assert result.attacks[0].refuted > 20
    assert f"{result.attacks[0].refuted} of A" in result.flags["refuted"]
    found = rows(tmp_path / "r", result)
    assert (found["claimed"] & (found["status"] == "robust")).sum() == result.attacks[0].refuted


class Sum(torch.nn.Module):
    """Class 1 from half a level of 8 bits above 100 on."""

    def forward(self, x):
        s = 255 * x.flatten(1).mean(1) - 100.5
        return torch.stack([-s, s], 1)


def test_a_library_claims_nothing_about_points_that_rounding_or_the_radius_takes_away(tmp_path, liar):
    x, y = torch.full((8, 1, 2, 2), 100.2 / 255), torch.zeros(8, dtype=torch.int64)
    x[4:] = 100 / 255
    cases = [(None, 0.6, 8), (255, 0.9, 4), (255, 0.7, 0)]
    for name, levels, eps, broken in [("Edge", *c) for c in cases] + [("Near", *c) for c in [*cases, (None, 0.3, 0)]]:
        shown = run(tmp_path, f"torchattacks:{name}", Sum().eval(), x=x, y=y, eps=str(eps / 255), levels=levels)
        assert shown.attacks[0].refuted == 0 and "refuted" not in shown.flags, (levels, eps)
        assert round(8 * (1 - shown.robust_accuracy.value)) == broken, (levels, eps)


@pytest.mark.parametrize(("name", "flagged"), [("Far", True), ("Nothing", True), ("Honest", False)])
def test_a_library_that_breaks_far_fewer_images_is_named(tmp_path, liar, name, flagged):
    more = '[[attack]]\nname = "B"\nkind = "fgsm"\nobjective = "margin"\n'
    result = run(
        tmp_path, f"torchattacks:{name}", model="digits/natural", more=more, samples=30, results=tmp_path / "r"
    )
    assert ("weak_peer" in result.flags) == flagged
    assert not flagged or "A 0, B " in result.flags["weak_peer"]
    (stored,), damaged = read_results(tmp_path / "r")
    assert stored.flags == result.flags and not damaged, "and the flag follows from the records"


def records(**statuses):
    """Records of attacks on the same images: b broken, r robust, s skipped."""
    names = {"b": "broken", "r": "robust", "s": "skipped"}
    rows = [(i, a, names[c]) for a, letters in statuses.items() for i, c in enumerate(letters)]
    more = {"label": 0, "prediction": 0, "nonfinite": 0}
    return pd.DataFrame(rows, columns=["sample", "attack", "status"]).assign(**more)


@pytest.mark.parametrize(
    ("ours", "theirs", "version", "flagged"),
    [
        ("b" * 19, "b" + "r" * 18, 2, True),
        ("b" * 19, "b" + "r" * 18, 1, False),  # stored before there was this flag
        ("b" * 10 + "r" * 9, "b" * 5 + "r" * 14, 2, True),
        ("b" * 10 + "r" * 9, "b" * 6 + "r" * 13, 2, False),
        ("b" * 4 + "r" * 15, "r" * 19, 2, False),  # few breaks may be chance
        ("b" * 18 + "r", "s" * 18 + "r", 2, False),  # a cascade leaves it what others could not break
        ("s" * 18 + "r", "b" * 18 + "r", 2, False),
    ],
)
def test_far_fewer_is_half_as_many_and_five_fewer(ours, theirs, version, flagged):
    made = dict.fromkeys(("forwards", "backwards", "refuted"), 0) | {"seconds": 0.0, "zero_gradient_share": 0.0}
    about = {"ours": {"kind": "pgd", "version": 9}, "theirs": {"kind": "advlib:fmn", "version": version}}
    results = [AttackResult(name=n, robust_accuracy=make_accuracy(0, 1), config=c, **made) for n, c in about.items()]
    assert ("weak_peer" in find_measured_flags(records(ours=ours, theirs=theirs), results)) == flagged


def test_an_honest_peer_is_confirmed(tmp_path, liar):
    result = run(tmp_path, "torchattacks:Honest", samples=60, model="digits/natural")
    fgsm = next(a for a in evaluate("digits/natural", "whitebox", samples=60).attacks if a.name == "FGSM-xent")
    assert result.attacks[0].refuted == 0
    assert result.robust_accuracy.value == fgsm.robust_accuracy.value


def test_an_attack_of_torchattacks_breaks_the_natural_model(tmp_path):
    pytest.importorskip("torchattacks", reason="extra peers is not installed")
    more = "steps = 10\nalpha = 0.05\n"
    result = run(tmp_path, "torchattacks:PGD", more=more, model="digits/natural", samples=50)
    assert result.robust_accuracy.value < 0.2


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("autoattack:APGD-X", "", "APGD-CE"),
        ("autoattack:standard", "steps = 3\n", "published budgets"),
        ("autoattack:standard", "batch = 0\n", "batch 0 given"),
        ("torchattacks:Farr", "", "Far"),
        ("torchattacks:Far", "stepz = 3\n", "steps"),
        ("cleverhans:PGD", "", "autoattack:NAME, advlib:NAME"),
    ],
)
def test_mistakes_in_a_peer_stage_are_named(tmp_path, liar, kind, more, message):
    with pytest.raises(SuiteError, match=message):
        run(tmp_path, kind, more=more, samples=3)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    with pytest.raises(SuiteError, match=r"robbench\[peers\]"):
        run(tmp_path, "torchattacks:PGD", samples=3)


@pytest.mark.parametrize("kind", ["standard", "plus", "rand", "APGD-DLR", "APGD-T"])
def test_autoattack_with_too_few_classes_is_refused_before_anything_runs(tmp_path, monkeypatch, kind):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2)).eval()
    x, y = torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    monkeypatch.setattr("robbench.evaluation.run.Worker", None)
    with pytest.raises(SuiteError, match=f"{kind} given with a model of 2 classes; its DLR loss needs at least [34]"):
        run(tmp_path, f"autoattack:{kind}", model, x=x, y=y, eps=0.1)


@pytest.mark.parametrize(("kind", "classes"), [("APGD-T", 4), ("FAB-T", 3), ("APGD-DLR", 3)])
def test_autoattack_has_no_more_targets_than_other_classes(tmp_path, kind, classes):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, classes)).eval()
    x = torch.rand(2, 1, 8, 8)
    result = run(tmp_path, f"autoattack:{kind}", model, x=x, y=model(x).argmax(1), eps=0.001)
    assert result.clean_accuracy.value == 1.0
