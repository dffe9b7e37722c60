"""What happens to files between runs, or is done to them: nothing damaged is loaded, nothing hostile is executed, and
what was saved before a fault is still there."""

import io
import json
import logging
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import names, save, state
from hostile import as_archive, code, hostile_files, torch_pickle, traps

from mae_dat.config.errors import CheckpointError, StorageError
from mae_dat.models.tokenizer import load_tokenizer
from mae_dat.models.weights.convert import convert
from mae_dat.models.weights.open import open_model
from mae_dat.models.weights.read import read_model_file
from mae_dat.runtime.run_log import RunLog
from mae_dat.storage.checkpoint import find_checkpoint, newest_checkpoint, save_checkpoint, verify_checkpoint
from mae_dat.storage.files import sha256_of
from mae_dat.storage.host_copy import Snapshot
from mae_dat.storage.weight_files import read_weights

ROOT = Path(__file__).parents[2]
MUTATIONS = int(os.environ.get("MAE_DAT_MUTATIONS", "2000"))  # 100000 take two minutes


# ---- damage ----


def mutate(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """Cut, flipped bit, zeroed page, spliced with another file, bytes added, stretch doubled, wrong magic, header that
    promises too much, all of another."""
    place, length = rng.randrange(len(content)), rng.randrange(1, 4096)
    page = place // 4096 * 4096
    end = content[page : page + 4096]
    return rng.choice(
        (
            content[:place],
            content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :],
            content[:page] + bytes(len(end)) + content[page + len(end) :],
            content[:place] + other[place:],
            content + rng.randbytes(length),
            content[:place] + content[place : place + length] + content[place:],
            rng.choice((b"\x80\x04", b"PK\x05\x06", b"<html>", b"\x93NUMPY")) + content[4:],
            content[:place] + b"\xff" * 8 + content[place + 8 :],
            other,
        )
    )


def test_no_mutation_is_ever_loaded(tmp_path: Path) -> None:
    """Of the weights, of the manifest, or of both: what was saved, an earlier one, or an error."""
    path = save(tmp_path, 1, 2)
    kinds = [path, path.with_suffix(".json")]
    whole = {file: file.read_bytes() for file in kinds}
    other = {file: (tmp_path / file.name.replace("2", "1")).read_bytes() for file in kinds}
    rng, tried = random.Random(0), 0
    logging.disable(logging.WARNING)
    try:
        while tried < MUTATIONS:
            chosen = rng.choice([[kinds[0]], [kinds[1]], kinds])
            for file in chosen:
                file.write_bytes(mutate(whole[file], other[file], rng))
            if all(file.read_bytes() == whole[file] for file in kinds):
                continue  # a stretch that was zero already
            tried += 1
            with pytest.raises(CheckpointError):
                verify_checkpoint(kinds[1])
            found = newest_checkpoint(tmp_path)
            assert found is not None
            assert found.step == 1
            for file in chosen:
                file.write_bytes(whole[file])
    finally:
        logging.disable(logging.NOTSET)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert torch.equal(found.load()["weights"], state(2)["weights"])


def test_swapped_names_are_noticed(tmp_path: Path) -> None:
    for ends in (("pth",), ("json",), ("pth", "json")):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        save(tmp_path, 1, 2)
        for end in ends:
            one, two = (tmp_path / f"checkpoint-0000000{step}.{end}" for step in (1, 2))
            one.rename(tmp_path / "aside")
            two.rename(one)
            (tmp_path / "aside").rename(two)
        assert newest_checkpoint(tmp_path) is None


# ---- hostility ----


def manifest_of(path: Path) -> None:
    """A manifest that fits: only what is inside can give the file away."""
    facts = {"version": 1, "step": 1, "sha256": sha256_of(path), "size": path.stat().st_size}
    path.with_suffix(".json").write_text(json.dumps(facts))


def resume(path: Path) -> Any:
    manifest_of(path)
    return find_checkpoint(path).load()


def resume_folder(path: Path) -> Any:
    folder = path.with_suffix(".run")
    folder.mkdir(exist_ok=True)
    shutil.copyfile(path, folder / "checkpoint-00000001.pth")
    manifest_of(folder / "checkpoint-00000001.pth")
    return read_model_file(folder)


