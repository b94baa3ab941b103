"""What a model card may say: the tables of its TOML, checked strictly, with every problem worded at once."""

import difflib
import math
import tomllib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)

from robbench.errors import CardError
from robbench.numbers import parse_fraction
from robbench.types import Norm, Threat


class DatasetFacts(NamedTuple):
    """What a card may take for granted about a data set; `in_shape` is (C, H, W)."""

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


def _exact(given: object) -> Fraction:
    if isinstance(given, bool) or not isinstance(given, str | int | float | Fraction):
        raise ValueError(f'{given!r} given; allowed: a fraction such as "8/255" or a decimal such as 0.3')
    try:
        return parse_fraction(given)
    except ValueError as error:
        # The caller prefixes the key, which says more than the parser's "number".
        raise ValueError(str(error).removeprefix("number: ")) from None


def _scalar(given: object) -> int | float | str | bool:
    if not isinstance(given, int | float | str) or (isinstance(given, float) and not math.isfinite(given)):
        raise ValueError(f"{given!r} given; allowed: an integer, a finite number, text, true or false")
    return given


def _relative(text: str) -> str:
    parts = PurePosixPath(text).parts
    if not parts or parts[0] == "/" or ".." in parts or set(text) & set("\\:\0"):
        raise ValueError(f"{text!r} given; allowed: a relative path with / that stays inside its folder")
    return text


def _hex64(text: str) -> str:
    if len(text) != 64 or not set(text) <= set("0123456789abcdef"):
        raise ValueError(f"{text!r} given; expected: 64 lower-case hexadecimal digits")
    return text


def _top_level(text: str) -> str:
    # A dotted name would have to be imported to be found, and reading a card must not run code.
    if not text.isidentifier():
        raise ValueError(f"{text!r} given; allowed: the name of a top-level Python package")
    return text


Scalar = Annotated[int | float | str | bool, PlainValidator(_scalar)]
Exact = Annotated[Fraction, PlainValidator(_exact), PlainSerializer(str, when_used="json")]
Numbers = Annotated[tuple[float, ...], Field(strict=False)]  # a TOML list, kept immutable
Text = Annotated[str, Field(min_length=1)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True)


class Architecture(_Table):
    """A name from `architectures.ARCHITECTURES` and the arguments of its builder."""

    name: Text
    args: dict[str, Scalar] = {}


class Preprocess(_Table):
    """Normalization `(x - mean) / std` per channel, for x in [0, 1]; it lives inside the loaded module."""

    mean: Numbers
    std: Numbers

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.mean) != len(self.std):
            raise ValueError(f"{len(self.mean)} means, {len(self.std)} stds given; expected: as many of each")
        if not all(s > 0 for s in self.std):
            raise ValueError(f"std {list(self.std)} given; every std must be > 0")
        return self


class ThreatClaim(_Table):
    """What the model claims to resist; `eps` is exact, in [0, 1] pixel units."""

    norm: Norm
    eps: Annotated[Exact, Field(gt=0)]

    def threat(self) -> Threat:
        """Return the claim as the rest of the package speaks it."""
        return Threat(norm=self.norm, eps=self.eps)


class Adversary(_Table):
    """The attack inside adversarial training; `eps` and `step_size` are exact, in [0, 1] pixel units.

    `mix` is the weight of the adversarial loss against the clean one: 1 trains on adversarial examples only
    (Madry et al. 2018).
    """

    attack: Text = "pgd"
    norm: Norm = "Linf"
    eps: Annotated[Exact, Field(gt=0)]
    step_size: Annotated[Exact, Field(gt=0)]
    steps: Annotated[int, Field(ge=1)]
    random_start: bool = True
    loss: Literal["ce", "margin"] = "ce"
    mix: Annotated[float, Field(gt=0, le=1)] = 1.0


