"""Classifiers of timm and transformers as models of pixels in [0, 1]."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from mae_dat.config.errors import ConfigError
from mae_dat.models.adapters import (
    HuggingFaceClassifier,
    ProcessorSettings,
    as_pixel_classifier,
    is_transformers_folder,
    open_transformers_folder,
)
from mae_dat.models.classifier import Classifier

NAMES = {0: "cat", 1: "dog", 2: "owl"}
VIT = {"size": {"height": 32, "width": 32}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4], "resample": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small vision transformer and its image processor, saved by transformers."""
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = ViTConfig(**sizes, image_size=32, patch_size=8, id2label=NAMES, label2id={n: i for i, n in NAMES.items()})
    path = tmp_path_factory.mktemp("hub")
    ViTForImageClassification(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(VIT))
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(folder)


def normalized(image: Tensor) -> Tensor:
    return (image - torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)


@torch.no_grad()
def test_transformers_models_normalize_as_their_image_processor_does(folder: Path, model: Any) -> None:
    from transformers import AutoImageProcessor, pipeline

    image = torch.rand(2, 3, 32, 32)
    expected = model(normalized(image)).logits
    processor = AutoImageProcessor.from_pretrained(folder)
    whole = pipeline("image-classification", model=model, image_processor=processor)
    for source in (model, (model, processor), (model, VIT), whole):
        classifier = as_pixel_classifier(source)
        assert isinstance(classifier, HuggingFaceClassifier)
        assert torch.equal(classifier(image), expected)
        assert (classifier.classes, classifier.input_size) == (("cat", "dog", "owl"), (32, 32))
        assert classifier.processor.interpolation == "bilinear"
    opened = open_transformers_folder(folder)
    assert not opened.training
    assert torch.equal(opened(image), expected)


def test_a_model_without_an_image_processor_raises_an_error(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "name_or_path", "no/such")
    with pytest.raises(ConfigError, match=r"not available .* give the pair \(model, image_processor\)"):
        as_pixel_classifier(model)
    monkeypatch.setattr(model, "name_or_path", "")
    with pytest.raises(ConfigError, match="does not record how it normalizes"):
        as_pixel_classifier(model)


def test_a_folder_of_transformers_is_recognized(folder: Path, tmp_path: Path) -> None:
    assert is_transformers_folder(folder)
    assert not is_transformers_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"name": "vit_base_patch16"}')  # of `mae-dat convert --to hf`
    assert not is_transformers_folder(tmp_path)
    (tmp_path / "config.json").write_text('["no mapping"]')
    assert not is_transformers_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["ViTForImageClassification"], "model_type": "vit"}')
    with pytest.raises(ConfigError, match="cannot be opened by transformers"):
        open_transformers_folder(tmp_path)


CROPPED = {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}


@pytest.mark.parametrize(
    "changes, size, crop, interpolation",
    [
        ({}, (32, 32), 1.0, "bilinear"),
        (CROPPED, (224, 224), 0.875, "bilinear"),
        ({"size": 64, "resample": 3}, (64, 64), 1.0, "bicubic"),
        ({"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": None}, (224, 224), 0.875, "bicubic"),
        ({"size": None, "crop_size": {"height": 48, "width": 64}}, (48, 64), 1.0, "bilinear"),
    ],
)
def test_sizes_of_image_processors(changes: dict[str, Any], size: Any, crop: float, interpolation: str) -> None:
    settings = ProcessorSettings.read(VIT | changes)
    assert (settings.size, settings.crop, settings.interpolation) == (size, crop, interpolation)
    assert settings.mean == (0.4, 0.5, 0.6)


def test_image_processors_that_do_something_else_raise_an_error() -> None:
    assert ProcessorSettings.read(VIT | {"do_normalize": False}).std == (1, 1, 1)
    assert ProcessorSettings.read({"image_processor": VIT}).std == (0.2, 0.3, 0.4)
    with pytest.raises(ConfigError, match="only 1/255 is supported"):
        ProcessorSettings.read(VIT | {"rescale_factor": 1 / 127.5})
    with pytest.raises(ConfigError, match="only 1/255 is supported"):
        ProcessorSettings.read(VIT | {"do_rescale": False})
    with pytest.raises(ConfigError, match="expected one side, or"):
        ProcessorSettings.read(VIT | {"size": {"longest_edge": 3}})


@torch.no_grad()
def test_timm_modules_normalize_as_their_settings_say() -> None:
    net = timm.create_model("test_vit", num_classes=4).eval()
    net.pretrained_cfg |= {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
    image = torch.rand(2, 3, 160, 160)
    classifier = as_pixel_classifier(net)
    assert isinstance(classifier, Classifier)
    assert torch.equal(classifier(image), net(normalized(image)))
    with pytest.raises(ConfigError, match="has no classes"):
        as_pixel_classifier(timm.create_model("test_vit", num_classes=0))


def test_any_other_callable_stays_as_it_is() -> None:
    for model in (torch.nn.Flatten(), lambda image: image, Classifier(torch.nn.Flatten(), (0.5,), (0.5,))):
        assert as_pixel_classifier(model) is model
