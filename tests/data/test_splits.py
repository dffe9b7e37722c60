"""Which folder serves as which split, and what happens to images that cannot be used."""

import io
import tarfile
from pathlib import Path

import pytest
from noise_images import noise, write_images
from PIL import Image
from tiny_runs import FINETUNE, verb
from torchvision.transforms.functional import to_tensor

from mae_dat.config.errors import DataError, MissingInputError
from mae_dat.data.folders import find_split
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.open import open_images
from mae_dat.data.shards.index import build_index


def split_of(root: Path, folders: str, split: str = "val") -> str:
    for name in folders.split():
        (root / folders.replace(" ", "-") / name).mkdir(parents=True)
    return find_split(root / folders.replace(" ", "-"), split).name


@pytest.mark.parametrize(
    ("folders", "train", "val"),
    [
        ("train valid test", "train", "valid"),
        ("train test", "train", "test"),
        ("Train Val", "Train", "Val"),
        ("TRAIN TEST VALID", "TRAIN", "VALID"),
        ("training validation", "training", "validation"),
        ("train val valid test", "train", "val"),
        ("train Train val Val", "train", "val"),
    ],
)
def test_the_folders_of_the_splits(
    folders: str, train: str, val: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert split_of(tmp_path / "a", folders, "train") == train
    assert split_of(tmp_path / "b", folders) == val
    assert ("its test serves as validation split" in caplog.text) == (val == "test")


def test_a_missing_split_is_an_error_and_pretraining_on_everything_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "Val").mkdir()
    with pytest.raises(MissingInputError, match="has no folder train or training"):
        find_split(tmp_path, "train")
    assert find_split(tmp_path, "train", labeled=False) == tmp_path
    assert "has no folder train: all of it is used for training, Val too" in caplog.text


def test_packing_takes_every_split(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set", "Train/a/1.png Train/b/2.png valid/a/3.png valid/b/4.png test/a/5.png")
    assert verb("pack")([str(root), str(tmp_path / "out"), "--num_workers", "0"]) in (0, None)
    for name, count in (("Train", 2), ("valid", 2), ("test", 1)):
        assert len(open_images(tmp_path / "out" / name, to_tensor)) == count


def test_a_single_class_is_rejected(tmp_path: Path) -> None:
    root = write_images(tmp_path / "set", "train/bottle/1.png train/bottle/2.png val/bottle/3.png")
    with pytest.raises(DataError, match="has images of a single class"):
        verb("finetune")([*FINETUNE, "--data_path", str(root), "--output_dir", str(tmp_path / "out")])


# ---- files ----


def test_all_suffixes_that_the_decoder_reads(tmp_path: Path) -> None:
    for folder, names in {"a": "1.jfif 2.jpe 3.JFIF", "b": "4.avif 5.gif"}.items():
        (tmp_path / folder).mkdir()
        for name in names.split():
            kind = {"avif": "AVIF", "gif": "GIF"}.get(name.split(".")[1], "JPEG")
            noise().save(tmp_path / folder / name, format=kind)
    images = ImageFolder(tmp_path, to_tensor)
    assert images.class_counts() == [3, 2]
    assert all(images[index]["image"].shape == (3, 20, 24) for index in range(5))


def test_dangling_links_are_reported_and_faults_of_a_scan(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_images(tmp_path / "set", "a/1.png b/2.png")
    (root / "a" / "gone.jpg").symlink_to("/not/mounted/gone.jpg")
    assert len(ImageFolder(root, to_tensor)) == 2
    assert f"1 links lead nowhere and are left out, first {root}/a/gone.jpg" in caplog.text
    with pytest.raises(DataError, match="has 1 fault,"):
        verb("scan")([str(root), "--num_workers", "0"])
    assert f"{root}/a/gone.jpg: a link to a file that does not exist" in capsys.readouterr().out
    (root / "c").symlink_to("/not/mounted/c")
    with pytest.raises(DataError, match="the class .*/c is a link to a folder that does not exist"):
        ImageFolder(root, to_tensor)


# ---- names of members in shards ----


def shard(folder: Path, members: dict[str, str | None]) -> Path:
    """Write a shard; None is an image."""
    folder.mkdir(parents=True)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    with tarfile.open(folder / "0.tar", "w") as archive:
        for name, text in members.items():
            content = buffer.getvalue() if text is None else text.encode()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return folder


@pytest.mark.parametrize(
    ("members", "labels"),
    [
        ({"0.v2.jpg": None, "0.v2.cls": "0", "1.jpg": None, "1.cls": "1"}, [0, 1]),
        ({"0.input.jpg": None, "0.target.cls": "0", "1.input.jpg": None, "1.target.cls": "1"}, [0, 1]),
        ({"a.1.jpg": None, "a.1.cls": "0", "a.2.jpg": None, "a.2.cls": "1"}, [0, 1]),
        ({"0.cls": "0", "0.jfif": None, "1.jpg": None, "1.json": '{"label": 1}'}, [0, 1]),
        ({"frame.1.jpg": None, "frame.2.jpg": None}, [-1, -1]),
    ],
)
def test_dotted_names(members: dict[str, str | None], labels: list[int], tmp_path: Path) -> None:
    assert build_index(shard(tmp_path / "set", members)).label.tolist() == labels


def test_members_that_are_lost_are_an_error_or_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    two = {"0.input.jpg": None, "0.mask.png": None, "0.cls": "0"}
    with pytest.raises(DataError, match=r"the sample of '0\.input\.jpg' has two images, the second '0\.mask\.png'"):
        build_index(shard(tmp_path / "two", two))
    with pytest.raises(DataError, match=r"contain no images, only other members: \.txt 1 \(0\.txt\)"):
        build_index(shard(tmp_path / "none", {"0.txt": "x"}))
    with pytest.raises(DataError, match="the class 0 has labels but no image"):
        build_index(shard(tmp_path / "class", {"0.heic": None, "0.cls": "0", "1.jpg": None, "1.cls": "1"}))
    index = build_index(shard(tmp_path / "some", {"0.txt": "x", "0.jpg": None, "0.cls": "1"}))
    assert index.label.tolist() == [1]
    assert "members that are not used: .txt 1 (0.txt)" in caplog.text
    assert "no image has the class number 0, and the highest is 1; class numbers count from 0" in caplog.text
