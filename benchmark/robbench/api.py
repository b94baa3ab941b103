"""The public functions of robbench, as `robbench.NAME`. docs/api.md shows all of them.

Each is a thin layer over the folder that does the work. It takes lists of radii where that makes sense, and it warns
(`RobustnessWarning`) where a result carries flags, so that nobody reads a number without its caveat.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Sequence
from numbers import Real
from pathlib import Path
from typing import TypeAlias, Unpack, overload

import pandas as pd
import torch
from torch import Tensor, nn

from robbench.attacks import Attack
from robbench.classifier.prepare import pick_device
from robbench.core.arguments import explain_arguments
from robbench.core.errors import RobbenchError
from robbench.core.numbers import parse_eps
from robbench.core.types import Judge
from robbench.data.sets import NAMES, load
from robbench.evaluation.attack_images import AttackFields, AttackOutcome, attack_images, compute_clean_accuracy
from robbench.evaluation.options import Options, OtherFields, check_count
from robbench.evaluation.progress import Reporter
from robbench.evaluation.request import RunRequest
from robbench.evaluation.run import make_run, run_here
from robbench.evaluation.shards import order_rows
from robbench.models.card import Registry
from robbench.models.load import load_model as load_card
from robbench.models.load_source import load_source
from robbench.models.schema import DATASETS
from robbench.models.spec import ModelSpec, SpecFields
from robbench.report.progress import TerminalReporter
from robbench.report.result import Result, Results
from robbench.results.records import read_own_rows
from robbench.suite import SuiteSource

__all__ = ["RobustnessWarning", "attack", "clean_accuracy", "evaluate", "load_data", "load_dataset", "load_model"]


class EvaluateFields(SpecFields, OtherFields, total=False):
    """The keyword arguments of `evaluate`: the fields of `ModelSpec`, and of `Options` but eps."""


Radii: TypeAlias = list[float] | list[str] | list[str | float] | tuple[str | float, ...]
"""Several radii: a list or a tuple of numbers and texts. (Not `Sequence`, of which a single text is one, too.)"""


class RobustnessWarning(UserWarning):
    """A robust accuracy carries a flag: something about the model makes the number hard to trust."""


@explain_arguments
def load_model(
    name: str,
    *,
    dataset: str | None = None,
    architecture: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    models: Sequence[str | Path] = (),
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load a model: images [N, C, H, W] in [0, 1] -> logits [N, K], in eval mode, parameters frozen.

    Args:
        name: a registered name (`digits/at`; `robbench list models`), or a source such as `file:PATH` or `timm:NAME`
            (docs/models.md).
        dataset: for a source, the data set whose images and classes the model is for.
        architecture: for `file:` and `hf:`, the network, such as "wide_resnet:depth=28,widen_factor=10".
        mean: for `file:` and `hf:`, per channel of images in [0, 1]; the normalization becomes a part of the module.
        std: goes with mean.
        models: further folders of cards.
        device: where the module goes.

    Raises:
        RobbenchError: there is no such model, its weights are missing or damaged, or the arguments do not fit it.
    """
    if not isinstance(name, str):
        raise RobbenchError(
            f"name: {type(name).__name__} given; allowed: a registered name (`robbench list models`), or a source."
        )
    where = pick_device(Options.take({"device": device}).device)
    folders = Options(models=models).models
    spec = ModelSpec.take(name, {"dataset": dataset, "architecture": architecture, "mean": mean, "std": std})
    if spec.source is None:
        module = load_card(Registry.default([Path(m) for m in folders]).find(name)).module
    else:
        known = spec.source.test_set(dataset)
        if known not in DATASETS:
            raise RobbenchError(
                f"load_model({name!r}): dataset {known!r} given; a source needs the data set that its images and "
                f"classes are those of: {', '.join(DATASETS)}."
            )
        facts = DATASETS[known]
        module = load_source(spec, facts.in_shape, facts.num_classes).module
    return module.to(where).eval().requires_grad_(False)