def convert_it(path: Path) -> Any:
    return convert(path, path.with_name("converted.pth"), to="mae")


LOADERS: dict[str, Callable[[Path], Any]] = {
    "weights": read_weights,
    "file": read_model_file,
    "model": open_model,
    "tokenizer": load_tokenizer,
    "resume": resume,
    "folder": resume_folder,
    "convert": convert_it,
}


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_no_loader_executes_what_a_file_says(loader: str, suffix: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    files = hostile_files(canary)
    assert len(files) > 60
    for name, content in files.items():
        path = tmp_path / f"hostile{suffix}"
        path.with_suffix(".json").unlink(missing_ok=True)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"hostile|checkpoint-00000001"):
            pytest.fail(f"{name} was loaded: {LOADERS[loader](path)}")
        assert not canary.exists(), name
    assert not (tmp_path / "converted.pth").exists()


class ExecutingUnpickler(pickle.Unpickler):
    """Executes what a pickle says, and makes a storage for each reference to one."""

    def persistent_load(self, pid: object) -> torch.storage.TypedStorage:
        return torch.storage.TypedStorage(2)


def test_the_hostile_files_are_hostile(tmp_path: Path) -> None:
    """Where pickles are executed, each of them leaves the canary."""
    canary = tmp_path / "canary"
    for name, pickled in code(canary).items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a process that nobody waits for
            try:
                made = ExecutingUnpickler(io.BytesIO(pickled)).load()
            except (TypeError, AttributeError, ValueError, IndexError, RuntimeError):
                made = None  # what the code left behind need not be of use to the pickle
            if name == "partial":
                made()
            if hasattr(made, "wait"):
                made.wait()
            del made
        assert canary.exists(), name
        canary.rmdir() if canary.is_dir() else canary.unlink()


def peak_memory() -> int:
    """Most bytes in memory since `forget_peak`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


def test_no_file_fills_the_memory_or_hangs(tmp_path: Path) -> None:
    for name, content in traps().items():
        path = tmp_path / (name if name.endswith(".safetensors") else f"{name}.pth")
        path.write_bytes(content)
        for load in (read_weights, load_tokenizer):
            before, began = forget_peak(), time.process_time()
            with pytest.raises(CheckpointError, match="contains no weights|cannot be read as weights") as error:
                load(path)
            assert str(path) in str(error.value)
            assert peak_memory() - before < 128 << 20, name
            assert time.process_time() - began < 20, name


def test_an_archive_of_ones_own_is_read_where_it_is_as_torch_writes_it(tmp_path: Path) -> None:
    """The traps and the hostile files are refused for what is in them, not for how they are made here."""
    path = tmp_path / "own.pth"
    path.write_bytes(as_archive(torch_pickle({"model": {"w": torch.ones(2)}})))
    assert read_weights(path).tensors["w"].tolist() == [1, 1]


# ---- a full disk ----


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)], capture_output=True)
    if done.returncode != 0:
        pytest.skip(
            "mounting a file system needs root; tests/storage/test_weight_files.py limits the size of files instead"
        )
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def told_by_saving(folder: Path, step: int, state: dict[str, Any]) -> str | None:
    """The error of a save, None for none."""
    try:
        save_checkpoint(folder, step, state, keep_newest=1)
    except StorageError as error:
        return str(error)
    return None


def test_a_full_disk_never_costs_what_was_saved(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 saves, from one that fits to one that has no byte; half of them with a disk that fills only meanwhile."""
    weights = {"weights": torch.ones(1 << 18)}  # 1 MiB
    saved, failed, filler = 1, 0, small_disk / "filler"
    save_checkpoint(small_disk, saved, weights, keep_newest=1)
    for step in range(2, 102):
        free = shutil.disk_usage(small_disk).free
        filler.write_bytes(bytes(max(0, free - random.Random(step).randrange(5 << 18))))
        monkeypatch.undo()
        if step % 2:
            monkeypatch.setattr(Snapshot, "size", 0)  # nothing is known before
        weights["weights"].fill_(step)
        told = told_by_saving(small_disk, step, weights)
        if told is None:
            saved = step
        else:
            failed += 1
            assert f"{small_disk}/checkpoint-{step:08d}." in told
            needed = "" if step % 2 or ".json" in told else "1,048,576 bytes needed, "
            assert re.search(rf"no space left \({needed}[\d,]+ bytes free", told), told
        filler.unlink()
        found = newest_checkpoint(small_disk)
        assert found is not None
        assert found.step == saved
        assert bool((found.load()["weights"] == saved).all())
        assert names(small_disk) == [f"checkpoint-{saved:08d}.json", f"checkpoint-{saved:08d}.pth"]
    assert 10 < failed < 95


