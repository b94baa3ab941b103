"""The training recipe of a card, and the changes to it where there is only a CPU.

The terms of a recipe combine. With z(x) the logits, x' the adversary's images and λ = `adversary.mix`, the loss of a
batch is

    (1 − λ) · fit(z(x)) + λ · fit(z(x')) + β ‖z‖ terms + pairing.weight · pair

Here `fit` is the cross-entropy with smoothed labels or, with a teacher, the L1 distance to the teacher's logits. The
Gaussian noise of the recipe is added to every x and x'.
"""

import math
from fractions import Fraction
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from robbench.core.types import Norm
from robbench.models.fields import CardTable, Exact, Numbers, Scalar, Text

__all__ = ["Adversary", "CpuOverrides", "Distillation", "LargeBatch", "Pairing", "Recipe", "describe_changes"]

_CHANGED = ("iterations", "batch_size", "lr", "schedule", "warmup", "ema")  # by budgets
_CHANGED_IN_ADVERSARY = ("steps", "step_size")


class Adversary(CardTable):
    """The attack inside adversarial training. `eps` and `step_size` are exact, in [0, 1] pixel units.

    `attack` is a name from `robbench list attacks`, and `args` are its further parameters. Training uses its final
    point. `mix` is the weight of the adversarial loss against the clean loss (Shafahi et al. 2019, Eq. 1). With mix 1,
    training uses adversarial examples only (Madry et al. 2018). The loss `kl` is the divergence from the clean
    prediction (Zhang et al. 2019).
    """

    attack: Text = "pgd"
    norm: Norm = "Linf"
    eps: Annotated[Exact, Field(gt=0)]
    step_size: Annotated[Exact | None, Field(gt=0)] = None
    steps: Annotated[int, Field(ge=1)]
    random_start: bool = True
    loss: Literal["ce", "margin", "dlr", "kl"] = "ce"
    args: dict[str, Scalar] = Field(default_factory=dict)
    mix: Annotated[float, Field(ge=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.loss == "kl" and not (self.attack == "pgd" and self.random_start):
            # At x the divergence from the prediction at x is at its minimum, so its gradient is zero.
            raise ValueError("loss 'kl' given; allowed: with attack 'pgd' and random_start only")
        return self


class Pairing(CardTable):
    """A penalty with factor `weight` on the difference between the logits of two batches.

    Kinds: `trades` is KL(softmax z(x) ‖ softmax z(x')) (Zhang et al. 2019, Eq. 5, with weight = 1/λ); `alp` the mean
    square of z(x) − z(x'); `clp` the mean square between the logits of the two halves of the batch, which are random
    pairs of clean images (Kannan et al. 2018).
    """

    kind: Literal["trades", "alp", "clp"]
    weight: Annotated[float, Field(gt=0)]


class Distillation(CardTable):
    """Fit the logits of `teacher` (a registered model) on clean images. The loss is the mean absolute difference.

    Seguin et al. 2021: there is one target per image, the mean over `views` augmented views. `fix` = k keeps the k
    largest logits of the target and permutes or averages the `rest`. `correct` exchanges the logit of a wrong
    prediction with the logit of the true class. `ranks_from` names a second teacher: the sorted logits of the first
    teacher are given to the classes in the order of the second teacher's logits.
    """

    teacher: Text
    views: Annotated[int, Field(ge=1)] = 10
    fix: Annotated[int | None, Field(ge=1)] = None
    rest: Literal["permute", "average"] = "permute"
    correct: bool = False
    ranks_from: Text | None = None


class Recipe(CardTable):
    """How to train the model.

    `alpha` is the strength of label smoothing. `smoothing` says which classes get the removed probability: all classes
    alike (`standard`), the least likely class (`adversarial`), the most likely wrong class (`second_best`), or all
    classes in proportion to exp(−z / `temperature`) (`boltzmann`). `beta` is the strength of logit squeezing with the
    `squeeze_norm`-norm. `sigma` is the standard deviation of the Gaussian noise on the inputs (exact, in [0, 1] pixel
    units). `milestones` are fractions of `iterations`. At each of them the schedule `steps` multiplies the learning
    rate by `gamma`. Over the first `warmup` of the iterations, a fraction, the learning rate is multiplied by a factor
    that rises linearly from 0 to 1 (Goyal et al. 2017, Sec. 2.2). `ema` is the decay of the running average of the
    weights, which is saved; 0 saves the last weights.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.0
    smoothing: Literal["standard", "adversarial", "second_best", "boltzmann"] = "standard"
    temperature: Annotated[float, Field(gt=0)] = 1.0
    beta: Annotated[float, Field(ge=0)] = 0.0
    squeeze_norm: Annotated[float, Field(ge=1)] = 2.0
    sigma: Annotated[Exact, Field(ge=0, le=1)] = Fraction(0)
    iterations: Annotated[int, Field(ge=1)]
    batch_size: Annotated[int, Field(ge=1)]
    optimizer: Literal["adam", "sgd"]
    lr: Annotated[float, Field(gt=0)]
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    schedule: Literal["constant", "cosine", "steps"] = "constant"
    milestones: Numbers = ()
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.0
    augment: Literal["none", "crop", "crop_flip"] = "none"
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0
    adversary: Adversary | None = None
    pairing: Pairing | None = None
    distillation: Distillation | None = None

    @model_serializer(mode="wrap")
    def _keep_identities(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Checkpoints and stored trainings are named by their recipe. Those of before `warmup` keep their names.
        written: dict[str, Any] = serialize(self)
        return {key: value for key, value in written.items() if key != "warmup" or value}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        # A key that the chosen optimizer, schedule or term ignores is a mistake.
        if self.optimizer == "adam" and (self.momentum or self.nesterov):
            raise ValueError("momentum or nesterov given with optimizer 'adam'; allowed: with 'sgd' only")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov = true given without momentum; expected: momentum > 0")
        if (self.schedule == "steps") != bool(self.milestones):
            raise ValueError(
                f"schedule {self.schedule!r} given with {len(self.milestones)} milestones; "
                "expected: milestones with 'steps', and only with it"
            )
        bounded = all(0 < m < 1 for m in self.milestones)
        if not bounded or list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones {list(self.milestones)} given; expected: increasing, in (0, 1)")
        if self.smoothing != "standard" and not self.alpha:
            raise ValueError(f"smoothing {self.smoothing!r} given with alpha = 0; expected: alpha > 0")
        if self.distillation and self.alpha:
            raise ValueError("alpha given with a teacher; a teacher's logits replace the labels")
        if self.pairing and (self.pairing.kind == "clp") == bool(self.adversary):
            raise ValueError(
                f"pairing {self.pairing.kind!r} given; allowed: 'clp' without an adversary, 'trades' and 'alp' with one"
            )
        if self.pairing and self.pairing.kind == "clp" and self.batch_size < 2:
            raise ValueError("pairing 'clp' given with batch_size 1; expected: at least 2")
        if self.adversary and not self.adversary.mix and not self.pairing:
            raise ValueError("adversary.mix = 0 given; allowed: only with a pairing, no other term uses the images")
        return self


class CpuOverrides(CardTable):
    """The table `cpu_budget` of a card: values that replace those of the recipe where there is only a CPU.

    `steps` and `step_size` replace those of the adversary. The card of a model that was trained in this way says so,
    and the model counts as partly trained.
    """

    iterations: Annotated[int | None, Field(ge=1)] = None
    lr: Annotated[float | None, Field(gt=0)] = None
    schedule: Literal["constant", "cosine"] | None = None
    ema: Annotated[float | None, Field(ge=0, lt=1)] = None
    steps: Annotated[int | None, Field(ge=1)] = None
    step_size: Annotated[Exact | None, Field(gt=0)] = None

    def apply(self, recipe: Recipe) -> Recipe:
        """Return the recipe with these values.

        Raises:
            ValueError: the new recipe is invalid, or there are values for an adversary that the recipe does not have.
        """
        given = self.model_dump(exclude_none=True)
        inner = {key: given.pop(key) for key in ("steps", "step_size") if key in given}
        whole: dict[str, Any] = recipe.model_dump(exclude_unset=True) | given
        if given.get("schedule"):
            whole["milestones"] = ()
        if inner:
            if recipe.adversary is None:
                raise ValueError(f"{', '.join(inner)} given; the recipe has no adversary")
            whole["adversary"] = whole["adversary"] | inner
        return Recipe.model_validate(whole)


class LargeBatch(CardTable):
    """The table `gpu_budget` of a card: the recipe with a batch `factor` times as large, for as many epochs.

    The number of iterations is divided by `factor`, and the learning rate is multiplied: by `factor` for SGD (Goyal et
    al. 2017, Sec. 2.1), by its square root for Adam (Malladi et al. 2022, Def. 5.3). `warmup` replaces the recipe's.
    """

    factor: Annotated[int, Field(ge=2)]
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05

    def apply(self, recipe: Recipe) -> Recipe:
        """Return the recipe with the larger batch."""
        changed = {
            "batch_size": recipe.batch_size * self.factor,
            "iterations": math.ceil(recipe.iterations / self.factor),
            "lr": recipe.lr * (self.factor if recipe.optimizer == "sgd" else math.sqrt(self.factor)),
            "warmup": self.warmup,
        }
        return Recipe.model_validate(recipe.model_dump(exclude_unset=True) | changed)


def describe_changes(before: Recipe, after: Recipe) -> str:
    """Describe what a budget changed, such as `iterations 10000 instead of 100000`. More iterations are left out."""
    pairs = [(key, getattr(before, key), getattr(after, key)) for key in _CHANGED]
    if before.adversary and after.adversary:
        old, new = before.adversary, after.adversary
        pairs += [(f"adversary.{key}", getattr(old, key), getattr(new, key)) for key in _CHANGED_IN_ADVERSARY]
    return ", ".join(
        f"{key} {_show(new)} instead of {_show(old)}"
        for key, old, new in pairs
        if new != old and not (key == "iterations" and new > old)
    )


def _show(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
