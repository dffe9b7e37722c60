"""Calibration against hand-computed cases, known properties, and whatever batches and ranks saw the images."""

import math

import pytest
import torch
from torch import Tensor

from mae_dat.config.errors import DataError, NumericsError
from mae_dat.robustness.scores.calibration import (
    TEMPERATURES,
    Confidences,
    expected_error,
    fit_temperature,
    mean_nll,
    rms_error,
)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_expected_error_by_hand() -> None:
    confidence, correct = doubles(0.95, 0.97, 0.5, 0.52, 0.3), doubles(1, 0, 1, 1, 0)
    # bins (14/15, 1], (7/15, 8/15] and (4/15, 5/15]
    assert expected_error(confidence, correct) == pytest.approx(0.4 * 0.46 + 0.4 * 0.49 + 0.2 * 0.3)
    assert expected_error(confidence, correct, bins=1) == pytest.approx(abs(0.648 - 0.6))


def test_an_edge_belongs_to_the_bin_below() -> None:
    """0.5 is the edge of 2 bins: with 0.4 it makes one, whose gaps cancel; in two bins they would not."""
    assert expected_error(doubles(0.4, 0.5), doubles(0.4, 0.5)) == 0.0
    assert expected_error(doubles(0.4, 0.5), doubles(0, 0.9), bins=2) == pytest.approx(0.0)
    assert expected_error(doubles(0.4, 0.5 + 1e-9), doubles(0, 0.9), bins=2) == pytest.approx(0.4)


def test_a_calibrated_model_has_no_error_and_an_overconfident_one_has() -> None:
    correct = (torch.arange(1000) % 4 != 0).double()
    calibrated, overconfident = torch.full_like(correct, 0.75), torch.ones_like(correct)
    assert (expected_error(calibrated, correct), rms_error(calibrated, correct)) == (0.0, 0.0)
    assert (expected_error(overconfident, correct), rms_error(overconfident, correct)) == (0.25, 0.25)


def test_rms_error_by_hand() -> None:
    """250 images: a bin of the 100 least confident, always wrong, and one of 150, always right."""
    confidence = torch.cat([torch.full((150,), 0.9), torch.full((100,), 0.4)]).double()
    correct = (confidence > 0.5).double()
    assert rms_error(confidence, correct) == pytest.approx(math.sqrt(0.4 * 0.4**2 + 0.6 * 0.1**2))
    assert rms_error(confidence, correct, compat=True) == pytest.approx(math.sqrt(0.4 * 0.4**2))
    with pytest.raises(ValueError, match="199 images"):
        rms_error(confidence[:199], correct[:199], compat=True)
    assert rms_error(confidence[:40], correct[:40]) == pytest.approx(0.1)


def released_rms(confidence: list[float], correct: list[float]) -> float:
    """The released code's arithmetic in plain words: the last bin takes the remainder and is never reached."""
    pairs = sorted(zip(confidence, correct, strict=True))
    total = 0.0
    for start in range(0, (len(pairs) // 100 - 1) * 100, 100):
        members = pairs[start : start + 100]
        gap = sum(c for c, _ in members) / 100 - sum(r for _, r in members) / 100
        total += 100 / len(pairs) * gap**2
    return math.sqrt(total)


@pytest.mark.parametrize("images", [200, 300, 399, 1050])
def test_the_compatible_form_is_the_released_one(images: int) -> None:
    confidence = torch.rand(images, dtype=torch.float64)
    correct = (torch.rand(images) < confidence).double()
    expected = released_rms(confidence.tolist(), correct.tolist())
    assert rms_error(confidence, correct, compat=True) == pytest.approx(expected, rel=1e-12)
    assert rms_error(confidence, correct) > expected  # of the same weights, with a further term


def measured(logits: Tensor, labels: Tensor, batch: int, world: int) -> dict[str, float]:
    """The scores when each of `world` ranks takes every world-th image, in batches."""
    ranks = [Confidences(len(labels)) for _ in range(world)]
    for rank, confidences in enumerate(ranks):
        for index in torch.arange(rank, len(labels), world).split(batch):
            confidences.add(index, logits[index].double().softmax(1), labels[index])
    total = torch.stack([confidences.rows for confidences in ranks]).sum(0)
    for confidences in ranks:
        confidences.reduce(lambda _: total)
    assert all(confidences.scores() == ranks[0].scores() for confidences in ranks)
    return ranks[0].scores()


def test_the_same_to_the_last_bit_for_any_batches_and_ranks() -> None:
    labels = torch.randint(0, 7, (523,))
    logits = torch.randn(523, 7) + 2 * torch.nn.functional.one_hot(labels, 7)
    expected = measured(logits, labels, 523, 1)
    for batch, world in [(1, 1), (64, 1), (10, 2), (7, 3), (100, 7)]:
        assert measured(logits, labels, batch, world) == expected
    probabilities = logits.double().softmax(1)
    assert expected["nll"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits.double(), labels)))
    target = torch.nn.functional.one_hot(labels, 7)
    assert expected["brier"] == pytest.approx(float((probabilities - target).square().sum(1).mean()))
    assert set(expected) == {"ece", "rms", "rms_compat", "nll", "brier"}


