"""The schema of a model card: the tables of its TOML file. Checks are strict, and all problems are reported at once."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from robbench.core.errors import CardError
from robbench.core.files import load_toml
from robbench.core.types import Norm, Threat
from robbench.models.fields import (
    CardTable,
    Exact,
    Numbers,
    Scalar,
    Text,
    check_package_name,
    check_relative_path,
    check_sha256,
)
from robbench.models.recipes import CpuOverrides, LargeBatch, Recipe


class DatasetFacts(NamedTuple):
    """The facts about a data set that cards need. `in_shape` is (C, H, W)."""

    num_classes: int
    in_shape: tuple[int, int, int]


DatasetName = Literal["digits", "mnist", "fashion_mnist", "cifar10", "cifar100"]
DATASETS: dict[str, DatasetFacts] = {
    "digits": DatasetFacts(10, (1, 8, 8)),
    "mnist": DatasetFacts(10, (1, 28, 28)),
    "fashion_mnist": DatasetFacts(10, (1, 28, 28)),
    "cifar10": DatasetFacts(10, (3, 32, 32)),
    "cifar100": DatasetFacts(100, (3, 32, 32)),
}


class Architecture(CardTable):
    """A name from `architectures.ARCHITECTURES`, and the arguments of its builder."""

    name: Text
    args: dict[str, Scalar] = Field(default_factory=dict)


class Preprocess(CardTable):
    """Normalization `(x - mean) / std` per channel, for x in [0, 1]. The loaded module contains it."""

    mean: Numbers
    std: Numbers

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means, {len(self.std)} stds given; expected: as many means as stds")
        if not all(s > 0 for s in self.std):
            raise ValueError(f"std {list(self.std)} given; every std must be > 0")
        return self


class ThreatClaim(CardTable):
    """The threat model against which the model claims to be robust. `eps` is exact, in [0, 1] pixel units."""

    norm: Norm
    eps: Annotated[Exact, Field(gt=0)]

    def threat(self) -> Threat:
        """Convert the claim to a `Threat`."""
        return Threat(norm=self.norm, eps=self.eps)


class Weights(CardTable):
    """The place of the weights: `path` under the registry's `weights/`, or `resource` in a Python `package`."""

    path: Annotated[str, AfterValidator(check_relative_path)] | None = None
    package: Annotated[str, AfterValidator(check_package_name)] | None = None
    resource: Annotated[str, AfterValidator(check_relative_path)] | None = None
    sha256: Annotated[str, AfterValidator(check_sha256)]

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("path", "package", "resource") if getattr(self, key) is not None]
        if given not in (["path"], ["package", "resource"]):
            named = " and ".join(given) or "no source"
            raise ValueError(f"{named} given; expected: either path, or package and resource")
        return self


class Paper(CardTable):
    """The published figures to compare this model with. `figures`: column name -> value."""

    source: Text
    table: Text
    row: str = ""
    figures: dict[str, float] = Field(default_factory=dict)


class TrainingRecord(CardTable):
    """The record of the training that produced the weights. `robbench train` writes it. `seconds` is wall time.

    `instead` describes what was cut from the recipe. It is empty if the recipe itself was used. `fit` is the time in
    seconds that the iterations were fitted to, or 0. `plan` has the iterations, if they are not those of the recipe or
    the CPU budget: `robbench train NAME --iterations PLAN` repeats the training.
    """

    iterations: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]
    hardware: str
    versions: str
    date: str
    seed: int
    command: str = ""
    precision: str = "float32"
    instead: str = ""
    fit: Annotated[float, Field(ge=0)] = 0.0
    plan: str = ""


