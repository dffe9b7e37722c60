"""Modes of a model: evaluation, frozen parameters, precision. Every context manager restores what it changes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

Network = Callable[[Tensor], Tensor]
"""Float images (B, C, H, W) in [0, 1] to logits (B, K)."""


def autocast(device: torch.device, precision: torch.dtype | None) -> torch.autocast:
    """Return the context manager in which operations compute in `precision`; None is float32."""
    # torch.autocast requires a 16-bit type even where it is disabled.
    return torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None)


@contextlib.contextmanager
def restore_training_flags(*models: object) -> Iterator[None]:
    """Restore every submodule's training flag after the block, also after an error.

    Flags are restored one by one: `model.train()` would also switch parts that were in evaluation mode before, such as
    a frozen BatchNorm. Arguments that are not an `nn.Module` are ignored.
    """
    flags = {part: part.training for model in models if isinstance(model, nn.Module) for part in model.modules()}
    try:
        yield
    finally:
        for part, flag in flags.items():
            part.training = flag


@contextlib.contextmanager
def evaluation_mode(*models: object) -> Iterator[None]:
    """Put models into evaluation mode inside the block (see `restore_training_flags`)."""
    with restore_training_flags(*models):
        for model in models:
            if isinstance(model, nn.Module):
                model.eval()
        yield


@contextlib.contextmanager
def frozen_parameters(model: nn.Module) -> Iterator[None]:
    """Exclude the model's parameters from gradients inside the block.

    An attack needs only the gradient of the image. A compiled model would also compute those of its parameters, and any
    model would keep activations for them.
    """
    # The flag of sharded parameters (FSDP) stays: the full parameters copy it when they are first gathered.
    parameters = [
        parameter for parameter in model.parameters() if parameter.requires_grad and not isinstance(parameter, DTensor)
    ]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def unwrap_ddp(model: nn.Module) -> Any:
    """Return the module inside DistributedDataParallel or DataParallel, also a compiled one, or the model itself."""
    inner = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    return inner.module if isinstance(inner, DistributedDataParallel | nn.DataParallel) else model
