"""robbench: how robust is this classifier, really?

docs/api.md shows every name of `dir(robbench)` at work. The package is imported without torch: each public name is
resolved on first use, so that `robbench --help` and everything that only reads results stays fast.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

from robbench.core.settings import may_change_process
from robbench.core.version import __version__

# With this setting, Intel's matrix products sum in one order, for any batch width and number of threads
# (docs/design.md). The library reads it at the first product of a process. It costs about nothing.
if may_change_process():
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

__all__ = [
    "Attack",
    "Normalized",
    "Result",
    "RobbenchError",
    "RobustnessWarning",
    "__version__",
    "assert_robust",
    "attack",
    "attacks",
    "check",
    "clean_accuracy",
    "evaluate",
    "load_data",
    "load_dataset",
    "load_model",
    "plan",
    "reproduce",
    "sanity",
    "verify",
]

_PLACES = {
    "Attack": ("robbench.attacks", "Attack"),
    "Normalized": ("robbench.models.architectures", "Normalized"),
    "Result": ("robbench.report.result", "Result"),
    "RobbenchError": ("robbench.core.errors", "RobbenchError"),
    "RobustnessWarning": ("robbench.api", "RobustnessWarning"),
    "assert_robust": ("robbench.testing", "assert_robust"),
    "attack": ("robbench.api", "attack"),
    "check": ("robbench.testing", "check"),
    "clean_accuracy": ("robbench.api", "clean_accuracy"),
    "evaluate": ("robbench.api", "evaluate"),
    "load_data": ("robbench.api", "load_data"),
    "load_dataset": ("robbench.api", "load_dataset"),
    "load_model": ("robbench.api", "load_model"),
    "plan": ("robbench.evaluation.planning", "plan"),
    "reproduce": ("robbench.recheck.reproduce", "reproduce"),
    "sanity": ("robbench.testing", "sanity"),
    "verify": ("robbench.recheck.verify", "verify"),
}

if TYPE_CHECKING:
    from robbench import attacks
    from robbench.api import RobustnessWarning, attack, clean_accuracy, evaluate, load_data, load_dataset, load_model
    from robbench.attacks import Attack
    from robbench.core.errors import RobbenchError
    from robbench.evaluation.planning import plan
    from robbench.models.architectures import Normalized
    from robbench.recheck.reproduce import reproduce
    from robbench.recheck.verify import verify
    from robbench.report.result import Result
    from robbench.testing import assert_robust, check, sanity


def __getattr__(name: str) -> Any:
    if name == "attacks":
        return importlib.import_module("robbench.attacks")
    if name in _PLACES:
        module, attribute = _PLACES[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'robbench' has no attribute {name!r}; it has: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return list(__all__)
