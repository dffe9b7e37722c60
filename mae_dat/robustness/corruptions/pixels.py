"""Pixel types that the corruptions exchange."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # (H, W, 3) RGB
Levels = NDArray[Any]  # grey levels 0..255 that need not be whole, float32 or float64


def whole_levels(levels: Levels) -> Image:
    """Clip levels to 0..255, in place, and return them as uint8 without their fraction: ImageNet-C's `np.uint8(x)` does
    not round either."""
    return np.clip(levels, 0, 255, out=levels).astype(np.uint8)
