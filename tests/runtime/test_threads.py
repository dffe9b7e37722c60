"""The threads of a process: the flag, else the environment, else the cores within the quota, shared by processes."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_runs import draw_folder, run_script

from mae_dat.config.errors import ConfigError
from mae_dat.runtime.threads import set_threads


@pytest.fixture(autouse=True)
def sixteen_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As torch starts on a machine of sixteen cores."""
    before = torch.get_num_threads()
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(16)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("threads", "cores", "processes", "expected"),
    [(None, 1, 1, 1), (None, 6, 1, 6), (None, 64, 1, 16), (None, 6, 2, 3), (None, 2, 4, 1), (3, 1, 1, 3), (3, 1, 4, 3)],
)
def test_threads_fit_the_cores_unless_a_number_is_given(
    threads: int | None, cores: int, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mae_dat.runtime.threads.available_cores", lambda: cores)
    set_threads(threads, processes)
    assert torch.get_num_threads() == expected


def test_a_number_of_the_environment_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mae_dat.runtime.threads.available_cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "16")
    set_threads(None)
    assert torch.get_num_threads() == 16
    set_threads(1)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("threads", [0, -2])
def test_less_than_one_is_refused(threads: int) -> None:
    with pytest.raises(ConfigError, match=f"--threads must be at least 1, got {threads}"):
        set_threads(threads)


def test_the_summary_of_inputs_shows_the_threads(tmp_path: Path) -> None:
    data = draw_folder(tmp_path, train=0, val=10, conflict=0)
    done = run_script(
        *("-m", "mae_dat", "features", "--checkpoint", "mae_dat_demo", "--data_path", data, "--threads", "3"),
        *("--num_workers", "0", "--device", "cpu", "--output_dir", tmp_path / "out"),
    )
    assert done.returncode == 0, done.stderr
    assert ", 3 threads" in done.stderr
