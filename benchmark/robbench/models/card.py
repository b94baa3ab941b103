"""Model cards: one TOML file per model, and the registries that hold them.

A card claims which function the model computes (data set, architecture, normalization, weights), how the model was
trained, and which figures the paper reports. A card holds no measurements. Nothing here imports torch.
"""

import difflib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from robbench.core.errors import CardError
from robbench.core.files import read_bounded, write_atomically
from robbench.core.words import fold_name
from robbench.models.recipes import Adversary, CpuOverrides, Distillation, Pairing, Recipe
from robbench.models.schema import (
    DATASETS,
    Architecture,
    DatasetFacts,
    ModelCard,
    Paper,
    Preprocess,
    ThreatClaim,
    TrainingRecord,
    Weights,
    parse_card,
)

__all__ = [
    "DATASETS",
    "WEIGHTS_FOLDER",
    "Adversary",
    "Architecture",
    "CpuOverrides",
    "DatasetFacts",
    "Distillation",
    "Entry",
    "ModelCard",
    "Pairing",
    "Paper",
    "Preprocess",
    "Recipe",
    "Registry",
    "ThreatClaim",
    "TrainingRecord",
    "Weights",
    "extract_identity",
    "load_card",
    "locate_builtin_cards",
    "parse_card",
    "write_training",
]

WEIGHTS_FOLDER = "weights"
MOST_BYTES = 2**17  # size limit of a card


def read_card_text(path: Path) -> str:
    """Read the text of a card.

    Raises:
        CardError: the file cannot be read, is too large, or is not UTF-8.
    """
    try:
        return read_bounded(path, MOST_BYTES).decode()
    except OSError as error:
        raise CardError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CardError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from None


def load_card(path: Path) -> ModelCard:
    """Read and check one card.

    Raises:
        CardError: the file cannot be read, is not TOML, or is invalid. Every problem is named.
    """
    return parse_card(read_card_text(path), str(path))


@dataclass(frozen=True)
class Entry:
    """One card file of a registry. It is read on the first use of `card`.

    Attributes:
        name: file name without `.toml`.
        dataset: name of the folder the file lies in.
        path: the card file.
        root: the registry root, `path.parent.parent`; weights lie under `root / "weights"`.
    """

    name: str
    dataset: str
    path: Path
    root: Path

    @property
    def full_name(self) -> str:
        """The name with the data set, such as `digits/natural`. It is unique in a `Registry`."""
        return f"{self.dataset}/{self.name}"

    @cached_property
    def card(self) -> ModelCard:
        """The card, read on first use.

        Raises:
            CardError: the card is invalid, or names another data set than its folder.
        """
        card = load_card(self.path)
        if card.dataset != self.dataset:
            raise CardError(
                f"{self.path}: dataset: {card.dataset!r} given; expected: {self.dataset!r}, the folder of the card"
            )
        return card

    @property
    def needs_training(self) -> bool:
        """Whether `robbench train` must make the weights: the card has none, or they are not shipped and not here.

        Raises:
            CardError: see `card`.
        """
        weights = self.card.weights
        if weights is None or self.card.shipped:
            return weights is None
        return weights.path is None or not (self.root / WEIGHTS_FOLDER / weights.path).exists()

    def explain_unshipped(self) -> str:
        """Explain which weights the card is about, and how to make them. For cards with `shipped = false`."""
        assert self.card.weights is not None, "a card without weights is not trained yet"
        record, made = self.card.trained, ""
        if record is not None:
            changes = f" ({record.instead})" if record.instead else ""
            made = (
                f" They were made by `{record.command}`: {record.iterations:,} iterations{changes} in "
                f"{record.seconds:.0f} s on {record.hardware}."
            )
        return (
            f"The weights of {self.full_name} are not in the repository. Make them with `robbench train "
            f"{self.full_name}`.{made} Stored results are of weights with SHA-256 {self.card.weights.sha256}. Training "
            "on other hardware can give other weights. `robbench train` writes their digest to the card."
        )


