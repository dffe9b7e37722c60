"""Checkpoints of other projects: the weights are found, or the message names where they are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mae_dat.config.errors import CheckpointError
from mae_dat.storage.unwrap import unwrap


def network() -> dict[str, Tensor]:
    """The first layers of a vision transformer."""
    return {"cls_token": torch.ones(1, 1, 2), "patch_embed.proj.weight": torch.rand(2, 3, 4, 4)}


def resnet() -> dict[str, Tensor]:
    return {"conv1.weight": torch.rand(4, 3, 3, 3), "bn1.running_mean": torch.rand(4)}


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


HEAD = {"mlp.weight": torch.rand(2, 2)}


@pytest.mark.parametrize("state", [network(), resnet()], ids=["transformer", "resnet"])
@pytest.mark.parametrize("key", ["net", "model_state_dict", "network", "params", "module", "teacher", "encoder"])
def test_weights_under_the_names_that_other_projects_use(key: str, state: dict[str, Tensor]) -> None:
    content = {"epoch": 3, key: state, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}}
    tensors, wrappers, _ = unwrap(content, "file.pth")
    assert tensors == state
    assert wrappers == (f"under {key}",)


@pytest.mark.parametrize("state", [network(), resnet()], ids=["transformer", "resnet"])
@pytest.mark.parametrize(
    ("prefix", "others", "wrappers"),
    [
        ("encoder.", {}, ("the prefix encoder.",)),
        ("backbone.", {}, ("the prefix backbone.",)),
        ("encoder.", under("projector.", HEAD), ("only encoder.* (not used: projector)",)),
        (
            "module.encoder.",
            under("module.predictor.", HEAD),
            ("DDP (module.)", "only encoder.* (not used: predictor)"),
        ),
        ("model.", under("criterion.", HEAD), ("not used: criterion",)),
        ("", under("criterion.", HEAD), ("not used: criterion",)),
        ("module.", {"n_averaged": torch.tensor(3)}, ("not used: n_averaged", "DDP (module.)")),
        (
            "teacher.backbone.",
            {**under("teacher.head.", HEAD), **under("student.backbone.", network())},
            ("only teacher.backbone.* (not used: teacher, student)",),
        ),
        ("encoder_q.", under("encoder_k.", network()), ("only encoder_q.* (not used: encoder_k)",)),
    ],
)
def test_one_network_beside_what_the_training_needs(
    prefix: str, others: dict[str, Tensor], wrappers: tuple[str, ...], state: dict[str, Tensor]
) -> None:
    tensors, found, _ = unwrap({"state_dict": {**others, **under(prefix, state)}}, "file.pth")
    assert tensors == state
    assert found == wrappers


def test_the_teacher_of_a_checkpoint_of_dino() -> None:
    teacher = {**under("backbone.", network()), **under("head.", HEAD)}
    content = {"student": under("module.", under("backbone.", resnet())), "teacher": teacher, "epoch": 100}
    tensors, wrappers, _ = unwrap(content, "dino.pth")
    assert tensors.keys() == network().keys()
    assert torch.equal(tensors["patch_embed.proj.weight"], teacher["backbone.patch_embed.proj.weight"])
    assert wrappers == ("under teacher", "only backbone.* (not used: head)")


def test_the_moving_average_of_torch() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    tensors, wrappers, _ = unwrap(averaged.state_dict(), "file.pth")
    assert all(torch.equal(tensors[key], value) for key, value in model.state_dict().items())
    assert wrappers == ("not used: n_averaged", "DDP (module.)")


def test_networks_whose_own_keys_look_like_wrappers_stay() -> None:
    """An encoder beside a decoder is one network, and an exported file of this package contains nothing else."""
    autoencoder = {**under("encoder.", HEAD), **under("decoder.", HEAD), "quantize.embedding.weight": torch.ones(2, 2)}
    assert unwrap(autoencoder, "file.pth").tensors == autoencoder
    own = {**under("encoder.", network()), "head.weight": torch.ones(2, 2)}
    assert unwrap(own, "file.safetensors", ours=True).tensors == own


def test_tensors_under_an_unknown_name_are_named() -> None:
    with pytest.raises(CheckpointError) as error:
        unwrap({"my_model": network(), "step": 3}, "file.pth")
    assert str(error.value) == (
        "file.pth contains no weights under a known name, but tensors under my_model: if that is the model, save it "
        "alone: torch.save(checkpoint['my_model'], 'weights.pth')."
    )


@pytest.mark.parametrize("root", ["model", None])
def test_nan_is_reported_with_its_keys(root: str | None) -> None:
    state = {**network(), "b": torch.tensor([1.0, float("nan")]), "h": torch.tensor([float("nan")]).half()}
    with pytest.raises(CheckpointError, match=r"file\.pth contains NaN in 2 of 4 tensors \(b, h\): .*earlier"):
        unwrap(state if root is None else {root: state}, "file.pth")


@pytest.mark.parametrize("tensor", [torch.ones(2, device="meta"), torch.ones(2, 2).to_sparse()], ids=["meta", "sparse"])
def test_tensors_without_dense_values_are_rejected(tensor: Any) -> None:
    with pytest.raises(CheckpointError, match=r"file\.pth: odd have no dense values"):
        unwrap({**network(), "odd": tensor}, "file.pth")
