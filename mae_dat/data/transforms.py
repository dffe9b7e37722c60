"""Transforms of decoded pictures: to float32 (3, H, W) in [0, 1] for evaluation, to uint8 (3, H, W) for training
(`as_float`), never normalised."""

import itertools
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
from mae_dat.data.image_set import PixelTransform, Transform, as_float

Step = Callable[[Image.Image], Image.Image]
NOT_IN_AUGMIX = ("ColorIncreasing", "ContrastIncreasing", "BrightnessIncreasing", "SharpnessIncreasing")


def _crop_ratio(size_HW: ImageSize) -> tuple[float, float]:
    """Aspect ratios (width / height) from 3/4 to 4/3, relative to the target's own."""
    aspect = size_HW[1] / size_HW[0]
    return (3 / 4 * aspect, 4 / 3 * aspect)


def pretrain_transform(size_HW: ImageSize) -> Transform:
    """MAE's pretraining augmentation: a random crop of 20 to 100 % of the area, bicubic, and a flip; uint8."""
    return PretrainTransform(size_HW)


class PretrainTransform(PixelTransform):
    """See `pretrain_transform`."""

    def __init__(self, size_HW: ImageSize) -> None:
        self.size_HW, self.ratio = size_HW, list(_crop_ratio(size_HW))

    def __call__(self, picture: Image.Image | np.ndarray) -> Tensor:
        image = _channels_first(picture)
        crop = transforms.RandomResizedCrop.get_params(image, [0.2, 1.0], self.ratio)
        image = crop_resized(image, crop, self.size_HW)
        return image.flip(-1) if torch.rand(1) < 0.5 else image


def _channels_first(picture: Image.Image | np.ndarray) -> Tensor:
    """uint8 (3, H, W), a view of the pixels."""
    return torch.from_numpy(np.array(picture) if isinstance(picture, Image.Image) else picture).permute(2, 0, 1)


def crop_resized(image: Tensor, crop: tuple[int, int, int, int], size_HW: ImageSize) -> Tensor:
    """The part (top, left, height, width) of uint8 (3, H, W), resized by an antialiased bicubic filter.

    PIL's own filter, of which it differs by a hundredth of a grey level on average, in a fifth of the time.
    """
    top, left, height, width = crop
    part = image[None, :, top : top + height, left : left + width]
    return interpolate(part, size_HW, mode="bicubic", antialias=True)[0]


