"""Checkpoints: atomic, verified by SHA-256 on every load, the newest valid one found by itself.

A checkpoint is `checkpoint-STEP.pth` plus the manifest `checkpoint-STEP.json`, written last: without it, or when the
file's hash differs from the one it records, the checkpoint does not count. Only tensors, numbers and strings go in;
loading uses `weights_only`.
"""

import datetime
import json
import logging
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mae_dat.errors import CheckpointError, MissingInputError
from mae_dat.files import atomic_write, sha256_of
from mae_dat.weights import read_pickle

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
_NAME = re.compile(r"checkpoint-(\d{8,})\.json")


class Checkpoint(NamedTuple):
    """A verified checkpoint on disk."""

    path: Path
    step: int
    manifest: dict[str, Any]

    def load(self) -> dict[str, Any]:
        """The saved state, on the CPU."""
        return read_pickle(self.path)


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int = 2, **facts: Any) -> Path:
    """Writes a checkpoint and deletes all but the newest `keep` up to this step. `facts` go into the manifest.

    Those of later steps stay: a run that goes on before them found them damaged, and they must not take the place of
    valid ones. Raises StorageError.
    """
    path = folder / f"checkpoint-{step:08d}.pth"
    with atomic_write(path) as file:
        torch.save(state, file)
        file.flush()
        digest, size = sha256_of(Path(file.name)), file.tell()
    manifest = {
        "version": FORMAT_VERSION,
        "step": step,
        "sha256": digest,
        "size": size,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "torch": str(torch.__version__),
        **facts,
    }
    with atomic_write(path.with_suffix(".json")) as file:
        file.write(json.dumps(manifest, indent=1).encode())
    reached = [manifest for manifest in _manifests(folder) if _step_of(manifest) <= step]
    for old in reached[max(keep, 1) :]:
        old.unlink(missing_ok=True)
        old.with_suffix(".pth").unlink(missing_ok=True)
    return path


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest valid checkpoint in `folder`, or None. Damaged ones are named in the log and passed over."""
    for manifest_path in _manifests(folder):
        try:
            return verify(manifest_path)
        except CheckpointError as error:
            logger.warning("%s Passed over.", error)
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
    return verify(manifest)


def verify(manifest_path: Path) -> Checkpoint:
    """Checks a checkpoint against its manifest. Raises CheckpointError."""
    path = manifest_path.with_suffix(".pth")
    try:
        manifest = json.loads(manifest_path.read_text())
        version, step, digest = int(manifest["version"]), int(manifest["step"]), manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(f"the manifest {manifest_path} is damaged ({error}).") from error
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}, newer than this program's {FORMAT_VERSION}: update mae_dat."
        )
    if _NAME.fullmatch(manifest_path.name) and step != _step_of(manifest_path):
        raise CheckpointError(f"{manifest_path} is of step {step}: it belongs to another checkpoint.")
    if not path.is_file() or sha256_of(path) != digest:
        raise CheckpointError(f"{path} is damaged or missing: its sha256 is not the manifest's.")
    return Checkpoint(path, step, manifest)


def sweep(folder: Path) -> None:
    """Removes temporary files that a killed run left behind. Call only where no other run writes."""
    for stale in folder.glob(".*.tmp"):
        logger.info("removing a stale temporary file: %s", stale)
        stale.unlink(missing_ok=True)


def _manifests(folder: Path) -> list[Path]:
    """Manifests in `folder`, newest step first."""
    found = [path for path in folder.glob("checkpoint-*.json") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(manifest_path: Path) -> int:
    return int(manifest_path.stem.rpartition("-")[2])
