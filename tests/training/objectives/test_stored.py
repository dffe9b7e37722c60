"""Pairs of views get the same crop, flip, augmentation and mixing; a teacher adds its divergence."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import tiny

from mae_dat.config.groups import AugmentConfig
from mae_dat.data.transforms import PretrainTransform, finetune_transform
from mae_dat.runtime.seeds import seed_everything
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.stored import WithStoredAdversary, WithTeacher

PLAIN = AugmentConfig(mixup=0.0, cutmix=0.0, smoothing=0.0)
MIXED = AugmentConfig(mixup=0.8, cutmix=1.0, smoothing=0.1)


def photo(height: int = 40, width: int = 56) -> np.ndarray:
    """A smooth color image, uint8 (H, W, 3)."""
    small = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


TRANSFORMS = {
    "pretrain": PretrainTransform((24, 24)),
    "plain": finetune_transform((24, 24), aa=None, reprob=0.0),
    "augmented": finetune_transform((24, 32), reprob=0.9, interpolation="random"),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_both_views_are_the_same_where_the_images_are(name: str) -> None:
    transform: Any = TRANSFORMS[name]
    for seed in range(8):
        seed_everything(seed)
        views = transform((photo(), photo()))
        assert torch.equal(views[0], views[1])
        seed_everything(seed)
        assert torch.equal(transform(photo()), views[0])  # the clean view is that of a plain training
        seed_everything(seed)
        assert torch.equal(transform((Image.fromarray(photo()), Image.fromarray(photo()))), views)


@pytest.mark.parametrize("name", ["pretrain", "plain"])
def test_views_of_another_size_show_the_same_region(name: str) -> None:
    transform: Any = TRANSFORMS[name]
    larger = np.array(Image.fromarray(photo()).resize((140, 100), Image.Resampling.BICUBIC))
    for seed in range(8):
        seed_everything(seed)
        clean, stored = transform((photo(), larger)).float()
        assert (clean - stored).abs().mean() < 3  # of 255 levels; a shift by one pixel makes it 5 and more
        shifted = stored.roll(1, -1)
        assert (clean - shifted)[..., 1:].abs().mean() > (clean - stored)[..., 1:].abs().mean()


def batch(views: torch.Tensor) -> Any:
    numbers = torch.arange(len(views))
    return {"image": views, "label": numbers % 10, "index": numbers, "skipped": torch.zeros_like(numbers)}


@pytest.mark.parametrize("augment", [PLAIN, MIXED])
def test_equal_views_have_equal_losses(augment: AugmentConfig) -> None:
    torch.manual_seed(0)
    model, image = tiny().eval(), torch.rand(4, 3, 64, 64)
    objective = Classification(augment, 10)
    seed_everything(3)
    parts = WithStoredAdversary(objective).step(model, batch(torch.stack([image, image], 1)), torch.Generator())
    assert torch.equal(parts["loss_clean"], parts["loss_adversarial"])
    assert torch.equal(parts["loss"], 2 * parts["loss_clean"])
    seed_everything(3)
    plain = objective.step(model, batch(image), torch.Generator())
    assert torch.equal(plain["loss"], parts["loss_clean"])


def test_the_adversarial_loss_is_that_of_the_second_view() -> None:
    torch.manual_seed(0)
    model, image = tiny().eval(), torch.rand(4, 3, 64, 64)
    objective, other = Classification(PLAIN, 10), torch.rand(4, 3, 64, 64)
    views = batch(torch.stack([image, other], 1))
    parts = WithStoredAdversary(objective).step(model, views, torch.Generator())
    torch.testing.assert_close(
        parts["loss_adversarial"], objective.step(model, batch(other), torch.Generator())["loss"]
    )
    first = WithStoredAdversary(objective, batch_share=0.5).step(model, views, torch.Generator())
    expected = objective.step(model, batch(other[:2]), torch.Generator())["loss"]
    torch.testing.assert_close(first["loss_adversarial"], expected)


def test_a_teacher_that_agrees_adds_nothing() -> None:
    torch.manual_seed(0)
    model, image = tiny().eval(), torch.rand(4, 3, 64, 64)
    plain = Classification(PLAIN, 10).step(model, batch(image), torch.Generator())["loss"]
    same = WithTeacher(PLAIN, 10, model, list(range(10)), weight=5.0).step(model, batch(image), torch.Generator())
    assert same["loss_teacher"].item() == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(same["loss"], plain)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_divergence_is_that_of_the_definition(temperature: float) -> None:
    torch.manual_seed(0)
    student, teacher, image = tiny().eval(), tiny().eval(), torch.rand(4, 3, 64, 64)
    for model in (student, teacher):
        torch.nn.init.normal_(model.net.head.weight)  # type: ignore[union-attr, arg-type]
    outputs = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]  # the teacher has the classes in the opposite order
    objective = WithTeacher(PLAIN, 10, teacher, outputs, weight=0.5, temperature=temperature)
    parts = objective.step(student, batch(image), torch.Generator())
    p = (teacher(image).flip(1) / temperature).softmax(1)
    q = (student(image) / temperature).softmax(1)
    divergence = temperature**2 * (p * (p / q).log()).sum(1).mean()
    assert parts["loss_teacher"].item() == pytest.approx(divergence.item(), rel=1e-4)
    parts["loss"].backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert any(parameter.grad is not None for parameter in student.parameters())
