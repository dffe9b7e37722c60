"""Generated images: ten shapes in ten textures, the data that needs no download.

The label of an image is its shape. During training the texture agrees with the class with probability `rho`, so a model
can learn either cue. In the `conflict` images the texture always belongs to another class, so a model's predictions
show which cue it learned. Every image is a pure function of (seed, split, index).

Images are uint8 arrays (H, W, 3); boxes are (x0, y0, x1, y1) in pixels, x1 and y1 exclusive. Inside this file, shapes
are polygons within about one unit of the origin, y downwards; textures are fields over (u, v), (H, W) each, in periods.
"""

import colorsys
import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

Floats = NDArray[np.floating[Any]]

SHAPES = ("disc", "square", "triangle", "star", "heart", "cross", "ring", "moon", "arrow", "bolt")
TEXTURES = ("stripes", "checks", "dots", "zigzag", "grid", "bricks", "rings", "rays", "speckle", "cells")
VARIANTS = ("iid", "conflict", "silhouette")
NO_TEXTURE = -1

DRAWING_VERSION = 1  # part of the folder's settings: raise it when a change below alters any pixel
SUPERSAMPLING = 4


@dataclasses.dataclass(frozen=True)
class GeneratedImage:
    """One image with its ground truth.

    `image` uint8 (H, W, 3); `mask` bool (H, W), true on the object; `box` the mask's extent in pixels; `shape` and
    `texture` index SHAPES and TEXTURES (texture i belongs to class i); `texture` is NO_TEXTURE for a silhouette.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    box: tuple[int, int, int, int]
    shape: int
    texture: int


# ---- shapes: polygons with their fill; a fill of 0 cuts a hole ----


def _arc(radius: float, x: float = 0.0, y: float = 0.0) -> Floats:
    angle = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return np.stack([x + radius * np.cos(angle), y + radius * np.sin(angle)], axis=1)


def _star(outer: float, inner: float) -> Floats:
    angle = np.arange(10) * np.pi / 5 - np.pi / 2
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * np.where(np.arange(10) % 2, inner, outer)[:, None]


def _heart() -> Floats:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([np.sin(t) ** 3 * 0.97, -(y + 2.5) / 15.5], axis=1)


def _polygon(corners: str) -> Floats:
    """Return corners (N, 2) from a text "x,y x,y ..." in hundredths."""
    return np.array([corner.split(",") for corner in corners.split()], dtype=np.float64) / 100


OUTLINES: dict[str, list[tuple[Floats, int]]] = {
    "disc": [(_arc(0.92), 255)],
    "square": [(_polygon("-80,-80 80,-80 80,80 -80,80"), 255)],
    "triangle": [(_polygon("0,-100 102,78 -102,78"), 255)],
    "star": [(_star(1.1, 0.5), 255)],
    "heart": [(_heart(), 255)],
    "cross": [(_polygon("-34,-98 34,-98 34,98 -34,98"), 255), (_polygon("-98,-34 98,-34 98,34 -98,34"), 255)],
    "ring": [(_arc(1.0), 255), (_arc(0.48), 0)],
    "moon": [(_arc(1.02), 255), (_arc(0.86, 0.52, -0.1), 0)],
    "arrow": [(_polygon("-100,-34 10,-34 10,-86 110,0 10,86 10,34 -100,34"), 255)],
    "bolt": [(_polygon("10,-115 -82,28 -20,28 -50,120 88,-34 20,-34 72,-115"), 255)],
}


# ---- textures: signed distance in periods from the border between the two colors ----


def _wave(x: Floats) -> Floats:
    """Return a triangle wave of period 1, from -0.25 to 0.25."""
    return np.abs(x - np.floor(x) - 0.5) - 0.25


def _gap(x: Floats) -> Floats:
    """Return the distance to the nearest whole number, 0 to 0.5."""
    return np.abs(x - np.rint(x))


def _checks(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    a, b = _wave(u / 2), _wave(v / 2)
    return 2 * np.sign(a * b) * np.minimum(np.abs(a), np.abs(b))


def _bricks(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    return np.minimum(_gap(u / 1.8 + np.floor(v) / 2) * 1.8, _gap(v)) - 0.12


def _rays(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    return _wave(np.arctan2(v, u) * (9 / (2 * np.pi))) * np.hypot(u, v) * 0.7


def _speckle(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    noise = rng.integers(0, 256, (u.shape[0] // 2 + 1, u.shape[1] // 2 + 1), dtype=np.uint8)
    field = Image.fromarray(noise).resize((u.shape[1], u.shape[0]), Image.Resampling.BICUBIC)
    return (np.asarray(field, np.float32) - 128.0) / 160.0


def _cells(u: Floats, v: Floats, rng: np.random.Generator) -> Floats:
    """Return the borders of the Voronoi cells of a jittered grid, one site per square of 1.5 periods."""
    low, high = float(min(u.min(), v.min())) - 0.7, float(max(u.max(), v.max())) + 1.5
    sites = np.mgrid[low:high:1.5, low:high:1.5].reshape(2, -1).T
    first = second = np.full(u.shape, np.inf, np.float32)
    for x, y in (sites + rng.uniform(-0.9, 0.9, sites.shape)).astype(np.float32):
        distance = np.hypot(u - x, v - y)
        first, second = np.minimum(first, distance), np.minimum(second, np.maximum(first, distance))
    return (second - first) / 2 - 0.13


TEXTURE_FIELDS: dict[str, Callable[[Floats, Floats, np.random.Generator], Floats]] = {
    "stripes": lambda u, v, rng: _wave(u),
    "checks": _checks,
    "dots": lambda u, v, rng: np.hypot(_gap(u), _gap(v)) - 0.3,
    "zigzag": lambda u, v, rng: _wave(v + 2.2 * _wave(u * 0.6)) * 0.8,
    "grid": lambda u, v, rng: np.minimum(_gap(u), _gap(v)) - 0.14,
    "bricks": _bricks,
    "rings": lambda u, v, rng: _wave(np.hypot(u, v)),
    "rays": _rays,
    "speckle": _speckle,
    "cells": _cells,
}


@dataclasses.dataclass(frozen=True)
class _Pose:
    """The object's pose: center and radius in pixels, rotation in radians."""

    x: float
    y: float
    radius: float
    angle: float

    @classmethod
    def random(cls, rng: np.random.Generator, size: int) -> "_Pose":
        radius = float(rng.uniform(0.28, 0.42)) * size
        x, y = rng.uniform(radius * 0.9, size - radius * 0.9, 2)
        return cls(float(x), float(y), radius, float(rng.uniform(-0.45, 0.45)))


