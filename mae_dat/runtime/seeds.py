"""Seeds and generators as pure functions of the seed, the step and the rank."""

import hashlib
import random

import numpy as np
import torch


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return a 63-bit seed for one step of one rank.

    It depends only on its arguments, so that a run resumes exactly without saving any random state.
    """
    digest = hashlib.sha256(f"mae_dat step {seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def step_generator(seed: int, step: int, rank: int, device: torch.device) -> torch.Generator:
    """Return the generator for all explicit draws of one step: mask noise, random words, the attack's start."""
    return torch.Generator(device).manual_seed(step_seed(seed, step, rank))


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch, which drop path and timm's mixup draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
