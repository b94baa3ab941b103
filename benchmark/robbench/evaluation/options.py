"""The options of a run: everything except model and suite, checked before anything is loaded. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Rational, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, get_args

from robbench.core.errors import RobbenchError, SuiteError, suggest_names, unknown_name
from robbench.core.files import digest
from robbench.core.numbers import parse_eps, parse_threat
from robbench.core.types import Norm

if TYPE_CHECKING:
    import torch

__all__ = [
    "TARGETS",
    "OptionFields",
    "Options",
    "OtherFields",
    "check_count",
    "check_names",
    "is_list",
    "name_target",
    "read_tree",
]


TARGETS = ("least-likely", "random", "next")
"""The rules by which images get a target class."""
_LIST = "list-"


class OtherFields(TypedDict, total=False):
    """The fields of `Options` without eps, for functions that take several radii."""

    norm: str | None
    samples: int | None
    sample_seed: int | None
    seed: int
    lanes: int | None
    gradients: str | None
    fast_layers: bool
    one_by_one: bool
    target: str | int | Sequence[int] | None
    levels: int | None
    device: str | torch.device
    data_dir: str | Path | None
    models: Sequence[str | Path]
    results: str | Path | None
    overwrite: bool
    save_adversarials: bool
    wait: bool
    surrogate: str | None


class OptionFields(OtherFields, total=False):
    """The fields of `Options`, for the signatures of public functions."""

    eps: str | float | None


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a run: everything except model and suite.

    Attributes:
        norm: replaces the suite's norm. It needs eps, unless the suite looks for the nearest break.
        eps: replaces the suite's radius ("8/255", 0.3), in [0, 1] pixel units.
        samples: number of samples, the first ones in official order; None means all.
        sample_seed: draw the samples at random with this seed instead; None means official order.
        seed: seed of the attacks' random numbers.
        lanes: batch width; None means that image size and device choose it.
        gradients: "bfloat16" computes gradients, and the logits of the same pass, in bfloat16. This is faster on
            hardware that supports bfloat16. The judge computes logits in the precision of the images.
        fast_layers: on a CPU, replace layers whose gradient torch computes slowly (`classifier.fast_layers`). The
            environment of the result lists the replaced layers. They are not part of the run's identity.
        one_by_one: give the model each image in a batch of its own. Without it, a model whose answer to an image
            depends on the rest of the batch is an error.
        target: None, or the class that attacks drive images to: `least-likely` on the clean image, `random`, `next`
            (y + 1), a class, or a list with a class for each image of the test set. Only a prediction of the target is
            a break.
        levels: number of steps between 0 and 1 that a pixel of a deployed image can take: 255 for 8 bits. The model is
            asked about rounded points alone, which stay inside the ball (`core.threat.Ball.round`). Clean images are
            not rounded. None lets pixels take every value.
        device: auto, cpu, cuda or cuda:i. A torch.device is replaced by its name.
        data_dir: folder of the data sets; None means the environment variable ROBBENCH_DATA.
        models: folders of further model registries.
        results: folder of the results tree; None stores nothing on disk.
        overwrite: replace the stored result of a different run, or of a model that answered differently. Otherwise it
            is an error. A stored result of other judging code is measured anew.
        save_adversarials: also store the adversarial example of every break. This option is not part of the run's
            identity: a later call may change it. A run that has stored adversarial examples always stores them.
        surrogate: the model that transfer attacks perturb images with, a registered name or a source, instead of the
            suite's own. Without it, transfers are left out where no model of the data set is registered.
        wait: wait while another process works on the same result. Otherwise it is an error.

    Raises:
        RobbenchError: a field has the wrong type or value, or a field needs another one.
    """

    norm: str | None = None
    eps: str | float | None = None
    samples: int | None = None
    sample_seed: int | None = None
    seed: int = 0
    lanes: int | None = None
    gradients: str | None = None
    fast_layers: bool = True
    one_by_one: bool = False
    target: str | tuple[int, ...] | None = None
    levels: int | None = None
    device: str = "auto"
    data_dir: str | Path | None = None
    models: Sequence[str | Path] = ()
    results: str | Path | None = None
    overwrite: bool = False
    save_adversarials: bool = False
    wait: bool = False
    surrogate: str | None = None

    def __post_init__(self) -> None:
        """Check every field, and convert it to its type."""
        for name, read in _READERS.items():
            object.__setattr__(self, name, read(name, getattr(self, name)))
        if self.norm is not None and self.eps is not None:
            try:
                parse_threat(self.norm, self.eps)
            except ValueError as error:
                raise SuiteError(str(error)) from None
        if self.save_adversarials and self.results is None:
            raise RobbenchError("save_adversarials given without results. Give a folder for the results: results=DIR.")

    @classmethod
    def take(cls, given: Mapping[str, Any]) -> Options:
        """Make options from keyword arguments. Arguments that are no option are ignored."""
        return cls(**{key: given[key] for key in OptionFields.__annotations__ if key in given})


