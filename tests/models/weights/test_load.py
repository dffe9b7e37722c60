"""Weights into classifiers and autoencoders: position embeddings, heads, wrappers, files good and bad."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_models import equal_states, tiny, tiny_mae
from torch import Tensor

from mae_dat.config.errors import CheckpointError, MissingInputError
from mae_dat.models.classifier import build_classifier
from mae_dat.models.weights.load import load_classifier, load_pretrained, resize_position_embedding
from mae_dat.storage.weight_files import read_weights

Golden = Callable[[str], dict[str, np.ndarray]]


def test_position_embedding_resize_reproduces_the_reference(golden: Golden) -> None:
    arrays = golden("interp_pos_embed_14to8")
    resized = resize_position_embedding(torch.from_numpy(arrays["src"]), (14, 14), (8, 8))
    torch.testing.assert_close(resized, torch.from_numpy(arrays["dst"]), rtol=1e-5, atol=1e-5)


def test_resize_keeps_rows_and_columns_apart() -> None:
    rows = torch.arange(4.0).view(4, 1).expand(4, 6).reshape(1, 24, 1)
    resized = resize_position_embedding(torch.cat([torch.full((1, 1, 1), 9.0), rows], dim=1), (4, 6), (8, 3))
    assert resized[0, 0, 0] == 9
    grid = resized[0, 1:, 0].view(8, 3)
    torch.testing.assert_close(grid, grid[:, :1].expand(8, 3))
    assert (grid[1:, 0] > grid[:-1, 0]).all()


def test_fine_tuning_starts_from_the_mae_encoder() -> None:
    mae, model = tiny_mae(), tiny()
    head = model.net.head.weight.clone()
    report = load_pretrained(model, mae.state_dict())
    assert set(report.missing) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert {"norm.weight", "norm.bias", "mask_token", "decoder_pred.weight"} <= set(report.ignored)
    assert report.loaded == len(model.net.state_dict()) - 4
    assert report.resized is None
    assert torch.equal(model.net.blocks[3].mlp.fc2.weight, mae.blocks[3].mlp.fc2.weight)
    assert torch.equal(model.net.head.weight, head)
    assert "head.weight" in str(report)


def test_class_token_pooling_takes_the_encoder_as_a_whole() -> None:
    mae, model = tiny_mae().eval(), tiny(pool=False).eval()
    report = load_pretrained(model, mae.state_dict())
    assert set(report.missing) == {"head.weight", "head.bias"}
    image = torch.rand(2, 3, 64, 64)
    features = model.net.forward_features(mae.normalize(image))
    torch.testing.assert_close(features, mae.features(image), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "old, new, grids",
    [
        (64, 96, ((8, 8), (12, 12))),
        (64, (32, 80), ((8, 8), (4, 10))),
        ((32, 80), 64, ((4, 10), (8, 8))),
        ((32, 128), 64, ((4, 16), (8, 8))),
    ],
)
def test_position_embedding_follows_the_image_size(old: Any, new: Any, grids: tuple[Any, Any]) -> None:
    mae, model = tiny_mae(old), tiny(img_size=new)
    source_grid = None if grids[0] == (8, 8) else grids[0]
    report = load_pretrained(model, mae.state_dict(), source_grid)
    assert report.resized == grids
    torch.testing.assert_close(model.net.pos_embed, resize_position_embedding(mae.pos_embed, *grids))
    assert f"{grids[0][0]} x {grids[0][1]}" in str(report)


def test_a_grid_that_cannot_be_guessed_is_asked_for() -> None:
    with pytest.raises(CheckpointError, match=r"40 patches.*source_grid"):
        load_pretrained(tiny(), tiny_mae((32, 80)).state_dict())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("blocks.1.attn.qkv.weight"), r"blocks\.1\.attn\.qkv\.weight +- +144 x 48 +missing"),
        (
            lambda state: state.update({"blocks.4.norm1.weight": torch.ones(48)}),
            r"blocks\.4\.norm1\.weight +48 +- +unexpected",
        ),
        (
            lambda state: state.update({"cls_token": torch.ones(1, 1, 40)}),
            r"cls_token +1 x 1 x 40 +1 x 1 x 48 +of another shape",
        ),
        (lambda state: state.update({"head.bias": torch.ones(10)}), r"head\.weight .* missing"),
    ],
)
def test_every_other_difference_is_an_error(change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
    state, model = dict(tiny_mae().state_dict()), tiny()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    change(state)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(model, state)
    assert equal_states(model.state_dict(), before), "a refused checkpoint must change nothing"


def test_weights_of_another_kind_of_network_are_refused() -> None:
    with pytest.raises(CheckpointError, match="does not fit"):
        load_pretrained(build_classifier("resnet18", 3), tiny_mae().state_dict())
    with pytest.raises(CheckpointError, match=r"patch_embed\.proj\.weight +48 x 1 x 8 x 8"):
        load_pretrained(tiny(), tiny_mae(in_chans=1).state_dict())


def test_evaluation_needs_the_same_head() -> None:
    trained, same, other = tiny(10), tiny(10), tiny(4)
    load_classifier(same, trained.state_dict())
    assert equal_states(trained.state_dict(), same.state_dict())
    with pytest.raises(CheckpointError, match=r"10 classes.* 4"):
        load_classifier(other, trained.state_dict())
    with pytest.raises(CheckpointError, match="no classification head"):
        load_classifier(same, tiny_mae().state_dict())
    with pytest.raises(
        CheckpointError, match=r"norm\.weight(.|\n)* missing(.|\n)*fc_norm(.|\n)*unexpected(.|\n)*cls_token"
    ):
        load_classifier(tiny(10, pool=False), trained.state_dict())


def test_fine_tuning_again_keeps_a_head_that_fits() -> None:
    trained, same, other = tiny(10), tiny(10), tiny(4)
    assert not load_pretrained(same, trained.state_dict()).missing
    assert equal_states(trained.state_dict(), same.state_dict())
    report = load_pretrained(other, trained.state_dict())
    assert set(report.missing) == set(report.ignored) == {"head.weight", "head.bias"}
    assert torch.equal(other.net.fc_norm.weight, trained.net.fc_norm.weight)


@pytest.mark.parametrize("prefix", ["", "module.", "net.", "module.net.", "model.", "_orig_mod.", "1."])
def test_wrappers_leave_no_trace_in_the_keys(prefix: str) -> None:
    state = {prefix + key: value for key, value in tiny_mae().state_dict().items()}
    if prefix == "1.":
        state.update({"0.mean": torch.full((3,), 0.5), "0.std": torch.full((3,), 0.5)})
    assert len(load_pretrained(tiny(), {"model": state, "epoch": 3}).missing) == 4


def test_compiled_blocks_load() -> None:
    state = {key.replace("norm1", "_orig_mod.norm1"): value for key, value in tiny().net.state_dict().items()}
    assert not load_classifier(tiny(), state).missing


@pytest.mark.parametrize("name", ["checkpoint-3.pth", "weights.pt", "weights.safetensors"])
def test_files_are_read_as_the_reference_writes_them(tmp_path: Path, name: str) -> None:
    state, path = tiny_mae().state_dict(), tmp_path / name
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 3, "args": argparse.Namespace(lr=0.1)}, path)
    assert equal_states(read_weights(path).tensors, dict(state))
    assert load_pretrained(tiny(), path).source == str(path)


class Foreign:
    """A class that no weights file needs: reading it would run its code."""


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("page.pth", b"<!DOCTYPE html><html>404</html>", "web page"),
        ("page.safetensors", b"\n<html>", "web page"),
        ("empty.pth", b"", "empty"),
        ("lfs.pth", b"version https://git-lfs.github.com/spec/v1\noid", "LFS"),
        ("noise.pth", bytes(range(200)), "cannot be read"),
        ("noise.safetensors", bytes(range(200)), "cannot be read"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_weights(path)
    assert str(path) in str(error.value)


def test_truncated_foreign_and_wrong_content(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(tiny_mae().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(path)
    torch.save({"model": tiny_mae().state_dict(), "args": Foreign()}, path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(path)
    torch.save({"epoch": 3, "lr": 0.1}, path)
    with pytest.raises(CheckpointError, match=r"no weights.*epoch"):
        read_weights(path)
    torch.save([1, 2], path)
    with pytest.raises(CheckpointError, match="list"):
        read_weights(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"nothing\.pth"):
        read_weights(tmp_path / "nothing.pth")
    (tmp_path / "checkpoint-1.pth").touch()
    with pytest.raises(MissingInputError, match=r"folder.*checkpoint-1\.pth"):
        read_weights(tmp_path)
