"""Our corruptions against the recorded output of the code that made ImageNet-C, of ImageMagick, and against plain
loops.
"""

import hashlib
import importlib.metadata
import json
import math
import platform
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import PIL.Image
import pytest
import scipy.ndimage
from scipy.stats import chisquare, poisson

from mae_dat.config.errors import DataError, MissingInputError
from mae_dat.robustness.corruptions import CORRUPTIONS, EXTRA, SEVERITIES, as_stored, corrupt_image
from mae_dat.robustness.corruptions.blur import DEFOCUS, GAUSSIAN_SIGMA, GLASS, _disk, _smooth_levels, enlarge, smear
from mae_dat.robustness.corruptions.digital import _gaussian_gain
from mae_dat.robustness.corruptions.noise import IMPULSE_SHARE, SHOT_PHOTONS
from mae_dat.robustness.corruptions.weather import FROST_FOLDER, FROST_PHOTOGRAPHS, _frost_photograph

ROOT = Path(__file__).parents[3]
GOLDEN = ROOT / "tests" / "golden"
ALL = CORRUPTIONS + EXTRA
CASES = [(name, severity) for name in ALL for severity in SEVERITIES]
OTHER_DRAWS = ("shot_noise", "impulse_noise")  # by inversion; the original's generator was not seeded

# How far an image may be from the original's, in levels: in mean over all pixels, and in any one of them.
# At severity 3 saturate doubles: whole levels, where rounding errors decide what truncation leaves.
MEAN_BOUND = {"saturate": 0.3}

CAPTURED = {"capture_output": True, "text": True}

Arrays = dict[str, np.ndarray]


@pytest.fixture
def recorded(golden: Callable[[str], Arrays]) -> Arrays:
    """The generated image under `input`; the corners (48, 48, 3) of what the original and ImageMagick make of it."""
    return golden("corruptions")


@pytest.fixture(scope="module")
def ours() -> Arrays:
    """All 95 of our images with seed 0, as the original was recorded with."""
    with np.load(GOLDEN / "corruptions.npz") as archive:
        image = archive["input"]
    return {f"{name}/{severity}": corrupt_image(image, name, severity, seed=0) for name, severity in CASES}


def noise_picture(height: int, width: int) -> np.ndarray:
    """Every level, no two neighbors alike."""
    return np.random.RandomState(height).randint(0, 256, size=(height, width, 3)).astype(np.uint8)


def distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return np.abs(one.astype(int) - other)


@pytest.mark.parametrize("name", [name for name in ALL if name not in OTHER_DRAWS])
def test_pixels_are_the_originals(name: str, recorded: Arrays, ours: Arrays) -> None:
    """Also of the random ones: the same numbers are drawn in the same order."""
    apart = distance(ours[f"{name}/3"][:48, :48], recorded[f"original__{name}"])
    assert apart.mean() <= MEAN_BOUND.get(name, 0.02)
    assert apart.max() <= 1


@pytest.mark.parametrize("name", ALL)
def test_statistics_are_the_originals_at_every_severity(name: str, recorded: Arrays, ours: Arrays) -> None:
    original = json.loads((GOLDEN / "corruptions_original.json").read_text())
    bound = 0.6 if name in OTHER_DRAWS else MEAN_BOUND.get(name, 0.05)
    for severity in SEVERITIES:
        picture = ours[f"{name}/{severity}"]
        found = {
            "mean": picture.mean(),
            "deviation": picture.std(),
            "change": distance(picture, recorded["input"]).mean(),
        }
        assert found == pytest.approx(original[f"{name}/{severity}"], abs=bound)


@pytest.mark.parametrize("name", ["motion_blur", "snow"])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_motion_is_that_of_imagemagick(name: str, severity: int, recorded: Arrays, ours: Arrays) -> None:
    """Recorded with ImageMagick 6.9.11 itself in the original's steps, of which the last is an 8-bit PNG."""
    apart = distance(ours[f"{name}/{severity}"][:48, :48], recorded[f"imagemagick__{name}_{severity}"])
    assert apart.mean() < 0.01


