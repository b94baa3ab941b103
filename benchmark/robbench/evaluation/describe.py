"""What a run was asked for, put down so that it can be asked for again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from robbench.evaluation.inputs import Options
from robbench.models.sources import Build
from robbench.results.run_files import DESCRIPTION_VERSION

__all__ = ["describe_run"]


def describe_run(
    model: str | nn.Module,
    suite: str,
    dataset: str | None,
    name: str | None,
    build: Build,
    options: Options,
    own_images: bool,
) -> dict[str, Any]:
    """Put down what `evaluate` was asked for; `n`, `stages`, `date` and `identity` come to it when the run begins."""
    asked = model if isinstance(model, str) else None
    if asked is not None and asked.startswith("file:"):
        asked = f"file:{Path(asked.removeprefix('file:')).expanduser().resolve()}"
    return {
        "version": DESCRIPTION_VERSION,
        "model": asked,
        "own_images": own_images,
        "suite": str(Path(suite).resolve()) if suite.endswith(".toml") else suite,
        "dataset": dataset,
        "name": name,
        "architecture": build.architecture,
        "mean": None if build.mean is None else [float(v) for v in build.mean],
        "std": None if build.std is None else [float(v) for v in build.std],
        "norm": options.norm,
        "eps": None if options.eps is None else str(options.eps),
        "samples": options.samples,
        "sample_seed": options.sample_seed,
        "seed": options.seed,
        "lanes": options.lanes,
        "gradients": options.gradients,
        "fast_layers": options.fast_layers,
        "models": [str(Path(m).resolve()) for m in options.models],
        "data_dir": None if options.data_dir is None else str(Path(options.data_dir).resolve()),
        "save_adversarials": options.save_adversarials,
    }
