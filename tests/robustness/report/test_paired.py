"""Paired comparisons, against scipy, statsmodels' published example, brute force, and simulated data."""

import itertools
import math

import numpy as np
import pytest
from evaluations import evaluation
from image_results import on_one_suite, predicted, record, seeds
from scipy.stats import binomtest, bootstrap, norm

from mae_dat.robustness.report.comparison import headline_table, interval_notes
from mae_dat.robustness.report.differences import ALPHA
from mae_dat.robustness.report.findings import findings
from mae_dat.robustness.report.headline import headline_text
from mae_dat.robustness.report.intervals import WeightedCount, p_value_of_interval
from mae_dat.robustness.report.paired import (
    Comparison,
    ImageScores,
    compare_hits,
    compare_images,
    compare_pair,
    compare_seeds,
    holm,
)
from mae_dat.robustness.report.summarize import summarize


def hits(more: int, less: int, both: int = 0, neither: int = 0) -> tuple[ImageScores, ImageScores]:
    """Two models that agree on `both` and `neither`, and of which each alone has these images right."""
    new = [1.0] * (more + both) + [0.0] * (less + neither)
    old = [0.0] * more + [1.0] * (both + less) + [0.0] * neither
    return ImageScores(np.array(new)), ImageScores(np.array(old))


# ---- one prediction per image ----


@pytest.mark.parametrize(("more", "less"), [(0, 0), (1, 0), (5, 0), (6, 0), (9, 2), (60, 40), (150, 86)])
def test_mcnemars_test_is_exact(more: int, less: int) -> None:
    found = compare_pair(*hits(more, less, both=50, neither=30))
    expected = 1.0
    if more + less:
        weights = [math.comb(more + less, k) for k in range(more + less + 1)]
        expected = sum(weight for weight in weights if weight <= weights[more]) / 2 ** (more + less)
    assert found.p_value == pytest.approx(expected)
    assert (found.ends[0] > 0) <= (found.p_value < 0.05)
    assert found.ends[0] < found.gap < found.ends[1]


def test_the_interval_of_hits_is_the_adjusted_one_or_wider() -> None:
    """Bonett & Price 2012, with Student's quantile of 22 degrees of freedom."""
    found = compare_hits(*hits(7, 1, both=1, neither=12))
    assert found.gap == pytest.approx(6 / 21)
    estimate, error = 6 / 23, math.sqrt((8 + 2 - 36 / 23) / 23**2)
    assert found.ends[1] == pytest.approx(estimate + 2.073873 * error)
    assert found.ends[0] < 0 < found.p_value, "McNemar's exact test does not exclude zero, so the interval does not"


def true_share(skill: float) -> float:
    """The probability that a uniform number plus 0.3 times another one is below `skill`."""
    return float((skill - 0.3 * (np.arange(1000) + 0.5) / 1000).clip(0, 1).mean())


@pytest.mark.parametrize(("images", "gain"), [(10, 0.0), (20, 0.2), (50, 0.1), (200, 0.05), (200, 0.3)])
def test_the_interval_of_hits_covers_the_difference(images: int, gain: float) -> None:
    random, covered, times = np.random.default_rng(images), 0, 500
    truth = true_share(0.75 + gain) - true_share(0.75)
    for _ in range(times):
        hard = random.random(images)  # both models find the same images hard
        new = (hard + 0.3 * random.random(images) < 0.75 + gain).astype(float)
        old = (hard + 0.3 * random.random(images) < 0.75).astype(float)
        found = compare_hits(ImageScores(new), ImageScores(old))
        covered += found.ends[0] <= truth <= found.ends[1]
        assert found.ends[0] < found.ends[1]
    assert covered >= 0.94 * times


# ---- several versions of an image ----


