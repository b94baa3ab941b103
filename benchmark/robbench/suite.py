"""Suites: named lists of attacks with their budgets. They are read from TOML, without torch.

```toml
version = 1
title = "White-box gradient attacks"
judge = "any"            # or "final": only the last point of a trial counts; "nearest": each attack looks for the
                         # nearest break in the whole box, and the suite has no radius
mode = "full"            # every attack gets all correctly classified samples; "cascade": an attack gets the samples
                         # that no earlier attack broke; "challenge": that the first attack did not break

[threat.mnist]           # one threat model per data set
norm = "Linf"
eps = "0.3"

[[attack]]
name = "PGD-20-xent"     # the random numbers depend on this name
kind = "pgd"             # from `robbench list attacks`, or "module:Class" for your own attack, in a module that is
                         # imported already (--import). Every other key is a parameter of the attack. `eot = N`
                         # averages N answers per step, for models with random answers. An attack with
                         # `optional = true` is left out where the threat has a norm that it is not made for, a
                         # transfer also where its surrogate is missing, and an attack of another library where the
                         # package is not installed.
objective = "ce"
steps = 20
on.mnist = { name = "PGD-40-xent", steps = 40, step_size = "0.01" }   # changes for one data set. A step size is a
                         # length in the norm of [threat]: in a run with another --norm, attacks take `relative_step`.
```
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, cast, get_args

from robbench.core.errors import SuiteError, unknown_name
from robbench.core.files import check_path_component, load_toml, read_bounded
from robbench.core.numbers import parse_fraction, parse_threat
from robbench.core.types import JUDGES, Judge, Threat
from robbench.core.user_code import require_imported

if TYPE_CHECKING:
    from robbench.attacks import Attack

__all__ = ["CUSTOM", "PEERS", "Mode", "Stage", "Suite", "SuiteSource", "build_attack", "load_suite", "suite_names"]

CUSTOM = "custom"
"""The name of a suite that is made of a list of attacks."""
PEERS = ("torchattacks", "autoattack", "advlib", "foolbox")
"""The libraries whose attacks are stages as well: `kind = "LIBRARY:NAME"`."""
SuiteSource: TypeAlias = "str | Path | Suite | Sequence[Attack]"
"""What `load_suite` takes."""
Mode = Literal["full", "cascade", "challenge"]
_CONTRACT = ("kind", "version", "norms", "init", "loss", "step")  # the attributes that every attack class has
_MOST_BYTES = 2**17
_MOST_ATTACKS = 500
_MOST_COUNT = 10_000_000  # steps, restarts or draws that a file may ask for
_MOST_QUERIES = 1_000_000_000  # for each image and attack
_KEYS = {"version", "title", "description", "judge", "mode", "threat", "attack"}


@dataclass(frozen=True, slots=True)
class Stage:
    """One attack of a suite, on one data set: the name of its column, its kind and its parameters.

    `attack` is the attack itself, where the suite was made of attack objects. An `optional` one is left out where it is
    not made for the norm, or its surrogate or its package is missing.
    """

    name: str
    kind: str
    params: dict[str, Any]
    attack: Attack | None = None
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite as its file says it; `made` holds the stages of a suite that was made of attack objects."""

    name: str
    version: int
    title: str
    description: str
    judge: Judge
    mode: Mode
    threats: dict[str, Threat]
    attacks: tuple[dict[str, Any], ...]
    made: tuple[Stage, ...] = ()

    @classmethod
    def of(cls, attacks: Sequence[Attack]) -> Self:
        """Make a suite of attack objects, as a file with the same attacks and parameters would.

        A stage is named after the class of its attack: `PGD`, and `PGD-2` for the second one. The suite has no threat
        model, so a run needs eps.

        Raises:
            SuiteError: there is no attack, or an object is not one.
        """
        from robbench.attacks.base import check_parameters  # this imports torch

        if not attacks:
            raise SuiteError("An empty list of attacks given; expected at least one.")
        count: Counter[str] = Counter()
        stages = []
        for attack in attacks:
            if not _is_attack(type(attack)):
                if isinstance(attack, str):
                    raise SuiteError(
                        f"{attack!r} given in a list of attacks; allowed: objects of robbench.attacks, such as "
                        f"PGD(steps=40). A suite goes by its name alone, without a list: {', '.join(suite_names())}."
                    )
                raise SuiteError(
                    f"{attack!r} given as an attack; allowed: objects such as PGD(steps=40) of robbench.attacks, or of "
                    "a frozen dataclass of your own with init, loss and step (docs/tutorial.md)."
                )
            check_parameters(attack)
            name = type(attack).__name__
            count[name] += 1
            name = name if count[name] == 1 else f"{name}-{count[name]}"
            stages.append(Stage(name, attack.kind, {}, attack))
        return cls(CUSTOM, 1, "Attacks given in Python", "", "any", "full", {}, (), tuple(stages))

    def stages(self, dataset: str) -> list[Stage]:
        """List the attacks with their budgets for a data set; one without its own takes the general ones."""
        return [*self.made, *(_make_stage(table, dataset, self.name) for table in self.attacks)]

    def threat(self, dataset: str) -> Threat:
        """Return the threat model for a data set.

        Raises:
            SuiteError: the suite has no threat model for it.
        """
        if dataset not in self.threats:
            what = "A list of attacks has no radius of its own" if self.made else f"Suite {self.name!r} has no radius"
            known = f" (it has one for: {', '.join(self.threats)})" if self.threats else ""
            raise SuiteError(
                f"eps: no radius given. {what} for data set {dataset!r}{known}. Give one: --eps 8/255 (and --norm); "
                "in Python eps= (and norm=)."
            )
        return self.threats[dataset]


