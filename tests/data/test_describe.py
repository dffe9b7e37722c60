"""The images of a command in words."""

import pickle
from pathlib import Path

import pytest
import torch
from noise_images import MakeFolder
from torchvision.transforms.functional import to_tensor

from mae_dat.config.commands.pack import PackConfig
from mae_dat.data.describe import add_images, describe_resize
from mae_dat.data.image_set import ImageFolder, ImageSet
from mae_dat.data.loader import eval_loader
from mae_dat.data.open import image_root, open_images
from mae_dat.data.shards.pack import pack
from mae_dat.data.transforms import EvalTransform
from mae_dat.runtime.console import Console
from mae_dat.runtime.inputs import InputSummary, read_inputs

NAMES = "train/cat/1.png train/cat/2.png train/dog/3.png test/cat/4.png test/dog/5.png valid/cat/6.png"


def rows(data_path: str | None, root: Path, splits: dict[str, ImageSet], **settings: str) -> dict[str, str]:
    inputs = InputSummary("finetune")
    add_images(inputs, data_path, root, splits, **settings)  # type: ignore[arg-type]
    shown: dict[str, str] = inputs.as_json()["rows"]
    return shown


def test_the_split_that_is_used_and_what_is_left_out_are_visible(make: MakeFolder) -> None:
    root = make(f"{NAMES} train/dog/7.heic")
    images = ImageFolder(root / "train", to_tensor)
    held_out = ImageFolder(root / "test", to_tensor, classes=images.classes)
    assert rows(str(root), root, {"training": images, "validation": held_out}) == {
        "data": f"{root}\nnot used: valid/",
        "training": "train/: 3 images in 2 classes (1 to 2 each)",
        "validation": "test/: 2 images in 2 classes (1 each)",
        "classes": "0 cat, 1 dog (folder names, sorted)",
        "left out": ".heic 1 (train/dog/7.heic)",
    }


def test_the_classes_of_a_model_that_have_no_folder_are_named(make: MakeFolder) -> None:
    root = make("val/b/1.png")
    images = ImageFolder(root / "val", to_tensor, classes=["a", "b", "c"])
    found = rows(str(root), root, {"validation": images}, names_from="names stored with the model")
    assert found["validation"] == "val/: 1 image in 1 class (1 each); none of 2 more: a, c"
    assert found["classes"] == "0 a, 1 b, 2 c (names stored with the model)"
    assert found["left out"] == "nothing"


def test_imagenet_ids_get_their_english_names(make: MakeFolder) -> None:
    root = make("val/n02102040/1.png val/n01440764/2.png val/n00000000/3.png")
    found = rows(str(root), root, {"validation": ImageFolder(root / "val", to_tensor)})
    assert found["classes"].startswith("0 n00000000, 1 n01440764 tench, 2 n02102040 English springer (")


def test_the_origin_of_the_folder_is_named(
    make: MakeFolder, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = make("photos/1.png")
    link = tmp_path_factory.mktemp("links") / "link"
    link.symlink_to(root / "photos")
    monkeypatch.chdir(root)
    images: dict[str, ImageSet] = {"training": ImageFolder("photos", to_tensor, labeled=False)}
    assert rows("photos", Path("photos"), images) == {
        "data": f"{root}/photos",
        "training": "all folders: 1 image",
        "left out": "nothing",
    }
    monkeypatch.setenv("MAE_DAT_DATA", str(link))
    assert rows(None, image_root(None), images)["data"] == f"{link} (link to {root}/photos) (from $MAE_DAT_DATA)"
    assert rows("demo", root, images)["data"] == f"{root} (generated images, demo)"
    address = "https://example.org/shards"
    assert rows(address, root, images)["data"] == f"{address}, cached in {root}"


def test_shards_are_described_by_their_index(make: MakeFolder, tmp_path_factory: pytest.TempPathFactory) -> None:
    root, out = make(NAMES), tmp_path_factory.mktemp("shards") / "out"
    pack(PackConfig(str(root), str(out), num_workers=0), Console(quiet=True))
    packed = read_inputs(out / "inputs.json")
    assert packed.rows["train"] == "train/: 3 images in 2 classes (1 to 2 each)"
    images = open_images(out / "train", to_tensor)
    assert images.class_counts() == [2, 1]
    found = rows(str(out), out, {"training": images})
    assert found["training"].startswith("train/: 3 images in 2 classes (1 to 2 each); 1 shard, ")
    assert found["classes"] == "0 cat, 1 dog (from index.safetensors)"
    unlabeled = rows(str(out), out, {"training": open_images(out / "train", to_tensor, labeled=False)})
    assert unlabeled["training"].startswith("train/: 3 images; 1 shard, ")
    assert "classes" not in unlabeled


def test_workers_get_the_same_samples_and_little_more(make: MakeFolder) -> None:
    """The counts travel to the workers with the image set: they must stay small, and change no sample."""
    root = make(" ".join(f"a/{number}.png" for number in range(6)))
    for number in range(300):
        (root / "a" / f"{number}.{number}").touch()
    images = ImageFolder(root, EvalTransform((16, 16)))
    size = len(pickle.dumps(images))
    batches = [list(eval_loader(images, 2, 0, 1, num_workers=workers)) for workers in (0, 2)]
    for first, second in zip(*batches, strict=True):
        assert torch.equal(first["image"], second["image"])
        assert torch.equal(first["label"], second["label"])
    images.ignored_files = type(images.ignored_files)()
    assert size - len(pickle.dumps(images)) < 6000


@pytest.mark.parametrize(
    ("size", "text"),
    [
        ((224, 224), "shorter side to 256, center crop 224 x 224, bicubic"),
        ((384, 384), "shorter side to 384, center crop 384 x 384, bicubic"),
        ((64, 128), "resized to cover 73 x 146, center crop 64 x 128, bicubic"),
    ],
)
def test_the_crop_is_the_one_of_the_transform(size: tuple[int, int], text: str) -> None:
    assert describe_resize(EvalTransform(size)) == text
