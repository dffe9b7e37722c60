"""`mae-dat doctor`: the table of this machine, exit codes, and installations that are broken."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from mae_dat.config.commands.doctor import DoctorConfig
from mae_dat.config.errors import ConfigError, InstallationError
from mae_dat.experiments.doctor import main

QUICK = ("versions", "devices", "disks")
ALL = (*QUICK, "one run of each kind", "several processes", "largest batch")


def check_table(text: str, titles: tuple[str, ...]) -> None:
    """Check the titles and the width of a table."""
    lines = text.splitlines()
    assert [line for before, line in zip(["", *lines], lines, strict=False) if not before and line in ALL] == [*titles]
    assert max(map(len, lines)) <= 80


def test_the_quick_table_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MAE_DAT_HOME", "cache")
    monkeypatch.chdir(tmp_path)
    main(DoctorConfig(quick=True))
    text = capsys.readouterr().out
    check_table(text, QUICK)
    for name in ("Python", "torch", "torchvision", "timm", "numpy", "opencv", "GPU", "precision", "/dev/shm"):
        assert any(line.split()[1:2] == [name] for line in text.splitlines() if line.startswith("  ")), name
    assert text.rstrip().endswith("none failed.")
    assert not list(tmp_path.iterdir())


def test_problems_are_named_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_bytes(b"")
    monkeypatch.setenv("MAE_DAT_HOME", "file")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InstallationError, match=r"^failed: opencv, cache folder\. The table shows") as caught:
        main(DoctorConfig(quick=True))
    assert caught.value.exit_code == 78
    text = capsys.readouterr().out
    check_table(text, QUICK)
    assert text.count("\n  failed ") == 2
    assert text.count("fix: ") >= 2


def test_several_ranks_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="single process"):
        main(DoctorConfig(quick=True))


def doctor(tmp_path: Path, *flags: str, **changes: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "MAE_DAT_HOME": "cache", **changes}
    command = [sys.executable, "-m", "mae_dat", "doctor", *flags]
    try:
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=1200)
    except subprocess.TimeoutExpired as error:
        processes = subprocess.run(["ps", "-ef"], capture_output=True, text=True, check=False).stdout
        pytest.fail(f"the command did not end.\n{error.stdout!r}\n{error.stderr!r}\n{processes}")


@pytest.mark.slow
def test_the_table_of_this_machine(tmp_path: Path) -> None:
    temporary = tmp_path / ("temporary" * 8)  # longer than the path of a socket may be
    temporary.mkdir()
    done = doctor(tmp_path, "--device", "cpu", TMPDIR=str(temporary), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    check_table(done.stdout, ALL)
    assert "\n  ok       DAT " in done.stdout
    assert "\n  ok       two ranks " in done.stdout
    assert "--batch_size 64 --accum_iter 16" in done.stdout
    # torch itself makes an empty folder of this name.
    assert not [file for file in temporary.iterdir() if not file.name.startswith("torchinductor")]
    assert list(tmp_path.iterdir()) == [temporary]


@pytest.mark.slow
def test_a_check_that_hangs_ends_with_its_stacks(tmp_path: Path) -> None:
    code = (
        "import time; from mae_dat.experiments import doctor; doctor._HANG_MINUTES = 0.1\n"
        "doctor.versions.check_package = lambda: time.sleep(1000)\n"
        "from mae_dat.config.commands.doctor import DoctorConfig; doctor.main(DoctorConfig(quick=True))"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MAE_DAT_HOME": "cache"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 75
    assert done.stdout.splitlines()[-1] == "versions"
    assert "finished no step for 6 s" in done.stderr
    assert "in run_check" in done.stderr


@pytest.mark.slow
def test_packages_that_cannot_be_imported_leave_the_other_checks(tmp_path: Path) -> None:
    """torchvision as with another torch, and OpenCV as on a server without libGL."""
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')\n")
    (tmp_path / "cv2.py").write_text("raise ImportError('libGL.so.1: cannot open shared object file')\n")
    done = doctor(tmp_path, "--quick")
    assert done.returncode == InstallationError.exit_code, done.stderr
    assert done.stderr.startswith("error: failed: torchvision, ")
    check_table(done.stdout, QUICK)
    assert "operator torchvision::nms" in " ".join(done.stdout.split())
    assert "install both from one index" in " ".join(done.stdout.split())
    assert 'pip install "opencv-python-headless' in " ".join(done.stdout.split())
    assert "\n  ok       torch " in done.stdout
    assert "\n  ok       numpy " in done.stdout
