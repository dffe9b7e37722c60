"""Transforms of decoded images: uint8 (3, H, W) for training (see `as_float`), float32 in [0, 1] for evaluation.

Neither is normalized: each model owns its normalization.
"""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import AugMixAugment
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision import transforms
from torchvision.transforms import functional

from mae_dat.config.groups import ImageSize
from mae_dat.data.image_set import PixelTransform, Transform, as_float, random_states, set_random_states

Step = Callable[[Any], Any]
ImagePair = tuple[Image.Image | np.ndarray, Image.Image | np.ndarray]
"""An image and its stored adversary, which may have another size."""

# ---- training ----


class PretrainTransform(PixelTransform):
    """MAE's pretraining augmentation: a random crop of 20 to 100 % of the area, bicubic, and a flip; uint8."""

    def __init__(self, size_HW: ImageSize) -> None:
        self.size_HW, self.ratio = size_HW, list(_aspect_ratios(size_HW))

    def __call__(self, image: Image.Image | np.ndarray | ImagePair) -> Tensor:
        """Return a random view of the image, uint8 (3, H, W); of a pair the same view of both, (2, 3, H, W)."""
        pixels = _channels_first(image[0] if isinstance(image, tuple) else image)
        crop = transforms.RandomResizedCrop.get_params(pixels, [0.2, 1.0], self.ratio)
        view = crop_resized(pixels, crop, self.size_HW)
        if isinstance(image, tuple):
            view = torch.stack([view, _same_crop_of(image[1], pixels, crop, self.size_HW)])
        return view.flip(-1) if torch.rand(1) < 0.5 else view


def finetune_transform(  # noqa: PLR0913 - one argument per flag
    size_HW: ImageSize,
    aa: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float | None = None,
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    interpolation: str = "bicubic",
    hflip: float = 0.5,
    views: int = 1,
    resplit: bool = False,
) -> Transform:
    """Return crop, flip, `aa` (a policy in timm's notation) or else `color_jitter`, then erasing with `reprob`.

    Maps an image to uint8 (3, H, W), or to (V, 3, H, W) for V > 1 `views` of one crop: the first is only cropped and
    flipped, and erased unless `resplit`; the others are augmented. `interpolation` of the crop is bicubic, bilinear, or
    random: one of the two for each image. AugMix has only the paper's operations.
    """
    # timm gets its default mean, which becomes the fill color of the policy. Its normalization is not used.
    timm_transform: Any = create_transform(
        (3, *size_HW),
        is_training=True,
        scale=crop_scale,
        ratio=_aspect_ratios(size_HW),
        hflip=hflip,
        color_jitter=color_jitter,  # type: ignore[arg-type] # timm's annotation forgets None
        auto_augment=aa or None,
        interpolation=interpolation,
        separate=True,
    )
    (crop, *flips), augment = timm_transform[0].transforms, timm_transform[1].transforms
    _adapt_policies(augment)
    return FinetuneTransform(
        size_HW,
        crop=crop,
        flips=flips,
        augment=augment,
        erase=EraseInRange(reprob, remode, recount) if reprob > 0 else None,
        views=views,
        resplit=resplit,
    )


# timm adds these to the paper's operations; most of them are corruptions of ImageNet-C.
_NOT_IN_AUGMIX = ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing")


