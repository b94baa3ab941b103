"""The data of figures: cards, and results and measurements of the weights that the cards name now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import pandas as pd

from robbench.analysis.gradients_record import GradientsFile, Pictures, read_gradients_files
from robbench.analysis.manifold_record import ManifoldsFile, read_manifolds_files
from robbench.analysis.record import LogitsFile, StoredLogits, read_logits_files
from robbench.analysis.series_record import SeriesFile, read_series_files
from robbench.analysis.study_record import StudyFile, read_studies
from robbench.analysis.study_spec import load_studies
from robbench.certify.record import Certificates, read_certified_files
from robbench.core.errors import CardError
from robbench.core.numbers import parse_eps
from robbench.core.words import name_tree
from robbench.linear.record import LinearFile, linear_folder, read_linear_files, read_linearization
from robbench.linear.theory import Linearization
from robbench.masking.record import SanityFile
from robbench.masking.stored import VerdictIndex
from robbench.models.card import Entry, Registry
from robbench.report.figures.canvas import DASHES, OKABE_ITO, make_figure
from robbench.report.linear import find_standard_radius
from robbench.results.places import locate_result
from robbench.results.reader import Damage, StoredResults, read_results
from robbench.results.schema import ResultFile

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["FigureData", "FigurePlan", "ModelStyle"]

_File = TypeVar("_File", LogitsFile, ManifoldsFile, GradientsFile)
_Content = TypeVar("_Content")
_ORDER = ("black", "blue", "sky", "orange", "vermillion", "purple", "green", "grey")


@dataclass(frozen=True)
class FigurePlan:
    """A figure that is not painted yet.

    Attributes:
        numbers: all plotted numbers, one row per number; None if there is nothing to plot.
        paint: paints the figure from `numbers` only.
        missing: commands that make the missing measurements.
        decimals: significant digits of the numbers on disk.
        caption: what to see in the figure.
    """

    numbers: pd.DataFrame | None
    paint: Callable[[], Figure]
    missing: Sequence[str] = ()
    decimals: int = 6
    caption: str = ""

    @classmethod
    def empty(cls, *missing: str) -> Self:
        """Make a plan without numbers, with the commands that make the missing measurements."""
        return cls(None, partial(make_figure, 1, 1), missing)


@dataclass(frozen=True)
class ModelStyle:
    """The style of a model's lines. It is the same in every figure."""

    label: str
    colour: str
    dashes: str | tuple[int, tuple[float, ...]]


