"""A loss and its gradient at the image from one backward pass."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def loss_and_gradient(loss_of: Callable[[Tensor], Tensor], image: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
    """A loss and its gradient at the image, from one backward pass that serves the model's parameters too.

    Their gradients wait in the loss, and are handed on when the sum that it is part of is differentiated: DDP,
    accumulation and the optimizer see one backward pass like any other. For a model that is not in shards.
    """
    image = image.detach().requires_grad_()
    loss = loss_of(image)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    with torch.autocast(image.device.type, enabled=False):  # as the engine's own backward pass
        gradient, *known = torch.autograd.grad(loss, [image, *weights])
    handed_on: Tensor = _KnownGradient.apply(loss.detach(), known, *weights)
    return handed_on, gradient.float()


class _KnownGradient(torch.autograd.Function):
    """(loss, its gradients at the weights, the weights) -> loss, whose backward pass hands those gradients on."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        return (None, None, *(factor * gradient for gradient in ctx.saved_tensors))
