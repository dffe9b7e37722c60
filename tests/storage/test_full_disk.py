"""Writes without space, by a real limit on the size of files: path and bytes, no traceback, no fragments."""

import contextlib
import errno
import resource
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_runs import run_script

import mae_dat
from mae_dat.config.errors import StorageError
from mae_dat.config.parse import run_command
from mae_dat.runtime.run_log import RunLog


@contextlib.contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As on a disk with so many free bytes: larger files raise EFBIG, since Python ignores SIGXFSZ."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("to", "name"),
    [
        ("hf", "folder"),
        ("timm", "model.pth"),
        ("timm", "model.safetensors"),
        pytest.param("onnx", "model.onnx", marks=pytest.mark.slow),
        pytest.param("export", "model.pt2", marks=pytest.mark.slow),
    ],
)
def test_a_conversion_leaves_no_fragments(to: str, name: str, tmp_path: Path) -> None:
    with (
        largest_file(100_000),
        pytest.raises(StorageError, match=rf"could not write {tmp_path}/{name}.*no space left.*[\d,]+ bytes free"),
    ):
        mae_dat.convert("mae_dat_demo", tmp_path / name, to=to)
    assert not list(tmp_path.iterdir())


def test_tensorboard_names_its_files_and_prints_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = threading.excepthook
    log = RunLog(tmp_path)
    message = rf"could not write {tmp_path}/events\.out\.tfevents.*no space left.*[\d,]+ bytes free"

    def write() -> None:
        for step in range(2000):
            log.scalars({"train_loss": 1.0}, step)
        log.flush()

    with largest_file(10_000), pytest.raises(StorageError, match=message):
        write()
    with contextlib.suppress(StorageError):
        log.close()
    assert "Traceback" not in capsys.readouterr().err
    threading.excepthook = before
    other = tmp_path / "other"
    other.mkdir()
    with largest_file(0), pytest.raises(StorageError, match=r"could not write .*bytes free"):
        RunLog(other)


def test_a_training_on_a_full_disk_says_so_at_its_start(tmp_path: Path) -> None:
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500)); "
        "from mae_dat.cli import main; sys.argv = ['mae-dat', *sys.argv[1:]]; main()"
    )
    output = tmp_path / "out"
    flags = ["--data_path", "demo", "--model", "mae_vit_demo_patch8", "--input_size", "64", "--num_workers", "0"]
    done = run_script("-c", script, "pretrain", *flags, "--output_dir", output)
    assert done.returncode == StorageError.exit_code, done.stderr
    assert f"could not write {output}/" in done.stderr
    assert "bytes free" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(output.glob("*.tmp"))


def test_any_other_full_disk_is_named_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "table.csv"))

    with pytest.raises(SystemExit) as stopped:
        run_command(fail)
    assert stopped.value.code == StorageError.exit_code
    assert f"error: could not write {tmp_path}/table.csv: no space left (" in capsys.readouterr().err
