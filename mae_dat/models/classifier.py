"""Classifiers on pixels in [0, 1]: the vision transformers that MAE fine-tunes, and any timm model."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Self

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import parse_model_name
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_dat.config.errors import ConfigError, MissingInputError, unknown_name
from mae_dat.config.groups import ImageSize
from mae_dat.models.mae import VIT_SIZES, ViTSize, check_image_size, layer_norm, pixel_statistics

logger = logging.getLogger(__name__)

PatchGrid = tuple[int, int]
"""Rows and columns of patches."""
HEAD_STD = 2e-5  # MAE starts fine-tuning from a head that is almost zero
PROBE_STD, PROBE_EPSILON = 0.01, 1e-6  # and a linear probe from these values of head and BatchNorm
FRESH_HEAD_STD = 0.01  # of a head on random weights (Goyal et al. 2017): LAMB and LARS would not move smaller ones
POOLS = ("cls", "mean", "tokens")


class Classifier(nn.Module):
    """A timm network that takes normalized images, as a classifier of pixels in [0, 1]; keys have the prefix `net.`.

    `mean` and `std` hold one value per channel; they are settings, not weights, and are not in the state dict.
    `classes` are the names of the outputs and `input_size` (height, width) in pixels, where they are known.

    Examples:
        >>> import mae_dat, timm, torch
        >>> net = timm.create_model("test_vit", num_classes=5)
        >>> model = mae_dat.Classifier(net, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)).eval()
        >>> images = torch.rand(2, 3, 160, 160)
        >>> model(images).shape, model.features(images).shape
        (torch.Size([2, 5]), torch.Size([2, 64]))
    """

    mean: Tensor
    std: Tensor
    classes: tuple[str, ...] | None = None
    """The names of the outputs, if known."""
    input_size: ImageSize | None = None
    """Height and width of its images in pixels, if known."""
    crop_pct: float | None = None
    """The crop's side over the resized image's in an evaluation; None for the default."""
    interpolation: str | None = None
    """The interpolation of resized images in an evaluation; None for that of timm's settings."""
    probing = False
    """Whether only a linear probe's head is trained (`make_linear_probe`)."""
    evaluates_frozen = False
    """Whether parts without a trained parameter stay in evaluation mode (`select_trained`)."""

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise ConfigError(f"mean {tuple(mean)} and std {tuple(std)}: give one value per channel, std above 0.")
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """Return logits (B, classes) of images (B, C, H, W) with pixels in [0, 1]."""
        return self.net((image - self.mean) / self.std)

    def features(self, image: Tensor, pool: str = "mean") -> Tensor:
        """Return the features before the head of images (B, C, H, W) with pixels in [0, 1]; D is the network's width.

        `cls`: the class token (B, D). `mean`: the mean over all positions (B, D). `tokens`: all positions in row-major
        order (B, N, D), without class token. Raises ConfigError for another pool, and for `cls` without a class token.
        """
        net: Any = self.net
        features = net.forward_features((image - self.mean) / self.std)
        if features.ndim == 3:  # tokens of a transformer
            pooled = pool_tokens(features, getattr(net, "num_prefix_tokens", 0), pool)
            return net.fc_norm(pooled) if hasattr(net, "fc_norm") else pooled
        if pool == "mean":
            return net.forward_head(features, pre_logits=True).flatten(1)
        if getattr(net, "output_fmt", "NCHW") != "NHWC":
            features = features.permute(0, 2, 3, 1)
        return pool_tokens(features.flatten(1, 2), 0, pool)

    def make_linear_probe(self) -> None:
        """Freeze the network and add a new head: BatchNorm without affine, then a linear layer (MAE, appendix A).

        Afterwards only the head is trained and in training mode. Raises ConfigError if the head is not a linear layer.
        """
        net: Any = self.net
        head = net.get_classifier()
        if not isinstance(head, nn.Linear):
            raise ConfigError(f"a linear probe needs a model with a linear head; {type(net).__name__} has {head}.")
        name = next(name for name, module in net.named_modules() if module is head)
        net.requires_grad_(False)
        linear = nn.Linear(head.in_features, head.out_features, device=head.weight.device)
        nn.init.trunc_normal_(linear.weight, std=PROBE_STD)
        nn.init.zeros_(linear.bias)
        norm = nn.BatchNorm1d(head.in_features, eps=PROBE_EPSILON, affine=False, device=head.weight.device)
        net.set_submodule(name, nn.Sequential(norm, linear))
        self.probing = True
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """Set training mode; for a linear probe only the head's, and with `evaluates_frozen` only what is trained."""
        super().train(mode)
        if mode and self.evaluates_frozen:
            _evaluate_frozen_parts(self.net)
        if self.probing:
            self.net.eval()
            self.net.get_classifier().train(mode)  # type: ignore[operator]
        return self


