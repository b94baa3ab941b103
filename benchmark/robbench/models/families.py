"""Card families: many cards from one short definition and the tables of the papers. Nothing here imports torch.

The file `families.toml` of a registry holds `[base.NAME]` (content shared by cards; `base = "..."` extends another
base), `[[card]]` (one card), `[[family]]` (one card for every row of a paper's table) and `[change."dataset/name"]`
(changes to one card). Tables are merged key by key. The tables that training writes into a card (`weights`, `trained`)
are kept.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import tomlkit

from robbench.core.errors import CardError, unknown_name
from robbench.core.files import check_path_component, load_toml, refuse_links, write_atomically
from robbench.models.card import read_card_text
from robbench.models.schema import parse_card

__all__ = ["FAMILIES", "expand_families", "list_stale_cards", "read_table", "write_cards"]

FAMILIES = "families.toml"
_KEPT = ("weights", "trained")
_ORDER = ("version", "title", "dataset", "description", "licence", "priority", "shipped")
_MOST_BASES = 20  # that a base extends
_MOST_FAMILIES = 50
_MOST_VALUES = 100_000  # of all cards; those of the package hold 2,000
_THOUSANDS = re.compile(r"^(\d+)([kM])$")


def expand_families(root: Path) -> dict[str, dict[str, Any]]:
    """Expand a registry's `families.toml`: full name -> content of the card, without weights.

    Raises:
        CardError: the file is missing, is not TOML, names an unknown base or card, defines a card twice, or
            gives a card a name other than DATASET/NAME.
    """
    path = root / FAMILIES
    try:
        cards = _expand(_parse(path, read_card_text(path)))
        for name in cards:
            dataset, _, card = name.partition("/")
            for part in (dataset, card):
                check_path_component(part, f"card {name[:200]!r}, expected: DATASET/NAME")
    except KeyError as missing:
        raise CardError(f"{path}: a table lacks the key {missing}.") from None
    except RecursionError:
        raise CardError(f"{path}: nested too deeply.") from None
    except (AttributeError, TypeError) as error:
        raise CardError(f"{path}: a value is of the wrong type: {error}.") from None
    except ValueError as error:
        raise CardError(f"{path}: {error}") from None
    return cards


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        return load_toml(text)
    except ValueError as error:
        raise CardError(f"{path}: not valid TOML: {error}") from None


def _expand(definition: dict[str, Any]) -> dict[str, dict[str, Any]]:
    allowed = {"version", "base", "family", "card", "change"}
    for key in definition:
        if key not in allowed:
            raise ValueError(unknown_name("key", key, allowed))
    bases, changes = definition.get("base", {}), definition.get("change", {})
    cards: dict[str, dict[str, Any]] = {}
    values = 0
    for name, content in _list_cards(definition, bases):
        if name in cards:
            raise ValueError(f"{name} is defined twice; rename or remove one.")
        cards[name] = content
        values += _count_values(content)
        if values > _MOST_VALUES:  # a large base in many cards
            raise ValueError(f"the cards hold more than {_MOST_VALUES:,} values")
    for name, change in changes.items():
        if name not in cards:
            raise ValueError(f"change: {unknown_name('card', name, cards)}")
        cards[name] = _merged(cards[name], change)
    return {name: {"version": 1} | content for name, content in cards.items()}


def _list_cards(definition: dict[str, Any], bases: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for table in definition.get("card", []):
        own = {key: value for key, value in table.items() if key not in ("name", "base")}
        yield table["name"], _merged(_base(table["base"], bases), own)
    families = definition.get("family", [])
    if len(families) > _MOST_FAMILIES:
        raise ValueError(f"{len(families)} families given; allowed: up to {_MOST_FAMILIES}")
    for family in families:
        base = _base(family["base"], bases)
        for name, row in _rows(family):
            if name in family.get("only", [name]):
                yield f"{base['dataset']}/{name}{family.get('suffix', '')}", _merged(base, row)


def _base(name: str, bases: dict[str, Any], depth: int = 0) -> dict[str, Any]:
    if depth > _MOST_BASES:
        raise ValueError(f"base {name!r} extends more than {_MOST_BASES} others, or itself.")
    if name not in bases:
        raise ValueError(unknown_name("base", name, bases))
    own = dict(bases[name])
    parent = own.pop("base", None)
    return own if parent is None else _merged(_base(parent, bases, depth + 1), own)


def _count_values(value: Any) -> int:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return 1 + sum(map(_count_values, parts))


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and key != "args"
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def read_table(name: str) -> list[dict[str, str]]:
    """Read a table of `papers/`: one dictionary per row; all values are text.

    Raises:
        ValueError: there is no such table.
    """
    check_path_component(name, "csv")
    table = resources.files("robbench") / "papers" / name
    if not table.is_file():
        raise ValueError(f"csv: {name!r} given; expected: a file of robbench/papers")
    text = table.read_text(encoding="utf-8")
    return list(csv.DictReader(io.StringIO(text)))


def _rows(family: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Make one card per row of a family's tables. A row that occurs again is another seed of the same recipe."""
    first, *others = family["tables"]
    figures = [_figures(table) for table in others]
    seen: dict[str, int] = {}
    for i, (row, own) in enumerate(zip(read_table(first["csv"]), _figures(first), strict=True)):
        given = own | {key: value for table in figures for key, value in table[i].items()}
        name, card = _row(row, family)
        seed = seen.get(name, 0)
        seen[name] = seed + 1
        tables = " and ".join(table["table"] for table in family["tables"])
        card["paper"] = {"source": family["source"], "table": tables, "row": _label(row), "figures": given}
        if seed:
            card["recipe"]["seed"] = seed
            card["title"] += f" (seed {seed})"
            name += f"_seed{seed}"
        yield name, card


