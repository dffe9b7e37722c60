"""What befalls data while a run reads it: a bad image amid an epoch, a worker that is killed, a disk that hiccups."""

import errno
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import exit_codes, start_ranks
from tiny_runs import FINETUNE, draw_folder, one_thread, pretrain_in, verb  # noqa: F401 - one by itself
from torch.utils.data import Dataset
from torchvision.transforms.functional import to_tensor

from mae_dat.config.errors import DataError, RetryError, StorageError, UserError
from mae_dat.config.parse import run_command
from mae_dat.data import decode as decoding
from mae_dat.data.decode import decode_file
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.loader import batch_loader
from mae_dat.data.sampler import epoch_order
from mae_dat.runtime.run_log import read_log


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return draw_folder(tmp_path / "images", train=24, val=10, conflict=0)


# ---- reading ----


def flaky(failures: int, number: int) -> Callable[..., Any]:
    """`open`, which fails so many times first."""
    left = [failures]

    def opens(*arguments: Any, **options: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return open(*arguments, **options)

    return opens


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_passing_fault_of_the_disk_is_waited_for(
    number: int, images: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, pauses = next(images.rglob("*.png")), []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(decoding, "open", flaky(3, number), raising=False)
    assert decode_file(path).size == (32, 32)
    assert caplog.text.count(f"{path}: {os.strerror(number)}; trying again") == 3
    assert [0.5 <= pause / (0.5 * 2**attempt) <= 1.5 for attempt, pause in enumerate(pauses)] == [True] * 3


def test_a_disk_that_stays_away_stops_the_run_even_if_bad_images_are_skipped(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ImageFolder(images / "train", to_tensor, on_bad="skip")
    monkeypatch.setattr(decoding, "_PAUSE_S", 0.0)
    monkeypatch.setattr(decoding, "open", flaky(4, errno.EIO), raising=False)
    with pytest.raises(StorageError, match=r"\.png: Input/output error, 4 times in a row") as caught:
        folder[0]
    assert caught.value.exit_code == 74
    assert folder[0]["skipped"] == 0


def test_a_fault_that_stays_is_not_waited_for(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("it waited"))
    monkeypatch.setattr(decoding, "open", flaky(1, errno.EACCES), raising=False)
    with pytest.raises(DataError, match=r"cannot be read \(Permission denied\)"):
        decode_file(next(images.rglob("*.png")))


def test_a_file_too_large_for_an_image_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "x.jpg").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="more than the allowed 256 MiB"):
        decode_file(tmp_path / "x.jpg")


# ---- a worker that is killed ----


def test_a_killed_worker_is_told_of_and_the_run_goes_on_as_if_nothing_had_happened(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--num_workers", "2", "--epochs", "2"]
    pretrain_in(tmp_path / "whole", images, *flags)
    main, read, pixels = os.getpid(), [0], ImageFolder.load_pixels

    def deadly(folder: ImageFolder, index: int) -> np.ndarray:
        if os.getpid() != main:
            read[0] += 1
            if read[0] == 14:  # in the second epoch, in whichever worker comes to it first
                (tmp_path / "killed").write_text(str(time.time()))
                os.kill(os.getpid(), signal.SIGKILL)
        return pixels(folder, index)

    with monkeypatch.context() as patch:
        patch.setattr(ImageFolder, "load_pixels", deadly)
        with pytest.raises(RetryError, match=r"worker was killed .*/dev/shm\. Lower --num_workers") as caught:
            pretrain_in(tmp_path / "parts", images, *flags)
    assert time.time() - float((tmp_path / "killed").read_text()) < 10
    assert caught.value.exit_code == 75
    pretrain_in(tmp_path / "parts", images, *flags)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


class Pids(Dataset[Any]):
    """The worker's pid; item 0 breaks the connection in the process that receives it, and kills its worker later."""

    def __getitem__(self, index: int) -> Any:
        if index == 2:
            raise RuntimeError("a fault of the code")
        return os.getpid() if index else BreaksOff(os.getpid())


class BreaksOff(UserError):
    """A user's error is what loaders hand over as it is."""

    def __init__(self, pid: int) -> None:
        super().__init__(str(pid))
        self.pid = pid

    def __reduce__(self) -> tuple[Callable[[int], None], tuple[int]]:
        return break_off, (self.pid,)


def break_off(pid: int) -> None:
    """As when a worker is killed while it hands over a tensor: the connection ends before the process does."""
    threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
    raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))


def test_a_connection_that_breaks_before_the_worker_is_dead_is_told_of_too() -> None:
    with pytest.raises(RetryError, match=r"a loader's worker was killed \(pid \d+: SIGKILL\)") as caught:
        list(batch_loader(Pids(), [[1], [0]], num_workers=1))
    assert isinstance(caught.value.__cause__, ConnectionResetError)


def test_a_killed_worker_is_told_of_by_the_loader_and_not_amid_other_work() -> None:
    pids = iter(batch_loader(Pids(), [[1]] * 9, num_workers=2))
    victim = int(next(pids)[0])
    os.kill(victim, signal.SIGKILL)
    while Path(f"/proc/{victim}/stat").read_text().split()[2] != "Z":
        time.sleep(0.01)
    time.sleep(0.1)  # torch's handler would have raised here
    with pytest.raises(RetryError, match=f"pid {victim}: SIGKILL"):
        list(pids)


def test_an_error_of_a_worker_that_lives_is_raised_as_it_is() -> None:
    with pytest.raises(RuntimeError, match="a fault of the code"):
        list(batch_loader(Pids(), [[1], [2]], num_workers=1))


# ---- a bad image on two ranks ----


def finetune_on_rank(rank: int, arguments: list[str]) -> None:
    """The command, as a process of its own would run it."""
    main = verb("finetune")

    run_command(lambda: main(arguments))


@pytest.mark.slow
def test_a_bad_image_amid_an_epoch_is_counted_alike_or_stops_all_ranks(images: Path, tmp_path: Path) -> None:
    """The second update's part of rank 1 holds it."""
    index = int(epoch_order(24, seed=0, epoch=0)[8 + 4 + 1])
    bad = Path(ImageFolder(images / "train", to_tensor).name_of(index))
    bad.write_bytes(bad.read_bytes()[:300])
    small = [*FINETUNE, "--data_path", str(images), "--batch_size", "4"]
    runs = {}
    for on_bad in ("skip", "fail"):
        arguments = [*small, "--on_bad", on_bad, "--output_dir", str(tmp_path / on_bad)]
        runs[on_bad] = start_ranks(2, finetune_on_rank, arguments, log=tmp_path / f"log-{on_bad}")
    assert exit_codes(runs["skip"], 120) == [0, 0]
    assert exit_codes(runs["fail"], 120) == [65, 65]
    skipped = [(tmp_path / f"log-skip-{rank}").read_text() for rank in (0, 1)]
    assert [len(re.findall(r"replaced in this epoch: 1 unreadable image ", text)) for text in skipped] == [1, 1]
    assert [text.count(f"skipped: {bad}: the image is damaged or truncated") for text in skipped] == [0, 1]
    assert read_log(tmp_path / "skip" / "log.txt")[0]["skipped"] == 1
    failed = [(tmp_path / f"log-fail-{rank}").read_text() for rank in (0, 1)]
    assert all(f"{bad}: the image is damaged or truncated" in text for text in failed)
    assert not any("Traceback" in text for text in failed)
    assert list((tmp_path / "fail").glob("checkpoint-*.pth")), "what was learned before is saved"
