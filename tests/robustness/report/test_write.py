"""The report of an evaluation: the same numbers in every format, from counts alone, and nothing beside what it is not
comparable with."""

import csv
import functools
import html
import io
import re
import statistics
import tempfile
from pathlib import Path

import numpy as np
import pytest
from evaluations import SUITES, alexnet, evaluation
from pages import Page, phone_widths, require_self_contained, without_scripts
from PIL import Image
from tiny_runs import verb

from mae_dat.config.parse import run_command
from mae_dat.config.protocols import ProtocolName
from mae_dat.robustness.corruptions import CATEGORIES, CORRUPTIONS
from mae_dat.robustness.report.comparison import headline_table
from mae_dat.robustness.report.corruption_table import corruption_table
from mae_dat.robustness.report.findings import comparison_findings
from mae_dat.robustness.report.intervals import WeightedCount, interval, share_difference, wilson
from mae_dat.robustness.report.measurements import corruption_counts
from mae_dat.robustness.report.metrics import Metric, attack_check_failed
from mae_dat.robustness.report.published import PUBLISHED_COLUMNS, published_rows, published_tables
from mae_dat.robustness.report.render import counts_csv, latex_table, latex_text, markdown_table
from mae_dat.robustness.report.summarize import summarize
from mae_dat.robustness.report.tables import Table, checks_table, not_measured, words_table
from mae_dat.robustness.report.write import write_report
from mae_dat.robustness.scores.accuracy import Count
from mae_dat.robustness.scores.corruption_error import ALEXNET, corruption_errors
from mae_dat.robustness.scores.results import Results, write_results

HOSTILE = "<script>alert('x')</script> & \"$\\alpha$\" ../.. a_b^c~d # 5% | [x] {y} `z`"


@functools.cache
def files() -> dict[str, str]:
    """The report of two networks, made once for all tests that only read it: name -> text, figures by name alone."""
    with tempfile.TemporaryDirectory() as folder:
        write_report(summarize(evaluation()), Path(folder))
        figures = {path.name: "" for path in Path(folder).rglob("*.png")}
        return {path.name: path.read_text() for path in Path(folder).glob("report.*")} | figures


def rows_by_title(table: Table | None) -> dict[str, tuple[str, ...]]:
    """The rows by their first cell."""
    assert table is not None
    return {row[0]: row[1:] for row in table.rows}


def metric_of(results: Results, key: str) -> Metric:
    return next(one for one in summarize(results).metrics if one.key == key)


def share(count: Count) -> float:
    return count["correct"] / count["total"]


# ---- the numbers ----


def test_headline_numbers_are_those_of_the_counts() -> None:
    results = evaluation()
    rows = rows_by_title(headline_table(summarize(results)))
    for column, model in enumerate(("plain", "dat")):
        own = results["cells"][model]
        errors = {n: [1 - share(own["imagenet-c"][f"{n}/{s}"]) for s in range(1, 6)] for n in CORRUPTIONS}
        base = {n: [1 - share(count) for count in ALEXNET["corruptions"][n].values()] for n in CORRUPTIONS}
        clean, least = 1 - share(own["imagenet"][""]), 0.43478
        mce = statistics.fmean(sum(errors[n]) / sum(base[n]) for n in CORRUPTIONS)
        relative = statistics.fmean((sum(errors[n]) - 5 * clean) / (sum(base[n]) - 5 * least) for n in CORRUPTIONS)
        cue = own["cue-conflict"][""]
        expected = {
            "ImageNet (%) ↑": f"{100 - 100 * clean:.2f}",
            "ImageNet: calibration error, ECE (%) ↓": f"{100 * results['calibration'][model]['imagenet']['ece']:.1f}",
            "ImageNet-A (%) ↑": f"{100 * share(own['imagenet-a']['']):.2f}",
            "ImageNet-C: mCE ↓": f"{100 * mce:.2f}",
            "ImageNet-C: relative mCE ↓": f"{100 * relative:.2f}",
            "ImageNet-C: mean corruption error (%) ↓": f"{100 * np.mean(list(errors.values())):.2f}",
            "Cue conflict: shape bias (0–1) ↑": f"{cue['shape'] / (cue['shape'] + cue['texture']):.3f}",
            "Cue conflict: coverage (%)": f"{100 * (cue['shape'] + cue['texture']) / cue['total']:.1f}",
            "symbolic adversary, 5 % of the words (%) ↑": f"{100 * share(own['words-symbolic']['0.05']):.1f}",
        }
        assert {title: rows[title][column] for title in expected} == expected


