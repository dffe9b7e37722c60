"""Many groups: a row each, with differences at the same seed, and a page without a line for each of them."""

from pathlib import Path

import pytest
from evaluations import DAT, PLAIN, evaluation, trainings
from pages import Page

from mae_dat.robustness.report.comparison import ablation_tables, difference_text, value_text
from mae_dat.robustness.report.findings import ablation_findings
from mae_dat.robustness.report.measurements import corruption_counts
from mae_dat.robustness.report.summarize import MAX_COLUMNS, summarize
from mae_dat.robustness.report.tables import mean_text, words_tables_by_group
from mae_dat.robustness.report.write import write_report
from mae_dat.robustness.scores.accuracy import category_errors, top1_accuracy
from mae_dat.robustness.scores.results import Results, write_results

ARMS = {"plain": PLAIN, "random": (701, 719, 712), "dat": DAT, "symbolic": (650, 661, 668), "augmix": (740, 700, 720)}


@pytest.fixture
def results() -> Results:
    """Five arms of three seeds on clean and corrupted pictures and changed words."""
    given = trainings(**ARMS)
    suites = ("imagenet", "generated", "words-random", "cue-conflict")
    other = trainings_on(given, suites)
    for number, run in enumerate(other["training"]["runs"].values()):
        run["cpu_seconds"] = 60.0 * (1 + number)
    return other


def trainings_on(given: Results, suites: tuple[str, ...]) -> Results:
    """The same trainings, measured on suites of which each network knows a little more than the one before."""
    found = evaluation(list(given["models"]), suites)
    for name in found["models"]:
        found["cells"][name]["imagenet"][""] = {**given["cells"][name]["imagenet-a"][""]}
    found["training"] = given["training"]
    return found


def test_every_group_has_a_row_of_its_numbers_and_minutes(results: Results) -> None:
    report = summarize(results)
    table, against = ablation_tables(report)
    assert [row[0] for row in table.rows] == ["plain", "random words", "DAT", "symbolic", "augmix"]
    assert table.head[:4] == ("", "clean ↑", "ECE ↓", "corruption error ↓")
    assert table.head[4:8] == ("noise ↓", "blur ↓", "weather ↓", "digital ↓")
    clean = next(metric for metric in report.metrics if metric.key == "imagenet")
    groups = report.groups
    assert [row[1] for row in table.rows] == [value_text(clean, group) for group in groups]
    assert [row[1] for row in against.rows] == [
        difference_text(report, clean, group, groups[0]) for group in groups[1:]
    ]
    assert table.rows[0][-1] == "2.0 ± 1.0"
    assert (1, 1) in against.best, "DAT is better than plain on clean pictures with every seed"
    assert against.rows[1][1].endswith(" better")
    assert against.rows[2][1].endswith(" worse")
    assert not against.rows[3][1].endswith((" better", " worse"))


def test_categories_are_means_of_their_corruptions(results: Results) -> None:
    columns = summarize(results).columns
    for name in results["models"]:
        own = category_errors(corruption_counts(results, name, "generated"))
        assert {kind: columns[kind].values[name].value for kind in own} == own
        mean = columns["corruption error"].values[name].value
        assert min(own.values()) <= mean <= max(own.values())


def test_no_measurement_of_many_models_is_left_out() -> None:
    """Also of checkpoints of which nothing is known but their counts, on every suite and on two of corruptions."""
    given = evaluation([f"network {number}" for number in range(MAX_COLUMNS + 1)])
    for own in given["cells"].values():
        own["cue-conflict"][""]["texture"] = 400  # the fifth would answer more cues than there are
    report = summarize(given)
    shown = {metric.key for metric in report.columns.values()}
    every = {metric.key for metric in report.metrics}
    assert every - shown == {key for key in every if key.endswith("/mce-first")}
    assert {
        "imagenet-a",
        "objnet-113",
        "imagenet-c/mce",
        "imagenet-c/mean",
        "generated/mean",
        "generated/blur",
    } <= shown
    table, _ = ablation_tables(report)
    assert "processor minutes ↓" not in table.head
    assert len(table.head) == 1 + len(report.columns)


def test_better_groups_are_named(results: Results) -> None:
    text = " ".join(ablation_findings(summarize(results)))
    assert "Clean, significantly better than plain: DAT; worse than plain: symbolic." in text
    assert "means over at least 3 seeds" in text


def test_changed_words_have_a_column_for_each_share(results: Results) -> None:
    report = summarize(results)
    (table,) = words_tables_by_group(report)
    assert table.head == ("words changed, up to", "0 %", "1 %", "2 %", "5 %", "10 %", "20 %")
    members = report.groups[2].members.values()
    expected = mean_text((top1_accuracy(results["cells"][name]["words-random"]["0.05"]) for name in members), 1)
    assert table.rows[2][0] == "DAT"
    assert table.rows[2][4] == expected


def test_the_page_of_many_groups_has_their_rows_and_no_lines(results: Results, tmp_path: Path) -> None:
    assert summarize(results).groups_are_rows
    assert not summarize(trainings(**dict(list(ARMS.items())[:MAX_COLUMNS]))).groups_are_rows
    write_results(results, tmp_path / "results.json")
    page = Page(write_report(summarize(results), tmp_path).read_text())
    assert ["symbolic", *ablation_tables(summarize(results))[0].rows[3][1:]] in page.rows
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert "arms.png" in drawn
    assert not {"gains.png", "words.png", "1-categories.png"} & drawn
    assert ["augmix", "augmix", "2", "1.5", "15.0"] in page.rows
