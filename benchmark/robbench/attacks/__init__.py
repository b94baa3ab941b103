"""The attacks, by the name that suites use for them."""

from robbench.attacks.apgd import APGD
from robbench.attacks.base import Attack, describe
from robbench.attacks.pgd import FGSM, PGD

__all__ = ["APGD", "ATTACKS", "FGSM", "PGD", "Attack", "describe"]

ATTACKS: dict[str, type[APGD] | type[FGSM] | type[PGD]] = {
    "apgd": APGD,
    "fgsm": FGSM,
    "pgd": PGD,
}
