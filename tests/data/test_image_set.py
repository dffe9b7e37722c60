"""Image folders: splits, classes and labels, links, and the replacement of bad images."""

import shutil
from pathlib import Path

import pytest
import torch
from noise_images import MakeFolder
from torchvision.transforms.functional import to_tensor

from mae_dat.config.errors import DataError, MissingInputError
from mae_dat.data.folders import find_split
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.transforms import EvalTransform


def test_classes_are_sorted_and_dot_entries_are_none(make: MakeFolder) -> None:
    root = make("b/1.png b/deep/2.JPG a/3.Jpeg .ipynb_checkpoints/4.png a/._3.png a/.hidden/5.png")
    (root / "a" / "notes.txt").touch()
    (root / "stray.png").touch()
    folder = ImageFolder(root, to_tensor)
    assert folder.classes == ["a", "b"]
    names = [(Path(path).relative_to(root).as_posix(), label) for path, label in folder.samples]
    assert names == [("a/3.Jpeg", 0), ("b/1.png", 1), ("b/deep/2.JPG", 1)]


def test_links_are_followed_once(make: MakeFolder) -> None:
    root = make("a/1.png b/2.png")
    (root / "a" / "loop").symlink_to(root / "a")
    (root / "a" / "up").symlink_to(root)
    (root / "self").symlink_to(root)
    (root / "Alias").symlink_to(root / "b")
    folder = ImageFolder(root, to_tensor)
    assert folder.classes == ["a", "b"]
    assert len(folder) == 2
    assert len(ImageFolder(root, to_tensor, labeled=False)) == 2


def test_a_class_may_be_a_link_to_elsewhere(make: MakeFolder) -> None:
    root = make("data/a/1.png store/cats/2.png")
    (root / "data" / "cat").symlink_to(root / "store" / "cats")
    assert ImageFolder(root / "data", to_tensor).classes == ["a", "cat"]


def test_unlabeled_takes_any_folder(make: MakeFolder) -> None:
    folder = ImageFolder(make("z.png a/1.png a/b/2.png"), to_tensor, labeled=False)
    assert [Path(path).name for path, _ in folder.samples] == ["1.png", "2.png", "z.png"]
    sample = folder[0]
    assert (sample["label"], sample["index"], sample["skipped"]) == (-1, 0, 0)
    assert sample["image"].shape == (3, 20, 24)
    assert sample["image"].dtype == torch.float32


def test_given_classes_fix_the_labels(make: MakeFolder) -> None:
    root = make("b/1.png c/2.png")
    folder = ImageFolder(root, to_tensor, classes=["a", "b", "c"])
    assert [label for _, label in folder.samples] == [1, 2]
    with pytest.raises(DataError, match="unknown to training: c"):
        ImageFolder(root, to_tensor, classes=["a", "b"])


@pytest.mark.parametrize(
    ("names", "folder", "labeled", "error", "message"),
    [
        ("photos/a/1.png", "photo", True, MissingInputError, "did you mean .*photos"),
        ("photos/a/1.png", "xyz", True, MissingInputError, "does not exist"),
        ("photos/a/1.png", "photos/a/1.png", True, MissingInputError, "is a file"),
        ("photos/1.png", "photos", True, DataError, "no class folders; expected .*<class>"),
        ("photos/a/1.png photos/b/x.txt", "photos", True, DataError, "b has no image"),
        ("photos/x.txt", "photos", False, DataError, "no images"),
    ],
)
def test_bad_trees(
    names: str, folder: str, labeled: bool, error: type[Exception], message: str, make: MakeFolder
) -> None:
    root = make(names)
    with pytest.raises(error, match=message) as caught:
        ImageFolder(root / folder, to_tensor, labeled=labeled)
    assert str(root) in str(caught.value)


def test_splits_are_found(make: MakeFolder) -> None:
    root = make("one/train/a/1.png one/validation/a/1.png one/test/a/1.png flat/a/1.png")
    assert find_split(root / "one", "train") == root / "one" / "train"
    assert find_split(root / "one", "val") == root / "one" / "validation"
    assert find_split(root / "one", "val", names=["test"]) == root / "one" / "test"
    assert find_split(root / "flat", "train", labeled=False) == root / "flat"
    with pytest.raises(MissingInputError, match="train/<class>"):
        find_split(root / "flat", "train")
    with pytest.raises(MissingInputError, match="val or valid or validation or test"):
        find_split(root / "flat", "val", labeled=False)


def test_skipping_takes_the_next_good_image_and_counts(make: MakeFolder) -> None:
    root = make("a/0.png a/1.png a/2.png b/3.png")
    (root / "a" / "1.png").write_bytes(b"")
    (root / "b" / "3.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"1\.png"):
        ImageFolder(root, to_tensor)[1]
    folder = ImageFolder(root, to_tensor, on_bad="skip")
    samples = [folder[index] for index in range(4)]
    assert [sample["skipped"] for sample in samples] == [0, 1, 0, 1]
    assert [sample["index"] for sample in samples] == [0, 2, 2, 0]
    assert [sample["label"] for sample in samples] == [0, 0, 0, 0]
    assert torch.equal(samples[1]["image"], samples[2]["image"])


def test_skipping_is_capped(make: MakeFolder) -> None:
    root = make(" ".join(f"{number:02d}.png" for number in range(15)))
    for number in range(12):
        (root / f"{number:02d}.png").write_bytes(b"")
    folder = ImageFolder(root, to_tensor, on_bad="skip", labeled=False)
    with pytest.raises(DataError, match=r"11 unreadable images in a row, starting at .*00\.png"):
        folder[0]
    assert folder[2]["index"] == 12
    assert ImageFolder(root, to_tensor, on_bad="skip", labeled=False, max_skips=12)[0]["index"] == 12


def test_a_fingerprint_is_of_names_and_labels_wherever_they_lie(make: MakeFolder, tmp_path: Path) -> None:
    root = make("a/1.png a/2.png b/3.png")

    def fingerprint(folder: Path, labeled: bool = True) -> str:
        return ImageFolder(folder, EvalTransform((16, 16)), labeled=labeled).fingerprint()

    before = fingerprint(root)
    assert before == fingerprint(shutil.copytree(root, tmp_path / "copy"))
    assert before != fingerprint(root, labeled=False)
    (root / "b" / "3.png").rename(root / "b" / "4.png")
    renamed = fingerprint(root)
    (root / "b" / "4.png").rename(root / "a" / "4.png")
    (root / "a" / "2.png").rename(root / "b" / "2.png")
    assert len({before, renamed, fingerprint(root)}) == 3
