"""Checkpoints: written atomically, verified by SHA-256 on every load; the newest valid one is found automatically.

A checkpoint is `checkpoint-STEP.pth` plus the manifest `checkpoint-STEP.json`, which is written last. Without a
manifest, or if the hash of the file differs from the one in the manifest, the checkpoint is ignored. It contains only
tensors, numbers and strings, and is loaded with `weights_only`.
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
from typing import Any, BinaryIO, NamedTuple, NotRequired, TypedDict

import torch
from torch import Tensor

from mae_dat.config.errors import CheckpointError, MissingInputError, StorageError
from mae_dat.storage.files import atomic_write, sha256_of
from mae_dat.storage.host_copy import HostBuffers, Snapshot
from mae_dat.storage.json_files import check_shape, parse_json, read_json
from mae_dat.storage.torch_files import read_pickle

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
_MAX_MANIFEST = 1 << 24  # bytes
_NAME = re.compile(r"checkpoint-(\d{8,})\.json")


class _Hash(TypedDict):
    sha256: str


class _FileFacts(TypedDict):
    sizes: str
    times: str
    content: str
    states: NotRequired[str]
    groups: NotRequired[list[str]]


class _Change(TypedDict):
    step: int
    setting: str


class _Manifest(TypedDict):
    """What the manifest of a checkpoint has. Older releases recorded less."""

    version: int
    step: int
    sha256: str
    check: NotRequired[str]
    epoch: NotRequired[float]
    score: NotRequired[float | None]
    kept: NotRequired[bool]
    settings: NotRequired[dict[str, Any]]
    images: NotRequired[str]
    validation: NotRequired[str]
    ranks: NotRequired[int]
    global_batch: NotRequired[int]
    code: NotRequired[_Hash]
    image_files: NotRequired[_FileFacts]
    validation_files: NotRequired[_FileFacts]
    tokenizer_files: NotRequired[dict[str, str]]
    decoding: NotRequired[dict[str, str]]
    changes: NotRequired[list[_Change]]


class Checkpoint(NamedTuple):
    """A verified checkpoint on disk. `step` counts updates, or micro-batches if the manifest's `version` is 1."""

    path: Path
    step: int
    manifest: dict[str, Any]

    def load(self) -> dict[str, Any]:
        """Load the saved state, with its tensors on the CPU."""
        return read_pickle(self.path)


class Saver:
    """Writes the checkpoints of a run in the background, one at a time.

    Once a checkpoint is complete, older ones are deleted, except for the newest `keep_newest`, the best one (by the
    highest `facts["score"]`; None is no score) and those whose `facts["kept"]` is true. `guard` is called before each
    file is written; if it raises, the save fails with its error.
    """

    def __init__(self, folder: Path, keep_newest: int = 2, guard: Callable[[], object] | None = None) -> None:
        self.folder, self.keep_newest, self.guard = folder, keep_newest, guard
        self._buffers = HostBuffers()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._snapshot: Snapshot | None = None
        self._written: Future[None] | None = None
        self._canceled = threading.Event()

    def save(self, step: int, state: Mapping[str, Any], copy_immediately: Iterable[Tensor] = (), **facts: Any) -> None:
        """Start to write a checkpoint of the current `state`; `facts` are stored in the manifest.

        `copy_immediately` are the tensors that a forward pass may change (`model.buffers()`): they are copied before
        `save` returns. The others must not change before `before_change` has returned. Waits for the previous save
        first, and raises its StorageError if it failed.
        """
        self.wait()
        self._snapshot = Snapshot(state, self._buffers, copy_immediately)
        self._written = self._thread.submit(self._write, self._snapshot, step, facts)

    def before_change(self) -> None:
        """Wait until weights and optimizer may change. Call it before every update."""
        if self._snapshot:
            self._snapshot.wait()
            self._snapshot = None

    def check(self) -> None:
        """Raise the StorageError of a failed save, without waiting. Call it at every step."""
        if self._written and self._written.done():
            self.wait()

    def close(self, abandon: bool = False) -> None:
        """Wait for the last save and raise its StorageError if it failed.

        `abandon` cancels the last save instead; the checkpoints before it stay.
        """
        if abandon:
            self._canceled.set()
            self._written = None
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    @property
    def writing(self) -> bool:
        """Whether a save is in progress."""
        return self._written is not None and not self._written.done()

    def wait(self) -> None:
        """Wait until the last save is on disk, and raise its StorageError if it failed."""
        written, self._written = self._written, None
        if written:
            written.result()

    def _may_write(self) -> None:
        if self._canceled.is_set():
            raise StorageError(f"writing the checkpoint in {self.folder} was canceled.")
        if self.guard:
            self.guard()

    def _write(self, snapshot: Snapshot, step: int, facts: dict[str, Any]) -> None:
        try:
            snapshot.copy_large()
            self._write_files(step, snapshot.content, snapshot.size, facts)
            _delete_old(self.folder, step, self.keep_newest)
        finally:
            snapshot.release()

    def _write_files(self, step: int, state: Mapping[str, Any], size: int, facts: dict[str, Any]) -> None:
        """Write a checkpoint of about `size` bytes, then its manifest. After a StorageError neither file remains."""
        path = _path_of(self.folder, step)
        self._may_write()
        with atomic_write(path, size) as file:
            hashing = _HashingWriter(file, self._canceled)
            torch.save(state, hashing)  # type: ignore[arg-type] # it uses only write and flush
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
            for file_path in (manifest, path):
                file_path.unlink(missing_ok=True)
            raise