def test_certain_predictions_have_the_best_and_the_worst_scores() -> None:
    confidences = Confidences(2)
    confidences.add(torch.tensor([0, 1]), torch.eye(3, dtype=torch.float64)[[0, 1]], torch.tensor([0, 1]))
    confidences.reduce(lambda rows: rows)
    assert confidences.scores() == {"ece": 0.0, "rms": 0.0, "nll": 0.0, "brier": 0.0}
    confidences = Confidences(1)
    confidences.add(torch.tensor([0]), torch.eye(3, dtype=torch.float64)[[0]], torch.tensor([2]))
    assert confidences.scores() == {"ece": 1.0, "rms": 1.0, "nll": None, "brier": 2.0}


def test_an_image_twice_or_never_and_a_nan_are_errors() -> None:
    confidences, uniform = Confidences(3), torch.full((2, 4), 0.25, dtype=torch.float64)
    confidences.add(torch.tensor([0, 1]), uniform, torch.tensor([3, 3]))
    with pytest.raises(DataError, match="image 2 was measured 0 times"):
        confidences.reduce(lambda rows: rows)
    confidences.add(torch.tensor([2, 1]), uniform, torch.tensor([3, 3]))
    with pytest.raises(DataError, match="image 1 was measured 2 times"):
        confidences.reduce(lambda rows: rows)
    confidences = Confidences(2)
    confidences.add(torch.tensor([0, 1]), uniform * torch.tensor([[1.0], [torch.nan]]), torch.tensor([3, 3]))
    with pytest.raises(NumericsError):
        confidences.reduce(lambda rows: rows)


# ---- temperature ----


def test_the_fitted_temperature_is_the_one_that_the_labels_were_drawn_with() -> None:
    """Labels drawn from softmax(logits / 2.5), and from a tenth of that temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(20_000, 10, generator=generator)
    labels = torch.multinomial((logits.double() / 2.5).softmax(1), 1, generator=generator)[:, 0]
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(2.5, rel=0.03)
    assert fit_temperature(logits / 10, labels) == pytest.approx(temperature / 10, rel=1e-4)
    # At the minimum the mean logit of the labels is the one that the model expects.
    expected = ((logits.double() / temperature).softmax(1) * logits.double()).sum(1).mean()
    assert float(logits.gather(1, labels[:, None]).double().mean()) == pytest.approx(float(expected), rel=1e-4)
    assert mean_nll(logits, labels, temperature) < min(mean_nll(logits, labels, t) for t in (1, 2.3, 2.7))


def test_there_is_a_temperature_only_where_there_are_errors() -> None:
    assert fit_temperature(torch.eye(3), torch.arange(3)) < 0.05
    assert fit_temperature(torch.eye(3), torch.arange(3).flip(0)) == pytest.approx(TEMPERATURES[1], rel=1e-3)
    with pytest.raises(DataError, match="no images"):
        fit_temperature(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))


def test_mean_nll_by_hand() -> None:
    assert mean_nll(torch.tensor([[0.0, 2.0]]), torch.tensor([1]), 2.0) == pytest.approx(math.log(1 + math.exp(-1)))


def test_the_bins_of_a_diagram_give_the_expected_error() -> None:
    generator = torch.Generator().manual_seed(0)
    confidences = Confidences(200)
    probabilities = torch.rand(200, 5, generator=generator, dtype=torch.float64).softmax(1)
    confidences.add(torch.arange(200), probabilities, torch.randint(5, (200,), generator=generator))
    confidences.reduce(lambda rows: rows)
    bins = confidences.reliability()
    gaps = (one["images"] * abs(one["confidence"] - one["correct"] / one["images"]) for one in bins)
    assert sum(gaps) / 200 == pytest.approx(confidences.scores()["ece"])
    assert sum(one["images"] for one in bins) == 200
