"""Read what `robbench list attacks` shows from the source files, because the attacks themselves import torch."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import robbench
from robbench.core.files import read_bounded

__all__ = ["AttackSource", "read_attacks"]

_FOLDER = Path(robbench.__file__).parent / "attacks"


@dataclass(frozen=True)
class AttackSource:
    """What the source of an attack says.

    Attributes:
        kind: its name in suites.
        what: the first line of its docstring.
        parameters: its hyperparameters and their defaults, in the order of the dataclass.
    """

    kind: str
    what: str
    parameters: dict[str, Any]


def read_attacks() -> list[AttackSource]:
    """Read all attacks of `robbench.attacks.ATTACKS`, in its order, without importing them."""
    nodes = [
        node for path in sorted(_FOLDER.glob("*.py")) for node in ast.parse(read_bounded(path, 2**20).decode()).body
    ]
    classes = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    constants = {
        target.id: node.value.value
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    (kinds,) = [node.value for node in nodes if isinstance(node, ast.AnnAssign) and _get_name(node) == "ATTACKS"]
    assert isinstance(kinds, ast.Dict)
    found = []
    for key, value in zip(kinds.keys, kinds.values, strict=True):
        assert isinstance(key, ast.Constant) and isinstance(value, ast.Name)
        what = (ast.get_docstring(classes[value.id]) or "").partition("\n")[0]
        found.append(AttackSource(str(key.value), what, _read_parameters(classes[value.id], classes, constants)))
    return found


def _read_parameters(node: ast.ClassDef, classes: dict[str, ast.ClassDef], constants: dict[str, Any]) -> dict[str, Any]:
    """Read the fields of a dataclass: those of its bases come first, with the defaults of the class."""
    parameters: dict[str, Any] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id in classes:
            parameters |= _read_parameters(classes[base.id], classes, constants)
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and line.value and not ast.unparse(line.annotation).startswith("ClassVar"):
            is_constant = isinstance(line.value, ast.Name)
            text = ast.unparse(line.value)
            parameters[_get_name(line)] = constants[text] if is_constant else ast.literal_eval(text)
    return parameters


def _get_name(node: ast.AnnAssign) -> str:
    assert isinstance(node.target, ast.Name)
    return node.target.id
