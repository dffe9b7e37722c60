"""Generators for the random start of attacks."""

import torch

from mae_dat.attacks.discrete import image_generator


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [image_generator(seed, index) for index in range(count)]
