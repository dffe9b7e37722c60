"""Classifiers: reference logits, normalisation, settings that do not fit."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from golden_rule import fill_by_rule
from mae_dat.config.errors import ConfigError, MissingInputError
from mae_dat.models.classifier import Classifier, build_classifier, build_vit
from mae_dat.models.mae import IMAGENET_MEAN, IMAGENET_STD, ViTSize

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


def test_normalisation_is_the_classifiers_own_and_not_in_its_weights() -> None:
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


def test_a_picture_of_another_size_is_taken() -> None:
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
