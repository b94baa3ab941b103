"""Results and cards for the tables of the papers."""

import re

from robbench.models.card import Registry
from robbench.results.places import locate_result
from robbench.results.schema import AttackResult, ResultFile, ThreatResult
from robbench.results.summary import make_accuracy
from support.evidence import write_evidence

SHA = {
    name: digit * 64 for name, digit in (("ls095_sigma03", "a"), ("natural", "b"), ("st_resnet18", "c"), ("at", "9"))
}


def registry_of(root, models, *trained, without=()):
    """Copy the cards of MNIST and CIFAR-10 into `root`; those named in `trained` have weights.

    Whether training has written weights into the cards of this repository does not matter.
    """
    for dataset in ("mnist", "cifar10"):
        (root / dataset).mkdir(parents=True)
        for path in sorted((models / dataset).glob("*.toml")):
            text = re.split(r"\n\[(?:weights|trained)\]", path.read_text(encoding="utf-8"))[0] + "\n"
            if path.stem in trained:
                text += f'\n[weights]\npath = "x.safetensors"\nsha256 = "{SHA[path.stem]}"\n'
            if path.stem not in without:
                (root / dataset / path.name).write_text(text, encoding="utf-8")
    return Registry([root])


def attack(name, left, n=1000, **config):
    return AttackResult(
        name=name, robust_accuracy=make_accuracy(left, n), forwards=0, backwards=0, seconds=0.0, config=config,
        refuted=0,
        zero_gradient_share=0.0,
    )  # fmt: skip


def result(model, suite, robust, attacks, n=1000, dataset="mnist", eps="0.3", **changed):
    values = {
        "schema_version": 2, "run_id": f"{len(suite) + n:064x}", "model": model, "dataset": dataset,
        "threat": ThreatResult(norm="Linf", eps=eps), "suite": suite, "n": n, "seed": 0,
        "clean_accuracy": make_accuracy(round(0.99 * n), n), "robust_accuracy": make_accuracy(robust, n),
        "attacks": [attack(name, left, n) for name, left in attacks.items()], "judge": "any", "mode": "full",
        "overrides": {}, "flags": {}, "identity": {"weights": SHA.get(model, "d" * 64)}, "selection": "", "forwards": 0,
        "backwards": 0, "seconds": 0.0, "lanes": 8, "hardware": "", "versions": {}, "date": "2026-01-02T03:04:05+00:00",
    }  # fmt: skip
    return ResultFile(**{**values, **changed})


def put(root, r, status=None):
    """Store a result with these counts, or with these statuses, and return the path of its result.json."""
    return locate_result(root, write_evidence(root, r, status)) / "result.json"


def line_of(sheet, model):
    (found,) = [line for line in sheet.rows if line.model == model]
    return found
