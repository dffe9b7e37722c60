"""Classifiers on pixels in [0, 1]: the vision transformers that MAE fine-tunes, and any timm model."""

import logging
import re
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_dat.errors import ConfigError, MissingInputError
from mae_dat.mae import VIT_SIZES, ViTSize, check_image_size, layer_norm, pixel_statistics, unknown_name

logger = logging.getLogger(__name__)

Grid = tuple[int, int]
HEAD_STD = 2e-5  # MAE's fine-tuning starts from a head that is almost zero


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
