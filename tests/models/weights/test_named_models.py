"""`load_model`, `create_model` and `list_models`: what they accept, what they return and log, and their errors."""

import json
import logging
from pathlib import Path

import pytest
import timm
import torch
from tiny_models import equal_states
from tiny_runs import draw_folder, finetune_in, pretrain_in, save_tokenizer

from mae_dat.config.errors import CheckpointError, ConfigError, MissingInputError
from mae_dat.models.classifier import Classifier, build_classifier
from mae_dat.models.detector import Detector, build_detector
from mae_dat.models.mae import MaskedAutoencoder, build_mae
from mae_dat.models.weights.named_models import create_model, list_models, load_model
from mae_dat.storage.weight_files import WEIGHTS_FILE, write_weights


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folders of a pretraining and of a fine-tuning from it."""
    root = tmp_path_factory.mktemp("runs")
    data = draw_folder(root / "data")
    pretrain_in(root / "pre", data)
    finetune_in(root / "fine", data, "--finetune", str(root / "pre"))
    return root


def test_output_folders_of_runs_say_what_they_are(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mae_dat")
    classifier = load_model(runs / "fine")
    assert isinstance(classifier, Classifier)
    assert not classifier.training
    assert classifier.classes == tuple(sorted(path.name for path in (runs / "data" / "val").iterdir()))
    assert classifier.input_size == (32, 32)
    assert caplog.messages[-1] == f"{runs / 'fine'}: classifier, vit_demo_patch8, 32 x 32 px, 10 classes"
    autoencoder = load_model(str(runs / "pre"))
    assert isinstance(autoencoder, MaskedAutoencoder)
    assert not autoencoder.training
    assert (autoencoder.classes, autoencoder.input_size) == (None, (32, 32))
    assert caplog.messages[-1] == f"{runs / 'pre'}: masked autoencoder, mae_vit_demo_patch8, 32 x 32 px"
    (runs / "pre" / WEIGHTS_FILE).rename(runs / "pre" / "moved.safetensors")  # the newest checkpoint is used then
    unfinished = load_model(runs / "pre")
    (runs / "pre" / "moved.safetensors").rename(runs / "pre" / WEIGHTS_FILE)
    assert equal_states(unfinished.state_dict(), autoencoder.state_dict())


def test_a_detector_has_its_classes_and_size(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mae_dat")
    settings = {"width": 16, "anchor_size": 8.0, "regions": 32}
    model = build_detector("vit_demo_patch8", 2, (64, 96), **settings)  # type: ignore[arg-type]
    facts = {"kind": "detector", "model": "vit_demo_patch8", "classes": ["a", "b"], "input_size": [64, 96], **settings}
    write_weights(tmp_path / WEIGHTS_FILE, model.net.state_dict(), {"mae_dat": json.dumps(facts)})
    detector = load_model(tmp_path)
    assert isinstance(detector, Detector)
    assert (detector.classes, detector.input_size) == (("a", "b"), (64, 96))
    assert "object detector" in caplog.messages[-1]
    (boxes,) = detector(torch.rand(1, 3, 64, 96))
    assert set(boxes) == {"boxes", "labels", "scores"}


def test_another_input_size_and_architecture_can_be_given(tmp_path: Path) -> None:
    assert load_model("mae_dat_demo", input_size=32).input_size == (32, 32)
    assert load_model("mae_dat_demo", input_size=(32, 48)).input_size == (32, 48)
    net = timm.create_model("test_resnet", num_classes=7)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="does not record its architecture"):
        load_model(tmp_path / "net.pth")
    opened = load_model(tmp_path / "net.pth", model="test_resnet")
    assert opened.classes is None
    assert opened(torch.rand(1, 3, *opened.input_size)).shape == (1, 7)


def test_other_sources_raise_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a tokenizer .* mae_dat.load_tokenizer"):
        load_model(save_tokenizer(tmp_path / "tokenizer.safetensors") or tmp_path / "tokenizer.safetensors")
    with pytest.raises(CheckpointError, match=r"mae_dat\.load_tokenizer"):
        load_model("vqgan_demo")
    with pytest.raises(MissingInputError, match=r"timm model: mae_dat.create_model\('resnet50', pretrained=True\)"):
        load_model("resnet50")
    with pytest.raises(MissingInputError, match="did you mean mae_dat_demo"):
        load_model("mae_dat_demos")
    with pytest.raises(MissingInputError, match=r"no/model\.pth"):
        load_model("no/model.pth")


def test_models_are_built_by_name() -> None:
    model = create_model("vit_demo_patch8", 5, drop_path=0.3)
    assert isinstance(model, Classifier)
    assert model.training
    assert (model.classes, model.input_size) == (None, (64, 64))
    assert create_model("vit_demo_patch8", 5, input_size=(32, 48)).input_size == (32, 48)
    assert create_model("vit_demo_patch8", 5, in_chans=1)(torch.rand(1, 1, 64, 64)).shape == (1, 5)
    net = create_model("test_vit")
    assert isinstance(net, Classifier)
    assert net.input_size == (160, 160)
    assert net.net.num_classes == 1000
    autoencoder = create_model("mae_vit_demo_patch8", input_size=32)
    assert isinstance(autoencoder, MaskedAutoencoder)
    assert autoencoder.input_size == (32, 32)


def test_weights_may_be_released_ones_or_a_file(tmp_path: Path) -> None:
    demo = load_model("mae_dat_demo")
    again = create_model("mae_dat_demo", pretrained=True)
    assert again.training
    assert again.classes == demo.classes
    assert equal_states(again.state_dict(), demo.state_dict())
    fresh = create_model("mae_dat_demo")
    assert not equal_states(fresh.state_dict(), demo.state_dict())
    other = create_model("mae_dat_demo", num_classes=3, pretrained=True)
    assert other.classes is None
    assert torch.equal(other.state_dict()["net.cls_token"], demo.state_dict()["net.cls_token"])
    assert other(torch.rand(1, 3, 64, 64)).shape == (1, 3)
    from_pretraining = create_model("vit_demo_patch8", 4, "mae_dat_demo")
    assert torch.equal(from_pretraining.state_dict()["net.cls_token"], demo.state_dict()["net.cls_token"])
    source = build_mae("mae_vit_demo_patch8")
    write_weights(tmp_path / WEIGHTS_FILE, source.state_dict(), {})
    assert equal_states(create_model("mae_vit_demo_patch8", pretrained=tmp_path).state_dict(), source.state_dict())


def test_wrong_names_and_settings_raise_an_error() -> None:
    with pytest.raises(ConfigError, match="did you mean .*vit_demo_patch8"):
        create_model("vit_demo_patch9", 5)
    with pytest.raises(ConfigError, match="give num_classes"):
        create_model("vit_demo_patch8")
    with pytest.raises(ConfigError, match="has no classes: leave out num_classes"):
        create_model("mae_vit_demo_patch8", 5)
    with pytest.raises(ConfigError, match=r"tokenizer: mae_dat\.load_tokenizer\('vqgan_demo'\)"):
        create_model("vqgan_demo")
    with pytest.raises(ConfigError, match="object detector: give num_classes"):
        create_model("fasterrcnn_mobilenet_v3_large_320_fpn")
    with pytest.raises(CheckpointError, match="no released weights mae_vit_demo_patch8"):
        create_model("mae_vit_demo_patch8", pretrained=True)


def test_a_detector_is_built_by_name() -> None:
    detector = create_model("fasterrcnn_mobilenet_v3_large_320_fpn", 3, input_size=(64, 96))
    assert isinstance(detector, Detector)
    assert detector.input_size == (64, 96)


def test_every_listed_name_is_known() -> None:
    names = list_models()
    assert {"vit_base_patch16", "mae_vit_large_patch16", "mae_dat_demo", "resnet50_dat", "fcos_resnet50_fpn"} <= {
        *names
    }
    assert not [name for name in names if "vqgan" in name]
    assert "resnet50" not in names
    assert {"resnet50", "resnet50.a1_in1k", "resnet50_dat"} <= {*list_models("resnet50")}
    assert list_models("vit_demo*") == ["vit_demo_patch8"]
    assert list_models("no such model") == []


def test_a_classifier_of_ones_own_has_neither_classes_nor_size() -> None:
    model = build_classifier("vit_demo_patch8", 5)
    assert (model.classes, model.input_size) == (None, None)
