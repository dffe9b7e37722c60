"""Losses, class weights and balanced sampling: values against plain formulas, files that cannot be used, runs."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from dat_steps import CLASSES, SIDE, batch_of, generator
from tiny_runs import (
    draw_folder,
    finetune_in,
    one_thread,  # noqa: F401 - used by itself
)
from torch import nn

from mae_dat.config.errors import ConfigError, MissingInputError, UserError
from mae_dat.config.groups import AugmentConfig
from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.sampler import balanced_order
from mae_dat.data.transforms import EvalTransform
from mae_dat.runtime.run_log import read_log
from mae_dat.training.class_weights import class_weights
from mae_dat.training.objectives.classification import Classification


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, CLASSES))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_the_plain_formulas(smoothing: float, weighted: bool) -> None:
    weights = torch.tensor([0.5, 1.0, 2.0, 0.0, 3.0]) if weighted else None
    batch, net = batch_of(), model()
    logits, factors = net(batch["image"]), torch.ones(CLASSES) if weights is None else weights
    targets = F.one_hot(batch["label"], CLASSES) * (1 - smoothing) + smoothing / CLASSES
    log_sigmoid = targets * F.logsigmoid(logits) + (1 - targets) * F.logsigmoid(-logits)
    expected = {
        False: -(factors * targets * logits.log_softmax(1)).sum(1),
        True: -(factors * log_sigmoid).mean(1),
    }
    for binary, per_image in expected.items():
        objective = Classification(AugmentConfig(smoothing=smoothing), CLASSES, binary, weights)
        image, prepared = objective.prepare(net, batch, generator())
        torch.testing.assert_close(objective.loss(net, image, prepared), per_image.mean())
        torch.testing.assert_close(objective.loss_per_image(net, image, prepared), per_image)


def test_a_balanced_order_has_as_many_of_each_class() -> None:
    labels = torch.tensor([0] * 50 + [1] * 8 + [3] * 3)
    order = balanced_order(labels, seed=1, epoch=0)
    assert len(order) == len(labels)
    assert sorted(Counter(labels[order].tolist()).values()) == [20, 20, 21]
    assert set(labels[order].tolist()) == {0, 1, 3}
    repeats = Counter(order.tolist())
    assert {repeats[index] for index in range(50, 58)} <= {2, 3}, "small classes repeat evenly"
    assert max(repeats[index] for index in range(50)) == 1
    assert torch.equal(order, balanced_order(labels, seed=1, epoch=0))
    assert not torch.equal(order, balanced_order(labels, seed=1, epoch=1))
    assert not torch.equal(order, balanced_order(labels, seed=2, epoch=0))


# ---- files ----


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of ten classes, and 24 more of one of them."""
    root = draw_folder(tmp_path_factory.mktemp("data") / "images", train=20, val=10, conflict=10)
    folder = sorted((root / "train").iterdir())[0]
    (source,) = list(folder.iterdir())[:1]
    for number in range(24):
        (folder / f"copy-{number}{source.suffix}").write_bytes(source.read_bytes())
    return root


def training_set(images: Path) -> ImageFolder:
    return ImageFolder(images / "train", EvalTransform((32, 32)))


def test_balanced_weights_have_a_mean_of_1_over_the_images(images: Path) -> None:
    folder = training_set(images)
    weights = class_weights("balanced", folder, outputs=12)
    assert weights is not None
    assert weights.tolist() == pytest.approx([44 / (10 * 26), *[44 / (10 * 2)] * 9, 1, 1])
    assert sum(weights[folder.label(index)] for index in range(44)) == pytest.approx(44)
    assert class_weights(None, folder, outputs=12) is None


def test_weights_of_a_file_are_found_by_name(images: Path, tmp_path: Path) -> None:
    folder, path = training_set(images), tmp_path / "weights.json"
    path.write_text(json.dumps({name: number for number, name in reversed(list(enumerate(folder.classes)))}))
    weights = class_weights(str(path), folder, outputs=10)
    assert weights is not None
    assert weights.tolist() == [float(number) for number in range(10)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: {**weights, "arow": 1}, "has unknown classes: arow; did you mean arrow"),
        (lambda weights: {**weights, "arrow": -1}, "the weight of arrow must be a number of 0 or more, got -1"),
        (lambda weights: {**weights, "arrow": "x"}, "the weight of arrow must be a number of 0 or more, got 'x'"),
        (lambda weights: {name: 1 for name in weights if name != "arrow"}, "has no weight for arrow: add them"),
        (lambda weights: dict.fromkeys(weights, 0), "all weights are 0"),
        (lambda weights: list(weights), "must contain `class: weight` lines"),
    ],
)
def test_files_that_cannot_be_used(change: object, message: str, images: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text(json.dumps(change(dict.fromkeys(training_set(images).classes, 1))))  # type: ignore[operator]
    with pytest.raises(UserError, match=re.escape(message)):
        finetune_in(tmp_path / "out", images, "--class_weights", str(path))
    with pytest.raises(MissingInputError, match="no such file; give balanced or a file"):
        finetune_in(tmp_path / "out", images, "--class_weights", str(tmp_path / "none.yaml"))


def test_consistency_has_cross_entropy_alone() -> None:
    flags = ["--aa", "augmix-m3-w3", "--jsd", "12"]
    for changed in (["--loss", "bce"], ["--class_weights", "balanced"]):
        with pytest.raises(ConfigError, match="leave out --loss and --class_weights"):
            load_config(FinetuneConfig, [*flags, *changed])


# ---- runs ----


def test_a_run_with_all_of_them_states_them(images: Path, tmp_path: Path) -> None:
    flags = ["--loss", "bce", "--class_weights", "balanced", "--sampler", "balanced"]
    finetune_in(tmp_path / "out", images, *flags)
    rows = json.loads((tmp_path / "out" / "inputs.json").read_text())["rows"]
    assert rows["loss"] == "binary cross-entropy, class weights: balanced, as many images of each class"
    (record,) = read_log(tmp_path / "out" / "log.txt")
    assert 0 < record["train_loss"] < 2