def test_alexnet_counts_give_exactly_100_in_every_format(tmp_path: Path) -> None:
    write_report(summarize(alexnet()), tmp_path)
    assert rows_by_title(headline_table(summarize(alexnet())))["ImageNet-C: relative mCE ↓"] == ("100.00",)
    for name, row in (
        ("report.md", "| ImageNet-C: mCE ↓ | 100.00 |"),
        ("report.tex", r"ImageNet-C: mCE $\downarrow$ & 100.00 \\"),
    ):
        assert row in (tmp_path / name).read_text()
    rows = Page((tmp_path / "report.html").read_text()).rows
    assert ["ImageNet-C: mCE ↓", "100.00"] in rows
    assert ["fog", "weather", "81.9", "100.0", "100.0"] in rows
    assert ["mean", "", "78.9", "100.0", "100.0"] in rows


def test_all_formats_show_the_same_rows() -> None:
    results, page = evaluation(), Page(files()["report.html"])
    for table in (
        headline_table(summarize(results)),
        *published_tables(summarize(results)),
        words_table(summarize(results)),
        checks_table(summarize(results)),
    ):
        assert table is not None
        markdown = markdown_table(table)
        assert markdown in files()["report.md"]
        assert latex_table(table) in files()["report.tex"]
        lines = [line for line in markdown.splitlines() if line.startswith("| ")][1:]
        cells = [
            tuple(html.unescape(cell.strip(" *").replace("\\", "")) for cell in line.strip("|").split(" | "))
            for line in lines
        ]
        assert cells == list(table.rows)
        assert all(list(row) in page.rows for row in table.rows)


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "'=1"])
def test_no_cell_of_the_csv_is_a_formula(name: str) -> None:
    results = evaluation(("plain",), ("imagenet",))
    results["models"]["plain"]["title"] = results["models"]["plain"]["interpolation"] = name
    content = counts_csv(summarize(results)).encode()
    cell = f"'{name}".encode()
    assert (b'"' + cell + b'"' if b"\r" in cell else cell) in content
    rows = list(csv.reader(io.StringIO(content.decode(), newline="")))
    assert not [text for row in rows for text in row if text.startswith(("=", "+", "-", "@", "\t", "\r"))]


def test_the_csv_reads_back_to_the_same_counts() -> None:
    results = evaluation()
    rows = list(csv.DictReader(io.StringIO(files()["report.csv"])))
    assert len(rows) == sum(len(cells) for own in results["cells"].values() for cells in own.values())
    for row in rows:
        count = results["cells"][row["model"]][row["suite"]][row["cell"]]
        assert {key: int(row[key]) for key in count} == count
        assert row["weights_sha256"] == results["models"][row["model"]]["sha256"]
        assert row["official"] == str(row["suite"] != "generated")
    fog = next(row for row in rows if row["cell"] == "fog/3")
    assert (fog["corruption"], fog["severity"]) == ("fog", "3")


