"""Weather: snow, frost, fog, brightness and spatter. Flakes and drops are in pixels, whatever the size."""

import functools
import importlib.util
from pathlib import Path

import cv2
import numpy as np
from numpy.random import RandomState

from mae_dat.config.errors import MissingInputError
from mae_dat.robustness.corruptions.blur import enlarge, smear, smooth
from mae_dat.robustness.corruptions.pixels import Image, Levels, whole_levels

# mean, deviation, enlargement and threshold of the flakes; radius and sigma of their motion; share of the picture kept
SNOW = (
    (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
    (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
    (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
    (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
    (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
)
FROST = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))  # weights of the picture and of the frost
FROST_PICTURES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
FOG = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))  # thickness, decay of the fractal from scale to scale
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
# mean, deviation, smoothing and threshold of the liquid; opacity of water, or softness of mud
WATER = ((0.65, 0.3, 4, 0.69, 0.6), (0.65, 0.3, 3, 0.68, 0.6), (0.65, 0.3, 2, 0.68, 0.5))
MUD = ((0.65, 0.3, 1, 0.65, 1.5), (0.67, 0.4, 1, 0.65, 1.5))
WATER_COLOR = (175, 238, 238)
MUD_COLOR = (63, 42, 20)


def snow(image: Image, severity: int, random: RandomState) -> Image:
    """Whitens the picture and lets flakes fall over it, and over it turned by half a turn."""
    mean, deviation, factor, threshold, radius, sigma, kept = SNOW[severity - 1]
    noise = random.normal(mean, deviation, size=image.shape[:2]).astype(np.float32)
    flakes = enlarge(noise, factor)
    flakes[flakes < threshold] = 0
    smeared = smear(whole_levels(255 * flakes), int(radius), sigma, random.uniform(-135, -45)).astype(np.float32)
    levels: Levels = image.astype(np.float32)
    white = cv2.cvtColor(levels, cv2.COLOR_RGB2GRAY) * 1.5 + 127.5
    levels = kept * levels + (1 - kept) * np.maximum(levels, cv2.merge([white] * 3))
    return whole_levels(levels + cv2.merge([smeared + smeared[::-1, ::-1]] * 3))


def frost(image: Image, severity: int, random: RandomState) -> Image:
    """Adds a random crop of one of five photographs of frost."""
    height, width = image.shape[:2]
    overlay = _frost_picture(FROST_PICTURES[random.randint(5)], height, width)
    y, x = random.randint(overlay.shape[0] - height), random.randint(overlay.shape[1] - width)
    own, other = FROST[severity - 1]
    return whole_levels(own * image + other * overlay[y : y + height, x : x + width])


@functools.lru_cache(maxsize=16)
def _frost_picture(name: str, height: int, width: int) -> Image:
    """RGB frost larger than (height, width) by a pixel or more: enlarged only where the photograph is smaller.

    Raises MissingInputError without the package that brings the photographs.
    """
    package = importlib.util.find_spec("imagecorruptions")  # found, not imported: numba would cost seconds
    if package is None or package.origin is None:
        raise MissingInputError("frost needs the pictures of a package: pip install imagecorruptions-imaug")
    path = Path(package.origin).parent / "frost" / name
    picture = cv2.imread(str(path))
    if picture is None:
        raise MissingInputError(f"{path}: no picture of frost; reinstall it: pip install imagecorruptions-imaug")
    factor = max((height + 1) / picture.shape[0], (width + 1) / picture.shape[1])
    if factor > 1:
        size = round(picture.shape[1] * factor), round(picture.shape[0] * factor)
        picture = cv2.resize(picture, size, interpolation=cv2.INTER_CUBIC)
    return np.ascontiguousarray(picture[..., ::-1])


def fog(image: Image, severity: int, random: RandomState) -> Image:
    """Adds a fractal cloud, and darkens the sum so that its brightest value stays."""
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
    """Diamond-square fractal on a torus, (side, side) in [0, 1]; `side` is a power of two.

    Each new point is the mean of its four neighbours plus noise, which shrinks by decay^2 with every halved step.
    """
    field = np.zeros((side, side))
    step, amplitude = side, 100.0

    def displaced(sums: Levels) -> Levels:
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
    """Raises the value of HSV: all channels by the factor by which the largest one grows."""
    red, green, blue = cv2.split(image)
    largest = cv2.max(cv2.max(red, green), blue)
    index = largest.astype(np.uint16)[..., None] << 8
    return _brightened(BRIGHTNESS[severity - 1]).take(index | image)


@functools.cache
def _brightened(added: float) -> Image:
    """New levels of all (largest, own) pairs of levels, at 256 largest + own."""
    largest, own = np.arange(256)[:, None], np.arange(256)
    ratio = np.where(own < largest, own / np.maximum(largest, 1), 1)
    return whole_levels(np.minimum(largest / 255 + added, 1) * ratio * 255).ravel()


def spatter(image: Image, severity: int, random: RandomState) -> Image:
    """Drops of water (severity 1 to 3) or mud on the lens."""
    muddy = severity > len(WATER)
    settings = MUD[severity - len(WATER) - 1] if muddy else WATER[severity - 1]
    mean, deviation, sigma, threshold, last = settings
    liquid = smooth(random.normal(mean, deviation, size=image.shape[:2]), sigma)
    if muddy:
        cover = smooth(liquid > threshold, last)
        cover[cover < 0.8] = 0
        return whole_levels(image * (1 - cover[..., None]) + cover[..., None] * np.array(MUD_COLOR))
    liquid[liquid < threshold] = 0
    depth = _water(whole_levels(255 * liquid))
    return whole_levels(image + last * depth[..., None] * np.array(WATER_COLOR))


def _water(liquid: Image) -> Levels:
    """How much light drops reflect: (H, W) in [0, 1], from the thickness (H, W); shaded as if lit from one corner."""
    distance = cv2.distanceTransform(255 - cv2.Canny(liquid, 50, 150), cv2.DIST_L2, 5)
    distance = cv2.equalizeHist(cv2.blur(np.minimum(distance, 20), (3, 3)).astype(np.uint8))
    emboss = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]], dtype=np.float32)
    shade = cv2.blur(cv2.filter2D(distance, cv2.CV_8U, emboss), (3, 3)).astype(np.float32)
    shade *= liquid
    return shade / (shade.max() or 1)