def _evaluate_frozen_parts(module: nn.Module) -> None:
    """Put the largest parts in evaluation mode that have parameters, none of which is trained."""
    parameters = list(module.parameters())
    if parameters and not any(parameter.requires_grad for parameter in parameters):
        module.eval()
        return
    for child in module.children():
        _evaluate_frozen_parts(child)


def pool_tokens(tokens: Tensor, prefix: int, pool: str) -> Tensor:
    """Pool tokens (B, prefix + N, D): the class token (B, D), the mean of the N patches (B, D), or these (B, N, D).

    Raises ConfigError for `cls` without a prefix, and for a pool that is not in POOLS.
    """
    if pool not in POOLS:
        raise ConfigError(f"unknown pool {pool!r}: use one of {', '.join(POOLS)}.")
    if pool != "cls":
        return tokens[:, prefix:].mean(1) if pool == "mean" else tokens[:, prefix:]
    if not prefix:
        raise ConfigError("this model has no class token: use the pool mean.")
    return tokens[:, 0]


def fused_head(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fuse the head of a linear probe, BatchNorm NAME.0 and linear NAME.1, into one linear layer NAME with equal output
    in evaluation mode.

    Other tensors stay the same.
    """
    fused = dict(state)
    names = [key.removesuffix(".0.running_mean") for key in state if key.endswith(".0.running_mean")]
    for name in names:
        weight = state.get(f"{name}.1.weight")
        if weight is None or weight.ndim != 2 or f"{name}.0.weight" in state:
            continue
        mean, variance = fused.pop(f"{name}.0.running_mean"), fused.pop(f"{name}.0.running_var")
        fused.pop(f"{name}.0.num_batches_tracked", None)
        weight = fused.pop(f"{name}.1.weight") / (variance + PROBE_EPSILON).sqrt()
        fused[f"{name}.weight"], fused[f"{name}.bias"] = weight, fused.pop(f"{name}.1.bias") - weight @ mean
    return fused


def build_vit(
    size: ViTSize,
    num_classes: int,
    img_size: int | ImageSize | None = None,
    drop_path: float = 0.0,
    global_pool: bool = True,
    in_chans: int = 3,
) -> VisionTransformer:
    """Build the transformer that MAE fine-tunes: mean of the patch tokens and `fc_norm` (global_pool), or `norm` and
    the class token.

    `img_size` is a side or (H, W), by default that of `size`; images of another size divisible by the patch are
    accepted too, with the position embedding resized. Weights start as timm's, except for a nearly zero head.
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
    initialize_head(net, HEAD_STD)
    return net


def initialize_head(net: nn.Module, std: float) -> None:
    """Initialize the last layer of a timm network's head, or of each of its heads, near zero: the first loss is then
    close to ln(classes).

    timm's own initialization of some networks, such as EfficientNet, gives logits of several units.
    """
    heads: Any = net.get_classifier()  # type: ignore[operator]
    for head in heads if isinstance(heads, tuple | list) else (heads,):
        layers = [layer for layer in head.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        if layers:
            nn.init.trunc_normal_(layers[-1].weight, std=std)
            if layers[-1].bias is not None:
                nn.init.zeros_(layers[-1].bias)


def build_classifier(  # noqa: PLR0913 - timm's arguments
    name: str,
    num_classes: int,
    img_size: int | ImageSize | None = None,
    drop_path: float = 0.0,
    global_pool: bool = True,
    in_chans: int = 3,
    pretrained: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Classifier:
    """Build the classifier `name`: one of MAE's fine-tuning names (`VIT_SIZES`) or any timm model.

    MAE's models normalize by ImageNet's statistics (0.5 if channels are not 3), timm's by their own: MAE weights
    belong in `vit_base_patch16`, not in timm's `vit_base_patch16_224`. `mean` and `std` override both. `drop_path` and
    `img_size` reach timm models that accept them; `global_pool` is for MAE's, `pretrained` (timm's weights) for timm's.
    A new head starts near zero. Raises ConfigError for an unknown name (with the nearest) or settings that do not fit.
    """
    if num_classes < 1:
        raise ConfigError(f"number of classes {num_classes}: give at least 1.")
    if name in VIT_SIZES:
        if pretrained:
            raise ConfigError(
                f"{name} has no pretrained weights in timm: load a checkpoint, or use the name of a timm model."
            )
        net: nn.Module = build_vit(
            VIT_SIZES[name], num_classes, img_size, drop_path=drop_path, global_pool=global_pool, in_chans=in_chans
        )
        default_mean, default_std = pixel_statistics(in_chans)
    else:
        net = build_timm(name, num_classes, img_size, drop_path=drop_path, in_chans=in_chans, pretrained=pretrained)
        if not pretrained:
            initialize_head(net, FRESH_HEAD_STD)
        elif num_classes != net.pretrained_cfg["num_classes"]:  # type: ignore[index]
            initialize_head(net, HEAD_STD)
        statistics = resolve_model_data_config(net)
        default_mean, default_std = (
            (statistics["mean"], statistics["std"]) if in_chans == 3 else pixel_statistics(in_chans)
        )
    return Classifier(net, mean or default_mean, std or default_std)


def pretrained_timm(name: str, img_size: int | ImageSize | None = None) -> Classifier:
    """Build a timm model with timm's own weights, classes and normalization, by its name or by a place that timm knows
    (hf-hub:OWNER/NAME, local-dir:PATH).

    Raises ConfigError for an unknown name or one without classes, MissingInputError without weights.
    """
    net = build_timm(name, None, img_size, drop_path=0.0, in_chans=3, pretrained=True)
    if not net.num_classes:
        raise ConfigError(f"{name} has no classes, only features: fine-tune it first.")
    statistics = resolve_model_data_config(net)
    return Classifier(net, statistics["mean"], statistics["std"])


def build_timm(
    name: str,
    num_classes: int | None,
    img_size: int | ImageSize | None,
    *,
    drop_path: float,
    in_chans: int,
    pretrained: bool,
) -> nn.Module:
    """Build a timm network, by its name or by a place that timm knows; None for timm's own classes and image size.

    Raises ConfigError for an unknown name, MissingInputError without weights.
    """
    try:
        source, timm_name = parse_model_name(name)
    except ValueError as error:  # timm's message names the unknown prefix
        raise ConfigError(str(error)) from error
    if source is None and not timm.is_model(timm_name):
        raise unknown_name("model", name, [*VIT_SIZES, *timm.list_models()])
    options: dict[str, Any] = {"drop_path_rate": drop_path}
    if img_size is not None:
        options["img_size"] = img_size
    try:
        net = _create_with_accepted(name, options, num_classes=num_classes, in_chans=in_chans, pretrained=pretrained)
    except (OSError, RuntimeError, ValueError) as error:
        if not pretrained and source is None:
            raise
        raise MissingInputError(
            f"{name} is not available: {error}. Check the internet connection, or use a file downloaded before."
        ) from error
    patch_size = getattr(getattr(net, "patch_embed", None), "patch_size", None)
    if img_size is not None and patch_size is not None:
        check_image_size(img_size, max(patch_size))
    return net


def _create_with_accepted(name: str, options: dict[str, Any], **always: Any) -> nn.Module:
    """Create a timm model without the options that it does not accept.

    timm does not list the options that a model accepts, so those named in the constructor's TypeError are dropped.
    """
    while True:
        try:
            return timm.create_model(name, **options, **always)
        except TypeError as error:
            match = re.search(r"unexpected keyword argument(?:\(s\): \[| )'(\w+)'", str(error))
            if match is None or match[1] not in options:
                raise
            # A model without img_size accepts images of any size; one without drop path trains differently: warn.
            if (value := options.pop(match[1])) and match[1] == "drop_path_rate":
                logger.warning("%s has no drop path: drop_path %s is not used", name, value)