def test_a_corruption_table_has_every_mean() -> None:
    results = evaluation()
    table = corruption_table(next(one for one in summarize(results).measurements if one.suite == "imagenet-c"))
    rows, cells = rows_by_title(table), results["cells"]["dat"]["imagenet-c"]
    errors = {(n, s): 100 - 100 * share(cells[f"{n}/{s}"]) for n in CORRUPTIONS for s in range(1, 6)}
    means = {n: statistics.fmean(errors[n, s] for s in range(1, 6)) for n in CORRUPTIONS}
    assert rows["glass blur"][2] == f"{means['glass_blur']:.1f}"
    assert rows["mean of blur"][2] == f"{statistics.fmean(means[n] for n in CATEGORIES['blur']):.1f}"
    assert rows["severity 4"][2] == f"{statistics.fmean(errors[n, 4] for n in CORRUPTIONS):.1f}"
    assert rows["mean"][2] == f"{statistics.fmean(means.values()):.1f}"
    assert rows["mean"][4] == f"{metric_of(results, 'imagenet-c/mce').values['dat'].value:.1f}"
    assert rows["mean"][6] == f"{metric_of(results, 'imagenet-c/rmce').values['dat'].value:.1f}"
    scores = corruption_counts(results, "dat", "imagenet-c")
    relative = corruption_errors(scores, relative=True)
    assert rows["glass blur"][6] == f"{relative['glass_blur']:.1f}"
    assert rows["mean of blur"][6] == f"{statistics.fmean(relative[n] for n in CATEGORIES['blur']):.1f}"
    assert [title.rpartition(", ")[2] for title in table.head[2:]] == ["error %"] * 2 + ["CE"] * 2 + ["relative CE"] * 2
    assert rows["severity 4"][5:] == ("–", "–")
    assert rows["saturate"][0] == "held out"
    assert {table.rows[i][0] for i in table.breaks} == {
        *("defocus blur", "snow", "contrast", "speckle noise", "mean of noise", "severity 1", "mean")
    }


# ---- how sure ----


def test_intervals_are_those_of_the_literature() -> None:
    low, high = wilson({"correct": 81, "total": 263})  # Newcombe 1998, Statistics in Medicine 17, 857: method 3
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    low, high = share_difference({"correct": 56, "total": 70}, {"correct": 48, "total": 80})  # the same, 873: method 10
    assert (round(low, 4), round(high, 4)) == (0.0524, 0.3339)


def test_the_terms_of_every_metric_add_up_to_its_differences() -> None:
    results = evaluation()
    checked = set()
    for one in summarize(results).metrics:
        new, old = one.values["dat"], one.values["plain"]
        ends = interval(new.terms, old.terms)
        if ends is not None:
            new_terms = (term.weight * share(term.count) for term in new.terms)
            base = (term.weight * share(term.count) for term in old.terms)
            assert sum(new_terms) - sum(base) == pytest.approx(new.value - old.value, abs=1e-9)
            assert ends[0] < new.value - old.value < ends[1]
            checked.add(one.key)
    assert {"imagenet", "imagenet-c/mce", "imagenet-c/rmce", "generated/mean", "cue-conflict/bias"} < checked


def test_only_differences_beyond_chance_are_called_better_or_worse() -> None:
    def gap(correct: int, doubtful: bool = False) -> str:
        counts: tuple[Count, Count] = {"correct": 700, "total": 1000}, {"correct": correct, "total": 1000}
        results = evaluation(("plain", "dat"), ("pgd-5-1/255",))
        for model, count in zip(("plain", "dat"), counts, strict=True):
            results["cells"][model]["pgd-5-1/255"][""] = {**count}
        results["checks"]["dat"]["pgd-5-1/255"][0]["passed"] = not doubtful
        return headline_table(summarize(results)).rows[0][3]

    assert gap(750).startswith("+5.0 [+1.1, +8.9] better")
    assert gap(650).endswith(" worse")
    assert gap(720) == "+2.0 [−2.0, +6.0]"
    assert gap(700).startswith("0.0 [")
    assert gap(750, doubtful=True) == "+5.0 [+1.1, +8.9]"  # a broken attack proves nothing
    assert interval((), ()) is None
    nothing: Count = {"correct": 0, "total": 0}
    assert interval((WeightedCount(1.0, nothing),), (WeightedCount(1.0, nothing),)) is None


def test_the_summary_counts_a_suite_once() -> None:
    results = evaluation(("plain", "dat"), ("imagenet", "imagenet-c"))
    report = summarize(results)
    plain, dat = report.groups
    assert [one.key for one in report.verdicts(dat, plain)] == ["imagenet", "imagenet-c/mce"]
    text = " ".join(comparison_findings(summarize(results)))
    assert "MAE + DAT vs. MAE, fine-tuned plainly: better on 2 of 2 suites (ImageNet, ImageNet-C)" in text
    backwards = evaluation(("plain", "dat"), ("imagenet",))
    backwards["models"] = dict(reversed(backwards["models"].items()))
    assert "worse on 1 of 1 suite (ImageNet)" in " ".join(comparison_findings(summarize(backwards)))


