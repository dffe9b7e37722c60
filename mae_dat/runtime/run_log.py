"""The log of a run: `log.txt`, one JSON record a line, and TensorBoard."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mae_dat.storage.files import atomic_write, storage_error

logger = logging.getLogger(__name__)


class RunLog:
    """`log.txt` and TensorBoard of one run, on rank 0; other ranks (`enabled` is False) write nothing.

    Every record has its `step`. When a run resumes, records past the restored step are dropped, so that none appears
    twice. `purge_from` does the same for TensorBoard: the first position on its axis that will be written again.

    The writing methods raise StorageError.
    """

    def __init__(
        self,
        output_dir: Path,
        log_dir: Path | None = None,
        resumed_step: int = 0,
        enabled: bool = True,
        purge_from: int | None = None,
    ) -> None:
        self.path = output_dir / "log.txt"
        self.writer: Any = None
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        records = [record for record in read_log(self.path) if resumed_step and record.get("step", 0) <= resumed_step]
        with atomic_write(self.path) as file:
            file.write("".join(json.dumps(record) + "\n" for record in records).encode())
        self.writer = SummaryWriter(str(log_dir or output_dir), purge_step=purge_from)

    def record(self, values: Mapping[str, Any]) -> None:
        """Append one record to `log.txt`."""
        if self.writer is not None:
            with self._storage_errors(), self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")

    def scalars(self, values: Mapping[str, float], position: int) -> None:
        """Write scalars to TensorBoard, by tag, at one position of their axis."""
        if self.writer is not None:
            with self._storage_errors():
                for tag, value in values.items():
                    self.writer.add_scalar(tag, value, position)

    def image(self, tag: str, image_CHW: Tensor, step: int) -> None:
        """Write an image (channels, height, width) with pixels in [0, 1] to TensorBoard."""
        if self.writer is not None:
            with self._storage_errors():
                self.writer.add_image(tag, image_CHW.clamp(0, 1), step)

    def close(self) -> None:
        """Flush and close TensorBoard's file."""
        if self.writer is not None:
            with self._storage_errors():
                self.writer.close()

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise storage_error(self.path, error) from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the records of a `log.txt`; a torn line, which a killed run leaves behind, is skipped with a warning."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            logger.warning("%s: a torn line was dropped", path)
    return records
