"""Image folders, transforms, order and loaders."""

import io
import random
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode, RandomHorizontalFlip, RandomResizedCrop, ToTensor
from torchvision.transforms.functional import to_tensor

from mae_dat.config.errors import DataError, MissingInputError
from mae_dat.data import image_set as data
from mae_dat.data import transforms
from mae_dat.data.decode import decode_bytes, decode_file, decode_pixels
from mae_dat.data.folders import find_split
from mae_dat.data.image_set import ImageFolder, as_float
from mae_dat.data.loader import eval_loader, train_loader
from mae_dat.data.sampler import EvalSampler, TrainSampler, epoch_order, steps_per_epoch
from mae_dat.data.transforms import EraseInRange, EvalTransform, PretrainTransform, finetune_transform

Make = Callable[[str], Path]


def noise(height: int = 20, width: int = 24, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes noise pictures of these names (relative to the root), and returns the root."""

    def write(names: str) -> Path:
        for number, name in enumerate(names.split()):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            noise(seed=number).save(path, format="PNG")
        return tmp_path

    return write


# ---- decoding ----

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
        path.write_bytes({"empty": b"", "html": b"<!DOCTYPE html><p>404", "text": b"not a picture"}[kind])


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
def test_a_huge_picture_is_refused_from_its_header(size: tuple[int, int], tmp_path: Path) -> None:
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
    ids=["444", "422", "420", "progressive", "restarts", "oriented", "RGB", "grey", "CMYK", "PNG", "more"],
)
def test_pixels_are_those_of_the_picture(content: bytes) -> None:
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


# ---- folders ----


def test_classes_are_sorted_and_dot_entries_are_none(make: Make) -> None:
    root = make("b/1.png b/deep/2.JPG a/3.Jpeg .ipynb_checkpoints/4.png a/._3.png a/.hidden/5.png")
    (root / "a" / "notes.txt").touch()
    (root / "stray.png").touch()
    folder = ImageFolder(root, to_tensor)
    assert folder.classes == ["a", "b"]
    names = [(Path(path).relative_to(root).as_posix(), label) for path, label in folder.samples]
    assert names == [("a/3.Jpeg", 0), ("b/1.png", 1), ("b/deep/2.JPG", 1)]


def test_links_are_followed_once(make: Make) -> None:
    root = make("a/1.png b/2.png")
    (root / "a" / "loop").symlink_to(root / "a")
    (root / "a" / "up").symlink_to(root)
    (root / "self").symlink_to(root)
    (root / "Alias").symlink_to(root / "b")
    folder = ImageFolder(root, to_tensor)
    assert folder.classes == ["a", "b"]
    assert len(folder) == 2
    assert len(ImageFolder(root, to_tensor, labelled=False)) == 2


def test_a_class_may_be_a_link_to_elsewhere(make: Make) -> None:
    root = make("data/a/1.png store/cats/2.png")
    (root / "data" / "cat").symlink_to(root / "store" / "cats")
    assert ImageFolder(root / "data", to_tensor).classes == ["a", "cat"]


def test_unlabelled_takes_any_folder(make: Make) -> None:
    folder = ImageFolder(make("z.png a/1.png a/b/2.png"), to_tensor, labelled=False)
    assert [Path(path).name for path, _ in folder.samples] == ["1.png", "2.png", "z.png"]
    sample = folder[0]
    assert (sample["label"], sample["index"], sample["skipped"]) == (-1, 0, 0)
    assert sample["image"].shape == (3, 20, 24)
    assert sample["image"].dtype == torch.float32


def test_given_classes_fix_the_labels(make: Make) -> None:
    root = make("b/1.png c/2.png")
    folder = ImageFolder(root, to_tensor, classes=["a", "b", "c"])
    assert [label for _, label in folder.samples] == [1, 2]
    with pytest.raises(DataError, match="unknown to training: c"):
        ImageFolder(root, to_tensor, classes=["a", "b"])


@pytest.mark.parametrize(
    ("names", "folder", "labelled", "error", "message"),
    [
        ("photos/a/1.png", "photo", True, MissingInputError, "did you mean .*photos"),
        ("photos/a/1.png", "xyz", True, MissingInputError, "does not exist"),
        ("photos/a/1.png", "photos/a/1.png", True, MissingInputError, "is a file"),
        ("photos/1.png", "photos", True, DataError, "no class folders; expected .*<class>"),
        ("photos/a/1.png photos/b/x.txt", "photos", True, DataError, "b has no image"),
        ("photos/x.txt", "photos", False, DataError, "no images"),
    ],
)
def test_bad_trees(names: str, folder: str, labelled: bool, error: type[Exception], message: str, make: Make) -> None:
    root = make(names)
    with pytest.raises(error, match=message) as caught:
        ImageFolder(root / folder, to_tensor, labelled=labelled)
    assert str(root) in str(caught.value)


def test_splits_are_found(make: Make) -> None:
    root = make("one/train/a/1.png one/validation/a/1.png one/test/a/1.png flat/a/1.png")
    assert find_split(root / "one", "train") == root / "one" / "train"
    assert find_split(root / "one", "val") == root / "one" / "validation"
    assert find_split(root / "one", "val", names=["test"]) == root / "one" / "test"
    assert find_split(root / "flat", "train", labelled=False) == root / "flat"
    with pytest.raises(MissingInputError, match="train/<class>"):
        find_split(root / "flat", "train")
    with pytest.raises(MissingInputError, match="val or validation or test"):
        find_split(root / "flat", "val", labelled=False)


def test_skipping_takes_the_next_good_image_and_counts(make: Make) -> None:
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


def test_skipping_is_capped(make: Make) -> None:
    root = make(" ".join(f"{number:02d}.png" for number in range(15)))
    for number in range(12):
        (root / f"{number:02d}.png").write_bytes(b"")
    folder = ImageFolder(root, to_tensor, on_bad="skip", labelled=False)
    with pytest.raises(DataError, match=r"11 bad images in a row, from .*00\.png"):
        folder[0]
    assert folder[2]["index"] == 12
    assert ImageFolder(root, to_tensor, on_bad="skip", labelled=False, max_skips=12)[0]["index"] == 12


# ---- transforms ----


@pytest.mark.parametrize("size", [(32, 32), (32, 48), (256, 240)])
def test_transforms_give_the_size_in_range(size: tuple[int, int]) -> None:
    for transform in (PretrainTransform(size), finetune_transform(size, reprob=1.0), EvalTransform(size)):
        for height, width in [(60, 80), (80, 60), (300, 30), size]:
            image = as_float(transform(noise(height, width)))
            assert image.shape == (3, *size)
            assert image.dtype == torch.float32
            assert image.min() >= 0
            assert image.max() <= 1
            assert image.std() > 0.02


def smooth(height: int, width: int) -> Image.Image:
    """Structure of every scale, as in a photograph, from black to white."""
    scales = [noise(n, n, seed=n).resize((width, height), Image.Resampling.BICUBIC) for n in (3, 9, 27, 81)]
    return Image.fromarray(np.mean([np.asarray(one) for one in scales], 0).round().astype(np.uint8))


def test_training_crops_are_pils_to_a_fiftieth_of_a_grey_level() -> None:
    size = (96, 96)
    ratio = transforms._aspect_ratios(size)
    crop = RandomResizedCrop(size, (0.2, 1.0), ratio, InterpolationMode.BICUBIC)
    theirs = {
        "pretrain": Compose([crop, RandomHorizontalFlip(), ToTensor()]),
        "finetune": create_transform((3, *size), True, scale=(0.08, 1.0), color_jitter=None, interpolation="bicubic"),
    }
    theirs["finetune"].transforms.pop()  # the normalisation
    ours = {"pretrain": PretrainTransform(size), "finetune": finetune_transform(size, aa=None, reprob=0)}
    for name in ours:
        off = []
        for seed in range(20):
            picture, found = smooth(250 + seed, 333), []
            for transform in (ours[name], theirs[name]):
                torch.manual_seed(seed)
                random.seed(seed)
                found.append(255 * as_float(transform(picture)))
            off.append((found[0] - found[1]).abs())
        assert torch.stack(off).mean() < 0.02, name
        assert torch.stack(off).max() <= 2.01, name


def test_pixels_travel_as_8_bits_and_become_the_floats_of_evaluation(make: Make) -> None:
    root = make("a/1.png a/2.png a/3.png")
    sampler = TrainSampler(3, 3, 0, 1, seed=0, start_step=0, total_steps=1)
    (batch,) = train_loader(ImageFolder(root, PretrainTransform((16, 16))), sampler, num_workers=0)
    assert batch["image"].dtype == torch.uint8
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(3, 16, 16)
    assert torch.equal(as_float(every), to_tensor(Image.fromarray(every.permute(1, 2, 0).numpy())))
    there = torch.rand(3, 4, 4)
    assert as_float(there) is there


def test_evaluation_matches_the_reference_protocol() -> None:
    """Resize the shorter side to 256, crop 224; at 384 the crop is the whole shorter side."""
    picture = noise(300, 411)
    resized = picture.resize((int(256 * 411 / 300), 256), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 224) / 2), 16
    expected = to_tensor(resized.crop((left, top, left + 224, top + 224)))
    assert torch.equal(EvalTransform((224, 224))(picture), expected)
    whole = picture.resize((int(384 * 411 / 300), 384), Image.Resampling.BICUBIC)
    left = round((whole.width - 384) / 2)
    assert torch.equal(EvalTransform((384, 384))(picture), to_tensor(whole.crop((left, 0, left + 384, 384))))


def test_an_image_of_the_target_size_is_not_blurred() -> None:
    picture = noise(48, 64)
    assert torch.equal(EvalTransform((48, 64))(picture), to_tensor(picture))
    taller = noise(49, 64)
    assert not torch.equal(EvalTransform((48, 64))(taller), to_tensor(taller)[:, :48]), "only the exact size passes"


@pytest.mark.parametrize("mode", ["pixel", "rand", "const", "pixel_raw"])
def test_erasing(mode: str) -> None:
    image = torch.full((3, 64, 64), 0.123)
    erased = EraseInRange(1.0, mode, 1)(image)
    changed = (erased != image).any(dim=0)
    assert 0.01 < changed.float().mean() < 0.4
    assert torch.equal(erased[:, ~changed], image[:, ~changed])
    out_of_range = ((erased < 0) | (erased > 1))[:, changed].float().mean()
    assert (out_of_range > 0.5) if mode == "pixel_raw" else (out_of_range == 0)
    if mode == "const":
        assert erased[:, changed][:, 0].tolist() == pytest.approx(transforms.IMAGENET_DEFAULT_MEAN)
    assert torch.equal(EraseInRange(0.0, mode, 1)(image), image)
    assert torch.equal(image, torch.full((3, 64, 64), 0.123)), "the input is left alone"


@pytest.mark.parametrize("mode", ["pixel", "rand", "const", "pixel_raw"])
def test_erasing_of_8_bits_is_that_of_floats(mode: str) -> None:
    image = torch.randint(256, (3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    found = []
    for each in (image, as_float(image)):
        random.seed(1)
        torch.manual_seed(1)
        found.append(EraseInRange(1.0, mode, 1)(each))
    assert found[0].dtype == (torch.float32 if mode == "pixel_raw" else torch.uint8)
    torch.testing.assert_close(as_float(found[0]), found[1], rtol=0, atol=0.5001 / 255)


def test_an_unknown_erasing_mode_is_named() -> None:
    with pytest.raises(ValueError, match="stripes"):
        finetune_transform((32, 32), remode="stripes")


def test_crops_keep_the_aspect_of_a_non_square_target() -> None:
    """The whole of a 2:1 picture fits a 2:1 target: halved, its ramp rises by two a pixel."""
    crop = finetune_transform((32, 64), aa=None, reprob=0, crop_scale=(1.0, 1.0), hflip=0)
    ramp = np.tile(np.arange(128, dtype=np.uint8)[None, :, None], (64, 1, 3))
    slope = crop(Image.fromarray(ramp))[0].float().diff(dim=1).mean()
    assert slope.item() == pytest.approx(2, abs=0.05)


# ---- order ----


def test_the_order_is_pure_and_differs_by_epoch_and_seed() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    order = epoch_order(100, seed=1, epoch=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(order, epoch_order(100, 1, 2))
    assert sorted(order.tolist()) == list(range(100))
    assert not torch.equal(order, epoch_order(100, 1, 3))
    assert not torch.equal(order, epoch_order(100, 2, 2))


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_each_global_batch_exactly(world_size: int) -> None:
    length, batch = 90, 4
    per_epoch = steps_per_epoch(length, batch, world_size)
    samplers = [TrainSampler(length, batch, rank, world_size, 0, 0, 2 * per_epoch) for rank in range(world_size)]
    steps = list(zip(*samplers, strict=True))
    assert len(steps) == 2 * per_epoch
    for epoch in (0, 1):
        keys = [key for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for part in step for key in part]
        expected = epoch_order(length, 0, epoch)[: per_epoch * batch * world_size].tolist()
        assert keys == [(epoch, index) for index in expected]


@pytest.mark.parametrize(("batch", "accum", "world_size"), [(24, 1, 1), (8, 3, 1), (4, 3, 2), (4, 2, 3), (12, 1, 2)])
def test_the_order_is_the_same_for_any_shares_of_the_global_batch(batch: int, accum: int, world_size: int) -> None:
    """Ranks and micro-batches share out the same 24 images in every update."""
    samplers = [TrainSampler(90, batch, rank, world_size, 0, 1, 7, accum) for rank in range(world_size)]
    assert [len(one) for one in samplers] == [6 * accum] * world_size
    micro = [list(one) for one in samplers]
    steps = [one[step * accum : (step + 1) * accum] for step in range(6) for one in micro]
    keys = [key for parts in steps for part in parts for key in part]
    order = [(epoch, index) for epoch in range(3) for index in epoch_order(90, 0, epoch)[:72].tolist()]
    assert keys == order[24 : 24 * 7]


def test_resuming_gives_the_tail() -> None:
    whole = list(TrainSampler(50, 8, 1, 2, seed=3, start_step=0, total_steps=11))
    tail = TrainSampler(50, 8, 1, 2, seed=3, start_step=4, total_steps=11)
    assert list(tail) == whole[4:]
    assert len(tail) == 7
    assert list(tail) == whole[4:], "a sampler can be iterated again"


def test_too_few_images_for_a_batch() -> None:
    with pytest.raises(DataError, match=r"10 images .* batch_size 8 x accum_iter 1 x 2 processes"):
        TrainSampler(10, 8, 0, 2, 0, 0, 5)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_sees_each_sample_once(world_size: int) -> None:
    shares = [list(EvalSampler(20, rank, world_size)) for rank in range(world_size)]
    assert sorted(index for share in shares for index in share) == list(range(20))


# ---- loaders ----


def random_states() -> tuple[object, bytes, bytes]:
    return random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()


def batches(root: Path, num_workers: int, start_step: int = 0) -> list[data.Batch]:
    folder = ImageFolder(root, finetune_transform((16, 16), reprob=1.0, aa="rand-m9-mstd0.5-inc1"), seed=1)
    sampler = TrainSampler(len(folder), 3, 0, 1, seed=1, start_step=start_step, total_steps=5)
    return list(train_loader(folder, sampler, num_workers))


def same(left: list[data.Batch], right: list[data.Batch]) -> bool:
    keys = ("image", "label", "index", "skipped")
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a[key], b[key]) for a, b in pairs for key in keys)  # type: ignore[literal-required]


def test_samples_do_not_depend_on_workers_or_on_global_randomness(make: Make) -> None:
    root = make("a/1.png a/2.png a/3.png b/4.png b/5.png b/6.png b/7.png")
    before = random_states()
    first = batches(root, num_workers=0)
    assert random_states() == before, "the global generators are left as they were"
    random.seed(9)
    np.random.seed(9)
    torch.manual_seed(9)
    before = random_states()
    assert same(first, batches(root, num_workers=2))
    assert random_states() == before
    assert same(first[3:], batches(root, num_workers=0, start_step=3))
    assert first[0]["image"].shape == (3, 3, 16, 16)
    assert first[0]["label"].dtype == torch.int64


def test_augmentation_differs_by_epoch_and_index(make: Make) -> None:
    root = make("a/1.png")
    (root / "a" / "2.png").write_bytes((root / "a" / "1.png").read_bytes())
    folder = ImageFolder(root, PretrainTransform((16, 16)))
    assert torch.equal(folder[(0, 0)]["image"], folder[(0, 0)]["image"])
    assert torch.equal(folder[0]["image"], folder[(0, 0)]["image"])
    assert not torch.equal(folder[(0, 0)]["image"], folder[(1, 0)]["image"])
    assert not torch.equal(folder[(0, 0)]["image"], folder[(0, 1)]["image"])
    other = ImageFolder(root, PretrainTransform((16, 16)), seed=1)
    assert not torch.equal(folder[(0, 0)]["image"], other[(0, 0)]["image"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_reaches_the_main_process_as_a_plain_message(num_workers: int, make: Make) -> None:
    root = make("a/1.png a/2.png a/3.png")
    (root / "a" / "2.png").write_bytes(b"<html>")
    folder = ImageFolder(root, to_tensor)
    with pytest.raises(DataError, match=r"2\.png: it is a web page") as caught:
        list(eval_loader(folder, 3, 0, 1, num_workers))
    assert "Traceback" not in str(caught.value)


LEAVES_A_LOADER = """
import multiprocessing, os, signal, sys
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.loader import eval_loader
from mae_dat.data.transforms import EvalTransform
loader = eval_loader(ImageFolder(sys.argv[1], EvalTransform((16, 16))), 1, 0, 1, num_workers=1)
batches = iter(loader)
next(batches)
(worker,) = multiprocessing.active_children()
os.kill(worker.pid, signal.SIGTERM)
next(batches)
print("read on")
"""


def test_a_workers_sigterm_is_ignored_while_the_run_lasts_and_ends_it_at_exit(make: Make) -> None:
    # The loader is still alive when Python exits, which ends its workers by SIGTERM and waits for them without limit.
    command = [sys.executable, "-c", LEAVES_A_LOADER, str(make("a/1.png a/2.png a/3.png"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "read on\n"), done.stderr


def test_an_error_of_ours_is_not_swallowed(make: Make) -> None:
    def broken(image: Image.Image) -> Tensor:
        raise RuntimeError("a fault in the transform")

    folder = ImageFolder(make("a/1.png"), broken)
    with pytest.raises(RuntimeError, match="a fault in the transform"):
        list(eval_loader(folder, 1, 0, 1, num_workers=0))


def test_exact_evaluation_over_ranks(make: Make) -> None:
    root = make("a/1.png a/2.png a/3.png b/4.png b/5.png")
    folder = ImageFolder(root, EvalTransform((16, 16)))
    shares = [list(eval_loader(folder, 2, rank, 2, num_workers=0)) for rank in (0, 1)]
    indices = [torch.cat([batch["index"] for batch in share]).tolist() for share in shares]
    assert indices == [[0, 2, 4], [1, 3]]
    assert [len(batch["label"]) for batch in shares[0]] == [2, 1]


def test_a_fingerprint_is_of_names_and_labels_wherever_they_lie(make: Make, tmp_path: Path) -> None:
    root = make("a/1.png a/2.png b/3.png")

    def fingerprint(folder: Path, labelled: bool = True) -> str:
        return ImageFolder(folder, EvalTransform((16, 16)), labelled=labelled).fingerprint()

    before = fingerprint(root)
    assert before == fingerprint(shutil.copytree(root, tmp_path / "copy"))
    assert before != fingerprint(root, labelled=False)
    (root / "b" / "3.png").rename(root / "b" / "4.png")
    renamed = fingerprint(root)
    (root / "b" / "4.png").rename(root / "a" / "4.png")
    (root / "a" / "2.png").rename(root / "b" / "2.png")
    assert len({before, renamed, fingerprint(root)}) == 3
