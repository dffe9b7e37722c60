"""timm's config.json next to weights from the Hub."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
from timm.models import save_for_hf

from mae_dat.config.errors import CheckpointError
from mae_dat.models.weights.open import open_model
from mae_dat.models.weights.read import read_model_file

NAMES = ["ant", "bee", "cat"]


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A model as timm puts it on the Hub, with statistics and a crop that are not its architecture's."""
    overlay = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1), "crop_pct": 0.9, "interpolation": "bilinear"}
    net = timm.create_model("test_resnet", num_classes=3, pretrained_cfg_overlay=overlay)
    save_for_hf(net, tmp_path / "hub", model_config={"label_names": NAMES}, safe_serialization=True)
    return tmp_path / "hub"


def test_a_file_of_the_hub_needs_no_flags(hub: Path) -> None:
    for source in (hub, hub / "model.safetensors"):
        opened = open_model(source)
        assert opened.plan.name == "test_resnet"
        assert opened.classes == NAMES
        assert opened.model.mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3])
        assert opened.model.std.flatten().tolist() == pytest.approx([0.2, 0.2, 0.1])
        assert (opened.crop_pct, opened.interpolation, opened.input_size) == (0.9, "bilinear", (160, 160))
        assert opened.file.format.startswith("timm's config.json")
    (hub / "model.safetensors").rename(hub / "other.safetensors")
    assert read_model_file(hub / "other.safetensors").facts == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("architecture", "hf-hub:someone/else"),
        ("mean", [0.5, "x", 0.5]),
        ("std", [0.0, 1.0, 1.0]),
        ("crop_pct", 7),
        ("interpolation", "sinc"),
        ("input_size", [3, 10**6, 4]),
        ("label_names", [1, 2, 3]),
    ],
)
def test_wrong_values_name_file_and_key(hub: Path, key: str, value: Any) -> None:
    path = hub / "config.json"
    settings = json.loads(path.read_text())
    (settings if key in ("architecture", "label_names") else settings["pretrained_cfg"])[key] = value
    path.write_text(json.dumps(settings))
    fact = {"architecture": "model", "label_names": "classes"}.get(key, key)
    with pytest.raises(CheckpointError, match=rf"config.json: {fact} in its description"):
        read_model_file(hub)


def test_a_damaged_or_foreign_config_is_not_trusted(hub: Path) -> None:
    path = hub / "config.json"
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        read_model_file(hub)
    path.write_text("[]")
    assert read_model_file(hub).facts == {}
    path.write_text(json.dumps({"architecture": "test_resnet", "pretrained_cfg": []}))
    assert read_model_file(hub).facts == {"model": "test_resnet"}
