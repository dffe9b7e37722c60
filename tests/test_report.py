"""The report: numbers equal to the counts, safe against hostile text, self-contained, and readable on a phone."""

import copy
import functools
import html
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import Page, phone_widths, require_self_contained
from PIL import Image

from mae_dat import findings
from mae_dat.corruptions import CATEGORIES, CORRUPTIONS
from mae_dat.errors import DataError, MissingInputError, OutputError
from mae_dat.report import Results, Run, main, read_results, render, write_report

HOSTILE = "<script>alert('x')</script> & \"$\\alpha$\" ../.."


def run(name: str = "plain", seed: int = 0, error: int = 40, corruptions: tuple[str, ...] = CORRUPTIONS) -> Run:
    """A run of 200 pictures; the error grows with the severity and differs between corruptions."""
    wrong = {name: [error + 8 * s + i for s in range(1, 6)] for i, name in enumerate(corruptions)}
    return {
        "name": name,
        "label": {"plain": "plain", "random": "random words", "dat": "DAT"}.get(name, name),
        "seed": seed,
        "seconds": 90.0,
        "clean": {"correct": 200 - error, "total": 200, "top5": 190},
        "corruptions": {
            c: {str(s): {"correct": 200 - n, "total": 200} for s, n in enumerate(row, 1)} for c, row in wrong.items()
        },
        "shape_bias": {"shape": 30, "texture": 50, "total": 100},
        "curves": {"train_loss": [[1, 2.0], [2, 1.5]], "changed_words": [[1, 0.01], [2, 0.0375]]},
    }


def results(*runs: Run) -> Results:
    return {
        "title": "A small study",
        "command": "python -m mae_dat.demo",
        "created": "2025-01-02T03:04:05+00:00",
        "seconds": 600.0,
        "machine": {"processor": "two cores"},
        "versions": {"torch": "2.11.0"},
        "settings": {"Fine-tuning": {"epochs": 2, "blr": 0.0005}},
        "notes": ["Generated images."],
        "models": list(runs) or [run(), run("dat", error=30)],
        "pretraining": {"curves": {"train_loss": [[1, 1.0], [2, 0.5]]}, "seconds": 60.0},
        "galleries": [],
    }


@functools.cache
def usual_page() -> Page:
    """The page of two models, made once for all tests that only read it."""
    return Page(render(results()))


def test_headline_numbers_are_those_of_the_counts() -> None:
    page = usual_page()
    head = next(row for row in page.rows if "mean corruption error%" in "".join(row[:3]))
    plain = next(row for row in page.rows if row[0].startswith("plain"))
    shown = dict(zip(head, plain, strict=True))
    # run(): of 200 pictures, 40 wrong clean; corruption i at severity s has 40 + 8 s + i wrong
    mean = {name: (40 + 8 * 3 + i) / 2 for i, name in enumerate(CORRUPTIONS)}
    assert shown["clean accuracy% ↑"] == "80.0"
    assert shown["mean corruption error% ↓"] == f"{np.mean(list(mean.values())):.1f}" == "35.5"
    for category, members in CATEGORIES.items():
        assert shown[f"{category}% ↓"] == f"{np.mean([mean[name] for name in members]):.1f}"
    assert shown["shape bias0–1 ↑"] == "0.38"  # 30 / 80
    assert shown["coverage%"] == "80.0"
    assert shown["changed words%"] == "3.75"
    assert shown["trainingmin ↓"] == "1.5"


def test_every_corruption_and_every_count_is_on_the_page() -> None:
    page = usual_page()
    rows = {row[0]: row for row in page.rows if len(row) == 4}
    for i, name in enumerate(CORRUPTIONS):
        assert rows[name][2:] == [f"{(64 + i) / 2:.1f}", f"{(54 + i) / 2:.1f}"]
    counts = [row for row in page.rows if row[:1] == ["fog"] and len(row) == 6]
    assert counts[0][1:] == [f"{200 - (40 + 8 * s + CORRUPTIONS.index('fog'))} / 200" for s in range(1, 6)]


def test_best_values_are_marked_with_a_sign_and_ties_are_not() -> None:
    page = usual_page()
    dat = next(row for row in page.rows if row[0].startswith("DAT"))
    assert dat[1] == "★85.0"
    assert dat[-1] == "1.5"  # both took 1.5 minutes


