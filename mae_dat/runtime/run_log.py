"""The log of a run: `log.txt` and `steps.jsonl`, one JSON record per line, and TensorBoard.

`log.txt` has a record for every epoch, `steps.jsonl` a point every few steps. TensorBoard shows the points and the
scores of the epochs, with the number of updates as the axis of all curves (docs/how-to/follow-training.md).
"""

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mae_dat.storage.files import atomic_write, storage_error

logger = logging.getLogger(__name__)

_TAG_GROUPS = {"train_": "train/", "test_": "val/"}


class RunLog:
    """`log.txt`, `steps.jsonl` and TensorBoard of one run, on rank 0; other ranks (`enabled` is False) write nothing.

    Every record has its `step`, the number of updates. When a run resumes, records after the restored step are dropped,
    so that none appears twice. Call `flush` before a checkpoint, so that no earlier record is missing.

    The writing methods raise StorageError.
    """

    def __init__(
        self, output_dir: Path, log_dir: Path | None = None, resumed_step: int = 0, enabled: bool = True
    ) -> None:
        self.path, self.points_path = output_dir / "log.txt", output_dir / "steps.jsonl"
        self.records: list[dict[str, Any]] = []
        """The records of all epochs, including those before the run resumed."""
        self.writer: Any = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.records = _drop_later_records(self.path, resumed_step)
        _drop_later_records(self.points_path, resumed_step)
        threading.excepthook = _ignore_writer_thread(threading.excepthook)
        self.events_path = (log_dir or output_dir) / "events.out.tfevents"
        with self._storage_errors(self.events_path):
            self.writer = SummaryWriter(str(log_dir or output_dir), purge_step=resumed_step + 1)

    def record(self, values: Mapping[str, Any]) -> None:
        """Append an epoch's record, with its `step`, to `log.txt`, and its scores (`test_NAME`) to TensorBoard."""
        self.records.append(dict(values))
        self._append(self.path, values)
        self.scalars({name: value for name, value in values.items() if name.startswith("test_")}, values["step"])

    def point(self, values: Mapping[str, float], step: int) -> None:
        """Append a point to `steps.jsonl` and TensorBoard."""
        self._append(self.points_path, {"step": step, **values})
        self.scalars(values, step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars to TensorBoard: `train_NAME` with the tag `train/NAME`, `test_NAME` with `val/NAME`."""
        if self.writer is not None:
            with self._storage_errors(self.events_path):
                for name, value in values.items():
                    self.writer.add_scalar(_tag(name), value, step)

    def image(self, tag: str, image_CHW: Tensor, step: int) -> None:
        """Write an image (channels, height, width) with pixels in [0, 1] to TensorBoard."""
        if self.writer is not None:
            with self._storage_errors(self.events_path):
                self.writer.add_image(tag, image_CHW.clamp(0, 1), step)

    def flush(self) -> None:
        """Write the values that TensorBoard's writer still buffers."""
        if self.writer is not None:
            with self._storage_errors(self.events_path):
                self.writer.flush()

    def close(self) -> None:
        """Flush and close TensorBoard's file."""
        if self.writer is not None:
            with self._storage_errors(self.events_path):
                self.writer.close()

    def _append(self, path: Path, record: Mapping[str, Any]) -> None:
        if self.writer is not None:
            with self._storage_errors(path), path.open("a") as file:
                file.write(json.dumps(record) + "\n")

    @contextlib.contextmanager
    def _storage_errors(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise storage_error(path, error) from error


def _ignore_writer_thread(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a hook for the exceptions of threads that prints no traceback for a failed write of TensorBoard's thread.

    The writer raises the same error again at the next call, where it becomes a StorageError.
    """

    def filtered(arguments: Any) -> None:
        is_writer = type(arguments.thread).__name__ == "_AsyncWriterThread"
        if not (is_writer and issubclass(arguments.exc_type, OSError)):
            hook(arguments)

    return filtered


def _tag(name: str) -> str:
    """Return the TensorBoard tag of a record's key."""
    for prefix, group in _TAG_GROUPS.items():
        if name.startswith(prefix):
            return group + name.removeprefix(prefix)
    return f"train/{name}"


def _drop_later_records(path: Path, step: int) -> list[dict[str, Any]]:
    """Rewrite a log without the records after a step (without any at step 0), and return the others."""
    records = [record for record in read_log(path) if step and record.get("step", 0) <= step]
    with atomic_write(path) as file:
        file.write("".join(json.dumps(record) + "\n" for record in records).encode())
    return records


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the records of a `log.txt` or `steps.jsonl`; skip and log incomplete lines (of a killed run)."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            logger.warning("%s: an incomplete line was skipped", path)
    return records
