"""Seeds and generators as pure functions of the seed, the step and the rank."""

import hashlib
import random

import numpy as np
import torch


def step_seed(seed: int, step: int, rank: int) -> int:
    """A 63-bit seed that is a pure function of its arguments: no random state needs saving for a run to resume
    exactly."""
    digest = hashlib.sha256(f"mae_dat step {seed} {step} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def step_generator(seed: int, step: int, rank: int, device: torch.device) -> torch.Generator:
    """Generator for everything drawn explicitly in one step: mask noise, random words, the attack's start."""
    return torch.Generator(device).manual_seed(step_seed(seed, step, rank))


def seed_everything(seed: int) -> None:
    """Seeds the global generators (drop path, timm's mixup) as a function of the step."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
