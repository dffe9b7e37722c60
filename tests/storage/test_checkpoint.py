"""Checkpoints: whatever happens to the files, what is loaded is what was saved."""

import io
import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_states import names, save, state
from torch import Tensor, nn

from mae_dat.config.errors import CheckpointError, MissingInputError, OutputError, StorageError
from mae_dat.storage.checkpoint import (
    Saver,
    _manifest_text,
    delete_unfinished,
    find_checkpoint,
    newest_checkpoint,
    verify_checkpoint,
)
from mae_dat.storage.host_copy import LARGE, HostBuffers, Snapshot

GOLDEN = Path(__file__).parents[1] / "golden"


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
        "checkpoint-00000002.json records step 1, so it belongs to another checkpoint",
    ),
    "another's weights": (
        lambda path: path.write_bytes((path.parent / "checkpoint-00000001.pth").read_bytes()),
        "checkpoint-00000002.pth is damaged",
    ),
    "another step": (lambda path: change_manifest(path, step=3), "records step 3"),
    "torn manifest": (lambda path: os.truncate(path.with_suffix(".json"), 40), "checkpoint-00000002.json is damaged"),
    "no manifest's content": (lambda path: path.with_suffix(".json").write_text("[1]"), "00002.json is damaged"),
    "manifest without hash": (lambda path: path.with_suffix(".json").write_text('{"version": 1, "step": 2}'), "sha256"),
    "senseless version": (lambda path: change_manifest(path, version=None), "checkpoint-00000002.json is damaged"),
    "future": (
        lambda path: change_manifest(path, version=3),
        "format 3, but this version of mae_dat reads up to 2: update",
    ),
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
    assert "Skipped." in caplog.text
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
    delete_unfinished(tmp_path)
    assert names(tmp_path) == before[1:]


def test_sweep_removes_weights_without_a_manifest_of_ours(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "checkpoint-00000002.json").unlink()
    for name in ("checkpoint-99.pth", "checkpoint-best.pth", "weights.pth"):
        (tmp_path / name).write_bytes(b"another's")
    before = names(tmp_path)
    delete_unfinished(tmp_path)
    assert sorted([*names(tmp_path), "checkpoint-00000002.pth"]) == before


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


def test_checkpoints_of_the_first_format_are_read(tmp_path: Path) -> None:
    found = newest_checkpoint(GOLDEN / "checkpoint_v1")
    assert found is not None
    assert (found.manifest["version"], found.step, found.load()["totals"]) == (1, 6, {"loss": 0.5})
    assert torch.equal(found.load()["weights"], torch.full((4, 3), 6.0))


def test_the_order_is_by_step_and_never_by_time(tmp_path: Path) -> None:
    save(tmp_path, 1, 2, 3)
    for step, day in ((1, 9), (2, 1), (3, 5)):  # a clock that jumped
        for end in ("json", "pth"):
            os.utime(tmp_path / f"checkpoint-{step:08d}.{end}", (86400.0 * day, 86400.0 * day))
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 3
    save(tmp_path, 4, keep=2)
    assert [name for name in names(tmp_path) if name.endswith("pth")] == [f"checkpoint-0000000{n}.pth" for n in (3, 4)]


# ---- what is kept ----


def kept_after(folder: Path, keep: int, *facts: dict[str, Any]) -> list[int]:
    saver = Saver(folder, keep)
    for step, each in enumerate(facts, 1):
        saver.save(step, state(step), **each)
    saver.close()
    return [int(path.stem[-8:]) for path in sorted(folder.glob("*.pth"))]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("settings", ["lr"], "settings must be an object of keys and values, not a list"),
        ("step", 2.5, "step must be a whole number, not 2.5"),
        ("global_batch", "64", 'global_batch must be a whole number, not "64"'),
        ("images", {"a": 1}, "images must be text, not an object"),
        ("image_files", {"sizes": "x"}, "image_files.times is missing"),
        ("code", {}, "code.sha256 is missing"),
        ("tokenizer_files", {"tokenizer": None}, "tokenizer_files.tokenizer must be text, not null"),
    ],
)
def test_a_manifest_of_others_is_checked_by_key(tmp_path: Path, key: str, value: Any, message: str) -> None:
    """Its checksum is right, as anyone can compute it."""
    save(tmp_path, 1)
    manifest = tmp_path / "checkpoint-00000001.json"
    facts = json.loads(manifest.read_text())
    del facts["check"]
    manifest.write_bytes(_manifest_text({**facts, key: value}))
    with pytest.raises(CheckpointError, match=rf"checkpoint-00000001\.json is damaged \({message}"):
        verify_checkpoint(manifest)
    with pytest.raises(MissingInputError, match="no valid checkpoint"):
        find_checkpoint(tmp_path)


