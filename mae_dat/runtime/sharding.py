"""Distribution of a model over ranks: copies (DDP), or shards of weights, gradients and optimizer state (FSDP2).

A checkpoint contains full tensors in both cases, so that a run can resume in the other form and on any number of ranks.
torch.distributed.checkpoint.state_dict is not used, for three reasons: it names an optimizer's parameters instead of
numbering them, so that older checkpoints would no longer load; it takes a step to create missing optimizer state; and
it copies the tensors of an unsharded model, which the checkpoint writer copies later and only if they change.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mae_dat.runtime.blocks import model_blocks
from mae_dat.runtime.world import World


def shard_model(model: nn.Module, world: World, device: torch.device) -> None:
    """Shard a model over the ranks, in place and block by block.

    Copy the model before, and build its optimizer afterwards.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    for block in model_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Return whether `shard_model` was called on a model, so that its forward pass is collective."""
    return isinstance(model, FSDPModule)


def wrap_model(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """Return the module that the training loop calls: the model in DistributedDataParallel, or the model itself if
    there is a single rank or the model is sharded."""
    if world.size == 1 or is_sharded(model):
        return model
    with warnings.catch_warnings():
        # The new name of `broadcast_buffers` is unknown to the older releases that we support.
        warnings.simplefilter("ignore", FutureWarning)
        ids = [device.index] if device.type == "cuda" else None
        ddp_model = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
    _rebuild_buckets(ddp_model)
    return ddp_model


def _rebuild_buckets(model: DistributedDataParallel) -> None:
    """Let DDP arrange its buckets now, by a backward pass with a gradient of zero.

    DDP rearranges them once, after the first backward pass. With three ranks or more, the order of the terms of a sum,
    and so its last bit, depends on the position in a bucket. Without this call, the first step of a resumed run would
    differ from the same step of an uninterrupted run.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.reducer.prepare_for_backward([])
    torch.stack([(0 * parameter).sum() for parameter in parameters]).sum().backward()
    model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def no_gradient_sync(model: nn.Module) -> Iterator[None]:
    """Keep the gradients of backward passes inside the block on this rank; the next one outside reduces their sum."""
    if isinstance(model, DistributedDataParallel):
        with model.no_sync():
            yield
    elif isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        yield


# ---- full states ----


def full_state_dict(state: Any) -> Any:
    """Return a state dict with full tensors instead of shards on rank 0, and with None in their place on other ranks.
    Collective if there are shards.

    Includes nested mappings and lists. Tensors that are not sharded are returned unchanged, without a copy.
    """
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.detach().cpu() if dist.get_rank() == 0 else None
    if isinstance(state, Mapping):
        return {key: full_state_dict(value) for key, value in state.items()}
    if isinstance(state, list):
        return [full_state_dict(value) for value in state]
    return state


def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load a full state dict, the same on all ranks, into a model, sharded or not.

    Raises RuntimeError if keys or shapes do not match.
    """
    current = model.state_dict()
    model.load_state_dict({name: _sharded_like(value, current.get(name)) for name, value in state.items()})


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load a full state dict, the same on all ranks, into an optimizer, sharded or not.

    Raises ValueError if the parameter groups do not match.
    """
    parameters = dict(enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]))
    shards = {
        number: {key: _sharded_like(value, parameters.get(number)) for key, value in values.items()}
        for number, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shards})


def _sharded_like(value: Any, example: Tensor | None) -> Any:
    """Return a full tensor as shards if the example of the same shape is sharded; anything else as it is."""
    if not isinstance(example, DTensor) or not isinstance(value, Tensor) or value.shape != example.shape:
        return value
    value = value.to(example.device)
    return distribute_tensor(value, example.device_mesh, example.placements, src_data_rank=None)
