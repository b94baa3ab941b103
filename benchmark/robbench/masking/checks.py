"""The checks of gradient masking. Imports no torch.

A check is a function from measurements to a value, a sentence that explains the value, and whether the value is
significant. thresholds.toml turns the value into a status. docs/sanity.md defines every value.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from robbench.core.stats import mcnemar
from robbench.masking.measurements import Challenge, Measurements
from robbench.masking.record import CheckResult
from robbench.masking.thresholds import CheckOutcome, Thresholds, parse_thresholds

__all__ = ["CHECKS", "load_thresholds", "run_checks"]

_LEVEL = 0.05  # significance level of the paired tests
_UNMEASURED = "Not measured: this record is of an older version."


def load_thresholds(text: str | None = None) -> Thresholds:
    """Read the thresholds of all checks; see `thresholds.parse_thresholds`."""
    return parse_thresholds(CHECKS, text)


def run_checks(m: Measurements, thresholds: Thresholds | None = None) -> list[CheckResult]:
    """Run all checks on measurements, with the given thresholds or the package's."""
    table = (thresholds or load_thresholds()).check
    results = []
    for name, check in CHECKS.items():
        threshold, outcome = table[name], check(m)
        status = threshold.judge(outcome)
        results.append(
            CheckResult(
                name=name,
                title=threshold.title,
                value=None if outcome.value is None else round(outcome.value, 6),
                threshold=threshold.passing_range,
                status=status,
                reason=outcome.reason,
                source=threshold.source,
                decides={"warn": threshold.on_warn, "fail": threshold.on_fail}.get(status, ""),
            )
        )
    return results


# sanity.json stores the sentences of the checks. Changing a sentence makes stored files stale.
def _points(count: float, m: Measurements) -> float:
    return 100 * count / m.n


def _randomized(m: Measurements) -> CheckOutcome:
    r = m.randomness
    value = max(r.change, float(r.flips > 0))
    images = f"{r.draws} answers to each of {r.images} images: {r.flips} predictions change, logits by up to "
    if r.change_off is None or r.flips_off is None:
        return CheckOutcome(value, f"{images}{r.change:.1e} of their length. Points around the images: not measured.")
    return CheckOutcome(
        max(value, r.change_off, float(r.flips_off > 0)),
        f"{images}{r.change:.1e} of their length. At {r.points} points around images: {r.flips_off} and "
        f"{r.change_off:.1e}.",
    )


def _probabilities(m: Measurements) -> CheckOutcome:
    predicate = "lie in [0, 1] and sum to 1" if m.probabilities else "are no probabilities"
    return CheckOutcome(float(m.probabilities), f"The model's answers {predicate}.")


def _classes(m: Measurements) -> CheckOutcome:
    return CheckOutcome(float(m.classes), f"The model has {m.classes} classes.")


def _autograd_inside(m: Measurements) -> CheckOutcome:
    return CheckOutcome(float(m.autograd_calls), f"{m.autograd_calls} calls of autograd inside one forward pass.")


def _unavailable_gradients(m: Measurements) -> CheckOutcome:
    if not m.differentiable:
        return CheckOutcome(
            1.0, "The model's output does not depend on its input through autograd: there is no gradient."
        )
    share = m.scale.unavailable
    sentence = f"{share:.1%} of {m.scale.images} clean images have a gradient of exactly zero."
    return CheckOutcome(share, sentence + _explain_nonfinite(m))


def _explain_nonfinite(m: Measurements) -> str:
    return " Entries of NaN or infinity count as zero; some gradients hold them." if m.nonfinite_gradients else ""


def _repeated_gradients(m: Measurements) -> CheckOutcome:
    share = m.gradients.unrepeatable
    if share is None:
        return CheckOutcome(None, _UNMEASURED)
    return CheckOutcome(share, f"At {share:.1%} of all points the gradient changes when it is queried again.")


def _zero_gradients(m: Measurements) -> CheckOutcome:
    sentence = f"{m.zero_gradients:.2%} of all gradients that PGD asked for are exactly zero."
    return CheckOutcome(m.zero_gradients, sentence + _explain_nonfinite(m))


def _underflow(m: Measurements) -> CheckOutcome:
    share = m.scale.underflow
    return CheckOutcome(
        share,
        f"At {share:.1%} of {m.scale.images} clean images the plain cross-entropy has a gradient below 1e-20.",
    )


def _logit_range(m: Measurements) -> CheckOutcome:
    return CheckOutcome(m.scale.logit_range, f"Largest minus smallest logit: {m.scale.logit_range:.2f} (median).")


def _squeezed_logits(m: Measurements) -> CheckOutcome:
    s = m.scale
    if s.wrong_spread is None:
        return CheckOutcome(None, "With two classes there is one wrong logit.")
    return CheckOutcome(
        s.wrong_spread,
        f"The wrong classes' logits spread by {s.wrong_spread:.3f} of their distance to the largest, which is "
        f"{s.log_odds:.2f}.",
    )


