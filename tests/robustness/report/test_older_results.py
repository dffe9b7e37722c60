"""Reports of results that an older release wrote, without predictions for each image."""

import pytest
from evaluations import evaluation
from image_results import seeds

from mae_dat.robustness.report.summarize import ReportData, summarize
from mae_dat.robustness.scores.results import Results


def older(names: list[str]) -> Results:
    return evaluation(names, ("imagenet", "generated"))


def values(report: ReportData, key: str) -> dict[str, float]:
    return {
        model: value.value for metric in report.metrics if metric.key == key for model, value in metric.values.items()
    }


def test_calibration_that_may_be_of_probabilities_is_left_out() -> None:
    """An older release gave 73.8 % where 10.6 % is right, for ONNX files and callables alone."""
    results = older(["plain", "dat"])
    results["models"]["dat"]["normalization"] = "inside"
    report = summarize(results)
    assert values(report, "imagenet/ece") == {"plain": pytest.approx(4.3)}
    assert "imagenet" not in report.calibration["dat"]
    correct = "00"
    results["images"] = {"dat": {"imagenet": {"": {"order": "a", "correct": correct}}}}
    assert values(summarize(results), "imagenet/ece")["dat"] == pytest.approx(100 * 0.043 * 0.94)


def test_the_mce_of_the_first_group_is_of_counts_alone() -> None:
    results = older(["plain", "dat"])
    for cells in (results["cells"]["plain"]["generated"], results["cells"]["dat"]["generated"]):
        for cell in cells.values():
            cell |= {"correct": 600, "total": 1000}
    for cell in results["cells"]["dat"]["generated"].values():
        cell["correct"] = 700
    assert values(summarize(results), "generated/mce-first") == {"plain": 100, "dat": 75}
    del results["cells"]["plain"]["generated"]["fog/3"]
    assert values(summarize(results), "generated/mce-first").get("dat") is None


def test_seeds_alone_give_no_verdict_on_calibration_and_the_mce_of_the_first_group() -> None:
    """Their scatter between images is unknown, and three seeds that happen to agree prove nothing."""
    names = [f"{arm}{seed}" for arm in ("plain", "dat") for seed in range(3)]
    results = seeds(older(names), plain=names[:3], dat=names[3:])
    for name, calibration in results["calibration"].items():
        calibration["imagenet"]["ece"] = 0.05 if name.startswith("plain") else 0.04 + 1e-4 * int(name[-1])
    report = summarize(results)
    plain, dat = report.groups
    for key in ("imagenet/ece", "generated/mce-first"):
        (metric,) = (metric for metric in report.metrics if metric.key == key)
        difference = report.differences[metric, dat, plain]
        assert difference.gap < 0
        assert (difference.ends, difference.p_value, difference.verdict) == (None, None, None)
        assert metric not in report.best
