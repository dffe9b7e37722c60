"""What `--train` and `--probe_epochs` train, and that the rest stays as it is, across a resume too."""

import json
import signal
from pathlib import Path

import pytest
import torch
from tiny_runs import (
    draw_folder,
    finetune_in,
    one_thread,  # noqa: F401 - used by itself
)
from torch import Tensor
from whole_runs import assert_equal_states, final_state, records, signal_in_step

from mae_dat.config.errors import ConfigError, InterruptError
from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig
from mae_dat.models.classifier import Classifier, build_classifier
from mae_dat.models.trained_parts import select_trained
from mae_dat.runtime.run_log import read_log


def trained_names(model: Classifier, part: str) -> set[str]:
    select_trained(model, part)
    return {name for name, parameter in model.net.named_parameters() if parameter.requires_grad}


def vit() -> Classifier:
    return build_classifier("vit_demo_patch8", 5, (32, 32))


def test_parts_of_a_vision_transformer() -> None:
    names = {name for name, _ in vit().net.named_parameters()}
    head, after = {"head.weight", "head.bias"}, {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert trained_names(vit(), "all") == names
    assert trained_names(vit(), "head") == head
    assert trained_names(vit(), "last:2") == after | {
        name for name in names if name.startswith(("blocks.3.", "blocks.4."))
    }
    assert trained_names(vit(), "norms") == after | {name for name in names if ".norm" in name}
    # The stem is the first of six layers.
    assert trained_names(vit(), "last:6") == names
    with pytest.raises(ConfigError, match="--train last:99: VisionTransformer has 6 layers; give last:1 to last:6"):
        select_trained(vit(), "last:99")


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext"])
def test_convolutional_networks_have_these_parts_too(name: str) -> None:
    def build() -> Classifier:
        return build_classifier(name, 5)

    everything = {name for name, _ in build().net.named_parameters()}
    head = trained_names(build(), "head")
    assert {name.rpartition(".")[2] for name in head} == {"weight", "bias"}
    last = trained_names(build(), "last:1")
    norms = trained_names(build(), "norms")
    assert head < last < everything
    assert head < norms < everything


def test_frozen_batch_norm_keeps_its_statistics_and_frozen_blocks_their_drop_path_off() -> None:
    model = build_classifier("test_resnet", 5)
    select_trained(model, "last:1")
    model.train()
    before = {key: value.clone() for key, value in model.state_dict().items() if "running_mean" in key}
    model(torch.rand(4, 3, 64, 64))
    changed = {key for key, value in before.items() if not torch.equal(model.state_dict()[key], value)}
    assert changed
    assert all(key.removeprefix("net.").startswith(("layer4", "stages.3")) for key in changed), changed
    transformer = build_classifier("vit_demo_patch8", 5, (32, 32), drop_path=0.5)
    select_trained(transformer, "last:1")
    assert [block.training for block in transformer.train().net.blocks] == [False] * 4 + [True]
    assert not any(module.training for module in transformer.eval().modules())


# ---- runs ----


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("data") / "images", train=16, val=10, conflict=10)


def weights_after(output: Path, epoch: int) -> dict[str, Tensor]:
    return torch.load(output / f"checkpoint-{2 * epoch:08d}.pth", weights_only=False)["model"]


def changed_keys(one: dict[str, Tensor], other: dict[str, Tensor]) -> set[str]:
    return {key.removeprefix("net.") for key in one if not torch.equal(one[key], other[key])}


PROBE = ["--probe_epochs", "1", "--epochs", "3", "--warmup_epochs", "1", "--keep", "9"]


def test_the_head_is_trained_first_then_everything_across_a_resume(images: Path, tmp_path: Path) -> None:
    finetune_in(tmp_path / "whole", images, *PROBE)
    once, twice = weights_after(tmp_path / "whole", 1), weights_after(tmp_path / "whole", 2)
    assert {"blocks.0.attn.qkv.weight", "head.weight"} <= changed_keys(once, twice)
    finetune_in(
        tmp_path / "first", images, "--train", "head", "--epochs", "1", "--warmup_epochs", "0", "--min_lr", "1e-3"
    )
    only_head = weights_after(tmp_path / "first", 1)
    assert changed_keys(once, only_head) == {"head.weight", "head.bias"}, "both start from the same random weights"
    rates = [record["train_lr"] for record in read_log(tmp_path / "whole" / "log.txt")]
    assert rates[0] == pytest.approx(1e-3 * 8 / 256), "the rate is at its peak while the head is probed"
    for step in (1, 2):
        stopped = tmp_path / f"stopped-{step}"
        with signal_in_step(step, signal.SIGTERM), pytest.raises(InterruptError):
            finetune_in(stopped, images, *PROBE)
        finetune_in(stopped, images, *PROBE)
        assert_equal_states(final_state(stopped), final_state(tmp_path / "whole"))
        assert records(stopped) == records(tmp_path / "whole")
    rows = json.loads((tmp_path / "whole" / "inputs.json").read_text())["rows"]
    assert rows["trained"].split("\n")[1] == "the head alone in the first 1 epochs"


def test_last_layers_alone_are_trained_and_named(images: Path, tmp_path: Path) -> None:
    finetune_in(tmp_path / "out", images, "--train", "last:1", "--epochs", "2", "--keep", "9")
    changed = changed_keys(weights_after(tmp_path / "out", 1), weights_after(tmp_path / "out", 2))
    assert {key.split(".")[0] for key in changed} == {"blocks", "fc_norm", "head"}
    assert all(key.startswith("blocks.4.") for key in changed if key.startswith("blocks."))
    rows = json.loads((tmp_path / "out" / "inputs.json").read_text())["rows"]
    assert rows["trained"].startswith("last:1: ")
    assert "parameters; weights, gradients and AdamW's state take" in rows["trained"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train", "first:2"], "--train must be all, head, norms or last:K"),
        (["--train", "last:0"], "--train must be all, head, norms or last:K"),
        (["--linear_probe", "--train", "norms"], "--linear_probe trains the head, and --train norms more"),
        (["--probe_epochs", "50"], "takes all 50 epochs: lower it, or give --train head"),
        (["--probe_epochs=-1"], "--probe_epochs must be 0 or more"),
        (["--probe_epochs", "2", "--train", "head"], "the head alone is trained in any case"),
        (["--probe_epochs", "2", "--fsdp"], "does not go with --fsdp"),
        (["--probe_epochs", "2", "--at", "advprop"], "does not go with --probe_epochs 2"),
        (["--train", "norms", "--at", "advprop"], "does not go with --train norms"),
    ],
)
def test_parts_that_cannot_be_trained(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(FinetuneConfig, flags)
