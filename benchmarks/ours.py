"""Our side of the training cases: a step as the engine does it, on random pictures."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mae_dat.data import Batch
from mae_dat.distributed import amp_dtype
from mae_dat.objectives import Objective
from mae_dat.optim import build_optimizer
from mae_dat.parallel import choose_attention

CLASSES = 1000


def make_batch(size: int, side: int, device: torch.device, classes: int = CLASSES) -> Batch:
    """Random pictures in [0, 1] with labels."""
    label = torch.randint(0, classes, (size,), device=device)
    index = torch.arange(size, device=device)
    return Batch(image=torch.rand(size, 3, side, side, device=device), label=label, index=index, skipped=0 * index)


def training_step(model: nn.Module, objective: Objective, batch: Batch, device: torch.device) -> Callable[[], Tensor]:
    """Forward, backward and update in the precision that `--precision auto` chooses; the step returns its loss."""
    precision = amp_dtype("auto", device)
    choose_attention(model, device, precision)
    optimizer = build_optimizer(model, 1e-4, 0.05, betas=(0.9, 0.95))
    generator = torch.Generator(device).manual_seed(0)

    def step() -> Tensor:
        with torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None):
            loss = objective(model, batch, generator)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step