def test_images_are_those_of_the_last_release(ours: Arrays) -> None:
    """A change here changes everyone's numbers. If it is meant, write the new hashes and tell it in the release."""
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    installed = {name: importlib.metadata.version(name) for name in ("numpy", "scipy", "pillow")}
    installed["opencv-python-headless"] = cv2.version.opencv_version  # of whichever build is imported
    for package, version in installed.items():
        if version != pinned[package]:
            pytest.skip(f"the hashes hold for {package} {pinned[package]}")
    if platform.machine() != "x86_64":
        pytest.skip("the hashes hold for x86-64 (with AVX2): elsewhere the last bit of a float may differ")
    hashes = {key: hashlib.sha1(picture.tobytes()).hexdigest()[:12] for key, picture in ours.items()}
    assert hashes == json.loads((GOLDEN / "corruptions_ours.json").read_text())


@pytest.mark.parametrize("severity", SEVERITIES)
def test_shot_noise_follows_the_poisson_distribution(severity: int) -> None:
    photons = SHOT_PHOTONS[severity - 1]
    counts = np.arange(photons + 1)
    levels = (counts / photons * 255).astype(int)
    for value in (1, 40, 128, 255):
        drawn = corrupt_image(np.full((200, 200, 3), value, dtype=np.uint8), "shot_noise", severity, seed=5)
        observed = np.array([(drawn == level).sum() for level in levels])
        assert observed.sum() == drawn.size
        law = poisson(value / 255 * photons)
        expected = drawn.size * np.append(law.pmf(counts[:-1]), law.sf(photons - 1))
        common = expected > 5
        observed, expected = (np.append(n[common], n[~common].sum() + 1e-9) for n in (observed, expected))
        assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4
    assert not corrupt_image(np.zeros((32, 32, 3), dtype=np.uint8), "shot_noise", severity, seed=5).any()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_impulse_noise_hits_its_share_in_every_channel_alone(severity: int) -> None:
    share = IMPULSE_SHARE[severity - 1]
    drawn = corrupt_image(np.full((300, 300, 3), 100, dtype=np.uint8), "impulse_noise", severity, seed=5)
    for level in (0, 255):
        assert (drawn == level).mean((0, 1)) == pytest.approx([share / 2] * 3, rel=0.1)
    assert set(np.unique(drawn)) == {0, 100, 255}
    assert (drawn != 100).all(axis=2).mean() == pytest.approx(share**3, rel=0.35, abs=5e-5)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_glass_is_the_pixel_by_pixel_loop(severity: int) -> None:
    """The loop of the original, with its copies where swaps were meant."""
    image = noise_picture(33, 47)
    sigma, reach, rounds = GLASS[severity - 1]
    generator = np.random.RandomState(9)
    slow = _smooth_levels(image, sigma)
    for _ in range(rounds):
        for y in range(33 - reach, reach, -1):
            for x in range(47 - reach, reach, -1):
                right, down = generator.randint(-reach, reach, size=2)
                slow[y, x] = slow[y + down, x + right]
    slow = _smooth_levels(slow, sigma)
    np.testing.assert_array_equal(corrupt_image(image, "glass_blur", severity, seed=9), slow)


def white_picture() -> np.ndarray:
    """Noise on the left, white on the right, and every level in the bands between."""
    image = np.full((128, 160, 3), 255, dtype=np.uint8)
    image[:, :40] = noise_picture(128, 40)
    image[:, 40:100] = np.arange(256).reshape(16, 16).repeat(8, axis=0).repeat(4, axis=1)[:, :60, None]
    return image