def name_target(rule: str | tuple[int, ...]) -> str:
    """Name the rule of targets in identities and overrides: the rule itself, or the digest of a list."""
    return rule if isinstance(rule, str) else f"{_LIST}{digest(list(rule))[:16]}"


def is_list(name: object) -> bool:
    """Tell whether a name of `name_target` is that of a list, which the name does not hold."""
    return isinstance(name, str) and name.startswith(_LIST)


def check_count(name: str, value: Any, least: int) -> int | None:
    """Check an optional whole number that is not a field of `Options`.

    Raises:
        RobbenchError: it is not a whole number, or it is below `least`.
    """
    return _read_integer(least)(name, value)


def check_names(given: Collection[str], *allowed: type) -> None:
    """Check that every keyword argument is a key of one of the typed dictionaries.

    Raises:
        RobbenchError: a name is unknown. The message holds it, and similar known names.
    """
    known = [name for fields in allowed for name in fields.__annotations__]
    for name in given:
        if name not in known:
            raise RobbenchError(unknown_name("option", name, known))


def _read_choice(error: type[RobbenchError], *allowed: str) -> Callable[[str, Any], str | None]:
    def read(name: str, value: Any) -> str | None:
        if value is None or (isinstance(value, str) and value in allowed):
            return value
        raise error(
            f"{name}: {value!r} given; allowed: {', '.join(allowed)}, or None.{suggest_names(str(value), allowed)}"
        )

    return read


def _read_integer(least: int, *, optional: bool = True) -> Callable[[str, Any], int | None]:
    def read(name: str, value: Any) -> int | None:
        if value is None and optional:
            return None
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            rest = ", or None" if optional else ""
            raise RobbenchError(f"{name}: {value!r} given; allowed: a whole number, at least {least}{rest}.")
        return int(value)

    return read


_LEAST_EPS = 1e-30  # no pixel between 0 and 1 can move by less in any precision that matters


def _read_eps(name: str, value: Any) -> str | float | None:
    if isinstance(value, Rational) and not isinstance(value, bool):
        value = str(value)
    elif isinstance(value, Real) and not isinstance(value, bool):
        value = float(str(value))  # as printed: float32(0.3) gives 0.3, not 0.30000001192092896
    if value is not None and not isinstance(value, str | float):
        raise RobbenchError(f'{name}: {value!r} given; allowed: one radius, such as "8/255" or 0.3, or None.')
    try:
        if value is not None and 0 < parse_eps(value) < _LEAST_EPS:
            raise SuiteError(f"{name}: {value!r} given; allowed: 0, or a radius of at least {_LEAST_EPS}.")
    except ValueError as error:
        raise SuiteError(f"{error}.") from None
    return value


