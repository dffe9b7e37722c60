"""The generated images: pure, balanced, with ground truth that fits, and written whole or not at all."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mae_dat.config.errors import OutputError
from mae_dat.data.generated.draw import NO_TEXTURE, SHAPES, TEXTURES, draw_image
from mae_dat.data.generated.folder import FolderSettings, generated_root, write_image_folder

SMALL = {"train": 30, "val": 20, "conflict": 20, "silhouette": 10}


def test_an_image_is_a_pure_function_of_seed_split_and_index() -> None:
    np.random.seed(1)
    first = draw_image(3, "train", 7)
    np.random.seed(2)
    again = draw_image(3, "train", 7)
    assert np.array_equal(first.image, again.image)
    for other in (draw_image(4, "train", 7), draw_image(3, "val", 7), draw_image(3, "train", 17)):
        assert not np.array_equal(first.image, other.image)


@pytest.mark.parametrize("index", range(10))
@pytest.mark.parametrize("size", [64, 96])
def test_label_mask_and_box_fit(index: int, size: int) -> None:
    picture = draw_image(0, "val", index, size=size)
    assert picture.image.shape == (size, size, 3)
    assert picture.image.dtype == np.uint8
    assert picture.shape == index
    x0, y0, x1, y1 = picture.box
    assert 0 <= x0 < x1 <= size
    assert 0 <= y0 < y1 <= size
    outside = picture.mask.copy()
    outside[y0:y1, x0:x1] = False
    assert not outside.any()
    assert picture.mask[y0].any()
    assert picture.mask[y1 - 1].any()
    assert picture.mask[:, x0].any()
    assert picture.mask[:, x1 - 1].any()
    assert 0.02 < picture.mask.mean() < 0.6


def test_the_mask_covers_the_dark_pixels_of_the_silhouette() -> None:
    for index in range(10):
        picture = draw_image(0, "val", index, "silhouette")
        dark = picture.image.mean(axis=2) < 135
        assert np.mean(dark != picture.mask) < 0.01, "they may differ where a pixel is half covered"
        assert picture.texture == NO_TEXTURE
        assert np.array_equal(picture.mask, draw_image(0, "val", index).mask), "variants share their outline"


def test_the_texture_agrees_with_probability_rho() -> None:
    pictures = [draw_image(0, "train", i, size=16) for i in range(1000)]
    assert 0.87 < np.mean([picture.texture == picture.shape for picture in pictures]) < 0.93
    certain = [draw_image(0, "train", i, rho=1.0, size=16) for i in range(50)]
    assert all(picture.texture == picture.shape for picture in certain)


def test_in_conflict_the_texture_is_always_of_another_class() -> None:
    pictures = [draw_image(0, "val", i, "conflict", size=16) for i in range(300)]
    assert all(picture.shape != picture.texture for picture in pictures)
    assert {picture.texture for picture in pictures} == set(range(len(TEXTURES)))


def test_textures_and_shapes_look_different() -> None:
    iid, conflict = draw_image(0, "val", 0, rho=1.0), draw_image(0, "val", 0, "conflict")
    differs = np.abs(iid.image.astype(int) - conflict.image).max(axis=2) > 40
    assert differs[iid.mask].mean() > 0.2
    assert len({draw_image(0, "val", i).mask.tobytes() for i in range(10)}) == 10


@pytest.mark.parametrize("bad", [{"variant": "plain"}, {"size": 8}, {"rho": 1.5}])
def test_wrong_arguments_are_named(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        draw_image(0, "val", 0, **bad)  # type: ignore[arg-type]


def test_the_folder_is_complete_balanced_and_equal_to_the_drawing(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "generated", FolderSettings(**SMALL))
    for split, count in SMALL.items():
        for shape in SHAPES:
            assert len(list((root / split / shape).iterdir())) == count // 10
    with Image.open(root / "train" / "triangle" / "00012.png") as stored:
        assert np.array_equal(np.asarray(stored), draw_image(0, "train", 12).image)
    conflict = draw_image(0, "val", 3, "conflict")
    name = f"star-{TEXTURES[conflict.texture]}-00003.png"
    with Image.open(root / "conflict" / "star" / name) as stored:
        assert np.array_equal(np.asarray(stored), conflict.image)
    assert [path.name for path in tmp_path.iterdir()] == ["generated"], "nothing temporary is left"


def test_boxes_are_coco(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "generated", FolderSettings(**SMALL))
    coco = json.loads((root / "boxes.json").read_text())
    assert [category["name"] for category in coco["categories"]] == list(SHAPES)
    assert len(coco["images"]) == len(coco["annotations"]) == 50
    assert all((root / image["file_name"]).is_file() for image in coco["images"])
    picture = draw_image(0, "val", 4)
    [image] = [image for image in coco["images"] if image["file_name"] == "val/heart/00004.png"]
    [annotation] = [entry for entry in coco["annotations"] if entry["image_id"] == image["id"]]
    x0, y0, x1, y1 = picture.box
    assert annotation["bbox"] == [x0, y0, x1 - x0, y1 - y0]
    assert annotation["area"] == picture.mask.sum()
    assert annotation["category_id"] == 5


def test_a_complete_folder_is_reused_and_any_other_refused(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "generated", FolderSettings(**SMALL))
    file = root / "val" / "disc" / "00000.png"
    before = file.stat().st_mtime_ns
    assert write_image_folder(root, FolderSettings(**SMALL)) == root
    first = root / "train" / SHAPES[0] / "00000.png"
    drawn = first.read_bytes()
    Image.new("RGB", (64, 64)).save(first)  # as an older version of the drawing would leave it
    with pytest.raises(OutputError, match="generated by another version"):
        write_image_folder(root, FolderSettings(**SMALL))
    first.write_bytes(drawn)
    assert file.stat().st_mtime_ns == before
    with pytest.raises(OutputError, match="another seed"):
        write_image_folder(root, FolderSettings(**SMALL, seed=1))
    file.unlink()
    with pytest.raises(OutputError, match="19 of 20"):
        write_image_folder(root, FolderSettings(**SMALL))
    own = tmp_path / "holiday"
    own.mkdir()
    (own / "beach.jpg").touch()
    with pytest.raises(OutputError, match="holiday"):
        write_image_folder(own, FolderSettings(**SMALL))


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OutputError, match="No space left"):
        write_image_folder(tmp_path / "generated", FolderSettings(**SMALL))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        write_image_folder(tmp_path / "file" / "generated", FolderSettings(**SMALL))


def test_the_default_root_depends_on_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAE_DAT_HOME", str(tmp_path))
    assert generated_root().parent == tmp_path
    assert generated_root() == generated_root(FolderSettings())
    assert generated_root() != generated_root(FolderSettings(seed=1))
    monkeypatch.delenv("MAE_DAT_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert generated_root().parent == tmp_path / "home" / ".cache" / "mae_dat"
