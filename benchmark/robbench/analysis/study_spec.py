"""The declaration of studies: families of small trainings, in `studies.toml`. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib import resources
from typing import Annotated, Any

from pydantic import Field, ValidationError

from robbench.core.errors import RobbenchError
from robbench.core.files import load_toml
from robbench.core.types import Norm
from robbench.models.fields import CardTable, Exact, Scalar, Text

__all__ = ["STUDY_PARTS", "Member", "NetworksSpec", "PairSpec", "StudySpec", "load_studies"]

STUDY_PARTS = ("pair", "networks")  # in the order in which they are trained

_Several = Annotated[int, Field(ge=2)]


class PairSpec(CardTable):
    """A linear classifier of two classes. `classes` are a first class (label -1) and a second one (label 1).

    `strong` is the least |correlation| with the label of a strong pixel. The intervals come from `draws` bootstrap
    samples of the test images, and of at most `most` training images.
    """

    classes: Annotated[tuple[int, int], Field(strict=False)]
    eps: Annotated[Exact, Field(gt=0)]
    strong: Annotated[float, Field(gt=0, lt=1)]
    draws: _Several
    most: _Several
    iterations: Annotated[int, Field(ge=1)]


class Group(CardTable):
    """Members of a family: every radius `eps` of a norm with every number of training images."""

    norm: Norm
    eps: Annotated[tuple[Exact, ...], Field(strict=False, min_length=1)]
    sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)]


class Architecture(CardTable):
    """The network of every member."""

    name: Text
    args: dict[str, Scalar] = Field(default_factory=dict)


class NetworksSpec(CardTable):
    """A family of networks. `recipe` is that of a card, without seed and adversary. Each seed has its own images."""

    architecture: Architecture
    recipe: dict[str, Scalar]
    steps: Annotated[int, Field(ge=1)]
    seeds: _Several
    groups: Annotated[tuple[Group, ...], Field(strict=False, min_length=1)]

    def list_members(self) -> list[Member]:
        """List the members: seed by seed, so that an unfinished family has whole curves. Radius 0 has no norm."""
        return [member for seed in range(self.seeds) for member in dict.fromkeys(self._list_members(seed))]

    def _list_members(self, seed: int) -> Iterator[Member]:
        for group in self.groups:
            for size in group.sizes:
                for eps in group.eps:
                    yield Member(group.norm if eps else None, eps, size, seed)


class StudySpec(CardTable):
    """A study of one data set."""

    dataset: Text
    pair: PairSpec
    networks: NetworksSpec


@dataclass(frozen=True)
class Member:
    """One network of a family.

    Attributes:
        norm: norm of the adversary; None without one.
        eps: radius of the adversary; 0 without one.
        size: number of training images.
        seed: seed of the choice of images, the first weights and the batches.
    """

    norm: Norm | None
    eps: Fraction
    size: int
    seed: int

    def describe(self) -> dict[str, Any]:
        """Return the member as JSON values."""
        return {"norm": self.norm, "eps": str(self.eps), "size": self.size, "seed": self.seed}


@cache
def load_studies() -> dict[str, StudySpec]:
    """Return the declared studies: name -> declaration.

    Raises:
        RobbenchError: the declaration is invalid.
    """
    text = (resources.files("robbench") / "analysis" / "studies.toml").read_text(encoding="utf-8")
    try:
        return {name: StudySpec.model_validate(table) for name, table in load_toml(text).items()}
    except (ValidationError, ValueError) as error:
        raise RobbenchError(f"analysis/studies.toml: {error}") from None
