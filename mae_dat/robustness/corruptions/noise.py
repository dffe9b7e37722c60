"""Noise: Gaussian, shot, impulse and speckle, as in ImageNet-C's make_imagenet_c.py (hendrycks/robustness).

Every function takes uint8 (H, W, 3), a severity 1 to 5 and the generator of its random draws, and returns uint8
(H, W, 3). Strengths do not depend on the size of the image.
"""

import functools

import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from scipy.special import pdtr

from mae_dat.robustness.corruptions.pixels import Image, whole_levels

GAUSSIAN_DEVIATION = (0.08, 0.12, 0.18, 0.26, 0.38)  # `scale`, of the range of a pixel
SPECKLE_DEVIATION = (0.15, 0.2, 0.35, 0.45, 0.6)  # `scale`, of the pixel's own value
IMPULSE_SHARE = (0.03, 0.06, 0.09, 0.17, 0.27)  # `amount` of all values; half of them become black
SHOT_PHOTONS = (60, 25, 12, 5, 3)  # expected at white: `lam` is this times the pixel in [0, 1]

_BITS = 32  # of a random integer
_BUCKET_BITS = 10  # its leading bits, with which one table lookup decides most draws
_UNDECIDED = -1


def gaussian_noise(image: Image, severity: int, random: RandomState) -> Image:
    """Add normal noise, independent in every value: `gaussian_noise`, np.random.normal(size, scale=c)."""
    levels = random.normal(scale=255 * GAUSSIAN_DEVIATION[severity - 1], size=image.shape)
    levels += image
    return whole_levels(levels)


def speckle_noise(image: Image, severity: int, random: RandomState) -> Image:
    """Add normal noise in proportion to the value: `speckle_noise`, x + x * np.random.normal(size, scale=c)."""
    levels = random.normal(loc=1, scale=SPECKLE_DEVIATION[severity - 1], size=image.shape)
    levels *= image
    return whole_levels(levels)


def impulse_noise(image: Image, severity: int, random: RandomState) -> Image:
    """Set a share of the values to black or white, independently in every channel: `impulse_noise`, scikit-image's
    random_noise(mode="s&p", amount=c)."""
    hit = random.random_sample(image.shape) < IMPULSE_SHARE[severity - 1]
    white = random.random_sample(image.shape) < 0.5
    corrupted = image.copy()
    np.copyto(corrupted, white.view(np.uint8) * np.uint8(255), where=hit)
    return corrupted


def shot_noise(image: Image, severity: int, random: RandomState) -> Image:
    """Replace every value by a Poisson draw, as if photons were counted: `shot_noise`, np.random.poisson(x * c) / c.

    Draws by inversion of the distribution function, exact to 2^-32 and five times faster than `RandomState.poisson`.
    This is the only corruption whose draws differ from the original's.
    """
    photons = SHOT_PHOTONS[severity - 1]
    table, thresholds, levels = _poisson(photons)
    words = random.randint(0, 2**_BITS, size=image.shape, dtype=np.uint32)  # uniform: one per value
    bucket = image.astype(np.int32) << _BUCKET_BITS
    bucket |= (words >> (_BITS - _BUCKET_BITS)).view(np.int32)
    levels_drawn = table.take(bucket)
    undecided = np.flatnonzero(levels_drawn == _UNDECIDED)
    value = image.ravel()[undecided].astype(np.int64)
    rank = np.searchsorted(thresholds, (value << _BITS) + words.ravel()[undecided], side="right")
    levels_drawn.ravel()[undecided] = levels[rank - photons * value]
    return levels_drawn.astype(np.uint8)


@functools.cache
def _poisson(photons: int) -> tuple[NDArray[np.int16], NDArray[np.int64], NDArray[np.int16]]:
    """Return tables that turn a pixel value v and a random integer w into a drawn level.

    The second table holds (v << 32) + 2^32 P(at most k photons) for all v and k < photons: the rank of (v << 32) + w in
    it is the photon count, which the third table maps to a level. The first table holds the level itself for every v
    and leading bits of w, or _UNDECIDED if these do not determine it.
    """
    levels = (np.arange(photons + 1) / photons * 255).astype(np.int16)  # more photons than at white are white
    cumulated = pdtr(np.arange(photons), np.arange(256)[:, None] / 255 * photons)
    offset = np.arange(256, dtype=np.int64)[:, None] << _BITS
    thresholds = (offset + np.ceil(cumulated * 2**_BITS).astype(np.int64)).ravel()
    width = 2 ** (_BITS - _BUCKET_BITS)
    first = offset + np.arange(2**_BUCKET_BITS, dtype=np.int64) * width
    least, most = (
        np.searchsorted(thresholds, word, side="right") - photons * np.arange(256)[:, None]
        for word in (first, first + width - 1)
    )
    table = np.where(least == most, levels[least], np.int16(_UNDECIDED))
    return table.ravel(), thresholds, levels
