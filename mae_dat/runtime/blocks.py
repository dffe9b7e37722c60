"""The repeated blocks of a model, and how they compute: compiled, with recomputed activations, with plain attention."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mae_dat.config.errors import ConfigError
from mae_dat.runtime.device import cpu_has_amx, require_compiler

_SMALL = 0.02  # of all parameters: what is smaller is gathered with the rest, not by itself


def model_blocks(model: nn.Module) -> list[nn.Module]:
    """The parts to gather one at a time: a transformer's blocks, or else the large children of the network."""
    lists = [
        child
        for name, child in model.named_modules()
        if name.rpartition(".")[2].endswith("blocks") and isinstance(child, nn.Sequential | nn.ModuleList)
    ]
    if lists:
        return [block for one in lists for block in one]
    return _large_children(getattr(model, "net", model), _SMALL * _size(model))


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
    blocks = model_blocks(model)
    # Each rate of drop path is another program, and each is compiled for training, evaluation and the attack.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile(options={"fallback_random": True})  # drop path draws as without compilation


def checkpoint_blocks(model: nn.Module) -> None:
    """Lets each block keep only its input for the backward pass, which computes the rest once more; in place, keys stay
    as they are. Raises ConfigError where that would count a batch twice."""
    blocks = model_blocks(model)
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for block in blocks for part in block.modules()):
        raise ConfigError("--checkpoint_activations would let BatchNorm see every batch twice: leave it out.")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