@explain_arguments
def load_data(
    name: str,
    n: int | None = None,
    *,
    split: str = "test",
    data_dir: str | Path | None = None,
) -> tuple[Tensor, Tensor]:
    """Load images [N, C, H, W] float32 in [0, 1] and labels [N] int64, in official order.

    Args:
        name: digits, mnist, fashion_mnist, cifar10 or cifar100 (`robbench list data`).
        n: the first n images; None means all.
        split: test or train.
        data_dir: where the data sets are; None means ROBBENCH_DATA. digits needs neither.

    Raises:
        DataError: the name or split is unknown, or files are missing or damaged.
    """
    if split not in ("test", "train"):
        raise RobbenchError(f"split: {split!r} given; allowed: test, train.")
    if not isinstance(name, str):
        raise RobbenchError(f"name: {name!r} given; allowed: {', '.join(NAMES)}.")
    count = check_count("n", n, 1)
    data = load(name, "train" if split == "train" else "test", Options(data_dir=data_dir).data_dir)
    x = torch.from_numpy(data.x[:count]).to(torch.float32) / data.scale
    return x, torch.from_numpy(data.y[:count])


load_dataset = load_data
"""Another name of `load_data`."""


@explain_arguments
def clean_accuracy(
    model: str | nn.Module, x: Tensor, y: Tensor, *, lanes: int | None = None, device: str | torch.device = "auto"
) -> float:
    """Compute the share of images that a model classifies correctly, in [0, 1].

    Args:
        model: a module in eval mode that maps images [N, C, H, W] in [0, 1] to logits [N, K], or a source.
        x: images [N, C, H, W] in [0, 1].
        y: labels [N], integers.
        lanes: images per forward pass; None chooses by image size and device.
        device: auto, cpu, cuda or cuda:i.

    Raises:
        RobbenchError: the model or the images do not allow an honest number; the sentence says why.

    Warns:
        RobustnessWarning: for every flag of the model.
    """
    accuracy, flags = compute_clean_accuracy(model, x, y, Options.take({"lanes": lanes, "device": device}))
    warn_of_flags(flags)
    return accuracy


@overload
def attack(
    model: str | nn.Module,
    attack: Attack,
    x: Tensor,
    y: Tensor,
    *,
    eps: str | float,
    judge: Judge = "any",
    **fields: Unpack[AttackFields],
) -> AttackOutcome: ...


@overload
def attack(
    model: str | nn.Module,
    attack: Attack,
    x: Tensor,
    y: Tensor,
    *,
    eps: Radii,
    judge: Judge = "any",
    **fields: Unpack[AttackFields],
) -> list[AttackOutcome]: ...


@explain_arguments
def attack(
    model: str | nn.Module,
    attack: Attack,
    x: Tensor,
    y: Tensor,
    *,
    eps: str | float | Radii,
    judge: Judge = "any",
    **fields: Unpack[AttackFields],
) -> AttackOutcome | list[AttackOutcome]:
    """Run one attack on a batch of images, and judge every point that it proposes. Nothing is written to disk.

    Args:
        model: a module in eval mode that maps images [N, C, H, W] in [0, 1] to logits [N, K], or a source.
        attack: one of `robbench.attacks`, such as PGD(steps=40).
        x: images [N, C, H, W] in [0, 1].
        y: labels [N], integers.
        eps: radius in [0, 1] pixel units, "8/255" or 0.3; a list of radii gives a list of outcomes.
        judge: "any" point that is queried may break an image, or only the "final" one of each restart.
        **fields: norm (Linf, L2 or L1), seed, lanes, gradients, fast_layers, one_by_one, target, levels and device, as
            for `evaluate`.

    Returns:
        x_adv, broken, distance and more of each image (`AttackOutcome`).

    Raises:
        RobbenchError: the model, the images or an option do not allow an honest number; the sentence says why.

    Warns:
        RobustnessWarning: for every flag of the outcome.
    """
    if isinstance(eps, str | Real):
        outcome = attack_images(model, attack, x, y, eps=eps, judge=judge, **fields)
        warn_of_flags(outcome.flags)
        return outcome
    radii = list_radii(eps, fields.get("norm", "Linf"))
    outcomes = [attack_images(model, attack, x, y, eps=e, judge=judge, **fields) for e in radii]
    warn_of_flags({key: text for outcome in outcomes for key, text in outcome.flags.items()})
    return outcomes


@overload
def evaluate(
    model: str | nn.Module,
    suite: SuiteSource = "whitebox",
    *,
    eps: str | float | None = None,
    reporter: Reporter | None = None,
    progress: bool = True,
    **fields: Unpack[EvaluateFields],
) -> Result: ...


@overload
def evaluate(
    model: str | nn.Module,
    suite: SuiteSource = "whitebox",
    *,
    eps: Radii,
    reporter: Reporter | None = None,
    progress: bool = True,
    **fields: Unpack[EvaluateFields],
) -> Results: ...