def test_markdown_has_the_headline_table_with_the_best_in_bold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = findings.group_runs([run("plain", error=40), run("dat", error=30)])
    head, rule, plain, dat = findings.markdown(groups).splitlines()
    columns, rows = findings.headline(groups)
    assert head.count("|") == rule.count("|") == len(columns) + 2
    assert [cell.strip(" *") for cell in dat.split("|")[2:-1]] == [cell.text for cell in rows[1]]
    best = [title for title, cell in zip(head.split("|")[2:], dat.split("|")[2:], strict=True) if "**" in cell]
    assert " mean corruption error (%) " in best
    assert "**" not in plain.split("|")[3]
    write_report(results(run("plain", error=40), run("dat", error=30)), tmp_path)
    assert main([str(tmp_path), "--markdown"]) == 0
    assert capsys.readouterr().out == findings.markdown(groups) + "\n\n" + findings.paired_markdown(groups) + "\n"


def test_paired_differences_are_taken_within_a_seed() -> None:
    runs = [run("plain", 0, 40), run("plain", 1, 50), run("dat", 1, 44), run("dat", 0, 36)]
    head, _, row = findings.paired_markdown(findings.group_runs(runs)).splitlines()
    cell = dict(zip(head.split("|"), row.split("|"), strict=True))[" mean corruption error "]
    mean, spread = map(float, cell.replace(" ", "").split("±"))
    by = {(one["name"], one["seed"]): findings.mean_error(one) for one in runs}
    first, second = (by["dat", seed] - by["plain", seed] for seed in (0, 1))
    assert mean == pytest.approx((first + second) / 2, abs=0.006)
    assert spread == pytest.approx(abs(first - second) / 2**0.5, abs=0.006)


def test_summary_says_what_the_numbers_say() -> None:
    better = " ".join(findings.summary(findings.group_runs([run(), run("dat", error=30)])))
    assert "Compared with plain, DAT has a lower mean corruption error by 5.0 points (30.5 against 35.5 %)" in better
    assert "a higher clean accuracy by 5.0 points (85.0 against 80.0 %) (one seed each)" in better
    worse = " ".join(findings.summary(findings.group_runs([run(), run("dat", error=44)])))
    assert "a higher mean corruption error by 2.0 points" in worse
    assert "a lower clean accuracy by 2.0 points" in worse
    same = " ".join(findings.summary(findings.group_runs([run(), run("random")])))
    assert "random words has the same mean corruption error to a tenth of a point" in same


def test_dat_is_compared_with_random_words_too() -> None:
    text = " ".join(findings.summary(findings.group_runs([run(), run("random", error=35), run("dat", error=36)])))
    assert "Compared with random words, DAT has a higher mean corruption error by 0.5 points" in text


def test_one_seed_is_called_one_seed_and_the_sampling_error_is_right() -> None:
    text = findings.caution(findings.group_runs([run()]))
    assert "One seed" in text
    assert "± 2.8 points" in text  # 100 sqrt(0.8 x 0.2 / 200)


def test_seeds_are_averaged() -> None:
    runs = [run("plain", 0, 40), run("plain", 1, 44), run("dat", 0, 30), run("dat", 1, 38)]
    page = Page(render(results(*runs)))
    plain = next(row for row in page.rows if row[0].startswith("plain"))
    assert plain[0].endswith("2 seeds")
    assert plain[1] == "79.0 ± 1.4"  # 80 and 78
    # 37.5 - 32.5 with standard deviations of sqrt(2) and sqrt(8) over two seeds each
    assert "lower mean corruption error by 4.0 points (32.5 ± 2.8 against 36.5 ± 1.4 %" in page.text
    assert "standard error of the difference 2.2), which may be chance" in page.text
    assert "One seed" not in page.text


def test_an_attack_that_changed_nothing_is_called_that() -> None:
    idle = run("dat")
    idle["curves"]["changed_words"] = [[1, 0.0]]
    assert "Where none was changed (DAT)" in " ".join(findings.summary(findings.group_runs([run(), idle])))


def test_models_measured_on_different_pictures_are_not_compared() -> None:
    page = Page(render(results(run(), run("dat", corruptions=("fog",)))))
    assert "cannot be compared" in page.text
    assert "Compared with" not in page.text
    assert "★" not in "".join(cell for row in page.rows for cell in row)
    assert "gaussian_noise, shot_noise" in page.text[page.text.index("What was not measured") :]


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    hostile = results(run(HOSTILE), run("dat"))
    hostile["title"] = hostile["command"] = HOSTILE
    hostile["models"][0]["label"] = HOSTILE
    hostile["models"][0]["curves"][HOSTILE] = [[1, 2.0]]
    hostile["notes"] = [HOSTILE]
    hostile["machine"] = hostile["versions"] = {HOSTILE: HOSTILE}
    hostile["settings"] = {HOSTILE: {HOSTILE: HOSTILE}}
    hostile["galleries"] = [{"title": HOSTILE, "caption": HOSTILE, "file": HOSTILE}]
    page = write_report(hostile, tmp_path).read_text()
    assert "<script" not in page
    assert html.escape("<script>") in page
    assert Page(page).text.count("alert('x')") > 10
    assert {path.parent for path in tmp_path.rglob("*.png")} == {tmp_path / "figures"}


