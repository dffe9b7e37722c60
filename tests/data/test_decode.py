"""Decoding: every kind of image to RGB, and bad files refused with cause and fix."""

import io
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from noise_images import noise
from PIL import Image

from mae_dat.config.errors import ConfigError, DataError
from mae_dat.data.decode import decode_bytes, decode_file, decode_pixels, decoding_settings

GREY = Image.fromarray(np.array([[0, 128, 255]], dtype=np.uint8))
PALETTE = Image.fromarray(np.array([[0, 1, 1]], dtype=np.uint8)).convert("P")
PALETTE.putpalette([10, 20, 30, 200, 100, 50])
RGBA = Image.fromarray(np.array([[[255, 0, 0, 255], [9, 9, 9, 0], [0, 0, 0, 51]]], dtype=np.uint8))
GREY_ALPHA = Image.fromarray(np.array([[[7, 255], [7, 0], [0, 51]]], dtype=np.uint8))
DEEP = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16))
WIDE = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.int32))
CMYK = Image.frombytes("CMYK", (3, 1), bytes([0, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 255]))


@pytest.mark.parametrize(
    ("picture", "suffix", "options", "expected"),
    [
        (RGBA.convert("RGB"), "png", {}, [(255, 0, 0), (9, 9, 9), (0, 0, 0)]),
        (GREY, "png", {}, [(0,) * 3, (128,) * 3, (255,) * 3]),
        (GREY.point(lambda x: 255 * (x > 100)).convert("1"), "png", {}, [(0,) * 3, (255,) * 3, (255,) * 3]),
        (PALETTE, "png", {}, [(10, 20, 30), (200, 100, 50), (200, 100, 50)]),
        (PALETTE, "png", {"transparency": 1}, [(10, 20, 30), (255,) * 3, (255,) * 3]),
        (PALETTE, "gif", {}, [(10, 20, 30), (200, 100, 50), (200, 100, 50)]),
        (RGBA, "png", {}, [(255, 0, 0), (255,) * 3, (204,) * 3]),
        (GREY_ALPHA, "png", {}, [(7,) * 3, (255,) * 3, (204,) * 3]),
        (DEEP, "png", {}, [(0,) * 3, (100,) * 3, (255,) * 3]),
        (DEEP, "tif", {}, [(0,) * 3, (100,) * 3, (255,) * 3]),
        (WIDE, "tif", {}, [(0,) * 3, (100,) * 3, (255,) * 3]),
        (CMYK, "tif", {}, [(255,) * 3, (0, 255, 255), (0,) * 3]),
    ],
    ids=["RGB", "L", "1", "P", "P-transparent", "P-gif", "RGBA", "LA", "I;16-png", "I;16-tif", "I-tif", "CMYK"],
)
def test_every_mode_has_defined_pixels(
    picture: Image.Image, suffix: str, options: dict[str, int], expected: list[tuple[int, ...]], tmp_path: Path
) -> None:
    picture.save(tmp_path / f"x.{suffix}", **options)
    decoded = decode_file(tmp_path / f"x.{suffix}")
    assert decoded.mode == "RGB"
    assert [tuple(pixel) for pixel in np.asarray(decoded)[0].tolist()] == expected