@explain_arguments
def evaluate(
    model: str | nn.Module,
    suite: SuiteSource = "whitebox",
    *,
    eps: str | float | Radii | None = None,
    reporter: Reporter | None = None,
    progress: bool = True,
    **fields: Unpack[EvaluateFields],
) -> Result | Results:
    """Measure the robust accuracy of a model under a suite of attacks.

    Args:
        model: a registered model's name (`digits/natural`), a source of models without a card (`file:PATH`, `hf:REPO`,
            `timm:NAME`, `robustbench:NAME`, `package.module:function`; see docs/models.md), or any module in eval mode
            that maps images [N, C, H, W] in [0, 1] to logits [N, K].
        suite: a suite's name (`robbench list suites`), the path of a suite file, or a list of attacks:
            `[PGD(steps=40), FGSM()]`.
        eps: radius in [0, 1] pixel units, "8/255" or 0.3; None takes the suite's for the data set. A list of radii
            gives a list of results.
        reporter: hears of progress, instead of a progress bar.
        progress: show a progress bar on stderr if it is a terminal or a notebook; False shows nothing.
        **fields: x, y, dataset, name, architecture, mean and std say more about the model (`models.spec.ModelSpec`).
            norm, samples, sample_seed, seed, lanes, gradients, fast_layers, one_by_one, target, levels, device,
            data_dir, models, results, overwrite, save_adversarials and wait say more about the run
            (`evaluation.options.Options`).

    Returns:
        The result: every field of result.json, its records, and a table for people (`report.result.Result`).

    Raises:
        RobbenchError: the model, the data or the options do not allow an honest number; the sentence says why.

    Warns:
        RobustnessWarning: for every flag of the result.
    """
    if eps is None or isinstance(eps, str | Real):
        result = _evaluate_at(model, suite, eps, reporter, progress, fields)
        warn_of_flags(result.flags)
        return result
    radii = list_radii(eps, fields.get("norm"))
    # The largest radius runs first: if it is not allowed, nothing has run.
    largest_first = sorted(range(len(radii)), key=lambda i: -parse_eps(radii[i]))
    found = {i: _evaluate_at(model, suite, radii[i], reporter, progress, fields) for i in largest_first}
    results = Results(found[i] for i in range(len(radii)))
    warn_of_flags({key: text for result in results for key, text in result.flags.items()})
    return results


def _evaluate_at(
    model: str | nn.Module,
    suite: SuiteSource,
    eps: str | float | None,
    reporter: Reporter | None,
    progress: bool,
    fields: EvaluateFields,
) -> Result:
    """Evaluate at one radius, and keep what the records are read from."""
    own = TerminalReporter(hint_samples="samples" not in fields) if reporter is None and progress else None
    if own is not None and not own.is_seen:
        own = None
    with contextlib.closing(own) if own is not None else contextlib.nullcontext():
        run = make_run(RunRequest.of(model, suite, eps=eps, **fields), reporter or own)
        file = run_here(run)
    index, store = run.index, run.store
    if store is None:
        rows = order_rows(run.shards.collect_rows(), index, [stage.name for stage in run.stages])
        return Result.of(file, rows.copy)

    def read_records() -> pd.DataFrame:
        rows = read_own_rows(store.outcomes_path, file.run_id)
        return rows[rows["sample"].isin(index)].reset_index(drop=True)

    return Result.of(file, read_records, store.adversarials_path, Path(run.options.results or "."))


def list_radii(eps: object, norm: str | None) -> list[str | float]:
    """Check a list of radii before anything runs; `norm` is None where the suite names it.

    Raises:
        RobbenchError: it is no list, it is empty, or one of its entries is not a radius.
    """
    if isinstance(eps, Tensor):
        raise RobbenchError(f"eps: {eps!r} given; allowed: numbers and texts. eps.tolist() makes these of a tensor.")
    entries = list(eps) if isinstance(eps, Iterable) and not isinstance(eps, bytes | dict) else []
    radii = [Options(eps=entry, norm=norm if entry is not None else None).eps for entry in entries]
    if not radii or None in radii:
        raise RobbenchError(f'eps: {eps!r} given; allowed: a radius such as "8/255" or 0.3, or a list of radii.')
    return [radius for radius in radii if radius is not None]


def warn_of_flags(flags: dict[str, str]) -> None:
    """Warn once of each flag, at the line that called the public function (behind `explain_arguments`)."""
    for name, text in flags.items():
        warnings.warn(f"{name}: {text}", RobustnessWarning, stacklevel=4)
