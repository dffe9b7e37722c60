"""The gradient of an adversary: of a loss at the image, and the L2 steps and balls that attacks build from it.

All attacks take their gradient here (`input_gradient`), with two exceptions. The symbolic attack needs it at the codes
(`symbolic.code_gradient`). A free attack gets it from the backward pass of the clean loss
(`training/objectives/free_gradient.py`). Shapes: image (B, C, H, W), pixels in [0, 1].
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LossFn = Callable[[Tensor], Tensor]
"""Maps images (B, C, H, W) to a scalar loss; a closure over the targets, the mask or the boxes."""


@dataclass(frozen=True)
class LossPerImage:
    """A loss function (the sum over the batch) that also gives each image's own loss."""

    each: Callable[[Tensor], Tensor]
    """Maps images (B, C, H, W) to losses (B,)."""

    def __call__(self, image: Tensor) -> Tensor:
        """Return the sum of the losses of images (B, C, H, W), a scalar."""
        return self.each(image).sum()


def input_gradient(image: Tensor, loss_fn: LossFn) -> Tensor:
    """Compute dL/dimage, float32 of the image's shape.

    Only the image requires a gradient: parameters keep their `.grad`, and DDP's hooks do not run.
    """
    with torch.enable_grad():
        image = image.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_fn(image), image)
    return gradient.float()


def require_pixels(image: Tensor) -> None:
    """Raise ValueError if pixels leave [0, 1] by more than 1e-6 or are not finite. Synchronizes with the device."""
    low, high = image.detach().aminmax()
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise ValueError(
            f"the attack takes pixels in [0, 1], got [{low:.4g}, {high:.4g}]: normalize inside the model, for example "
            "with mae_dat.Classifier(model, mean, std)."
        )


def unit(x: Tensor) -> Tensor:
    """Return x / |x|_2 per sample, x of any shape (B, ...)."""
    return x / (_norm(x) + 1e-10)


def project(delta: Tensor, radius: float) -> Tensor:
    """Project each sample of delta (B, ...) into the L2 ball: delta * min(1, radius / |delta|_2)."""
    return delta * (radius / (_norm(delta) + 1e-10)).clamp(max=1)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
