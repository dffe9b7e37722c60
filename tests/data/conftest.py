"""Fixtures of the tests of image data."""

from pathlib import Path

import pytest
from noise_images import MakeFolder, write_images


@pytest.fixture
def make(tmp_path: Path) -> MakeFolder:
    """Return a function that writes noise images of the given names to a folder, and returns the folder."""
    return lambda names: write_images(tmp_path, names)
