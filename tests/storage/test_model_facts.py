"""Descriptions in weights files of others: wrong ones are an error with file and key before anything is built."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_dat.config.errors import CheckpointError
from mae_dat.models.classifier import build_classifier
from mae_dat.models.tokenizer import load_tokenizer
from mae_dat.models.weights.open import open_model
from mae_dat.storage.model_facts import check_facts
from mae_dat.storage.weight_files import write_weights

GOOD: dict[str, Any] = {
    "kind": "classifier",
    "model": "vit_demo_patch8",
    "global_pool": True,
    "classes": ["a", "b", "c"],
    "input_size": [64, 64],
    "in_chans": 3,
}
WRONG: list[tuple[str, Any]] = [
    ("input_size", [65_536, 65_536]),
    ("input_size", [64, 64, 64]),
    ("input_size", "64"),
    ("input_size", [64.5, 64]),
    ("input_size", [True, True]),
    ("in_chans", 1_000_000),
    ("in_chans", "3"),
    ("classes", ["a"] * 1_000_000),
    ("classes", "abc"),
    ("classes", [1, 2, 3]),
    ("classes", ["a" * 10_000]),
    ("classes", []),
    ("model", "hf-hub:owner/name"),
    ("model", "local-dir:/etc"),
    ("model", ["vit_demo_patch8"]),
    ("model", "../vit"),
    ("model", "\x1b[31mvit"),
    ("global_pool", "yes"),
    ("mean", [0.5, float("nan"), 0.5]),
    ("mean", 0.5),
    ("std", [0.5, 0.0, 0.5]),
]


def write_model(path: Path, facts: Any) -> Path:
    torch.manual_seed(0)
    model = build_classifier("vit_demo_patch8", 3, 64)
    write_weights(path, model.net.state_dict(), {"mae_dat": json.dumps(facts)})
    return path


def test_a_description_of_ours_opens(tmp_path: Path) -> None:
    opened = open_model(write_model(tmp_path / "model.safetensors", GOOD))
    assert opened.classes == ["a", "b", "c"]
    assert check_facts(GOOD, "file") == GOOD


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{key}-{number}" for number, (key, _) in enumerate(WRONG)])
def test_a_wrong_fact_is_an_error_with_file_and_key(tmp_path: Path, key: str, value: Any) -> None:
    path = write_model(tmp_path / "model.safetensors", {**GOOD, key: value})
    with pytest.raises(CheckpointError) as error:
        open_model(path)
    text = str(error.value)
    assert text.startswith(f"{path}: {key} in its description must be ")
    assert text.isprintable()
    assert len(text) < len(str(path)) + 300


@pytest.mark.parametrize("facts", [[1, 2], "text", 3])
def test_a_description_that_is_no_mapping(tmp_path: Path, facts: Any) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: its description is damaged"):
        open_model(write_model(tmp_path / "model.safetensors", facts))


def test_a_detector_without_all_facts(tmp_path: Path) -> None:
    path = write_model(tmp_path / "model.safetensors", {**GOOD, "kind": "detector"})
    with pytest.raises(CheckpointError, match="the description of the detector lacks width, anchor_size, regions"):
        open_model(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("width", 1_000_000), ("num_words", 10**9), ("factor", "4"), ("encoder_blocks", -1), ("in_chans", -1)],
)
def test_a_tokenizer_with_a_wrong_configuration(tmp_path: Path, key: str, value: Any) -> None:
    path = tmp_path / "light.safetensors"
    write_weights(path, {"codes": torch.ones(2, 2)}, {"tokenizer": "light", "config": json.dumps({key: value})})
    with pytest.raises(CheckpointError, match=rf"light\.safetensors is not a light tokenizer: {key} must be"):
        load_tokenizer(path)
