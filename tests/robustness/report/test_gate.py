"""`--require`: requirements with intervals and three verdicts, JUnit XML, evidence, and what can be wrong with them."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image
from tiny_runs import draw_folder, outcome_of, verb

from mae_dat.config.errors import CheckpointError, ConfigError, DataError, MissingInputError, RequirementError
from mae_dat.config.requirements import NoWorse, read_requirements
from mae_dat.robustness.evaluate import evaluate
from mae_dat.robustness.report.gate import gate_lines, is_met, judge, require_met
from mae_dat.robustness.scores.results import Results, write_results

IMAGES = 40


class Threshold(torch.nn.Module):
    """Predicts the second class above a level; the first one's images are dark."""

    def __init__(self, level: float) -> None:
        super().__init__()
        self.level = level

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        above = image.mean((1, 2, 3)) - self.level
        return torch.stack([-above, above], 1) * 20


def draw(root: Path, shift: float = 0.0) -> Path:
    """Dark images of levels 0 to 0.39, light ones of 0.6 to 0.99."""
    for number in range(IMAGES):
        for name, level in (("dark", number / 100), ("light", 0.6 + number / 100)):
            path = root / "val" / name / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (round(255 * max(0.0, level - shift)),) * 3).save(path)
    return root


def measure(root: Path, level: float, suites: dict[str, Any] | None = None, **flags: Any) -> Results:
    given = {"input_size": 32, "num_workers": 0, "precision": "fp32", "progress": False, "device": "cpu", **flags}
    return evaluate({"m": Threshold(level)}, "clean", root, suites=suites or {}, **given).results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """All dark images and 30 of 40 light ones are predicted correctly; darker, 10 light ones fewer."""
    root = draw(tmp_path_factory.mktemp("data"))
    found = measure(root, 0.695, {"night": lambda image: (image - 0.1).clamp(0, 1)})
    (clean,) = found["cells"]["m"]["clean"].values()
    assert (clean["correct"], clean["total"]) == (70, 80)
    return found


def required(tmp_path: Path, text: str) -> Any:
    file = tmp_path / "require.yaml"
    file.write_text(text)
    return read_requirements(file)


def verdicts(results: Results, tmp_path: Path, text: str) -> list[str]:
    return [line.verdict for line in judge(results, required(tmp_path, text))]


@pytest.mark.parametrize(
    ("entry", "value", "ends", "verdict"),
    [
        ('accuracy: ">= 79"', 87.5, (78.21, 93.84), "undecided"),  # Clopper & Pearson of 70 of 80
        ('accuracy: ">= 78"', 87.5, (78.21, 93.84), "passed"),
        ('accuracy: "> 94"', 87.5, (78.21, 93.84), "failed"),
        ('"accuracy[night]": "<= 90"', 75.0, (64.06, 84.01), "passed"),
        ('worst_class_recall: ">= 0.5"', 0.75, (0.565, 0.887), "passed"),  # two classes: each at the level 97.5 %
        ('worst_class_recall: ">= 60 %"', 0.75, (0.565, 0.887), "undecided"),
        ('balanced_accuracy: "< 95"', 87.5, None, "passed"),
        ('"drop[night]": "<= 10"', 12.5, None, "undecided"),
        ('"drop[night]": "<= 40"', 12.5, None, "passed"),
        ('"drop[night]": "< 2"', 12.5, None, "failed"),
        ('calibration_error: "<= 90"', None, None, "passed"),
    ],
)
def test_the_interval_decides(
    results: Results, tmp_path: Path, entry: str, value: float | None, ends: Any, verdict: str
) -> None:
    (line,) = judge(results, required(tmp_path, entry))
    assert line.verdict == verdict
    if value is not None:
        assert line.value.value == pytest.approx(value)
    if ends is not None:
        assert line.value.ends == (pytest.approx(ends[0], abs=6e-3), pytest.approx(ends[1], abs=6e-3))


def test_undecided_passes_or_fails_as_requested(results: Results, tmp_path: Path) -> None:
    lines = judge(results, required(tmp_path, 'accuracy: ">= 85"\nworst_class_recall: ">= 0.5"\n'))
    assert [line.verdict for line in lines] == ["undecided", "passed"]
    assert not is_met(lines, "fail")
    assert is_met(lines, "pass")
    with pytest.raises(RequirementError, match="1 of 2 requirements are not met: m: accuracy: >= 85. An undecided one"):
        require_met(lines, "fail")
    require_met(lines, "pass")
    assert str(lines[0]) == "undecided  m: accuracy: >= 85: 87.50 [78.21, 93.84]"