class Recipe(_Table):
    """How to train the model.

    `alpha` is the strength of label smoothing, `beta` that of logit squeezing, `sigma` the standard deviation
    of the Gaussian noise on the inputs (exact, in [0, 1] pixel units). `milestones` are fractions of
    `iterations`, at each of which the `steps` schedule multiplies the learning rate by `gamma`.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.0
    beta: Annotated[float, Field(ge=0)] = 0.0
    sigma: Annotated[Exact, Field(ge=0, le=1)] = Fraction(0)
    iterations: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    optimizer: Literal["adam", "sgd"]
    lr: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine", "steps"] = "constant"
    milestones: Numbers = ()
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    augment: Literal["none", "crop", "crop_flip"] = "none"
    seed: Annotated[int, Field(ge=0)] = 0
    adversary: Adversary | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        # A key that the chosen optimizer or schedule would ignore is a mistake, not a preference.
        if self.optimizer == "adam" and (self.momentum or self.nesterov):
            raise ValueError("momentum or nesterov given with optimizer 'adam'; allowed: with 'sgd' only")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov = true given without momentum; expected: momentum > 0")
        if (self.schedule == "steps") != bool(self.milestones):
            raise ValueError(
                f"schedule {self.schedule!r} given with {len(self.milestones)} milestones; "
                "expected: milestones with 'steps', and only with it"
            )
        bounded = all(0 < m < 1 for m in self.milestones)
        if not bounded or list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones {list(self.milestones)} given; expected: increasing, in (0, 1)")
        return self


class Weights(_Table):
    """Where the weights are: `path` under the registry's `weights/`, or `resource` in a Python `package`."""

    path: Annotated[str, AfterValidator(_relative)] | None = None
    package: Annotated[str, AfterValidator(_top_level)] | None = None
    resource: Annotated[str, AfterValidator(_relative)] | None = None
    sha256: Annotated[str, AfterValidator(_hex64)]

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [key for key in ("path", "package", "resource") if getattr(self, key) is not None]
        if given not in (["path"], ["package", "resource"]):
            named = " and ".join(given) or "no source"
            raise ValueError(f"{named} given; expected: either path, or package and resource")
        return self


class Paper(_Table):
    """The published figures that this model is to be compared with (`figures`: column name to value)."""

    source: Text
    table: Text
    row: str = ""
    figures: dict[str, float] = {}


class Trained(_Table):
    """What training really happened, written by the trainer (`seconds` of wall time, `date` as text)."""

    iterations: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0)]
    hardware: str
    versions: str
    date: str
    seed: int
    command: str = ""


class ModelCard(_Table):
    """One model: the content of `<dataset>/<name>.toml`."""

    version: Literal[1]
    title: Text
    dataset: DatasetName
    description: str = ""
    licence: str = ""
    architecture: Architecture
    preprocess: Preprocess | None = None
    threat: ThreatClaim | None = None
    recipe: Recipe | None = None
    weights: Weights | None = None
    paper: Paper | None = None
    trained: Trained | None = None

    @model_validator(mode="after")
    def _channels(self) -> Self:
        channels = DATASETS[self.dataset].in_shape[0]
        if self.preprocess and len(self.preprocess.mean) != channels:
            raise ValueError(
                f"preprocess: {len(self.preprocess.mean)} means given; "
                f"expected: {channels}, the channels of {self.dataset}"
            )
        return self


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
    """Find the table class that a pydantic location leads to."""
    table: type[BaseModel] = ModelCard
    for key in loc:
        annotation = table.model_fields[str(key)].annotation
        table = next(t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel))
    return table


def _sentence(error: Mapping[str, Any]) -> str:
    """Word one pydantic error: key, what was given, what is allowed."""
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
    """Parse the text of a card; `where` names the file in the errors.

    Raises:
        CardError: not TOML (with the line), or invalid: one line per problem, with file, key, what was given
            and what is allowed.
    """
    try:
        return ModelCard.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise CardError(f"{where}: not valid TOML: {error}") from None
    except ValidationError as error:
        raise CardError("\n".join(f"{where}: {_sentence(e)}" for e in error.errors())) from None
