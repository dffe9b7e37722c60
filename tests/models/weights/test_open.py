"""Opening a model: what is known about it afterwards, and that every kind of source leads to the same model."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import equal_states

from mae_dat.config.errors import CheckpointError, ConfigError
from mae_dat.models.classifier import build_classifier
from mae_dat.models.detector import Detector, build_detector
from mae_dat.models.weights.load import load_pretrained
from mae_dat.models.weights.open import open_model
from mae_dat.models.weights.read import read_model_file
from mae_dat.storage.weight_files import WEIGHTS_FILE, write_weights

DETECTOR = {"width": 16, "anchor_size": 8.0, "regions": 32}


@pytest.fixture
def detector(tmp_path: Path) -> tuple[Detector, Path]:
    model = build_detector("vit_demo_patch8", 3, (64, 96), **DETECTOR)  # type: ignore[arg-type]
    facts = {
        "kind": "detector",
        "model": "vit_demo_patch8",
        "classes": ["a", "b", "c"],
        "input_size": [64, 96],
        **DETECTOR,
    }
    write_weights(tmp_path / WEIGHTS_FILE, model.net.state_dict(), {"mae_dat": json.dumps(facts)})
    return model, tmp_path


def test_a_detector_opens_from_its_folder(detector: tuple[Detector, Path]) -> None:
    model, folder = detector
    opened = open_model(folder)
    assert (opened.kind, opened.classes, opened.input_size) == ("detector", ["a", "b", "c"], (64, 96))
    assert opened.title == f"{folder.name} (vit_demo_patch8)"
    assert not opened.model.training
    assert equal_states(opened.model.state_dict(), model.state_dict())
    for method in (opened.classifier, opened.encoder, opened.autoencoder):
        with pytest.raises(CheckpointError, match=r"is an? (object )?detector"):
            method()


def test_a_detector_with_other_keys_is_refused(detector: tuple[Detector, Path]) -> None:
    file = read_model_file(detector[1])
    del file.tensors["rpn.head.conv.0.0.bias"]
    with pytest.raises(CheckpointError, match=r"rpn\.head\.conv\.0\.0\.bias .*missing"):
        open_model(file)


def test_name_file_folder_and_what_was_read_lead_to_the_same_model(tmp_path: Path) -> None:
    by_name = open_model("mae_dat_demo")
    assert (by_name.kind, by_name.plan.name, by_name.input_size) == ("classifier", "vit_demo_patch8", (64, 64))
    assert by_name.title == "mae_dat_demo (vit_demo_patch8)"
    file = read_model_file("mae_dat_demo")
    (tmp_path / WEIGHTS_FILE).write_bytes(Path(file.source).read_bytes())
    for source in (file.source, tmp_path, file, by_name.classifier().state_dict()):
        opened = open_model(source)
        assert equal_states(opened.model.state_dict(), by_name.model.state_dict())


def test_an_image_size_replaces_the_files() -> None:
    opened = open_model("mae_dat_demo", img_size=(32, 128))
    assert opened.input_size == (32, 128)
    assert opened.classifier()(torch.rand(2, 3, 32, 128)).shape == (2, 10)


def test_errors_name_the_flag(tmp_path: Path) -> None:
    (tmp_path / "x.pth").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match=r"^--checkpoint: .*x\.pth cannot be read"):
        open_model(tmp_path / "x.pth", flag="--checkpoint")
    with pytest.raises(ConfigError, match="--checkpoint is missing"):
        open_model("", flag="--checkpoint")


def test_fine_tuning_resizes_by_the_recorded_size(tmp_path: Path) -> None:
    """The number of patches alone does not distinguish 4 x 16 from 8 x 8."""
    source = build_classifier("vit_demo_patch8", 5, (32, 128))
    facts = {"model": "vit_demo_patch8", "input_size": [32, 128]}
    write_weights(tmp_path / "wide.safetensors", source.net.state_dict(), {"mae_dat": json.dumps(facts)})
    report = load_pretrained(build_classifier("vit_demo_patch8", 5), tmp_path / "wide.safetensors")
    assert report.resized == ((4, 16), (8, 8))
    facts["input_size"] = [224, 224]  # of other weights: their number of patches does not fit
    write_weights(tmp_path / "odd.safetensors", source.net.state_dict(), {"mae_dat": json.dumps(facts)})
    assert load_pretrained(build_classifier("vit_demo_patch8", 5), tmp_path / "odd.safetensors").resized is None
