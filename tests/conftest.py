"""Settings and fixtures of all tests. What tests import lies in `support/`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from robbench.models.card import Registry
from support.models import small
from support.papers import registry_of

# The models in the tests are tiny: threads only wait for each other, above all on a machine that is busy otherwise.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the same for processes that tests start
# Tests write into folders of their own, whatever tree a developer has chosen.
os.environ.pop("ROBBENCH_RESULTS", None)


@pytest.fixture
def problem() -> tuple[nn.Module, Tensor, Tensor]:
    """A model, 60 images, and labels of which every tenth is misclassified."""
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    model = small()
    y = model(x).argmax(1)
    y[::10] = (y[::10] + 1) % 10  # every tenth is misclassified
    return model, x, y


@pytest.fixture(scope="session", autouse=True)
def bfloat16_everywhere() -> Iterator[None]:
    """Run in bfloat16 what is asked for in it, also where the processor emulates it. Tests of that choice set it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("robbench.evaluation.precision.has_bfloat16_instructions", lambda: True)
        yield


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test's own folder makes importable is gone afterwards: the next one may have a module of the same name."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if "pytest-of-" in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


@pytest.fixture
def limited_time() -> Iterator[None]:
    """Fail a test after 60 s. A test of input that never ends would otherwise never end, without its protection."""

    def fail(*_: object) -> None:
        pytest.fail("took more than 60 s")  # of a kind that `except Exception` does not catch

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The checkout that holds these tests."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def cards(tmp_path: Path, repo: Path) -> Callable[..., Registry]:
    """Make a registry of this repository's cards for the papers' models; see `registry_of`."""
    return partial(registry_of, tmp_path / "registry", repo / "models")