class FigureData:
    """The results, measurements and cards that figures are made from.

    Attributes:
        registry: the cards.
        root: the results tree.
        data_dir: folder of the data sets; None means ROBBENCH_DATA.
        chosen: full names of the models to show, in a figure that can show any; empty means its own choice.
    """

    def __init__(
        self, registry: Registry, root: Path, data_dir: Path | None = None, chosen: Sequence[str] = ()
    ) -> None:
        self.registry, self.root, self.data_dir, self.chosen = registry, root, data_dir, chosen

    @cached_property
    def _stored(self) -> StoredResults:
        return read_results(self.root)

    @cached_property
    def _linear_files(self) -> tuple[dict[str, LinearFile], list[Damage]]:
        return read_linear_files(self.root)

    @cached_property
    def _logits_files(self) -> tuple[dict[str, tuple[LogitsFile, StoredLogits]], list[Damage]]:
        return read_logits_files(self.root)

    @cached_property
    def _manifolds_files(self) -> tuple[dict[str, tuple[ManifoldsFile, pd.DataFrame]], list[Damage]]:
        return read_manifolds_files(self.root)

    @cached_property
    def _series_files(self) -> tuple[dict[tuple[str, str], tuple[SeriesFile, pd.DataFrame]], list[Damage]]:
        return read_series_files(self.root)

    @cached_property
    def _certified(self) -> tuple[list[Certificates], list[Damage]]:
        return read_certified_files(self.root)

    @cached_property
    def _verdicts(self) -> VerdictIndex:
        return VerdictIndex(self.root)

    @cached_property
    def _landscapes(self) -> tuple[list[tuple[SanityFile, pd.DataFrame]], list[Damage]]:
        return self._verdicts.read_landscapes()

    @cached_property
    def _gradients_files(
        self,
    ) -> tuple[dict[str, tuple[GradientsFile, tuple[pd.DataFrame, Pictures]]], list[Damage]]:
        return read_gradients_files(self.root)

    @cached_property
    def _studies(self) -> tuple[dict[str, tuple[StudyFile, pd.DataFrame]], list[Damage]]:
        return read_studies(self.root)

    @property
    def damaged(self) -> list[Damage]:
        """The results and measurements that no figure shows, because they are damaged."""
        measured = [
            *(self._linear_files, self._logits_files, self._manifolds_files, self._gradients_files),
            *(self._series_files, self._studies, self._certified, self._landscapes),
        ]
        found = [*self._stored.damaged, *(damage for _, damaged in measured for damage in damaged)]
        return [*found, *self._verdicts.list_damaged()]

    @cached_property
    def results(self) -> list[ResultFile]:
        """The results of the weights of the model's card; of a model without a card, those of its latest weights."""
        # A challenge is left out. It is on few images, and only checks whether the other results can be trusted. What
        # looks for the nearest break has no radius.
        results = (r for r in self._stored.results if r.mode != "challenge" and r.has_radius)
        return [r for r in results if self._is_current(r.dataset, r.model, r.identity.get("weights"))]

    @cached_property
    def _linear(self) -> dict[str, LinearFile]:
        files, _ = self._linear_files
        return {k: f for k, f in files.items() if self._is_current(f.dataset, f.model, f.identity.get("weights"))}

    @cached_property
    def _latest(self) -> dict[str, object]:
        """The weights of the latest result of each model. Runs at several radii of earlier weights stay in the tree."""
        ordered = sorted(self._stored.results, key=lambda r: (r.date, r.run_id))
        return {f"{r.dataset}/{r.model}": r.identity.get("weights") for r in ordered}

    def _is_current(self, dataset: str, model: str, weights: object) -> bool:
        entry = self.find_entry(f"{dataset}/{model}")
        if entry is None:
            return self._latest.get(f"{dataset}/{model}", weights) == weights
        return entry.card.weights is not None and entry.card.weights.sha256 == weights

    def find_entry(self, full_name: str) -> Entry | None:
        """Return the card with this name; None if there is none."""
        try:
            return self.registry.find(full_name)
        except CardError:
            return None

    def read_linear(self, full_name: str) -> Linearization | None:
        """Read the linear measurement of a model; None if its present weights were not measured."""
        file = self._linear.get(full_name)
        return None if file is None else read_linearization(self.linear_folder(full_name))

    def read_logits(self, dataset: str) -> dict[str, StoredLogits]:
        """Read the logits of all models of a data set whose present weights were measured, in the order of figures."""
        return {name: stored for name, (_, stored) in self._choose_current(dataset, self._logits_files[0]).items()}

    def read_manifolds(self, dataset: str) -> dict[str, tuple[ManifoldsFile, pd.DataFrame]]:
        """Read the manifold geometry of all models of a data set, as `read_logits` reads the logits."""
        return self._choose_current(dataset, self._manifolds_files[0])

    def read_smoothed(self, dataset: str) -> dict[str, Certificates]:
        """Read the certificates of smoothing of all models of a data set, in the order of figures.

        Of a model with several noises, those with the most images.
        """
        names = {f"{dataset}/{file.model}" for file, _ in self._certified[0] if file.dataset == dataset}
        found = {name: stored[-1] for name in names if (stored := self.list_smoothed(name))}
        return {name: found[name] for name in self._sort_models(set(found))}

    def list_smoothed(self, full_name: str) -> list[Certificates]:
        """Return the certificates of smoothing of a model's present weights, those of the most images last."""
        stored = [
            c for c in self._certified[0] if (c[0].method, f"{c[0].dataset}/{c[0].model}") == ("smoothing", full_name)
        ]
        current = (c for c in stored if self._is_current(c[0].dataset, c[0].model, c[0].identity.get("weights")))
        return sorted(current, key=lambda c: (c[0].n, c[0].run_id))

    def list_results(self, full_name: str, suite: str) -> list[ResultFile]:
        """Return the results of a suite at any Linf radius, without other overrides."""
        mine = (r for r in self.results if (f"{r.dataset}/{r.model}", r.suite) == (full_name, suite))
        return [r for r in mine if r.threat.norm == "Linf" and set(r.overrides) <= {"eps"}]

    def read_landscapes(self, dataset: str) -> dict[str, tuple[SanityFile, pd.DataFrame]]:
        """Read the losses around images of all models of a data set, in the order of figures.

        They are at the usual Linf radius of the data set. Of a model with several sanity runs, those of the run on the
        most images.
        """
        radius = find_standard_radius(dataset)
        found = {
            f"{dataset}/{file.model}": (file, frame)
            for file, frame in self._landscapes[0]
            if file.dataset == dataset
            and (file.threat.norm, parse_eps(file.threat.eps)) == ("Linf", radius)
            and self._is_current(dataset, file.model, file.measured.get("weights"))
        }
        return {name: found[name] for name in self._sort_models(set(found))}

    def read_series(self, kind: str, dataset: str) -> dict[str, pd.DataFrame]:
        """Read the series of a kind of all models of a data set, in the order of figures.

        A series that trains counts if it trained by the recipe of the model's card.
        """
        current = {}
        for (measure, name), (file, rows) in self._series_files[0].items():
            entry, recipe = self.find_entry(name), file.identity.get("recipe")
            if recipe is None:
                is_current = self._is_current(dataset, file.model, file.identity.get("weights"))
            else:
                is_current = bool(entry and entry.card.recipe and entry.card.recipe.model_dump(mode="json") == recipe)
            if (measure, file.dataset) == (kind, dataset) and is_current:
                current[name] = rows
        return {name: current[name] for name in self._sort_models(set(current))}

    def read_gradients(self, dataset: str) -> dict[str, tuple[GradientsFile, tuple[pd.DataFrame, Pictures]]]:
        """Read the loss gradients of all models of a data set, as `read_logits` reads the logits."""
        return self._choose_current(dataset, self._gradients_files[0])

    def read_study(self, full_name: str) -> tuple[StudyFile, pd.DataFrame] | None:
        """Read a part of a study, such as `digits/tsipras2019-pair`; None if it is not as it is declared now."""
        dataset, _, part = full_name.partition("/")
        name, _, kind = part.rpartition("-")
        declared = getattr(load_studies()[f"{name}-{dataset}"], kind).model_dump(mode="json")
        found = self._studies[0].get(full_name)
        return found if found is not None and found[0].identity.get("spec") == declared else None

    def make_study_command(self, full_name: str) -> str:
        """Return the shell command that trains the study of a part such as `digits/tsipras2019-pair`."""
        dataset, _, part = full_name.partition("/")
        restart = " --restart" if any((self.root / full_name / "study").glob("*.json")) else ""
        return f"robbench train --family {part.rpartition('-')[0]}-{dataset}{restart}{name_tree(self.root)}"

    def _choose_current(
        self, dataset: str, files: Mapping[str, tuple[_File, _Content]]
    ) -> dict[str, tuple[_File, _Content]]:
        current = {
            name: stored
            for name, stored in files.items()
            if stored[0].dataset == dataset
            and self._is_current(dataset, stored[0].model, stored[0].identity.get("weights"))
        }
        return {name: current[name] for name in self._sort_models(set(current))}

    def linear_folder(self, full_name: str) -> Path:
        """Return the folder of a model's linear measurement."""
        return linear_folder(self.root, *full_name.split("/", 1))

    def measured_models(self, dataset: str) -> list[str]:
        """Return the models of a data set with a linear measurement, in the order in which figures show them."""
        return self._sort_models({name for name, f in self._linear.items() if f.dataset == dataset})

    def has_data(self, dataset: str) -> bool:
        """Return whether a data set has any result or linear measurement."""
        return any(r.dataset == dataset for r in self.results) or bool(self.measured_models(dataset))

    def standard_results(self, dataset: str, suite: str) -> dict[str, ResultFile]:
        """Return the results of a suite without overrides: model -> result, in the order in which figures show them."""
        by_model = {
            f"{r.dataset}/{r.model}": r
            for r in self.results
            if (r.dataset, r.suite) == (dataset, suite) and not r.overrides
        }
        return {name: by_model[name] for name in self._sort_models(set(by_model))}

    def locate_result(self, result: ResultFile) -> Path:
        """Return the folder of a result."""
        return locate_result(self.root, result)

    def make_command(self, full_name: str, arguments: str) -> str:
        """Return the shell command that measures a model. It trains the model first if its weights are not here.

        Args:
            full_name: the model, such as `digits/at`.
            arguments: arguments of robbench, with {} in the place of the model.
        """
        entry = self.find_entry(full_name)
        train = f"robbench train {full_name} && " if entry is not None and entry.needs_training else ""
        command, what, *_ = arguments.split()
        folder = {"measure": what, "sanity": "sanity"}.get(command)
        is_stale = folder is not None and any((self.root / full_name / folder).glob("*.json"))
        overwrite = " --overwrite" if is_stale and not train else ""
        return f"{train}robbench {arguments.format(full_name)}{name_tree(self.root)}{overwrite}"

    def choose_styles(self, names: Sequence[str]) -> dict[str, ModelStyle]:
        """Choose for every model a label, a colour by its kind of training, and dashes by its position."""
        return {
            name: ModelStyle(self._label(name), OKABE_ITO[self._colour(name)], DASHES[i % len(DASHES)])
            for i, name in enumerate(names)
        }

    def _sort_models(self, names: set[str]) -> list[str]:
        """Sort models by kind of training: natural, adversarial, label smoothing, logit squeezing, noise."""
        return sorted(names, key=lambda n: (_ORDER.index(self._colour(n)), n))

    def _label(self, name: str) -> str:
        entry = self.find_entry(name)
        short = name.partition("/")[2]
        return f"{short}: {entry.card.title}" if entry else short

    def _colour(self, name: str) -> str:
        """Choose the colour by the recipe, so that each kind of training has the same colour in every figure."""
        entry = self.find_entry(name)
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
