"""How a model is spread over the ranks: a copy on each (DDP), or in shards, gradients and optimizer too (FSDP2).

A checkpoint holds whole tensors in either case, so that it goes on in the other one and on any number of ranks.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from mae_dat.config.errors import ConfigError
from mae_dat.runtime.device import cpu_has_amx, require_compiler
from mae_dat.runtime.world import World

SMALL = 0.02  # of all parameters: what is smaller is gathered with the rest, not by itself


def shard(model: nn.Module, world: World, device: torch.device) -> None:
    """Shards a model over the ranks, in place and block by block. Build the optimizer afterwards, copies before."""
    mesh = init_device_mesh(device.type, (world.size,))
    for block in blocks_of(model):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The parts to gather one at a time: a transformer's blocks, or else the large children of the network."""
    lists = [
        child
        for name, child in model.named_modules()
        if name.rpartition(".")[2].endswith("blocks") and isinstance(child, nn.Sequential | nn.ModuleList)
    ]
    if lists:
        return [block for one in lists for block in one]
    return _large_children(getattr(model, "net", model), SMALL * _size(model))


def _large_children(model: nn.Module, least: float) -> list[nn.Module]:
    found = []
    for child in model.children():
        if isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            found += _large_children(child, least)
        elif _size(child) >= least:
            found.append(child)
    return found


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` was called on it: its forward pass is then collective."""
    return isinstance(model, FSDPModule)


def wrap(model: nn.Module, world: World, device: torch.device) -> nn.Module:
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


def choose_attention(model: nn.Module, device: torch.device, precision: torch.dtype | None) -> None:
    """Takes softmax(q k^T) v step by step, in place of torch's fused attention, where that trains faster.

    In bfloat16 on a CPU without matrix units a layer takes 1.2 to 2.7 times as long with the fused kernel, at 50 to
    1,025 tokens (`python -m benchmarks --only attention`); in float32 steps gain nothing. GPUs, and CPUs with matrix
    units, where that was not measured, keep the fused one. Both round as bfloat16 does.
    """
    if device.type == "cpu" and precision is torch.bfloat16 and not cpu_has_amx():
        for module in model.modules():
            if hasattr(module, "fused_attn"):  # of all attention layers of timm
                module.fused_attn = False  # type: ignore[assignment]


def compile_blocks(model: nn.Module) -> None:
    """torch.compile for each of the model's blocks, in place; its keys stay as they are.

    Not for the whole model: that would take longer to compile, and hand over the gradients only when all are ready.
    Raises ConfigError without a C++ compiler.
    """
    require_compiler("--compile")
    blocks = blocks_of(model)
    # Each rate of drop path is another program, and each is compiled for training, evaluation and the attack.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile(options={"fallback_random": True})  # drop path draws as without compilation


def checkpoint_blocks(model: nn.Module) -> None:
    """Lets each block keep only its input for the backward pass, which computes the rest once more; in place, keys stay
    as they are. Raises ConfigError where that would count a batch twice."""
    blocks = blocks_of(model)
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for block in blocks for part in block.modules()):
        raise ConfigError("--checkpoint_activations would let BatchNorm see every batch twice: leave it out.")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


@contextlib.contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
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


def clip_gradient(model: nn.Module, limit: float | None) -> Tensor:
    """Scales the gradient to a norm of at most `limit` (None: leaves it); returns the norm from before, over all
    shards, a scalar on the device."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def update_average(ema: Any, model: nn.Module, step: int, spoiled: Tensor) -> None:
    """timm's ModelEmaV3.update, also on shards; the average of the weights stays as it is where `spoiled`, a scalar on
    the device, is 1."""
    weight = (1.0 - ema.get_decay(step)) * (1.0 - spoiled)
    for mean, value in zip(ema.module.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            _local(mean).lerp_(_local(value), weight.to(mean.dtype))
        else:
            mean.copy_(value)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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


def load_model(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads a whole state dict, the same on all ranks, into a model or its shards. Raises RuntimeError if it does not
    fit."""
    own = model.state_dict()
    model.load_state_dict({name: _as(value, own.get(name)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
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
