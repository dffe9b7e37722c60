"""Grey levels as the corruptions exchange them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # (H, W, 3) RGB
Levels = NDArray[Any]  # grey levels 0..255 that need not be whole, float32 or float64


def whole_levels(levels: Levels) -> Image:
    """Clips to 0..255, in place, and drops the fraction as the original's `np.uint8` does: it never rounds."""
    return np.clip(levels, 0, 255, out=levels).astype(np.uint8)