def _with_role(m: Measurements, *roles: str) -> list[Challenge]:
    return [c for c in m.challenges if c.role in roles]


def _beyond_control(m: Measurements, roles: tuple[str, ...]) -> CheckOutcome:
    """Compare the strongest attack with one of the roles with the control."""
    found = max(_with_role(m, *roles), key=lambda c: (c.beyond - c.behind, c.beyond), default=None)
    if found is None:
        return CheckOutcome(None, "The suite has no such attack.")
    if not found.given:
        return CheckOutcome(None, "The usual PGD left no image standing.")
    value = _points(found.beyond - found.behind, m)
    p = mcnemar(found.beyond, found.behind)
    control = _with_role(m, "control")[0]
    return CheckOutcome(
        value,
        f"{found.name} breaks {found.broken} of the {found.given} images that the usual PGD left, PGD again "
        f"{control.broken}: {value:+.1f} points of {m.n} images (p = {p:.2g}).",
        significant=p < _LEVEL,
    )


def _alone(m: Measurements, role: str) -> CheckOutcome:
    """Count the images that an attack without the model's gradient broke and no attack with the gradient did."""
    found = max(_with_role(m, role), key=lambda c: (c.alone, c.broken), default=None)
    if found is None:
        return CheckOutcome(None, "No such attack ran: there is no surrogate for this data set.")
    if not found.given:
        return CheckOutcome(None, "The usual PGD left no image standing.")
    return CheckOutcome(
        _points(found.alone, m),
        f"{found.name} breaks {found.broken} of the {found.given} images that the usual PGD left, {found.alone} of "
        "which no attack with gradients breaks.",
        significant=mcnemar(found.alone, 0) < _LEVEL,
    )


def _restarts(m: Measurements) -> CheckOutcome:
    control = _with_role(m, "control")[0]
    if not control.given:
        return CheckOutcome(None, "The usual PGD left no image standing.")
    value = _points(control.broken, m)
    return CheckOutcome(
        value, f"From another start PGD breaks {control.broken} of {control.given} more ({value:.1f} points)."
    )


def _finite_differences(m: Measurements) -> CheckOutcome:
    g = m.gradients
    if g.cosine is None:
        return CheckOutcome(None, "Neither the gradient nor the differences move: the function is flat there.")
    return CheckOutcome(
        g.cosine,
        f"Gradient and central differences along {g.directions} random directions have a cosine of {g.cosine:.2f} "
        f"(median of {g.images} images).",
    )


def _partial_gradients(m: Measurements) -> CheckOutcome:
    value = m.gradients.cosine_low
    if value is None:
        return CheckOutcome(None, _UNMEASURED if m.gradients.cosine is not None else "The function is flat there.")
    return CheckOutcome(
        value, f"The same cosine, fifth percentile over random points and PGD's end points: {value:.2f}."
    )


def _nearby_gradients(m: Measurements) -> CheckOutcome:
    g = m.gradients
    if g.nearby is None:
        return CheckOutcome(None, "All gradients there are zero.")
    return CheckOutcome(
        g.nearby, f"Gradients within {g.radius:.3g} of each other have a cosine of {g.nearby:.2f} (median)."
    )


def _local_linearity(m: Measurements) -> CheckOutcome:
    value = m.gradients.nonlinearity
    if value is None:
        return CheckOutcome(None, "The function is flat there.")
    return CheckOutcome(value, f"Across the ball the gradient misses {value:.0%} of the margin's change (median).")


def _grid(m: Measurements) -> CheckOutcome:
    g = m.grid
    usual = g.standing[g.usual[0]][g.usual[1]]
    if not usual:
        return CheckOutcome(None, "The usual step size and iterations leave nothing standing.")
    value, p = 100 * (g.beyond - g.behind) / g.images, mcnemar(g.beyond, g.behind)
    lowest = min(
        (n, size, iterations)
        for size, counts in zip(g.sizes, g.standing, strict=True)
        for n, iterations in zip(counts, g.iterations, strict=True)
    )
    return CheckOutcome(
        value,
        f"Of {g.images} images {usual} stand in the usual cell and {lowest[0]} at step {lowest[1]:g} of eps with "
        f"{lowest[2]} iterations (p = {p:.2g}).",
        significant=p < _LEVEL,
    )


def _monotone(m: Measurements) -> CheckOutcome:
    c = m.curve
    images = len(c.broken[0])
    rises, p = 0, 1.0
    for low, high in zip(c.broken, c.broken[1:], strict=False):
        behind = sum(a and not b for a, b in zip(low, high, strict=True))
        beyond = sum(b and not a for a, b in zip(low, high, strict=True))
        if behind - beyond > rises:
            rises, p = behind - beyond, mcnemar(beyond, behind)
    predicate = f"rises by {rises} of {images} images (p = {p:.2g})" if rises else "never rises"
    sentence = f"Over {len(c.eps)} radii the robust accuracy {predicate}."
    return CheckOutcome(100 * rises / images, sentence, significant=p < _LEVEL)


