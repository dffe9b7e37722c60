"""Images that are rare but real: 12 bits in 16, large profiles, scan lines, more than 100 megapixels, damaged JPEGs."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import verb

from mae_dat.config.errors import ConfigError, DataError
from mae_dat.data import decode
from mae_dat.data.decode import decode_file, decode_pixels
from mae_dat.data.scan import jpeg_warning
from mae_dat.data.transforms import EvalTransform


def smooth(height: int, width: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def test_twelve_bits_in_sixteen(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "_dark_images_were_reported", False)
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / "x.png")
    for _ in range(2):
        assert np.asarray(decode_file(tmp_path / "x.png")).max() == 16
    assert caplog.text.count("x.png is a 16-bit image with values up to 4095 only") == 1
    assert "set $MAE_DAT_WHITE_LEVEL=4095" in caplog.text
    monkeypatch.setenv("MAE_DAT_WHITE_LEVEL", "4095")
    gray = np.asarray(decode_file(tmp_path / "x.png"))[:, :, 0]
    np.testing.assert_array_equal(gray, np.rint(values / 4095 * 255))
    monkeypatch.setenv("MAE_DAT_WHITE_LEVEL", "white")
    with pytest.raises(ConfigError, match="MAE_DAT_WHITE_LEVEL must be a number above 0, got 'white'"):
        decode_file(tmp_path / "x.png")


def test_a_png_with_a_large_profile(tmp_path: Path) -> None:
    image = smooth(16, 16)
    image.save(tmp_path / "x.png", icc_profile=bytes(3 << 20))
    np.testing.assert_array_equal(np.asarray(decode_file(tmp_path / "x.png")), np.asarray(image))
    image.save(tmp_path / "y.png", icc_profile=bytes(65 << 20))
    with pytest.raises(DataError, match="its color profile or text has more than 64 MiB; its pixels may be good"):
        decode_file(tmp_path / "y.png")


@pytest.mark.parametrize("size", [(2, 10_000), (10_000, 2), (1, 65_500)])
def test_a_scan_line_takes_no_gigabyte(size: tuple[int, int]) -> None:
    transform = EvalTransform((64, 64))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert transform(Image.new("RGB", size)).shape == (3, 64, 64)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_a_long_image_is_resized_as_if_it_were_not_cropped_first() -> None:
    image = smooth(1500, 40)
    transform = EvalTransform((32, 32))
    whole = image.resize((36, 1350), Image.Resampling.BICUBIC).crop((2, 659, 34, 691))
    expected = torch.from_numpy(np.array(whole)).permute(2, 0, 1) / 255
    assert (transform(image) - expected).abs().max() < 3 / 255
    assert (EvalTransform((32, 32))(image.transpose(Image.Transpose.TRANSPOSE)) - expected.mT).abs().max() < 3 / 255


def test_more_than_100_megapixels_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same with a limit of 1000 pixels, Pillow's own too."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    for name, side in (("bomb", 64), ("large", 40)):  # Pillow stops at twice its limit, and warns before
        for suffix in ("png", "jpg"):
            path = tmp_path / f"{name}.{suffix}"
            smooth(side, side).save(path)
            for read in (decode_file, lambda path: decode_pixels(path.read_bytes(), path.name)):
                monkeypatch.delenv("MAE_DAT_MAX_MEGAPIXELS", raising=False)
                monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
                with pytest.raises(DataError, match=r"megapixels allowed \(set \$MAE_DAT_MAX_MEGAPIXELS to allow more"):
                    read(path)
                monkeypatch.setenv("MAE_DAT_MAX_MEGAPIXELS", "0.005")
                assert np.asarray(read(path)).shape == (side, side, 3)


def test_a_jpeg_that_is_damaged_in_the_middle_is_a_fault_of_a_scan(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "set" / "x.jpg"
    path.parent.mkdir()
    smooth(172, 172).save(path)
    content = bytearray(path.read_bytes())
    assert jpeg_warning(bytes(content)) == ""
    middle = len(content) // 2
    content[middle : middle + 20] = bytes(20)
    path.write_bytes(content)
    decode_file(path)
    with pytest.raises(DataError, match="has 1 fault,"):
        verb("scan")([str(path.parent), "--num_workers", "0"])
    assert "x.jpg: the JPEG decodes, but a part of it is damaged (Corrupt JPEG data" in capfd.readouterr().out