def suite_names() -> list[str]:
    """List the built-in suites."""
    folder = resources.files("robbench") / "suites"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def load_suite(suite: SuiteSource) -> Suite:
    """Load a suite: a built-in one by its name, a file by its path, or one made of attack objects.

    Args:
        suite: a name, a path that ends in .toml (text or `pathlib.Path`), a list of attacks, or a suite, which is
            returned as it is.

    Raises:
        SuiteError: the name is unknown, or the file is invalid (with the key, what was given and what is allowed).
    """
    if isinstance(suite, Suite):
        return suite
    if isinstance(suite, Path) and suite.suffix != ".toml":
        raise SuiteError(f"{suite}: a path given; expected: the path of a .toml file.")
    if not isinstance(suite, str | Path):
        return Suite.of(_listed(suite))
    name = str(suite)
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise SuiteError(f"No suite file at {name}.")
        try:
            text = read_bounded(path, _MOST_BYTES).decode()
            check_path_component(path.stem, "the file's name")
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise SuiteError(f"{name}: cannot be read: {error}") from None
        return _parse(path.stem, text, name)
    if name not in suite_names():
        raise SuiteError(unknown_name("suite", name, suite_names()) + " A path to a .toml file works as well.")
    text = (resources.files("robbench") / "suites" / f"{name}.toml").read_text(encoding="utf-8")
    return _parse(name, text, f"{name}.toml")


def _listed(attacks: Any) -> list[Attack]:
    """Accept a list or a tuple of attacks; a single attack is refused."""
    if isinstance(attacks, list | tuple):
        return list(attacks)
    raise SuiteError(
        f"suite: {attacks!r} given; allowed: a suite's name, the path of a .toml file, or a list of attacks such as "
        "[PGD(steps=40)]."
    )


def build_attack(stage: Stage) -> Attack:
    """Make the attack of a stage.

    Raises:
        SuiteError: the kind is unknown, or the attack does not have or accept a parameter.
    """
    if stage.attack is not None:
        return stage.attack
    from robbench.attacks import ATTACKS, EOT, parameters  # torch is needed from here on

    if ":" not in stage.kind and stage.kind not in ATTACKS:
        known = [*ATTACKS, "transfer", *(f"{peer}:NAME" for peer in PEERS), "module:Class"]
        raise SuiteError(f"Attack {stage.name!r}: " + unknown_name("kind", stage.kind, known))
    cls = _find_user_attack(stage.kind, stage.name) if ":" in stage.kind else ATTACKS[stage.kind]
    # A type is text if its module postpones annotations, as robbench's modules do.
    types = {name: f.type for name, f in parameters(cls).items()}
    allowed = {name: t.__name__ if isinstance(t, type) else str(t) for name, t in types.items()}
    values: dict[str, Any] = {}
    draws = stage.params.get("eot")
    for key, given in stage.params.items():
        if key == "eot":
            continue
        if key not in allowed:
            raise SuiteError(f"Attack {stage.name!r} ({stage.kind}): " + unknown_name("parameter", key, allowed))
        values[key] = _convert(given, allowed[key], f"Attack {stage.name!r}: {key}")
    try:
        attack: Attack = cls(**values)
        if draws is not None:
            attack = EOT(inner=attack, draws=_convert(draws, "int", f"Attack {stage.name!r}: eot"))
        if (queries := attack.trials * attack.steps) > _MOST_QUERIES:
            raise SuiteError(f"{queries:,} queries for each image given; allowed: at most {_MOST_QUERIES:,}")
        return attack
    except SuiteError as error:
        raise SuiteError(f"Attack {stage.name!r} ({stage.kind}): {error}") from None


def _find_user_attack(kind: str, stage: str) -> type[Attack]:
    """Return a user's attack class from an imported module. A suite file never imports code."""
    module, _, name = kind.partition(":")
    expected = (
        f"expected one of `robbench list attacks`, {', '.join(f'{p}:NAME' for p in PEERS)}, or module:Class, a frozen "
        "dataclass with init, loss and step (docs/tutorial.md)"
    )
    try:
        cls: Any = getattr(require_imported(module, f"Attack {stage!r}: kind {kind!r}", SuiteError), name, None)
    except SuiteError as error:
        raise SuiteError(f"{error} Otherwise, {expected}.") from None
    if not _is_attack(cls):
        raise SuiteError(f"Attack {stage!r}: kind {kind!r} is not an attack; {expected}.")
    return cast("type[Attack]", cls)


