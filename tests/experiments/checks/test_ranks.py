"""Two ranks on this machine: real processes that add up a tensor, fail, or take too long."""

from pathlib import Path

import pytest

from mae_dat.config.commands.doctor import DoctorConfig
from mae_dat.experiments.checks.ranks import check_gpus, check_ranks


@pytest.mark.slow
def test_two_ranks_add_up_a_tensor() -> None:
    row = check_ranks()
    assert (row.state, row.name) == ("ok", "two ranks"), row
    assert row.text.endswith("to start and to add up a tensor with gloo")


def test_a_rank_that_fails_gives_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('libgomp.so.1: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    row = check_ranks()
    assert row.state == "failed"
    assert "OSError: libgomp.so.1: cannot open shared object file" in row.text
    assert row.text.startswith("gloo, rank ")
    assert "127.0.0.1" in row.fix


def test_ranks_that_never_meet_are_ended() -> None:
    row = check_ranks(timeout=0)
    assert (row.state, row.text) == ("failed", "gloo: no result after 0 s")


def test_gpus_are_checked_where_there_are_several() -> None:
    assert check_gpus(DoctorConfig(device="cpu")) == []
