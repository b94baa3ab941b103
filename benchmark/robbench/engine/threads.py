"""Crews: several batches beside each other. On a CPU, a wide batch for each core beats one batch over all cores.

The layers of a small network are too short to be shared: the core that is done first waits for the others at each of
them, and waits long when the machine has something else to do. Batches of their own never wait, except for the
interpreter, which is why few samples stay together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from robbench.classifier.batch_width import Widths, device_of, twin, using_threads
from robbench.engine.trials import Ledger

__all__ = ["Crew", "muster", "work"]

_MOST = 8  # the interpreter serves one crew at a time between kernels; more would wait for it
_PIXELS = 2**20  # in the lanes of all crews: larger images are shared well by cores, and their memory counts
_FEW = 32  # samples for each crew; with fewer, cores that share one batch are as fast or faster


@dataclass(frozen=True, eq=False)
class Crew:
    """One batch among `crews`.

    Attributes:
        model: for this crew alone, because a module may keep notes while it answers. The first has the original.
        crews: how many there are; the lanes that there is work for are shared out among them.
    """

    model: nn.Module
    crews: int


def muster(model: nn.Module, widths: Widths, n: int, alone: bool) -> tuple[list[Crew], int]:
    """Choose the crews that work on n samples, and the threads of each.

    The bits that come out depend on neither: kernels run on one thread, or on several where the model was seen to
    give the same bits with them.

    Args:
        model: what they ask.
        widths: of the lanes.
        n: how many samples wait.
        alone: keep to one crew, as for a model that answers at random: its answers come in one order then.
    """
    threads = torch.get_num_threads()
    if threads == 1 or device_of(model).type != "cpu":
        return [Crew(model, 1)], threads
    most = 1 if alone else min(threads, _MOST, _PIXELS // (widths.lanes * int(np.prod(widths.shape))))
    crews = max(1, min(most, n // _FEW))
    if crews < most and not widths.same_with(threads // crews):
        crews = min(range(1, most + 1), key=lambda crews: _lanes(widths, -(-n // crews)))
    try:
        models = [model, *(twin(model) for _ in range(crews - 1))]
    except Exception:  # whatever a user's module raises: hooks, handles and generators do not copy
        models = [model]
    crews = len(models)
    each = threads // crews
    return [Crew(m, crews) for m in models], each if each == 1 or widths.same_with(each) else 1


def _lanes(widths: Widths, n: int) -> int:
    """Count the lanes that n samples pass through, with the idle ones of the last batch."""
    full, rest = divmod(n, widths.lanes)
    return full * widths.lanes + (widths.fit(rest) if rest else 0)


def work(jobs: Sequence[Callable[[], None]], threads: int, ledger: Ledger) -> None:
    """Run the crews' loops, each on so many threads; what one of them raises stops all, and is raised here."""
    with using_threads(threads):
        if len(jobs) == 1:
            jobs[0]()
            return
        with ThreadPoolExecutor(len(jobs), "crew") as pool:
            try:
                for future in as_completed([pool.submit(job) for job in jobs]):
                    future.result()
            except BaseException:
                ledger.close()
                raise
