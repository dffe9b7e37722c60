"""Consistent predictions: the divergence against timm's, AugMix's views and loss, and DAT with its three views."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dat_steps import (
    CLASSES,
    IMAGES,
    WIDTH,
    CountedTokenizer,
    Products,
    SmallNet,
    batch_of,
    generator,
    gradients,
    labels,
    linear_net,
    tokenizer,
)
from PIL import Image
from timm.data.auto_augment import posterize as timm_posterize
from timm.loss import JsdCrossEntropy
from torch import Tensor

from mae_dat.attacks.discrete import AttackConfig
from mae_dat.config.groups import AugmentConfig
from mae_dat.data.image_set import Batch
from mae_dat.data.transforms import FinetuneTransform, finetune_transform
from mae_dat.runtime.seeds import seed_everything
from mae_dat.training.objectives.consistency import AUGMIX_VIEWS, AugMix, ConsistentDAT, jensen_shannon
from mae_dat.training.objectives.dat import WithDAT

__all__ = ["tokenizer"]  # the fixture


# ---- the divergence ----


@pytest.mark.parametrize("scale", [0.1, 3.0, 100.0])
def test_loss_and_divergence_are_timms(scale: float) -> None:
    logits = scale * torch.randn(AUGMIX_VIEWS * 6, 7, generator=generator())
    target = torch.arange(6)
    expected = JsdCrossEntropy(AUGMIX_VIEWS, alpha=12, smoothing=0)(logits, target)
    views = logits.chunk(AUGMIX_VIEWS)
    torch.testing.assert_close(F.cross_entropy(views[0], target) + 12 * jensen_shannon(views), expected)


def test_the_divergence_is_zero_of_equal_views_and_at_most_the_log_of_their_number() -> None:
    one = torch.randn(4, 5, generator=generator())
    torch.testing.assert_close(jensen_shannon([one, one + 3, one]), torch.zeros(()), atol=1e-6, rtol=0)
    sure = [1e4 * F.one_hot(torch.full((4,), place), 5).float() for place in range(3)]
    torch.testing.assert_close(jensen_shannon(sure), torch.tensor(math.log(3)))
    with torch.no_grad():
        assert jensen_shannon([one.bfloat16(), one.bfloat16().flip(0)]).dtype == torch.float32


def test_its_gradient_is_finite_where_views_are_certain() -> None:
    logits = (1e4 * torch.eye(3)).requires_grad_()
    jensen_shannon([logits, logits.flip(0)]).backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


# ---- AugMix ----


def picture(side: int = 40) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))


def seeded(transform: object) -> Tensor:
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    return transform(picture())  # type: ignore[operator,no-any-return]


def test_the_views_are_one_crop_and_two_mixtures_of_it() -> None:
    plain = seeded(finetune_transform((32, 32), aa=None, reprob=0))
    views = seeded(finetune_transform((32, 32), aa="augmix-m3-w3", reprob=0, views=AUGMIX_VIEWS))
    assert views.shape == (AUGMIX_VIEWS, 3, 32, 32)
    assert views.dtype == torch.uint8
    assert torch.equal(views[0], plain)
    assert not torch.equal(views[1], views[0])
    assert not torch.equal(views[2], views[1])
    assert torch.equal(views, seeded(finetune_transform((32, 32), aa="augmix-m3-w3", reprob=0, views=AUGMIX_VIEWS)))


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m0", "v0"])
def test_the_strongest_posterization_leaves_a_bit(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    augment, seen = finetune_transform((32, 32), aa=policy, reprob=0), []

    def kept(image: Image.Image, bits: int) -> Image.Image:
        seen.append(bits)
        return timm_posterize(image, bits)

    monkeypatch.setattr("mae_dat.data.transforms.timm_posterize", kept)
    for seed in range(300):
        seed_everything(seed)
        augment(picture())
    assert min(seen) == 1, "timm gives 0, which Pillow refuses"


def test_a_single_view_is_the_first_mixture() -> None:
    single = seeded(finetune_transform((32, 32), aa="augmix-m3-w3", reprob=0))
    assert torch.equal(single, seeded(finetune_transform((32, 32), aa="augmix-m3-w3", reprob=0, views=AUGMIX_VIEWS))[1])


@pytest.mark.parametrize("resplit", [True, False])
def test_resplit_spares_the_clean_view_from_erasing(resplit: bool) -> None:
    plain = seeded(finetune_transform((32, 32), aa=None, reprob=0))
    views = seeded(
        finetune_transform((32, 32), aa=None, reprob=1.0, remode="const", views=AUGMIX_VIEWS, resplit=resplit)
    )
    assert [torch.equal(view, plain) for view in views] == [resplit, False, False]


def test_augmix_has_the_papers_operations_and_none_of_imagenet_c() -> None:
    """timm's own list has brightness, contrast, color (saturation) and sharpness (the inverse of blur) besides."""
    transform = finetune_transform((32, 32), aa="augmix-m3-w3")
    assert isinstance(transform, FinetuneTransform)
    (policy,) = transform.augment
    names = (
        "AutoContrast Equalize Rotate PosterizeIncreasing SolarizeIncreasing ShearX ShearY TranslateXRel TranslateYRel"
    )
    assert [op.name for op in policy.ops] == names.split()  # type: ignore[attr-defined]
    assert (policy.width, policy.depth, policy.alpha) == (3, -1, 1.0)  # type: ignore[attr-defined]