def test_no_worse_than_compares_image_by_image(results: Results, tmp_path: Path) -> None:
    root = draw(tmp_path / "data")
    same = {"night": lambda image: (image - 0.1).clamp(0, 1)}
    write_results(measure(root, 0.695, same), tmp_path / "before.json")
    worse, better = measure(root, 0.757, same), measure(root, 0.5, same)
    text = "no_worse_than: {file: before.json, by: 1}"
    assert verdicts(worse, tmp_path, text.replace("by: 1", "by: 0")) == ["failed", "failed"]
    assert verdicts(better, tmp_path, text) == ["passed", "passed"]
    # The same predictions: at most so many images may differ unseen.
    assert verdicts(measure(root, 0.695, same), tmp_path, text) == ["undecided", "undecided"]
    assert verdicts(measure(root, 0.695, same), tmp_path, text.replace("by: 1", "by: 8")) == ["passed", "passed"]
    (first, _) = judge(better, required(tmp_path, text))
    assert first.value.value == 12.5
    other = draw(tmp_path / "other", shift=0.01)
    with pytest.raises(DataError, match=r"before.json was measured on other images of clean \(80 images, now 80"):
        judge(measure(other, 0.695), required(tmp_path, text))
    with pytest.raises(DataError, match="in another way on night"):
        judge(measure(root, 0.695, {"night": lambda image: image * 0.9}), required(tmp_path, text))
    with pytest.raises(ConfigError, match="has no model 'x'"):
        judge(better, required(tmp_path, "no_worse_than: {file: before.json, model: x}"))


def test_a_collapsed_model_never_passes(tmp_path: Path) -> None:
    root = draw(tmp_path / "data")
    collapsed = measure(root, 2.0)
    text = 'accuracy: ">= 1"\ncalibration_error: "<= 100"\n'
    assert verdicts(collapsed, tmp_path, text) == ["failed", "failed"]
    collapsed["collapsed"] = {}  # edited by hand
    lines = judge(collapsed, required(tmp_path, text))
    assert [line.verdict for line in lines] == ["failed", "failed"]
    assert "collapsed: it predicts dark for 100.0 % of clean" in str(lines[0])
    only_own = evaluate(
        {"m": Threshold(2.0)}, data_path=None, shifts=[str(root / "val")], input_size=32, num_workers=0, progress=False
    ).results
    assert verdicts(only_own, tmp_path, '"accuracy[val]": ">= 1"') == ["failed"]


