"""How far the generated blurs are from the original's on photos: `python -m benchmarks.corruption_differences DIR N`.

For the N images below DIR with the largest plain areas, where differences are largest, and every severity,
defocus_blur, glass_blur and gaussian_blur are compared with float64 filters as in ImageNet-C's make_imagenet_c.py, with
the same random draws. Prints for each corruption the mean difference over all images, the largest of an image, and the
largest of a value, in gray levels of 255 over severities 1 to 5.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from mae_dat.robustness.corruptions import MIN_SIDE, SEVERITIES, corrupt_image
from mae_dat.robustness.corruptions.blur import DEFOCUS, GAUSSIAN_SIGMA, GLASS, _disk, _replaced_by_neighbors

Pixels = NDArray[Any]


def _gaussian(image: Pixels, sigma: float) -> Pixels:
    """Return uint8 (H, W, 3) as `np.uint8(skimage.filters.gaussian(image / 255) * 255)`."""
    return (gaussian_filter(image / 255, (sigma, sigma, 0), mode="nearest") * 255).clip(0, 255).astype(np.uint8)


def original_defocus(image: Pixels, severity: int, random: np.random.RandomState) -> Pixels:
    """Return the original's `defocus_blur`."""
    filtered = cv2.filter2D(image / 255, -1, _disk(*DEFOCUS[severity - 1]))
    return (filtered.clip(0, 1) * 255).astype(np.uint8)


def original_glass(image: Pixels, severity: int, random: np.random.RandomState) -> Pixels:
    """Return the original's `glass_blur`."""
    sigma, reach, rounds = GLASS[severity - 1]
    image = _gaussian(image, sigma)
    for _ in range(rounds):
        image = _replaced_by_neighbors(image, reach, random)
    return _gaussian(image, sigma)


def original_gaussian(image: Pixels, severity: int, random: np.random.RandomState) -> Pixels:
    """Return the original's `gaussian_blur`."""
    return _gaussian(image, GAUSSIAN_SIGMA[severity - 1])


ORIGINALS: dict[str, Callable[[Pixels, int, np.random.RandomState], Pixels]] = {
    "defocus_blur": original_defocus,
    "glass_blur": original_glass,
    "gaussian_blur": original_gaussian,
}


def _plain_share(path: Path) -> float:
    """Return the share of pixels that equal the one below them; 0 for an image that is too small for corruptions."""
    image = np.array(Image.open(path).convert("RGB"))
    return 0.0 if min(image.shape[:2]) < MIN_SIDE else float((image[1:] == image[:-1]).all(2).mean())


def main(folder: Path, count: int) -> None:
    """Print the table for `count` images below a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    files = sorted(files, key=_plain_share, reverse=True)[:count]
    means: dict[str, list[float]] = {name: [] for name in ORIGINALS}
    largest = dict.fromkeys(ORIGINALS, 0)
    for seed, path in enumerate(files):
        image = np.array(Image.open(path).convert("RGB"))
        for name, original in ORIGINALS.items():
            for severity in SEVERITIES:
                ours = corrupt_image(image, name, severity, seed).astype(int)
                apart = np.abs(ours - original(image, severity, np.random.RandomState(seed)))
                means[name].append(float(apart.mean()))
                largest[name] = max(largest[name], int(apart.max()))
    print(f"{len(files):,} images, severities 1 to 5")
    for name, values in means.items():
        print(
            f"{name:14} mean {np.mean(values):.4f}  largest of an image {max(values):.3f}  of a value {largest[name]}"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
