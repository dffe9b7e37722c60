"""Learning rates and optimizers with parameter groups: layer-wise decay and weight decay as in MAE's recipes."""

import logging
import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mae_dat.config.errors import ConfigError
from mae_dat.models.classifier import Classifier

logger = logging.getLogger(__name__)

FUSED_DEVICES = {"cpu", "cuda"}
MOMENTUM = 0.9
_STEM = ("cls_token", "pos_embed", "reg_token", "patch_embed.", "norm_pre.")


def effective_lr(lr: float | None, blr: float, effective_batch: int) -> float:
    """Return the absolute learning rate: `lr` where given, else blr * effective batch / 256 (linear scaling)."""
    return blr * effective_batch / 256 if lr is None else lr


def learning_rate(
    epoch: float,
    lr: float,
    min_lr: float,
    warmup_epochs: float,
    epochs: float,
    warmup_lr: float = 0.0,
    schedule: Literal["iteration", "epoch"] = "iteration",
) -> float:
    """Return the rate at a fractional epoch: linear from `warmup_lr` to `lr`, then half a cosine to `min_lr`.

    It stays at `min_lr` past the end, and is `lr` at the end of a run that is all warm-up. With the schedule `epoch` it
    is constant within an epoch, and the cosine counts the warm-up's epochs too, as in timm's `CosineLRScheduler`.
    """
    if schedule == "epoch":
        epoch = math.floor(epoch)
    if epoch < warmup_epochs:
        return warmup_lr + (lr - warmup_lr) * epoch / warmup_epochs
    if epochs <= warmup_epochs:
        return lr
    start = 0.0 if schedule == "epoch" else warmup_epochs
    progress = min(1.0, (epoch - start) / (epochs - start))
    return min_lr + (lr - min_lr) * 0.5 * (1.0 + math.cos(math.pi * progress))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's rate to `lr` times its `lr_scale`; torch's own schedulers ignore the scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


class Lars(torch.optim.Optimizer):
    """SGD with momentum whose step is scaled for each tensor (You et al. 2017, arXiv 1708.03888), as MAE probes.

    For tensors of two dimensions and more: update = (g + wd * p) * `trust` * |p| / |g + wd * p|, unscaled where either
    norm is 0; vectors are neither decayed nor scaled. Then m = momentum * m + update and p = p - lr * m.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, trust: float = 0.001) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": MOMENTUM, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update the parameters, except where `found_inf` is 1, as in torch's fused optimizers; `closure` is not
        called."""
        for group in self.param_groups:
            for parameter in (p for p in group["params"] if p.grad is not None):
                update = parameter.grad
                if parameter.ndim > 1:
                    update = update + group["weight_decay"] * parameter
                    size, length = parameter.norm(), update.norm()
                    update = update * torch.where((size > 0) & (length > 0), group["trust"] * size / length, 1.0)
                state = self.state[parameter]
                before = state.get("momentum_buffer", torch.zeros_like(update))
                state["momentum_buffer"] = momentum = self._unless_skipped(before, group["momentum"] * before + update)
                parameter.copy_(self._unless_skipped(parameter, parameter.sub(momentum, alpha=group["lr"])))

    def _unless_skipped(self, before: Tensor, after: Tensor) -> Tensor:
        skip: Tensor | None = getattr(self, "found_inf", None)
        return after if skip is None else torch.where(skip > 0, before, after)