def batch_of_views() -> Batch:
    batch = batch_of(6)
    batch["image"] = torch.stack([batch_of(6, seed)["image"] for seed in range(AUGMIX_VIEWS)], 1)
    return batch


def test_augmixs_loss_is_timms_of_one_pass() -> None:
    batch, model = batch_of_views(), SmallNet().eval()
    parts = AugMix(AugmentConfig(smoothing=0.1), CLASSES, 12.0).step(model, batch, generator())
    assert [tuple(seen.shape[:1]) for seen in model.seen] == [(18,)]
    logits = model(torch.cat([batch["image"][:, view] for view in range(AUGMIX_VIEWS)]))
    torch.testing.assert_close(parts["loss"], JsdCrossEntropy(AUGMIX_VIEWS, 12, 0.1)(logits, batch["label"]))
    torch.testing.assert_close(parts["loss_clean"] + 12 * parts["jsd"], parts["loss"])


# ---- DAT ----


@pytest.mark.parametrize("kind", ["released", "paper", "random"])
def test_without_weight_it_is_dat(kind: str, tokenizer: CountedTokenizer) -> None:
    """With dropout (`paper` has no clean view that draws for it) and half of the batch attacked: the same numbers and
    gradients to the bit."""
    attack = AttackConfig(kind, eps=3.0, batch_share=0.5, share=0.2 if kind == "random" else None)  # type: ignore[arg-type]
    found = []
    for objective in (WithDAT(tokenizer, attack, labels()), ConsistentDAT(tokenizer, attack, labels(), 0.0)):
        model = SmallNet().train(kind != "paper")
        torch.manual_seed(5)
        parts = objective.step(model, batch_of(), generator())
        parts["loss"].backward()
        found.append((parts, gradients(model)))
    (dat, expected), (ours, gradient) = found
    assert [*ours] == [*[*dat][:-2], "jsd", *[*dat][-2:]]
    assert all(torch.equal(dat[name], ours[name]) for name in dat)
    assert all(torch.equal(expected[name], gradient[name]) for name in expected)


def test_the_third_view_costs_a_step_more(tokenizer: CountedTokenizer) -> None:
    with Products() as done:
        parts = ConsistentDAT(tokenizer, AttackConfig(), labels(), 12.0).step(linear_net(), batch_of(), generator())
        parts["loss"].backward()
    assert done.multiplications / (IMAGES * WIDTH**2) == pytest.approx(8 + 6 + 8 + 8, abs=0.1)


def test_image_reconstruction_and_adversary_are_to_agree(tokenizer: CountedTokenizer) -> None:
    model, batch = SmallNet().eval(), batch_of()
    objective = ConsistentDAT(tokenizer, AttackConfig(eps=3.0, random_start=0.0), labels(), 12.0)
    parts = objective.step(model, batch, generator())
    clean, _, adversarial, reconstruction = model.seen  # the second is the attack's
    assert torch.equal(reconstruction, tokenizer.reconstruct(batch["image"]))
    assert not torch.equal(adversarial, reconstruction)
    logits = [model(view) for view in (clean, reconstruction, adversarial)]
    torch.testing.assert_close(parts["jsd"], jensen_shannon(logits))
    torch.testing.assert_close(parts["loss"], parts["loss_clean"] + parts["loss_adversarial"] + 12 * parts["jsd"])
    decoded = tokenizer.decoded
    objective.step(model, batch, generator())
    assert tokenizer.decoded - decoded == 2 * len(batch["image"])  # the reconstruction was at hand
