"""For the tests of your own project: fail where a model is not as robust as it should be.

```python
from robbench.testing import assert_robust

def test_my_model_is_still_robust():
    assert_robust(make_net(), dataset="digits", baseline="robustness.json", at_least=0.40)
```
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from robbench.core.errors import ResultError, RobbenchError
from robbench.evaluation.options import Options
from robbench.gate.baseline import Run, read_baseline
from robbench.gate.decision import Policy, check
from robbench.gate.measure import measure, measure_again, results_tree
from robbench.models.spec import ModelSpec
from robbench.report.gate import as_text
from robbench.suite import SuiteSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["assert_robust"]


def assert_robust(
    model: str | nn.Module,
    *,
    baseline: str | Path | None = None,
    at_least: float | None = None,
    suite: SuiteSource | None = None,
    samples: int | None = None,
    dataset: str | None = None,
    name: str | None = None,
    x: Tensor | None = None,
    y: Tensor | None = None,
    eps: str | float | None = None,
    norm: str | None = None,
    max_drop: float = 1.0,
    alpha: float = 0.01,
    device: str | torch.device = "auto",
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
        suite: as for `robbench.evaluate`; only without a baseline, and "whitebox" where it is left out.
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
    options = Options.take({"samples": samples, "eps": eps, "norm": norm, "device": device, "data_dir": data_dir})
    before = None if baseline is None else _find_run(Path(baseline), name)
    if before is not None and x is None:
        dataset = dataset or before.given.dataset
    called = None if isinstance(model, str) else before.model if before else name and name.rpartition("/")[2]
    spec = ModelSpec(model, x, y, dataset, called)
    with results_tree(None) as tree:
        options = replace(options, results=tree)
        if before is None:
            run = measure(spec, suite or "whitebox", options)
        else:
            found: list[Run] = []

            def measure_first(asked: Run, n: int) -> Run:
                found.append(measure_again(asked, options, spec=spec, n=n))
                return found[-1]

            decision = check([before], measure_first, Policy(max_drop=max_drop, alpha=alpha))
            if decision.failed:
                raise AssertionError(as_text(decision))
            run = found[-1]
    robust = run.robust_accuracy
    if at_least is not None and robust.value < at_least:
        raise AssertionError(
            f"{run.name}: robust accuracy {100 * robust.value:.1f} % [{100 * robust.low:.1f}, {100 * robust.high:.1f}] "
            f"on {run.n} images under {run.identity['suite']['name']}; at least {100 * at_least:.1f} % is asked for."
        )


def _find_run(path: Path, name: str | None) -> Run:
    """Find the run of a baseline that a model is compared with."""
    runs = {run.name: run for run in read_baseline(path).runs}
    if name is None and len(runs) == 1:
        return next(iter(runs.values()))
    if name not in runs:
        raise ResultError(f"{path} holds {', '.join(runs)}; name={name!r} given. Say which one of them it is.")
    return runs[name]
