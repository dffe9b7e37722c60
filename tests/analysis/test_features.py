"""Features of networks of every kind, the nearest neighbors' votes, and the command that writes and measures them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import (
    finetune_in,
    one_thread,  # noqa: F401 - used by itself
    outcome_of,
    verb,
)

from mae_dat.analysis.features import Features, knn_accuracy, model_features
from mae_dat.config.commands.features import FeaturesConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.parse import load_config
from mae_dat.models.classifier import Classifier, build_classifier, build_vit
from mae_dat.models.mae import MaskedAutoencoder, ViTSize

TINY = ViTSize(64, 8, 48, 2, 4)


def tiny(pool: bool) -> Classifier:
    return Classifier(build_vit(TINY, 5, global_pool=pool), (0.5,) * 3, (0.5,) * 3).eval()


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "swin_tiny_patch4_window7_224"])
def test_a_networks_mean_is_what_its_head_sees_and_its_tokens_are_places(name: str) -> None:
    model = build_classifier(name, 5, 64).eval()
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        mean, tokens = model.features(image), model.features(image, "tokens")
        torch.testing.assert_close(model.net.get_classifier()(mean), model(image))
    places = (64 // model.net.feature_info[-1]["reduction"]) ** 2
    assert tokens.shape == (2, places, model.net.num_features)
    with pytest.raises(ConfigError, match="no class token"):
        model.features(image, "cls")


def test_tokens_are_in_row_major_order() -> None:
    net = build_classifier("test_resnet", 5).net.eval()
    model = Classifier(net, (0.0,) * 3, (1.0,) * 3).eval()
    with torch.no_grad():
        image = torch.rand(1, 3, 64, 96)
        places = net.forward_features(image)
        assert places.shape[2] != places.shape[3]
        assert torch.equal(model.features(image, "tokens")[0, 1], places[0, :, 0, 1])


@pytest.mark.parametrize("pool, mean_pool", [("mean", True), ("cls", False)])
def test_a_transformers_features_are_what_its_head_sees(pool: str, mean_pool: bool) -> None:
    model, image = tiny(mean_pool), torch.rand(2, 3, 64, 64)
    torch.nn.init.normal_(model.net.head.weight)
    with torch.no_grad():
        torch.testing.assert_close(model.net.head(model.features(image, pool)), model(image))
        assert model.features(image, "tokens").shape == (2, 64, 48)
        other = "cls" if pool == "mean" else "mean"
        assert not torch.allclose(model.features(image, other), model.features(image, pool))


def test_a_masked_autoencoders_features_are_those_of_its_encoder() -> None:
    mae = MaskedAutoencoder(64, 8, 3, 48, 2, 4, 32, 1, 4).eval()
    image = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        latent = mae.features(image)
        assert torch.equal(model_features(mae, image, "cls"), latent[:, 0])
        torch.testing.assert_close(model_features(mae, image, "mean"), latent[:, 1:].mean(1))
        assert torch.equal(model_features(mae, image, "tokens"), latent[:, 1:])
    with pytest.raises(ConfigError, match="unknown pool"):
        model_features(mae, image, "max")


def test_neighbors_vote_by_similarity_and_not_by_number() -> None:
    """One near neighbor of class 0 against two far ones of class 1; every vote is exp(cosine / temperature)."""
    bank = Features(np.array([[3.0, 0.1], [0.5, 1.0], [0.5, 1.0]], np.float32), np.array([0, 1, 1]), [])
    query = Features(np.array([[10.0, 0.0]], np.float32), np.array([0]), [])
    assert knn_accuracy(bank, query, 3, 0.07)["knn_acc1"] == 100
    assert knn_accuracy(bank, query, 3, 10.0)["knn_acc1"] == 0
    assert knn_accuracy(bank, query, 1, 10.0)["knn_acc1"] == 100
    assert knn_accuracy(bank, query, 3, 1e-4)["knn_acc5"] == 100
    with pytest.raises(ConfigError, match="only 3 training images"):
        knn_accuracy(bank, query, 4, 0.07)


def test_neighbors_agree_with_a_loop_over_all_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (60,), generator=generator)
    values = torch.randn(60, 8, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 8)
    bank, queries = (Features(values[part].numpy(), labels[part].numpy(), []) for part in (slice(40), slice(40, None)))
    hits = 0
    for value, label in zip(values[40:], labels[40:], strict=True):
        similarity = torch.nn.functional.cosine_similarity(value[None], values[:40])
        order = similarity.argsort(descending=True)[:7]
        votes = [sum(float((similarity[i] / 0.07).exp()) for i in order if labels[i] == c) for c in range(4)]
        hits += int(np.argmax(votes) == int(label))
    assert 0 < hits < 20
    assert knn_accuracy(bank, queries, 7, 0.07)["knn_acc1"] == pytest.approx(100 * hits / 20)


def test_a_pretraining_is_measured_and_written(
    images: Path,
    pretrained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ["--checkpoint", str(pretrained), "--data_path", str(images), "--num_workers", "0"]
    output = tmp_path / "new"
    done = outcome_of(verb("features"), [*given, "--knn", "5", "--output_dir", str(output)], monkeypatch, capsys)
    assert done.code == 0, done.stderr
    assert "5 nearest neighbors: acc1 " in done.stderr
    arrays = np.load(output / "features.npz", allow_pickle=False)
    assert arrays["features"].shape == (20, 128)
    assert sorted(arrays["labels"].tolist()) == sorted(list(range(10)) * 2)
    assert all(Path(path).is_file() for path in arrays["paths"])
    flags = ["--split", "all", "--pool", "tokens", "--output_dir", str(output), "--format", "safetensors"]
    assert outcome_of(verb("features"), [*given, *flags], monkeypatch, capsys).code == 0
    output /= "features.safetensors"
    tensors = load_file(output)
    assert tensors["features"].shape == (64, 16, 128)
    assert set(tensors["labels"].tolist()) == {-1}
    with safe_open(output, "pt") as file:
        assert "val" in file.metadata()["paths"]


def test_a_classifier_separates_what_it_was_trained_on(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune_in(tmp_path / "cnn", images, "--model", "test_resnet")
    given = ["--checkpoint", str(tmp_path / "cnn"), "--data_path", str(images), "--num_workers", "0", "--knn", "3"]
    assert "acc1" in outcome_of(verb("features"), given, monkeypatch, capsys).stderr
    refused = outcome_of(verb("features"), [*given, "--pool", "cls"], monkeypatch, capsys)
    assert refused.code == ConfigError.exit_code
    assert "no class token" in refused.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--knn", "0"], "at least 1 neighbor"),
        (["--knn", "5", "--pool", "tokens"], "--pool mean or cls"),
        (["--knn", "5", "--knn_temperature", "0"], "knn_temperature above 0"),
    ],
)
def test_flags_that_cannot_work_are_refused(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(FeaturesConfig, flags)


def test_nothing_to_do_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nothing to do" in outcome_of(verb("features"), ["--checkpoint", "OUT"], monkeypatch, capsys).stderr
