"""Where the predictions of each batch go: counted, collected in memory, or written to the files of a folder."""

import contextlib
import dataclasses
import logging
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from mae_dat.config.errors import DataError
from mae_dat.data.inputs import InputImages
from mae_dat.prediction.box_files import DRAWN_FOLDER, BoxDrawer, CocoResults
from mae_dat.prediction.predictions import Predictions
from mae_dat.prediction.result_files import PARTIAL, PredictionFiles

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Tally:
    """Counts the images."""

    predicted: int = 0
    unreadable: int = 0
    abstained: int = 0
    boxes: int = 0
    first_unreadable: str = ""

    def add(self, part: Predictions) -> None:
        """Count a batch."""
        self.predicted += len(part)
        self.unreadable += len(part.unreadable)
        self.abstained += int(part.abstained().sum())
        self.boxes += sum(len(found.labels) for found in part.boxes or [])
        for name, reason in part.unreadable.items():
            self.first_unreadable = self.first_unreadable or f"{name}: {reason}"


class Collector:
    """Collects predictions in memory: of all images, or of the first `limit`."""

    def __init__(self, empty: Predictions, keep_logits: bool = False, limit: int | None = None) -> None:
        self.empty, self.keep_logits, self.limit = empty, keep_logits, limit
        self.parts: list[Predictions] = []

    def add(self, part: Predictions) -> None:
        """Add a batch."""
        part = part if self.keep_logits else dataclasses.replace(part, logits=None)
        if self.limit is None:
            self.parts.append(part)
        elif (missing := self.limit - sum(map(len, self.parts))) > 0:
            self.parts.append(part.first(missing))

    def predictions(self) -> Predictions:
        """Return all of them as one."""
        parts = [self.empty, *self.parts]
        unreadable: dict[str, str] = {}
        for part in parts:
            unreadable |= part.unreadable
        logits = [part.logits for part in self.parts if part.logits is not None]
        return dataclasses.replace(
            self.empty,
            files=[name for part in parts for name in part.files],
            probabilities=np.concatenate([part.probabilities for part in parts]),
            unreadable=unreadable,
            logits=np.concatenate(logits) if self.keep_logits and logits else None,
            boxes=None if self.empty.boxes is None else [found for part in parts for found in part.boxes or []],
        )


class ResultWriter:
    """Writes the files of the output folder: the tables, and for a detector COCO's JSON and drawn images.

    A context manager. Raises StorageError.
    """

    def __init__(self, folder: Path, empty: Predictions, inputs: InputImages, images_to_draw: int) -> None:
        """`empty` are predictions for no image, which show classes and settings."""
        self.folder, self.inputs, self.left_to_draw = folder, inputs, images_to_draw
        self.files = PredictionFiles(folder, empty.columns())
        self.coco = None if empty.boxes is None else CocoResults(empty.classes)
        self.drawer = BoxDrawer(folder / DRAWN_FOLDER, empty.classes)
        self.done = 0

    def __enter__(self) -> Self:
        self.files.__enter__()
        return self

    def add(self, part: Predictions) -> None:
        """Write a batch."""
        self.files.add(part.rows(), part.records(), part.unreadable)
        self.done += len(part) + len(part.unreadable)
        if self.coco is None:
            return
        for name, found in zip(part.files, part.boxes or [], strict=True):
            self.coco.add(name, found)
            if self.left_to_draw:
                self.left_to_draw -= 1
                with contextlib.suppress(DataError):  # a file that has been deleted since it was predicted
                    self.drawer.draw(name, self.inputs.load_image(found.number), found)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self.coco is not None:
            self.coco.write(self.folder)
        self.files.__exit__(kind, error, trace)
        if kind is not None:
            logger.warning(
                "stopped after %s of %s images: their lines are in %s",
                f"{self.done:,}",
                f"{len(self.inputs):,}",
                self.folder / f"predictions.csv{PARTIAL}",
            )