def save_checkpoint(folder: Path, step: int, state: Mapping[str, Any], keep_newest: int = 2, **facts: Any) -> Path:
    """Write one checkpoint, wait until it is on disk, and return its path.

    For scripts, tests and benchmarks; a training writes its checkpoints in the background (`Saver`). The arguments are
    those of `Saver` and `Saver.save`. Raises StorageError.
    """
    with contextlib.closing(Saver(folder, keep_newest)) as saver:
        saver.save(step, state, **facts)
    return _path_of(folder, step)


class _HashingWriter:
    """A file for `torch.save` that computes the SHA-256 of its content while it is written."""

    def __init__(self, file: BinaryIO, canceled: threading.Event) -> None:
        self.file, self.canceled, self.digest, self.size = file, canceled, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        """Append to the file. Raises StorageError if the checkpoint was canceled."""
        if self.canceled.is_set():
            raise StorageError("writing the checkpoint was canceled.")
        self.digest.update(data)
        self.size += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        """Flush the file, as `torch.save` requests."""
        self.file.flush()


def _delete_old(folder: Path, step: int, keep_newest: int) -> None:
    """Delete the checkpoints up to this step that a Saver does not keep.

    Checkpoints of later steps are ignored: they are damaged, because the run resumed from an earlier one, and must not
    count among the newest `keep_newest`.
    """
    manifests = [path for path in _manifests(folder) if _step_of(path) <= step]
    facts = {path: _read_facts(path) for path in manifests}
    scores = {path: score for path in manifests if isinstance(score := facts[path].get("score"), int | float)}
    best = max((path for path in scores if not math.isnan(scores[path])), key=scores.__getitem__, default=None)
    for old in manifests[max(keep_newest, 1) :]:
        if old != best and not facts[old].get("kept"):
            old.unlink(missing_ok=True)  # first, because a file without a manifest is ignored
            old.with_suffix(".pth").unlink(missing_ok=True)


def _manifest_text(facts: Mapping[str, Any]) -> bytes:
    """Return the text of a manifest with its own checksum, so that any change of it is detected."""
    check = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    return json.dumps({**facts, "check": check}, indent=1).encode()


