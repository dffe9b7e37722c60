"""Input that cannot be right gives a clear error, and what was measured before it is kept."""

import json
from pathlib import Path

import pytest
import torch
from evaluated_models import Linear
from tiny_runs import draw_folder, outcome_of, verb

from mae_dat.config.errors import CheckpointError, ConfigError, DataError, NumericsError
from mae_dat.robustness.evaluate import evaluate

GIVEN = {"input_size": 32, "num_workers": 0, "precision": "fp32", "progress": False, "device": "cpu"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("data"), train=0, conflict=0)


class NanWhenDark(Linear):
    """Give NaN for images with a mean below 0.05."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        dark = (image.mean((1, 2, 3)) < 0.05) & (image.amax((1, 2, 3)) > 0)
        return torch.where(dark[:, None], torch.full((), float("nan")), super().forward(image))


def test_nan_logits_stop_the_evaluation_and_keep_what_was_measured(data: Path, tmp_path: Path) -> None:
    model, dark = NanWhenDark(), {"dark": lambda image: image * 0.02}
    with pytest.raises(NumericsError, match=r"m gave NaN or infinite logits for \d+ of the first \d+ images of dark"):
        evaluate({"m": model}, "clean", data, suites=dark, output_dir=tmp_path, **GIVEN)
    seen = model.seen
    results = evaluate({"m": model}, "clean", data, output_dir=tmp_path, **GIVEN).results
    assert results["cells"]["m"]["clean"][""]["total"] == 20
    assert model.seen - seen < 20 + 130  # only the checks of the input, not the suite again


def test_more_outputs_than_classes_are_an_error(data: Path) -> None:
    with pytest.raises(DataError, match="10 class folders .* but the model has 12 outputs"):
        evaluate(Linear(classes=12), "clean", data, **GIVEN)
    with pytest.raises(ConfigError, match="has 10 outputs and a list of 3 classes"):
        evaluate(Linear(), "clean", data, classes=["a", "b", "c"], **GIVEN)
    with pytest.raises(ConfigError, match=r"gives \(2, 10, 2\) for 2 images, not logits"):
        evaluate({"m": lambda image: torch.zeros(len(image), 10, 2)}, "clean", data, **GIVEN)


def test_a_report_rejects_other_versions_and_edited_results(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate({"m": Linear()}, "clean", data, output_dir=tmp_path, **GIVEN)
    file = tmp_path / "results.json"
    good = json.loads(file.read_text())
    for change, message in (
        ({"format": 99}, "has a newer format than"),
        (
            {"cells": {"m": {"clean": {"": {"correct": 21, "total": 20}}}}},
            "results.json",
        ),
        ({"cells": {"m": {"clean": {"": {"correct": 19, "total": 20}}}}}, "the file was edited or is damaged"),
        ({"models": []}, "results.json"),
        ({"models": {}}, "results.json"),
    ):
        file.write_text(json.dumps({**good, **change}))
        found = outcome_of(verb("report"), [str(file)], monkeypatch, capsys)
        assert found.code == CheckpointError.exit_code, found.stderr
        assert message in found.stderr
        assert "Traceback" not in found.stderr


def test_some_images_give_intervals_in_the_console(data: Path) -> None:
    text = str(evaluate({"m": Linear()}, "clean", data, limit=10, **GIVEN))
    (line,) = [line for line in text.splitlines() if "95 % intervals over images" in line]
    assert line.startswith("m")
    assert " clean " in line
    assert "95 %" not in str(evaluate({"m": Linear()}, "clean", data, **GIVEN))