@pytest.mark.parametrize("severity", SEVERITIES)
def test_blurred_white_areas_are_the_originals(severity: int) -> None:
    """Its float64 filters leave some plain areas just below their level, and truncate them to the next lower one."""
    image = white_picture()
    radius, sigma = DEFOCUS[severity - 1]
    defocused = np.clip(cv2.filter2D(image / 255, -1, _disk(radius, sigma)), 0, 1) * 255
    sigma = GAUSSIAN_SIGMA[severity - 1]
    blurred = scipy.ndimage.gaussian_filter(image / 255, (sigma, sigma, 0), mode="nearest") * 255
    for name, original in (("defocus_blur", defocused), ("gaussian_blur", blurred)):
        apart = distance(corrupt_image(image, name, severity, seed=0), original.astype(np.uint8))
        assert apart.mean() < 0.02
        assert apart.max() <= 1


@pytest.mark.parametrize("severity", SEVERITIES)
def test_glass_before_white_is_the_originals(severity: int) -> None:
    white = np.full((64, 64, 3), 255, dtype=np.uint8)
    sigma = GLASS[severity - 1][0]
    level = np.uint8(scipy.ndimage.gaussian_filter(white / 255, (sigma, sigma, 0), mode="nearest") * 255)[0, 0, 0]
    level = np.uint8(scipy.ndimage.gaussian_filter(0 * white + level / 255, (sigma, sigma, 0), mode="nearest") * 255)
    np.testing.assert_array_equal(corrupt_image(white, "glass_blur", severity, seed=0), level)


@pytest.mark.parametrize("angle", [-100.0, -45.0, 0.0, 30.0, 90.0, 135.0])
@pytest.mark.parametrize("shape", [(33, 47), (33, 47, 3)])
def test_smear_weighs_the_pixels_along_the_line(angle: float, shape: tuple[int, ...]) -> None:
    image = noise_picture(33, 47).reshape(33, 47, 3)[..., : math.prod(shape[2:]) or 1].reshape(shape)
    weights = np.exp(-(np.arange(31) ** 2) / (2 * 12**2))
    slow = np.zeros(shape)
    for place, weight in enumerate(weights / weights.sum()):
        down, right = (math.ceil(place * f(math.radians(angle)) - 0.5) for f in (math.sin, math.cos))
        y, x = np.clip(np.arange(33) + down, 0, 32), np.clip(np.arange(47) + right, 0, 46)
        slow += weight * image[np.ix_(y, x)]
    dropped = slow - smear(image, 15, 12, angle)
    assert dropped.min() >= -0.004  # as ImageMagick's PNG encoder, and not rounded
    assert dropped.max() < 1


@pytest.mark.parametrize("factor", [1.01, 1.28, 2, 2.5, 4.5])
def test_enlarging_is_scipys_zoom_of_the_middle(factor: float) -> None:
    image = noise_picture(40, 65).astype(np.float32)
    kept = [math.ceil(side / factor) for side in (40, 65)]
    top, left = ((side - k) // 2 for side, k in zip((40, 65), kept, strict=True))
    middle = image[top : top + kept[0], left : left + kept[1]]
    slow = scipy.ndimage.zoom(middle, (factor, factor, 1), order=1)
    top, left = (slow.shape[0] - 40) // 2, (slow.shape[1] - 65) // 2
    np.testing.assert_allclose(enlarge(image, factor), slow[top : top + 40, left : left + 65], atol=0.02)


@pytest.mark.parametrize("sigma", [0.4, 2.44, 30.0, 170.8])
def test_the_elastic_filter_is_a_reflecting_gaussian(sigma: float) -> None:
    """Also where its kernel is many times longer than the image."""
    impulse = np.random.RandomState(0).uniform(-1, 1, size=50)
    slow = scipy.ndimage.gaussian_filter1d(impulse, sigma, mode="reflect", truncate=3)
    fast = scipy.fft.idct(scipy.fft.dct(impulse) * _gaussian_gain(50, sigma))
    np.testing.assert_allclose(fast, slow, atol=1e-6)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (224, 224), (300, 200), (60, 700)])
def test_any_size_works_at_every_severity(size: tuple[int, int]) -> None:
    """60 x 700 is wider than most photographs of frost, which are then enlarged."""
    image = cv2.resize(noise_picture(4, 4), size[::-1])
    for name, severity in CASES:
        picture = corrupt_image(image, name, severity, seed=1)
        assert picture.shape == image.shape
        assert picture.dtype == np.uint8
        assert picture.flags.c_contiguous
        assert (picture != image).any() or name == "spatter"  # a small lens may stay dry
        assert picture.std() > 2  # no blank, whatever the numbers become on the way