# ---- what may stand beside what ----


def test_models_of_different_sizes_are_compared_on_the_same_images() -> None:
    results = evaluation()
    usual = rows_by_title(headline_table(summarize(results)))["ImageNet-C: mCE ↓"]
    results["models"]["dat"]["size"] = [448, 448]
    rows = rows_by_title(headline_table(summarize(results)))
    assert rows["ImageNet-C, 224 and 448 px, each at its own size: mCE ↓"] == usual
    assert not any("–" in row for title, row in rows.items() if "ImageNet" in title)
    assert "shares no measurement" not in " ".join(comparison_findings(summarize(results)))
    assert [row[1] for row in published_tables(summarize(results))[0].rows[:2]] == ["224", "448"]


@pytest.mark.parametrize("fault", ["missing", "fingerprint", "subset", "total"])
def test_other_images_give_another_row(fault: str) -> None:
    results = evaluation(("plain", "dat"), ("imagenet-a",))
    own = results["suites"]["dat"]["imagenet-a"]
    if fault == "missing":
        own["missing"] = ["3 pictures of n01498041"]
    elif fault == "fingerprint":
        own["fingerprint"] = "other"
    elif fault == "subset":
        own["protocol"]["subset"] = "1,000 pictures of a list"
    else:
        results["cells"]["dat"]["imagenet-a"][""]["total"] += 1
    rows = headline_table(summarize(results)).rows
    assert [[cell == "–" for cell in row[1:]] for row in rows] == [[False, True, True], [True, False, True]]
    assert len({row[0] for row in rows}) == 2
    (beside, *_) = published_tables(summarize(results))
    alone = fault in ("missing", "subset")
    assert [row[0] for row in beside.rows if row[-1] == "this report, protocol native"] == [
        "MAE, fine-tuned plainly",
        *([] if alone else ["MAE + DAT"]),
    ]


def test_models_of_different_interpolation_share_a_row() -> None:
    results = evaluation(("plain", "dat"), ("imagenet-a",))
    results["suites"]["dat"]["imagenet-a"]["protocol"]["preprocessing"] = "bilinear"
    assert len(headline_table(summarize(results)).rows) == 1


def test_generated_rows_are_labelled_and_never_normalised_by_alexnet_or_published() -> None:
    results = evaluation(("plain", "dat"), ("imagenet", "generated"))
    rows = rows_by_title(headline_table(summarize(results)))
    assert rows["IN-C*: mCE, of MAE, fine-tuned plainly 100 ↓"][0] == "100.0"
    assert not [title for title in rows if "ImageNet-C" in title or title.startswith("IN-C*: mCE ↓")]
    assert any(note.startswith("* not a published") for note in headline_table(summarize(results)).notes)
    (table, *_) = published_tables(summarize(results))
    assert table.head == ("", "px", PUBLISHED_COLUMNS["imagenet"], "source")
    assert not published_tables(summarize(evaluation(("plain",), ("generated",))))
    assert any("official ImageNet-C" in remark for remark in not_measured(summarize(results)))


def test_a_partial_imagenet_c_has_no_mce() -> None:
    results = evaluation(("plain",), ("imagenet-c",))
    del results["cells"]["plain"]["imagenet-c"]["fog/3"]
    results["suites"]["plain"]["imagenet-c"]["missing"] = ["fog has no severity 3"]
    assert list(rows_by_title(headline_table(summarize(results)))) == [
        "ImageNet-C, partial†: mean corruption error (%) ↓"
    ]
    rows = rows_by_title(corruption_table(summarize(results).measurements[0]))
    assert rows["fog"][-1] == rows["mean of weather"][-1] == "–"
    assert rows["snow"][-1] != "–"
    assert not published_tables(summarize(results))


def test_relative_mce_needs_as_many_clean_images() -> None:
    results = evaluation(("plain",), ("imagenet", "imagenet-c"))
    results["cells"]["plain"]["imagenet"][""] = {"correct": 4000, "total": 5000}
    assert "ImageNet-C: relative mCE ↓" not in rows_by_title(headline_table(summarize(results)))
    assert "ImageNet-C: mCE ↓" in rows_by_title(headline_table(summarize(results)))


