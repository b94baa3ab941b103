"""The tables of docs/peers.md: the multiple of the radius at which other libraries break linear models."""

import functools
import math
import re
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from robbench.core.errors import SuiteError
from robbench.core.threat import Ball
from robbench.evaluation import peers
from robbench.evaluation.more_peers import list_attacks
from robbench.suite import PEERS, Stage
from support.attacks import judged
from support.models import DUAL

PAGE = (Path(__file__).parents[2] / "docs" / "peers.md").read_text(encoding="utf-8")
ROWS = [
    (kind, norm, dict(zip((2, 3, 10), values.split(" | "), strict=True)), params)
    for kind, norm, params, values in re.findall(r"^\| `(\w+:[^`]+)` \| (\w+) \| (.*?) ?\| (.+) \|$", PAGE, re.M)
]
COLOR = ("torchattacks:TIFGSM", "torchattacks:PIFGSM", "torchattacks:PIFGSMPP")  # filters for three channels
FARTHEST = 8.0
AT_ONCE = [("advlib:sdf", "L2"), ("autoattack:FAB", "L2"), ("foolbox:L2DeepFoolAttack", "L2")]  # the others take longer


class Planes(nn.Module):
    """K linear logits with random weights."""

    def __init__(self, w, b):
        super().__init__()
        self.w, self.b = nn.Parameter(w), nn.Parameter(b)

    def forward(self, x):
        return x.flatten(1) @ self.w.T + self.b


@functools.cache
def linear_problem(norm, classes, shape):
    """A linear model, four images, their classes, and their radius. The other classes are up to twice as far."""
    generator = torch.Generator().manual_seed(100 + classes)
    draw = functools.partial(torch.rand, dtype=torch.float64, generator=generator)
    d, radius = math.prod(shape), {"Linf": 0.05, "L2": 0.2, "L1": 0.15}[norm]
    w = torch.randn(classes, d, dtype=torch.float64, generator=generator)
    y, images = torch.arange(4) % classes, []
    for label in y:
        slope = (w[label] - w)[torch.arange(classes) != label]
        share = 1 + draw(classes - 1)
        share[torch.randint(classes - 1, (), generator=generator)] = 1
        gap = radius * torch.linalg.vector_norm(slope, ord=DUAL[norm], dim=1) * share
        images.append(0.5 + torch.linalg.lstsq(slope, gap[:, None], driver="gelsd").solution[:, 0])
    x = torch.stack(images).view(4, *shape)
    assert (x - 1.02 * radius).min() > 0 and (x + 1.02 * radius).max() < 1, "the nearest point is inside the box"
    return Planes(w, -0.5 * w.sum(1)).float().eval(), x.float(), y, radius


def make_peer(kind, params=None):
    try:
        return peers.build_peer(Stage("a", kind, params or {}))
    except peers.MissingPackageError as error:
        pytest.skip(str(error))


def break_images(peer, norm, classes, share):
    """Return which images are broken at this multiple of their radius, and which the library claims."""
    shape = (3, 8, 8) if f"{peer.library}:{peer.attack}" in COLOR else (1, 8, 8)
    model, x, y, radius = linear_problem(norm, classes, shape)
    ball = Ball(norm, radius * share)
    x_adv, claimed = peer.run(model, x, y, ball, 0)
    return judged(model, x, y, x_adv.float(), ball).sum(), claimed.sum()


@pytest.mark.parametrize(
    ("kind", "norm", "stated", "params"),
    [pytest.param(*row, marks=[] if row[:2] in AT_ONCE else [pytest.mark.whole]) for row in ROWS],
    ids=[f"{row[0]}-{row[1]}" for row in ROWS],
)
def test_it_breaks_linear_models_at_the_stated_multiple_of_the_radius(kind, norm, stated, params):
    peer = make_peer(kind, tomllib.loads("\n".join(re.sub(r"^(\w+)", r'"\1"', p) for p in params.split(", ") if p)))
    assert norm in peer.norms
    for classes, value in stated.items():
        if value == "–":
            with pytest.raises(SuiteError, match="needs at least"):
                peer.check_classes(classes)
            continue
        peer.check_classes(classes)
        broken, claimed = break_images(peer, norm, classes, FARTHEST if value == "none" else float(value))
        assert (broken == 4) == (value != "none"), f"{broken} of 4 with {classes} classes"
        assert claimed <= broken, "what the library claims holds"


@pytest.mark.parametrize(
    "kind",
    ["advlib:fab", "advlib:sdf", "foolbox:L2DeepFoolAttack", "torchattacks:CW", "torchattacks:FAB", "autoattack:FAB"],
)
def test_below_the_radius_nothing_is_broken_and_nothing_claimed(kind):
    for classes in (2, 10):
        assert break_images(make_peer(kind), "L2", classes, 0.98) == (0, 0)


@pytest.mark.parametrize("library", PEERS)
def test_every_attack_of_the_libraries_is_on_the_page(library):
    probe = {"advlib": "fmn", "foolbox": "LinfPGD", "torchattacks": "FGSM", "autoattack": "FAB"}[library]
    make_peer(f"{library}:{probe}")
    package, _ = peers._installed(Stage("a", f"{library}:{probe}", {}), library)
    if library == "autoattack":
        names = [*peers._VERSIONS, *(name.upper() for name in peers._SINGLE)]
    elif library == "torchattacks":
        names = peers._list_torchattacks(package)
    else:
        names = list_attacks(library, package)
    _, _, others = PAGE.partition("## Not in the tables")
    measured = {row[:2] for row in ROWS}
    same = {getattr(package.attacks, n): n for n in reversed(names)} if library == "foolbox" else {}  # aliases are last
    for name in names:
        kind = f"{library}:{same.get(getattr(package.attacks, name), name) if library == 'foolbox' else name}"
        assert f"`{kind}`" in PAGE, kind
        if f"`{kind}`" in others and f"`{kind}`" != "`advlib:fmn`":
            continue
        row_norms = {norm for k, norm in measured if k == kind}
        params = next((p for k, _, _, p in ROWS if k == kind and p), "")
        peer = make_peer(kind, tomllib.loads(params.replace(", ", "\n")) if kind.startswith("foolbox:") else {})
        assert set(peer.norms) - {"L0"} == row_norms, kind
