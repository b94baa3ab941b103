"""For the tests of your own project: fail where a model is not as robust as it should be.

```python
from robbench.testing import assert_robust

def test_my_model_is_still_robust():
    assert_robust(make_net(), dataset="digits", baseline="robustness.json", at_least=0.40)
```
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from robbench.core.errors import ResultError, RobbenchError
from robbench.gate.baseline import Given, Run, read_baseline
from robbench.gate.decision import Policy
from robbench.gate.decision import check as checked
from robbench.gate.measure import Machine, measure, measure_again, results_tree
from robbench.report.gate import as_text

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["assert_robust"]


def assert_robust(
    model: str | nn.Module,
    *,
    baseline: str | Path | None = None,
    at_least: float | None = None,
    suite: str | None = None,
    samples: int | None = None,
    dataset: str | None = None,
    name: str | None = None,
    x: Tensor | None = None,
    y: Tensor | None = None,
    eps: str | float | None = None,
    norm: str | None = None,
    max_drop: float = 1.0,
    alpha: float = 0.01,
    device: str = "auto",
    data_dir: str | Path | None = None,
) -> None:
    """Attack a model, and raise AssertionError where it is less robust than it should be.

    With a baseline, suite, threat, images and seeds are the baseline's, and the comparison is that of `robbench check`:
    image by image, for a drop and for weakened attacks.

    Args:
        model: a module in eval mode that maps images [N, C, H, W] in [0, 1] to logits [N, K], or what
            `robbench eval --model` takes.
        baseline: a file that `robbench baseline` wrote.
        at_least: least robust accuracy, in [0, 1], that the worst case over all attacks must reach on these images.
        suite: a suite's name or file; "whitebox" where there is no baseline.
        samples: how many test images; only without a baseline.
        dataset: a known data set, for a module or a source.
        name: which model of the baseline it is, where that holds several: `digits/at`.
        x: images [N, C, H, W] in [0, 1], instead of a data set.
        y: labels [N] of `x`.
        eps: radius in [0, 1] pixel units; only without a baseline.
        norm: goes with eps.
        max_drop: points that an accuracy may fall below the baseline.
        alpha: probability with which an unchanged model may fail.
        device: auto, cpu, cuda or cuda:i.
        data_dir: where the data sets are; None means ROBBENCH_DATA.

    Raises:
        AssertionError: it is less robust than it should be, or an attack is weaker than in the baseline; the text is
            what `robbench check` prints.
        RobbenchError: wrong input, or runs that cannot be compared.
    """
    if baseline is None and at_least is None:
        raise RobbenchError("assert_robust: give baseline=, at_least=, or both; there is nothing to compare with.")
    if at_least is not None and not 0 <= at_least <= 1:
        raise RobbenchError(f"at_least: {at_least} given; allowed: a share from 0 to 1.")
    if baseline is not None and any(v is not None for v in (suite, samples, eps, norm)):
        raise RobbenchError("suite, samples, eps and norm are those of the baseline; give them without one only.")
    own = None if isinstance(model, str) else model
    with results_tree(None) as tree:
        machine = Machine(results=tree, device=device, data_dir=data_dir)
        if baseline is None:
            given = _given(model, name, dataset)
            run = measure(
                given, suite or "whitebox", machine, module=own, x=x, y=y, samples=samples, eps=eps, norm=norm
            )
        else:
            before = _chosen(Path(baseline), name)
            given = _given(model, before.model, dataset if dataset or x is not None else before.given.dataset)
            found: list[Run] = []

            def measured(asked: Run, n: int) -> Run:
                found.append(measure_again(asked, machine, given=given, n=n, module=own, x=x, y=y))
                return found[-1]

            decision = checked([before], measured, Policy(max_drop=max_drop, alpha=alpha))
            if decision.failed:
                raise AssertionError(as_text(decision))
            run = found[-1]
    robust = run.robust_accuracy
    if at_least is not None and robust.value < at_least:
        raise AssertionError(
            f"{run.name}: robust accuracy {100 * robust.value:.1f} % [{100 * robust.low:.1f}, {100 * robust.high:.1f}] "
            f"on {run.n} images under {run.identity['suite']['name']}; at least {100 * at_least:.1f} % is asked for."
        )


def _given(model: str | nn.Module, name: str | None, dataset: str | None) -> Given:
    if isinstance(model, str):
        return Given(model=model, dataset=dataset)
    return Given(model=name.rpartition("/")[2] if name else type(model).__name__, dataset=dataset)


def _chosen(path: Path, name: str | None) -> Run:
    """Find the run of a baseline that a model is compared with."""
    runs = {run.name: run for run in read_baseline(path).runs}
    if name is None and len(runs) == 1:
        return next(iter(runs.values()))
    if name not in runs:
        raise ResultError(f"{path} holds {', '.join(runs)}; name={name!r} given. Say which one of them it is.")
    return runs[name]