def test_the_files_hold_verdicts_and_hashes(results: Results, tmp_path: Path) -> None:
    write_results(results, tmp_path / "results.json")
    text = 'accuracy: ">= 85"\nworst_class_recall: ">= 0.9"\n"accuracy[night]": ">= 1"\n'
    places = (tmp_path / "results.json", tmp_path / "gate")
    lines = gate_lines(results, required(tmp_path, text), "pass", *places)
    assert [line.verdict for line in lines] == ["undecided", "failed", "passed"]
    root = ElementTree.parse(tmp_path / "gate" / "requirements.xml").getroot()
    (suite,) = root
    assert suite.attrib == {"name": "m", "tests": "3", "failures": "1", "errors": "0", "skipped": "1"}
    assert [[child.tag for child in case] for case in suite] == [
        ["skipped", "system-out"],
        ["failure", "system-out"],
        ["system-out"],
    ]
    evidence = json.loads((tmp_path / "gate" / "requirements.json").read_text())
    assert evidence["verdict"] == "failed"
    for path, digest in evidence["files"].items():
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() == digest
    assert len(evidence["files"]) == 2
    assert evidence["data"]["m"]["clean"]["sha256"] == results["suites"]["m"]["clean"]["fingerprint"]
    assert evidence["code"]["sha256"]
    assert set(evidence["models"]["m"]) == {"source", "sha256", "precision"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('acuracy: ">= 1"', r"require.yaml, line 1: unknown metric 'acuracy': did you mean accuracy"),
        ('accuracy: ">= 1"\naccuracy: ">= 2"', "line 2: accuracy is given twice"),
        ("accuracy: 80", 'line 1: accuracy must be a condition such as "<= 38"'),
        ('accuracy: "= 80"', "must be a condition"),
        ('worst_class_recall: ">= 60"', "is a share from 0 to 1, got '>= 60': 60 % is 0.6"),
        ('drop: "<= 3"', "drop needs brackets"),
        ("no_worse_than: results.json", "must be {file: results.json, by: 0.5}"),
        ("no_worse_than: {file: require.yaml, bye: 1}", r"has no 'bye': did you mean by"),
        ("no_worse_than: {file: require.yaml, by: -1}", "by must be a number of points of 0 or more"),
        ("- accuracy", "the file must contain lines such as"),
        ("", "the file must contain lines such as"),
        ("accuracy: [", "is not valid YAML"),
    ],
)
def test_wrong_requirements_are_errors(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        required(tmp_path, text)


def test_missing_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="there is no file .*nowhere.yaml"):
        read_requirements(tmp_path / "nowhere.yaml")
    with pytest.raises(MissingInputError, match="there is no file .*old.json"):
        required(tmp_path, "no_worse_than: {file: old.json}")
    (tmp_path / "old.json").write_text("{}")
    assert required(tmp_path, "no_worse_than: {file: old.json}").entries == (
        NoWorse("no_worse_than: old.json by 0", tmp_path / "old.json", 0.0),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"accuracy[nihgt]": ">= 1"', r"about nihgt, which was not measured: did you mean night"),
        ('"drop[fog, 3]": "<= 1"', "about fog/3, which was not measured"),
        ('"drop[night, 7, 8]": "<= 1"', "7, 8 of night, which was not measured"),
        ('corruption_error: "<= 1"', "about corruptions, which were not measured"),
        ('"worst_class_recall[night]": ">= 0.1"', "the classes of night, whose predictions were not counted by class"),
    ],
)
def test_a_number_that_was_not_measured_is_an_error(results: Results, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        judge(results, required(tmp_path, text))


def test_results_edited_by_hand_are_errors(results: Results, tmp_path: Path) -> None:
    requirements = required(tmp_path, 'accuracy: ">= 1"')
    for change, message in (
        (lambda edited: edited["cells"]["m"]["clean"][""].update(correct=79), "79 of 80 .* predictions for each image"),
        (lambda edited: edited["cells"]["m"]["clean"][""].update(correct=90), "90 of 80 .* impossible"),
        (lambda edited: edited["cells"]["m"]["clean"][""].update(correct="70"), "impossible"),
        (lambda edited: edited["classes"]["m"]["clean"]["confusion"]["dark"].update(dark=41), "the confusion matrix"),
        (lambda edited: edited["suites"]["m"].pop("clean"), "no facts about it"),
        (lambda edited: edited["cells"]["m"]["clean"][""].pop("total"), "not a complete results.json"),
    ):
        edited = copy.deepcopy(results)
        change(edited)
        with pytest.raises(CheckpointError, match=message):
            judge(edited, requirements)


def test_both_commands_print_the_verdicts_and_return_79(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, file, out = draw_folder(tmp_path / "data", train=0, conflict=0), tmp_path / "require.yaml", tmp_path / "out"
    file.write_text('accuracy: ">= 99.9"\nbalanced_accuracy: ">= 1"\n')
    flags = ["--checkpoint", "mae_dat_demo", "--data_path", str(data), "--suite", "clean", "--output_dir", str(out)]
    flags += ["--num_workers", "0", "--device", "cpu", "--require", str(file)]
    found = outcome_of(verb("evaluate"), flags, monkeypatch, capsys)
    assert found.code == 79
    assert "1 of 2 requirements are not met: mae_dat_demo: accuracy: >= 99.9" in found.stderr
    assert (out / "report.html").is_file()
    assert (out / "requirements.xml").is_file()
    file.write_text('balanced_accuracy: ">= 1"\n')
    assert verb("report")([str(out), "--require", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "passed     mae_dat_demo: balanced_accuracy: >= 1: " in printed
    file.write_text('balancd_accuracy: ">= 1"\n')
    found = outcome_of(verb("evaluate"), flags, monkeypatch, capsys)
    assert found.code == 64
    assert "did you mean balanced_accuracy" in found.stderr
