"""What to see in each figure of results: below the figure, and on the page of a model. Imports no torch."""

from __future__ import annotations

__all__ = ["CAPTIONS", "SHEET_CAPTION", "SWEEP_CAPTION"]

CAPTIONS = {
    "accuracy-eps": (
        "What to see: how fast the worst case falls as the radius grows. Where Equation 4 lies above the worst "
        "case, the linear model promises more than attacks leave. Where FGSM-CW lies far above it, one step is too "
        "weak a test."
    ),
    "accuracy-steps": (
        "What to see: a curve that still falls at its last step stopped too early, so its number is too high. Where "
        "the curves end far apart, the higher attacks are too weak for this model."
    ),
    "per-class": (
        'What to see: a class with a lower number than "all" loses more of its images. A model can be robust '
        "on average and still lose all images of one class."
    ),
    "gallery": (
        "What to see: the true class above the clean image, which pixels the attack changes, and the class that the "
        "model then answers (→). Where you still see the true class, the model makes a mistake that you do not make."
    ),
}
"""Id of the figure -> caption."""

SHEET_CAPTION = (
    "What to see: whether the number of the usual PGD can be trusted. The accuracy must fall to 0 as the radius "
    "grows, longer attacks must not break many more images, and no other attack must break many images that the "
    "usual PGD left."
)
SWEEP_CAPTION = (
    "What to see: how fast the worst case falls as the radius grows. An attack whose curve lies above it misses images."
)
