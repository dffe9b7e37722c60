"""Digital: contrast, elastic transform, pixelation, JPEG and saturation, as in ImageNet-C's make_imagenet_c.py
(hendrycks/robustness).

Every function takes uint8 (H, W, 3), a severity 1 to 5 and the generator of its random draws, and returns uint8
(H, W, 3).
"""

import functools
from io import BytesIO

import cv2
import numpy as np
import PIL.Image
from numpy.random import RandomState
from scipy.fft import dctn, idctn

from mae_dat.robustness.corruptions.pixels import Image, Levels, whole_levels

CONTRAST = (0.4, 0.3, 0.2, 0.1, 0.05)  # c of (x - means) * c + means
# alpha and sigma of the displacements, alpha_affine of the affine map, in units of ELASTIC_UNIT.
ELASTIC = ((2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02))
ELASTIC_UNIT = 244 / 224  # of the shorter side; the original writes 244 for 224, which is part of ImageNet-C
PIXELATE = (0.6, 0.5, 0.4, 0.3, 0.25)  # `resize` to this share of the side
JPEG_QUALITY = (25, 18, 15, 10, 7)  # `quality`
SATURATE = ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2))  # factor and summand of the saturation of HSV


def contrast(image: Image, severity: int, random: RandomState) -> Image:
    """Shrink the distance of every value to its channel's mean: `contrast`."""
    means = np.array(cv2.mean(image)[:3]) / 255
    values = np.arange(256)[:, None] / 255
    table = whole_levels(((values - means) * CONTRAST[severity - 1] + means) * 255)
    return np.asarray(cv2.LUT(image, table[None]), dtype=np.uint8)


def elastic_transform(image: Image, severity: int, random: RandomState) -> Image:
    """Apply a random affine map, then smooth random displacements: `elastic_transform`, after Simard et al. 2003.

    Both grow with the shorter side.
    """
    height, width = image.shape[:2]
    unit = ELASTIC_UNIT * min(height, width)
    amplitude, sigma, reach = (unit * factor for factor in ELASTIC[severity - 1])
    levels = cv2.warpAffine(
        image.astype(np.float32),
        _jittered(height, width, reach, random),
        (width, height),
        borderMode=cv2.BORDER_REFLECT_101,
    )
    shift = random.uniform(-1, 1, size=(2, height, width)).astype(np.float32)  # x, then y
    spectrum = dctn(shift, axes=(1, 2), overwrite_x=True)
    spectrum *= amplitude * _gaussian_gain(height, sigma)[:, None] * _gaussian_gain(width, sigma)
    shift = idctn(spectrum, axes=(1, 2), overwrite_x=True)
    shift[0] += np.arange(width, dtype=np.float32)
    shift[1] += np.arange(height, dtype=np.float32)[:, None]
    return whole_levels(cv2.remap(levels, shift[0], shift[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT))


def _jittered(height: int, width: int, reach: float, random: RandomState) -> Levels:
    """Return an affine map (2, 3) that moves three points around the middle by up to `reach` px in x and y."""
    center, distance = np.array([width // 2, height // 2]), min(height, width) // 3
    points = (center + distance * np.array([[1, 1], [1, -1], [-1, -1]])).astype(np.float32)
    return cv2.getAffineTransform(points, points + random.uniform(-reach, reach, size=(3, 2)).astype(np.float32))


@functools.lru_cache(maxsize=64)
def _gaussian_gain(length: int, sigma: float) -> Levels:
    """Return the gain, float32 (length,), of a Gaussian of `sigma` px, cut at 3 sigma, for the cosines of an axis.

    A filter with reflecting edges is a product with the cosine transform, which is exact, and as fast for a kernel of a
    thousand pixels as for one of ten.
    """
    distance = np.arange(1, int(3 * sigma + 0.5) + 1)
    weights = np.exp(-(distance**2) / (2 * sigma**2))
    gain = 1 + 2 * np.cos(np.pi / length * np.outer(np.arange(length), distance)) @ weights
    return (gain / gain[0]).astype(np.float32)


def pixelate(image: Image, severity: int, random: RandomState) -> Image:
    """Shrink and enlarge again, both by averaging boxes: `pixelate`, PIL's resize with Image.BOX."""
    height, width = image.shape[:2]
    small = int(width * PIXELATE[severity - 1]), int(height * PIXELATE[severity - 1])
    shrunk = PIL.Image.fromarray(image).resize(small, PIL.Image.Resampling.BOX)
    return np.array(shrunk.resize((width, height), PIL.Image.Resampling.BOX))


def jpeg_compression(image: Image, severity: int, random: RandomState) -> Image:
    """Compress as JPEG of low quality: `jpeg_compression`, PIL's save with quality=c."""
    return jpeg(image, JPEG_QUALITY[severity - 1])


def jpeg(image: Image, quality: int) -> Image:
    """Return an image, uint8 (H, W, 3), after JPEG at `quality`, encoded and decoded by Pillow as in the original."""
    file = BytesIO()
    PIL.Image.fromarray(image).save(file, "JPEG", quality=quality)
    with PIL.Image.open(file) as decoded:
        return np.array(decoded)


def saturate(image: Image, severity: int, random: RandomState) -> Image:
    """Change the saturation of HSV: `saturate`. Grays, which have no hue, count as red."""
    factor, summand = SATURATE[severity - 1]
    channels = cv2.split(image.astype(np.float32))
    largest, smallest = functools.reduce(np.maximum, channels), functools.reduce(np.minimum, channels)
    spread = largest - smallest
    saturation = np.clip(spread / np.maximum(largest, 1) * factor + summand, 0, 1)
    # Saturation scales a channel's distance to the largest one. For grays, green and blue drop by the full saturation.
    scale = largest * saturation / np.maximum(spread, 1)
    shifted = [largest - (largest - channel) * scale for channel in channels]
    gray = (spread == 0) * (largest * saturation)
    return whole_levels(cv2.merge([shifted[0], shifted[1] - gray, shifted[2] - gray]))
