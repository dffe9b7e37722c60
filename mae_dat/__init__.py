"""Masked autoencoders and Discrete Adversarial Training: image models that stay accurate on noisy, corrupted or shifted
data."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["AttackConfig", "MaskedAutoencoder", "VisualTokenizer", "WithDAT", "discrete_adversary", "load_tokenizer"]

_HOMES = {
    "AttackConfig": "mae_dat.config.adversaries",
    "MaskedAutoencoder": "mae_dat.models.mae",
    "VisualTokenizer": "mae_dat.models.tokenizer",
    "WithDAT": "mae_dat.training.objectives.dat",
    "discrete_adversary": "mae_dat.attacks.discrete",
    "load_tokenizer": "mae_dat.models.tokenizer",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `--help` and configuration errors need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mae_dat' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
