"""Compares gradients in bfloat16 with float32: verdicts image by image, passes and seconds, on different models."""

import argparse
from statistics import median

import torch
from tabulate import tabulate

from robbench.classifier.prepare import pick_device
from robbench.core.machine import describe_device, versions
from sides import Setup, SideResult, compare_sides, evaluate_side, start_process

RUNS = [
    f"{model}:{suite}"
    for suite in ("fast", "autoattack", "whitebox")
    for model in ("digits/at", "digits/trades", "digits/ls095_sigma03", "digits/lsq2_sigma03", "digits/natural")
]
NOTES = """\
- left: images that no attack of the suite breaks, float32 / bfloat16. only: images that only float32 / only bfloat16
  broke; p: exact McNemar test on them.
- passes: forward and backward passes charged, float32 / bfloat16; seconds: of the attacks, medians of paired runs,
  order alternating; speedup: median over pairs.
"""


def main() -> None:
    """Print one row per run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", default=RUNS, metavar="MODEL:SUITE")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    start_process(
        Setup(options.samples, options.seed, options.threads or torch.get_num_threads(), options.device, None), True
    )
    asked = {"samples": options.samples, "seed": options.seed, "device": options.device}
    table = []
    for name in options.runs:
        model, _, suite = name.partition(":")
        sides: dict[str | None, list[SideResult]] = {None: [], "bfloat16": []}
        for repeat in range(options.repeats):
            for gradients in (None, "bfloat16")[:: -1 if repeat % 2 else 1]:
                sides[gradients].append(evaluate_side(model, suite, gradients=gradients, **asked)[0])
        full, coarse = sides[None], sides["bfloat16"]
        only, p = compare_sides(full[0], coarse[0])
        table.append(
            {
                "model": model,
                "suite": suite,
                "n": len(full[0].robust),
                "left": f"{full[0].robust.sum()} / {coarse[0].robust.sum()}",
                "only": only,
                "p": p,
                "passes": f"{full[0].passes:,} / {coarse[0].passes:,}",
                "seconds": " / ".join(f"{median(s.seconds for s in side):.1f}" for side in (full, coarse)),
                "speedup": f"{median(f.seconds / c.seconds for f, c in zip(full, coarse, strict=True)):.2f}×",
            }
        )
        print(f"{name} done", flush=True)
    about = ", ".join(f"{k} {v}" for k, v in versions().items())
    print(f"\n{describe_device(pick_device(options.device))}; {about}; seed {options.seed}\n")
    print(tabulate(table, headers="keys", tablefmt="github", disable_numparse=True))
    print(f"\n{NOTES}")


if __name__ == "__main__":
    main()
