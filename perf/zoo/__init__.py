"""A zoo of small models with a label: is their robust accuracy under the usual attack to be trusted, or is it masked?

It is there to calibrate checks of gradient masking, and to say how often these are right.

The label follows a rule. With PGD the usual attack on a data set (20 steps on the
cross-entropy on the digits, 40 on MNIST, one start; the suite `whitebox`), and best the lowest robust accuracy that any
attack known here reaches, a model is

* `masked` if it answers at random, so that a single answer proves nothing; if PGD − best is `MASKED_FROM` points or
  more; or if its backward pass is written to be that of another function (straight-through rounding), so that what PGD
  finds depends on a choice of the defender's, whether it gets past or not;
* `honest` if PGD − best is at most `HONEST_UP_TO` points and neither of the others holds.

Models in between are not admitted. `perf/zoo.py` measures it. Where a defense has a strength, it was chosen so that the
rule decides; the attacks were not.

The half is given by position: within each kind, in the order of the list, the entries are calibration and held-out in
turn, whatever was measured of them. An entry that is dropped leaves a gap, one that is added goes to the end of its
kind, one whose label measurement refuted moves to where it belongs, and none changes its half.
"""

from robbench.core.errors import RobbenchError, unknown_name
from zoo.chance import AT_RANDOM
from zoo.entry import Half, Label, ZooEntry, network, zoo_registry
from zoo.honest import HONEST
from zoo.trained import TRAINED
from zoo.wrapped import WRAPPED

__all__ = ["HONEST_UP_TO", "MASKED_FROM", "ZOO", "Half", "Label", "ZooEntry", "find_entry", "network", "zoo_registry"]

ZOO: tuple[ZooEntry, ...] = (*WRAPPED, *AT_RANDOM, *TRAINED, *HONEST)
"""All entries: masked ones first, kind by kind."""

MASKED_FROM = 12
"""Points of robust accuracy by which the usual attack overstates a masked model at least."""

HONEST_UP_TO = 8
"""Points of robust accuracy by which the usual attack overstates an honest model at most."""


def find_entry(name: str) -> ZooEntry:
    """Look an entry up.

    Raises:
        RobbenchError: there is none of this name (with the closest ones).
    """
    for entry in ZOO:
        if entry.name == name:
            return entry
    raise RobbenchError(unknown_name("model of the zoo", name, [entry.name for entry in ZOO]))
