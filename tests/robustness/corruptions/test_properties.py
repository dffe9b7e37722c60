"""Properties of the corruptions: size, determinism, seeds, random state and refused inputs."""

import random
import warnings

import numpy as np
import pytest
import torch

from mae_dat.config.errors import DataError
from mae_dat.robustness.corruptions import CATEGORIES, CORRUPTIONS, EXTRA, SEVERITIES, corrupt_image, image_seed


def photo(size: int = 64) -> np.ndarray:
    """An image with edges, gradients and color."""
    y, x = np.mgrid[:size, :size]
    channels = [x * 255 // size, (x // 5 + y // 5) % 2 * 200 + 20, 255 - y * 255 // size]
    return np.stack(channels, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS + EXTRA)
def test_every_corruption_works_at_64_px_and_is_deterministic(name: str) -> None:
    image = photo()
    kept = image.copy()
    first = {severity: corrupt_image(image, name, severity, seed=7) for severity in SEVERITIES}
    corrupt_image(image, "glass_blur", 2, seed=1)  # has a generator of its own, which must not carry over
    corrupt_image(image, "gaussian_noise", 2, seed=2)
    for severity, picture in first.items():
        assert picture.dtype == np.uint8
        assert picture.shape == image.shape
        assert (picture != image).any()
        np.testing.assert_array_equal(picture, corrupt_image(image, name, severity, seed=7))
    np.testing.assert_array_equal(image, kept)
    mild, strong = (np.abs(first[s].astype(int) - image).mean() for s in (1, 5))
    assert strong > mild or name in ("saturate", "spatter", "elastic_transform")


@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "glass_blur", "frost", "snow", "motion_blur"])
def test_another_seed_gives_another_image(name: str) -> None:
    assert (corrupt_image(photo(), name, 3, seed=1) != corrupt_image(photo(), name, 3, seed=2)).any()


@pytest.mark.parametrize("name", CORRUPTIONS + EXTRA)
@pytest.mark.parametrize("level", [0, 255])
def test_blank_images_raise_no_warning(name: str, level: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corrupt_image(np.full((32, 48, 3), level, dtype=np.uint8), name, 3, seed=0)


def test_global_random_state_stays_as_found() -> None:
    np.random.seed(5)
    random.seed(5)
    torch.manual_seed(5)
    expected = np.random.RandomState(5).rand(), random.Random(5).random(), torch.rand(1, generator=torch.manual_seed(5))
    torch.manual_seed(5)
    for name in CORRUPTIONS + EXTRA:
        corrupt_image(photo(32), name, 2, seed=3)
    assert (np.random.rand(), random.random(), torch.rand(1)) == expected


def test_random_state_is_restored_after_an_error() -> None:
    before = np.random.get_state()[1].tolist()
    with pytest.raises(DataError, match="at least 32 px"):
        corrupt_image(photo(31), "fog", 1, seed=0)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize(
    ("name", "severity", "named"), [("fogg", 1, "'fogg'"), ("fog", 0, "severity 0"), ("fog", 6, "severity 6")]
)
def test_unknown_corruption_or_severity_is_named(name: str, severity: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        corrupt_image(photo(32), name, severity, seed=0)


def test_only_8_bit_rgb_is_taken() -> None:
    for image in (photo(32).astype(np.float32), photo(32)[..., 0], photo(32)[..., :2]):
        with pytest.raises(DataError, match="uint8 RGB"):
            corrupt_image(image, "fog", 1, seed=0)


def test_categories_are_the_fifteen() -> None:
    assert [len(members) for members in CATEGORIES.values()] == [3, 4, 4, 4]
    assert len(set(CORRUPTIONS)) == 15
    assert not set(CORRUPTIONS) & set(EXTRA)


def test_image_seed_is_stable_and_differs_in_every_part() -> None:
    assert image_seed(0, 3, "fog", 2) == image_seed(0, 3, "fog", 2) == 3912602540
    others = {image_seed(*key) for key in [(0, 3, "fog", 2), (1, 3, "fog", 2), (0, 4, "fog", 2), (0, 3, "fog", 1)]}
    assert len(others) == 4
