"""Judge a model: is it as robust as required, and can its robust accuracy be trusted?

`assert_robust` is an assertion for the tests of your own project:

```python
from robbench.testing import assert_robust

def test_my_model_is_still_robust():
    assert_robust(make_net(), dataset="digits", baseline="robustness.json", at_least=0.40)
```
"""

from __future__ import annotations

from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, Unpack

from robbench.api import warn_of_flags
from robbench.core.arguments import explain_arguments
from robbench.core.errors import ResultError, RobbenchError
from robbench.core.user_code import refuse_exits
from robbench.core.words import format_count
from robbench.evaluation.options import Options
from robbench.gate.baseline import BaselineEntry, read_baseline
from robbench.gate.decision import Decision, Policy, run_gate_check
from robbench.gate.measure import measure_entry, measure_entry_again, open_results_tree
from robbench.masking.run import examine
from robbench.models.card import Registry
from robbench.models.schema import DATASETS
from robbench.models.sources import parse_source
from robbench.models.spec import ModelSpec
from robbench.report.gate import format_text
from robbench.report.sanity import SanityResult
from robbench.results.reader import read_results
from robbench.suite import SuiteSource

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from robbench.evaluation.progress import Reporter
    from robbench.evaluation.request import RunFields

__all__ = ["assert_robust", "check", "sanity"]


@explain_arguments
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
    """Attack a model. Raise AssertionError if the model is less robust than required.

    With a baseline, the suite, threat, images and seeds come from the baseline. The comparison is the same as in
    `robbench check`: it is paired image by image, and it looks for drops and for weakened attacks.

    Args:
        model: a module in eval mode that maps images [N, C, H, W] in [0, 1] to logits [N, K], or a name or source that
            `robbench eval --model` accepts.
        baseline: a file that `robbench baseline` wrote.
        at_least: least robust accuracy, in [0, 1], that the worst case over all attacks must reach on these images.
        suite: as for `robbench.evaluate`; only without a baseline, and "whitebox" where it is left out.
        samples: how many test images; only without a baseline.
        dataset: a known data set, for a module or a source.
        name: full name of the model in the baseline, such as `digits/at`. Required if the baseline holds several.
        x: images [N, C, H, W] in [0, 1], instead of a data set.
        y: labels [N] of `x`.
        eps: radius in [0, 1] pixel units. Not allowed with a baseline.
        norm: Linf, L2 or L1; goes with eps.
        max_drop: largest allowed drop of an accuracy below the baseline, in points.
        alpha: largest allowed probability that an unchanged model fails.
        device: auto, cpu, cuda or cuda:i.
        data_dir: folder of the data sets; None means ROBBENCH_DATA.

    Raises:
        AssertionError: the model is less robust than required, or an attack is weaker than in the baseline. The message
            is the output of `robbench check`.
        RobbenchError: wrong input, or measurements that cannot be compared.
        StrayExitError: the model tried to end the process, or to skip the test.

    Warns:
        RobustnessWarning: for every flag of the result.
    """
    policy = _check_arguments(baseline, (suite, samples, eps, norm), at_least, max_drop, alpha)
    options = Options.take({"samples": samples, "eps": eps, "norm": norm, "device": device, "data_dir": data_dir})
    before = None if baseline is None else _find_entry(Path(baseline), name)
    if before is None:
        spec = ModelSpec(model, x, y, dataset, None if isinstance(model, str) else name and name.rpartition("/")[2])
    else:
        spec = _describe(model, before, x, y, dataset)
    with refuse_exits(), open_results_tree(None) as tree:
        options = replace(options, results=tree)
        if before is None:
            entry = measure_entry(spec, "whitebox" if suite is None else suite, options)
        else:
            decision = _compare(before, spec, options, policy)
            if decision.failed:
                raise AssertionError(format_text(decision))
            (comparison,) = decision.comparisons
            entry = comparison.now
        flags = {name: text for result in read_results(tree).results for name, text in result.flags.items()}
    warn_of_flags(flags)
    robust = entry.robust_accuracy
    if at_least is not None and robust.value < at_least:
        low, high = 100 * robust.low, 100 * robust.high
        raise AssertionError(
            f"{entry.name}: robust accuracy {100 * robust.value:.1f} % [{low:.1f}, {high:.1f}] on "
            f"{format_count(entry.n, 'image')} under {entry.identity['suite']['name']}; at least "
            f"{100 * at_least:.1f} % is required."
        )