class EraseInRange:
    """Random erasing of pixels (3, H, W): 8-bit ones, or float in [0, 1].

    The fill is N(0, 1) per pixel ("pixel"), per block ("rand") or 0 ("const") on the normalised scale, where the method
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
        canvas = self.erase(torch.full(image.shape, torch.nan))  # what is no longer nan is erased
        if self.raw:
            return torch.where(canvas.isnan(), as_float(image), canvas)
        fill = (canvas * self.std + self.mean).clamp(0, 1)
        if image.dtype == torch.uint8:
            fill = (255 * fill).round().nan_to_num().to(torch.uint8)
        return torch.where(canvas.isnan(), image, fill)


def finetune_transform(
    size_HW: ImageSize,
    aa: str | None = "rand-m9-mstd0.5-inc1",
    color_jitter: float | None = None,
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
    crop_scale: tuple[float, float] = (0.08, 1.0),
    hflip: float = 0.5,
    views: int = 1,
    resplit: bool = False,
) -> Transform:
    """Crop, flip, `aa` (a policy in timm's notation) or else `color_jitter`, then erasing with probability `reprob`.

    With several `views`, (V, 3, H, W), the first is cropped and flipped alone, and erased too unless `resplit`; the
    others start from the same crop. AugMix is the paper's: without the operations that timm adds, most of which are
    corruptions of ImageNet-C.
    """
    jitter: Any = color_jitter  # timm's annotation forgets None
    flow: Any = create_transform(
        (3, *size_HW),
        is_training=True,
        scale=crop_scale,
        ratio=_crop_ratio(size_HW),
        hflip=hflip,
        color_jitter=jitter,
        auto_augment=aa or None,
        interpolation="bicubic",
        separate=True,
    )
    # created with timm's default mean, which is the policy's fill colour; the normalisation itself is the network's
    (crop, *flips), augment = flow[0].transforms, flow[1].transforms
    for policy in augment:
        if isinstance(policy, AugMixAugment):
            policy.ops = [op for op in policy.ops if op.name not in NOT_IN_AUGMIX]
        for op in [*getattr(policy, "ops", ()), *itertools.chain(*getattr(policy, "policy", ()))]:
            if op.aug_fn is timm_posterize:
                op.aug_fn = posterize
    erase = EraseInRange(reprob, remode, recount) if reprob > 0 else None
    return FinetuneTransform(size_HW, crop, flips, augment, erase, views, resplit)


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """timm's, but for its strongest magnitudes, which keep no bit at all: Pillow draws them black up to release 12 and
    refuses them since. One bit stays."""
    return timm_posterize(image, max(1, bits_to_keep))


class FinetuneTransform(PixelTransform):
    """See `finetune_transform`. `crop` is timm's, of which only the choice of the part is used."""

    def __init__(
        self,
        size_HW: ImageSize,
        crop: RandomResizedCropAndInterpolation,
        flips: Sequence[Step],
        augment: Sequence[Step],
        erase: EraseInRange | None,
        views: int,
        resplit: bool,
    ) -> None:
        self.size_HW, self.crop, self.flips, self.augment, self.erase = size_HW, crop, flips, augment, erase
        self.views, self.resplit = views, resplit

    def __call__(self, picture: Image.Image | np.ndarray) -> Tensor:
        image = _channels_first(picture)
        image = crop_resized(image, self.crop.get_params(image, self.crop.scale, self.crop.ratio), self.size_HW)
        small = Image.fromarray(image.permute(1, 2, 0).numpy())
        for step in self.flips:
            small = step(small)
        if self.views == 1:
            return self.view(small, self.augment, self.erase)
        clean = self.view(small, (), None if self.resplit else self.erase)
        return torch.stack([clean, *(self.view(small, self.augment, self.erase) for _ in range(self.views - 1))])

    def view(self, picture: Image.Image, augment: Sequence[Step], erase: EraseInRange | None) -> Tensor:
        """A crop, augmented and erased: (3, H, W)."""
        for step in augment:
            picture = step(picture)
        image = _channels_first(picture)
        return erase(image) if erase else image


def default_crop_pct(size_HW: ImageSize) -> float:
    """The crop's side over the resized picture's, where nothing else is asked: as MAE evaluates."""
    return 224 / 256 if max(size_HW) <= 224 else 1.0


class EvalTransform:
    """See `eval_transform`. `share` is the crop's side over the resized image's; without `keep` an image of the target
    size is resized and cropped like any other."""

    def __init__(
        self, size_HW: ImageSize, interpolation: str = "bicubic", share: float | None = None, keep: bool = True
    ) -> None:
        self.size_HW, self.keep = size_HW, keep
        self.interpolation = transforms.InterpolationMode(interpolation)
        share = share or default_crop_pct(size_HW)
        self.cover_HW = (int(size_HW[0] / share), int(size_HW[1] / share))

    def __call__(self, image: Image.Image) -> Tensor:
        return functional.to_tensor(self.resize_and_crop(image))

    def resize_and_crop(self, image: Image.Image) -> Image.Image:
        """The picture that becomes the tensor, 8 bits a channel."""
        width, height = image.size
        if (height, width) != self.size_HW or not self.keep:
            cover_H, cover_W = self.cover_HW
            if cover_W * height >= cover_H * width:  # the width decides
                resized = (max(cover_H, int(cover_W * height / width)), cover_W)
            else:
                resized = (cover_H, max(cover_W, int(cover_H * width / height)))
            image = functional.resize(image, list(resized), self.interpolation)
            image = functional.center_crop(image, list(self.size_HW))
        return image


def eval_transform(size_HW: ImageSize) -> Transform:
    """Resize (bicubic) and centre crop: up to 224 the crop is 7/8 of the resized image (256 for 224), above all of it.

    An image that already has the target size passes unchanged.
    """
    return EvalTransform(size_HW)
