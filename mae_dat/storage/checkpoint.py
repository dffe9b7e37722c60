"""Checkpoints: atomic, verified by SHA-256 on every load, the newest valid one found by itself.

A checkpoint is `checkpoint-STEP.pth` plus the manifest `checkpoint-STEP.json`, written last: without it, or when the
file's hash differs from the one it records, the checkpoint does not count. Only tensors, numbers and strings go in;
loading uses `weights_only`.
"""

import contextlib
import datetime
import hashlib
import json
import logging
import math
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from mae_dat.config.errors import CheckpointError, MissingInputError, StorageError
from mae_dat.storage.files import atomic_write, sha256_of
from mae_dat.storage.host_copy import HostBuffers, Snapshot
from mae_dat.storage.weight_files import read_pickle

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
_NAME = re.compile(r"checkpoint-(\d{8,})\.json")


class Checkpoint(NamedTuple):
    """A verified checkpoint on disk. `step` counts updates, or micro-batches where the manifest's `version` is 1."""

    path: Path
    step: int
    manifest: dict[str, Any]

    def load(self) -> dict[str, Any]:
        """The saved state, on the CPU."""
        return read_pickle(self.path)


class Saver:
    """Writes the checkpoints of a run in the background, one at a time.

    Of each it deletes the older ones, once the new one is complete: all but the newest `keep`, the best (the highest of
    `facts["score"]`, None for no score) and those with a true `facts["kept"]`. `guard` is called before each file is
    written; what it raises stops the save.
    """

    def __init__(self, folder: Path, keep: int = 2, guard: Callable[[], object] | None = None) -> None:
        self.folder, self.keep, self.guard = folder, keep, guard
        self._buffers = HostBuffers()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._snapshot: Snapshot | None = None
        self._written: Future[None] | None = None
        self._given_up = threading.Event()

    def save(self, step: int, state: Mapping[str, Any], at_once: Iterable[Tensor] = (), **facts: Any) -> None:
        """Begins to write a checkpoint of `state` as it is now; `facts` go into the manifest.

        `at_once` are the tensors that a forward pass may change (`model.buffers()`); the others may not change before
        `before_change` has returned. First waits for the save before, and raises what `check` would.
        """
        self.wait()
        self._snapshot = Snapshot(state, self._buffers, at_once)
        self._written = self._thread.submit(self._write, self._snapshot, step, facts)

    def before_change(self) -> None:
        """Waits until weights and optimizer may change; to be called before every update."""
        if self._snapshot:
            self._snapshot.wait()
            self._snapshot = None

    def check(self) -> None:
        """Raises the StorageError of a save that failed; to be called at every step, does not wait."""
        if self._written and self._written.done():
            self.wait()

    def close(self, abandon: bool = False) -> None:
        """Waits for the last save and raises what `check` would; or gives it up, leaving the checkpoints before it."""
        if abandon:
            self._given_up.set()
            self._written = None
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    @property
    def writing(self) -> bool:
        """Whether a save is on its way to the disk."""
        return self._written is not None and not self._written.done()

    def wait(self) -> None:
        """Waits until the last save is on disk. Raises what `check` would."""
        written, self._written = self._written, None
        if written:
            written.result()

    def _may_write(self) -> None:
        if self._given_up.is_set():
            raise StorageError(f"the checkpoint in {self.folder} was given up.")
        if self.guard:
            self.guard()

    def _write(self, snapshot: Snapshot, step: int, facts: dict[str, Any]) -> None:
        try:
            snapshot.copy_large()
            self._write_files(step, snapshot.content, snapshot.size, facts)
            _delete_old(self.folder, step, self.keep)
        finally:
            snapshot.release()

    def _write_files(self, step: int, state: Mapping[str, Any], size: int, facts: dict[str, Any]) -> None:
        """Writes a checkpoint of about `size` bytes, then its manifest. Raises StorageError; then nothing is left of
        it."""
        path = _path_of(self.folder, step)
        self._may_write()
        with atomic_write(path, size) as file:
            hashing = _HashingWriter(file, self._given_up)
            torch.save(state, hashing)  # type: ignore[arg-type] # it asks for no more than write and flush
        facts = {
            "version": FORMAT_VERSION,
            "step": step,
            "sha256": hashing.digest.hexdigest(),
            "size": hashing.size,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "torch": str(torch.__version__),
            **facts,
        }
        manifest = path.with_suffix(".json")
        try:
            self._may_write()
            with atomic_write(manifest) as file:
                file.write(_manifest_text(facts))
        except BaseException:
            for half in (manifest, path):
                half.unlink(missing_ok=True)
            raise


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], keep: int = 2, **facts: Any) -> Path:
    """Writes a checkpoint and returns when it is on disk; see Saver. Raises StorageError."""
    with contextlib.closing(Saver(folder, keep)) as saver:
        saver.save(step, state, **facts)
    return _path_of(folder, step)


