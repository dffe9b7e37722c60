"""How a model is spread over the ranks: a copy on each (DDP), or in shards, gradients and optimizer too (FSDP2).

A checkpoint holds whole tensors in either case, so that it goes on in the other one and on any number of ranks.
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
    """Shards a model over the ranks, in place and block by block. Build the optimizer afterwards, copies before."""
    mesh = init_device_mesh(device.type, (world.size,))
    for block in model_blocks(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_model` was called on it: its forward pass is then collective."""
    return isinstance(model, FSDPModule)


def wrap_model(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """What the training loop calls: the model itself alone or in shards, otherwise DistributedDataParallel."""
    if world.size == 1 or is_sharded(model):
        return model
    with warnings.catch_warnings():
        # The new name of `broadcast_buffers` is unknown to the older releases that we support.
        warnings.simplefilter("ignore", FutureWarning)
        ids = [device.index] if device.type == "cuda" else None
        spread = DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
    _settle(spread)
    return spread


def _settle(model: DistributedDataParallel) -> None:
    """Lets DDP arrange its buckets now, by a pass that has no gradient.

    It does so once, after the first backward pass. From three ranks on a sum's order of terms, and so its last bit,
    depends on the place in a bucket: without this the first step of a resumed run would differ from the same step of
    one that went through.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.reducer.prepare_for_backward([])
    torch.stack([(0 * parameter).sum() for parameter in parameters]).sum().backward()
    model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def no_gradient_sync(model: nn.Module) -> Iterator[None]:
    """Backward passes inside keep their gradients to themselves, for one outside to reduce them all."""
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


# ---- whole states ----


def full_state_dict(state: Any) -> Any:
    """A state dict with whole tensors in rank 0's memory instead of shards, and None on the others. Collective for
    shards.

    Tensors that are no shards are given as they are.
    """
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.detach().cpu() if dist.get_rank() == 0 else None
    if isinstance(state, Mapping):
        return {key: full_state_dict(value) for key, value in state.items()}
    if isinstance(state, list):
        return [full_state_dict(value) for value in state]
    return state


def load_model_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a whole state dict, the same on all ranks, into a model or its shards. Raises RuntimeError if it does not
    fit."""
    own = model.state_dict()
    model.load_state_dict({name: _as(value, own.get(name)) for name, value in state.items()})


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Loads a whole state dict into an optimizer of parameters or of shards. Raises ValueError if it does not fit."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shards = {
        number: {
            key: _as(value, parameters[number] if number < len(parameters) else None) for key, value in one.items()
        }
        for number, one in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": shards})


def _as(value: Any, example: Tensor | None) -> Any:
    """A tensor in shards like those of the example, if that has any."""
    if not isinstance(example, DTensor) or not isinstance(value, Tensor) or value.shape != example.shape:
        return value
    value = value.to(example.device)
    return distribute_tensor(value, example.device_mesh, example.placements, src_data_rank=None)


# ---- evaluating together ----
