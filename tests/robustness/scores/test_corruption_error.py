"""mCE, relative mCE and their parts, against hand-computed values and the paper's properties."""

import copy

import pytest

from mae_dat.robustness.corruptions import CATEGORIES, CORRUPTIONS, EXTRA
from mae_dat.robustness.scores.accuracy import CorruptionCounts, unnormalized_mce
from mae_dat.robustness.scores.corruption_error import ALEXNET, corruption_errors, mce, severity_mce

# Averages over the five severities as published beside the table.
AVERAGES = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}


def changed(correct: int | None = None, total: int = 50_000) -> CorruptionCounts:
    """AlexNet's cells with another count of right answers in all of them."""
    scores = copy.deepcopy(ALEXNET)
    for cell in (count for row in scores["corruptions"].values() for count in row.values()):
        cell.update(correct=cell["correct"] if correct is None else correct, total=total)
    return scores


def test_the_table_agrees_with_its_published_averages() -> None:
    errors = corruption_errors(ALEXNET, changed(correct=0))
    assert set(errors) == {*CORRUPTIONS, *EXTRA}
    for name, average in AVERAGES.items():
        assert errors[name] == pytest.approx(100 * average, abs=1e-5)
    assert errors["saturate"] == pytest.approx(65.8248)
    assert unnormalized_mce(ALEXNET) == pytest.approx(78.8993, abs=1e-4)
    assert ALEXNET["clean"] == {"correct": 28_261, "total": 50_000}


def test_alexnet_has_exactly_100() -> None:
    assert mce(ALEXNET) == 100.0
    assert mce(ALEXNET, relative=True) == 100.0
    assert set(corruption_errors(ALEXNET).values()) == {100.0}
    assert set(corruption_errors(ALEXNET, relative=True).values()) == {100.0}
    assert severity_mce(ALEXNET) == {1: 100.0, 2: 100.0, 3: 100.0, 4: 100.0, 5: 100.0}


def test_a_model_that_is_always_wrong_and_one_that_is_always_right() -> None:
    wrong = changed(correct=0)
    assert mce(wrong) == pytest.approx(100 * sum(1 / average for average in AVERAGES.values()) / 15, abs=1e-4)
    assert mce(changed(correct=50_000)) == 0.0


def two(rows: dict[str, list[int]], clean: int) -> CorruptionCounts:
    """Wrong answers of 1000 at severities 1, 2 ..."""
    return {
        "clean": {"correct": 1000 - clean, "total": 1000},
        "corruptions": {
            name: {str(s): {"correct": 1000 - wrong, "total": 1000} for s, wrong in enumerate(row, 1)}
            for name, row in rows.items()
        },
    }


def test_ratio_of_sums_by_hand_with_a_given_baseline() -> None:
    own, base = two({"fog": [100, 300], "snow": [300, 300]}, 50), two({"fog": [200, 800], "snow": [500, 700]}, 100)
    names = ("fog", "snow")
    assert corruption_errors(own, base) == {"fog": 40.0, "snow": 50.0}  # the mean of ratios would be 43.75 for fog
    assert mce(own, base, names=names) == 45.0
    assert corruption_errors(own, base, relative=True) == {"fog": 37.5, "snow": 50.0}
    assert mce(own, base, relative=True, names=names) == 43.75
    assert severity_mce(own, base, names) == {1: 55.0, 2: pytest.approx((300 / 8 + 300 / 7) / 2)}


def test_the_number_of_images_may_differ_from_the_baselines() -> None:
    """The 5,000 images of RobustBench are divided by AlexNet's errors on all."""
    tenth = changed()
    for cell in (count for row in tenth["corruptions"].values() for count in row.values()):
        cell["correct"], cell["total"] = cell["correct"] // 10, 5000
    assert mce(tenth) == pytest.approx(100, abs=0.02)


def test_extra_corruptions_never_count_and_categories_are_means() -> None:
    scores = changed()
    for name in EXTRA:
        for cell in scores["corruptions"][name].values():
            cell["correct"] = 0
    assert mce(scores) == 100.0
    for cell in scores["corruptions"]["fog"].values():
        cell["correct"] = 0
    by_category = {category: mce(scores, names=names) for category, names in CATEGORIES.items()}
    assert by_category["weather"] == pytest.approx((300 + 100 / AVERAGES["fog"]) / 4)
    assert mce(scores) == pytest.approx(sum(by_category[c] * len(names) for c, names in CATEGORIES.items()) / 15)


def test_missing_counts_are_an_error_not_a_mean_over_the_rest() -> None:
    scores = changed()
    del scores["corruptions"]["fog"]["3"]
    with pytest.raises(ValueError, match="fog: measured at severities 1, 2, 4, 5"):
        mce(scores)
    del scores["corruptions"]["fog"]
    with pytest.raises(ValueError, match="fog: measured at severities none"):
        mce(scores)
    with pytest.raises(ValueError, match="no image"):
        mce(changed(correct=0, total=0))
    with pytest.raises(ValueError, match="no worse than on clean"):
        mce(ALEXNET, two({name: [0] * 5 for name in CORRUPTIONS}, 10), relative=True)
    with pytest.raises(ValueError, match="without an error"):
        mce(ALEXNET, two({name: [0] * 5 for name in CORRUPTIONS}, 10))
