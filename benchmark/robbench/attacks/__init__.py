"""The attacks, by the name that suites use for them."""

from robbench.attacks.apgd import APGD
from robbench.attacks.base import Attack, describe, parameters
from robbench.attacks.brief import Brief
from robbench.attacks.cw import CW
from robbench.attacks.deepfool import DeepFool
from robbench.attacks.eot import EOT
from robbench.attacks.fab import FAB
from robbench.attacks.hopskipjump import HopSkipJump
from robbench.attacks.hunt import Hunt
from robbench.attacks.momentum import MIFGSM
from robbench.attacks.nearest import Nearest
from robbench.attacks.noise import Noise
from robbench.attacks.odi import ODI
from robbench.attacks.pgd import FGSM, PGD
from robbench.attacks.rays import RayS
from robbench.attacks.relax import Relax
from robbench.attacks.spsa import SPSA
from robbench.attacks.square import Square
from robbench.core.arguments import explain_arguments

__all__ = [
    "APGD",
    "ATTACKS",
    "CW",
    "EOT",
    "FAB",
    "FGSM",
    "MIFGSM",
    "ODI",
    "PGD",
    "SPSA",
    "Attack",
    "Brief",
    "DeepFool",
    "HopSkipJump",
    "Hunt",
    "Nearest",
    "Noise",
    "RayS",
    "Relax",
    "Square",
    "describe",
    "parameters",
]

for _cls in (
    APGD, CW, EOT, FAB, FGSM, MIFGSM, ODI, PGD, SPSA, Brief, DeepFool, HopSkipJump, Hunt, Noise, RayS, Relax, Square,
):  # fmt: skip
    setattr(_cls, "__init__", explain_arguments(_cls.__init__))  # noqa: B010  # mypy forbids to assign a method

ATTACKS: dict[str, type[Attack]] = {
    "apgd": APGD,
    "brief": Brief,
    "cw": CW,
    "deepfool": DeepFool,
    "fab": FAB,
    "fgsm": FGSM,
    "hopskipjump": HopSkipJump,
    "hunt": Hunt,
    "mifgsm": MIFGSM,
    "noise": Noise,
    "odi": ODI,
    "pgd": PGD,
    "rays": RayS,
    "relax": Relax,
    "spsa": SPSA,
    "square": Square,
}
