"""States to save in checkpoints."""

from pathlib import Path
from typing import Any

import torch

from mae_dat.storage.checkpoint import save_checkpoint


def state(step: int) -> dict[str, Any]:
    return {"weights": torch.full((64, 33), float(step)), "step": step, "totals": {"loss": 0.5}, "ema": None}


def save(folder: Path, *steps: int, keep: int = 9) -> Path:
    for step in steps:
        path = save_checkpoint(folder, step, state(step), keep, epoch=step / 4, settings={"size": [64, 48]})
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