@explain_arguments
def check(
    model: str | nn.Module,
    baseline: str | Path,
    *,
    name: str | None = None,
    dataset: str | None = None,
    x: Tensor | None = None,
    y: Tensor | None = None,
    max_drop: float = 1.0,
    alpha: float = 0.01,
    device: str | torch.device = "auto",
    data_dir: str | Path | None = None,
) -> Decision:
    """Measure a model again and compare it with a baseline, image by image, as `robbench check` does.

    Args:
        model: as for `assert_robust`.
        baseline: a file that `robbench baseline` wrote. Suite, threat, images and seeds are those of the file.
        name: full name of the model in the baseline, such as `digits/at`. Required if the baseline holds several.
        dataset: as for `assert_robust`.
        x: as for `assert_robust`.
        y: labels [N] of `x`.
        max_drop: largest allowed drop of an accuracy below the baseline, in points.
        alpha: largest allowed probability that an unchanged model fails.
        device: auto, cpu, cuda or cuda:i.
        data_dir: folder of the data sets; None means ROBBENCH_DATA.

    Returns:
        The decision: `failed`, and `findings` with a test each.

    Raises:
        RobbenchError: wrong input, or measurements that cannot be compared.
        StrayExitError: the model tried to end the process.
    """
    if not isinstance(baseline, str | Path):
        raise RobbenchError(_explain_baseline(baseline))
    policy = _check_arguments(baseline, (), None, max_drop, alpha)
    options = Options.take({"device": device, "data_dir": data_dir})
    before = _find_entry(Path(baseline), name)
    with refuse_exits(), open_results_tree(None) as tree:
        return _compare(before, _describe(model, before, x, y, dataset), replace(options, results=tree), policy)


def sanity(
    model: str | nn.Module,
    *,
    act: bool = False,
    reporter: Reporter | None = None,
    **fields: Unpack[RunFields],
) -> SanityResult:
    """Check whether a robust accuracy of this model can be trusted (docs/sanity.md).

    Args:
        model: as for `robbench.evaluate`.
        act: run the suite that is advised, too.
        reporter: hears of progress.
        **fields: as for `robbench.evaluate`, but samples is 200 where it is left out. Where dataset names a known data
            set, transfer from its registered models is tried too. With results, everything is stored and found again.

    Returns:
        Verdict, checks and measurements, as they are stored in sanity.json. `print` shows a summary.

    Raises:
        RobbenchError: the model, the data or the options do not allow it; the sentence says why.
    """
    return SanityResult.of(examine(model, act=act, reporter=reporter, **fields))


def _describe(
    model: str | nn.Module, before: BaselineEntry, x: Tensor | None, y: Tensor | None, dataset: str | None
) -> ModelSpec:
    """Say which model is measured in the place of an entry of a baseline."""
    if x is None:
        known = before.dataset if before.dataset in DATASETS else None
        is_registered = isinstance(model, str) and parse_source(model) is None  # its card names the data set
        dataset = dataset or (None if is_registered else before.given.dataset or known)
    if isinstance(model, str):
        return ModelSpec(model, x, y, dataset)
    is_taken = Registry.default().find_alike(before.dataset, before.model)  # a module cannot have a card's name
    return ModelSpec(model, x, y, dataset, f"own-{before.model}" if is_taken else before.model)


def _compare(before: BaselineEntry, spec: ModelSpec, options: Options, policy: Policy) -> Decision:
    """Measure a model again, and compare it with its entry of a baseline."""

    def measure_first(stored: BaselineEntry, n: int) -> BaselineEntry:
        return measure_entry_again(stored, options, spec=spec, n=n)

    return run_gate_check([before], measure_first, policy)


def _explain_baseline(given: object) -> str:
    return f"baseline: {given!r} given; allowed: the path of a file that `robbench baseline` wrote."


def _check_arguments(
    baseline: object, run: tuple[object, ...], at_least: object, max_drop: object, alpha: object
) -> Policy:
    """Check what the model is compared with; `run` says what is measured where there is no baseline.

    Raises:
        RobbenchError: there is nothing to compare with, or a number is not allowed.
    """
    if baseline is None and at_least is None:
        raise RobbenchError("assert_robust has nothing to compare with. Give baseline=, at_least=, or both.")
    if not isinstance(baseline, str | Path | None):
        raise RobbenchError(_explain_baseline(baseline))
    if baseline is not None and any(v is not None for v in run):
        raise RobbenchError("suite, samples, eps and norm are those of the baseline; give them without one only.")
    if at_least is not None and not (_is_number(at_least) and 0 <= float(at_least) <= 1):
        raise RobbenchError(f"at_least: {at_least!r} given; allowed: a share from 0 to 1.")
    if not _is_number(max_drop) or not _is_number(alpha):
        raise RobbenchError(f"max_drop: {max_drop!r}, alpha: {alpha!r} given; allowed: numbers.")
    return Policy(max_drop=float(max_drop), alpha=float(alpha))


def _is_number(value: object) -> TypeGuard[float]:
    """Tell whether a value is a number, which True and False are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def _find_entry(path: Path, name: str | None) -> BaselineEntry:
    """Find the entry of a baseline that the model is compared with."""
    entries = {entry.name: entry for entry in read_baseline(path).runs}
    if name is None and len(entries) == 1:
        return next(iter(entries.values()))
    if name not in entries:
        raise ResultError(f"{path} holds {', '.join(entries)}; name={name!r} given. Give name= one of these.")
    return entries[name]