def test_an_orientation_tag_is_ignored(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(20, 24).save(tmp_path / "x.png", exif=exif)
    assert decode_file(tmp_path / "x.png").size == (24, 20)


def bad_file(kind: str, path: Path) -> None:
    if kind == "float":
        Image.fromarray(np.zeros((4, 4), np.float32)).save(path, format="TIFF")
    elif kind == "deeper":
        Image.fromarray(np.full((4, 4), 70_000, np.int32)).save(path, format="TIFF")
    elif kind == "animated":
        noise().save(path, format="GIF", save_all=True, append_images=[noise(seed=1)])
    elif kind == "truncated":
        noise(200, 200).save(path, format="JPEG")
        path.write_bytes(path.read_bytes()[:5000])
    elif kind == "png cut":
        noise(200, 200).save(path, format="PNG")
        path.write_bytes(path.read_bytes()[:5000])
    elif kind != "missing":
        path.write_bytes({"empty": b"", "html": b"<!DOCTYPE html><p>404", "text": b"not an image"}[kind])


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("float", 'mode "F"'),
        ("deeper", "32-bit"),
        ("animated", "2 frames"),
        ("truncated", "damaged or truncated"),
        ("png cut", "damaged or truncated"),
        ("empty", "empty"),
        ("html", "web page"),
        ("text", "not an image"),
        ("missing", "No such file"),
    ],
)
def test_a_bad_file_is_named_with_cause_and_fix(kind: str, cause: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    bad_file(kind, path)
    with pytest.raises(DataError, match=re.escape(cause)) as caught:
        decode_file(path)
    assert str(path) in str(caught.value)
    assert "--on_bad skip" in str(caught.value)


@pytest.mark.parametrize("size", [(20_000, 5_001), (20_000, 20_000)], ids=["above our limit", "above PIL's"])
def test_a_huge_image_is_refused_from_its_header(size: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    Image.new("1", (8, 8)).save(path)
    small = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", *size) + small[24:29]
    path.write_bytes(small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:])
    with pytest.raises(DataError, match="megapixels"):  # there are no pixels to decode
        decode_file(path)


def encoded(picture: Image.Image, **options: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, **{"format": "JPEG", **options})
    return content.getvalue()


ORIENTED = Image.Exif()
ORIENTED[0x0112] = 6


@pytest.mark.parametrize(
    "content",
    [
        *(encoded(noise(37, 53), subsampling=layout, quality=70) for layout in (0, 1, 2)),
        encoded(noise(37, 53), progressive=True),
        encoded(noise(37, 53), restart_marker_blocks=2),
        encoded(noise(37, 53), exif=ORIENTED),
        encoded(noise(37, 53), keep_rgb=True),
        encoded(noise(37, 53).convert("L")),
        encoded(noise(37, 53).convert("CMYK")),
        encoded(noise(37, 53), format="PNG"),
        encoded(noise(37, 53)) + b"what follows the end",
    ],
    ids=["444", "422", "420", "progressive", "restarts", "oriented", "RGB", "gray", "CMYK", "PNG", "more"],
)
def test_pixels_are_those_of_the_image(content: bytes) -> None:
    assert np.array_equal(decode_pixels(content, "x"), np.asarray(decode_bytes(content, "x")))


def test_damaged_files_are_refused_alike_by_both_decoders() -> None:
    generator, refused = np.random.default_rng(0), 0
    for number in range(300):
        content = bytearray(encoded(noise(40, 60, seed=number), quality=50, progressive=number % 3 == 0))
        if number % 2:
            del content[generator.integers(len(content)) :]
        else:
            content[generator.integers(len(content))] ^= 1 << generator.integers(8)
        try:
            expected = np.asarray(decode_bytes(bytes(content), "x"))
        except DataError as error:
            refused += 1
            with pytest.raises(DataError, match=re.escape(str(error))):
                decode_pixels(bytes(content), "x")
        else:
            assert np.array_equal(decode_pixels(bytes(content), "x"), expected), number
    assert refused > 150


def test_a_huge_jpeg_is_refused_from_its_header() -> None:
    content = encoded(noise())
    at = content.index(b"\xff\xc0") + 5
    with pytest.raises(DataError, match="megapixels"):
        decode_pixels(content[:at] + struct.pack(">HH", 20_000, 5_001) + content[at + 4 :], "x")


def test_settings_that_change_the_pixels_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MAE_DAT_WHITE_LEVEL", raising=False)
    assert decoding_settings() == {}
    monkeypatch.setenv("MAE_DAT_WHITE_LEVEL", "65535")
    monkeypatch.setenv("MAE_DAT_MAX_MEGAPIXELS", "100")
    assert decoding_settings() == {}, "the defaults"
    monkeypatch.setenv("MAE_DAT_WHITE_LEVEL", "4095.0")
    assert decoding_settings() == {"MAE_DAT_WHITE_LEVEL": "4095"}
    monkeypatch.setenv("MAE_DAT_WHITE_LEVEL", "white")
    with pytest.raises(ConfigError, match="MAE_DAT_WHITE_LEVEL must be a number above 0, got 'white'"):
        decoding_settings()