def test_page_is_self_contained_and_every_picture_has_words(tmp_path: Path) -> None:
    picture(tmp_path / "galleries" / "words.png")
    given = results()
    given["galleries"] = [{"title": "Words", "caption": "clean, adversarial", "file": "galleries/words.png"}]
    page = write_report(given, tmp_path).read_text()
    require_self_contained(page)
    images = [tag for tag, _ in Page(page).tags if tag == "img"]
    assert len(images) == len(list((tmp_path / "figures").glob("*.png"))) + 1


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(path)


def test_gallery_outside_or_missing_is_shown_as_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(tmp_path / "secret.png")
    given = results()
    given["models"] = []
    given["galleries"] = [{"title": "t", "caption": "c", "file": name} for name in ("../secret.png", "gone.png")]
    with caplog.at_level(logging.WARNING):
        page = write_report(given, tmp_path / "out").read_text()
    assert page.count("This picture is missing") == 2
    assert len(caplog.records) == 2


def test_round_trip_gives_the_same_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = results()
    given["models"][0]["curves"]["train_loss"] = [[1, 2.0], [2, float("nan")], [3, 1.0]]
    given["settings"]["Fine-tuning"]["path"] = Path("somewhere")
    page = write_report(given, tmp_path)
    first = page.read_bytes()
    stored = read_results(tmp_path / "results.json")
    assert stored["models"][0]["clean"] == given["models"][0]["clean"]
    assert stored["models"][0]["curves"]["train_loss"][1] == [2, None]
    page.unlink()
    assert main([str(tmp_path)]) == 0
    assert page.read_bytes() == first
    assert capsys.readouterr().out.strip() == str(page)
    assert not list(tmp_path.glob(".*"))
    with Image.open(tmp_path / "figures" / "categories.png") as figure:
        assert figure.width == 2 * 480  # twice the density of the page


def test_partial_results_still_make_a_page() -> None:
    bare = copy.deepcopy(results(run()))
    del bare["pretraining"], bare["models"][0]["shape_bias"], bare["models"][0]["curves"]
    bare["models"][0]["corruptions"] = {}
    page = Page(render(bare))
    assert "shape bias0–1 ↑" not in [cell for row in page.rows for cell in row]
    assert "Shape bias, for at least one model." in page.text
    assert not [tag for tag, _ in page.tags if tag == "img"]
    none = results()
    none["models"] = []
    assert "No model was measured." in render(none)


def test_missing_severities_are_listed() -> None:
    few = run()
    few["corruptions"] = {name: {"3": counts["3"]} for name, counts in few["corruptions"].items()}
    said = " ".join(findings.not_measured(results(few), findings.group_runs([few])))
    assert "Severities, for at least one model: 1, 2, 4, 5." in said
    assert "AlexNet-normalised" in said


def test_errors_name_the_file_and_the_cause(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(MissingInputError, match=r"results\.json"):
        read_results(tmp_path / "results.json")
    assert main([str(tmp_path)]) == 66
    assert "results.json" in capsys.readouterr().err
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_results(tmp_path / "results.json")
    broken: dict[str, Any] = dict(results())
    del broken["versions"]
    (tmp_path / "results.json").write_text(json.dumps(broken))
    with pytest.raises(DataError, match="versions missing"):
        read_results(tmp_path / "results.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        write_report(results(), tmp_path / "file")


@pytest.mark.slow
def test_page_fits_a_phone(tmp_path: Path) -> None:
    """In a frame 390 px wide, nothing is wider than the frame: tables scroll inside their own boxes."""
    given = results(*(run(name, seed) for name in ("plain", "random", "dat") for seed in range(3)))
    given["command"] = "python main_finetune.py --data_path /" + "x" * 200
    given["settings"]["Fine-tuning"]["data_path"] = "/" + "y" * 200
    content, frame = phone_widths(render(given), tmp_path)
    assert content <= frame <= 390
