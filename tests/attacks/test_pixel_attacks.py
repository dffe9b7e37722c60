"""Pixel attacks: closed forms, exact balls, no trace, and that a broken attack is told from a robust model."""

import functools
import math
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
import torch.nn.functional as F
from test_attack import Mixed, golden_classifier, trained_classifier
from torch import Tensor, nn

from mae_dat.attacks.auto_attack import auto_attack
from mae_dat.attacks.checks import attack_checks, require_no_declared_normalization, require_pixel_model
from mae_dat.attacks.discrete import image_generator
from mae_dat.attacks.gradient import require_pixels
from mae_dat.attacks.pixel import PIXEL_ATTACKS, PixelAttack, loss_gradient, pixel_adversary, project_into_ball
from mae_dat.config.errors import ConfigError, MissingInputError
from mae_dat.models.classifier import Classifier

LINF, L2 = PixelAttack(4 / 255, 1 / 255, 6, random_start=True), PixelAttack(0.7, 0.2, 6, "l2", random_start=True)


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [image_generator(seed, index) for index in range(count)]


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
def test_a_picture_meets_the_same_in_any_batch(attack: PixelAttack) -> None:
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
        ({"restarts": 2}, "2 restarts without random_start"),
    ],
)
def test_an_attack_that_cannot_work_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PixelAttack(**{"eps": 0.1, "step": 0.1, **settings})  # type: ignore[arg-type]


# ---- models that take something else ----


def look(model: Callable[[Tensor], Tensor], image: Tensor, label: Tensor) -> None:
    """All pictures in looks of 64."""
    parts = zip(image.split(64), label.split(64), strict=True)
    require_pixel_model(model, ((some, lambda logits, own=own: logits.argmax(1) == own) for some, own in parts))