def test_robustbench_list_is_shown_with_its_published_rows() -> None:
    results = evaluation(("plain",), ("imagenet-c",))
    for count in results["cells"]["plain"]["imagenet-c"].values():
        count["correct"], count["total"] = count["correct"] // 10, 5000
    own = results["suites"]["plain"]["imagenet-c"]
    results["models"]["plain"]["protocol"] = "imagenet-c"
    own["images"], own["protocol"]["subset"] = 5000, "5,000 pictures of a list"
    (table, *_) = published_tables(summarize(results))
    assert table.head[2] == PUBLISHED_COLUMNS["imagenet-c-5000/mce"]
    assert ("DeiT-B, Tian et al. 2022", "224", "41.70", "[1]") in table.rows

    own["protocol"]["subset"] = "5,000 of 50,000 pictures (seed 0)"  # as many, but others
    assert not published_tables(summarize(results))


def test_a_subset_that_all_suites_share_is_printed_once() -> None:
    results = evaluation(("plain", "dat"), ("imagenet", "imagenet-c"))
    for facts in (facts for own in results["suites"].values() for facts in own.values()):
        facts["protocol"]["subset"] = "60 of 50,000 pictures (seed 0)"
    assert "ImageNet (%) ↑" in rows_by_title(headline_table(summarize(results)))
    assert "All suites: 60 of 50,000 images (seed 0)." in headline_table(summarize(results)).notes
    assert comparison_findings(summarize(results))[-1] == "Measured on 60 of 50,000 images (seed 0)."
    for own in results["suites"].values():
        own["imagenet"]["protocol"]["subset"] = ""
    assert "ImageNet-C, 60 of 50,000 images (seed 0): mCE ↓" in rows_by_title(headline_table(summarize(results)))
    assert "Measured" not in " ".join(comparison_findings(summarize(results)))


def test_published_rows_are_complete_and_in_range() -> None:
    rows = published_rows()
    assert {key for row in rows for key in row.values} == set(PUBLISHED_COLUMNS)
    for row in rows:
        assert row.source
        assert row.size in ("", "224", "384", "448", "512")
        numbers = [row.number(key) for key in row.values]
        assert all(0 < value < 100 for value in numbers if value is not None)
        assert row.model.startswith("MAE, ViT") or None not in numbers
    best = next(row for row in rows if row.model == "MAE + DAT, ViT-H/14")
    assert best.values["imagenet-c/mce"] == "31.40"  # as printed, not 31.4


def test_mce_of_mae_is_shown_over_15_and_possibly_19_corruptions() -> None:
    (table, *_) = published_tables(summarize(evaluation(("plain",), ("imagenet-c",))))
    rows = [row[0] + ": " + row[2] for row in table.rows]
    assert {"MAE, ViT-B/16: 51.7 §", "MAE, ViT-B/16, over 15 corruptions: 53.5"} < set(rows)
    assert {"MAE, ViT-L/16: 41.8 §", "MAE, ViT-L/16, over 15 corruptions: 43.1"} < set(rows)
    assert any(note.startswith("§ may be a mean over 19 corruptions") for note in table.notes)
    (other, *_) = published_tables(summarize(evaluation(("plain",), ("imagenet-a",))))
    assert not any("§" in note for note in other.notes)


def test_the_best_and_the_nearest_published_rows_are_shown_and_the_others_folded(tmp_path: Path) -> None:
    results = evaluation(("plain", "dat"), ("imagenet-c",))
    table, rest = published_tables(summarize(results))
    values = [float(row[2]) for row in table.rows if row[-1] == "this report, protocol native"]
    every = [row for row in published_rows() if "imagenet-c/mce" in row.values and row.protocol in ("", "native")]
    assert len(table.rows) - 2 + len(rest.rows) == len(every)
    alone = [row for row in every if row.protocol and row.number("imagenet-c/mce") is not None]
    for aim in (0, *values):
        nearest = min(alone, key=lambda row: abs(float(row.values["imagenet-c/mce"]) - aim))
        assert nearest.model in [row[0] for row in table.rows]
    assert rest.folded
    assert ("DINOv2-g", "–", "28.2") in [row[:3] for row in rest.rows]
    assert all(row[-1].endswith("more data") for row in rest.rows if row[0] == "DINOv2-g")
    assert all("¶" in row[-1] for row in rest.rows), "their sources do not state a protocol"
    page = write_report(summarize(results), tmp_path).read_text()
    assert f"<summary>{rest.title}</summary>" in page
    assert page.index("<details>") < page.index("DINOv2-g") < page.index("</details>")


