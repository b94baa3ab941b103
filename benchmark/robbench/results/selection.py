"""The samples of a run: how a selection is described, and which samples it names. Imports no torch."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from robbench.core.errors import DataError
from robbench.core.philox import draw_order
from robbench.data.sets import find_index_bounds

__all__ = ["describe_selection", "find_excess_draws", "find_selection_error", "order_positions"]

_MOST_DRAWN = 2**22  # images whose random order is drawn again for one file; a hostile file may claim any number
_TOTAL = re.compile(r"(?:all|.* of) ([0-9]{1,15})(?: drawn .*)?")


def describe_selection(n: int, total: int, sample_seed: int | None) -> str:
    """Describe the choice of n of `total` images, such as "first 256 of 899"."""
    if sample_seed is not None:
        return f"{n} of {total} drawn with sample seed {sample_seed}"
    return f"all {total}" if n == total else f"first {n} of {total}"


def order_positions(total: int, sample_seed: int | None) -> NDArray[np.int64]:
    """Return the positions 0 to total − 1 in the order in which runs select them, [total] int64."""
    return np.arange(total, dtype=np.int64) if sample_seed is None else draw_order(total, sample_seed)


@functools.lru_cache(maxsize=1)
def _draw(total: int, seed: int) -> NDArray[np.int64]:
    """Do as `draw_order`. The results of a tree, and the entries of a baseline, mostly share one order."""
    return draw_order(total, seed)


def find_excess_draws(selections: Iterable[tuple[str, int | None]]) -> str:
    """Explain why a file's selections, with their sample seeds, take too long to draw again; empty if they do not.

    Selections of one seed and one test set count once, if they are checked one after the other.
    """
    drawn = {(found[1], seed) for text, seed in selections if seed is not None and (found := _TOTAL.fullmatch(text))}
    images = sum(int(total) for total, _ in drawn)
    if images <= _MOST_DRAWN:
        return ""
    return f"{len(drawn)} random orders of {images:,} images; allowed in one file: {_MOST_DRAWN:,} images"


def find_selection_error(
    samples: NDArray[np.int64], *, selection: str, sample_seed: object, dataset: str, data: object
) -> str:
    """Explain why samples are not those that a selection names; empty if they are, as far as no data are needed.

    The official indices of the samples are known for a complete test set and for the user's own images. Of a copy that
    lacks images, it is known how many indices the copy leaves out. `robbench verify` knows all indices.

    Args:
        samples: official indices in the order of the records, [n].
        selection: what the result says about its choice (`describe_selection`).
        sample_seed: seed of the random order in the identity of the run; None means official order.
        dataset: name of the data set.
        data: digest of the test set.
    """
    n, found = len(samples), _TOTAL.fullmatch(selection)
    total = int(found[1]) if found else -1
    seed = sample_seed if isinstance(sample_seed, int) else None
    if total < n or not n or selection != describe_selection(n, total, seed):
        return f"selection is {selection!r}; the records hold {n} images, and the sample seed is {sample_seed}"
    if seed is not None and total > _MOST_DRAWN:
        return f"selection is {selection!r}; allowed with a sample seed: a test set of up to {_MOST_DRAWN:,} images"
    try:
        first, lacking = find_index_bounds(dataset, str(data), total)
    except DataError as error:
        return f"selection is {selection!r}: {error}"
    positions = np.arange(n, dtype=np.int64) if seed is None else _draw(total, seed)[:n]
    by_position = np.argsort(positions)
    left_out = samples[by_position] - first - positions[by_position]  # indices that are left out below each sample
    # The indices of a test set increase, so the number of indices that are left out never falls.
    wrong = (left_out < 0) | (left_out > lacking) | (np.diff(left_out, prepend=0) < 0)
    if not wrong.any():
        return ""
    at = by_position[np.argmax(wrong)]
    return (
        f"selection is {selection!r}, which does not hold sample {samples[at]} in place {at + 1}: samples are removed, "
        "exchanged or of another order"
    )