def _adapt_policies(augment: Sequence[Step]) -> None:
    """Change timm's augmentation policies in place: AugMix to the paper's operations, and a safe `posterize`."""
    for policy in augment:
        if isinstance(policy, AugMixAugment):
            policy.ops = [op for op in policy.ops if op.name not in _NOT_IN_AUGMIX]
        for op in [*getattr(policy, "ops", ()), *itertools.chain(*getattr(policy, "policy", ()))]:
            if op.aug_fn is timm_posterize:
                op.aug_fn = posterize


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Posterize as timm does, but keep at least one bit.

    timm's strongest magnitudes keep none: Pillow up to release 12 returns a black image, and newer releases an error.
    """
    return timm_posterize(image, max(1, bits_to_keep))


class FinetuneTransform(PixelTransform):
    """See `finetune_transform`. `crop` is timm's; only its choice of the region is used."""

    def __init__(
        self,
        size_HW: ImageSize,
        *,
        crop: RandomResizedCropAndInterpolation,
        flips: Sequence[Step],
        augment: Sequence[Step],
        erase: "EraseInRange | None",
        views: int,
        resplit: bool,
    ) -> None:
        self.size_HW, self.crop, self.flips, self.augment, self.erase = size_HW, crop, flips, augment, erase
        self.views, self.resplit = views, resplit

    def __call__(self, image: Image.Image | np.ndarray | ImagePair) -> Tensor:
        """Return a view of the image, (3, H, W), or `views` of them, (views, 3, H, W).

        Of a pair return the same view of both, (2, 3, H, W): with the same crop, flip, augmentation and erasing.
        """
        pixels = _channels_first(image[0] if isinstance(image, tuple) else image)
        region = self.crop.get_params(pixels, self.crop.scale, self.crop.ratio)
        modes = self.crop.interpolation
        mode = (random.choice(modes) if isinstance(modes, list | tuple) else modes).value
        resized = crop_resized(pixels, region, self.size_HW, mode)
        if len(resized) != 3:
            return self._flip_and_erase(resized)
        if not isinstance(image, tuple):
            return self.augment_crop(resized)
        states = random_states()
        clean = self.augment_crop(resized)
        set_random_states(states)
        return torch.stack([clean, self.augment_crop(_same_crop_of(image[1], pixels, region, self.size_HW, mode))])

    def augment_crop(self, resized: Tensor) -> Tensor:
        """Return the view, or views, of a crop, uint8 (3, H, W)."""
        cropped = Image.fromarray(resized.permute(1, 2, 0).numpy())
        for flip in self.flips:
            cropped = flip(cropped)
        if self.views == 1:
            return self.make_view(cropped, self.augment, self.erase)
        clean = self.make_view(cropped, (), None if self.resplit else self.erase)
        return torch.stack([clean, *(self.make_view(cropped, self.augment, self.erase) for _ in range(self.views - 1))])

    def _flip_and_erase(self, pixels: Tensor) -> Tensor:
        """Flip and erase a crop (C, H, W) of other channels than color, for which there is no `augment`."""
        for flip in self.flips:
            pixels = flip(pixels)
        return self.erase(pixels) if self.erase else pixels

    def make_view(self, image: Image.Image, augment: Sequence[Step], erase: "EraseInRange | None") -> Tensor:
        """Augment and erase a crop: (3, H, W)."""
        for step in augment:
            image = step(image)
        pixels = _channels_first(image)
        return erase(pixels) if erase else pixels


class EraseInRange:
    """Random erasing of pixels (3, H, W): 8-bit ones, or float in [0, 1].

    The fill is N(0, 1) per pixel ("pixel"), per block ("rand") or 0 ("const") on the normalized scale, where the method
    was defined, clipped to [0, 1]. "pixel_raw" writes N(0, 1) into the pixels as the DAT authors' released code does,
    two thirds of it out of range: for comparisons only.
    """

    def __init__(self, probability: float, mode: str, count: int) -> None:
        if mode not in ("pixel", "rand", "const", "pixel_raw"):
            raise ValueError(f"remode {mode!r} is not one of pixel, rand, const, pixel_raw")
        self.raw = mode == "pixel_raw"
        self.erase = RandomErasing(probability, mode=mode.removesuffix("_raw"), max_count=count, device="cpu")
        self.mean = torch.tensor(IMAGENET_DEFAULT_MEAN)[:, None, None]
        self.std = torch.tensor(IMAGENET_DEFAULT_STD)[:, None, None]

    def __call__(self, image: Tensor) -> Tensor:
        """Return the image (3, H, W) with random rectangles erased."""
        canvas = self.erase(torch.full(image.shape, torch.nan))  # what is no longer nan is erased
        if self.raw:
            return torch.where(canvas.isnan(), as_float(image), canvas)
        mean, std = (self.mean, self.std) if len(image) == 3 else (0.5, 0.5)
        fill = (canvas * std + mean).clamp(0, 1)
        if image.dtype == torch.uint8:
            fill = (255 * fill).round().nan_to_num().to(torch.uint8)
        return torch.where(canvas.isnan(), image, fill)


def _aspect_ratios(size_HW: ImageSize) -> tuple[float, float]:
    """Return aspect ratios (width / height) of a crop: from 3/4 to 4/3, relative to the target's own."""
    aspect = size_HW[1] / size_HW[0]
    return (3 / 4 * aspect, 4 / 3 * aspect)


def _channels_first(image: Image.Image | np.ndarray) -> Tensor:
    """Return uint8 (3, H, W), a view of the pixels."""
    return torch.from_numpy(np.array(image) if isinstance(image, Image.Image) else image).permute(2, 0, 1)


def crop_resized(image: Tensor, crop: tuple[int, int, int, int], size_HW: ImageSize, mode: str = "bicubic") -> Tensor:
    """Crop (top, left, height, width) from uint8 (3, H, W) and resize it by an antialiased filter, bicubic or bilinear.

    This differs from PIL's filter by a hundredth of a gray level on average, and takes a fifth of the time.
    """
    top, left, height, width = crop
    region = image[None, :, top : top + height, left : left + width]
    return interpolate(region, size_HW, mode=mode, antialias=True)[0]


