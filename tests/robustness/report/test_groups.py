"""Groups of trainings with several seeds: means, deviations, and differences of the same seed."""

import dataclasses
import statistics
from pathlib import Path

import pytest
from evaluations import DAT, PLAIN, evaluation, trainings
from pages import Page, require_self_contained
from PIL import Image

from mae_dat.robustness.report.comparison import headline_table, pairs_table
from mae_dat.robustness.report.differences import best_group
from mae_dat.robustness.report.findings import cautions, findings
from mae_dat.robustness.report.groups import groups_of, same_seed_pair
from mae_dat.robustness.report.render import latex_table, markdown_table
from mae_dat.robustness.report.summarize import summarize
from mae_dat.robustness.report.write import write_report
from mae_dat.robustness.scores.results import read_results, write_results


def test_seeds_share_a_column_as_mean_and_deviation() -> None:
    table = headline_table(summarize(trainings(plain=PLAIN, dat=DAT)))
    assert table.head == ("", "plain", "DAT", "DAT − plain at the same seed [95 %]")
    assert table.rows[0][1:] == (
        "71.0 ± 1.0",
        f"{statistics.fmean(DAT) / 10:.1f} ± {statistics.stdev(DAT) / 10:.1f}",
        "+3.9 [+2.7, +5.2] better",
    )
    assert table.best == {(0, 2)}
    assert "**74.9 ± 0.9**" in markdown_table(table)
    assert r"\textbf{74.9 $\pm$ 0.9}" in latex_table(table)


def test_pairs_have_the_same_seed_in_any_order() -> None:
    results = trainings(plain=PLAIN, dat=DAT)
    order = ["dat 2", "dat 0", "plain 1", "dat 1", "plain 2", "plain 0"]
    results["models"] = {name: results["models"][name] for name in order}
    report = summarize(results)
    dat, plain = report.groups
    found = report.difference(report.metrics[0], dat, plain)
    assert found is not None
    gap, seeds = statistics.fmean((4.1, 3.9, 3.8)), statistics.variance((4.1, 3.9, 3.8)) / 3
    assert found.gap == pytest.approx(gap)
    # These results have no predictions for each image: the least variance that 39 more of 1,000 images allow.
    images = 100**2 * (gap / 100 * (1 - gap / 100) / 1000 + 2 / 1000**2)
    half = 1.9628 * (seeds + images) ** 0.5  # Student, about 770 degrees of freedom
    assert found.ends == pytest.approx((gap - half, gap + half), rel=1e-3)
    assert not found.paired


def test_examples_have_the_same_seed() -> None:
    results = trainings(plain=PLAIN, random=(705,), dat=DAT)
    assert same_seed_pair(groups_of(results)) == ("plain 0", "dat 0")
    del results["models"]["dat 0"]  # its network gives no gradient, say
    assert same_seed_pair(groups_of(results)) == ("plain 1", "dat 1")
    for name in ("plain 1", "plain 2"):
        del results["models"][name]
    assert same_seed_pair(groups_of(results)) == ("plain 0", "dat 1")
    assert same_seed_pair(groups_of(evaluation(("one", "other", "third")))) == ("one", "third")
    assert same_seed_pair(groups_of(evaluation(("alone",)))) is None
    assert same_seed_pair(groups_of(trainings(plain=PLAIN))) is None


def test_differences_within_the_spread_are_neither_better_nor_best() -> None:
    results = trainings(plain=PLAIN, dat=(700, 780, 740))
    table = headline_table(summarize(results))
    assert table.rows[0][3] == "+3.0 [−3.6, +9.6]"
    assert not table.best
    assert "no significant difference on its only suite" in " ".join(findings(summarize(results)))
    three = trainings(plain=PLAIN, random=tuple(one + 1 for one in DAT), dat=DAT)
    report = summarize(three)
    assert not headline_table(report).best or headline_table(report).best == {(0, 2)}
    plain, random, dat = report.groups
    metric = report.metrics[0]
    assert best_group(metric, [plain, dat], report.differences) is dat
    assert best_group(metric, [dat], report.differences) is None
    assert best_group(metric, [plain, dataclasses.replace(plain, title="twin")], report.differences) is None
    pairs = pairs_table(report)
    assert pairs is not None
    assert pairs.head == ("", "DAT − random words")
    assert pairs.rows[0][1].startswith("−0.1 [−")
    assert not pairs.rows[0][1].endswith("worse"), "one image in each seed"
    assert random.style == 1


def test_the_limits_of_the_numbers_are_reported() -> None:
    one, two = trainings(plain=(700,), dat=(900,)), trainings(plain=PLAIN, dat=DAT)
    assert "One seed" in " ".join(cautions(summarize(one)))
    assert headline_table(summarize(one)).rows[0][3] == "+20.0 [+16.6, +23.4]", "no verdict from one seed"
    assert "no verdict, which takes at least 3 seeds" in " ".join(findings(summarize(one)))
    assert "means over at least 3 seeds" in " ".join(findings(summarize(two)))
    assert "DAT 3.75 ± 0.00 %" in " ".join(findings(summarize(two)))
    for run in two["training"]["runs"].values():
        if "changed_words" in run["curves"]:
            run["curves"]["changed_words"] = [[1, 0.0]]
    assert "Where none was changed (DAT)" in " ".join(cautions(summarize(two)))
    assert not cautions(summarize(evaluation()))


def test_the_page_holds_curves_runs_settings_and_galleries(tmp_path: Path) -> None:
    results = trainings(plain=PLAIN, dat=DAT)
    Image.new("RGB", (8, 8)).save(tmp_path / "words.png")
    Image.new("RGB", (8, 8)).save(tmp_path.parent / "secret.png")
    shown = ("words.png", "../secret.png", "gone.png")
    results["training"]["galleries"] = [
        {"title": f"of {one}", "caption": "clean, changed", "file": one} for one in shown
    ]
    write_results(results, tmp_path / "results.json")
    text = write_report(summarize(read_results(tmp_path / "results.json")), tmp_path).read_text()
    require_self_contained(text)
    page = Page(text)
    assert ["DAT", "dat", "2", "1.5", "–"] in page.rows
    assert ["epochs", "2"] in page.rows
    assert text.count("This image is missing") == 2
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"pretraining-train-loss.png", "fine-tuning-train-loss.png", "fine-tuning-changed-words.png"} <= drawn
    assert "scatter between training runs" not in page.text
