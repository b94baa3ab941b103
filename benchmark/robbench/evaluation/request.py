"""The request for a run: model, suite and options, as the user gives them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, Unpack

from robbench.core.errors import SuiteError
from robbench.evaluation.options import OptionFields, Options, check_names
from robbench.models.spec import ModelSpec, SpecFields
from robbench.results.schema import DESCRIPTION_VERSION
from robbench.suite import CUSTOM, Suite, load_suite

if TYPE_CHECKING:
    from torch import nn

    from robbench.attacks import Attack
    from robbench.results.run_files import Description

__all__ = ["RunFields", "RunRequest"]


class RunFields(SpecFields, OptionFields, total=False):
    """The keyword arguments of `evaluate`: the fields of `ModelSpec` and of `Options`."""


@dataclass(frozen=True, eq=False)
class RunRequest:
    """The request for one run.

    Attributes:
        spec: the model and its images.
        suite: a suite's name, the path of a suite file, a list of attacks, or a suite.
        options: all other options.
        expected: the identity that the run must have; None allows every identity. `EvaluationRun.open` refuses a run
            with another identity.
        same_code: whether stored records of other judging code are computed again, even if they are complete. Gates
            ask for this.
    """

    spec: ModelSpec
    suite: str | Path | Suite | Sequence[Attack] = "whitebox"
    options: Options = field(default_factory=Options)
    expected: dict[str, Any] | None = None
    same_code: bool = False

    def __post_init__(self) -> None:
        """Refuse a norm without a radius, unless the suite looks for the nearest break."""
        norm, eps = self.options.norm, self.options.eps
        if norm is not None and eps is None and load_suite(self.suite).judge != "nearest":
            raise SuiteError(
                f"--norm {norm} given without --eps. The suite's radius belongs to its own norm. Give --eps too."
            )

    @classmethod
    def of(
        cls,
        model: str | nn.Module,
        suite: str | Path | Suite | Sequence[Attack] = "whitebox",
        **fields: Unpack[RunFields],
    ) -> Self:
        """Make a request from the arguments of `evaluate`.

        Raises:
            RobbenchError: a name is unknown, or a value is not allowed.
        """
        check_names(fields, RunFields)
        return cls(ModelSpec.take(model, fields), suite, Options.take(fields))

    @classmethod
    def from_description(cls, about: Description, place: Mapping[str, Any]) -> Self:
        """Make the request that resumes a run.

        Args:
            about: the description of the run (run.json).
            place: the options that the description does not hold: `results`, `device` and `wait`.

        Raises:
            RobbenchError: a value is not allowed.
        """
        asked = about.as_arguments() | dict(place)
        spec = ModelSpec.take(asked["model"], asked)
        return cls(spec, about.suite, Options.take(asked), about.identity)

    def describe(self) -> dict[str, Any]:
        """Return the fields of run.json that the request determines.

        The run itself adds `n`, `stages`, `date`, `answers`, `code` and `identity` when it begins.
        """
        spec, options = self.spec, self.options
        about = spec.describe()
        if about["model"] is not None and about["model"].startswith("file:"):
            about["model"] = f"file:{Path(about['model'].removeprefix('file:')).expanduser().resolve()}"
        for name in ("data", "classes"):
            if isinstance(about[name], str):
                about[name] = str(Path(about[name]).expanduser().resolve())
        return (
            about
            | {
                "version": DESCRIPTION_VERSION,
                "own_images": spec.x is not None or (spec.data is not None and about["data"] is None),
                "suite": self._describe_suite(),
                "norm": options.norm,
                "eps": None if options.eps is None else str(options.eps),
                "samples": options.samples,
                "sample_seed": options.sample_seed,
                "seed": options.seed,
                "lanes": options.lanes,
                "gradients": options.gradients,
                "fast_layers": options.fast_layers,
                "one_by_one": options.one_by_one,
                "models": [str(Path(m).resolve()) for m in options.models],
                "data_dir": None if options.data_dir is None else str(Path(options.data_dir).resolve()),
                "save_adversarials": options.save_adversarials,
                "surrogate": options.surrogate,
            }
            | ({"target": options.target} if options.target is not None else {})
            | ({"levels": options.levels} if options.levels is not None else {})
        )

    def _describe_suite(self) -> str:
        if isinstance(self.suite, str | Path):
            text = str(self.suite)
            return str(Path(text).resolve()) if text.endswith(".toml") else text
        return self.suite.name if isinstance(self.suite, Suite) else CUSTOM