def test_a_model_of_other_pictures_is_refused() -> None:
    net, image, label = trained_classifier()
    shift = Classifier(net, (-1.0, -1.0, -1.0), (2.0, 2.0, 2.0))  # what it is given comes back to [0, 1]: as from -1..1
    with pytest.raises(
        ConfigError,
        match=r"normalized by mean 0.5.*of \d+ images it is right about \d+ this way, and about \d+ in .*Give mae",
    ):
        look(shift, image, label)
    with pytest.raises(ConfigError, match=r"from 0 to 255: of \d+ .* Give lambda image: model\(255 \* image\)"):
        look(lambda x: net(x / 255), image, label)
    look(net, image, label)
    look(Classifier(net, (0, 0, 0), (1, 1, 1)), image, label)

    def strict(x: Tensor) -> Tensor:
        require_pixels(x)
        return net(x)

    look(strict, image, label)
    bare = timm.create_model("test_resnet", num_classes=5)
    with pytest.raises(ConfigError, match=r"normalized by mean \(0.5, 0.5, 0.5\)|normalized by mean \(0.485"):
        require_no_declared_normalization(bare)
    require_no_declared_normalization(Classifier(bare, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def partly_right(pixels_alone: float, normalised_alone: float, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A model that has 61 % of 1024 pictures right, and of the others such shares in one version alone."""
    chance = torch.Generator().manual_seed(seed)
    image, label = torch.rand(1024, 3, 1, 1, generator=chance, dtype=torch.float64), torch.ones(1024, dtype=torch.int64)
    fate = torch.rand(1024, generator=chance)

    class Fated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.max() > 1.5:  # other versions, of which it knows nothing
                return torch.tensor([[1.0, 0.0]]).expand(len(x), 2)
            normal = bool(x.min() < 0)
            pixels = (x / 2 + 0.5 if normal else x)[:, :1, 0, 0]
            known = fate[(pixels - image[None, :, 0, 0, 0]).abs().argmin(1)]
            start = 0.61 + (pixels_alone if normal else 0.0)
            width = normalised_alone if normal else pixels_alone
            right = (known < 0.61) | ((start <= known) & (known < start + width))
            return torch.stack([~right, right], 1).double()

    return Fated(), image, label


def test_ten_points_of_accuracy_are_seen_and_equally_good_versions_pass() -> None:
    for seed in range(5):
        with pytest.raises(ConfigError, match=r"normalized by mean 0\.5"):
            look(*partly_right(0.05, 0.15, seed))
        for share in (0.05, 0.15):
            look(*partly_right(share, share, seed))


def test_a_good_model_is_decided_in_few_looks() -> None:
    net, image, label = trained_classifier()
    taken = 0

    def looks() -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
        nonlocal taken
        for _ in range(8):
            taken += 1
            yield image, lambda logits: logits.argmax(1) == label

    require_pixel_model(net, looks())
    assert taken < 8


# ---- broken attacks ----


class Broken(nn.Module):
    """A network behind something that hides its gradients, or its answer."""

    def __init__(self, net: nn.Module, how: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.how = net, how

    def forward(self, image: Tensor) -> Tensor:
        return self.how(self.net, image)


@functools.cache
def failed(kind: str) -> set[str]:
    """Names of the checks that a network fails behind one of these."""
    net, image, label = trained_classifier()
    kinds: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
        "nothing": lambda net, x: net(x),
        "rounding": lambda net, x: net((8 * x).round() / 8),
        "saturated": lambda net, x: 1e5 * net(x),
        "noise": lambda net, x: net(x + 0.1 * torch.randn(x.shape)),
        "misled": lambda net, x: net(2 * x.detach() - x),  # the gradient of a model that points the wrong way
    }
    checks = attack_checks(Broken(net, kinds[kind]), image[:40], label[:40], generators(40))
    return {check.name for check in checks if not check.passed}


def test_a_clean_model_passes_and_each_broken_one_is_caught() -> None:
    assert failed("nothing") == set()
    assert failed("rounding") >= {"gradients", "a large eps wins"}
    assert "gradients" in failed("saturated")
    assert "no chance" in failed("noise")
    assert failed("misled") >= {"FGSM beats noise", "a large eps wins"}


def test_the_checks_tell_their_numbers() -> None:
    net, image, label = trained_classifier()
    checks = attack_checks(net, image[:5], label[:5], generators(5))
    assert [check.name for check in checks][:2] == ["gradients", "no chance"]
    assert checks[0].details == "0 of 5 pictures have no gradient"
    assert "loss " in checks[2].details
    assert "(4/255)" in checks[2].details


def test_gradients_are_of_each_pictures_own_loss() -> None:
    net, image, label = trained_classifier()
    all_of_them = loss_gradient(net, image[:4], label[:4])
    torch.testing.assert_close(loss_gradient(net, image[2:3], label[2:3])[0], all_of_them[2])


# ---- AutoAttack ----


def test_autoattack_says_what_to_install() -> None:
    try:
        import torchattacks  # noqa: F401
    except ImportError:
        with pytest.raises(MissingInputError, match=r'pip install "mae_dat\[autoattack\]"'):
            auto_attack(golden_classifier(), torch.rand(1, 3, 16, 16), torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("levels", [8, pytest.param(2, marks=pytest.mark.slow)])  # only few survive 8: quickly done
def test_autoattack_is_no_weaker_than_pgd_and_leaves_no_trace(levels: int) -> None:
    pytest.importorskip("torchattacks")
    net, image, label = trained_classifier()
    image, label, eps = image[:16], label[:16], levels / 255
    net.train()
    attack = PixelAttack(eps, eps / 4, 10)
    weaker = int((net(pixel_adversary(net, image, label, attack, generators(16))).argmax(1) == label).sum())
    before = torch.get_rng_state()
    found = auto_attack(net, image, label, eps)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(auto_attack(net, image, label, eps), found)
    assert all(part.training for part in net.modules())
    assert all(weight.requires_grad and weight.grad is None for weight in net.parameters())
    assert (found - image).abs().max() <= eps + 1e-6
    assert int((net(found).argmax(1) == label).sum()) <= weaker < 16