@pytest.mark.parametrize("protocol", ["dat", "timm", "imagenet-c", "native"])
def test_published_rows_of_another_protocol_are_left_out(protocol: ProtocolName) -> None:
    results = evaluation(("plain",), ("imagenet", "imagenet-a", "imagenet-c"))
    results["models"]["plain"]["protocol"] = protocol
    shown = {row[0] for table in published_tables(summarize(results)) for row in table.rows}
    of_protocol = {
        "dat": "MAE + DAT, ViT-H/14",
        "timm": "Hiera-H (MAE)",
        "imagenet-c": "ResNet-50, AugMix",
        "native": "MAE, ViT-H/14",
    }
    assert {name for name in of_protocol.values() if name in shown} == {of_protocol[protocol]}


# ---- the files ----


def test_the_page_is_complete_and_self_contained() -> None:
    text = files()["report.html"]
    require_self_contained(text)
    page = Page(text)
    assert not page.open
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {(attributes.get("href") or "")[1:] for tag, attributes in page.tags if tag == "a"}
    links = {one for one in ids if not one.startswith("menus-")}
    assert targets == links
    assert all(attributes.get("scope") for tag, attributes in page.tags if tag == "th")
    figures = [name for name in files() if name.endswith(".png")]
    assert len(figures) == len([tag for tag, _ in page.tags if tag == "img"])
    assert {"gains.png", "published.png", "words.png", "1-heat-1.png", "1-difference-2.png"} < set(figures)


@pytest.mark.parametrize(
    ("names", "suites"),
    [(("plain",), ("imagenet-a",)), (("plain", "random", "dat"), SUITES[:3]), (("plain",), ("words-random",))],
)
def test_few_or_many_models_and_missing_suites(tmp_path: Path, names: tuple[str, ...], suites: tuple[str, ...]) -> None:
    results = evaluation(names, suites)
    results["not_measured"] |= {"stylized": "no folder", "v3": "no folder"}
    if len(names) > 1:
        del results["cells"]["random"]["imagenet-v2"]
    page = Page(write_report(summarize(results), tmp_path).read_text())
    assert len(page.rows[0]) == 1 + len(names) + len(names) - 1
    assert "stylized, v3: no folder" in page.text
    assert ("imagenet-v2, of random words" in page.text) == (len(names) > 1)
    assert "one checkpoint" in page.text


def test_a_failed_check_marks_its_row() -> None:
    results = evaluation(("plain", "random"), ("pgd-5-1/255",))
    assert headline_table(summarize(results)).rows[0][2].endswith("‡")
    assert any("‡ a check" in note for note in headline_table(summarize(results)).notes)
    assert [row[3] for row in checks_table(summarize(results)).rows] == ["passed", "passed", "passed", "FAILED"]  # type: ignore[union-attr]
    assert "shares no measurement" in " ".join(comparison_findings(summarize(results)))  # that could be believed
    checks = results["checks"]["random"]
    checks["gradient attacks"] = checks.pop("pgd-5-1/255")  # checked once for all
    assert headline_table(summarize(results)).rows[0][2].endswith("‡")
    assert attack_check_failed(results["checks"], "random", "autoattack-4/255")
    assert not attack_check_failed(results["checks"], "random", "words-random")
    assert not attack_check_failed(results["checks"], "plain", "autoattack-4/255")


