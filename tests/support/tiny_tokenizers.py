"""Small tokenizers, their images and golden values, for tests."""

import functools
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from golden_rule import rule_tensor
from mae_dat.data.generated.draw import draw_image
from mae_dat.models.tokenizer import VQGAN, LightConfig

KEYS = Path(__file__).parents[1] / "golden" / "vqgan_tiny_keys.json"


SMALL_LIGHT = LightConfig(factor=2, width=8, encoder_blocks=1, decoder_blocks=1, num_words=16, word_dim=3)


def golden_tensors() -> dict[str, Tensor]:
    """The state dict of the reference VQGAN: weights by the rule, the recorded codebook."""
    shapes = json.loads(KEYS.read_text())["keys"]
    with np.load(KEYS.with_name("vq_grads.npz")) as arrays:
        codebook = torch.from_numpy(arrays["codebook"])
    tensors = {key: rule_tensor(key, shape) for key, shape in shapes.items()}
    return {**tensors, "quantize.embedding.weight": codebook}


@functools.cache
def golden_vqgan() -> VQGAN:
    """The reference VQGAN, shared by all tests: it is frozen."""
    return VQGAN.from_state_dict("golden", golden_tensors()).freeze()


def golden_image(arrays: dict[str, np.ndarray]) -> Tensor:
    return torch.from_numpy(arrays["images_u8"]).permute(0, 3, 1, 2).float() / 255


def pictures(count: int, seed: int = 0, size: int = 64) -> Tensor:
    """Generated validation images, (count, 3, size, size) in [0, 1]."""
    images = np.stack([draw_image(seed, "val", index, size=size).image for index in range(count)])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
