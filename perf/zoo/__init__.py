"""A zoo of small models with labels. A label says whether the robust accuracy under the usual attack is masked.

The zoo calibrates the checks of gradient masking, and measures how often the checks are right.

The label follows a rule. PGD is the robust accuracy under the usual attack on the data set: PGD on the
rescaled cross-entropy with one start, 20 steps on the digits and 40 on MNIST. No loss depends on a factor or an offset
of the logits, so no label does. Best is the lowest robust accuracy of any
attack known here. A model is

* `masked` if it answers at random, because a single answer then proves nothing; if PGD − best is `MASKED_FROM` points
  or more; or if its backward pass is that of another function (straight-through rounding, noise, a part of the
  gradient), because the result of PGD then depends on a choice of the defender;
* `honest` if PGD − best is at most `HONEST_UP_TO` points and none of the other conditions holds.

Models between these limits are not admitted. `perf/zoo_check.py` measures both accuracies. The strength of a defense
was chosen so that the rule gives a clear label. The attacks were not chosen.

The usual attack was PGD on the plain cross-entropy at first. By it, three models with scaled logits were masked.

The position of an entry gives its half. Within each kind, in the order of the list, entries are calibration and
held-out in turn, independent of their measurements. A removed entry leaves a gap. A new entry goes to the end of its
kind. An entry with a refuted label moves to its correct label. No entry ever changes its half.
"""

from robbench.core.errors import RobbenchError, unknown_name
from zoo.chance import AT_RANDOM
from zoo.entry import Half, Label, ZooEntry, load_network, open_zoo_registry
from zoo.honest import HONEST
from zoo.trained import TRAINED
from zoo.wrapped import WRAPPED

__all__ = [
    "HONEST_UP_TO",
    "MASKED_FROM",
    "ZOO",
    "Half",
    "Label",
    "ZooEntry",
    "find_entry",
    "load_network",
    "open_zoo_registry",
]

ZOO: tuple[ZooEntry, ...] = (*WRAPPED, *AT_RANDOM, *TRAINED, *HONEST)
"""All entries, kind by kind. Masked models come first."""

MASKED_FROM = 12
"""Smallest overestimation of a masked model by the usual attack, in points of robust accuracy."""

HONEST_UP_TO = 8
"""Largest overestimation of an honest model by the usual attack, in points of robust accuracy."""


def find_entry(name: str) -> ZooEntry:
    """Return the entry with a name.

    Raises:
        RobbenchError: there is no such entry. The error names the closest ones.
    """
    for entry in ZOO:
        if entry.name == name:
            return entry
    raise RobbenchError(unknown_name("model of the zoo", name, [entry.name for entry in ZOO]))
