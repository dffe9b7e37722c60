"""Modes of a model: evaluation, frozen weights, autocast; each restores what it found."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every submodule's training flag is as before after it."""
    flags = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags.items():
            module.training = flag


Network = Callable[[Tensor], Tensor]
"""Float (B, 3, H, W) in [0, 1] to logits (B, K)."""


def autocast(device: torch.device, precision: torch.dtype | None) -> torch.autocast:
    """A block in that precision; None is float32."""
    return torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None)


@contextmanager
def eval_mode(networks: Mapping[str, Network]) -> Iterator[None]:
    """Networks that are modules in evaluation mode; every flag is put back, also after an error."""
    modules = [network for network in networks.values() if isinstance(network, nn.Module)]
    flags = [(part, part.training) for module in modules for part in module.modules()]
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, flag in flags:
            part.training = flag


def unwrapped(model: nn.Module) -> Any:
    """The module inside DistributedDataParallel, or the model itself."""
    return getattr(model, "module", model)


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """The model's parameters without gradients: a compiled model would compute them for an attack too, and any model
    keeps its activations for them. Shards stay as they are: they take the flag over when they are first gathered."""
    weights = [one for one in model.parameters() if one.requires_grad and not isinstance(one, DTensor)]
    try:
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        for weight in weights:
            weight.requires_grad_(True)
