"""Decoding of images with other channels than color or gray: RGBA, gray with alpha, and TIFF files of many bands."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mae_dat.config.errors import ConfigError, DataError
from mae_dat.config.extras import require_extra
from mae_dat.data.decode import ImageError, describe_problem, image_error, max_pixels, read_bytes, white_level

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two are BigTIFF
_ALPHA_MODES = {2: ("LA", ("L", "LA", "1")), 4: ("RGBA", ("RGB", "RGBA", "P", "L", "LA", "1"))}


def load_bands(path: str | Path, channels: int) -> np.ndarray:
    """Decode an image file to its channels; see `decode_bands`. Raises DataError, StorageError."""
    return decode_bands(read_bytes(path), str(path), channels)


def decode_bands(content: bytes, name: str, channels: int) -> np.ndarray:
    """Decode the content of an image file to its own channels, uint8 (H, W, `channels`), without converting colors.

    TIFF files have as many bands as they have, interleaved, in planes or one on each page. Other files have 2 channels
    (gray, alpha) or 4 (RGBA); those without alpha are opaque. 16-bit values are divided by 257, or scaled so that
    $MAE_DAT_WHITE_LEVEL becomes 255.

    Raises DataError, naming `name`, for a damaged or too large file, another number of channels and other kinds of
    values; MissingInputError where tifffile is not installed.
    """
    is_tiff = content[:4] in _TIFF
    if is_tiff:
        require_extra("multiband", f"{name}: a TIFF file with --in_chans {channels}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in `decode_bytes`
            bands = _decode_tiff(content) if is_tiff else _decode_alpha(content, channels)
        if bands.shape[2] != channels:
            raise DataError(f"it has {bands.shape[2]} channels, not the {channels} of --in_chans")
        return _to_8_bit(bands)
    except (ConfigError, ImageError):
        raise
    except Exception as error:  # decoders raise nearly every type of exception on damaged files
        raise image_error(name, describe_problem(content, error)) from error


def _decode_tiff(content: bytes) -> np.ndarray:
    """Return the bands of a TIFF file (H, W, C)."""
    import tifffile

    with tifffile.TiffFile(io.BytesIO(content)) as file:
        series = file.series[0]
        axes, shape = series.axes, series.shape
        if "Y" not in axes or "X" not in axes or len(axes) not in (2, 3) or len(file.series) != 1:
            raise DataError(
                f"its pages or bands have the axes {axes}, of {len(file.series)} series: expected one image"
            )
        _check_size(shape[axes.index("X")], shape[axes.index("Y")])
        values: Any = series.asarray()
    if len(axes) == 2:
        return values[:, :, None]
    (band_axis,) = (number for number, axis in enumerate(axes) if axis not in "YX")
    return np.moveaxis(values, band_axis, 2)


def _decode_alpha(content: bytes, channels: int) -> np.ndarray:
    """Return the channels of a file that Pillow decodes, with alpha (H, W, 2 or 4)."""
    with Image.open(io.BytesIO(content)) as image:
        _check_size(*image.size)
        mode, sources = _ALPHA_MODES.get(channels, ("", ()))
        if image.mode not in sources:
            raise DataError(
                f'its {len(image.getbands())} channels ("{image.mode}") are not the {channels} of --in_chans; files of '
                "more bands have to be TIFF"
            )
        return np.array(image.convert(mode))


def _check_size(width: int, height: int) -> None:
    if width * height > max_pixels():
        raise DataError(f"{width} x {height} pixels are more than the {max_pixels() / 1e6:g} megapixels allowed")


def _to_8_bit(bands: np.ndarray) -> np.ndarray:
    """Return 8- or 16-bit values as contiguous 8-bit ones."""
    if bands.dtype == np.uint16:
        white = white_level() or 65535.0
        bands = np.rint(bands.astype(np.float32).clip(max=white) * (255 / white)).astype(np.uint8)
    if bands.dtype != np.uint8:
        raise DataError(f"its values are {bands.dtype}, only 8- and 16-bit unsigned integers are supported")
    return np.ascontiguousarray(bands)
