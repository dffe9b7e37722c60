"""Classifiers on pixels in [0, 1]: the vision transformers that MAE fine-tunes, any timm model, and their weights.

A checkpoint is read without running code from it, and loaded only if every key is accounted for: what may be missing or
left over is what MAE's own fine-tuning allows (a new head; `norm` replaced by a new `fc_norm` under average pooling).
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_dat.errors import CheckpointError, ConfigError, MissingInputError
from mae_dat.mae import VIT_SIZES, ViTSize, check_image_size, layer_norm, pixel_statistics, unknown_name
from mae_dat.weights import bare_tensors, check_keys, listing, read_weights

logger = logging.getLogger(__name__)

Grid = tuple[int, int]
HEAD_STD = 2e-5  # MAE's fine-tuning starts from a head that is almost zero
_PRETRAINING_KEYS = ("decoder_", "mask_token")


class Classifier(nn.Module):
    """A network on normalised pictures, made a classifier of pixels in [0, 1]; state dict keys have the prefix `net.`.

    `mean` and `std` hold one value a channel; they are a setting, not weights, and stay out of the state dict.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ConfigError(f"mean {tuple(mean)} and std {tuple(std)}: give one value a channel, std above 0")
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, classes) of pictures (B, C, H, W) with pixels in [0, 1]."""
        return self.net((image - self.mean) / self.std)


@dataclass(frozen=True)
class LoadReport:
    """What a load did: its source, tensors loaded, keys that start afresh, keys left out, position grids if resized."""

    source: str
    loaded: int
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    resized: tuple[Grid, Grid] | None = None

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors from {self.source}"]
        if self.resized:
            parts.append(
                "position embedding resized from {} x {} to {} x {}".format(*self.resized[0], *self.resized[1])
            )
        if self.missing:
            parts.append(f"new: {listing(self.missing)}")
        if self.ignored:
            parts.append(f"not used: {listing(self.ignored)}")
        return "; ".join(parts)


def build_vit(
    size: ViTSize,
    num_classes: int,
    img_size: int | Grid | None = None,
    drop_path: float = 0.0,
    global_pool: bool = True,
    in_chans: int = 3,
) -> VisionTransformer:
    """MAE's fine-tuned form: mean of the patch tokens and `fc_norm` (global_pool), or `norm` and the class token.

    `img_size` is a side or (H, W), by default the size's own; pictures of another size divisible by the patch are
    taken too, with the position embedding resized. Weights start as timm's, but for a nearly zero head.
    """
    net = VisionTransformer(
        img_size=check_image_size(img_size or size.img_size, size.patch_size),
        patch_size=size.patch_size,
        in_chans=in_chans,
        num_classes=num_classes,
        global_pool="avg" if global_pool else "token",
        embed_dim=size.embed_dim,
        depth=size.depth,
        num_heads=size.num_heads,
        mlp_ratio=size.mlp_ratio,
        drop_path_rate=drop_path,
        dynamic_img_size=True,
        norm_layer=layer_norm,
    )
    assert isinstance(net.head, nn.Linear)
    nn.init.trunc_normal_(net.head.weight, std=HEAD_STD)
    nn.init.zeros_(net.head.bias)
    return net


def build_classifier(
    name: str,
    num_classes: int,
    img_size: int | Grid | None = None,
    drop_path: float = 0.0,
    global_pool: bool = True,
    in_chans: int = 3,
    pretrained: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """The classifier `name`: one of MAE's fine-tuning names (`VIT_SIZES`) or any timm model.

    MAE's models normalise by ImageNet's statistics (0.5 where channels are not 3), timm's by their own: MAE weights
    belong in `vit_base_patch16`, not in timm's `vit_base_patch16_224`. `mean` and `std` override both. `drop_path` and
    `img_size` reach timm models that take them; `global_pool` is for MAE's, `pretrained` (timm's weights) for timm's.
    ConfigError for an unknown name (with the nearest) or settings that do not fit.
    """
    if num_classes < 1:
        raise ConfigError(f"number of classes {num_classes}: give at least 1")
    if name in VIT_SIZES:
        if pretrained:
            raise ConfigError(
                f"{name} has no weights of its own: give a checkpoint instead, or use a timm model's name"
            )
        net: nn.Module = build_vit(VIT_SIZES[name], num_classes, img_size, drop_path, global_pool, in_chans)
        default_mean, default_std = pixel_statistics(in_chans)
    else:
        net = _build_timm(name, num_classes, img_size, drop_path, in_chans, pretrained)
        statistics = resolve_model_data_config(net)
        default_mean, default_std = (
            (statistics["mean"], statistics["std"]) if in_chans == 3 else pixel_statistics(in_chans)
        )
    return Classifier(net, mean or default_mean, std or default_std)


def _build_timm(
    name: str, num_classes: int, img_size: int | Grid | None, drop_path: float, in_chans: int, pretrained: bool
) -> nn.Module:
    if not timm.is_model(name):
        raise unknown_name("model", name, [*VIT_SIZES, *timm.list_models()])
    options: dict[str, Any] = {"drop_path_rate": drop_path}
    if img_size is not None:
        options["img_size"] = img_size
    try:
        net = _create_with_accepted(name, options, num_classes=num_classes, in_chans=in_chans, pretrained=pretrained)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise MissingInputError(
            f"weights of {name} cannot be had: {error}. Check the network, or give a file downloaded before"
        ) from error
    patch_size = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    if img_size is not None and patch_size is not None:
        check_image_size(img_size, max(patch_size))
    return net


def _create_with_accepted(name: str, options: dict[str, Any], **always: Any) -> nn.Module:
    """timm offers no way to ask which options a model takes: drop those that its constructor names in a TypeError."""
    while True:
        try:
            return timm.create_model(name, **options, **always)
        except TypeError as error:
            refused = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if refused is None or refused[1] not in options:
                raise
            # A network without img_size takes pictures of any size; one without drop path trains otherwise than asked.
            if (value := options.pop(refused[1])) and refused[1] == "drop_path_rate":
                logger.warning("%s has no drop path: drop_path %s is not used", name, value)


def resize_position_embedding(pos_embed: Tensor, old: Grid, new: Grid, prefix: int = 1) -> Tensor:
    """(1, prefix + h*w, D) from the grid `old` to the grid `new` = (h, w); the `prefix` class tokens stay the same."""
    tokens, patches = pos_embed[:, :prefix], pos_embed[:, prefix:]
    grid = patches.reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False)
    return torch.cat([tokens, grid.permute(0, 2, 3, 1).flatten(1, 2).to(tokens.dtype)], dim=1)


def load_pretrained(
    classifier: Classifier, source: str | Path | Mapping[str, Any], source_grid: Grid | None = None
) -> LoadReport:
    """Start fine-tuning from a file, a checkpoint or a state dict: MAE pretraining or a fine-tuned model, as MAE does.

    The decoder is dropped; head and `fc_norm` may be missing and `norm` left over; a head of another shape starts anew;
    the position embedding is resized where the grid differs (`source_grid` = (rows, columns) is needed only where the
    source's is not square). CheckpointError lists every other key that is missing, left over or of another shape.
    """
    return _load(classifier, source, source_grid, head=False)


def load_weights(
    classifier: Classifier, source: str | Path | Mapping[str, Any], source_grid: Grid | None = None, head: bool = True
) -> LoadReport:
    """Load a fine-tuned model, for evaluation: every key must match, the head's number of classes too.

    With `head` False the same as `load_pretrained`. CheckpointError names both numbers of classes, or the keys.
    """
    return _load(classifier, source, source_grid, head)


def _load(
    classifier: Classifier, source: str | Path | Mapping[str, Any], source_grid: Grid | None, head: bool
) -> LoadReport:
    if isinstance(source, Mapping):
        label, state = "the given weights", bare_tensors(source, "the given weights")
    else:
        label, state = str(source), read_weights(source).tensors
    net = classifier.net
    own = net.state_dict()
    ignored = [key for key in state if key not in own and key.startswith(_PRETRAINING_KEYS)]
    resized = _fit_position_embedding(state, net, source_grid, label)
    own_head = [key for key in own if key.startswith(_head_prefixes(net))]
    if head:
        _check_head(state, own, own_head, label)
    elif any(key in state and state[key].shape != own[key].shape for key in own_head):
        ignored += [key for key in own_head if key in state]
    state = {key: value for key, value in state.items() if key not in set(ignored)}
    new, left = ([], []) if head else _expected_differences(state, own, own_head)
    state = {key: value for key, value in state.items() if key not in left}
    advice = "choose the model (and the pooling, --global_pool or --cls_token) that the file was written for"
    check_keys(label, {key: value for key, value in own.items() if key not in new}, state, advice)
    net.load_state_dict(state, strict=False)
    report = LoadReport(label, len(state), tuple(new), tuple(ignored + left), resized)
    logger.info("%s", report)
    return report


def _head_prefixes(net: nn.Module) -> tuple[str, ...]:
    names = getattr(net, "pretrained_cfg", None) or {}
    names = names.get("classifier") or "head"
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _check_head(state: Mapping[str, Tensor], own: Mapping[str, Tensor], own_head: list[str], label: str) -> None:
    weight = next((key for key in own_head if key.endswith("weight")), None)
    if weight is None:
        return
    if weight not in state:
        raise CheckpointError(f"{label} has no classification head ({weight}): fine-tune from it before evaluating it")
    theirs, ours = state[weight].shape[0], own[weight].shape[0]
    if theirs != ours:
        raise CheckpointError(
            f"{label} classifies {theirs} classes, the data or the setting has {ours}: use {theirs} classes, "
            "or fine-tune from the checkpoint to get a new head"
        )


def _expected_differences(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], own_head: list[str]
) -> tuple[list[str], list[str]]:
    """Keys that may start afresh (a whole head, a whole `fc_norm`) and keys that may be left over (its `norm`)."""
    own_norm = [key for key in own if key.startswith("fc_norm.")]
    new = [key for part in (own_norm, own_head) if not any(key in state for key in part) for key in part]
    replaced = bool(own_norm) and own_norm[0] in new
    return new, [key for key in state if replaced and key.startswith("norm.") and key not in own]


def _fit_position_embedding(
    state: dict[str, Tensor], net: nn.Module, source_grid: Grid | None, label: str
) -> tuple[Grid, Grid] | None:
    """Resize state["pos_embed"] where the grid differs, and return both grids; None where nothing was to do."""
    ours, theirs = getattr(net, "pos_embed", None), state.get("pos_embed")
    if not isinstance(net, VisionTransformer) or ours is None or theirs is None or theirs.shape[-1] != ours.shape[-1]:
        return None
    new: Grid = tuple(net.patch_embed.grid_size)
    prefix = 0 if net.no_embed_class else net.num_prefix_tokens
    patches = theirs.shape[1] - prefix
    if source_grid is None and theirs.shape == ours.shape:
        return None
    side = math.isqrt(max(patches, 0))
    old = source_grid or (side, side)
    if old[0] * old[1] != patches:
        raise CheckpointError(
            f"{label} has a position embedding for {patches} patches, not {old[0]} x {old[1]}: "
            "give its rows and columns of patches as source_grid"
        )
    if old == new:
        return None
    state["pos_embed"] = resize_position_embedding(theirs, old, new, prefix)
    return old, new
