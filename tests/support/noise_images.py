"""Images of noise, alone and in folders."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

MakeFolder = Callable[[str], Path]


def noise(height: int = 20, width: int = 24, seed: int = 0) -> Image.Image:
    """Return an RGB image of uniform noise."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def write_images(root: Path, names: str) -> Path:
    """Write noise images of these names, relative to `root`; returns `root`."""
    for number, name in enumerate(names.split()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise(seed=number).save(path, format="PNG")
    return root
