"""The radius that randomized smoothing certifies (Cohen, Rosenfeld and Kolter 2019, Theorem 1). Imports no torch."""

from __future__ import annotations

from statistics import NormalDist

__all__ = ["least_probability", "smoothing_radius"]


def least_probability(count: int, draws: int, alpha: float) -> float:
    """Bound a probability from below (Clopper and Pearson 1934): too high with a chance of at most alpha.

    Args:
        count: how many of the draws had the property.
        draws: number of independent draws.
        alpha: allowed chance of an error, in (0, 1).

    Raises:
        ValueError: the numbers do not fit each other.
    """
    if not (0 <= count <= draws and draws >= 1 and 0 < alpha < 1):
        raise ValueError(
            f"{count} of {draws} draws at alpha {alpha} given; expected 0 <= count <= draws, 0 < alpha < 1"
        )
    if count == 0:
        return 0.0
    from scipy.special import betaincinv  # a third of the time that scipy.stats takes

    return float(betaincinv(count, draws - count + 1, alpha))


def smoothing_radius(count: int, draws: int, alpha: float, sigma: float) -> float:
    """Return the L2 radius around an image in which the smoothed class is certain; 0 if it must abstain.

    Args:
        count: draws that voted for the class.
        draws: number of draws, other than those that chose the class.
        alpha: allowed chance of a wrong certificate.
        sigma: standard deviation of the noise, in pixel units.
    """
    probability = least_probability(count, draws, alpha)
    return sigma * NormalDist().inv_cdf(probability) if probability > 0.5 else 0.0