def locate_builtin_cards() -> Path:
    """Return the folder of the built-in cards: inside the package in a wheel, `models/` in a checkout."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "registry"
    return packaged if packaged.is_dir() else package.parents[1] / "models"


class Registry:
    """The cards under one or more roots. The index uses file names only, so an invalid card does not affect others.

    Args:
        roots: folders with cards `<dataset>/<name>.toml` and the weights under `weights/`.

    Raises:
        CardError: a root is not such a folder, or two roots have a card of the same full name.
    """

    def __init__(self, roots: Sequence[Path]) -> None:
        self.roots: tuple[Path, ...] = tuple(dict.fromkeys(Path(root).resolve() for root in roots))
        self._entries: dict[str, Entry] = {}
        for root in self.roots:
            for entry in _index(root):
                other = self._entries.setdefault(entry.full_name, entry)
                if other is not entry:
                    raise CardError(
                        f"Two cards are named {entry.full_name}: {other.path} and {entry.path}. Rename one of them."
                    )

    @classmethod
    def default(cls, extra: Sequence[Path] = ()) -> "Registry":
        """Index the built-in cards, the folders in ROBBENCH_MODELS (separated by `os.pathsep`), and `extra`.

        Raises:
            CardError: see the class.
        """
        named = [Path(part) for part in os.environ.get("ROBBENCH_MODELS", "").split(os.pathsep) if part]
        return cls([locate_builtin_cards(), *named, *extra])

    def entries(self) -> list[Entry]:
        """List all cards by data set, then name. No card is read, so invalid cards are listed too."""
        return sorted(self._entries.values(), key=lambda entry: (entry.dataset, entry.name))

    def find(self, name: str) -> Entry:
        """Return the card named `dataset/name`, or `name` if only one data set has that name.

        Raises:
            CardError: the name is unknown (the closest names are given) or ambiguous (the full names are given).
        """
        if name in self._entries:
            return self._entries[name]
        matches = [entry for entry in self.entries() if entry.name == name]
        if len(matches) > 1:
            full = ", ".join(entry.full_name for entry in matches)
            raise CardError(f"Model name {name!r} is ambiguous; give the full name: {full}.")
        if not matches:
            close = difflib.get_close_matches(name, self._entries, n=5, cutoff=0.0)
            raise CardError(
                f"Unknown model {name!r}. The closest of {len(self._entries)}: {', '.join(close)}. "
                "`robbench list models` lists them all. A source has its kind first, such as module:function."
            )
        return matches[0]

    def find_alike(self, dataset: str, name: str) -> str:
        """Return the full name of the card of a data set that a name names or resembles (`AT`); "" if there is none."""
        alike = (e.full_name for e in self.entries() if e.dataset == dataset and fold_name(e.name) == fold_name(name))
        return next(alike, "")


def _index(root: Path) -> list[Entry]:
    if not root.is_dir():
        raise CardError(f"{root}: no such folder; expected: a folder of cards <dataset>/<name>.toml")
    paths = [path for path in sorted(root.glob("*/*.toml")) if path.parent.name != WEIGHTS_FOLDER]
    if not paths and any(root.glob("*.toml")):
        # Most likely the folder of one data set was given. With an empty index the error would be "unknown model".
        raise CardError(f"{root}: cards directly in this folder; expected: <dataset>/<name>.toml below it")
    return [Entry(name=path.stem, dataset=path.parent.name, path=path, root=root) for path in paths]


def write_training(path: Path, *, weights_path: str, sha256: str, trained: Mapping[str, Any]) -> None:
    """Write the new weights and their training record into a card. Comments and the order of keys stay.

    Args:
        path: the card file.
        weights_path: the weights file, relative to the registry's `weights/`.
        sha256: digest of the weights file.
        trained: the content of the `trained` table, see `TrainingRecord`.

    Raises:
        CardError: the card is invalid before the change or would be after it. The file is not changed then.
    """
    import tomlkit  # reading cards does not need it

    text = read_card_text(path)
    if (weights := parse_card(text, str(path)).weights) and weights.package:
        raise CardError(f"{path}: weights.package: {weights.package!r} given; only weights by path can be trained")
    document = tomlkit.parse(text if text.endswith("\n") else text + "\n")
    for key, values in {"weights": {"path": weights_path, "sha256": sha256}, "trained": trained}.items():
        if key not in document and not tomlkit.dumps(document).endswith("\n\n"):
            document.add(tomlkit.nl())
        table = document.setdefault(key, tomlkit.table())
        for stale in set(table) - set(values):
            del table[stale]
        table.update(values)
    updated = tomlkit.dumps(document)
    parse_card(updated, str(path))
    write_atomically(path, updated.encode())


def extract_identity(card: ModelCard) -> dict[str, Any]:
    """Return the part of a card that, together with the weights, determines the model's function, as JSON values."""
    return card.model_dump(mode="json", include={"dataset", "architecture", "preprocess"})