def test_a_manifest_that_did_not_fit_takes_its_weights_with_it(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(small_disk, 1, {"weights": torch.zeros(9)})
    before = names(small_disk)
    with pytest.raises(StorageError, match=r"checkpoint-00000002.json: no space left \([\d,]+ bytes free there"):
        save_checkpoint(small_disk, 2, {"weights": torch.zeros(9)}, settings="long" * (1 << 20))
    assert names(small_disk) == before


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writing thread
def test_a_full_disk_is_told_by_the_log_too(small_disk: Path) -> None:
    before = set(threading.enumerate())
    log = RunLog(small_disk)
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free))
    with pytest.raises(StorageError, match=r"log.txt: no space left \(0 bytes free there\)"):
        log.record({"step": 1})
    with pytest.raises(StorageError, match=r"no space left"):
        for position in range(10_000):
            log.scalars({"loss": 1.0}, position)
        log.close()
    with pytest.raises(StorageError):
        log.close()
    for thread in set(threading.enumerate()) - before:  # what it dies of must be this test's, not the next one's
        thread.join(30)


# ---- killed writers and readers that come at the wrong time ----

WRITERS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from mae_dat.storage.checkpoint import Saver, find_checkpoint, newest_checkpoint, delete_unfinished
from mae_dat.config.errors import CheckpointError

torch.set_num_threads(1)  # OpenMP's threads do not survive a fork

def write(folder, step, size, count, keep=2):
    "Saves in the background as a training does, changing the weights in between."
    weights, saver = torch.full((size,), float(step)), Saver(folder, keep)
    for _ in range(count):
        step += 1
        saver.before_change()
        weights.fill_(step)
        saver.save(step, {"weights": weights, "step": step})
    saver.close()

def forked(*arguments):
    pid = os.fork()
    if pid == 0:
        try:
            write(*arguments)
        finally:
            os._exit(0)
    return pid

def checked(found):
    loaded = found.load()
    assert loaded["step"] == found.step and bool((loaded["weights"] == found.step).all()), found
    return found.step

kills, folder = Path(sys.argv[1]) / "kills", Path(sys.argv[1]) / "readers"
kills.mkdir(), folder.mkdir()
rng, last, left = random.Random(0), 0, 0
for turn in range(25):
    pid = forked(kills, last, 1 << 22, 10**9)  # 16 MiB
    # Not for the next one by its name: on a busy machine it is deleted again before this process sees it.
    while max((int(path.stem[-8:]) for path in kills.glob("checkpoint-*.json")), default=0) <= last:
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 0.12))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    step = checked(newest_checkpoint(kills))
    assert step > last
    last = step
    left += len(list(kills.glob(".*.tmp")))
    delete_unfinished(kills)
    assert len(list(kills.iterdir())) <= 6, list(kills.iterdir())
print("kills", last, "unfinished", left)

pid, read, last = forked(folder, 0, 1 << 18, 200, 1), 0, 0
while os.waitpid(pid, os.WNOHANG) == (0, 0):
    found = newest_checkpoint(folder)
    if found is None:
        assert last == 0, "before the first"
        continue
    try:
        step = checked(found)
    except CheckpointError:
        assert not found.path.exists()  # it was deleted as too old, as a whole
        continue
    assert step >= last
    last, read = step, read + 1
assert checked(newest_checkpoint(folder)) == 200
print("read", read)
"""


@pytest.mark.slow
def test_writers_killed_at_any_moment_and_readers_while_they_write(tmp_path: Path) -> None:
    """25 SIGKILLs among saves of 16 MiB, and a reader beside 200 saves. One process forks all others."""
    command = [sys.executable, "-W", "ignore", "-c", WRITERS, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    told = done.stdout.split()
    assert int(told[1]) >= 25
    assert int(told[3]) > 0, "no kill met a save"
    assert int(told[5]) > 0
