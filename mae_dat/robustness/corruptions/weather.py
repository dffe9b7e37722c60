"""Weather: snow, frost, fog, brightness and spatter, as in ImageNet-C's make_imagenet_c.py (hendrycks/robustness).

Every function takes uint8 (H, W, 3), a severity 1 to 5 and the generator of its random draws, and returns uint8
(H, W, 3). Sizes of flakes and drops are in pixels, independent of the size of the image.
"""

import functools
from pathlib import Path

import cv2
import numpy as np
from numpy.random import RandomState

from mae_dat.config.errors import MissingInputError
from mae_dat.robustness.corruptions.blur import enlarge, smear, smooth
from mae_dat.robustness.corruptions.pixels import Image, Levels, whole_levels

# mean, deviation, zoom and threshold of the flakes; radius and sigma of their motion blur; weight of the image
SNOW = (
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
FROST = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))  # weights of the image and of the frost
FROST_FOLDER = Path(__file__).parent / "frost"
FROST_PHOTOGRAPHS = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
FOG = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))  # thickness, and `wibbledecay` of `plasma_fractal`
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)  # added to the value of HSV, in [0, 1]
# mean, deviation, smoothing and threshold of the liquid; opacity of water, or softness of mud
WATER = ((0.65, 0.3, 4, 0.69, 0.6), (0.65, 0.3, 3, 0.68, 0.6), (0.65, 0.3, 2, 0.68, 0.5))
MUD = ((0.65, 0.3, 1, 0.65, 1.5), (0.67, 0.4, 1, 0.65, 1.5))
WATER_COLOR = (175, 238, 238)
MUD_COLOR = (63, 42, 20)


def snow(image: Image, severity: int, random: RandomState) -> Image:
    """Whiten the image and add blurred flakes, and the same flakes rotated by 180 degrees: `snow`."""
    mean, deviation, factor, threshold, radius, sigma, weight = SNOW[severity - 1]
    noise = random.normal(mean, deviation, size=image.shape[:2]).astype(np.float32)
    flakes = enlarge(noise, factor)
    flakes[flakes < threshold] = 0
    smeared = smear(whole_levels(255 * flakes), int(radius), sigma, random.uniform(-135, -45)).astype(np.float32)
    levels: Levels = image.astype(np.float32)
    white = cv2.cvtColor(levels, cv2.COLOR_RGB2GRAY) * 1.5 + 127.5
    levels = weight * levels + (1 - weight) * np.maximum(levels, cv2.merge([white] * 3))
    return whole_levels(levels + cv2.merge([smeared + smeared[::-1, ::-1]] * 3))


def frost(image: Image, severity: int, random: RandomState) -> Image:
    """Add a random crop of one of five photos of frost: `frost`."""
    height, width = image.shape[:2]
    overlay = _frost_photograph(FROST_PHOTOGRAPHS[random.randint(5)], height, width)
    y, x = random.randint(overlay.shape[0] - height), random.randint(overlay.shape[1] - width)
    image_weight, frost_weight = FROST[severity - 1]
    return whole_levels(image_weight * image + frost_weight * overlay[y : y + height, x : x + width])