def _read_facts(manifest_path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = read_json(manifest_path, dict[str, Any], "a manifest", max_bytes=_MAX_MANIFEST)
    except CheckpointError:
        return {}
    return facts


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest valid checkpoint in `folder`, None if there is none; log and skip damaged ones."""
    invalid: set[Path] = set()
    # List the folder again while there are new ones: a running job may delete the newest one before it is read here.
    while manifests := [path for path in _manifests(folder) if path not in invalid]:
        for manifest_path in manifests:
            try:
                return verify_checkpoint(manifest_path)
            except CheckpointError as error:
                logger.warning("%s Skipped.", error)
        invalid.update(manifests)
    return None


def is_foreign(resume: str) -> bool:
    """Return whether `--resume` names weights and not a checkpoint of this package: a file without a manifest, or
    nothing that exists."""
    path = Path(resume)
    return not path.is_dir() and (path.suffix == ".safetensors" or not path.with_suffix(".json").is_file())


def find_checkpoint(path: Path, weights_flag: str = "--finetune") -> Checkpoint:
    """Return the checkpoint of `--resume PATH`: a `.pth` file of this package, or the newest one of a folder.

    `weights_flag` is the command's flag for other weights, for messages. Raises MissingInputError, or CheckpointError
    for a damaged checkpoint or a file without a manifest.
    """
    if path.is_dir():
        checkpoint = newest_checkpoint(path)
        if checkpoint is None:
            raise MissingInputError(f"no valid checkpoint-*.pth in {path}: give the output folder of a run.")
        return checkpoint
    if not path.is_file():
        raise MissingInputError(f"no such checkpoint: {path}")
    manifest = path.with_suffix(".json")
    if not manifest.is_file():
        raise CheckpointError(
            f"{path} has no manifest {manifest.name}: to start from other weights use {weights_flag} {path}."
        )
    return verify_checkpoint(manifest)


def verify_checkpoint(manifest_path: Path) -> Checkpoint:
    """Verify a checkpoint: the manifest by its own checksum, the file by the SHA-256 in it. Raises CheckpointError."""
    path = manifest_path.with_suffix(".pth")
    try:
        if manifest_path.stat().st_size > _MAX_MANIFEST:
            raise ValueError(f"it has more than {_MAX_MANIFEST:,} bytes")
        text = manifest_path.read_bytes()
        manifest = parse_json(text)
        check_shape(manifest, _Manifest)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the manifest {manifest_path} is damaged ({error}).") from error
    version, step, digest = manifest["version"], manifest["step"], manifest["sha256"]
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}, but this version of mae_dat reads up to {FORMAT_VERSION}: update mae_dat."
        )
    if _NAME.fullmatch(manifest_path.name) and step != _step_of(manifest_path):
        raise CheckpointError(f"{manifest_path} records step {step}, so it belongs to another checkpoint.")
    check = manifest.pop("check", None)
    if (check or version == FORMAT_VERSION) and text != _manifest_text(manifest):
        raise CheckpointError(f"the manifest {manifest_path} is damaged (its content does not match its checksum).")
    if not _has_digest(path, digest):
        raise CheckpointError(f"{path} is damaged or missing: its sha256 differs from the one in the manifest.")
    return Checkpoint(path, step, manifest)


def _has_digest(path: Path, digest: str) -> bool:
    try:
        return sha256_of(path) == digest
    except OSError as error:
        logger.warning("%s cannot be read: %s", path, error.strerror)
        return False


def delete_unfinished(folder: Path) -> None:
    """Delete the temporary files and the checkpoints without a manifest that a killed run has left.

    Call it only while no other run writes to the folder.
    """
    unfinished = [
        path
        for path in folder.glob("checkpoint-*.pth")
        if _NAME.fullmatch(f"{path.stem}.json") and not path.with_suffix(".json").exists()
    ]
    for stale in [*folder.glob(".*.tmp"), *unfinished]:
        logger.info("deleting an unfinished file of a stopped run: %s", stale)
        stale.unlink(missing_ok=True)


def _manifests(folder: Path) -> list[Path]:
    """Return the paths of the manifests in `folder`, the newest step first."""
    manifests = [path for path in folder.glob("checkpoint-*.json") if _NAME.fullmatch(path.name)]
    return sorted(manifests, key=_step_of, reverse=True)


def _path_of(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step:08d}.pth"


def _step_of(manifest_path: Path) -> int:
    return int(manifest_path.stem.rpartition("-")[2])
