"""What a run is asked for, checked before anything slow is imported or loaded. Imports no torch."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

from robbench.core.errors import DataError, SuiteError, unknown_name
from robbench.core.numbers import parse_norm, parse_threat, whole_box
from robbench.core.types import IMAGENET, Norm, Threat
from robbench.evaluation.options import Options
from robbench.evaluation.request import RunRequest
from robbench.models.card import DATASETS, Registry
from robbench.suite import Suite, load_suite, suite_names

__all__ = ["check_request", "check_suite_name", "choose_norm", "choose_threat", "require_dataset"]


def check_request(request: RunRequest) -> None:
    """Check that model, suite, data set and radius are known and fit together, as far as no torch is needed.

    Raises:
        RobbenchError: they do not. The same errors would come later from the run itself.
    """
    suite, spec, options = load_suite(request.suite), request.spec, request.options
    check_suite_name(suite)
    if isinstance(spec.model, str) and spec.source is None:
        dataset: str = Registry.default([Path(m) for m in options.models]).find(spec.model).card.dataset
    else:
        source = None if spec.has_own_images else spec.source
        named = spec.dataset if source is None else source.test_set(spec.dataset)
        if spec.has_own_images or named == IMAGENET:
            choose_threat(suite, named or "custom", options, None)  # refuses a run without a radius
            return
        dataset = require_dataset(named)
    choose_threat(suite, dataset, options, math.prod(DATASETS[dataset].in_shape))


def check_suite_name(suite: Suite) -> None:
    """Refuse a suite of the user's own that has the name of a built-in one: tables would show both as one.

    Raises:
        SuiteError: it has the name, in whatever letters, and is another suite.
    """
    known = suite.name.casefold()
    if known in suite_names() and suite != load_suite(known):
        raise SuiteError(
            f"A suite of your own has the name {suite.name}; {known} is a built-in suite. Give its file another name, "
            f"such as my-{known}.toml."
        )


def require_dataset(dataset: str | None) -> str:
    """Return the name of the data set on which a source or a module without images is measured.

    Raises:
        DataError: none is given, or it is unknown.
    """
    if dataset is None:
        raise DataError(
            "Give images (--data PATH; in Python data=, or x= and y=), or the name of a data set (dataset=, "
            f"--dataset): {', '.join([*DATASETS, IMAGENET])}."
        )
    if dataset not in DATASETS:
        raise DataError(unknown_name("data set", dataset, [*DATASETS, IMAGENET]))
    return dataset


def choose_threat(suite: Suite, dataset: str, options: Options, pixels: int | None) -> Threat:
    """Return the threat model of a run: that of the options, or that of the suite for the data set.

    A suite that looks for the nearest break has the whole box as its ball.

    Args:
        suite: the attacks.
        dataset: name of the data set.
        options: have the norm and the radius that were asked for, if any.
        pixels: number of values of an image; None before the images are read. Then the radius is not checked.

    Raises:
        SuiteError: neither has a radius, or the radius is not one, or it means nothing for such images.
    """
    own = suite.threats.get(dataset)
    norm = parse_norm(options.norm or choose_norm(own))
    if suite.judge == "nearest":
        if options.eps is not None:
            raise SuiteError(
                f"eps: {options.eps} given with suite {suite.name!r}, which looks for the nearest break at any "
                "distance. Leave eps out, and read the accuracy at a radius off its curve. --norm chooses the norm."
            )
        return Threat(norm, Fraction(math.ceil(whole_box(norm, pixels or 1))))
    if options.eps is None:
        # The first of the two radii that are usual for ImageNet; the other is L2 3.0 (--norm L2 --eps 3).
        usual = Threat("Linf", Fraction(4, 255)) if dataset == IMAGENET else None
        threat = own or usual or suite.threat(dataset)
    else:
        try:
            threat = parse_threat(norm, options.eps)
        except ValueError as error:
            raise SuiteError(str(error)) from None
    if pixels is not None:
        _check_radius(threat, pixels)
    return threat


def choose_norm(own: Threat | None) -> Norm:
    """Return the norm of a run without --norm. `own` is the suite's threat model for the data set, if it has one."""
    return own.norm if own is not None else "Linf"


def _check_radius(threat: Threat, pixels: int) -> None:
    """Refuse a radius that means nothing for images of so many pixels.

    Raises:
        SuiteError: no two images are further apart; the radius may be given in another unit.
    """
    diameter = whole_box(threat.norm, pixels)
    if threat.norm == "Linf" or threat.eps < diameter:  # `parse_threat` refuses an Linf radius above 1
        return
    scaled = f" {threat.eps_text} of 255 levels is {threat.norm} {float(threat.eps / 255):.4g}."
    raise SuiteError(
        f"eps: {threat.norm} {threat.eps_text} given; no two images of {pixels} values in [0, 1] are further "
        f"apart than {threat.norm} {diameter:.4g}, so every image is in reach. Is eps in pixel values 0 to 255? "
        f"Expected: a radius for pixels in [0, 1].{scaled}"
    )