@pytest.mark.parametrize("name", ALL)
def test_memory_layout_does_not_matter_and_the_input_is_only_read(name: str) -> None:
    image = noise_picture(40, 56)
    turned = np.ascontiguousarray(image.transpose(2, 0, 1)).transpose(1, 2, 0)  # as from a torch tensor
    turned.flags.writeable = False
    np.testing.assert_array_equal(corrupt_image(turned, name, 4, seed=2), corrupt_image(image, name, 4, seed=2))
    np.testing.assert_array_equal(image, noise_picture(40, 56))


def digest(case: tuple[str, int]) -> str:
    name, severity = case
    return hashlib.sha1(corrupt_image(noise_picture(64, 48), name, severity, seed=severity).tobytes()).hexdigest()


def test_images_do_not_depend_on_process_thread_or_order() -> None:
    """A fresh process with its own state of every generator, and eight threads at once in another order."""
    expected = {case: digest(case) for case in CASES}
    shuffled = random.Random(1).sample(CASES, len(CASES))
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(4)
        with ThreadPoolExecutor(8) as pool:
            assert dict(zip(shuffled, pool.map(digest, shuffled), strict=True)) == expected
    finally:
        cv2.setNumThreads(threads)
    code = (
        "import sys; sys.path += ['robustness/corruptions', 'support', '..']; import test_corruptions as t; "
        "print(*map(t.digest, reversed(t.CASES))); "
        "assert not {'numba', 'imagecorruptions'} & set(sys.modules), 'seconds lost'"
    )
    child = subprocess.run([sys.executable, "-c", code], cwd=GOLDEN.parent, **CAPTURED)
    assert child.returncode == 0, child.stderr
    assert child.stdout.split() == list(expected.values())[::-1]


def test_the_names_alone_cost_no_library() -> None:
    code = "import sys, mae_dat.robustness.corruptions; assert not {'cv2', 'scipy', 'torch'} & set(sys.modules)"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, **CAPTURED)
    assert child.returncode == 0, child.stderr


def test_as_stored_is_the_jpeg_of_the_official_files() -> None:
    """Saved as the original saves; `optimize` makes the file smaller and leaves the pixels."""
    image, file = noise_picture(64, 48), BytesIO()
    PIL.Image.fromarray(image).save(file, "JPEG", quality=85, optimize=True)
    np.testing.assert_array_equal(as_stored(image), np.array(PIL.Image.open(file)))
    with pytest.raises(DataError, match="uint8 RGB"):
        as_stored(image[..., 0])


def test_a_missing_or_damaged_photograph_of_frost_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _frost_photograph.cache_clear()
    monkeypatch.setattr("mae_dat.robustness.corruptions.weather.FROST_FOLDER", tmp_path)
    for path in (tmp_path / name for name in FROST_PHOTOGRAPHS[:2]):
        path.write_bytes(b"no image")
    for seed in range(3):
        with pytest.raises(
            MissingInputError, match=r"frost\d.*: not a readable photograph of frost; install mae-dat again"
        ):
            corrupt_image(noise_picture(32, 32), "frost", 1, seed=seed)


def test_the_photographs_of_frost_are_those_of_imagecorruptions() -> None:
    """Their sha256 in the package imagecorruptions-imaug 1.1.5."""
    hashes = {name: hashlib.sha256((FROST_FOLDER / name).read_bytes()).hexdigest()[:16] for name in FROST_PHOTOGRAPHS}
    assert hashes == {
        "frost1.png": "ff9f907860bd7a83",
        "frost2.png": "fe211a89b336999c",
        "frost3.png": "2d0d50b4a9bb213f",
        "frost4.jpg": "3f8b91ca1a9fa716",
        "frost5.jpg": "5fc6a19df4a429ba",
    }
