"""Blur: defocus, glass, motion, zoom and Gaussian, as in ImageNet-C's make_imagenet_c.py (hendrycks/robustness).

Every function takes uint8 (H, W, 3), a severity 1 to 5 and the generator of its random draws, and returns uint8
(H, W, 3). Lengths are in pixels, independent of the size of the image; zooms are factors.
"""

import functools
import math

import cv2
import numpy as np
from numpy.random import RandomState
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from mae_dat.robustness.corruptions.pixels import Image, Levels, whole_levels

DEFOCUS = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))  # `disk(radius, alias_blur)`
GLASS = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))  # sigma, max_delta, iterations
MOTION = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))  # `motion_blur(radius, sigma)`
MOTION_ANGLE = 45  # degrees to either side of horizontal
ZOOM = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))  # np.arange(1, end, step)
GAUSSIAN_SIGMA = (1, 2, 3, 4, 6)  # `gaussian(sigma)`

_SLACK = 1e-3  # levels: a float32 sum can be 1e-5 below a whole level, which truncation would lower by a full level
_PNG_SLACK = 0.5 / 257  # levels: ImageMagick rounds the sum to 1/257 level before its PNG encoder truncates it


def gaussian_blur(image: Image, severity: int, random: RandomState) -> Image:
    """Convolve with a Gaussian: `gaussian_blur`."""
    return _smooth_levels(image, GAUSSIAN_SIGMA[severity - 1])


def defocus_blur(image: Image, severity: int, random: RandomState) -> Image:
    """Convolve with a disk whose edge is softened: `defocus_blur`, cv2.filter2D with `disk`."""
    kernel = _disk(*DEFOCUS[severity - 1])
    # The float32 weights of some kernels sum to slightly less than 1. There the original lowers every plain area, such
    # as a white background, by a level.
    slack = _SLACK if kernel.sum(dtype=np.float64) >= 1 else -_SLACK
    return whole_levels(cv2.filter2D(image.astype(np.float32), -1, kernel) + slack)


def glass_blur(image: Image, severity: int, random: RandomState) -> Image:
    """Between two Gaussian blurs, replace every pixel in turn by a random neighbor: `glass_blur`."""
    sigma, reach, rounds = GLASS[severity - 1]
    image = _smooth_levels(image, sigma)
    for _ in range(rounds):
        image = _replaced_by_neighbors(image, reach, random)
    return _smooth_levels(image, sigma)


def motion_blur(image: Image, severity: int, random: RandomState) -> Image:
    """Blur to one side along a line of random angle: `motion_blur`, ImageMagick's, angle np.random.uniform(-45, 45)."""
    radius, sigma = MOTION[severity - 1]
    return smear(image, radius, sigma, random.uniform(-MOTION_ANGLE, MOTION_ANGLE))


def zoom_blur(image: Image, severity: int, random: RandomState) -> Image:
    """Average the image and its enlargements, starting at factor 1: `zoom_blur`, `clipped_zoom`. The image itself thus
    counts twice."""
    end, step = ZOOM[severity - 1]
    factors = np.arange(1, end, step)
    levels = image.astype(np.float32)
    total = 2 * levels
    for factor in factors[1:]:
        cv2.add(total, enlarge(levels, factor), dst=total)
    return whole_levels(total / (len(factors) + 1) + _SLACK)


def smooth(levels: Levels, sigma: float) -> Levels:
    """Return levels (H, W) or (H, W, 3) of any number type, filtered by a Gaussian of `sigma` px: float32.

    The Gaussian is truncated at 4 sigma, and edges are repeated.
    """
    size = 2 * int(4 * sigma + 0.5) + 1
    return cv2.GaussianBlur(levels.astype(np.float32), (size, size), sigma, borderType=cv2.BORDER_REPLICATE)


def _smooth_levels(image: Image, sigma: float) -> Image:
    """Return uint8 (H, W, 3) filtered by a Gaussian of `sigma` px, with plain areas as the original leaves them."""
    levels = smooth(image, sigma)
    result = whole_levels(levels + _SLACK)
    is_whole = np.subtract(levels, result, out=levels) < _SLACK
    result -= is_whole & _lowered_levels(sigma)[result]
    return result


@functools.cache
def _lowered_levels(sigma: float) -> NDArray[np.bool_]:
    """Return for each of the 256 levels whether the original's Gaussian lowers a plain area of that level by a level.

    Its float64 sums of level / 255 can end just below the level, and are then truncated.
    """
    plain = np.arange(256)[:, None, None] / 255 * np.ones((1, 3, 3))
    filtered = gaussian_filter(plain, (0, sigma, sigma), mode="nearest")[:, 1, 1]
    return (255 * filtered).astype(np.uint8) < np.arange(256)


