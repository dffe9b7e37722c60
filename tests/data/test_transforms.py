"""Transforms: sizes and ranges, agreement with PIL and the reference protocol, and erasing."""

import random

import numpy as np
import pytest
import torch
from noise_images import MakeFolder, noise
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import Compose, InterpolationMode, RandomHorizontalFlip, RandomResizedCrop, ToTensor
from torchvision.transforms.functional import to_tensor

from mae_dat.data import transforms
from mae_dat.data.image_set import ImageFolder, as_float
from mae_dat.data.loader import train_loader
from mae_dat.data.sampler import TrainSampler
from mae_dat.data.transforms import EraseInRange, EvalTransform, PretrainTransform, finetune_transform


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


def test_training_crops_are_pils_to_a_fiftieth_of_a_gray_level() -> None:
    size = (96, 96)
    ratio = transforms._aspect_ratios(size)
    crop = RandomResizedCrop(size, (0.2, 1.0), ratio, InterpolationMode.BICUBIC)
    theirs = {
        "pretrain": Compose([crop, RandomHorizontalFlip(), ToTensor()]),
        "finetune": create_transform((3, *size), True, scale=(0.08, 1.0), color_jitter=None, interpolation="bicubic"),
    }
    theirs["finetune"].transforms.pop()  # the normalization
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


def test_pixels_travel_as_8_bits_and_become_the_floats_of_evaluation(make: MakeFolder) -> None:
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
    """The whole of a 2:1 image fits a 2:1 target: halved, its ramp rises by two a pixel."""
    crop = finetune_transform((32, 64), aa=None, reprob=0, crop_scale=(1.0, 1.0), hflip=0)
    ramp = np.tile(np.arange(128, dtype=np.uint8)[None, :, None], (64, 1, 3))
    slope = crop(Image.fromarray(ramp))[0].float().diff(dim=1).mean()
    assert slope.item() == pytest.approx(2, abs=0.05)


def test_the_interpolation_of_training_crops_is_drawn_per_image() -> None:
    """As timm's `random`: each crop is the bilinear or the bicubic one, and both occur."""
    image = smooth(48, 64)
    views = {}
    for name in ("bilinear", "bicubic", "random"):
        transform = finetune_transform((32, 32), aa=None, reprob=0, interpolation=name, crop_scale=(1, 1), hflip=0)
        crops = []
        for seed in range(20):
            random.seed(seed)
            torch.manual_seed(seed)
            crops.append(transform(image))
        views[name] = torch.stack(crops).flatten(1)
    is_bilinear = (views["random"] == views["bilinear"]).all(1)
    is_bicubic = (views["random"] == views["bicubic"]).all(1)
    assert (is_bilinear ^ is_bicubic).all()
    assert 3 < int(is_bilinear.sum()) < 17
