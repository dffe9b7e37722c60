"""The corruptions of ImageNet-C for tensors, arrays and PIL images, in Python: `mae_dat.corrupt`."""

from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mae_dat.config.errors import DataError
from mae_dat.robustness.corruptions import check_corruption, corrupt_image, image_seed

Images = TypeVar("Images", Tensor, Image.Image)


@overload
def corrupt(images: Images, corruption: str, severity: int = 3, seed: int = 0) -> Images: ...


@overload
def corrupt(images: NDArray[np.uint8], corruption: str, severity: int = 3, seed: int = 0) -> NDArray[np.uint8]: ...


def corrupt(images: Any, corruption: str, severity: int = 3, seed: int = 0) -> Any:
    """Corrupt images as ImageNet-C does; the result has the type and shape of `images`.

    Floats are rounded to 8 bits before they are corrupted, because the corruptions are defined for 8-bit images.

    Args:
        images: a tensor (3, H, W) or (B, 3, H, W), float in [0, 1] or uint8, on any device; an array (H, W, 3) or
            (B, H, W, 3), uint8; or a PIL image, whose result is RGB. Sides of 32 pixels or more.
        corruption: gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow,
            frost, fog, brightness, contrast, elastic_transform, pixelate or jpeg_compression; or one of the 4 extra
            ones, which never count in a mean: speckle_noise, gaussian_blur, spatter or saturate.
        severity: 1 (weak) to 5 (strong).
        seed: seed of the random draws. Image i of a batch draws from (seed, i, corruption, severity) alone, on every
            machine; a single image is image 0. These are the draws of the evaluation's suite `generated` for the image
            at place i, which it then stores as JPEG.

    Raises:
        ValueError: the corruption (the message lists all) or severity is unknown.
        DataError: the images have another type, shape or range.

    Examples:
        >>> import mae_dat, torch
        >>> images = torch.rand(2, 3, 64, 64)
        >>> foggy = mae_dat.corrupt(images, "fog", severity=3)
        >>> foggy.shape, foggy.dtype
        (torch.Size([2, 3, 64, 64]), torch.float32)
    """
    check_corruption(corruption, severity)
    if isinstance(images, Image.Image):
        return Image.fromarray(_corrupt_batch(np.asarray(images.convert("RGB"))[None], corruption, severity, seed)[0])
    if isinstance(images, Tensor):
        return _corrupt_tensor(images, corruption, severity, seed)
    if not isinstance(images, np.ndarray) or images.ndim not in (3, 4):
        raise DataError(
            f"corrupt takes a tensor (B, 3, H, W), an array (H, W, 3) or a PIL image, got {_describe(images)}."
        )
    corrupted = _corrupt_batch(images if images.ndim == 4 else images[None], corruption, severity, seed)
    return corrupted if images.ndim == 4 else corrupted[0]


def _corrupt_tensor(image: Tensor, name: str, severity: int, seed: int) -> Tensor:
    """Corrupt a tensor (3, H, W) or (B, 3, H, W), on its device and in its type."""
    if image.ndim not in (3, 4) or image.shape[-3] != 3:
        raise DataError(f"corrupt takes tensors of color images (B, 3, H, W), got {_describe(image)}.")
    is_float = image.is_floating_point()
    if is_float:
        _require_unit_range(image)
    bytes_BCHW = (image.detach().float() * 255).round().to(torch.uint8) if is_float else image
    batch = bytes_BCHW.reshape(-1, *image.shape[-3:]).movedim(1, -1).cpu().numpy()
    corrupted = torch.from_numpy(_corrupt_batch(batch, name, severity, seed)).to(image.device).movedim(-1, 1)
    scaled = (corrupted.float() / 255).to(image.dtype) if is_float else corrupted
    return scaled.reshape(image.shape)


def _require_unit_range(image: Tensor) -> None:
    if image.numel() == 0:
        return
    low, high = (float(end) for end in image.detach().aminmax())
    if not (low >= -1e-6 and high <= 1 + 1e-6):
        raise DataError(f"corrupt takes pixels in [0, 1], got [{low:.4g}, {high:.4g}]: undo the normalization first.")


def _corrupt_batch(images: NDArray[Any], name: str, severity: int, seed: int) -> NDArray[np.uint8]:
    """Corrupt images, uint8 (B, H, W, 3). Raises DataError for others."""
    corrupted = [
        corrupt_image(image, name, severity, image_seed(seed, index, name, severity))
        for index, image in enumerate(images)
    ]
    return np.stack(corrupted) if corrupted else images


def _describe(images: Any) -> str:
    if isinstance(images, Tensor | np.ndarray):
        return f"{images.dtype} of shape {tuple(images.shape)}"
    return type(images).__name__
