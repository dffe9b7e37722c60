"""One run of each kind, as `mae-dat doctor` makes them, and runs that cannot write."""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mae_dat.config.commands.doctor import DoctorConfig
from mae_dat.experiments.checks.row import run_check
from mae_dat.experiments.checks.trial_runs import TrialRuns


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files, for this test alone; it must be empty at the end."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.iterdir())


def test_a_pretraining_leaves_nothing_behind(temporary: Path) -> None:
    with TrialRuns(DoctorConfig(device="cpu", precision="fp32")) as runs:
        (row,) = run_check("pretraining", runs.pretrain)
        assert list(temporary.iterdir())
    assert row.state == "ok", row
    assert " s for 2 steps of 8 images, loss 1." in row.text


@pytest.mark.slow
def test_every_kind_of_run(temporary: Path) -> None:
    with TrialRuns(DoctorConfig(device="cpu", precision="fp32")) as runs:
        rows = [
            row
            for name, check in (
                ("fine-tuning", runs.finetune),
                ("DAT", runs.finetune_with_dat),
                ("evaluation", runs.evaluate),
            )
            for row in run_check(name, check)
        ]
    assert [(row.state, row.name) for row in rows] == [("ok", "fine-tuning"), ("ok", "DAT"), ("ok", "evaluation")], rows
    assert rows[1].text.endswith(" % of the words changed")
    match = re.search(r", accuracy (\d\d\.\d) % on clean images$", rows[2].text)
    assert match
    assert 30 <= float(match[1]) <= 35


def test_without_a_folder_for_temporary_files_a_run_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    monkeypatch.setattr(tempfile, "tempdir", str(file))
    with TrialRuns(DoctorConfig()) as runs:
        (row,) = run_check("pretraining", runs.pretrain, "free some space")
    assert (row.state, row.fix) == ("failed", "free some space")
    assert "Not a directory" in row.text
