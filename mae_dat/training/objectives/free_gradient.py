"""A loss and its gradient at the image from one backward pass ("free" adversarial training)."""

from typing import Any

import torch
from torch import Tensor, nn

from mae_dat.attacks.gradient import LossFn


def loss_and_gradient(loss_fn: LossFn, image: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a scalar loss and its float32 gradient at the image (B, C, H, W), from one backward pass.

    The same pass computes the gradients of the model's parameters. They are stored in the returned loss and released
    when the sum that it is part of is differentiated, so DDP, accumulation and the optimizer see one ordinary backward
    pass. Not for sharded models.
    """
    image = image.detach().requires_grad_()
    loss = loss_fn(image)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.autocast(image.device.type, enabled=False):  # as in the training loop's own backward pass
        gradient, *weight_gradients = torch.autograd.grad(loss, [image, *weights])
    differentiated_loss: Tensor = _StoredGradient.apply(loss.detach(), weight_gradients, *weights)
    return differentiated_loss, gradient.float()


class _StoredGradient(torch.autograd.Function):
    """(loss, its gradients at the weights, the weights) -> loss, whose backward pass returns the stored gradients."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        return (None, None, *(factor * gradient for gradient in ctx.saved_tensors))
