"""The tiny vision transformers of the reference outputs: 64 px, patches of 8, width 48."""

from typing import Any

import torch
from torch import Tensor

from mae_dat.models.classifier import Classifier, build_vit
from mae_dat.models.mae import MaskedAutoencoder, ViTSize

TINY = ViTSize(64, 8, 48, 4, 4)


def tiny(classes: int = 10, img_size: Any = 64, pool: bool = True, channels: int = 3, mean: float = 0.5) -> Classifier:
    net = build_vit(TINY, classes, img_size, global_pool=pool, in_chans=channels)
    return Classifier(net, (mean,) * channels, (0.5,) * channels)


def tiny_mae(img_size: Any = 64, **overrides: Any) -> MaskedAutoencoder:
    arguments = {"embed_dim": 48, "depth": 4, "num_heads": 4, "decoder_embed_dim": 32, "decoder_depth": 1}
    return MaskedAutoencoder(img_size, 8, **{**arguments, "decoder_num_heads": 4, **overrides})


def equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
