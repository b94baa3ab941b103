"""The attacks, by the name that suites use for them."""

from robbench.attacks.apgd import APGD
from robbench.attacks.base import Attack, describe
from robbench.attacks.cw import CW
from robbench.attacks.deepfool import DeepFool
from robbench.attacks.fab import FAB
from robbench.attacks.pgd import FGSM, PGD

__all__ = ["APGD", "ATTACKS", "CW", "FAB", "FGSM", "PGD", "Attack", "DeepFool", "describe"]

ATTACKS: dict[str, type[APGD] | type[CW] | type[DeepFool] | type[FAB] | type[FGSM] | type[PGD]] = {
    "apgd": APGD,
    "cw": CW,
    "deepfool": DeepFool,
    "fab": FAB,
    "fgsm": FGSM,
    "pgd": PGD,
}
