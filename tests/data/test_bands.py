"""Images with other channels than color: exact values, what is rejected, and training on them."""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from tiny_runs import (
    finetune_in,
    one_thread,  # noqa: F401 - used by itself
    pretrain_in,
)

from mae_dat.config.errors import ConfigError, DataError
from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.data.bands import decode_bands
from mae_dat.data.transforms import EvalBandsTransform, EvalTransform, PretrainTransform, finetune_transform
from mae_dat.models.weights.open import open_model
from mae_dat.storage.weight_files import read_weights


def random_bands(channels: int, seed: int = 0, size: int = 40, dtype: Any = np.uint8) -> np.ndarray:
    values = np.random.default_rng(seed).integers(0, 256, (size, size, channels))
    return (values * (257 if dtype == np.uint16 else 1)).astype(dtype)


def tiff(values: np.ndarray, **options: Any) -> bytes:
    content = io.BytesIO()
    tifffile.imwrite(content, values, **{"photometric": "minisblack", **options})
    return content.getvalue()


def png(values: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(values).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    "write",
    [
        lambda bands: tiff(bands, planarconfig="contig"),
        lambda bands: tiff(bands.transpose(2, 0, 1), planarconfig="separate"),
        lambda bands: tiff(bands.transpose(2, 0, 1)),
        lambda bands: tiff(bands, planarconfig="contig", compression="zlib"),
    ],
    ids=["interleaved", "planes", "pages", "compressed"],
)
def test_the_bands_of_a_tiff_file(write: Callable[[np.ndarray], bytes], dtype: Any) -> None:
    bands = random_bands(6, dtype=dtype)
    assert np.array_equal(decode_bands(write(bands), "x.tif", 6), random_bands(6))


def test_values_of_12_bits_are_scaled_by_the_white_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAE_DAT_WHITE_LEVEL", "4095")
    bands = np.stack([np.full((4, 4), value, np.uint16) for value in (0, 2048, 4095, 5000, 1)], axis=2)
    assert decode_bands(tiff(bands, planarconfig="contig"), "x.tif", 5)[0, 0].tolist() == [0, 128, 255, 255, 0]


def test_transparency_is_a_channel_and_not_blended() -> None:
    rgba, gray = random_bands(4), random_bands(2)
    assert np.array_equal(decode_bands(png(rgba), "x.png", 4), rgba)
    assert np.array_equal(decode_bands(png(gray), "x.png", 2), gray)
    opaque = decode_bands(png(rgba[..., :3]), "x.png", 4)
    assert np.array_equal(opaque, np.dstack([rgba[..., :3], np.full((40, 40), 255, np.uint8)]))


@pytest.mark.parametrize(
    ("content", "channels", "message"),
    [
        (lambda: tiff(random_bands(5), planarconfig="contig"), 6, "x.img: it has 5 channels, not the 6 of --in_chans"),
        (lambda: png(random_bands(3)), 6, 'its 3 channels ."RGB".* not the 6 of --in_chans; .* have to be TIFF'),
        (lambda: tiff(random_bands(5).astype(np.float32), planarconfig="contig"), 5, "its values are float32"),
        (lambda: tiff(random_bands(5), planarconfig="contig")[:200], 5, "x.img: "),
        (lambda: b"<html>", 4, "web page"),
        (lambda: b"", 4, "empty"),
    ],
)
def test_files_that_cannot_be_used_are_named(content: Callable[[], bytes], channels: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_bands(content(), "x.img", channels)


def test_images_of_too_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAE_DAT_MAX_MEGAPIXELS", "0.001")
    for content in (tiff(random_bands(4), planarconfig="contig"), png(random_bands(4))):
        with pytest.raises(DataError, match=r"40 x 40 pixels are more than the 0\.001 megapixels"):
            decode_bands(content, "x", 4)


def test_color_channels_pass_through_the_transforms_as_those_of_color_images() -> None:
    """Three of the bands are a color image: what is done to them has to be what is done to it."""
    bands = random_bands(6, size=50)
    color = bands[..., :3]
    still = EvalTransform((32, 32))
    # The filters of torchvision for tensors and of Pillow round differently.
    difference = EvalBandsTransform(still)(bands)[:3] - still(Image.fromarray(color))
    assert difference.abs().mean() < 0.3 / 255
    assert difference.abs().max() < 8 / 255
    for transform in (PretrainTransform((32, 32)), finetune_transform((32, 32), aa=None)):
        views = []
        for pixels in (bands, color):
            torch.manual_seed(3)
            random.seed(3)
            views.append(transform(pixels).int())  # type: ignore[arg-type]
        # torch resizes up to four 8-bit channels by another kernel, which rounds differently.
        assert (views[0][:3] - views[1]).abs().max() <= 1
    erasing = finetune_transform((32, 32), aa=None, reprob=1.0)
    assert erasing(bands).shape == (6, 32, 32)  # type: ignore[arg-type]


@pytest.fixture
def bands_folder(tmp_path: Path) -> Path:
    """Two classes of TIFF files with five bands."""
    for split, count in (("train", 8), ("val", 4)):
        for label in ("dark", "light"):
            folder = tmp_path / "bands" / split / label
            folder.mkdir(parents=True)
            for seed in range(count):
                values = random_bands(5, seed) // 2 + (128 if label == "light" else 0)
                (folder / f"{seed}.tif").write_bytes(tiff(values.astype(np.uint8), planarconfig="contig"))
    return tmp_path / "bands"


def test_five_bands_are_pretrained_and_fine_tuned(bands_folder: Path, tmp_path: Path) -> None:
    pre = pretrain_in(tmp_path / "pre", bands_folder, "--in_chans", "5", "--images_every", "1")
    assert read_weights(pre / "model.safetensors").tensors["patch_embed.proj.weight"].shape == (128, 5, 8, 8)
    flags = ["--in_chans", "5", "--finetune", str(pre), "--epochs", "4", "--reprob", "0.25"]
    scores = finetune_in(tmp_path / "out", bands_folder, *flags)
    assert scores["test_acc1"] == 100.0
    opened = open_model(tmp_path / "out")
    assert opened.plan.in_chans == 5
    assert opened.model(torch.rand(1, 5, 32, 32)).shape == (1, 2)


def test_color_images_are_not_taken_for_bands(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(random_bands(3)))
    with pytest.raises(DataError, match=r"a\.png: its 3 channels"):
        pretrain_in(tmp_path / "out", tmp_path / "images", "--in_chans", "6")


def test_augmentations_of_color_are_rejected() -> None:
    with pytest.raises(ConfigError, match="--aa rand-m9-mstd0.5-inc1 changes colors.*--in_chans 4.*give --aa None"):
        load_config(FinetuneConfig, ["--in_chans", "4"])
    with pytest.raises(ConfigError, match="color_jitter"):
        load_config(FinetuneConfig, ["--in_chans", "4", "--aa", "None", "--color_jitter", "0.3"])
    with pytest.raises(ConfigError, match="--in_chans must be at least 1, got 0"):
        load_config(PretrainConfig, ["--in_chans", "0"])