def step_optimizer(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Update the parameters, except where `skip`, a scalar on the device, is 1.

    The host waits for `skip` only where the optimizer is neither fused nor Lars.
    """
    if isinstance(optimizer, Lars) or all(group.get("fused") for group in optimizer.param_groups):
        optimizer.found_inf = skip  # type: ignore[attr-defined]
        optimizer.step()
    elif not skip:
        optimizer.step()


def build_optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    layer_decay: float | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    opt: str = "adamw",
) -> torch.optim.Optimizer:
    """AdamW (or `lars`, or `sgd` with Nesterov momentum) over the trainable parameters, fused where it can be.
    Each group carries `lr_scale`.

    `layer_decay` in (0, 1] scales the rate of a transformer's layers by decay^(depth + 1 - layer); None is 1. Call
    `set_lr` in every step. ConfigError for a decay outside, or a model without trainable parameters.
    """
    groups = parameter_groups(model, weight_decay, layer_decay)
    if not groups:
        raise ConfigError("the model has no trainable parameter: nothing to optimize")
    tensors = [tensor for group in groups for _, tensor in group["params"]]
    fused = all(t.device.type in FUSED_DEVICES and t.is_floating_point() for t in tensors) or None
    optimizer: torch.optim.Optimizer
    if opt == "lars":
        optimizer = Lars(groups, lr, weight_decay)
    elif opt == "sgd":
        optimizer = torch.optim.SGD(
            groups, lr, momentum=MOMENTUM, weight_decay=weight_decay, nesterov=True, fused=fused
        )
    else:
        optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, weight_decay=weight_decay, fused=fused)
    set_lr(optimizer, lr)
    return optimizer


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
    """Return groups of (name, parameter) with `lr_scale` and `weight_decay`, in the order of their first parameter.

    Weight decay spares one-dimensional parameters and those that the model names in `no_weight_decay()`: a timm
    transformer's pos_embed and cls_token, so they are spared in fine-tuning and cls_token is decayed in pretraining.
    """
    net = inner_module(model)
    scales = _layer_scales(net, layer_decay)
    spared: Iterable[str] = getattr(net, "no_weight_decay", tuple)()
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in net.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = 0.0 if parameter.ndim <= 1 or any(fnmatch(name, rule) for rule in spared) else weight_decay
        scale = scales.get(name, 1.0)
        group = groups.setdefault((scale, decay), {"lr_scale": scale, "weight_decay": decay, "params": []})
        group["params"].append((name, parameter))
    return list(groups.values())


def inner_module(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel, torch.compile and `Classifier`; its keys have no prefix."""
    while True:
        if isinstance(model, Classifier):
            model = model.net
        elif isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _layer_scales(net: nn.Module, layer_decay: float | None) -> Mapping[str, float]:
    """Parameter name -> scale of its learning rate; what is not named has 1."""
    if layer_decay is None or layer_decay == 1.0:
        return {}
    if not 0.0 < layer_decay < 1.0:
        raise ConfigError(f"layer decay {layer_decay}: give a number above 0 and at most 1")
    names = [name for name, _ in net.named_parameters()]
    if isinstance(net, VisionTransformer):
        return vit_layer_scales(names, len(net.blocks), layer_decay)
    if hasattr(net, "transformer_inside"):  # a detector, whose other parts have a scale of 1
        if (found := net.transformer_inside()) is None:  # type: ignore[operator]
            return {}
        prefix, transformer = found
        names = [name for name, _ in transformer.named_parameters()]
        scales = vit_layer_scales(names, len(transformer.blocks), layer_decay)
        return {f"{prefix}.{name}": scale for name, scale in scales.items()}
    if hasattr(net, "group_matcher"):
        return _timm_layer_scales(net, layer_decay)
    logger.warning("%s has no layers known to the layer decay: %s is not used", type(net).__name__, layer_decay)
    return {}


def vit_layer_scales(names: Iterable[str], depth: int, layer_decay: float) -> dict[str, float]:
    """decay^(depth + 1 - i), with i = 0 for class token, position and patch embedding, k + 1 for block k.

    The rest (the last norm, the head) has 1. timm's grouping puts a final `norm` with the last block, MAE's does not.
    """

    def layer(name: str) -> int:
        if name.startswith(_STEM):
            return 0
        return int(name.split(".")[1]) + 1 if name.startswith("blocks.") else depth + 1

    return {name: layer_decay ** (depth + 1 - layer(name)) for name in names}


def _timm_layer_scales(net: nn.Module, layer_decay: float) -> dict[str, float]:
    """Other timm models: the layers of timm's own group matcher."""
    scale_of: dict[int, float] = {}
    for group in param_groups_layer_decay(net, weight_decay=0.0, layer_decay=layer_decay):
        scale_of.update({id(parameter): group["lr_scale"] for parameter in group["params"]})
    return {name: scale_of[id(p)] for name, p in net.named_parameters() if id(p) in scale_of}


def clip_gradient(model: nn.Module, limit: float | None) -> Tensor:
    """Scale the gradient to a norm of at most `limit` (None: no limit); return the norm before, over all shards, a
    scalar on the device."""
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    if limit is not None:
        nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def update_average(ema: Any, model: nn.Module, step: int, skip_update: Tensor) -> None:
    """Update the average of the weights as timm's ModelEmaV3.update does, also on shards, except where `skip_update`, a
    scalar on the device, is 1."""
    weight = (1.0 - ema.get_decay(step)) * (1.0 - skip_update)
    for mean, value in zip(ema.module.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            _local(mean).lerp_(_local(value), weight.to(mean.dtype))
        else:
            mean.copy_(value)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
