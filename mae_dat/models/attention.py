"""Where a vision transformer looks: attention weights, computed from the queries and keys of a forward pass.

timm's fused attention never computes the weights. Its `q_norm` and `k_norm` (identities if a model normalizes neither)
return exactly the queries and keys that it uses, so softmax(q k^T / sqrt(d)) of these is the attention.

Shapes: T tokens, the first `prefix` of them class and register tokens, then h x w patches in row-major order.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Attention, VisionTransformer
from torch import Tensor, nn

from mae_dat.config.errors import ConfigError
from mae_dat.models.classifier import Classifier
from mae_dat.models.mae import MaskedAutoencoder
from mae_dat.models.modes import evaluation_mode

QUERIES = ("auto", "class", "mean")


def attention_layers(model: Classifier | MaskedAutoencoder) -> list[Attention]:
    """Return the attention layer of every block of a vision transformer, or of an autoencoder's encoder.

    Raises ConfigError for other models.
    """
    net = model if isinstance(model, MaskedAutoencoder) else model.net
    layers: list[Any] = [getattr(block, "attn", None) for block in getattr(net, "blocks", [])]
    is_vit = isinstance(net, MaskedAutoencoder | VisionTransformer)
    if not is_vit or not layers or not all(isinstance(layer, Attention) for layer in layers):
        raise ConfigError(
            f"{type(net).__name__} has no self-attention over all patches: use a plain vision transformer (vit_*, "
            "deit_*) or a masked autoencoder."
        )
    return layers


def attention_weights(model: Classifier | MaskedAutoencoder, image: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """Compute the attention (B, heads, T, T) of each of `blocks` (from 0) for images (B, C, H, W).

    Each row, a query's, sums to 1. An autoencoder gets the whole image, nothing masked. Raises ConfigError for a block
    that does not exist.
    """
    layers = attention_layers(model)
    if wrong := [block for block in blocks if not 0 <= block < len(layers)]:
        raise ConfigError(f"there is no block {wrong[0] + 1}: the model has blocks 1 to {len(layers)}.")
    recorded: dict[tuple[int, str], Tensor] = {}

    def record(key: tuple[int, str], module: nn.Module, inputs: Any, output: Tensor) -> None:
        recorded[key] = output.detach()

    hooks = [
        getattr(layers[block], f"{name}_norm").register_forward_hook(partial(record, (block, name)))
        for block in blocks
        for name in ("q", "k")
    ]
    try:
        with torch.no_grad(), evaluation_mode(model):
            model.features(image) if isinstance(model, MaskedAutoencoder) else model(image)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        (recorded[block, "q"] * layers[block].scale @ recorded[block, "k"].transpose(-2, -1)).softmax(-1)
        for block in blocks
    ]


def default_query(model: Classifier | MaskedAutoencoder) -> str:
    """Return `class` if the model classifies by its class token or is an autoencoder, which has one, else `mean`."""
    if isinstance(model, MaskedAutoencoder):
        return "class"
    return "class" if getattr(model.net, "global_pool", "") == "token" else "mean"


def attention_maps(
    model: Classifier | MaskedAutoencoder, image: Tensor, block: int, query: str = "auto", rollout: bool = False
) -> Tensor:
    """Compute the attention to each patch (B, heads, h, w) of images (B, C, H, W), in the block `block` (from 0).

    `query` `class`: the class token's attention; `mean`: the mean over the patches' queries; `auto`: `default_query`. A
    map sums to less than 1: the rest is attention to class and register tokens. With `rollout` one map (B, 1,
    h, w) for all blocks up to `block`, heads averaged and residuals counted as half: the product of (A + 1) / 2
    (Abnar & Zuidema 2020, arXiv 2005.00928, eq. 1).

    Raises ConfigError for a model or block without such attention, and for `class` without a class token.
    """
    attention_layers(model)
    net: Any = model if isinstance(model, MaskedAutoencoder) else model.net
    prefix = 1 if isinstance(model, MaskedAutoencoder) else net.num_prefix_tokens
    query = default_query(model) if query == "auto" else query
    if query == "class" and not isinstance(model, MaskedAutoencoder) and not net.has_class_token:
        raise ConfigError("the model has no class token: use --query mean.")
    if rollout:
        layers = attention_weights(model, image, range(block + 1))
        identity = torch.eye(layers[0].shape[-1], device=image.device)
        weights = identity
        for layer in layers:
            weights = (layer.mean(1, keepdim=True) + identity) / 2 @ weights
    else:
        (weights,) = attention_weights(model, image, [block])
    on_patches = weights[:, :, 0, prefix:] if query == "class" else weights[:, :, prefix:, prefix:].mean(2)
    patch_height, patch_width = net.patch_embed.patch_size
    return on_patches.unflatten(-1, (image.shape[-2] // patch_height, image.shape[-1] // patch_width))
