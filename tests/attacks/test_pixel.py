"""Pixel attacks: closed forms, exact balls, and no trace left behind."""

import math

import pytest
import torch
import torch.nn.functional as F
from attack_generators import generators
from attacked_models import Mixed, golden_classifier, trained_classifier
from torch import Tensor, nn

from mae_dat.attacks.gradient import require_pixels
from mae_dat.attacks.pixel import PIXEL_ATTACKS, PixelAttack, loss_gradient, pixel_adversary, project_into_ball
from mae_dat.config.errors import ConfigError

LINF, L2 = PixelAttack(4 / 255, 1 / 255, 6, random_start=True), PixelAttack(0.7, 0.2, 6, "l2", random_start=True)


class Linear(nn.Module):
    """Two classes whose cross-entropy is softplus of a linear function of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 8, 8, dtype=torch.float64))

    def forward(self, image: Tensor) -> Tensor:
        value = (self.weight * image).sum((1, 2, 3))
        return torch.stack([-value / 2, value / 2], 1)

    def margin(self, image: Tensor) -> Tensor:
        return self.forward(image.double()).diff(dim=1)[:, 0]


# ---- the attacks ----


@pytest.mark.parametrize("attack", [PixelAttack(0.02, 0.02), PixelAttack(0.02, 0.01, 5, random_start=True)])
def test_on_a_linear_model_the_rise_is_eps_times_the_l1_norm(attack: PixelAttack) -> None:
    model, image, label = Linear(), torch.rand(4, 3, 8, 8) * 0.8 + 0.1, torch.tensor([0, 1, 0, 1])
    found = pixel_adversary(model, image, label, attack, generators(4))
    sign = 1 - 2 * label
    rise = (model.margin(found) - model.margin(image)) * sign
    torch.testing.assert_close(rise, 0.02 * model.weight.abs().sum().expand(4), rtol=1e-5, atol=0)


def test_on_a_linear_model_the_l2_rise_is_eps_times_the_l2_norm() -> None:
    model, image, label = Linear(), torch.rand(4, 3, 8, 8) * 0.5 + 0.25, torch.tensor([0, 1, 0, 1])
    found = pixel_adversary(model, image, label, PixelAttack(0.3, 0.3, 3, "l2"), generators(4))
    rise = (model.margin(found) - model.margin(image)) * (1 - 2 * label)
    torch.testing.assert_close(rise, 0.3 * model.weight.norm().expand(4), rtol=1e-4, atol=0)


@pytest.mark.parametrize("eps", [1 / 255, 0.1, 0.5 / 255])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_no_adversary_leaves_its_ball_or_the_range_by_a_single_bit(norm: str, eps: float) -> None:
    image = torch.rand(3, 3, 224, 224)
    image[0].round_()  # borders
    attack = PixelAttack(eps, eps, norm=norm)  # type: ignore[arg-type]
    far = image + 3 * torch.randn(image.shape)
    near = image + eps * torch.randn(image.shape).sign()
    for point in (far, near, image):
        found = project_into_ball(point, image, attack)
        assert found.min() >= 0
        assert found.max() <= 1
        delta = (found.double() - image.double()).flatten(1)
        size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        assert (size <= eps).all()
        if point is not image:
            assert (size > 0.99 * eps).all() or norm == "l2"  # clamping to [0, 1] shortens an L2 step
    assert torch.equal(project_into_ball(image, image, attack), image)


@pytest.mark.parametrize("name", [*PIXEL_ATTACKS, "restarts"])
def test_each_row_stays_in_its_ball_and_leaves_no_trace(name: str) -> None:
    attack = PIXEL_ATTACKS.get(name) or PixelAttack(0.01, 0.01, 2, random_start=True, restarts=3)
    net = Mixed()
    net.rest[0].weight.grad = torch.full_like(net.rest[0].weight, 3.0)
    flags = {part: part.training for part in net.modules()}
    state = {key: value.clone() for key, value in net.state_dict().items()}
    image, label, before = torch.rand(4, 3, 16, 16), torch.arange(4), torch.get_rng_state()
    copy = image.clone()
    with torch.no_grad():
        found = pixel_adversary(net, image, label, attack, generators(4))
    delta = (found.double() - image.double()).flatten(1)
    size = delta.abs().amax(1) if attack.norm == "linf" else delta.norm(dim=1)
    assert ((size > 0) & (size <= attack.eps)).all()
    assert {part: part.training for part in net.modules()} == flags
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    assert [key for key, weight in net.named_parameters() if weight.grad is not None] == ["rest.0.weight"]
    assert (net.rest[0].weight.grad == 3).all()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(image, copy)
    assert not found.requires_grad


@pytest.mark.parametrize("attack", [LINF, L2])
def test_an_image_meets_the_same_in_any_batch(attack: PixelAttack) -> None:
    net, image, label = trained_classifier()
    image, label = image[:7], label[:7]
    together = pixel_adversary(net, image, label, attack, generators(7))
    for part in (slice(0, 3), slice(3, 7), slice(6, 7)):
        alone = pixel_adversary(net, image[part], label[part], attack, generators(7)[part])
        torch.testing.assert_close(alone, together[part], rtol=0, atol=1e-6)
    other = pixel_adversary(net, image, label, attack, generators(7, seed=1))
    assert not torch.equal(other, together)


def test_restarts_keep_the_worst() -> None:
    net, image, label = trained_classifier()
    gens = generators(len(image))
    alone = [pixel_adversary(net, image, label, LINF, gens) for _ in range(3)]
    both = PixelAttack(LINF.eps, LINF.step, LINF.steps, random_start=True, restarts=3)
    worst = pixel_adversary(net, image, label, both, generators(len(image)))
    wrong = torch.stack([net(one).argmax(1) != label for one in alone])
    assert torch.equal(net(worst).argmax(1) != label, wrong.any(0))
    losses = torch.stack([F.cross_entropy(net(one), label, reduction="none") for one in alone])
    chosen = losses.masked_fill(wrong.any(0) & ~wrong, -math.inf).amax(0)
    torch.testing.assert_close(F.cross_entropy(net(worst), label, reduction="none"), chosen)
    assert (losses.argmax(0) != 0).any()


@pytest.mark.parametrize("bad", [-0.01, 1.01, math.nan])
def test_pixels_out_of_range_are_refused(bad: float) -> None:
    image = torch.rand(2, 3, 8, 8)
    image[1, 0, 0, 0] = bad
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        require_pixels(image)
    with pytest.raises(ValueError, match=r"pixels in \[0, 1\]"):
        pixel_adversary(golden_classifier(), image, torch.arange(2), LINF, generators(2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 0.0}, "needs eps > 0"),
        ({"eps": math.nan}, "needs eps > 0"),
        ({"steps": 0}, "steps >= 1"),
        ({"norm": "l1"}, "unknown norm 'l1'"),
        ({"restarts": 2}, "2 restarts .*set random_start"),
    ],
)
def test_an_attack_that_cannot_work_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PixelAttack(**{"eps": 0.1, "step": 0.1, **settings})  # type: ignore[arg-type]


def test_gradients_are_of_each_images_own_loss() -> None:
    net, image, label = trained_classifier()
    all_of_them = loss_gradient(net, image[:4], label[:4])
    torch.testing.assert_close(loss_gradient(net, image[2:3], label[2:3])[0], all_of_them[2])