def test_the_best_and_every_nth_are_kept_too(tmp_path: Path) -> None:
    scores = [0.1, 0.9, None, 0.5, float("nan"), 0.2, 0.9, 0.3, 0.4]
    facts = [{"score": score, "kept": step % 4 == 0} for step, score in enumerate(scores, 1)]
    assert kept_after(tmp_path, 1, *facts) == [4, 7, 8, 9], "of equal ones the later"


def test_the_last_are_kept_without_scores(tmp_path: Path) -> None:
    assert kept_after(tmp_path, 2, {}, {"score": None}, {}, {"kept": False}) == [3, 4]


def test_a_damaged_manifest_is_never_the_best(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "checkpoint-00000001.json").write_text('{"score": 1')
    (tmp_path / "checkpoint-00000002.json").write_text('["score"]')
    save(tmp_path, 3, keep=1)
    assert names(tmp_path) == ["checkpoint-00000003.json", "checkpoint-00000003.pth"]


# ---- in the background ----


class Net(nn.Module):
    """Tensors above and below the size that is copied in the background, a tied weight, a statistic, a large buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(600, 600), nn.Linear(600, 600)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(600)
        self.register_buffer("codebook", torch.zeros(700, 600))

    def forward(self, image: Tensor) -> Tensor:
        self.codebook += 1
        return self.head(self.norm(self.embed(image)))


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer, before: Callable[[], object]) -> None:
    net(torch.randn(8, 600, device=next(net.parameters()).device)).square().mean().backward()
    before()
    optimizer.step()
    optimizer.zero_grad()


def full_state(net: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, Any]:
    base = torch.arange(6.0)
    views = {"views": (base[2:4], base[::2]), "scalar": torch.tensor(3), "empty": [torch.zeros(0), torch.zeros(0)]}
    return {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "ema": None, **views}


def tensors_of(state: dict[str, Any]) -> list[Tensor]:
    of_optimizer = [value for each in state["optimizer"]["state"].values() for value in each.values()]
    return [*state["model"].values(), *of_optimizer]


def plainly_saved(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_what_is_written_in_the_background_equals_a_plain_save_byte_for_byte(tmp_path: Path) -> None:
    net = Net()
    assert net.embed.weight.nbytes > LARGE > net.embed.bias.nbytes
    optimizer = torch.optim.AdamW(net.parameters())
    saver, plain = Saver(tmp_path, keep_newest=9), {}
    for step in range(5):
        state = full_state(net, optimizer, step)
        plain[step] = plainly_saved(state)
        saver.save(step, state, copy_immediately=net.buffers())
        train_step(net, optimizer, saver.before_change)
        saver.check()
    saver.close()
    for step, expected in plain.items():
        assert (tmp_path / f"checkpoint-{step:08d}.pth").read_bytes() == expected
    assert len({*plain.values()}) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_state_on_a_gpu_is_saved_as_it_was(tmp_path: Path) -> None:
    net = Net().cuda()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    saver, expected = Saver(tmp_path, keep_newest=9), {}
    for step in range(8):
        state = full_state(net, optimizer, step)
        expected[step] = [value.cpu().clone() for value in tensors_of(state)]
        saver.save(step, state, copy_immediately=net.buffers())
        train_step(net, optimizer, saver.before_change)
    saver.close()
    for step, values in expected.items():
        found = tensors_of(torch.load(tmp_path / f"checkpoint-{step:08d}.pth", weights_only=True))
        assert not any(value.is_cuda for value in found)
        assert len(found) == len(values) >= 10
        assert all(torch.equal(one, other) for one, other in zip(found, values, strict=True))


def test_a_change_before_it_is_allowed_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    copy_large = Snapshot.copy_large
    monkeypatch.setattr(Snapshot, "copy_large", lambda snapshot: (free.wait(60), copy_large(snapshot)))
    net, saver = Net(), Saver(tmp_path)
    saver.save(1, {"model": net.state_dict()})
    with torch.no_grad():
        net.embed.weight.add_(1)
    free.set()
    with pytest.raises(RuntimeError, match="before_change"):
        saver.close()
    assert not names(tmp_path)


def test_an_update_waits_for_the_copy_and_for_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied, written = threading.Event(), threading.Event()
    copy_large, write_files = Snapshot.copy_large, Saver._write_files
    monkeypatch.setattr(Snapshot, "copy_large", lambda snapshot: (copied.wait(60), copy_large(snapshot)))
    monkeypatch.setattr(Saver, "_write_files", lambda *arguments: (written.wait(60), write_files(*arguments)))
    weights, saver = torch.ones(LARGE), Saver(tmp_path)
    saver.save(1, {"weights": weights})
    threading.Timer(0.2, copied.set).start()
    saver.before_change()
    assert copied.is_set()
    weights.zero_()
    assert saver.writing
    written.set()
    saver.close()
    assert not saver.writing
    assert bool((torch.load(tmp_path / "checkpoint-00000001.pth")["weights"] == 1).all())


def test_host_memory_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = []
    take = HostBuffers.take

    def noted(*arguments: Any) -> Tensor:
        buffer = take(*arguments)
        places.append(buffer.data_ptr())
        return buffer

    monkeypatch.setattr(HostBuffers, "take", noted)
    saver = Saver(tmp_path)
    for step in range(3):
        saver.save(step, {"large": torch.zeros(LARGE), "small": torch.zeros(3)})
    saver.close()
    assert len(places) == 6
    assert len({*places}) == 2


def test_a_snapshot_holds_what_it_was_given() -> None:
    weights = {"large": torch.randn(LARGE), "small": torch.randn(3)}
    buffers = HostBuffers()
    for step in range(3):
        weights["large"][0] = step
        snapshot = Snapshot(weights, buffers)
        snapshot.copy_large()
        assert all(torch.equal(snapshot.content[name], weights[name]) for name in weights)
        assert snapshot.size == sum(value.nbytes for value in weights.values())
        snapshot.release()


def wait_for_failure(saver: Saver, deadline: float) -> None:
    while time.monotonic() < deadline:
        saver.check()
        time.sleep(0.01)


def test_a_save_that_failed_is_told_at_a_later_step_and_only_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    saver = Saver(folder)
    saver.save(2, state(2))
    with pytest.raises(
        StorageError, match=r"could not write .*checkpoint-00000002.pth: there is no folder .*run"
    ) as error:
        wait_for_failure(saver, time.monotonic() + 60)
    assert error.value.exit_code == 74
    saver.check()
    folder.mkdir()
    saver.save(3, state(3))
    saver.close()
    assert names(folder) == ["checkpoint-00000003.json", "checkpoint-00000003.pth"]
    shutil.rmtree(folder)
    saver = Saver(folder)
    saver.save(4, state(4))
    with pytest.raises(StorageError):
        saver.close()
    saver.close()


def test_the_guard_is_asked_before_everything_that_is_written(tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def guard() -> None:
        asked.append(names(tmp_path))
        if len(asked) > 2:
            raise OutputError("taken over")

    saver = Saver(tmp_path, keep_newest=1, guard=guard)
    saver.save(1, state(1))
    saver.save(2, state(2))
    with pytest.raises(OutputError, match="taken over"):
        saver.close()
    assert asked == [[], ["checkpoint-00000001.pth"], ["checkpoint-00000001.json", "checkpoint-00000001.pth"]]
    assert names(tmp_path) == asked[2]


def test_a_save_can_be_given_up_midway(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before, large = names(tmp_path), {f"{index}": torch.zeros(LARGE) for index in range(16)}
    for _ in range(8):
        saver = Saver(tmp_path, keep_newest=1)
        saver.save(2, large)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".checkpoint-00000002*.tmp")) and time.monotonic() < deadline:
            time.sleep(0.001)
        saver.close(abandon=True)
        assert names(tmp_path) == before


def test_nothing_is_begun_where_it_does_not_fit(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before, free = names(tmp_path), shutil.disk_usage(tmp_path).free
    with pytest.raises(
        StorageError, match=r"checkpoint-00000002.pth: no space left \([\d,]+ bytes needed, [\d,]+ bytes"
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Snapshot, "size", 2 * free)
            save(tmp_path, 2)
    assert names(tmp_path) == before