def test_hostile_text_is_escaped_in_every_format(tmp_path: Path) -> None:
    results = evaluation(("plain", "dat"), ("imagenet-a", "imagenet-c", "words-random"))
    results["title"] = results["command"] = results["models"]["dat"]["title"] = HOSTILE
    results["machine"] = results["versions"] = results["not_measured"] = {HOSTILE: HOSTILE}
    for own in results["suites"].values():
        own["imagenet-a"]["title"] = HOSTILE
        own["imagenet-a"]["protocol"]["folder"] = HOSTILE
    results["examples"] = [
        {"file": HOSTILE, "suite": HOSTILE, "cell": "", "label": HOSTILE, "answers": {"dat": HOSTILE}}
    ]
    page = write_report(summarize(results), tmp_path).read_text()
    assert "<script>alert" not in page
    assert html.escape("<script>") in page
    assert Page(without_scripts(page)).text.count("alert('x')") > 10
    markdown = (tmp_path / "report.md").read_text()
    assert "<script" not in re.sub(r"(?m)^    .*$", "", markdown)  # but in the command, which is a block of code
    line = next(line for line in markdown.splitlines() if line.startswith("| ImageNet-C: mCE"))
    assert len(re.findall(r"(?<!\\)\|", line)) == len(headline_table(summarize(results)).head) + 1
    head = next(line for line in markdown.splitlines() if line.startswith("|  | MAE"))
    assert len(re.findall(r"(?<!\\)\|", head)) == len(headline_table(summarize(results)).head) + 1
    tex = (tmp_path / "report.tex").read_text()
    for line in tex.splitlines():
        assert line.startswith("%") or not re.search(r"(?<!\\)[#%](?!$)|\$\\alpha|(?<!\\)_", line), line
    with (tmp_path / "report.csv").open(newline="") as file:
        assert {row["title"] for row in csv.DictReader(file)} == {"MAE, fine-tuned plainly", HOSTILE}


def test_latex_escapes_every_sign() -> None:
    assert latex_text("50 % of a_b & {c} ~ \\d #1 ^") == (
        r"50 \% of a\_b \& \{c\} \textasciitilde{} \textbackslash{}d \#1 \textasciicircum{}"
    )
    assert latex_text("−0.1 ↓ [95 %]") == r"$-$0.1 $\downarrow$ {[}95 \%{]}"


def test_examples_are_on_the_page_or_reported_missing(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for path in (tmp_path / "secret.png", tmp_path / "out" / "a.png", tmp_path / "out" / "words.png"):
        Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(path)
    results = evaluation(("plain", "dat"), ("imagenet-a",))
    common = {"suite": "imagenet-c", "cell": "fog/3", "label": "tench", "answers": {"plain": "eel", "dat": "tench"}}
    results["examples"] = [{**common, "file": "a.png", "words": "words.png"}, {**common, "file": "../secret.png"}]
    text = write_report(summarize(results), tmp_path / "out").read_text()
    page = Page(text)
    require_self_contained(text)
    assert (
        len(
            [
                1
                for tag, attributes in page.tags
                if attributes.get("alt") in ("tench, imagenet-c, fog, severity 3", "tench, its visual words")
            ]
        )
        == 2
    )
    assert text.count("This image is missing") == 1
    assert "✗ MAE, fine-tuned plainly: eel" in page.text
    assert "✓ MAE + DAT: tench" in page.text


def test_the_command_makes_the_same_files_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = evaluation(("plain",), ("imagenet", "cue-conflict"))
    write_results(results, tmp_path / "results.json")
    page = write_report(summarize(results), tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    page.unlink()
    verb("report")([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[-1] == str(page)
    assert {path.name: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == first
    with pytest.raises(SystemExit) as end:
        run_command(lambda: verb("report")([str(tmp_path / "gone")]))
    assert end.value.code == 66
    assert "no such results" in capsys.readouterr().err


def test_counts_of_a_callable_have_no_sha256() -> None:
    results = evaluation(("plain",), ("imagenet-a",))
    results["models"]["plain"]["sha256"] = results["models"]["plain"]["averaged"] = None
    row = next(csv.DictReader(io.StringIO(counts_csv(summarize(results)))))
    assert row["weights_sha256"] == row["averaged"] == row["shape"] == ""


@pytest.mark.slow
def test_the_page_fits_a_phone(tmp_path: Path) -> None:
    """Nothing is wider than a phone: tables scroll inside their own boxes."""
    results = evaluation(("plain", "random", "dat"))
    results["command"] = "mae-dat evaluate --data /" + "x" * 200
    content, frame = phone_widths(write_report(summarize(results), tmp_path).read_text(), tmp_path)
    assert content <= frame <= 390
