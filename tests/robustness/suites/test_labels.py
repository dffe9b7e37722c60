"""Cue-conflict images are labeled by their file names."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_dat.config.errors import DataError, MissingInputError
from mae_dat.data.generated.draw import SHAPES
from mae_dat.robustness.suites.labels import read_conflicts


def photo(size: int = 64) -> np.ndarray:
    """An image with edges, gradients and color."""
    y, x = np.mgrid[:size, :size]
    channels = [x * 255 // size, (x // 5 + y // 5) % 2 * 200 + 20, 255 - y * 255 // size]
    return np.stack(channels, axis=-1).astype(np.uint8)


def test_conflict_images_are_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "disc").mkdir()
    for name in ("disc/disc-checks-00001.png", "disc/disc-stripes-00002.png", "square-stripes-x-1.png"):
        Image.fromarray(photo(32)).save(tmp_path / name)
    listing, cues = read_conflicts(tmp_path, SHAPES)
    assert listing == [("disc/disc-checks-00001.png", 0), ("square-stripes-x-1.png", 1)]
    assert cues.tolist() == [[0, 1], [1, 0]]  # disc with stripes, its own texture, is left out
    for path in tmp_path.rglob("*.png"):
        path.rename(tmp_path / "cat-dog-1.png")
    assert read_conflicts(tmp_path, ["cat", "dog"])[1].tolist() == [[0, 1]]


def test_a_conflict_image_of_any_kind_counts_and_class_names_may_hold_hyphens(tmp_path: Path) -> None:
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
    with pytest.raises(DataError, match="no image named"):
        read_conflicts(tmp_path, ["a", "b"])
    (tmp_path / "a-b-1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a-b-1\.png: expected <shape>-<texture>-\*, a shape such as a, c"):
        read_conflicts(tmp_path, ["a", "c"])
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a\.jpg: expected"):
        read_conflicts(tmp_path, ["a", "b"])
    (tmp_path / "a-b-1.png").unlink()
    (tmp_path / "a.jpg").rename(tmp_path / "a-b-c.jpg")
    with pytest.raises(DataError, match=r"a-b-c\.jpg may be the shape 'a' with the texture 'b-c' or the shape 'a-b' "):
        read_conflicts(tmp_path, ["a", "a-b", "b-c", "c"])
