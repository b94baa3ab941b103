"""The geometry of lp balls inside the box [0, 1]. All code on tensors that depends on the norm is here.

Attacks use a `Ball` to project points (`project`), to draw a start (`random`) and to find the steepest direction
(`steepest`). The judge uses it to check whether a point is allowed (`contains`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from robbench.core import rng
from robbench.core.types import Norm, Problem, Threat

__all__ = ["DUAL", "Ball", "length", "per_lane"]

_ORDER = {"Linf": torch.inf, "L2": 2, "L1": 1, "L0": 0}
DUAL: dict[Norm, Norm] = {"Linf": "L1", "L2": "L2", "L1": "Linf"}
"""The norm by which to measure a gradient, for a perturbation measured by the other one."""


def per_lane(v: Tensor, like: Tensor) -> Tensor:
    """Reshape per-lane values [L] so that they broadcast against [L, C, H, W]."""
    return v.view(-1, *([1] * (like.dim() - 1)))


def length(norm: Norm, v: Tensor) -> Tensor:
    """Measure v by a norm: [L, C, H, W] -> [L]."""
    lengths: Tensor = torch.linalg.vector_norm(v.flatten(1), ord=_ORDER[norm], dim=1)
    return lengths


@dataclass(frozen=True, slots=True)
class Ball:
    """The points within `eps` of x0 (in `norm`) and inside [0, 1]. Points are [L, C, H, W].

    `eps` is one radius, or one for each lane, [L]. With `levels`, only points whose pixels are all k / levels are
    allowed: 255 means images of 8 bits. `project`, `random` and `steepest` ignore the levels, because attacks move
    freely. The engine rounds (`round`) what they propose.
    """

    norm: Norm
    eps: float | Tensor
    levels: int | None = None

    @classmethod
    def of(cls, threat: Threat, levels: int | None = None) -> Ball:
        """Make the ball of a threat."""
        return cls(threat.norm, float(threat.eps), levels)

    def radius(self, like: Tensor) -> float | Tensor:
        """Return eps in a shape that broadcasts against `like`, whose first axis is the lane, and in its dtype."""
        return per_lane(self.eps.to(like.dtype), like) if isinstance(self.eps, Tensor) else self.eps

    def distance(self, x0: Tensor, x: Tensor) -> Tensor:
        """Measure ‖x − x0‖ per lane in float64: [L]."""
        return length(self.norm, x.double() - x0.double())

    def contains(self, x0: Tensor, x: Tensor) -> Tensor:
        """Check per lane that x is finite, exactly inside [0, 1], and within eps of x0: [L] bool.

        The distance may exceed eps by the rounding error of a float32 x: 1e-6, plus 1e-5 of eps for norms that sum
        over pixels. With `levels`, each pixel must be the nearest number to k / levels in the dtype of x.
        """
        inside = ((x >= 0) & (x <= 1)).flatten(1).all(1)  # also false for NaN
        if self.levels is not None:
            inside &= (x == (x.double() * self.levels).round().to(x.dtype) / self.levels).flatten(1).all(1)
        return inside & (self.distance(x0, x) <= self.eps + self._slack)

    @property
    def _slack(self) -> float | Tensor:
        """The rounding error of a float32 x that the distance may have."""
        return 1e-6 if self.norm == "Linf" else 1e-6 + 1e-5 * self.eps

    def round(self, x0: Tensor, x: Tensor) -> Tensor:
        """Round each pixel to the nearest k / levels. Points of the ball stay in it where levels allow this.

        Where rounding takes a point of the ball out of it, pixels that moved away from x0 are rounded towards x0
        instead: in Linf those outside, else as few as possible, those first whose distance falls most. This always
        suffices if x0 is on levels. Else the point may stay outside, and `contains` refuses it. Points outside the
        ball are rounded to the nearest levels. Without `levels` the result is x.
        """
        if self.levels is None:
            return x
        at, clean = x.double() * self.levels, x0.double() * self.levels
        nearest = at.round()
        off = 1e-4  # in steps between levels; float32 is more exact
        inward = torch.where(at >= clean, (at + off).floor(), (at - off).ceil())
        allowed, far = (self.eps + self._slack / 2) * self.levels, (nearest - clean).abs()
        if self.norm == "Linf":
            moves = far > (per_lane(allowed, far) if isinstance(allowed, Tensor) else allowed)
        elif self.norm == "L0":
            moves = torch.zeros_like(far, dtype=torch.bool)  # a pixel that did not move is not rounded away from x0
        else:
            power = 2 if self.norm == "L2" else 1
            gain = (far.pow(power) - (inward - clean).abs().pow(power)).flatten(1)
            excess = far.flatten(1).pow(power).sum(1) - allowed**power
            gained, order = gain.sort(dim=1, descending=True)
            # A pixel is moved if those before it have not made up for the excess.
            needed = gained.cumsum(1) - gained < excess[:, None]
            moves = torch.zeros_like(needed).scatter(1, order, needed & (gained > 0)).view_as(at)
        inside = length(self.norm, at - clean) <= (self.eps + self._slack) * self.levels
        rounded = torch.where(moves & per_lane(inside, at), inward, nearest)
        return (rounded.to(x.dtype) / self.levels).clamp(0, 1)

    def has_choice(self, x0: Tensor) -> Tensor:
        """Tell per lane whether more than one point on levels is in the ball, [L] bool. True without `levels`.

        If not, there is nothing to search: the only candidate is x0 with every pixel rounded to its nearest level.
        """
        if self.levels is None:
            return torch.ones(len(x0), dtype=torch.bool, device=x0.device)
        at = x0.flatten(1).double() * self.levels
        near = (at - at.round()).abs()
        near = torch.where(near < 1e-4, 0, near)  # float32 does not hold levels exactly
        nearest, pixel = near.max(1, keepdim=True)  # the pixel for which the next level costs least
        return length(self.norm, near.scatter(1, pixel, 1 - nearest) / self.levels) <= self.eps + self._slack

    def project(self, x0: Tensor, x: Tensor) -> Tensor:
        """Project x onto the intersection of ball and box, exactly (Euclidean projection).

        For L1 and L2 the projection is x0 + clip(shrunk x − x0). The shrinkage is found by sorting the values where a
        pixel reaches the box, as in Croce & Hein 2021 ("Mind the box", Prop. 2.1). For L0 the largest moves stay.
        """
        if self.norm == "Linf":
            eps = self.radius(x)
            return torch.minimum(torch.maximum(x, x0 - eps), x0 + eps).clamp(0, 1)
        # In float32, sums over thousands of pixels would leave the ball by more than `contains` allows.
        delta = (x - x0).flatten(1).double()
        # The distance of each pixel to the box, in the direction of its move.
        room = torch.where(delta > 0, 1 - x0.flatten(1).double(), x0.flatten(1).double())
        size = delta.abs()
        clipped = torch.minimum(size, room)
        eps = self.radius(delta)
        if self.norm == "L0":
            outside = (clipped > 0).sum(1, keepdim=True) > eps
            rank = clipped.argsort(stable=True, dim=1, descending=True).argsort(1)
            shrunk = torch.where(rank < torch.as_tensor(eps, device=x.device).floor(), clipped, 0)
        elif self.norm == "L1":
            outside = clipped.sum(1, keepdim=True) > eps
            shrunk = torch.minimum((size - _l1_threshold(size, room, eps)[:, None]).clamp(min=0), room)
        else:
            outside = clipped.square().sum(1, keepdim=True) > eps**2
            shrunk = torch.minimum(size * _l2_factor(size, room, eps)[:, None], room)
        moved = torch.where(outside, shrunk, clipped) * delta.sign()
        return (x0 + moved.to(x0.dtype).view_as(x0)).clamp(0, 1)

    def random(self, p: Problem, *, step: int | Tensor = 0, surface: bool = False) -> Tensor:
        """Draw a random allowed point per lane: uniform in the ball, then projected into the box.

        With `surface` the draw is scaled to norm eps before the projection. APGD starts there.
        """
        n = p.x[0].numel()
        draw = rng.uniform if self.norm == "Linf" else rng.normal
        u = draw(p.key, p.sample, p.trial, step, n).to(p.x.dtype)
        if self.norm == "Linf":
            delta = 2 * u - 1
            scale = length(self.norm, delta)[:, None] if surface else torch.ones_like(delta[:, :1])
        else:
            if self.norm == "L1":
                # The L1 ball needs Laplace numbers. Convert the normal numbers with their distribution function.
                tail = torch.special.ndtr(-u.abs().double()) * 2
                u = u.sign() * -torch.log(tail.clamp(min=1e-300)).to(u.dtype)
            delta = u
            scale = length(self.norm, delta)[:, None]
            if not surface:
                radius = rng.uniform(p.key, p.sample, p.trial, step + (1 << 31), 1).to(u.dtype)
                scale = scale / radius.pow(1 / n).clamp(min=1e-12)
        delta = delta / scale.clamp(min=1e-12) * self.radius(delta)
        return self.project(p.x, p.x + delta.view_as(p.x))

    def steepest(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the unit-norm direction in which a linear loss with this gradient rises most.

        Linf: the sign. L2: the normalized gradient. L1: the pixel with the largest gradient among those that the box
        does not block. A zero gradient gives a zero direction.
        """
        if self.norm == "Linf":
            return grad.sign()
        flat = grad.flatten(1)
        if self.norm == "L2":
            return grad / per_lane(length("L2", grad).clamp(min=torch.finfo(grad.dtype).tiny), grad)
        at = x.flatten(1)
        stuck = ((at <= 0) & (flat < 0)) | ((at >= 1) & (flat > 0))
        free = flat.masked_fill(stuck, 0)
        best = free.abs().argmax(1, keepdim=True)
        return torch.zeros_like(flat).scatter_(1, best, free.gather(1, best).sign()).view_as(grad)

    def climb(self, x: Tensor, grad: Tensor, size: float | Tensor) -> Tensor:
        """Return the move of length `size` along which a linear loss with this gradient rises most.

        Linf, L2: `size` times the steepest direction, which the caller projects into the box. L1: pixels move to the
        box, those with the largest gradient first, until the length is used up. One pixel alone can move by 1 at most,
        and radii in L1 are often far above that.

        Args:
            x: points in the box, [L, C, H, W].
            grad: gradient at these points.
            size: length of the moves, one for all lanes or [L, 1, 1, 1].
        """
        if self.norm != "L1":
            return size * self.steepest(x, grad)
        flat, at = grad.flatten(1), x.flatten(1)
        order = flat.abs().argsort(dim=1, descending=True, stable=True)
        room = (torch.where(flat > 0, 1 - at, at) * (flat != 0)).gather(1, order)
        left = (size.flatten(1) if isinstance(size, Tensor) else size) - (room.cumsum(1) - room)
        moved = torch.minimum(left.clamp(min=0), room)
        return (torch.zeros_like(flat).scatter_(1, order, moved) * flat.sign()).view_as(grad)


