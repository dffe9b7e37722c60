"""The corruptions of ImageNet-C (Hendrycks & Dietterich 2019) for one image, reproducible from a seed.

Written anew. The algorithms and constants are those of the code that made ImageNet-C, hendrycks/robustness
(Apache-2.0), and of ImageMagick where it calls that; docs/robustness.md says where the results differ. What is made
here is not the official files: `SOURCE` says so wherever a number is shown.
"""

import functools
import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae_dat.config.errors import DataError
from mae_dat.robustness.corruptions.pixels import Image

SOURCE = "generated on the fly from clean images, not the official ImageNet-C files"

CATEGORIES: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
CORRUPTIONS: tuple[str, ...] = tuple(name for names in CATEGORIES.values() for name in names)
EXTRA: tuple[str, ...] = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # hold-out: never in a mean
SEVERITIES: tuple[int, ...] = (1, 2, 3, 4, 5)
MIN_SIDE = 32  # px
STORED_QUALITY = 85  # of the official files


def check(name: str, severity: int) -> None:
    """Raise ValueError for an unknown corruption or a severity outside 1..5."""
    if name not in CORRUPTIONS + EXTRA:
        raise ValueError(f"unknown corruption {name!r}; choose from {', '.join(CORRUPTIONS + EXTRA)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity {severity!r} of {name} is not one of 1, 2, 3, 4, 5")


def check_image(image: NDArray[Any]) -> None:
    """Raise DataError unless `image` is uint8, (H, W, 3) and at least 32 px on both sides."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} of shape {image.shape}"
        raise DataError(f"corruptions need a uint8 RGB image (H, W, 3), got {found}; convert it to 8-bit RGB first")
    if min(image.shape[:2]) < MIN_SIDE:
        size = f"{image.shape[0]} x {image.shape[1]}"
        raise DataError(
            f"corruptions need images of at least {MIN_SIDE} px a side, got {size}; use a larger input size"
        )


def image_seed(seed: int, index: int, name: str, severity: int) -> int:
    """A stable 32-bit seed for one picture: the same on every machine, rank, worker and in any order."""
    key = f"{seed}/{index}/{name}/{severity}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big")


def corrupt(image: Image, name: str, severity: int, seed: int) -> Image:
    """Corrupt a uint8 image (H, W, 3) with `name` from `CORRUPTIONS` or `EXTRA` at severity 1..5; same shape and type.

    The result depends on the arguments alone: each call draws from a generator of its own, in the order in which the
    original draws from numpy's global one, so that threads do not disturb each other. RandomState, because numpy
    promises that its numbers never change. Raises ValueError (name, severity) and DataError (image).
    """
    check(name, severity)
    check_image(image)
    return _corruption(name)(np.ascontiguousarray(image), severity, np.random.RandomState(seed % 2**32))


def as_stored(image: Image) -> Image:
    """A uint8 image (H, W, 3) as it comes back from the JPEG of quality 85 that ImageNet-C is stored in."""
    from mae_dat.robustness.corruptions.digital import jpeg

    check_image(image)
    return jpeg(np.ascontiguousarray(image), STORED_QUALITY)


@functools.cache
def _corruption(name: str) -> Callable[[Image, int, np.random.RandomState], Image]:
    """The function of that name. Imported on first use: whoever wants the names alone need not wait for OpenCV."""
    from mae_dat.robustness.corruptions import blur, digital, noise, weather

    for module in (noise, blur, weather, digital):
        if function := getattr(module, name, None):
            return function
    raise AssertionError(f"{name} is in the lists, but no module defines it")
