"""Array types of the corruptions."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # (H, W, 3) RGB
Levels = NDArray[Any]  # gray levels 0..255, also fractional, float32 or float64


def whole_levels(levels: Levels) -> Image:
    """Clip levels to 0..255, in place, and truncate them to uint8, as ImageNet-C's `np.uint8(x)` does."""
    return np.clip(levels, 0, 255, out=levels).astype(np.uint8)
