"""Corruptions for tensors, arrays and PIL images from Python."""

import numpy as np
import pytest
import torch
from noise_images import noise
from PIL import Image

from mae_dat.config.errors import DataError
from mae_dat.robustness.corrupt import corrupt
from mae_dat.robustness.corruptions import corrupt_image, image_seed

PIXELS = np.stack([np.asarray(noise(40, 36, seed)) for seed in range(2)])
EXPECTED = np.stack([corrupt_image(PIXELS[i], "fog", 4, image_seed(7, i, "fog", 4)) for i in range(2)])


def test_all_kinds_of_images_get_the_same_corruption() -> None:
    tensor = torch.from_numpy(PIXELS).permute(0, 3, 1, 2)
    as_tensor = torch.from_numpy(EXPECTED).permute(0, 3, 1, 2)
    assert np.array_equal(corrupt(PIXELS, "fog", 4, seed=7), EXPECTED)
    assert np.array_equal(corrupt(PIXELS[0], "fog", 4, seed=7), EXPECTED[0])
    assert np.array_equal(np.asarray(corrupt(Image.fromarray(PIXELS[0]), "fog", 4, seed=7)), EXPECTED[0])
    assert torch.equal(corrupt(tensor, "fog", 4, seed=7), as_tensor)
    assert torch.equal(corrupt(tensor / 255, "fog", 4, seed=7), as_tensor / 255)
    assert torch.equal(corrupt(tensor[0] / 255, "fog", 4, seed=7), as_tensor[0] / 255)
    half = corrupt(tensor.half() / 255, "fog", 4, seed=7)
    assert half.dtype == torch.float16
    assert torch.equal((half.float() * 255).round(), as_tensor.float())


def test_the_images_of_a_batch_draw_differently() -> None:
    same = np.stack([PIXELS[0], PIXELS[0]])
    first, second = corrupt(same, "gaussian_noise")
    assert not np.array_equal(first, second)
    assert np.array_equal(corrupt(same, "gaussian_noise"), [first, second])
    assert not np.array_equal(corrupt(same, "gaussian_noise", seed=1)[0], first)


def test_a_gray_pil_image_becomes_rgb() -> None:
    assert corrupt(noise(40, 36).convert("L"), "contrast").mode == "RGB"


@pytest.mark.parametrize(
    "images, message",
    [
        (torch.rand(1, 1, 40, 40), r"color images .* got torch.float32 of shape \(1, 1, 40, 40\)"),
        (torch.rand(1, 3, 40, 40) * 2, r"pixels in \[0, 1\], got .* undo the normalization"),
        (torch.full((3, 40, 40), float("nan")), "undo the normalization"),
        (np.zeros((40, 40), np.uint8), r"got uint8 of shape \(40, 40\)"),
        (np.zeros((40, 40, 3), np.float32), "convert it to 8-bit RGB"),
        (torch.rand(3, 16, 40), "at least 32 px"),
        ("photo.jpg", "got str"),
    ],
)
def test_other_images_raise_an_error(images: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        corrupt(images, "fog")  # type: ignore[type-var]


def test_an_unknown_corruption_raises_an_error_with_all_names() -> None:
    with pytest.raises(ValueError, match=r"'foggy'; did you mean fog\? choose from gaussian_noise, .*saturate"):
        corrupt(PIXELS, "foggy")
    with pytest.raises(ValueError, match="severity 6"):
        corrupt(PIXELS, "fog", 6)
