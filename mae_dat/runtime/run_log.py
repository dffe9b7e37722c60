"""The log of a run: `log.txt` and TensorBoard."""

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
    """`log.txt` and TensorBoard of one run, on rank 0; a no-op elsewhere.

    Every record carries its `step`; on resuming, records past the restored step are dropped, so that none appears
    twice. `purge_from` does the same for TensorBoard: the first position on its axis that will come again.
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

        kept = [
            json.dumps(record)
            for record in read_log(self.path)
            if record.get("step", 0) <= resumed_step and resumed_step
        ]
        with atomic_write(self.path) as file:
            file.write("".join(line + "\n" for line in kept).encode())
        self.writer = SummaryWriter(str(log_dir or output_dir), purge_step=purge_from)

    def record(self, values: Mapping[str, Any]) -> None:
        """Appends one JSON line. Like all that writes here it raises StorageError."""
        if self.writer is not None:
            with self._told(), self.path.open("a") as file:
                file.write(json.dumps(values) + "\n")

    def scalars(self, values: Mapping[str, float], position: int) -> None:
        """TensorBoard scalars at one position of their axis."""
        if self.writer is not None:
            with self._told():
                for tag, value in values.items():
                    self.writer.add_scalar(tag, value, position)

    def image(self, tag: str, image_CHW: Tensor, step: int) -> None:
        """Write an image to TensorBoard; pixels in [0, 1]."""
        if self.writer is not None:
            with self._told():
                self.writer.add_image(tag, image_CHW.clamp(0, 1), step)

    def close(self) -> None:
        """Flushes TensorBoard's file."""
        if self.writer is not None:
            with self._told():
                self.writer.close()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise storage_error(self.path, error) from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a `log.txt`; a torn last line (a killed run) is left out."""
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
