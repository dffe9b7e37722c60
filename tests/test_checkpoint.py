"""Checkpoints: whatever happens to the files, what is loaded is what was saved."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mae_dat.checkpoint import find_checkpoint, newest_checkpoint, save_checkpoint, sweep, verify
from mae_dat.errors import CheckpointError, MissingInputError, StorageError


def state(step: int) -> dict[str, Any]:
    return {"weights": torch.full((64, 33), float(step)), "step": step, "totals": {"loss": 0.5}, "ema": None}


def save(folder: Path, *steps: int, keep: int = 9) -> Path:
    for step in steps:
        path = save_checkpoint(folder, step, state(step), keep, epoch=step / 4, settings={"size": [64, 48]})
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_newest_is_found_and_holds_what_was_saved(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    save(tmp_path, 9, 100000000, 10)
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 100000000, "by number, not by name or time"
    loaded = found.load()
    assert torch.equal(loaded["weights"], state(100000000)["weights"])
    assert (loaded["step"], loaded["totals"], loaded["ema"]) == (100000000, {"loss": 0.5}, None)
    assert found.manifest["settings"] == {"size": [64, 48]}
    assert found.manifest["size"] == found.path.stat().st_size


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3, 4, 5, keep=2)
    assert names(tmp_path) == [f"checkpoint-0000000{step}.{end}" for step in (4, 5) for end in ("json", "pth")]
    save(tmp_path, 6, keep=0)
    assert names(tmp_path) == ["checkpoint-00000006.json", "checkpoint-00000006.pth"], "never the one just written"


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    for name in ("checkpoint-799.pth", "checkpoint-best.json", "checkpoint-00000001.pth", "notes.json"):
        (tmp_path / name).write_bytes(b"mine")
    save(tmp_path, 2, 3, 4, keep=1)
    assert {"checkpoint-799.pth", "checkpoint-best.json", "checkpoint-00000001.pth", "notes.json"} < {*names(tmp_path)}
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 4


def test_a_damaged_one_never_takes_the_place_of_a_valid_one(tmp_path: Path) -> None:
    damaged = save(tmp_path, 100)
    damaged.write_bytes(b"")
    for step in (10, 20):
        save(tmp_path, step, keep=1)
        found = newest_checkpoint(tmp_path)
        assert found is not None
        assert found.step == step
    assert not (tmp_path / "checkpoint-00000010.pth").exists()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero_page(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(4096)
    path.write_bytes(content)


def change_manifest(path: Path, **values: Any) -> None:
    manifest = path.with_suffix(".json")
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **values}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 1), "checkpoint-00000002.pth is damaged"),
    "empty": (lambda path: os.truncate(path, 0), "checkpoint-00000002.pth is damaged"),
    "gone": (lambda path: path.unlink(), "checkpoint-00000002.pth is damaged or missing"),
    "flipped bit": (flip, "checkpoint-00000002.pth is damaged"),
    "zeroed page": (zero_page, "checkpoint-00000002.pth is damaged"),
    "another's manifest": (
        lambda path: path.with_suffix(".json").write_bytes((path.parent / "checkpoint-00000001.json").read_bytes()),
        "checkpoint-00000002.json is of step 1: it belongs to another checkpoint",
    ),
    "another's weights": (
        lambda path: path.write_bytes((path.parent / "checkpoint-00000001.pth").read_bytes()),
        "checkpoint-00000002.pth is damaged",
    ),
    "another step": (lambda path: change_manifest(path, step=3), "is of step 3"),
    "torn manifest": (lambda path: os.truncate(path.with_suffix(".json"), 40), "checkpoint-00000002.json is damaged"),
    "no manifest's content": (lambda path: path.with_suffix(".json").write_text("[1]"), "00002.json is damaged"),
    "manifest without hash": (lambda path: path.with_suffix(".json").write_text('{"version": 1, "step": 2}'), "sha256"),
    "senseless version": (lambda path: change_manifest(path, version=None), "checkpoint-00000002.json is damaged"),
    "future": (lambda path: change_manifest(path, version=3), "format 3, newer than this program's 2: update"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_and_named(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1, 2)
    path = tmp_path / "checkpoint-00000002.pth"
    spoil, message = DAMAGES[damage]
    spoil(path)
    with caplog.at_level(logging.WARNING):
        found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == found.load()["step"] == 1
    assert message in caplog.text
    assert "Passed over." in caplog.text
    if path.exists():
        with pytest.raises(CheckpointError, match="checkpoint-00000002"):
            find_checkpoint(path)


def test_without_its_manifest_a_checkpoint_does_not_count(tmp_path: Path) -> None:
    path = save(tmp_path, 1, 2)
    path.with_suffix(".json").unlink()
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1
    with pytest.raises(CheckpointError, match=r"has no manifest checkpoint-00000002.json.*--finetune"):
        find_checkpoint(path)


def mutate(content: bytes, other: bytes, rng: random.Random) -> bytes:
    """One of: cut, flipped bit, zeroed stretch, spliced with another file, bytes added, stretch doubled."""
    place, length = rng.randrange(len(content)), rng.randrange(1, 4096)
    kind = rng.randrange(6)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
    if kind == 2:
        stretch = content[place : place + length]
        return content[:place] + bytes(len(stretch)) + content[place + len(stretch) :]
    if kind == 3:
        return content[:place] + other[place:]
    if kind == 4:
        return content + rng.randbytes(length)
    return content[:place] + content[place : place + length] + content[place:]


def test_no_mutation_is_ever_loaded(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir()
    second.mkdir()
    path, other = save(first, 1), save(second, 2)
    whole, foreign = path.read_bytes(), other.read_bytes()
    rng, tried = random.Random(0), 0
    while tried < 200:
        mutated = mutate(whole, foreign, rng)
        if mutated == whole:
            continue  # a stretch that was zero already
        tried += 1
        path.write_bytes(mutated)
        with pytest.raises(CheckpointError):
            verify(path.with_suffix(".json"))
        assert newest_checkpoint(first) is None
    path.write_bytes(whole)
    assert newest_checkpoint(first) is not None


def test_resume_takes_a_folder_or_a_file(tmp_path: Path) -> None:
    path = save(tmp_path, 3, 4)
    assert find_checkpoint(tmp_path).step == 4
    assert find_checkpoint(tmp_path / "checkpoint-00000003.pth").step == 3
    assert find_checkpoint(path).path == path
    copied = tmp_path / "best.pth"
    copied.write_bytes(path.read_bytes())
    copied.with_suffix(".json").write_bytes(path.with_suffix(".json").read_bytes())
    assert find_checkpoint(copied).step == 4, "a renamed copy is as good"


def test_resume_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="no such checkpoint: .*nowhere.pth"):
        find_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(MissingInputError, match=f"no valid checkpoint.* in {tmp_path}"):
        find_checkpoint(tmp_path)


def test_sweep_removes_what_a_killed_save_left(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / ".checkpoint-00000002.pth.abc.tmp").write_bytes(b"half")
    before = names(tmp_path)
    sweep(tmp_path)
    assert names(tmp_path) == before[1:]


def test_a_save_that_fails_leaves_the_older_ones(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = names(tmp_path)
    with pytest.raises((StorageError, OSError)):
        (tmp_path / "checkpoint-00000002.pth").mkdir()  # in the way of the rename
        save(tmp_path, 2, keep=1)
    assert names(tmp_path) == sorted([*before, "checkpoint-00000002.pth"])
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


SAVER = """
import sys, torch
from pathlib import Path
from mae_dat.checkpoint import newest_checkpoint, save_checkpoint
folder = Path(sys.argv[1])
found = newest_checkpoint(folder)
step = found.step if found else 0
print("ready", flush=True)
while True:
    step += 1
    save_checkpoint(folder, step, {"weights": torch.full((1 << 20,), float(step)), "step": step}, keep=2)
"""


@pytest.mark.slow
def test_a_saver_killed_at_any_moment_leaves_a_valid_newest(tmp_path: Path) -> None:
    rng, last = random.Random(0), 0
    for _ in range(10):
        command = [sys.executable, "-c", SAVER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as saver:
            assert saver.stdout is not None
            assert saver.stdout.readline() == b"ready\n"
            deadline = time.monotonic() + 60
            while newest_checkpoint(tmp_path) is None and time.monotonic() < deadline:
                time.sleep(0.01)  # before the first save there is nothing to find
            time.sleep(rng.uniform(0, 0.3))
            saver.send_signal(signal.SIGKILL)
        found = newest_checkpoint(tmp_path)
        assert found is not None
        loaded = found.load()
        assert loaded["step"] == found.step >= last
        assert bool((loaded["weights"] == float(found.step)).all())
        last = found.step
    assert last > 10