def _coverage(shape: str, pose: _Pose, size: int) -> Image.Image:
    """Draw the share of each pixel that the object covers, as a gray image ("L", 255 is the whole pixel)."""
    canvas = Image.new("L", (size * SUPERSAMPLING, size * SUPERSAMPLING), 0)
    pen = ImageDraw.Draw(canvas)
    cos, sin = math.cos(pose.angle), math.sin(pose.angle)
    for outline, fill in OUTLINES[shape]:
        corners = (outline @ [[cos, sin], [-sin, cos]] * pose.radius + (pose.x, pose.y)) * SUPERSAMPLING
        pen.polygon(corners.ravel().tolist(), fill=fill)
    return canvas.reduce(SUPERSAMPLING)


def _texture(name: str, pose: _Pose, size: int, rng: np.random.Generator) -> Floats:
    """Draw a texture over the whole image, float32 (H, W), 0 to 1 between its two colors.

    Rings and rays are centered on the object.
    """
    period, angle = float(rng.uniform(0.09, 0.16)) * size, float(rng.uniform(0, np.pi))
    shift_u, shift_v = (0.0, 0.0) if name in ("rings", "rays") else rng.uniform(0, 1, 2)
    centers = np.arange(size, dtype=np.float32) + 0.5
    x, y = (centers[None, :] - pose.x) / period, (centers[:, None] - pose.y) / period
    u = x * math.cos(angle) + y * math.sin(angle) + shift_u
    v = y * math.cos(angle) - x * math.sin(angle) + shift_v
    distance = TEXTURE_FIELDS[name](u.astype(np.float32), v.astype(np.float32), rng)
    return np.clip(distance * period + 0.5, 0, 1).astype(np.float32)


def _color(hue: float, saturation: float, value: float) -> Floats:
    return np.array(colorsys.hsv_to_rgb(hue % 1.0, saturation, value), dtype=np.float32) * 255


