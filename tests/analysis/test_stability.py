"""Stability of features and of nearest neighbors under corruptions."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from noise_images import noise
from tiny_runs import draw_folder, verb

from mae_dat.analysis.stability import CorruptedImages, stability
from mae_dat.config.commands.features import FeaturesConfig
from mae_dat.config.errors import ConfigError, InputSizeError
from mae_dat.robustness.corruptions import as_stored, corrupt_image, image_seed


def features(count: int, seed: int = 0, dim: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)


def test_equal_features_are_perfectly_stable_at_any_length() -> None:
    clean = features(30)
    result = stability(clean, 3 * clean, "fog", 2, neighbors=5)
    assert (result.similarity, result.neighbors, result.found) == (pytest.approx(1), 1, 1)
    assert 0.8 < result.found_ends[0] < result.found_ends[1] == 1  # exact: never 1 to 1


def test_values_by_hand() -> None:
    """Four directions in the plane; the copy of the first one is turned onto the third."""
    angles = np.radians([0, 10, 90, 180])
    clean = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    corrupted = clean.copy()
    corrupted[0] = clean[2]
    result = stability(clean, corrupted, "fog", 1, neighbors=1)
    assert result.similarity == pytest.approx(3 / 4)
    assert result.found == 3 / 4
    # The nearest other one of image 0 is image 1; of its copy at 90 degrees it is image 2.
    assert result.neighbors == 3 / 4
    assert result.similarity_ends[0] < 3 / 4 < result.similarity_ends[1]


def test_unrelated_features_keep_neighbors_by_chance() -> None:
    result = stability(features(400), features(400, seed=1), "fog", 5, neighbors=20)
    assert abs(result.similarity) < 0.05
    assert result.neighbors == pytest.approx(20 / 399, abs=0.02)
    assert result.found < 0.02
    low, high = result.neighbors_ends
    assert low < 20 / 399 < high


def test_wrong_features_are_errors() -> None:
    with pytest.raises(ConfigError, match="5 images are too few for their 4 nearest neighbors: give at least 6"):
        stability(features(5), features(5), "fog", 1, neighbors=4)
    broken = features(20)
    broken[3, 1] = np.nan
    with pytest.raises(ConfigError, match="the features of fog 1 are NaN or infinite"):
        stability(features(20), broken, "fog", 1)
    for flags in ({"neighbors": 0}, {"limit": 3}, {"corruptions": ("fog",), "severities": (6,)}):
        with pytest.raises(ConfigError):
            FeaturesConfig(**flags)  # type: ignore[arg-type]


def test_images_are_corrupted_as_in_an_evaluation() -> None:
    image = noise(40, 40)
    found = CorruptedImages(lambda index: image, (40, 40), "snow", 4, seed=2)[3]["image"]
    expected = as_stored(corrupt_image(np.array(image), "snow", 4, image_seed(2, 3, "snow", 4)))
    assert torch.equal(found, torch.from_numpy(expected).permute(2, 0, 1))
    with pytest.raises(InputSizeError, match="need inputs of 32 px"):
        CorruptedImages(lambda index: image, (16, 16), "snow", 4, seed=2)


def test_the_command_prints_a_table_and_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = draw_folder(tmp_path / "data", train=0, conflict=0, size=64)
    flags = ["--checkpoint", "mae_dat_demo", "--data_path", str(data), "--output_dir", str(tmp_path / "out")]
    flags += ["--corruptions", "brightness", "gaussian_noise", "--severities", "1", "5", "--neighbors", "3"]
    assert verb("features")([*flags, "--limit", "16", "--num_workers", "0", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "20.0 % by chance" in printed
    with (tmp_path / "out" / "stability.csv").open() as file:
        rows = {(row["corruption"], row["severity"]): row for row in csv.DictReader(file)}
    assert len(rows) == 4
    strong, weak = rows["gaussian_noise", "5"], rows["gaussian_noise", "1"]
    assert float(strong["similarity"]) < float(weak["similarity"]) <= 1
    assert float(weak["similarity_low"]) <= float(weak["similarity"]) <= float(weak["similarity_high"])
