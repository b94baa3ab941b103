"""What figures are made from: cards, results and measurements that belong to the weights a card has now."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Self

import pandas as pd

from robbench.core.errors import CardError
from robbench.linear.record import LinearFile, linear_folder, read_linear_files, read_linearization
from robbench.linear.theory import Linearization
from robbench.models.card import Entry, Registry
from robbench.report.figures.canvas import DASHES, OKABE_ITO, blank
from robbench.results.schema import ResultFile
from robbench.results.store import load_results, result_folder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Look", "Picture", "Source"]

_ORDER = ("black", "blue", "sky", "orange", "vermillion", "purple", "green", "grey")


@dataclass(frozen=True)
class Picture:
    """A figure before it is painted.

    Attributes:
        numbers: all that is plotted, one row per number; None where there is nothing to plot.
        paint: draws `numbers`, and nothing else.
        missing: what it lacks, each with the command that makes it.
        decimals: significant digits of the numbers on disk.
    """

    numbers: pd.DataFrame | None
    paint: Callable[[], Figure]
    missing: Sequence[str] = ()
    decimals: int = 6

    @classmethod
    def nothing(cls, *missing: str) -> Self:
        """Make a picture of nothing, and say what it would take."""
        return cls(None, partial(blank, 1, 1), missing)


@dataclass(frozen=True)
class Look:
    """How a model is drawn: the same in every figure."""

    label: str
    colour: str
    dashes: str | tuple[int, tuple[float, ...]]


class Source:
    """The results tree and the cards beside it.

    Attributes:
        registry: the cards.
        root: the results tree.
        data_dir: where the data sets are; None means ROBBENCH_DATA.
    """

    def __init__(self, registry: Registry, root: Path, data_dir: Path | None = None) -> None:
        self.registry, self.root, self.data_dir = registry, root, data_dir

    @cached_property
    def results(self) -> list[ResultFile]:
        """The results of weights that are those of the card; models without a card have no other."""
        # A challenge is on few images, and asks whether to believe the others' worst case.
        full = (r for r in load_results(self.root) if r.mode != "challenge")
        return [r for r in full if self._current(r.dataset, r.model, r.identity.get("weights"))]

    @cached_property
    def _linear(self) -> dict[str, LinearFile]:
        files = read_linear_files(self.root)
        return {k: f for k, f in files.items() if self._current(f.dataset, f.model, f.identity.get("weights"))}

    def _current(self, dataset: str, model: str, weights: object) -> bool:
        entry = self.entry(f"{dataset}/{model}")
        return entry is None or (entry.card.weights is not None and entry.card.weights.sha256 == weights)

    def entry(self, full_name: str) -> Entry | None:
        """Look a card up; None if there is none of this name."""
        try:
            return self.registry.find(full_name)
        except CardError:
            return None

    def linear(self, full_name: str) -> Linearization | None:
        """Read what was measured of a model; None if nothing was on the weights it has now."""
        file = self._linear.get(full_name)
        return None if file is None else read_linearization(self.linear_folder(full_name))

    def linear_folder(self, full_name: str) -> Path:
        """Name the folder with a model's measurement."""
        return linear_folder(self.root, *full_name.split("/", 1))

    def measured(self, dataset: str) -> list[str]:
        """List the measured models of a data set, in the order they are drawn in."""
        return self._ordered({name for name, f in self._linear.items() if f.dataset == dataset})

    def knows(self, dataset: str) -> bool:
        """Tell whether anything was measured on a data set."""
        return any(r.dataset == dataset for r in self.results) or bool(self.measured(dataset))

    def standard(self, dataset: str, suite: str) -> dict[str, ResultFile]:
        """Return the results of a suite without overrides on a data set, by model, in the order they are drawn in."""
        found = {
            f"{r.dataset}/{r.model}": r
            for r in self.results
            if (r.dataset, r.suite) == (dataset, suite) and not r.overrides
        }
        return {name: found[name] for name in self._ordered(set(found))}

    def folder(self, result: ResultFile) -> Path:
        """Name the folder of a result."""
        return result_folder(self.root, result)

    def commands(self, full_name: str, what: str) -> str:
        """Say how something that is missing of a model is made: training first, if it needs that."""
        entry = self.entry(full_name)
        train = f"robbench train {full_name} && " if entry is not None and entry.card.weights is None else ""
        again = " --overwrite" if not train and (self.linear_folder(full_name) / "linear.json").exists() else ""
        return f"{train}robbench {what.format(full_name)}{again if what.startswith('measure') else ''}"

    def looks(self, names: Sequence[str]) -> dict[str, Look]:
        """Give every model a label, a colour by how it was trained, and dashes that no other one here has."""
        return {
            name: Look(self._label(name), OKABE_ITO[self._colour(name)], DASHES[i % len(DASHES)])
            for i, name in enumerate(names)
        }

    def _ordered(self, names: set[str]) -> list[str]:
        """Order models by how they were trained: natural, adversarial, smoothed, squeezed, with noise."""
        return sorted(names, key=lambda n: (_ORDER.index(self._colour(n)), n))

    def _label(self, name: str) -> str:
        entry = self.entry(name)
        short = name.partition("/")[2]
        return f"{short}: {entry.card.title}" if entry else short

    def _colour(self, name: str) -> str:
        """Choose by the recipe's terms, so that a kind of model has its colour in every figure."""
        entry = self.entry(name)
        recipe = entry.card.recipe if entry else None
        if recipe is None:
            return "black" if entry else "grey"
        if recipe.adversary is not None:
            return "sky" if recipe.pairing or recipe.adversary.steps < 3 else "blue"
        if recipe.alpha:
            return "vermillion" if recipe.sigma else "orange"
        if recipe.beta:
            return "green" if recipe.sigma else "purple"
        return "grey" if recipe.sigma else "black"