class _HashingWriter:
    """A file for `torch.save` that knows the SHA-256 of what went into it."""

    def __init__(self, file: BinaryIO, given_up: threading.Event) -> None:
        self.file, self.given_up, self.digest, self.size = file, given_up, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        """Adds to the file. Raises StorageError once the checkpoint is given up."""
        if self.given_up.is_set():
            raise StorageError("the checkpoint was given up.")
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        """For `torch.save`, which asks for it."""
        self.file.flush()


def _delete_old(folder: Path, step: int, keep: int) -> None:
    """Deletes what a Saver does not keep, of the checkpoints up to this step.

    Those of later steps stay: a run that goes on before them found them damaged, and they must not take the place of
    valid ones.
    """
    reached = [path for path in _manifests(folder) if _step_of(path) <= step]
    facts = {path: _read_facts(path) for path in reached}
    scores = {path: score for path in reached if isinstance(score := facts[path].get("score"), int | float)}
    best = max((path for path in scores if not math.isnan(scores[path])), key=scores.__getitem__, default=None)
    for old in reached[max(keep, 1) :]:
        if old != best and not facts[old].get("kept"):
            old.unlink(missing_ok=True)  # first: a file without a manifest does not count
            old.with_suffix(".pth").unlink(missing_ok=True)


def _manifest_text(facts: Mapping[str, Any]) -> bytes:
    """A manifest with its own checksum: nothing in it can change unnoticed."""
    check = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return json.dumps({**facts, "check": check}, indent=1).encode()


def _read_facts(manifest_path: Path) -> dict[str, Any]:
    try:
        facts = json.loads(manifest_path.read_text())
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest valid checkpoint in `folder`, or None. Damaged ones are named in the log and passed over."""
    tried: set[Path] = set()
    # Again while there are new ones: a run that is writing deletes what was the newest a moment ago.
    while manifests := [path for path in _manifests(folder) if path not in tried]:
        for manifest_path in manifests:
            try:
                return verify_checkpoint(manifest_path)
            except CheckpointError as error:
                logger.warning("%s Passed over.", error)
        tried.update(manifests)
    return None


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that `--resume PATH` means: a `.pth` file of ours or a folder. Raises MissingInputError,
    CheckpointError."""
    if path.is_dir():
        found = newest_checkpoint(path)
        if found is None:
            raise MissingInputError(f"no valid checkpoint-*.pth in {path}.")
        return found
    if not path.is_file():
        raise MissingInputError(f"no such checkpoint: {path}")
    manifest = path.with_suffix(".json")
    if not manifest.is_file():
        raise CheckpointError(
            f"{path} has no manifest {manifest.name}: to start from foreign weights use --finetune {path}."
        )
    return verify_checkpoint(manifest)


def verify_checkpoint(manifest_path: Path) -> Checkpoint:
    """Checks a checkpoint against its manifest. Raises CheckpointError."""
    path = manifest_path.with_suffix(".pth")
    try:
        text = manifest_path.read_bytes()
        manifest = json.loads(text)
        version, step, digest = int(manifest["version"]), int(manifest["step"]), manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"the manifest {manifest_path} is damaged ({error}).") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}, newer than this program's {FORMAT_VERSION}: update mae_dat."
        )
    if _NAME.fullmatch(manifest_path.name) and step != _step_of(manifest_path):
        raise CheckpointError(f"{manifest_path} is of step {step}: it belongs to another checkpoint.")
    check = manifest.pop("check", None)
    if (check or version == FORMAT_VERSION) and text != _manifest_text(manifest):
        raise CheckpointError(f"the manifest {manifest_path} is damaged (its content is not what its checksum says).")
    if not _has_digest(path, digest):
        raise CheckpointError(f"{path} is damaged or missing: its sha256 is not the manifest's.")
    return Checkpoint(path, step, manifest)


def _has_digest(path: Path, digest: str) -> bool:
    try:
        return sha256_of(path) == digest
    except OSError as error:
        logger.warning("%s cannot be read: %s", path, error.strerror)
        return False


def delete_unfinished(folder: Path) -> None:
    """Removes what a killed run left behind: temporary files, and checkpoints that did not get their manifest.

    Call only where no other run writes."""
    unfinished = [
        path
        for path in folder.glob("checkpoint-*.pth")
        if _NAME.fullmatch(f"{path.stem}.json") and not path.with_suffix(".json").exists()
    ]
    for stale in [*folder.glob(".*.tmp"), *unfinished]:
        logger.info("removing what a stopped run left unfinished: %s", stale)
        stale.unlink(missing_ok=True)


def _manifests(folder: Path) -> list[Path]:
    """Manifests in `folder`, newest step first."""
    found = [path for path in folder.glob("checkpoint-*.json") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step_of, reverse=True)


def _path_of(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:08d}.pth"


def _step_of(manifest_path: Path) -> int:
    return int(manifest_path.stem.rpartition("-")[2])