def _is_attack(cls: Any) -> bool:
    return isinstance(cls, type) and is_dataclass(cls) and all(hasattr(cls, part) for part in _CONTRACT)


def _convert(given: Any, kind: str, where: str) -> Any:
    """Bring a TOML value to the type of a dataclass field; radii and steps may be written as exact fractions."""
    if kind.startswith("float") and not isinstance(given, bool):
        try:
            return float(parse_fraction(given, where))
        except ValueError as error:
            raise SuiteError(str(error)) from None
    expected: type = {"int": int, "bool": bool, "str": str}[kind]
    if not isinstance(given, expected) or (expected is int and isinstance(given, bool)):
        raise SuiteError(f"{where}: {given!r} given; allowed: {kind}")
    return given


def _make_stage(table: dict[str, Any], dataset: str, suite: str) -> Stage:
    general = {k: v for k, v in table.items() if k != "on"}
    merged = {**general, **table.get("on", {}).get(dataset, {})}
    for key, value in merged.items():
        if isinstance(value, int) and value > _MOST_COUNT:
            raise SuiteError(f"Suite {suite!r}: {key}: {value} given; allowed: at most {_MOST_COUNT:,}")
    if not isinstance(optional := merged.pop("optional", False), bool):
        raise SuiteError(f"Suite {suite!r}: optional: {optional!r} given; allowed: true or false")
    try:
        return Stage(name=merged.pop("name"), kind=merged.pop("kind"), params=merged, optional=optional)
    except KeyError as missing:
        raise SuiteError(f"Suite {suite!r}: an attack has no {missing.args[0]!r}; given: {general}") from None


def _parse(name: str, text: str, where: str) -> Suite:
    try:
        table = load_toml(text)
    except ValueError as error:
        raise SuiteError(f"{where}: not valid TOML: {error}") from None
    for problem in _list_problems(table):
        raise SuiteError(f"{where}: {problem}")
    suite = Suite(
        name=name,
        version=table["version"],
        title=table.get("title", name),
        description=table.get("description", ""),
        judge=table.get("judge", "any"),
        mode=table.get("mode", "full"),
        threats={k: _parse_threat_table(v, f"{where}: threat.{k}") for k, v in table.get("threat", {}).items()},
        attacks=tuple(table["attack"]),
    )
    for dataset in ("", *suite.threats, *{d for a in suite.attacks for d in a.get("on", {})}):
        count = Counter(s.name for s in suite.stages(dataset))
        for again in (name for name, times in count.items() if times > 1):
            raise SuiteError(f"{where}: two attacks are named {again!r}; expected: unique names")
    return suite


def _list_problems(table: dict[str, Any]) -> Iterator[str]:
    for key in table:
        if key not in _KEYS:
            yield unknown_name("key", key, _KEYS)
    if table.get("version") != 1:
        yield f"version: {table.get('version')!r} given; allowed: 1"
    if table.get("judge", "any") not in JUDGES:
        yield f"judge: {table['judge']!r} given; allowed: {', '.join(JUDGES)}"
    if table.get("mode", "full") not in get_args(Mode):
        yield f"mode: {table['mode']!r} given; allowed: {', '.join(get_args(Mode))}"
    for key in ("title", "description"):
        if not isinstance(table.get(key, ""), str):
            yield f"{key}: {table[key]!r} given; allowed: text"
    if not isinstance(table.get("threat", {}), dict):
        yield f"threat: {table['threat']!r} given; expected tables [threat.DATASET]"
    if table.get("judge") == "nearest" and table.get("threat"):
        yield "threat: given with judge 'nearest', which looks at any distance; leave the radii out"
    if table.get("judge") == "nearest" and table.get("mode", "full") != "full":
        yield f"mode: {table['mode']!r} given with judge 'nearest'; allowed: full, as each attack measures all images"
    attacks = table.get("attack")
    if not isinstance(attacks, list) or not attacks:
        yield "attack: at least one [[attack]] table is needed"
        return
    if len(attacks) > _MOST_ATTACKS:
        yield f"attack: {len(attacks)} tables given; allowed: at most {_MOST_ATTACKS}"
    for attack in attacks:
        if not isinstance(attack, dict):
            yield f"attack: {attack!r} given; expected [[attack]] tables"
            continue
        on = attack.get("on", {})
        if not isinstance(on, dict) or not all(isinstance(part, dict) for part in on.values()):
            yield f"on: {on!r} given; expected on.DATASET = {{ ... }}"
            continue
        for part in (attack, *on.values()):
            for key in ("name", "kind"):
                value = part.get(key, "x")
                if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > 100:
                    yield f"{key}: {value!r} given; allowed: up to 100 printable characters"


def _parse_threat_table(table: Any, where: str) -> Threat:
    if not isinstance(table, dict) or set(table) != {"norm", "eps"}:
        raise SuiteError(f"{where}: {table} given; expected norm and eps, and nothing else")
    try:
        return parse_threat(table["norm"], table["eps"])
    except ValueError as error:
        raise SuiteError(f"{where}: {error}") from None
