"""The attacks, by the name that suites use for them."""

from robbench.attacks.apgd import APGD
from robbench.attacks.base import Attack, describe
from robbench.attacks.pgd import FGSM, PGD
from robbench.attacks.spsa import SPSA
from robbench.attacks.square import Square

__all__ = ["APGD", "ATTACKS", "FGSM", "PGD", "SPSA", "Attack", "Square", "describe"]

ATTACKS: dict[str, type[APGD] | type[FGSM] | type[PGD] | type[SPSA] | type[Square]] = {
    "apgd": APGD,
    "fgsm": FGSM,
    "pgd": PGD,
    "spsa": SPSA,
    "square": Square,
}
