"""The exported weights of a run always belong to its checkpoints: replaced, damaged and earlier files are noticed."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import draw_folder, one_thread, pretrain_in

from mae_dat.config.errors import CheckpointError
from mae_dat.models.weights.read import read_model_file
from mae_dat.storage.checkpoint import newest_checkpoint
from mae_dat.storage.files import sha256_of
from mae_dat.training.export import write_export

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("images"), val=0, conflict=0)


def delete_checkpoints(folder: Path) -> None:
    for path in folder.glob("checkpoint-*"):
        path.unlink()


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def same_weights(folder: Path) -> bool:
    """Whether the exported weights are those of the newest checkpoint."""
    checkpoint = newest_checkpoint(folder)
    assert checkpoint is not None
    exported, trained = load_file(folder / "model.safetensors"), checkpoint.load()["model"]
    return exported.keys() == trained.keys() and all(torch.equal(exported[key], trained[key]) for key in exported)


def test_another_run_in_the_folder_exports_its_own_weights(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after `rm checkpoint-*` and the same command with another seed: kind, facts and steps are equal."""
    pretrain_in(tmp_path, images, "--seed", "1")
    first = sha256_of(tmp_path / "model.safetensors")
    delete_checkpoints(tmp_path)
    pretrain_in(tmp_path, images, "--seed", "2")
    assert same_weights(tmp_path)
    card = json.loads((tmp_path / "model.json").read_text())
    assert card["sha256"] == sha256_of(tmp_path / "model.safetensors") != first
    aside = tmp_path / f"model-{first[:8]}.safetensors"
    assert f"is of an earlier training: renamed to {aside.name}" in caplog.text
    assert sha256_of(aside) == first == json.loads(aside.with_suffix(".json").read_text())["sha256"]


def test_a_run_that_goes_further_has_the_weights_of_its_checkpoint_meanwhile(images: Path, tmp_path: Path) -> None:
    """The export of two epochs is no result of a run of three that was stopped."""
    pretrain_in(tmp_path, images, "--epochs", "2")
    before = read_model_file(tmp_path).tensors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mae_dat.training.pretrain.export_model", lambda *_: None)  # as if stopped before it
        pretrain_in(tmp_path, images, "--epochs", "3", "--allow_change", "epochs")
    after = read_model_file(tmp_path).tensors
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_flipped_bit_is_found_and_mended_by_the_next_run(
    images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pretrain_in(tmp_path, images)
    before = (tmp_path / "model.safetensors").read_bytes()
    flip_bit(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: its sha256 is not the one in"):
        read_model_file(tmp_path)
    pretrain_in(tmp_path, images)
    assert "model.safetensors was damaged or changed" in caplog.text
    assert (tmp_path / "model.safetensors").read_bytes() == before
    caplog.clear()
    pretrain_in(tmp_path, images)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"sha256": 3}', b"\xff\xfe"])
def test_a_damaged_card_is_written_again(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_export(path, {"weight": torch.ones(2)}, {}, {"steps": 1})
    card = (tmp_path / "model.json").read_bytes()
    (tmp_path / "model.json").write_bytes(content)
    write_export(path, {"weight": torch.ones(2)}, {}, {"steps": 1})
    assert (tmp_path / "model.json").read_bytes() == card


def test_equal_content_is_not_written_twice(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_export(path, {"weight": torch.ones(2)}, {}, {"steps": 1})
    before = path.stat().st_ino, (tmp_path / "model.json").stat().st_ino
    write_export(path, {"weight": torch.ones(2)}, {}, {"steps": 1})
    assert (path.stat().st_ino, (tmp_path / "model.json").stat().st_ino) == before
