"""Classifiers: reference logits, normalization, settings that do not fit."""

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from golden_rule import fill_by_rule
from mae_dat.config.errors import ConfigError, MissingInputError
from mae_dat.models.classifier import Classifier, build_classifier, build_vit
from mae_dat.models.detector import build_detector
from mae_dat.models.mae import IMAGENET_MEAN, IMAGENET_STD, ViTSize
from mae_dat.models.weights.load import load_pretrained

Golden = Callable[[str], dict[str, np.ndarray]]
TINY = ViTSize(64, 8, 48, 4, 4)


def tiny(classes: int = 10, img_size: Any = 64, pool: bool = True, channels: int = 3) -> Classifier:
    net = build_vit(TINY, classes, img_size, global_pool=pool, in_chans=channels)
    return Classifier(net, (0.5,) * channels, (0.5,) * channels)


def test_logits_reproduce_the_reference(golden: Golden) -> None:
    net = build_vit(TINY, 10)
    net.load_state_dict(fill_by_rule(net))
    image = torch.from_numpy(golden("mae_tiny")["images_u8"]).permute(0, 3, 1, 2).float() / 255
    logits = Classifier(net, IMAGENET_MEAN, IMAGENET_STD).eval()(image)
    torch.testing.assert_close(logits, torch.from_numpy(golden("vit_tiny")["logits"]), rtol=1e-5, atol=1e-5)


def test_normalization_is_the_classifiers_own_and_not_in_its_weights() -> None:
    model = Classifier(torch.nn.Identity(), (0.5, 0.25), (0.5, 0.25))
    image = torch.tensor([1.0, 0.5]).view(1, 2, 1, 1)
    assert model(image).flatten().tolist() == [1.0, 1.0]
    assert not model.state_dict()
    with pytest.raises(ConfigError, match="std"):
        Classifier(torch.nn.Identity(), (0.5,), (0.0,))


@pytest.mark.parametrize("name, size", [("vit_demo_patch8", 64), ("vit_demo_patch8", (32, 72)), ("resnet18", 64)])
@pytest.mark.parametrize("channels", [1, 3])
def test_build_classifier_makes_logits(name: str, size: Any, channels: int) -> None:
    model = build_classifier(name, 7, size, drop_path=0.1, in_chans=channels).eval()
    height, width = (size, size) if isinstance(size, int) else size
    assert model(torch.rand(2, channels, height, width)).shape == (2, 7)
    assert model.mean.flatten().tolist() == pytest.approx(IMAGENET_MEAN if channels == 3 else [0.5])


def test_mae_models_have_the_recipes_head_pooling_and_drop_path() -> None:
    net = build_classifier("vit_demo_patch8", 7, drop_path=0.2).net
    assert 1e-5 < net.head.weight.std() < 3e-5
    assert net.head.bias.abs().max() == 0
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in net.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    token = build_classifier("vit_demo_patch8", 7, global_pool=False)
    assert {"fc_norm.weight"} == set(net.state_dict()) - set(token.net.state_dict()) - {"fc_norm.bias"}
    assert "norm.weight" in token.net.state_dict()


def test_an_image_of_another_size_is_taken() -> None:
    assert build_classifier("vit_demo_patch8", 7).eval()(torch.rand(1, 3, 96, 48)).shape == (1, 7)


def test_timm_models_keep_their_own_statistics_and_refused_options_are_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = build_classifier("test_vit", 5, drop_path=0.1)
        assert not caplog.messages
        build_classifier("dla46_c", 5, img_size=64)
        assert not caplog.messages
        build_classifier("dla46_c", 5, img_size=64, drop_path=0.1)
    assert model.mean.flatten().tolist() == pytest.approx(list(model.net.pretrained_cfg["mean"]))
    assert caplog.messages == ["dla46_c has no drop path: drop_path 0.1 is not used"]
    assert build_classifier("test_vit", 5, mean=(0.1, 0.2, 0.3)).mean.flatten().tolist() == pytest.approx(
        [0.1, 0.2, 0.3]
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"name": "vit_bas_patch16"}, "vit_base_patch16"),
        ({"name": "resnet19"}, "resnet18|resnet10"),
        ({"name": "vit_demo_patch8", "img_size": 60}, "56 or 64"),
        ({"name": "test_vit", "img_size": 100}, "96 or 112"),
        ({"name": "vit_demo_patch8", "num_classes": 0}, "classes 0"),
        ({"name": "vit_demo_patch8", "pretrained": True}, "checkpoint"),
    ],
)
def test_settings_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_classifier(**{"num_classes": 3, **arguments})


def test_pretrained_weights_without_network_are_a_clear_error() -> None:
    with pytest.raises(MissingInputError, match="resnet18"):
        build_classifier("resnet18", 3, pretrained=True)


# ---- new heads ----

BACKBONES = ["vit_demo_patch8", "test_efficientnet", "test_resnet", "test_convnext", "test_vit", "efficientnet_lite0"]


def first_loss(model: Classifier, classes: int) -> float:
    """The loss of a training's first step."""
    images = torch.rand(2 * classes, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model.train()(images)
    return float(torch.nn.functional.cross_entropy(logits, torch.arange(2 * classes) % classes))


@pytest.mark.parametrize("name", BACKBONES)
def test_the_first_loss_of_every_backbone_is_that_of_equal_probabilities(name: str) -> None:
    torch.manual_seed(0)
    size = None if name.startswith("efficientnet") else 64
    assert first_loss(build_classifier(name, 10, size), 10) == pytest.approx(math.log(10), abs=0.05)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("has_head", [True, False])
def test_a_new_head_on_loaded_weights_starts_almost_at_zero(name: str, has_head: bool) -> None:
    torch.manual_seed(0)
    size = None if name.startswith("efficientnet") else 64
    source, model = (build_classifier(name, classes, size) for classes in (7, 10))
    head = next(key for key, module in source.net.named_modules() if module is source.net.get_classifier())  # type: ignore[operator]
    state = {key: value for key, value in source.net.state_dict().items() if has_head or not key.startswith(f"{head}.")}
    load_pretrained(model, state)
    assert float(model.net.get_classifier().weight.detach().abs().max()) < 1e-4  # type: ignore[operator]
    assert first_loss(model, 10) == pytest.approx(math.log(10), abs=0.01)


def test_loaded_heads_stay_as_they_are() -> None:
    source, model = (build_classifier("test_efficientnet", 10) for _ in range(2))
    load_pretrained(model, source.net.state_dict())
    assert torch.equal(model.net.classifier.weight, source.net.classifier.weight)  # type: ignore[union-attr]


def test_the_first_loss_of_a_detectors_classes_is_that_of_equal_probabilities() -> None:
    torch.manual_seed(0)
    detector = build_detector("vit_demo_patch8", 10, (64, 64), width=16, anchor_size=8.0, regions=32).train()
    truth = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([3])} for _ in range(2)]
    with torch.no_grad():
        losses = detector(torch.rand(2, 3, 64, 64), truth)
    assert float(losses["loss_classifier"]) == pytest.approx(math.log(11), abs=0.1)
    assert float(losses["loss_objectness"]) == pytest.approx(math.log(2), abs=0.1)


def test_a_network_without_drop_path_is_built(caplog: pytest.LogCaptureFixture) -> None:
    """timm words the error about its arguments in two ways."""
    with caplog.at_level(logging.WARNING):
        build_classifier("hrnet_w18_small", 10, drop_path=0.1)
    assert "hrnet_w18_small has no drop path" in caplog.text
