"""Image classifiers of Hugging Face's transformers, with their own normalization inside the module."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from robbench.core.errors import ModelError
from robbench.models.outside import import_package, run_foreign_code

__all__ = ["HubClassifier", "load_hub_classifier"]


class HubClassifier(nn.Module):
    """A classifier of transformers: images [N, C, H, W] in [0, 1] -> logits [N, K].

    Args:
        inner: the classifier, whose answer has an attribute `logits`.
        mean: per channel of images in [0, 1].
        std: per channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, inner: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.inner = inner
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits."""
        logits: Tensor = self.inner(pixel_values=(x - self.mean) / self.std).logits
        return logits


def load_hub_classifier(
    what: str, repo: str, revision: str, in_shape: tuple[int, int, int]
) -> tuple[HubClassifier, str]:
    """Load a classifier with its preprocessing. Only safetensors are read, and no code of the repository is run.

    Resizing and cropping are left out: images come at the size at which they are attacked.

    Args:
        what: the source, for error messages.
        repo: OWNER/REPO, or a folder of that name.
        revision: a branch, a tag or a commit; "" for the default branch.
        in_shape: (C, H, W) of the images.

    Returns:
        The classifier, and the commit; "" for a folder.

    Raises:
        ModelError: transformers, the network or the repository is missing; it holds no classifier of images; or its
            preprocessing is no normalization.
    """
    with run_foreign_code(what):
        transformers: Any = import_package("transformers", "hub", what)
        given: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": False}
        inner = transformers.AutoModelForImageClassification.from_pretrained(repo, use_safetensors=True, **given)
        processor = transformers.AutoImageProcessor.from_pretrained(repo, **given)
        scale = getattr(processor, "rescale_factor", 1 / 255)
        if not getattr(processor, "do_rescale", True) or abs(scale * 255 - 1) > 1e-6 or _has_offset(processor):
            raise ModelError(
                f"{what}: its preprocessing scales pixels by {scale}; expected: 1/255, then mean and std. Load it in a "
                "function of your own: --model package.module:function."
            )
        channels = in_shape[0]
        normalizes = getattr(processor, "do_normalize", False)
        mean = list(processor.image_mean) if normalizes else [0.0] * channels
        std = list(processor.image_std) if normalizes else [1.0] * channels
        if len(mean) != channels:
            raise ModelError(f"{what} takes images of {len(mean)} channels; these have {channels}.")
        module = HubClassifier(inner.eval().float(), mean, std).eval()
        _compare_with_processor(what, module, processor, in_shape)
        return module, getattr(inner.config, "_commit_hash", None) or ""


def _has_offset(processor: Any) -> bool:
    return bool(getattr(processor, "rescale_offset", False))


def _compare_with_processor(what: str, module: HubClassifier, processor: Any, in_shape: tuple[int, int, int]) -> None:
    """Compare the module with the classifier behind its own preprocessing, on 16 images of 8 bits.

    Raises:
        ModelError: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (16, *in_shape), generator=generator, dtype=torch.uint8)
    off = {name: False for name in ("do_resize", "do_center_crop") if hasattr(processor, name)}
    images = [image.permute(1, 2, 0).numpy() for image in pixels]
    with torch.no_grad(), contextlib.suppress(ValueError):  # a size that the model refuses; the first query words it
        own = module.inner(**processor(images=images, return_tensors="pt", **off)).logits
        ours = module(pixels.float() / 255)
        if not torch.allclose(ours, own, rtol=1e-3, atol=1e-3 * float(own.abs().max())):
            raise ModelError(
                f"{what}: the logits behind its own preprocessing differ by {float((ours - own).abs().max()):.3g} from "
                "those with mean and std inside the module. Load it in a function of your own: --model "
                "package.module:function."
            )