def _same_crop_of(
    image: Image.Image | np.ndarray,
    original: Tensor,
    crop: tuple[int, int, int, int],
    size_HW: ImageSize,
    mode: str = "bicubic",
) -> Tensor:
    """Return the crop of the original (3, H, W) from an image of its content at another size, uint8 (3, H', W')."""
    pixels = _channels_first(image)
    if pixels.shape == original.shape:
        return crop_resized(pixels, crop, size_HW, mode)
    # The borders lie between pixels here, which torch's resizing cannot express.
    top, left, height, width = crop
    scale_y, scale_x = pixels.shape[1] / original.shape[1], pixels.shape[2] / original.shape[2]
    box = (left * scale_x, top * scale_y, (left + width) * scale_x, (top + height) * scale_y)
    whole = image if isinstance(image, Image.Image) else Image.fromarray(image)
    resample = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[mode]
    return _channels_first(whole.resize((size_HW[1], size_HW[0]), resample, _inside(box, whole.size)))


def _inside(box: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Clip a box (left, top, right, bottom) to an image (width, height): rounding may pass the border by 1e-13."""
    return max(0.0, box[0]), max(0.0, box[1]), min(size[0], box[2]), min(size[1], box[3])


# ---- evaluation ----

_LONGEST_RESIZED = 16  # sides of the target: longer images are cropped before they are resized
_MARGIN = 8  # pixels beyond the crop, more than the filters reach when they enlarge


def default_crop_pct(size_HW: ImageSize) -> float:
    """Return the ratio of the crop's side to the resized image's that MAE uses: 7/8 up to 224 pixels, else 1."""
    return 224 / 256 if max(size_HW) <= 224 else 1.0


class EvalTransform:
    """Resize and center crop: float32 (3, H, W) in [0, 1].

    `crop_pct` is the ratio of the crop's side to the resized image's, as in timm (default: `default_crop_pct`). With
    `keep_size` an image that already has the target size passes unchanged; else it is resized and cropped like others.
    """

    def __init__(
        self,
        size_HW: ImageSize,
        interpolation: str = "bicubic",
        crop_pct: float | None = None,
        keep_size: bool = True,
    ) -> None:
        self.size_HW, self.keep_size = size_HW, keep_size
        self.interpolation = transforms.InterpolationMode(interpolation)
        crop_pct = crop_pct or default_crop_pct(size_HW)
        self.cover_HW = (int(size_HW[0] / crop_pct), int(size_HW[1] / crop_pct))

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the image as float32 (3, H, W) in [0, 1]."""
        return functional.to_tensor(self.resize_and_crop(image))

    def resize_and_crop(self, image: Image.Image) -> Image.Image:
        """Return the image that becomes the tensor, 8 bits per channel."""
        width, height = image.size
        if (height, width) == self.size_HW and self.keep_size:
            return image
        resized = self.resized_HW(height, width)
        longest = max(resized)
        if longest > _LONGEST_RESIZED * max(self.cover_HW):  # such as 2 x 10,000 pixels
            image, resized = self._crop_first(image, resized)
        image = functional.resize(image, list(resized), self.interpolation)
        return functional.center_crop(image, list(self.size_HW))

    def resized_HW(self, height: int, width: int) -> tuple[int, int]:
        """Return the height and width to which an image is resized before the crop."""
        cover_H, cover_W = self.cover_HW
        if cover_W * height >= cover_H * width:  # the width decides
            return max(cover_H, int(cover_W * height / width)), cover_W
        return cover_H, max(cover_W, int(cover_H * width / height))

    def _crop_first(self, image: Image.Image, resized: tuple[int, int]) -> tuple[Image.Image, tuple[int, int]]:
        """Cut the ends off a very long image, which the center crop would remove; return it, and height and width to
        resize it to."""
        sides = [image.height, image.width]
        axis = int(resized[1] > resized[0])
        scale = resized[axis] / sides[axis]
        margin = math.ceil(_MARGIN * max(1.0, 1 / scale))
        length = math.ceil(self.cover_HW[axis] / scale) + 2 * margin
        length = min(sides[axis], length + (sides[axis] - length) % 2)  # so that the center stays the center
        start = (sides[axis] - length) // 2
        new = list(resized)
        new[axis] = max(self.cover_HW[axis], round(length * scale))
        box = (start, 0, start + length, sides[0]) if axis else (0, start, sides[1], start + length)
        return image.crop(box), (new[0], new[1])


class EvalBandsTransform(PixelTransform):
    """Resize and center crop of pixels with any number of channels, in the geometry of an `EvalTransform`."""

    def __init__(self, transform: EvalTransform) -> None:
        self.transform = transform

    def __call__(self, image: Image.Image | np.ndarray) -> Tensor:
        """Return the image as float32 (C, H, W) in [0, 1]."""
        pixels, transform = _channels_first(image), self.transform
        height, width = pixels.shape[1:]
        if (height, width) != transform.size_HW or not transform.keep_size:
            resized = list(transform.resized_HW(height, width))
            pixels = functional.resize(pixels, resized, transform.interpolation, antialias=True)
            pixels = functional.center_crop(pixels, list(transform.size_HW))
        return as_float(pixels)
