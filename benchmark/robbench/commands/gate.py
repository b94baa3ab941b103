"""`robbench baseline` and `robbench check`: the gate for continuous integration."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from robbench.commands.options import SOURCES, DataDir, Imports, Json, Models, check_about, per_channel, resumable
from robbench.core.errors import RobbenchError
from robbench.core.user_code import import_own

if TYPE_CHECKING:
    from robbench.gate.baseline import BaselineEntry
    from robbench.gate.measure import Machine

__all__ = ["baseline", "check"]

Stored = Annotated[
    list[Path] | None, typer.Option("--result", help="Read a stored result instead of measuring (repeatable).")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:i.")]
Lanes = Annotated[int | None, typer.Option(help="Batch width; chosen by image size if left out.")]
Kept = Annotated[
    Path | None,
    typer.Option("--results", help="Keep the records in this results tree. Stored records are not measured again."),
]


def baseline(
    out: Annotated[Path, typer.Option(help="The file to write.")],
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help=f"A registered model, or a source: {SOURCES} (repeatable)."),
    ] = None,
    result: Stored = None,
    suite: Annotated[str, typer.Option("--suite", "-s", help="A suite's name, or a .toml file.")] = "whitebox",
    samples: Annotated[int | None, typer.Option(help="N test images instead of all.")] = None,
    sample_seed: Annotated[int, typer.Option(help="Seed of the random choice and order of the images.")] = 0,
    eps: Annotated[str | None, typer.Option(help='Radius in [0, 1] pixel units, such as "8/255".')] = None,
    norm: Annotated[str | None, typer.Option(help="Linf, L2 or L1; goes with --eps.")] = None,
    dataset: Annotated[str | None, typer.Option(help="The test set for a source.")] = None,
    architecture: Annotated[str | None, typer.Option(help="For file: and hf:, as for eval.")] = None,
    mean: Annotated[str | None, typer.Option(help="For file: and hf:, as for eval.")] = None,
    std: Annotated[str | None, typer.Option(help="Goes with --mean.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the attacks' random numbers.")] = 0,
    lanes: Lanes = None,
    device: Device = "auto",
    models: Models = None,
    imports: Imports = None,
    data_dir: DataDir = None,
    results: Kept = None,
) -> None:
    """Attack models and write their verdicts, image by image, as a baseline for `robbench check`.

    Commit the file. It holds no images and no weights.
    """
    from robbench.core.numbers import parse_threat
    from robbench.gate.baseline import Given, write_baseline
    from robbench.gate.measure import read_stored_entry

    import_own(imports or [])
    if bool(model) == bool(result):
        raise RobbenchError("Give either --model, to measure, or --result, to read stored results.")
    entries = [read_stored_entry(path) for path in result or []]
    about: dict[str, Any] = {
        "dataset": dataset,
        "architecture": architecture,
        "mean": per_channel("--mean", mean),
        "std": per_channel("--std", std),
    }
    if model:
        from robbench.gate.measure import measure_entry

        names = _find_models(model, models, about)
        givens = [Given(model=name, **(about if is_source else {})) for name, is_source in names]
        with _open_machine(results, device, lanes, data_dir, models, samples is None) as machine:
            chosen: dict[str, Any] = {"samples": samples, "sample_seed": sample_seed, "seed": seed}
            entries = [measure_entry(given, suite, machine, **chosen, norm=norm, eps=eps) for given in givens]
    write_baseline(out, entries)
    for entry in entries:
        clean, robust = entry.clean_accuracy, entry.robust_accuracy
        print(
            f"{entry.name} · {entry.identity['suite']['name']} · {parse_threat(**entry.threat)}: {entry.n} images, "
            f"clean {100 * clean.value:.1f} %, worst case {100 * robust.value:.1f} % "
            f"[{100 * robust.low:.1f}, {100 * robust.high:.1f}]"
        )
    print(f"{out} written. Check against it: robbench check --baseline {out}")


def check(
    baseline: Annotated[Path, typer.Option(help="The file that `robbench baseline` wrote.")],
    model: Annotated[
        list[str] | None,
        typer.Option("--model", "-m", help="Models of the baseline. If it holds only one, any other model."),
    ] = None,
    result: Stored = None,
    max_drop: Annotated[float, typer.Option(help="Largest allowed drop of an accuracy, in points.")] = 1.0,
    alpha: Annotated[float, typer.Option(help="Largest allowed probability that unchanged models fail.")] = 0.01,
    sequential: Annotated[bool, typer.Option("--sequential", help="Stop as soon as the answer is certain.")] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of the attacks, instead of the baseline's.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write a summary for a job's page to this file.")] = None,
    lanes: Lanes = None,
    device: Device = "auto",
    models: Models = None,
    imports: Imports = None,
    data_dir: DataDir = None,
    results: Kept = None,
    as_json: Json = False,
) -> None:
    """Measure again and compare with a baseline, image by image.

    Exit code 0: the check passed. 1: a model is significantly less robust, or an attack is weaker. 2: wrong input, or
    measurements that cannot be compared.
    """
    from robbench.core.files import write_atomically
    from robbench.gate.baseline import read_baseline
    from robbench.gate.decision import Policy, decide_gate, run_gate_check
    from robbench.gate.measure import choose_entries, measure_entry_again, read_stored_entry
    from robbench.gate.paired import compare_entries
    from robbench.report.gate import dump_decision, format_junit, format_markdown, print_decision

    import_own(imports or [])
    policy = Policy(max_drop=max_drop, alpha=alpha)
    stored = read_baseline(baseline)
    if result:
        if model or sequential or seed is not None:
            raise RobbenchError(
                "--result reads stored results; --model, --seed and --sequential measure. Give one or the others."
            )
        entries = [read_stored_entry(path) for path in result]
        decision = decide_gate([compare_entries(_find_entry(stored.runs, e), e) for e in entries], policy)
    else:
        chosen = choose_entries(stored, model or [])
        givens = {entry.name: given for entry, given in chosen}
        with _open_machine(results, device, lanes, data_dir, models, False) as machine:

            def measure(entry: BaselineEntry, n: int) -> BaselineEntry:
                return measure_entry_again(entry, machine, given=givens[entry.name], n=n, seed=seed)

            decision = run_gate_check([entry for entry, _ in chosen], measure, policy, sequential)
    for path, text in ((junit, format_junit), (markdown, format_markdown)):
        if path is not None:
            write_atomically(path, text(decision).encode())
    if as_json:
        print(json.dumps(dump_decision(decision), indent=2, ensure_ascii=False))
    else:
        print_decision(decision)
    if decision.failed:
        raise typer.Exit(1)


def _find_entry(baseline: list[BaselineEntry], now: BaselineEntry) -> BaselineEntry:
    """Find the entry of a baseline with the name of `now`. A baseline with one entry is compared with any model."""
    from robbench.core.errors import ResultError, unknown_name

    by_name = {entry.name: entry for entry in baseline}
    if now.name not in by_name and len(baseline) > 1:
        raise ResultError(unknown_name("model of the baseline", now.name, by_name))
    return by_name.get(now.name, baseline[0])


def _find_models(model: list[str], models: list[Path] | None, about: dict[str, Any]) -> list[tuple[str, bool]]:
    """Return full names, and whether each is a source. This finds typos before minutes of work."""
    from robbench.models.card import Registry
    from robbench.models.sources import parse_source

    registry = Registry.default(models or [])
    sources = {name for name in model if parse_source(name)}
    check_about(sources, about)
    return [(name if name in sources else registry.find(name).full_name, name in sources) for name in model]


@contextlib.contextmanager
def _open_machine(
    results: Path | None,
    device: str,
    lanes: int | None,
    data_dir: Path | None,
    models: list[Path] | None,
    hint_samples: bool,
) -> Iterator[Machine]:
    from robbench.gate.measure import Machine, open_results_tree
    from robbench.report.terminal import TerminalReporter

    reporter = TerminalReporter(hint_samples=hint_samples)
    kept = "Every image that was finished is kept." if results else "Nothing is kept without --results DIR."
    with open_results_tree(results) as tree, resumable(kept), contextlib.closing(reporter):
        yield Machine(
            results=tree,
            device=device,
            lanes=lanes,
            data_dir=data_dir,
            models=tuple(models or ()),
            reporter=reporter,
        )