def enlarge(levels: Levels, factor: float) -> Levels:
    """Enlarge the middle of float32 (H, W) or (H, W, 3) linearly by `factor` to the full size: `clipped_zoom`.

    The corners of the two grids coincide, as in `scipy.ndimage.zoom`.
    """
    rows, columns = (_zoomed_axis(length, factor) for length in levels.shape[:2])
    warp = np.array([[columns[0], 0, columns[1]], [0, rows[0], rows[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(levels, warp, levels.shape[1::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _zoomed_axis(length: int, factor: float) -> tuple[float, float]:
    """Return scale and offset from a coordinate of the enlarged axis, cut to `length`, to the source coordinate."""
    source = math.ceil(length / factor)
    enlarged = round(source * factor)
    scale = (source - 1) / (enlarged - 1)
    return scale, (length - source) // 2 + (enlarged - length) // 2 * scale


def smear(image: Image, radius: int, sigma: float, angle: float) -> Image:
    """Apply ImageMagick's motion blur to uint8 (H, W) or (H, W, 3): half a Gaussian along a line at `angle` degrees.

    The line has 2 radius + 1 pixels, each weighted by its distance. Edges are repeated. Fractions of a level are
    dropped, because the original reads ImageMagick's 16-bit result through an 8-bit PNG, whose encoder truncates.
    """
    distance = np.arange(2 * radius + 1)
    weights = np.exp(-(distance**2) / (2 * sigma**2))
    weights /= weights.sum()
    down = np.ceil(distance * math.sin(math.radians(angle)) - 0.5).astype(int)
    right = np.ceil(distance * math.cos(math.radians(angle)) - 0.5).astype(int)
    top, left = -down.min(), -right.min()
    padded = cv2.copyMakeBorder(image, top, down.max(), left, right.max(), cv2.BORDER_REPLICATE).astype(np.float32)
    total = np.full(image.shape, _PNG_SLACK, dtype=np.float32)
    height, width = image.shape[:2]
    for weight, y, x in zip(weights, top + down, left + right, strict=True):
        cv2.scaleAdd(padded[y : y + height, x : x + width], weight, total, dst=total)
    return whole_levels(total)


@functools.cache
def _disk(radius: int, sigma: float) -> Levels:
    """Return the kernel of `defocus_blur`, float32 (K, K), ImageNet-C's `disk(radius, alias_blur=sigma)`.

    Its edge is softened within the original's grid, which truncates the kernel at radius 8 and 10: the sum is then not
    exactly 1, and the image becomes slightly brighter.
    """
    reach, size = (8, 3) if radius <= 8 else (radius, 5)
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = (x**2 + y**2 <= radius**2).astype(np.float32)
    kernel = cv2.GaussianBlur(disk / disk.sum(), (size, size), sigma)
    empty = max(0, reach - radius - size // 2)
    return kernel[empty : len(kernel) - empty, empty : len(kernel) - empty]


def _replaced_by_neighbors(image: Image, reach: int, random: RandomState) -> Image:
    """Return the image (H, W, 3) after one iteration of `glass_blur`: from the last pixel to the first, each takes the
    current value of a pixel up to `reach` away.

    The original means to swap the two pixels, but assigns through a view, so that the other pixel keeps its value. If
    the source of a pixel was already replaced, the pixel gets the new value of that source. Following these links to
    their ends computes the whole iteration at once.
    """
    height, width = image.shape[:2]
    size = height * width
    places = np.arange(size).reshape(height, width)
    pixels = places[height - reach : reach : -1, width - reach : reach : -1].ravel()
    step_x, step_y = random.randint(-reach, reach, size=(len(pixels), 2)).T
    neighbors = pixels + step_y * width + step_x
    replaced = np.zeros(size, dtype=bool)
    replaced[pixels] = True
    is_linked = replaced[neighbors] & (neighbors > pixels)  # the neighbor was replaced earlier in this iteration
    source = np.arange(size, 2 * size)  # from `size` on: an original pixel; below: a replaced one
    source[pixels] = neighbors + size * ~is_linked
    linked = pixels[is_linked]
    while len(linked):
        source[linked] = source[source[linked]]
        linked = linked[source[linked] < size]
    return image.reshape(size, 3).take(source - size, axis=0).reshape(image.shape)
