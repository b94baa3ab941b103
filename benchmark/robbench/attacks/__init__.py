"""The attacks, by the name that suites use for them."""

from robbench.attacks.apgd import APGD
from robbench.attacks.base import Attack, describe, parameters
from robbench.attacks.eot import EOT
from robbench.attacks.momentum import MIFGSM
from robbench.attacks.odi import ODI
from robbench.attacks.pgd import FGSM, PGD
from robbench.attacks.spsa import SPSA
from robbench.attacks.square import Square

__all__ = [
    "APGD",
    "ATTACKS",
    "EOT",
    "FGSM",
    "MIFGSM",
    "ODI",
    "PGD",
    "SPSA",
    "Attack",
    "Square",
    "describe",
    "parameters",
]

ATTACKS: dict[str, type[Attack]] = {
    "apgd": APGD,
    "fgsm": FGSM,
    "mifgsm": MIFGSM,
    "odi": ODI,
    "pgd": PGD,
    "spsa": SPSA,
    "square": Square,
}
