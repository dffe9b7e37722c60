"""Corruptions of pictures, numbers from counts by hand, and pictures of conflicting cues."""

import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_dat.config.errors import DataError, MissingInputError
from mae_dat.data.generated.draw import SHAPES
from mae_dat.robustness.corruptions import CATEGORIES, CORRUPTIONS, EXTRA, SEVERITIES, corrupt, image_seed
from mae_dat.robustness.scores.accuracy import (
    CorruptionCounts,
    Count,
    SeedStatistics,
    category_errors,
    cue_coverage,
    severity_errors,
    shape_bias,
    unnormalized_mce,
)
from mae_dat.robustness.suites.labels import read_conflicts


def photo(size: int = 64) -> np.ndarray:
    """A picture with edges, gradients and colour."""
    y, x = np.mgrid[:size, :size]
    channels = [x * 255 // size, (x // 5 + y // 5) % 2 * 200 + 20, 255 - y * 255 // size]
    return np.stack(channels, axis=-1).astype(np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS + EXTRA)
def test_every_corruption_works_at_64_px_and_is_deterministic(name: str) -> None:
    image = photo()
    kept = image.copy()
    first = {severity: corrupt(image, name, severity, seed=7) for severity in SEVERITIES}
    corrupt(image, "glass_blur", 2, seed=1)  # has a generator of its own, which must not carry over
    corrupt(image, "gaussian_noise", 2, seed=2)
    for severity, picture in first.items():
        assert picture.dtype == np.uint8
        assert picture.shape == image.shape
        assert (picture != image).any()
        np.testing.assert_array_equal(picture, corrupt(image, name, severity, seed=7))
    np.testing.assert_array_equal(image, kept)
    mild, strong = (np.abs(first[s].astype(int) - image).mean() for s in (1, 5))
    assert strong > mild or name in ("saturate", "spatter", "elastic_transform")


@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "glass_blur", "frost", "snow", "motion_blur"])
def test_another_seed_gives_another_picture(name: str) -> None:
    assert (corrupt(photo(), name, 3, seed=1) != corrupt(photo(), name, 3, seed=2)).any()