def _unbounded(m: Measurements) -> CheckOutcome:
    last = m.curve.broken[-1]
    sentence = f"With the whole box PGD breaks {sum(last)} of {len(last)} images."
    return CheckOutcome(100 * sum(last) / len(last), sentence)


def _unstable_predictions(m: Measurements) -> CheckOutcome:
    value = m.traces.unstable
    if value is None:
        return CheckOutcome(None, "There are no final points.")
    return CheckOutcome(value, f"Among 100 neighbours of the final points the margin changes by {value:.0%} (median).")


def _silent_success(m: Measurements) -> CheckOutcome:
    t = m.traces
    sentence = f"{t.silent} of {t.images} images are broken on the way, not at the end."
    return CheckOutcome(100 * t.silent / t.images, sentence)


def _incomplete_optimization(m: Measurements) -> CheckOutcome:
    value = m.traces.unfinished
    if value is None:
        return CheckOutcome(None, "Every image is broken.")
    return CheckOutcome(value, f"{value:.0%} of the loss's rise comes in the last 10 of 40 steps (median).")


def _transfer_failure(m: Measurements) -> CheckOutcome:
    if m.differentiable and m.zero_gradients < 0.5:
        return CheckOutcome(None, "The attacks climb the model's own gradient, no stand-in's.")
    if not any(t.fooled for t in m.transferred):
        return CheckOutcome(None, "No surrogate was fooled.")
    best = max((t for t in m.transferred if t.fooled), key=lambda t: t.broken / t.fooled)
    share = 1 - best.broken / best.fooled
    return CheckOutcome(
        share, f"{best.name}: of {best.fooled} points that fool the surrogate, {best.broken} fool the model too."
    )


def _binarization(m: Measurements) -> CheckOutcome:
    b = m.binarization
    if not b.separable:
        return CheckOutcome(None, "No linear readout tells the boundary point from the inner ones.")
    if 2 * b.random > b.separable:
        return CheckOutcome(None, f"Random sampling already breaks {b.random} of {b.separable}: the test says nothing.")
    return CheckOutcome(
        100 * b.attack / b.separable,
        f"PGD, usual or annealed, breaks {b.attack} of {b.separable} two-class problems that have an adversarial "
        f"example, random sampling {b.random}.",
    )


def _linear_estimate(m: Measurements) -> CheckOutcome:
    linear = m.linear
    if 2 * linear.defined < linear.images or linear.radius is None:
        return CheckOutcome(None, f"Only {linear.defined} of {linear.images} images have a gradient gap.")
    value = 100 * (linear.standing - linear.predicted) / linear.defined
    return CheckOutcome(
        value,
        f"PGD leaves {linear.standing} of {linear.defined} images, the linear estimate {linear.predicted} (its median "
        f"radius: {linear.radius:.3g}).",
    )


def _overestimation(m: Measurements) -> CheckOutcome:
    if not m.pgd.value:
        return CheckOutcome(None, "The usual PGD left no image standing.")
    gap = round(100 * (m.pgd.value - m.best.value), 6)  # a gap of ten points is ten in floating point too
    return CheckOutcome(gap, f"PGD leaves {m.pgd.value:.1%}, everything together {m.best.value:.1%}.")


CHECKS: dict[str, Callable[[Measurements], CheckOutcome]] = {
    "randomized": _randomized,
    "probabilities": _probabilities,
    "classes": _classes,
    "autograd_inside": _autograd_inside,
    "unavailable_gradients": _unavailable_gradients,
    "zero_gradients": _zero_gradients,
    "repeated_gradients": _repeated_gradients,
    "underflow": _underflow,
    "logit_range": _logit_range,
    "squeezed_logits": _squeezed_logits,
    "finite_differences": _finite_differences,
    "partial_gradients": _partial_gradients,
    "nearby_gradients": _nearby_gradients,
    "local_linearity": _local_linearity,
    "loss_disagreement": partial(_beyond_control, roles=("other loss",)),
    "single_step": partial(_beyond_control, roles=("single step",)),
    "noise": partial(_alone, role="noise"),
    "transfer": partial(_alone, role="transfer"),
    "square": partial(_alone, role="square"),
    "restarts": _restarts,
    "steps": partial(_beyond_control, roles=("more steps",)),
    "step_sizes": partial(_beyond_control, roles=("other steps",)),
    "grid": _grid,
    "monotone": _monotone,
    "unbounded": _unbounded,
    "unstable_predictions": _unstable_predictions,
    "silent_success": _silent_success,
    "incomplete_optimization": _incomplete_optimization,
    "transfer_failure": _transfer_failure,
    "binarization": _binarization,
    "linear_estimate": _linear_estimate,
    "overestimation": _overestimation,
}
"""Name -> check, in the order of the report."""
