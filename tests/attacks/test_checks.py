"""The checks of pixel attacks: models that take other pixels, and broken attacks, are recognized."""

import functools
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
from attack_generators import generators
from attacked_models import trained_classifier
from torch import Tensor, nn

from mae_dat.attacks.checks import attack_checks, require_no_declared_normalization, require_pixel_model
from mae_dat.attacks.gradient import require_pixels
from mae_dat.config.errors import ConfigError
from mae_dat.models.classifier import Classifier

# ---- models that take something else ----


def look(model: Callable[[Tensor], Tensor], image: Tensor, label: Tensor) -> None:
    """All images in looks of 64."""
    parts = zip(image.split(64), label.split(64), strict=True)
    require_pixel_model(model, ((some, lambda logits, own=own: logits.argmax(1) == own) for some, own in parts))


def test_a_model_of_other_images_is_refused() -> None:
    net, image, label = trained_classifier()
    shift = Classifier(net, (-1.0, -1.0, -1.0), (2.0, 2.0, 2.0))  # what it is given comes back to [0, 1]: as from -1..1
    with pytest.raises(
        ConfigError,
        match=r"normalized by mean 0.5.*classifies \d+ of \d+ images correctly this way, but about \d+ in .*Use mae",
    ):
        look(shift, image, label)
    with pytest.raises(
        ConfigError, match=r"from 0 to 255: it classifies \d+ .* Use lambda image: model\(255 \* image\)"
    ):
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


def partly_right(pixels_alone: float, normalized_alone: float, seed: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A model that has 61 % of 1024 images right, and of the others such shares in one version alone."""
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
            width = normalized_alone if normal else pixels_alone
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
    assert checks[0].details == "0 of 5 images have no gradient"
    assert "loss " in checks[2].details
    assert "(4/255)" in checks[2].details