@pytest.mark.parametrize("name", CORRUPTIONS + EXTRA)
@pytest.mark.parametrize("level", [0, 255])
def test_blank_pictures_raise_no_warning(name: str, level: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        corrupt(np.full((32, 48, 3), level, dtype=np.uint8), name, 3, seed=0)


def test_global_random_state_stays_as_found() -> None:
    np.random.seed(5)
    random.seed(5)
    torch.manual_seed(5)
    expected = np.random.RandomState(5).rand(), random.Random(5).random(), torch.rand(1, generator=torch.manual_seed(5))
    torch.manual_seed(5)
    for name in CORRUPTIONS + EXTRA:
        corrupt(photo(32), name, 2, seed=3)
    assert (np.random.rand(), random.random(), torch.rand(1)) == expected


def test_random_state_is_restored_after_an_error() -> None:
    before = np.random.get_state()[1].tolist()
    with pytest.raises(DataError, match="at least 32 px"):
        corrupt(photo(31), "fog", 1, seed=0)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize(
    ("name", "severity", "named"), [("fogg", 1, "'fogg'"), ("fog", 0, "severity 0"), ("fog", 6, "severity 6")]
)
def test_unknown_corruption_or_severity_is_named(name: str, severity: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        corrupt(photo(32), name, severity, seed=0)


def test_only_8_bit_rgb_is_taken() -> None:
    for image in (photo(32).astype(np.float32), photo(32)[..., 0], photo(32)[..., :2]):
        with pytest.raises(DataError, match="uint8 RGB"):
            corrupt(image, "fog", 1, seed=0)


def test_categories_are_the_fifteen() -> None:
    assert [len(members) for members in CATEGORIES.values()] == [3, 4, 4, 4]
    assert len(set(CORRUPTIONS)) == 15
    assert not set(CORRUPTIONS) & set(EXTRA)


def test_image_seed_is_stable_and_differs_in_every_part() -> None:
    assert image_seed(0, 3, "fog", 2) == image_seed(0, 3, "fog", 2) == 3912602540
    others = {image_seed(*key) for key in [(0, 3, "fog", 2), (1, 3, "fog", 2), (0, 4, "fog", 2), (0, 3, "fog", 1)]}
    assert len(others) == 4


def cells(errors: dict[str, list[int]]) -> CorruptionCounts:
    """Scores with the given errors (in percent) of 100 pictures at severities 1, 2 ..."""
    table: dict[str, dict[str, Count]] = {
        name: {str(s): {"correct": 100 - wrong, "total": 100} for s, wrong in enumerate(row, 1)}
        for name, row in errors.items()
    }
    return {"clean": {"correct": 90, "total": 100}, "corruptions": table}


def test_means_by_hand() -> None:
    scores = cells({"gaussian_noise": [10, 30], "shot_noise": [40], "fog": [0, 2], "saturate": [90, 90]})
    assert category_errors(scores) == {"noise": 30.0, "weather": 1.0}
    assert unnormalized_mce(scores) == pytest.approx((20 + 40 + 1) / 3)  # saturate is held out
    assert severity_errors(scores, CORRUPTIONS) == {1: pytest.approx(50 / 3), 2: 16.0}
    with pytest.raises(ValueError, match="none of the 15"):
        unnormalized_mce(cells({"saturate": [50]}))


def test_shape_bias_by_hand() -> None:
    assert shape_bias({"correct": 3, "shape": 3, "texture": 1, "total": 8}) == 0.75
    assert cue_coverage({"correct": 3, "shape": 3, "texture": 1, "total": 8}) == 0.5
    assert shape_bias({"correct": 0, "shape": 0, "texture": 0, "total": 8}) is None


def test_statistics_over_seeds() -> None:
    stat = SeedStatistics.of([1.0, None, 3.0])
    assert stat is not None
    assert (stat.mean, stat.n, stat.text()) == (2.0, 2, "2.0 ± 1.4")
    assert SeedStatistics.of([4.25]) == SeedStatistics(4.25, None, 1)
    assert SeedStatistics.of([None]) is None


def test_conflict_pictures_are_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "disc").mkdir()
    for name in ("disc/disc-checks-00001.png", "disc/disc-stripes-00002.png", "square-stripes-x-1.png"):
        Image.fromarray(photo(32)).save(tmp_path / name)
    listing, cues = read_conflicts(tmp_path, SHAPES)
    assert listing == [("disc/disc-checks-00001.png", 0), ("square-stripes-x-1.png", 1)]
    assert cues.tolist() == [[0, 1], [1, 0]]  # disc with stripes, its own texture, is left out
    for path in tmp_path.rglob("*.png"):
        path.rename(tmp_path / "cat-dog-1.png")
    assert read_conflicts(tmp_path, ["cat", "dog"])[1].tolist() == [[0, 1]]


def test_a_conflict_picture_of_any_kind_counts_and_class_names_may_hold_hyphens(tmp_path: Path) -> None:
    names = ["hat-shirt.png", "hat-t-shirt-1.JPG", "shirt-hat-1.jpeg", "t-shirt-hat-a-b.webp", "t-shirt-shirt-1.png"]
    for name in names:
        Image.fromarray(photo(32)).save(tmp_path / name)
    (tmp_path / "._hat-shirt.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("about")
    listing, cues = read_conflicts(tmp_path, ["hat", "shirt", "t-shirt"])
    assert listing == list(zip(names, [0, 0, 1, 2, 2], strict=True))
    assert cues.tolist() == [[0, 1], [0, 2], [1, 0], [2, 0], [2, 1]]


def test_conflict_folder_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="nowhere"):
        read_conflicts(tmp_path / "nowhere", ["a", "b"])
    with pytest.raises(DataError, match="no picture named"):
        read_conflicts(tmp_path, ["a", "b"])
    (tmp_path / "a-b-1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a-b-1\.png: expected <shape>-<texture>-\*, a shape such as a, c"):
        read_conflicts(tmp_path, ["a", "c"])
    (tmp_path / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"a\.jpg: expected"):
        read_conflicts(tmp_path, ["a", "b"])
    (tmp_path / "a-b-1.png").unlink()
    (tmp_path / "a.jpg").rename(tmp_path / "a-b-c.jpg")
    with pytest.raises(DataError, match=r"a-b-c\.jpg may be the shape 'a' with the texture 'b-c' or the shape 'a-b' "):
        read_conflicts(tmp_path, ["a", "a-b", "b-c", "c"])
