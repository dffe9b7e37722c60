"""Common corruptions (Hendrycks & Dietterich 2019) of one image, reproducible from a seed.

The pictures come from `imagecorruptions` (the package `imagecorruptions-imaug`). They are close to the ImageNet-C
files but not equal to them: frost and elastic_transform use other constants, and nothing is stored as JPEG. `SOURCE`
says so wherever a number is shown.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mae_dat.errors import DataError

SOURCE = "generated on the fly by imagecorruptions, not the official ImageNet-C files"

CATEGORIES: dict[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
CORRUPTIONS: tuple[str, ...] = tuple(name for names in CATEGORIES.values() for name in names)
EXTRA: tuple[str, ...] = ("speckle_noise", "gaussian_blur", "spatter", "saturate")  # hold-out: never in a mean
SEVERITIES: tuple[int, ...] = (1, 2, 3, 4, 5)
MIN_SIDE = 32  # px; below, the library refuses

_OWN_GENERATOR = ("glass_blur", "impulse_noise")  # these ignore numpy's global generator and take a seed instead

Image = NDArray[np.uint8]


@functools.cache
def _library() -> Callable[..., Image]:
    """The library's `corrupt`, imported on first use because numba alone takes seconds."""
    from imagecorruptions import corrupt as library_corrupt

    result: Callable[..., Image] = library_corrupt
    return result


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, which the library draws from, and put it back as found."""
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)


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

    The result depends on the arguments alone, and the generators of numpy and Python are left as found. Not
    thread-safe, since the library draws from numpy's global generator: use processes. Raises ValueError (name,
    severity) and DataError (image).
    """
    check(name, severity)
    check_image(image)
    seed %= 2**32
    own = {"seed": seed} if name in _OWN_GENERATOR else {}
    # Blank pictures make spatter divide 0 by 0 and cast the NaN to 0; the outcome is fine, the noise on stderr is not.
    with _numpy_seed(seed), np.errstate(divide="ignore", invalid="ignore"):
        return np.ascontiguousarray(_library()(image, severity=severity, corruption_name=name, **own))