def _l1_threshold(size: Tensor, room: Tensor, eps: float | Tensor) -> Tensor:
    """Solve Σ min(max(size − λ, 0), room) = eps for λ per lane, [L, n], [L, n] -> [L]. A tensor eps is [L, 1].

    The sum is piecewise linear in λ. As λ falls, the term of a pixel grows from λ = size to λ = size − room. The caller
    ignores the λ of lanes whose sum at λ = 0 is at most eps.
    """
    points = torch.cat([size, size - room], dim=1)
    slopes = torch.cat([torch.ones_like(size), -torch.ones_like(size)], dim=1)
    points, order = points.sort(dim=1, descending=True)
    slope = slopes.gather(1, order).cumsum(1)
    # The sum at each point, for λ from max(size) downward.
    total = torch.zeros_like(points)
    total[:, 1:] = (slope[:, :-1] * (points[:, :-1] - points[:, 1:])).cumsum(1)
    # The last point at which the sum is still at most eps.
    k = ((total <= eps).sum(1, keepdim=True) - 1).clamp(min=0)
    step = (eps - total.gather(1, k)) / slope.gather(1, k).clamp(min=1)
    return (points.gather(1, k) - step).squeeze(1).clamp(min=0)


def _l2_factor(size: Tensor, room: Tensor, eps: float | Tensor) -> Tensor:
    """Solve Σ min(f · size, room)² = eps² for f in [0, 1] per lane, [L, n], [L, n] -> [L]. A tensor eps is [L, 1].

    Pixels reach the box in the order of room / size. The caller ignores the f of lanes whose sum at f = 1 is at most
    eps².
    """
    tiny = torch.finfo(size.dtype).tiny
    reach, order = (room / size.clamp(min=tiny)).sort(dim=1)
    free = size.square().gather(1, order)
    at_box = room.square().gather(1, order)
    # With the first k pixels at the box, f² = (eps² − Σ at_box) / Σ free.
    box_sum = at_box.cumsum(1) - at_box
    free_sum = free.flip(1).cumsum(1).flip(1)
    f = ((eps**2 - box_sum).clamp(min=0) / free_sum.clamp(min=tiny)).sqrt()
    # The right k is the first one whose f leaves the next pixel inside the box.
    k = (f > reach).sum(1, keepdim=True).clamp(max=size.shape[1] - 1)
    return f.gather(1, k).squeeze(1).clamp(max=1)
