"""The blocks of a model: compilation, activation checkpointing, and the choice of the attention kernel."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mae_dat.config.errors import ConfigError
from mae_dat.runtime.device import cpu_has_amx, require_compiler

_SMALL_SHARE = 0.02  # of all parameters; a smaller child is not a block


def model_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a transformer; for other models, the children that hold 2 % or more of the parameters."""
    lists = [
        child
        for name, child in model.named_modules()
        if name.rpartition(".")[2].endswith("blocks") and isinstance(child, nn.Sequential | nn.ModuleList)
    ]
    if lists:
        return [block for blocks in lists for block in blocks]
    return _large_children(getattr(model, "net", model), _SMALL_SHARE * _parameter_count(model))


def _large_children(model: nn.Module, min_parameters: float) -> list[nn.Module]:
    """Return the children of at least that size; containers are searched, since they have no forward pass to wrap."""
    children = []
    for child in model.children():
        if isinstance(child, nn.Sequential | nn.ModuleList | nn.ModuleDict):
            children += _large_children(child, min_parameters)
        elif _parameter_count(child) >= min_parameters:
            children.append(child)
    return children


def _parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def choose_attention(model: nn.Module, device: torch.device, precision: torch.dtype | None) -> None:
    """Replace torch's fused attention by a plain softmax(q k^T) v if that trains faster; in place.

    In bfloat16 on a CPU without matrix units a layer takes 1.2 to 2.7 times as long with the fused kernel, at 50 to
    1,025 tokens (`python -m benchmarks --only attention`); in float32 the plain version is not faster. GPUs keep the
    fused kernel, and so do CPUs with matrix units, which were not measured. Both versions round as bfloat16 does.
    """
    if device.type == "cpu" and precision is torch.bfloat16 and not cpu_has_amx():
        for module in model.modules():
            if hasattr(module, "fused_attn"):  # every attention layer of timm has this flag
                module.fused_attn = False  # type: ignore[assignment]


def compile_blocks(model: nn.Module) -> None:
    """Compile each block of a model with torch.compile, in place; the keys of its state dict stay the same.

    Compiling the whole model would take longer, and its gradients would be ready only at the end of the backward pass,
    too late for DDP to reduce them meanwhile. Raises ConfigError without a C++ compiler.
    """
    require_compiler("--compile")
    blocks = model_blocks(model)
    # Each drop path rate needs its own program, compiled for training, evaluation and the attack.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile(options={"fallback_random": True})  # drop path draws as without compilation


def checkpoint_blocks(model: nn.Module) -> None:
    """Make each block keep only its input, and recompute its activations in the backward pass; in place. The keys of
    the state dict stay the same.

    Raises ConfigError for a model with BatchNorm, whose statistics would count every batch twice.
    """
    blocks = model_blocks(model)
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for block in blocks for part in block.modules()):
        raise ConfigError("--checkpoint_activations would make BatchNorm count every batch twice: remove the flag.")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