def _read_target(name: str, value: Any) -> str | tuple[int, ...] | None:
    allowed = f"allowed: {', '.join(TARGETS)}, the number of a class, or in Python a list of one an image, or None."
    if value is None or (isinstance(value, str) and value in TARGETS):
        return value
    if hasattr(value, "tolist"):  # arrays and tensors
        value = value.tolist()
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return str(int(value))
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0:
        return str(int(value))
    if isinstance(value, list | tuple) and all(isinstance(v, Integral) and not isinstance(v, bool) for v in value):
        return tuple(int(v) for v in value)
    shown = repr(value)
    raise RobbenchError(f"{name}: {shown[:80]} given; {allowed}{suggest_names(str(value), TARGETS)}")


_MOST_LEVELS = 1023  # 10 bits; float32 holds finer levels less exactly than rounding needs


def _read_levels(name: str, value: Any) -> int | None:
    levels = _read_integer(1)(name, value)
    if levels is not None and levels > _MOST_LEVELS:
        raise RobbenchError(f"{name}: {value!r} given; allowed: 1 to {_MOST_LEVELS}, such as 255 for 8 bits, or None.")
    return levels


def _read_device(name: str, value: Any) -> str:
    if (type(value).__module__, type(value).__name__) == ("torch", "device"):
        return str(value)
    if not isinstance(value, str):
        raise RobbenchError(f"{name}: {value!r} given; allowed: auto, cpu, cuda, cuda:i, or a torch.device.")
    return value


def _read_path(name: str, value: Any) -> str | Path | None:
    if isinstance(value, str) and not value.strip():
        raise RobbenchError(f'{name}: {value!r} given; allowed: a path, or None. The present folder is ".".')
    if value is None or isinstance(value, str | Path):
        return value
    if isinstance(value, os.PathLike) and isinstance(path := os.fspath(value), str):
        return path
    raise RobbenchError(f"{name}: {value!r} given; allowed: a path, or None.")


def read_tree(name: str, value: Any) -> str | Path | None:
    """Check the path of a results tree: a folder, or a path where nothing is yet.

    Raises:
        RobbenchError: it is no path, or a file is there. The message begins with `name`.
    """
    path = _read_path(name, value)
    there = None if path is None else next((p for p in (Path(path), *Path(path).parents) if p.exists()), None)
    if there is not None and path is not None and not there.is_dir():
        given = "which" if there == Path(path) else f"and {there}"
        raise RobbenchError(f"{name}: {path} given, {given} is a file; allowed: a folder, or a new path.")
    return path


def _read_paths(name: str, value: Any) -> tuple[str | Path, ...]:
    if isinstance(value, str | os.PathLike) or not isinstance(value, Sequence):
        raise RobbenchError(f"{name}: {value!r} given; allowed: a list of paths.")
    paths = [_read_path(f"{name}[{i}]", path) for i, path in enumerate(value)]
    if any(path is None for path in paths):
        raise RobbenchError(f"{name}: {value!r} given; allowed: a list of paths.")
    return tuple(path for path in paths if path is not None)


def _read_flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RobbenchError(f"{name}: {value!r} given; allowed: True or False.")
    return value


def _read_text(name: str, value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and value):
        raise RobbenchError(f"{name}: {value!r} given; allowed: a registered model, or a source, or None.")
    return value


_READERS: dict[str, Callable[[str, Any], Any]] = {
    "norm": _read_choice(SuiteError, *get_args(Norm)),
    "eps": _read_eps,
    "samples": _read_integer(1),
    "sample_seed": _read_integer(0),
    "seed": _read_integer(0, optional=False),
    "lanes": _read_integer(1),
    "gradients": _read_choice(RobbenchError, "bfloat16"),
    "fast_layers": _read_flag,
    "one_by_one": _read_flag,
    "target": _read_target,
    "levels": _read_levels,
    "device": _read_device,
    "data_dir": _read_path,
    "models": _read_paths,
    "results": read_tree,
    "overwrite": _read_flag,
    "save_adversarials": _read_flag,
    "wait": _read_flag,
    "surrogate": _read_text,
}