def _background(rng: np.random.Generator, size: int) -> tuple[Image.Image, float]:
    """Draw a cloudy, dull background with strokes and blots unlike the objects; returns it and its hue."""
    hue, saturation, value = (float(x) for x in rng.uniform((0, 0.08, 0.35), (1, 0.35, 0.8)))
    clouds = _color(hue, saturation, value) * rng.uniform(0.82, 1.15, (6, 6, 1)) + rng.uniform(-10, 10, (6, 6, 3))
    scaled = size * 2
    sky = Image.fromarray(np.clip(clouds, 0, 255).astype(np.uint8))
    canvas = sky.resize((scaled, scaled), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(canvas)
    for x, y, dx, dy, shade, kind in rng.uniform(0, 1, (int(rng.integers(5, 11)), 6)):
        ink = _color(hue + 0.1 * (dx - 0.5), saturation, value + 0.4 * shade - 0.22)
        fill = tuple(int(c) for c in np.clip(ink, 0, 255))
        x, y, dx, dy = scaled * x, scaled * y, scaled * (dx - 0.5), scaled * (dy - 0.5)
        if kind < 0.6:
            pen.line([x, y, x + dx, y + dy], fill=fill, width=max(1, round(scaled * (0.012 + 0.03 * shade))))
        else:
            pen.ellipse([x, y, x + scaled * 0.03 + abs(dx) / 4, y + scaled * 0.03 + abs(dy) / 4], fill=fill)
    return canvas.reduce(2), hue


def _object_colors(rng: np.random.Generator, background_hue: float) -> tuple[Floats, Floats]:
    """Choose a light and a dark color with other hues than the background, so that outlines stay visible."""
    hue = background_hue + float(rng.uniform(0.2, 0.8))
    light = _color(hue + float(rng.uniform(-0.08, 0.08)), float(rng.uniform(0.3, 0.75)), float(rng.uniform(0.88, 1.0)))
    dark = _color(hue + float(rng.uniform(-0.25, 0.25)), float(rng.uniform(0.6, 0.95)), float(rng.uniform(0.3, 0.55)))
    fade = float(rng.uniform(0.2, 0.7))  # a faint texture leaves the outline as the better cue
    shift = (dark - light) * (fade / 2)
    light, dark = light + shift, dark - shift
    return (light, dark) if rng.random() < 0.5 else (dark, light)


def _scene(texture: str, cover: Image.Image, pose: _Pose, size: int, rng: np.random.Generator) -> Floats:
    """Draw background, soft shadow, textured object and light noise; (H, W, 3) in 0 to 255."""
    backdrop, hue = _background(rng, size)
    first, second = _object_colors(rng, hue)
    weight = _texture(texture, pose, size, rng)[..., None]
    side = np.arange(size, dtype=np.float32)
    slope = ((side - pose.x) + (side[:, None] - pose.y)) / (2 * pose.radius)
    light = np.clip(1.0 - 0.15 * slope, 0.8, 1.2)[..., None]  # from above left
    surface = (first + (second - first) * weight) * light
    unit = size / 64
    shadow = cover.transform(cover.size, Image.Transform.AFFINE, (1, 0, -round(1.5 * unit), 0, 1, -round(2 * unit)))
    shadow = shadow.filter(ImageFilter.GaussianBlur(1.6 * unit))
    ground = np.asarray(backdrop, np.float32) * (1 - np.asarray(shadow, np.float32)[..., None] * (0.5 / 255))
    alpha = np.asarray(cover, np.float32)[..., None] / 255
    noise = rng.standard_normal((size, size, 3), dtype=np.float32) * float(rng.uniform(1.5, 5.0))
    return ground + (surface - ground) * alpha + noise


def _silhouette(cover: Image.Image, rng: np.random.Generator) -> Floats:
    """Draw a flat dark object on a plain light ground; (H, W, 3) in 0 to 255."""
    ground, ink = float(rng.uniform(225, 250)), float(rng.uniform(10, 45))
    alpha = np.asarray(cover, np.float32)[..., None] / 255
    return np.broadcast_to(ground + (ink - ground) * alpha, (*alpha.shape[:2], 3))


def _choose_texture(rng: np.random.Generator, shape: int, variant: str, rho: float) -> int:
    agrees, other = rng.random() < rho, int(rng.integers(1, len(TEXTURES)))
    if variant == "silhouette":
        return NO_TEXTURE
    return shape if agrees and variant == "iid" else (shape + other) % len(TEXTURES)


def _extent(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def draw_image(
    seed: int, split: str, index: int, variant: str = "iid", rho: float = 0.9, size: int = 64
) -> GeneratedImage:
    """Draw the image of this (seed, split, index); its class is `index % 10`.

    The variants of one index share pose and outline, so they can be compared image by image. `rho` in [0, 1] is the
    probability that an `iid` image has the texture of its class. `size` >= 16 is the side in pixels. Raises ValueError
    for other values.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is not one of {', '.join(VARIANTS)}")
    if size < 16 or not 0 <= rho <= 1:
        raise ValueError(f"size must be at least 16 and rho in [0, 1]; got size {size}, rho {rho}")
    rng = np.random.default_rng([seed, zlib.crc32(split.encode()), index])
    shape = index % len(SHAPES)
    pose = _Pose.random(rng, size)
    texture = _choose_texture(rng, shape, variant, rho)
    cover = _coverage(SHAPES[shape], pose, size)
    if texture == NO_TEXTURE:
        pixels = _silhouette(cover, rng)
    else:
        pixels = _scene(TEXTURES[texture], cover, pose, size=size, rng=rng)
    mask = np.asarray(cover) >= 128
    image = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return GeneratedImage(image, mask=mask, box=_extent(mask), shape=shape, texture=texture)
