"""The gradient of a loss at the image, and the L2 geometry that attacks step in. Shapes: image (B, C, H, W)."""

from collections.abc import Callable

import torch
from torch import Tensor

LossFn = Callable[[Tensor], Tensor]


def require_pixels(image: Tensor) -> None:
    """Raises ValueError when pixels leave [0, 1] by more than 1e-6, or are not finite. Waits for the image."""
    low, high = image.detach().aminmax()
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise ValueError(
            f"the attack takes pixels in [0, 1], got [{low:.4g}, {high:.4g}]: leave the normalization to the model."
        )


def input_gradient(image: Tensor, loss_of: LossFn) -> Tensor:
    """dL/dimage in float32. Only the input's gradient is asked for: parameters keep theirs, and DDP sees nothing."""
    with torch.enable_grad():
        image = image.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss_of(image), image)
    return gradient.float()


def unit(x: Tensor) -> Tensor:
    """x / |x|_2 per sample."""
    return x / (_norm(x) + 1e-10)


def project(delta: Tensor, radius: float) -> Tensor:
    """Projects each sample's delta into the L2 ball: delta * min(1, radius / |delta|_2)."""
    return delta * (radius / (_norm(delta) + 1e-10)).clamp(max=1)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.ndim)), keepdim=True)
