"""The analysis of adversarial images, run from its command line on generated images."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import (
    finetune_in,
    one_thread,  # noqa: F401 - used by itself
    outcome_of,
    verb,
)

from mae_dat.analysis.analyze import analyze_network, mean_correlations
from mae_dat.analysis.analyze_page import CLEAN_VIEW, VIEW_TITLES
from mae_dat.analysis.statistics import Moments
from mae_dat.config.commands.analyze import AnalyzeConfig
from mae_dat.config.errors import ConfigError
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.transforms import EvalTransform
from mae_dat.models.classifier import build_classifier
from mae_dat.robustness.network import EvalOptions
from mae_dat.robustness.open_networks import open_callable
from mae_dat.runtime.console import Console

SETTINGS = AnalyzeConfig(limit=12, batch_size=8, num_workers=0, pixel_steps=2)


def analyzed(images: Path, network: str = "vit_demo_patch8", **changes: Any) -> dict:
    torch.manual_seed(0)
    held_out = ImageFolder(images / "val", EvalTransform((64, 64)))
    model = build_classifier(network, len(held_out.classes), 64).eval()
    torch.nn.init.normal_(model.net.get_classifier().weight, std=0.1)
    contender = open_callable(model, "tiny", EvalOptions(torch.device("cpu"), size=(64, 64)))
    return analyze_network(contender, held_out, dataclasses.replace(SETTINGS, **changes), Console(quiet=True))[0]


def test_views_are_compared_with_the_clean_images_at_the_lengths_that_they_promise(images: Path) -> None:
    found = analyzed(images)
    views = found["views"]
    assert list(views) == list(VIEW_TITLES)
    assert all(one["images"] == 12 for one in views.values())
    assert views[CLEAN_VIEW]["length"] == 0
    assert views["reconstruction"]["words"] == 0
    assert views["symbolic"]["words"] == pytest.approx(views["random"]["words"]) == pytest.approx(0.05, abs=0.005)
    assert views["pixel"]["largest"] == pytest.approx(4 / 255, rel=1e-3)
    # Clamping to [0, 1] can only shorten a change.
    for view in ("pixel_length", "noise_length"):
        assert 0.5 * views["released"]["length"] < views[view]["length"] <= 1.0001 * views["released"]["length"]
    assert views["pixel"]["loss"] > views[CLEAN_VIEW]["loss"]
    assert views["symbolic"]["loss"] > views["random"]["loss"]
    assert all(-1 <= one["correlation_mean"] <= 1 and one["frechet"] > 0 for one in list(views.values())[1:])
    assert found == analyzed(images), "the same numbers for the same seed"


def test_numbers_do_not_depend_on_the_batch(images: Path) -> None:
    """Of the clean images and their halves, also where the last batch has one image."""
    whole, parts = (analyzed(images, limit=9, batch_size=size, views=("pixel",)) for size in (9, 4))
    for key in ("correlation_mean", "correlation_variance"):
        assert parts["halves"][key] == pytest.approx(whole["halves"][key], rel=1e-4)
        assert parts["views"]["pixel"][key] == pytest.approx(whole["views"]["pixel"][key], rel=1e-4)


def test_a_matched_pixel_attack_goes_as_far_from_the_decoded_image(images: Path) -> None:
    views = analyzed(images)["views"]
    assert views["reconstruction"]["length_decoded"] == 0
    own = views["released"]["length_decoded"]
    assert 0.5 * own < views["pixel_decoded"]["length_decoded"] <= 1.0001 * own
    assert own < views["released"]["length"], "most of it is the tokenizer's error"
    assert views["pixel_decoded"]["loss"] > views["reconstruction"]["loss"]


def test_a_layer_whose_channels_are_alike_is_left_out_of_the_mean() -> None:
    flat, first, second = Moments(), Moments(), Moments()
    flat.add(torch.ones(4, 3))
    first.add(torch.rand(8, 3))
    second.add(torch.rand(8, 3))
    both = mean_correlations({"a": first, "b": flat}, {"a": second, "b": flat})
    assert both["by_layer"]["b"] == {"mean": None, "variance": None}
    assert both["correlation_mean"] == both["by_layer"]["a"]["mean"]
    with pytest.raises(ConfigError, match="channels of every layer have the same mean"):
        mean_correlations({"b": flat}, {"b": flat})


def test_a_network_with_batch_norms_is_looked_at_there(images: Path) -> None:
    found = analyzed(images, "test_resnet")
    names = build_classifier("test_resnet", 10, 64).named_modules()
    batch_norms = [name for name, module in names if isinstance(module, torch.nn.BatchNorm2d)]
    assert list(found["views"]["pixel"]["by_layer"]) == batch_norms


def test_the_command_writes_numbers_page_and_figures(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, output = tmp_path / "fine", tmp_path / "out"
    finetune_in(checkpoint, images)
    given = ["--checkpoint", str(checkpoint), "--names", "a <b>", "--data_path", str(images), "--num_workers", "0"]
    few = ["--limit", "4", "--views", "released", "pixel", "--pixel_steps", "1", "--output_dir", str(output)]
    outcome = outcome_of(verb("analyze"), [*given, *few], monkeypatch, capsys)
    assert outcome.code == 0, outcome.stderr
    numbers = json.loads((output / "analysis.json").read_text())["networks"][0]["views"]
    assert list(numbers) == [CLEAN_VIEW, "released", "pixel"]
    page = (output / "analysis.html").read_text()
    assert f"{numbers['pixel']['correlation_mean']:.4f}" in page
    assert "a &lt;b&gt;" in page
    assert "<b>" not in page
    assert "Infinity" not in (output / "analysis.json").read_text()
    correlations = {"correlation_means.png", "correlation_variances.png", "frechet.png"}
    figures = correlations | {"colors.png", "spectrum_0.png", "changes_a__b_.png"}
    assert {path.name for path in (output / "figures").iterdir()} == figures


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        AnalyzeConfig(views=("symbolik",))
    with pytest.raises(ConfigError, match="--limit must be at least 4, got 3"):
        AnalyzeConfig(limit=3)
    with pytest.raises(ConfigError, match="need released"):
        AnalyzeConfig(views=("noise_length",))