def _figures(table: dict[str, str]) -> list[dict[str, float]]:
    parameters = {"alpha", "beta", "sigma", "sigma_255", "iterations"}
    prefix = table.get("prefix", "")
    return [
        {prefix + key: float(value.rstrip("*")) for key, value in row.items() if key not in parameters}
        for row in read_table(table["csv"])
    ]


def _label(row: dict[str, str]) -> str:
    if not row["iterations"]:
        return row["alpha"]
    sigma = row["sigma"] if "sigma" in row else f"{row['sigma_255']}/255"
    return f"alpha {row['alpha']}, beta {row['beta']}, sigma {sigma}, {row['iterations']}"


def _row(row: dict[str, str], family: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Make the name and the card of a row from its parameters."""
    if not row["iterations"]:  # the row of Madry et al.'s model, with which the paper compares
        return "at", {"title": "Madry adversarial training", "description": "Madry et al. 2018.", "recipe": {}}
    alpha, beta = float(row["alpha"]), float(row["beta"])
    sigma = row.get("sigma", row.get("sigma_255", "0"))
    match = _THOUSANDS.match(row["iterations"])
    if match is None:
        raise ValueError(f"iterations {row['iterations']!r} in the paper's table; expected: a number with k or M")
    iterations = int(match[1]) * {"k": 1_000, "M": 1_000_000}[match[2]]
    recipe: dict[str, Any] = {"iterations": iterations}
    names, titles, terms = [], [], []
    if alpha:
        recipe["alpha"] = alpha
        names.append(f"ls{_short(alpha)}")
        titles.append(f"Label smoothing {alpha:g}")
        terms.append(f"one-warm labels with α = {alpha:g}")
    if beta:
        recipe["beta"] = beta
        names.append(f"lsq{_short(beta)}")
        titles.append(f"Logit squeezing {beta:g}")
        terms.append(f"a penalty of β = {beta:g} on the 2-norm of the logits")
    if float(sigma):
        exact = sigma if family["sigma_unit"] == "1" else f"{sigma}/255"
        recipe["sigma"] = exact
        names.append(f"sigma{_short(float(sigma))}")
        titles.append(f"Gaussian noise {exact}")
        terms.append(f"Gaussian input noise with σ = {exact}")
    title = " + ".join(titles)
    if iterations != family["usual_iterations"]:
        names.append(row["iterations"].lower())
        title += f", {row['iterations']} iterations"
    text = " and ".join(terms) + " (Shafahi et al. 2019)."
    return "_".join(names), {"title": title, "description": text[0].upper() + text[1:], "recipe": recipe}


def _short(number: float) -> str:
    """Write 0.95 as 095 and 10 as 10. A number that begins with 0 is a fraction."""
    return f"{number:g}".replace(".", "")


def _text(content: dict[str, Any]) -> str:
    """Write a card as TOML: first plain values, then tables. Small tables are on one line."""
    document = tomlkit.document()
    for key in sorted(content, key=lambda k: _ORDER.index(k) if k in _ORDER else len(_ORDER)):
        value = content[key]
        if not isinstance(value, Mapping):
            document.add(key, tomlkit.item(value))
    for key, value in content.items():
        if isinstance(value, Mapping):
            document.add(tomlkit.nl())
            document.add(key, _table(value))
    return tomlkit.dumps(document)


def _table(value: Mapping[str, Any]) -> Any:
    table = tomlkit.table()
    inner = {k: v for k, v in value.items() if isinstance(v, Mapping)}
    for key, one in value.items():
        if key not in inner and one != []:
            table.add(key, one)
    for key, one in inner.items():
        if key in ("adversary", "pairing", "distillation"):
            table.add(tomlkit.nl())
            table.add(key, _table(one))
        elif one:
            line = tomlkit.inline_table()
            line.update(one)
            table.add(key, line)
    return table


def _list_texts(root: Path) -> Iterator[tuple[Path, str, str | None]]:
    """Yield the path of each card, its text as it should be, and its present text (None if there is no such file)."""
    for name, content in expand_families(root).items():
        path = root / f"{name}.toml"
        refuse_links(root, path)
        present = read_card_text(path) if path.exists() else None
        if present is not None:
            now = _parse(path, present)
            content = content | {key: now[key] for key in _KEPT if key in now}
        try:
            text = _text(content)
        except RecursionError:  # tomlkit needs more frames than tomllib
            raise CardError(f"{root / FAMILIES}: {name} is nested too deeply to be written.") from None
        parse_card(text, str(path))
        yield path, text, present


def list_stale_cards(root: Path) -> list[Path]:
    """List the cards that are missing or differ from `families.toml`.

    Raises:
        CardError: see `expand_families`; or a card would be invalid.
        StorageError: the folder of a card, or a card, is a link.
    """
    return [path for path, text, present in _list_texts(root) if text != present]


def write_cards(root: Path) -> list[Path]:
    """Write the cards that `list_stale_cards` lists, and return their paths.

    Raises:
        CardError, StorageError: see `list_stale_cards`. Nothing is written then.
    """
    wanted = {path: text for path, text, present in _list_texts(root) if text != present}
    for path, text in wanted.items():
        write_atomically(path, text.encode())
    return list(wanted)