def versions(images: int, cells: int, gain: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictions (cells, images) of two models; versions of one image are about equally hard."""
    random = np.random.default_rng(seed)
    hard = random.normal(size=images) + 0.7 * random.normal(size=(cells, images))
    new = hard + gain + 0.5 * random.normal(size=(cells, images)) > 0
    return new, hard + 0.5 * random.normal(size=(cells, images)) > 0


def mean_of_versions(correct: np.ndarray) -> ImageScores:
    return ImageScores(correct.mean(0), step=1 / len(correct), most=1.0)


@pytest.mark.parametrize("images", [20, 100])
def test_the_bootstrap_covers_the_difference(images: int) -> None:
    gain, times, covered = 0.5, 120, 0
    scale = math.sqrt(1 + 0.7**2 + 0.5**2)
    truth = norm.cdf(gain / scale) - norm.cdf(0)
    for seed in range(times):
        new, old = versions(images, 15, gain, seed)
        found = compare_images(mean_of_versions(new), mean_of_versions(old))
        covered += found.ends[0] <= truth <= found.ends[1]
    assert covered >= 0.92 * times


def test_the_bootstrap_is_that_of_scipy() -> None:
    new, old = (mean_of_versions(correct) for correct in versions(300, 15, 0.2, seed=1))
    found = compare_images(new, old)
    differences = new.scores - old.scores
    expected = bootstrap(
        (differences,), np.mean, n_resamples=5000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    width = expected.high - expected.low
    assert found.gap == pytest.approx(differences.mean())
    assert found.ends == pytest.approx((expected.low, expected.high), abs=0.08 * width)
    assert found == compare_images(new, old), "the same every time"


def test_resampling_is_that_of_brute_force_for_ratios() -> None:
    """Shape bias: correct by shape, of those with a prediction of either cue."""
    random = np.random.default_rng(0)
    scores = []
    for share in (0.6, 0.4):
        either = random.random(200) < 0.7
        shape = (either & (random.random(200) < share)).astype(float)
        scores.append(ImageScores(shape, either.astype(float)))
    found = compare_images(*scores)
    drawn = []
    for _ in range(4000):
        index = random.integers(200, size=200)
        values = [one.scores[index].sum() / one.weights[index].sum() for one in scores]  # type: ignore[index]
        drawn.append(values[0] - values[1])
    low, high = np.quantile(drawn, (0.025, 0.975))
    assert found.ends == pytest.approx((low, high), abs=0.1 * (high - low))
    assert found.gap == pytest.approx(scores[0].value - scores[1].value)


def test_corruptions_given_twice_do_not_narrow_the_interval() -> None:
    new, old = versions(60, 15, 0.3, seed=2)
    once = compare_images(mean_of_versions(new), mean_of_versions(old))
    twice = compare_images(mean_of_versions(np.tile(new, (2, 1))), mean_of_versions(np.tile(old, (2, 1))))
    assert twice.gap == pytest.approx(once.gap)
    assert twice.ends == pytest.approx(once.ends, abs=1e-3)
    images = compare_images(*(mean_of_versions(np.tile(correct, (1, 4))) for correct in (new, old)))
    assert images.ends[1] - images.ends[0] < 0.6 * (once.ends[1] - once.ends[0]), "four times as many images do"


def test_models_that_agree_on_every_image_have_an_interval_nevertheless() -> None:
    new, _ = versions(10, 15, 0.0, seed=3)
    for found in (compare_pair(mean_of_versions(new), mean_of_versions(new)), compare_pair(*hits(0, 0, 5, 5))):
        assert found.ends[0] < 0 < found.ends[1]
        assert found.p_value > 0.5
    # Many versions of an image say no more about other images than one.
    assert compare_pair(mean_of_versions(new), mean_of_versions(new)).ends == compare_pair(*hits(0, 0, 5, 5)).ends


# ---- seeds ----


def test_a_difference_that_all_seeds_share_is_not_certain() -> None:
    """One image per seed: "+1.4 +- 0.0 better" before."""
    random = np.random.default_rng(0)
    old = [random.random(70) < 0.5 for _ in range(3)]
    new = [bits.copy() for bits in old]
    for bits in new:
        bits[np.flatnonzero(~bits)[0]] = True
    pairs = [(ImageScores(a.astype(float)), ImageScores(b.astype(float))) for a, b in zip(new, old, strict=True)]
    found = compare_seeds([1 / 70] * 3, pairs)
    assert found is not None
    assert found.ends[0] < 0 < found.ends[1]
    assert found.p_value > 0.05
    assert compare_seeds([1.0, 1.0, 1.0], []) is None, "without images there is no interval at all"
    results = on_one_suite(**{f"{arm} {i}": bits for arm, of in (("a", old), ("b", new)) for i, bits in enumerate(of)})
    seeds(results, a=["a 0", "a 1", "a 2"], b=["b 0", "b 1", "b 2"])
    text = headline_table(summarize(results)).rows[0][3]
    assert text.startswith("+1.4 [−")
    assert text.endswith("]")


def test_the_interval_over_seeds_and_images_covers_the_difference() -> None:
    """Trainings that scatter, on images that both find hard; each draw has new seeds and new images."""
    gain, times, covered, images = 0.3, 400, 0, 100
    random = np.random.default_rng(0)
    scatter, noise = 0.15, 0.5
    truth = norm.cdf(gain / math.sqrt(1 + noise**2 + scatter**2)) - 0.5
    for _ in range(times):
        hard, pairs = random.normal(size=images), []
        for _ in range(3):
            new = hard + gain + scatter * random.normal() + noise * random.normal(size=images) > 0
            old = hard + scatter * random.normal() + noise * random.normal(size=images) > 0
            pairs.append((ImageScores(new.astype(float)), ImageScores(old.astype(float))))
        found = compare_seeds([new.value - old.value for new, old in pairs], pairs)
        assert found is not None
        covered += found.ends[0] <= truth <= found.ends[1]
    assert covered >= 0.93 * times


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_than_three_seeds_give_no_verdict(count: int) -> None:
    random = np.random.default_rng(0)
    arms = {"plain": 0.3, "dat": 0.9}
    runs = {f"{arm} {seed}": random.random(500) < share for arm, share in arms.items() for seed in range(count)}
    results = seeds(on_one_suite(**runs), **{arm: [f"{arm} {seed}" for seed in range(count)] for arm in arms})
    report = summarize(results)
    table = headline_table(report)
    assert table.rows[0][3].endswith("] better") == (count == 3)
    assert bool(table.best) == (count == 3)
    assert ("no verdict" in " ".join(findings(report))) == (count < 3)
    assert any("fewer than 3 seeds get no verdict" in note for note in table.notes)


# ---- several suites ----


def test_holm_is_that_of_the_definition() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.9, 0.9]) == [1.0, 1.0]
    random = np.random.default_rng(0)
    for p_values in random.random((20, 5)) ** 2:
        for level in (0.01, 0.05, 0.2):
            rejected = set()
            for rank, position in enumerate(np.argsort(p_values)):
                if p_values[position] > level / (5 - rank):
                    break
                rejected.add(position)
            assert {i for i, p in enumerate(holm(p_values.tolist())) if p <= level} == rejected


def test_verdicts_are_corrected_for_the_number_of_suites() -> None:
    """8 images against none have p = 0.008: enough for six suites, not for seven."""
    suites = ("imagenet", "imagenet-v2", "imagenet-a", "imagenet-r", "objnet-113", "pgd-5-1/255", "words-random")
    new, old = (scores.scores > 0 for scores in hits(8, 0, both=100, neither=100))
    assert binomtest(8, 8).pvalue == pytest.approx(0.0078125)
    for count in (6, 7):
        results = evaluation(("plain", "dat"), suites[:count])
        for suite in suites[:count]:
            for cell in list(results["cells"]["plain"][suite]):
                record(results, "plain", suite, cell, old)
                record(results, "dat", suite, cell, new if suite == "imagenet-a" else old)
        report = summarize(results)
        rows = {row[0]: row for row in headline_table(report).rows}
        assert rows["ImageNet-A (%) ↑"][3].endswith(" better") == (count == 6)
        assert f"(here up to {count})" in " ".join(interval_notes(report))
        assert (f"better on 1 of {count} suites" in findings(report)[0]) == (count == 6)


def test_all_metrics_of_corruptions_are_compared_per_image() -> None:
    """Also the mCE and the categories; a clean cell of other images gives no relative mCE per image."""
    results = evaluation(("plain", "dat"), ("imagenet", "imagenet-c", "cue-conflict"))
    random = np.random.default_rng(0)
    hard = random.random(100)
    for model, skill in (("plain", 0.5), ("dat", 0.55)):
        for suite in ("imagenet", "imagenet-c"):
            for cell in list(results["cells"][model][suite]):
                record(results, model, suite, cell, hard + 0.1 * random.random(100) < skill)
    report = summarize(results)
    plain, dat = report.groups
    found = {
        metric.key: report.difference(metric, dat, plain) for metric in [*report.metrics, *report.columns.values()]
    }
    for key in ("imagenet", "imagenet-c/mce", "imagenet-c/rmce", "imagenet-c/mean", "imagenet-c/blur"):
        difference = found[key]
        assert difference is not None
        assert difference.paired, key
        assert difference.ends is not None
        assert difference.ends[0] < difference.gap < difference.ends[1], key
    mean = next(metric for metric in report.metrics if metric.key == "imagenet-c/mean")
    for value in mean.values.values():
        assert value.scores is not None
        assert 100 + value.scores.value == pytest.approx(value.value)
    for cell in results["images"]["dat"]["imagenet-c"].values():
        cell["order"] = "b"
    assert not any(
        difference.paired
        for (metric, new, _), difference in summarize(results).differences.items()
        if metric.key == "imagenet-c/rmce"
    )
    results["images"]["plain"]["imagenet"][""]["correct"] = "damaged"
    assert "Newcombe" in " ".join(headline_table(summarize(results)).notes)


def test_a_p_value_of_counts_belongs_to_their_interval() -> None:
    new, old = ({"correct": correct, "total": 1000} for correct in (739, 700))
    terms = [(WeightedCount(100.0, count),) for count in (new, old)]  # type: ignore[arg-type]
    p_value = p_value_of_interval(*terms)
    pooled = 0.7195 * 0.2805 * 2 / 1000
    assert p_value == pytest.approx(2 * norm.sf(0.039 / math.sqrt(pooled)), abs=2e-3)
    assert p_value_of_interval((), ()) is None
    assert p_value_of_interval(terms[0], terms[0]) == 1.0


# ---- collapsed models ----


def test_a_collapsed_model_is_called_so_and_never_better() -> None:
    labels = np.repeat(np.arange(4), [90, 50, 30, 30])
    random = np.random.default_rng(0)
    wrong = np.where(random.random(200) < 0.35, labels, (labels + 1) % 4)
    results = evaluation(("plain", "dat"), ("imagenet", "imagenet-a"))
    for suite in ("imagenet", "imagenet-a"):
        predicted(results, "plain", suite, labels, wrong)
        predicted(results, "dat", suite, labels, np.zeros(200, dtype=np.int64))
    assert results["collapsed"] == {"dat": {"suite": "imagenet", "name": "cat", "percent": 100.0}}
    report = summarize(results)
    table = headline_table(report)
    assert table.head[2] == "MAE + DAT (collapsed)"
    assert table.rows[0][0] == "ImageNet (%) ↑ (chance 25.0, most common class 45.0)"
    assert table.rows[0][1:3] == (f"{100 * (labels == wrong).mean():.1f}", "45.0")
    plain, dat = report.groups
    difference = report.difference(report.metrics[0], dat, plain)
    assert difference is not None
    assert difference.p_value is not None
    assert not any(text.endswith((" better", " worse")) for row in table.rows for text in row)
    assert not table.best
    warning = "MAE + DAT (collapsed) predicts cat for 100.0 % of the images of imagenet"
    assert warning in findings(report)[0]
    assert warning in headline_text(report)
    results["models"] = dict(reversed(results["models"].items()))
    assert not any(text.endswith(" worse") for row in headline_table(summarize(results)).rows for text in row)
    predicted(results, "dat", "imagenet", labels, wrong[::-1].copy())
    assert not summarize(results).collapsed


def test_the_level_is_five_percent() -> None:
    assert ALPHA == 0.05
    assert isinstance(compare_pair(*hits(1, 2, 3, 4)), Comparison)
    assert all(a <= b for a, b in itertools.pairwise(sorted(holm([0.3, 0.2, 0.1]))))
