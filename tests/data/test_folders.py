"""What lies in an image folder and is not read: counts and examples by reason."""

import os
from pathlib import Path

import pytest
from noise_images import MakeFolder
from torchvision.transforms.functional import to_tensor

from mae_dat.config.errors import DataError
from mae_dat.data.folders import IgnoredFiles, other_folders, walk_images
from mae_dat.data.image_set import ImageFolder


def test_files_that_are_not_read_are_counted_by_reason(make: MakeFolder) -> None:
    root = make("a/1.png a/deep/deeper/2.JPG b/3.png beside.png a/4.heic a/5.heic b/6.HEIF")
    (root / "a" / "notes.txt").touch()
    (root / "README").touch()
    (root / "a" / ".DS_Store").touch()
    (root / ".ipynb_checkpoints").mkdir()
    (root / "a" / "gone.jpg").symlink_to("/not/mounted/gone.jpg")
    (root / "b" / "gone.txt").symlink_to("/not/mounted/gone.txt")
    (root / "gone.csv").symlink_to("/not/mounted/table")
    (root / "a" / "self.png").symlink_to("self.png")
    os.mkfifo(root / "b" / "pipe.png")
    (root / "a" / "up").symlink_to(root)
    folder = ImageFolder(root, to_tensor)
    assert len(folder) == 3
    assert folder.class_counts() == [2, 1]
    assert folder.ignored_files.counts == {
        "hidden": 2,
        "images beside the class folders": 1,
        "no suffix": 1,
        "dangling links": 4,
        ".heic": 2,
        ".heif": 1,
        ".txt": 1,
        "links to a folder that is read already": 1,
        "no regular files": 1,
    }
    assert folder.ignored_files.total == 14
    examples = {reason: os.path.relpath(path, root) for reason, path in folder.ignored_files.examples.items()}
    assert examples[".heic"] == "a/4.heic"
    assert examples["images beside the class folders"] == "beside.png"
    assert examples["dangling links"] == "gone.csv"
    assert folder.ignored_files.describe(root, most=2) == (
        "dangling links 4 (gone.csv), hidden 2 (.ipynb_checkpoints), others 8"
    )


def test_without_labels_every_folder_counts(make: MakeFolder) -> None:
    root = make("1.png a/2.png a/b/3.png a/b/4.psd")
    folder = ImageFolder(root, to_tensor, labeled=False)
    assert len(folder) == 3
    assert folder.class_counts() == []
    assert folder.ignored_files.counts == {".psd": 1}
    assert folder.ignored_files.describe(root) == ".psd 1 (a/b/4.psd)"


def test_what_this_package_writes_is_not_counted(make: MakeFolder) -> None:
    root = make("a/1.png")
    for name in ("manifest.jsonl", "inputs.json", "manifest.jsonl.inputs.json", "index.safetensors"):
        (root / name).touch()
    assert ImageFolder(root, to_tensor).ignored_files.counts == {}


def test_a_class_that_loses_everything_says_why(make: MakeFolder) -> None:
    root = make("a/1.png b/2.heic b/3.heic")
    with pytest.raises(DataError, match=r"the class .*b has no image but \.heic 2 \(2\.heic\)"):
        ImageFolder(root, to_tensor)
    with pytest.raises(
        DataError, match=r"contains no images .*, but other files: \.heic 2 \(2\.heic\); check the path"
    ):
        ImageFolder(root / "b", to_tensor, labeled=False)


def test_a_million_suffixes_take_no_memory() -> None:
    ignored_files = IgnoredFiles()
    for number in range(1000):
        ignored_files.add(f".{number}", f"file.{number}")
    assert len(ignored_files.counts) <= 41
    assert ignored_files.total == 1000
    assert ignored_files.counts["other files"] == 960


def test_a_split_that_is_not_read_is_found(make: MakeFolder, tmp_path: Path) -> None:
    root = make("train/a/1.png test/a/1.png valid/a/1.png notes/x.png")
    (root / ".hidden").mkdir()
    assert other_folders(root, [root / "train", root / "test"]) == ["notes", "valid"]
    assert other_folders(root, [root / "train" / "a"]) == ["notes", "test", "valid"]


def test_a_walk_without_counts_is_the_same(make: MakeFolder) -> None:
    root = make("b/2.png a/1.png a/3.txt")
    assert [os.path.relpath(path, root) for path in walk_images(str(root), set())] == ["a/1.png", "b/2.png"]
