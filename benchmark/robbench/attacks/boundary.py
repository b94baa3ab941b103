"""Parts shared by attacks that look for the nearest point of another class: targets, planes, and the final search.

`toward_plane` is the projection of FAB. `bracket`, `narrowed` and `between` find where the segment from the clean
image to a misclassified point crosses the decision boundary, one query at a time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from robbench.attacks.base import clean_logits
from robbench.core.losses import margin
from robbench.core.threat import per_lane
from robbench.core.types import Norm, Problem, State

__all__ = [
    "SEARCHES",
    "between",
    "bracket",
    "gap_to",
    "is_wrong",
    "narrowed",
    "toward_plane",
]

_BEYOND = 1e-3  # how far beyond the zero of the secant the search aims, as a share of what is left of the bracket
_LEAST = 0.01  # the least share of the bracket by which it moves on
_TIE = 1e-5  # how far pixels move from a tie, on average over their rates
SEARCHES = 3
"""Queries of the final search: the secant gains about three digits with each."""


def gap_to(logits: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """Compute z_target − z_y, which is negative on y's side of the boundary: [L, K], [L], [L] -> [L]."""
    return (logits.gather(1, target[:, None]) - logits.gather(1, y[:, None])).squeeze(1)


def is_wrong(logits: Tensor, y: Tensor) -> Tensor:
    """Tell where the prediction is not y, as the judge does: [L, K], [L] -> [L] bool."""
    return logits.isfinite().all(1) & (logits.argmax(1) != y)


def toward_plane(norm: Norm, x: Tensor, w: Tensor, gap: Tensor) -> Tensor:
    """Find the shortest move from x to the plane gap + ⟨w, z − x⟩ = 0 inside the box [0, 1].

    This is the projection problem of FAB (Croce & Hein 2020, Sec. 2.2). Every pixel moves towards the plane or not at
    all; with rates |w| and room up to the box, the shortest move is min(room, level) for Linf and
    min(room, level · |w|) for L2 (the KKT conditions), where `level` solves one piecewise linear equation, found by
    sorting its kinks. For L1 the pixels with the largest rates move first, each as far as the box lets it.

    Args:
        norm: by which the move is shortest.
        x: points in the box, [L, C, H, W], or m for each plane, [m, L, C, H, W].
        w: the plane's normal, [L, C, H, W]; where it is zero the move is zero.
        gap: value of the linear function at x, [L] or [m, L]; where it is not finite the move is zero. Where it is
            zero, x is a tie, which the judge gives to the lower class. Then the move goes up a little, beyond the
            plane.

    Returns:
        The move, shaped like x. Where the box ends before the plane, it leads to the corner nearest to the plane: all
        pixels with an influence move to the box.
    """
    flat, w = x.reshape(*gap.shape, -1), w.flatten(1)
    info = torch.finfo(x.dtype)
    scale = w.abs().amax(1, keepdim=True)
    rate = w.abs() / scale.clamp(min=info.tiny)
    # Next to the steepest pixel these have no influence that the sums below could show; their squares would underflow.
    rate = torch.where(rate > info.eps**2, rate, 0)
    tied, gap = gap[..., None] == 0, torch.where(gap.isfinite(), gap, 0)[..., None]
    need = torch.where(tied, _TIE * rate.sum(1, keepdim=True), gap.abs() / scale.clamp(min=info.tiny))
    direction = -w.sign() * torch.where(tied, -1, gap.sign())
    room = torch.where(direction > 0, 1 - flat, flat) * (rate > 0)
    move = _fill_steepest(rate, room, need) if norm == "L1" else _fill_evenly(norm, rate, room, need)
    return (direction * move).view_as(x)


def _fill_steepest(rate: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Use up the room of the largest rates first until Σ rate · move = need, all over the last axis.

    Shapes: rate [L, n], room [..., L, n], need [..., L, 1] -> [..., L, n].
    """
    rate, order = rate.sort(dim=1, descending=True)
    order = order.expand_as(room)
    room = room.gather(-1, order)
    before = F.pad((rate * room).cumsum(-1)[..., :-1], (1, 0))
    left = (need - before).clamp(min=0)
    move = torch.minimum(left / rate.clamp(min=torch.finfo(rate.dtype).tiny), room)
    return torch.zeros_like(move).scatter_(-1, order, move)


def _fill_evenly(norm: Norm, rate: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """Solve Σ rate · min(room, level · pace) = need for the level, pace = 1 (Linf) or rate (L2); shapes as above.

    A pixel without a rate has no room.
    """
    tiny, last = torch.finfo(rate.dtype).tiny, rate.shape[1] - 1
    # The level at which a pixel meets the box.
    kinks, order = (room / rate.clamp(min=tiny) if norm == "L2" else room).sort(dim=-1)
    slope = rate.expand_as(room).gather(-1, order)
    full, free = (slope * room.gather(-1, order), slope.square()) if norm == "L2" else (slope * kinks, slope)
    held = F.pad(full.cumsum(-1)[..., :-1], (1, 0))  # from the pixels that met it earlier
    free = free.flip(-1).cumsum(-1).flip(-1)
    k = (held + kinks * free < need).sum(-1, keepdim=True)
    at = k.clamp(max=last)
    level = (need - held.gather(-1, at)) / free.gather(-1, at).clamp(min=tiny)
    level = torch.where(k > last, kinks[..., -1:], level).clamp(min=0)
    return torch.minimum(level * rate if norm == "L2" else level, room)


def bracket(p: Problem) -> State:
    """Start the state of a search. `inner` is classified correctly. `outer` is misclassified, once known.

    Their margins are f_inner and f_outer, [L].
    """
    f_inner = margin(clean_logits(p), p.y).to(p.x.dtype)
    return {"inner": p.x.clone(), "outer": p.x.clone(), "f_inner": f_inner, "f_outer": torch.zeros_like(f_inner)}


def narrowed(s: State, inner: Tensor, outer: Tensor, value: Tensor) -> State:
    """Let `s["x"]`, with margin `value` [L], replace the end `inner` or `outer` of the bracket in these lanes [L]."""
    return {
        "inner": torch.where(per_lane(inner, s["x"]), s["x"], s["inner"]),
        "outer": torch.where(per_lane(outer, s["x"]), s["x"], s["outer"]),
        "f_inner": torch.where(inner, value, s["f_inner"]),
        "f_outer": torch.where(outer, value, s["f_outer"]),
    }


def between(s: State) -> Tensor:
    """Choose the next point to query in the bracket: where the straight line through both margins is zero.

    This is FAB's final search (Croce & Hein 2020), with `SEARCHES` queries. The point lies slightly beyond the zero:
    exactly at the zero, rounding would decide whether it is misclassified, and at a curved boundary, only the inner end
    might move.
    """
    share = s["f_inner"] / (s["f_inner"] - s["f_outer"])
    share = torch.where(share.isfinite(), share, 0.5)
    share = (share + _BEYOND * (1 - share)).clamp(_LEAST, 1)
    return (s["inner"] + per_lane(share, s["inner"]) * (s["outer"] - s["inner"])).clamp(0, 1)