class ModelCard(CardTable):
    """One model: the content of `<dataset>/<name>.toml`.

    `priority` is the order of `robbench train --all-missing`: higher numbers first. `shipped` says whether the weights
    file is kept beside the card. If it is not, `robbench train` makes it, and the card has its digest only.
    """

    version: Literal[1]
    title: Text
    dataset: DatasetName
    description: str = ""
    licence: str = ""
    priority: int = 0
    shipped: bool = True
    architecture: Architecture
    preprocess: Preprocess | None = None
    threat: ThreatClaim | None = None
    recipe: Recipe | None = None
    cpu_budget: CpuOverrides | None = None
    gpu_budget: LargeBatch | None = None
    weights: Weights | None = None
    paper: Paper | None = None
    trained: TrainingRecord | None = None

    @property
    def is_trainable(self) -> bool:
        """Whether it has a recipe, and no weights that come from elsewhere."""
        return self.recipe is not None and (self.weights is None or self.weights.path is not None)

    @model_validator(mode="after")
    def _check_shipped(self) -> Self:
        if not (self.shipped or self.is_trainable):
            raise ValueError(
                "shipped: false given without a way to make the weights; expected: a recipe, and weights by path if any"
            )
        return self

    @model_validator(mode="after")
    def _check_budgets(self) -> Self:
        for name, budget in (("cpu_budget", self.cpu_budget), ("gpu_budget", self.gpu_budget)):
            if budget is None:
                continue
            if self.recipe is None:
                raise ValueError(f"{name}: given without a recipe; expected: a recipe that it changes")
            try:
                budget.apply(self.recipe)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return self

    @model_validator(mode="after")
    def _check_channels(self) -> Self:
        channels = DATASETS[self.dataset].in_shape[0]
        if self.preprocess and len(self.preprocess.mean) != channels:
            raise ValueError(
                f"preprocess: {len(self.preprocess.mean)} means given; "
                f"expected: {channels}, the channels of {self.dataset}"
            )
        return self


_MOST_PROBLEMS = 20  # in a message; a large hostile file can have thousands
_MOST_CHARACTERS = 1000  # of a problem
_EXPECTED: dict[str, str] = {
    "int_type": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text in quotes",
    "string_too_short": "text that is not empty",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "less_than": "a number < {lt}",
    "less_than_equal": "a number <= {le}",
}


def _table_at(loc: Sequence[int | str]) -> type[BaseModel]:
    """Return the table class at a pydantic location."""
    table: type[BaseModel] = ModelCard
    for key in loc:
        annotation = table.model_fields[str(key)].annotation
        table = next(t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel))
    return table


def _sentence(error: Mapping[str, Any]) -> str:
    """Format one pydantic error: the key, what was given and what is allowed."""
    loc, kind, context = error["loc"], error["type"], error.get("ctx", {})
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")
    given = f"{error['input']!r} given"
    if kind == "extra_forbidden":
        allowed = list(_table_at(loc[:-1]).model_fields)
        close = difflib.get_close_matches(str(loc[-1]), allowed, n=1, cutoff=0.5)
        hint = f" did you mean {close[0]!r};" if close else ""
        return f"{where}: unknown key {loc[-1]!r};{hint} allowed: {', '.join(map(repr, allowed))}"
    if kind == "missing":
        fields = _table_at(loc[:-1]).model_fields
        required = ", ".join(repr(name) for name, field in fields.items() if field.is_required())
        return f"{where}: nothing given; required here: {required}"
    if kind == "literal_error":
        return f"{where}: {given}; allowed: {context['expected'].replace(' or ', ', ')}"
    if kind == "value_error":
        return f"{where}: {context['error']}".removeprefix(": ")
    if kind in _EXPECTED:
        return f"{where}: {given}; expected: {_EXPECTED[kind].format(**context)}"
    return f"{where}: {given}; {error['msg']}"


def parse_card(text: str, where: str) -> ModelCard:
    """Parse the text of a card. `where` is the name of the file in error messages.

    Raises:
        CardError: the text is not TOML (with the line), or is invalid. The message has one line per problem (20 at
            most), with file, key, what was given and what is allowed.
    """
    try:
        table = load_toml(text)
    except ValueError as error:
        raise CardError(f"{where}: not valid TOML: {error}") from None
    try:
        return ModelCard.model_validate(table)
    except ValidationError as error:
        problems = error.errors()
        lines = [f"{where}: {_sentence(e)}"[:_MOST_CHARACTERS] for e in problems[:_MOST_PROBLEMS]]
        if more := len(problems) - len(lines):
            lines.append(f"{where}: and {more} more problems")
        raise CardError("\n".join(lines)) from None