@functools.lru_cache(maxsize=16)
def _frost_photograph(name: str, height: int, width: int) -> Image:
    """Return a photograph of frost, uint8 RGB, at least a pixel larger than (height, width) on both axes.

    It is enlarged only if it is smaller. Raises MissingInputError if the file is missing or damaged.
    """
    path = FROST_FOLDER / name
    photograph = cv2.imread(str(path))
    if photograph is None:
        raise MissingInputError(f"{path}: not a readable photograph of frost; install mae-dat again.")
    factor = max((height + 1) / photograph.shape[0], (width + 1) / photograph.shape[1])
    if factor > 1:
        size = round(photograph.shape[1] * factor), round(photograph.shape[0] * factor)
        photograph = cv2.resize(photograph, size, interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(photograph[..., ::-1])


def fog(image: Image, severity: int, random: RandomState) -> Image:
    """Add a fractal cloud, and darken the sum so that its brightest value stays: `fog`, `plasma_fractal`."""
    thickness, decay = FOG[severity - 1]
    height, width = image.shape[:2]
    side = 2 ** (max(height, width) - 1).bit_length()
    cloud = 255 * thickness * _plasma(side, decay, random)[:height, :width]
    brightest = image.max() / 255
    levels: Levels = cv2.merge([cloud] * 3)
    levels += image
    levels *= brightest / (brightest + thickness)
    return whole_levels(levels)


def _plasma(side: int, decay: float, random: RandomState) -> Levels:
    """Return a diamond-square fractal on a torus, (side, side) in [0, 1]: `plasma_fractal(mapsize, wibbledecay)`.

    `side` is a power of two. Each new point is the mean of its four neighbors plus noise, which shrinks by decay^2
    with every halved step.
    """
    field = np.zeros((side, side))
    step, amplitude = side, 100.0

    def displaced(sums: Levels) -> Levels:
        # The original also multiplies by the amplitude twice, so the noise has the range of its square.
        return sums / 4 + amplitude * random.uniform(-amplitude, amplitude, sums.shape)

    while step > 1:
        half = step // 2
        corners = field[::step, ::step]
        right, below = np.roll(corners, -1, axis=1), np.roll(corners, -1, axis=0)
        centers = displaced(corners + below + right + np.roll(right, -1, axis=0))
        field[half::step, half::step] = centers
        field[::step, half::step] = displaced(centers + np.roll(centers, 1, axis=0) + corners + right)
        field[half::step, ::step] = displaced(centers + np.roll(centers, 1, axis=1) + corners + below)
        step, amplitude = half, amplitude / decay
    field -= field.min()
    return field / field.max()


def brightness(image: Image, severity: int, random: RandomState) -> Image:
    """Raise the value of HSV: `brightness`. All channels grow by the same factor as the largest one."""
    red, green, blue = cv2.split(image)
    largest = cv2.max(cv2.max(red, green), blue)
    # A lookup table replaces the conversion to HSV and back: the new level depends only on the largest and the old one.
    index = largest.astype(np.uint16)[..., None] << 8
    return _brightened(BRIGHTNESS[severity - 1]).take(index | image)


@functools.cache
def _brightened(added: float) -> Image:
    """Return a table of new levels for every pair of the largest channel's level and a channel's level, at index
    256 * largest + level."""
    largest, level = np.arange(256)[:, None], np.arange(256)
    ratio = np.where(level < largest, level / np.maximum(largest, 1), 1)
    return whole_levels(np.minimum(largest / 255 + added, 1) * ratio * 255).ravel()


def spatter(image: Image, severity: int, random: RandomState) -> Image:
    """Add drops of water (severity 1 to 3) or mud (4, 5) on the lens: `spatter`."""
    muddy = severity > len(WATER)
    settings = MUD[severity - len(WATER) - 1] if muddy else WATER[severity - 1]
    mean, deviation, sigma, threshold = settings[:4]
    liquid = smooth(random.normal(mean, deviation, size=image.shape[:2]), sigma)
    if muddy:
        softness = settings[4]
        cover = smooth(liquid > threshold, softness)
        cover[cover < 0.8] = 0
        return whole_levels(image * (1 - cover[..., None]) + cover[..., None] * np.array(MUD_COLOR))
    opacity = settings[4]
    liquid[liquid < threshold] = 0
    depth = _water(whole_levels(255 * liquid))
    return whole_levels(image + opacity * depth[..., None] * np.array(WATER_COLOR))


def _water(liquid: Image) -> Levels:
    """Return the light that drops reflect, (H, W) in [0, 1], from their thickness, uint8 (H, W), lit from a corner."""
    distance = cv2.distanceTransform(255 - cv2.Canny(liquid, 50, 150), cv2.DIST_L2, 5)
    distance = cv2.equalizeHist(cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8))
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], dtype=np.float32)
    shade = cv2.blur(cv2.filter2D(distance, cv2.CV_8U, emboss), (3, 3)).astype(np.float32)
    shade *= liquid
    return shade / (shade.max() or 1)
