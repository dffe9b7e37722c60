"""The corruptions of ImageNet-C (Hendrycks & Dietterich 2019) for one image, reproducible from a seed: `corrupt_image`.

`corrupt_image` calls the function of that name in noise.py, blur.py, weather.py or digital.py. They are a new
implementation with the algorithms and constants of the code that made ImageNet-C, make_imagenet_c.py in
hendrycks/robustness (Apache-2.0), and of ImageMagick where that calls it; docs/reference/benchmarks.md lists where
results differ. Images made here are not the official files: `SOURCE` is printed with every number.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae_dat.config.errors import DataError, suggest
from mae_dat.robustness.corruptions.pixels import Image

SOURCE = "generated on the fly from clean images, not the official ImageNet-C files"

REVISION = "2"
"""Raised whenever images change, so that measurements of the old ones are not taken from the cache."""

CATEGORIES: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
CORRUPTIONS: tuple[str, ...] = tuple(name for names in CATEGORIES.values() for name in names)
EXTRA: tuple[str, ...] = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # never in a mean
SEVERITIES: tuple[int, ...] = (1, 2, 3, 4, 5)
MIN_SIDE = 32  # px
STORED_QUALITY = 85  # of the official files


def check_corruption(name: str, severity: int) -> None:
    """Raise ValueError for an unknown corruption or a severity outside 1 to 5."""
    if name not in CORRUPTIONS + EXTRA:
        hint = suggest(name, CORRUPTIONS + EXTRA)
        guess = f" {hint}" if hint.startswith("did") else ""
        raise ValueError(f"unknown corruption {name!r};{guess} choose from {', '.join(CORRUPTIONS + EXTRA)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity!r} of {name} is not one of 1, 2, 3, 4, 5")


def check_image(image: NDArray[Any]) -> None:
    """Raise DataError unless `image` is uint8, (H, W, 3) and at least 32 px on both sides."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        actual = f"{image.dtype} of shape {image.shape}"
        raise DataError(f"corruptions need a uint8 RGB image (H, W, 3), got {actual}; convert it to 8-bit RGB first")
    if min(image.shape[:2]) < MIN_SIDE:
        size = f"{image.shape[0]} x {image.shape[1]}"
        raise DataError(
            f"corruptions need images of at least {MIN_SIDE} px a side, got {size}; use a larger input size"
        )


def image_seed(seed: int, index: int, name: str, severity: int) -> int:
    """Return a 32-bit seed for one image that does not depend on machine, rank, worker or order."""
    key = f"{seed}/{index}/{name}/{severity}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big")


def corrupt_image(image: Image, name: str, severity: int, seed: int) -> Image:
    """Return an image, uint8 (H, W, 3), corrupted by `name` from `CORRUPTIONS` or `EXTRA` at severity 1 to 5.

    The result depends only on the arguments. Raises ValueError (name, severity) and DataError (image).
    """
    check_corruption(name, severity)
    check_image(image)
    # Each call has its own generator and draws in the order in which the original draws from numpy's global one. It is
    # a RandomState because numpy guarantees that its numbers never change.
    random = np.random.RandomState(seed % 2**32)
    return _corruption(name)(np.ascontiguousarray(image), severity, random)


def as_stored(image: Image) -> Image:
    """Return an image, uint8 (H, W, 3), as ImageNet-C stores it: encoded and decoded as JPEG of quality 85."""
    from mae_dat.robustness.corruptions.digital import jpeg

    check_image(image)
    return jpeg(np.ascontiguousarray(image), STORED_QUALITY)


@functools.cache
def _corruption(name: str) -> Callable[[Image, int, np.random.RandomState], Image]:
    """Return the function of that name. The modules are imported on first use, because they import OpenCV."""
    from mae_dat.robustness.corruptions import blur, digital, noise, weather

    for module in (noise, blur, weather, digital):
        if function := getattr(module, name, None):
            return function
    raise AssertionError(f"{name} is in the lists, but no module defines it")
