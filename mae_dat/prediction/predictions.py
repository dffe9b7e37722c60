"""Predictions in memory: arrays that print as a table, in a console and in a notebook."""

import html
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mae_dat.config.errors import ConfigError
from mae_dat.config.flags import expand_home
from mae_dat.config.groups import ImageSize
from mae_dat.config.terminal import printable
from mae_dat.data.class_names import readable_class
from mae_dat.prediction.result_files import Row, write_csv
from mae_dat.runtime.inputs import count_of

_CORNERS = ("x_min", "y_min", "x_max", "y_max")
_ROWS = 10  # of the table that is printed
_NAME_WIDTH = 48
_CLASS_WIDTH = 24


@dataclass(frozen=True, eq=False)
class ImageBoxes:
    """The boxes found in one image, the highest score first."""

    boxes: np.ndarray
    """float32 (M, 4): x_min, y_min, x_max, y_max in pixels of the original image."""
    labels: np.ndarray
    """int64 (M,): numbers of the classes, from 0."""
    scores: np.ndarray
    """float32 (M,), in [0, 1]."""
    size: ImageSize
    """Height and width of the original image in pixels."""
    number: int
    """The image's number among all inputs, from 0."""


@dataclass(frozen=True, eq=False, repr=False)
class Predictions:
    """What a model predicts for n images, in their order; unreadable images are left out.

    Prints as a short table, and as HTML in a notebook.
    """

    files: list[str]
    """Paths as given, SHARD.tar/MEMBER, or `image N` for the N-th image in memory."""
    classes: list[str]
    """The names of the model's K classes."""
    probabilities: np.ndarray
    """float32 (n, K): softmax(logits / temperature); (n, 0) for a detector."""
    unreadable: dict[str, str] = field(default_factory=dict)
    """Images that could not be read, with the reason."""
    logits: np.ndarray | None = None
    """float32 (n, K), if requested."""
    boxes: list[ImageBoxes] | None = None
    """The boxes in each image, for a detector."""
    top_k: int = 5
    """Classes in each row of the table and of `to_csv`; not more than K."""
    temperature: float = 1.0
    abstain_below: float | None = None
    """Images with a lower highest probability are abstained."""

    def __len__(self) -> int:
        return len(self.files)

    def first(self, count: int) -> "Predictions":
        """Return the predictions for the first `count` images."""
        return replace(
            self,
            files=self.files[:count],
            probabilities=self.probabilities[:count],
            logits=None if self.logits is None else self.logits[:count],
            boxes=None if self.boxes is None else self.boxes[:count],
        )

    def labels(self) -> list[str | None]:
        """Return the most probable class of each image; None where it is abstained. Raises ConfigError for boxes."""
        if self.boxes is not None:
            raise ConfigError("a detector predicts boxes, not one label for each image: see Predictions.boxes.")
        names = [self.classes[index] for index in self.probabilities.argmax(1)]
        return [None if is_abstained else name for name, is_abstained in zip(names, self.abstained(), strict=True)]

    def abstained(self) -> np.ndarray:
        """Return bool (n,): whether the highest probability is below `abstain_below`."""
        if self.abstain_below is None or not len(self):
            return np.zeros(len(self), dtype=bool)
        return self.probabilities.max(1) < self.abstain_below

    def top(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of the `top_k` most probable classes, int64 (n, top_k), and their probabilities, float32
        (n, top_k). Equal probabilities are in the order of the classes."""
        return top_classes(self.probabilities, self.top_k)

    def to_csv(self, path: str | Path) -> None:
        """Write a CSV file like predictions.csv of `mae-dat predict`. Raises StorageError."""
        write_csv(Path(expand_home(path)), [*self.columns()], self.rows())

    # ---- rows of the files ----

    def columns(self) -> dict[str, type]:
        """Return the names and types of the columns of predictions.csv."""
        if self.boxes is not None:
            return {"file": str, "class": str, "score": float, **dict.fromkeys(_CORNERS, float)}
        columns: dict[str, type] = {"file": str}
        for number in range(1, min(self.top_k, len(self.classes)) + 1):
            columns |= {f"class_{number}": str, f"probability_{number}": float}
        return columns | ({"abstained": bool} if self.abstain_below is not None else {})

    def rows(self) -> list[Row]:
        """Return the rows of predictions.csv: one for each image, or for each box of a detector."""
        rows: list[Row] = []
        for record in self.records():
            if self.boxes is None:
                row = {"file": record["file"]}
                for rank, name in enumerate(record["classes"], start=1):
                    row |= {f"class_{rank}": name, f"probability_{rank}": record["probabilities"][rank - 1]}
                rows.append(row | ({"abstained": record["abstained"]} if "abstained" in record else {}))
            else:
                for box in record["boxes"]:
                    corners = dict(zip(_CORNERS, box["box"], strict=True))
                    rows.append({"file": record["file"], "class": box["class"], "score": box["score"], **corners})
        return rows

    def records(self) -> list[dict[str, Any]]:
        """Return the lines of predictions.jsonl, one for each image."""
        if self.boxes is not None:
            return [self._box_record(file, found) for file, found in zip(self.files, self.boxes, strict=True)]
        records: list[dict[str, Any]] = []
        for file, numbers, values in zip(self.files, *map(np.ndarray.tolist, self.top()), strict=True):
            names = [self.classes[number] for number in numbers]
            records.append({"file": file, "classes": names, "probabilities": values})
        if self.abstain_below is not None:
            for record, is_abstained in zip(records, self.abstained().tolist(), strict=True):
                record["abstained"] = is_abstained
        return records

    def _box_record(self, file: str, found: ImageBoxes) -> dict[str, Any]:
        rows = zip(found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
        boxes = [{"class": self.classes[label], "score": score, "box": box} for label, score, box in rows]
        height, width = found.size
        return {"file": file, "width": width, "height": height, "boxes": boxes}

    # ---- the printed table ----

    def __repr__(self) -> str:
        header, rows = self._header(), [*self._rows(_ROWS)]
        widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in [header, *rows]
        ]
        return "\n".join([*lines, *self._notes()])

    def _repr_html_(self) -> str:
        def table_row(cells: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        rows = "".join(table_row(row, "td") for row in self._rows(_ROWS))
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self._notes())
        return f"<table><thead>{table_row(self._header(), 'th')}</thead><tbody>{rows}</tbody></table>{notes}"

    def _header(self) -> list[str]:
        if self.boxes is not None:
            return ["file", "boxes", "highest score"]
        abstained = ["abstained"] if self.abstain_below is not None else []
        return ["file", "class", "probability", *abstained, "next classes"]

    def _rows(self, count: int) -> Iterator[list[str]]:
        """Yield the cells of the first rows of the table."""
        if self.boxes is not None:
            for name, found in zip(self._names(count), self.boxes, strict=False):
                names = [self.classes[label] for label in found.labels]
                counts = ", ".join(f"{names.count(name)} {printable(name)}" for name in dict.fromkeys(names)) or "none"
                yield [_shorten(name, _NAME_WIDTH), counts, f"{found.scores.max():.2f}" if len(names) else ""]
            return
        indices, probabilities = top_classes(self.probabilities[:count], self.top_k)
        abstained = self.abstained()
        for row, name in enumerate(self._names(count)):
            names = [_shorten(readable_class(self.classes[index]), _CLASS_WIDTH) for index in indices[row]]
            following = zip(names[1:3], probabilities[row, 1:3], strict=True)
            cells = [_shorten(name, _NAME_WIDTH), names[0], f"{probabilities[row, 0]:.1%}"]
            if self.abstain_below is not None:
                cells.append("yes" if abstained[row] else "")
            yield [*cells, ", ".join(f"{other} {value:.1%}" for other, value in following)]

    def _names(self, count: int) -> list[str]:
        """Return the first files, without the folders that all files have in common."""
        folders = {os.path.dirname(name) for name in self.files}
        is_absolute = {name.startswith("/") for name in self.files}
        common = os.path.commonpath(folders) if len(is_absolute) == 1 else ""
        return [name.removeprefix(f"{common}/") for name in self.files[:count]]

    def _notes(self) -> list[str]:
        notes = [f"... {len(self):,} images in all"] if len(self) > _ROWS else []
        return notes + ([count_of(len(self.unreadable), "unreadable image")] if self.unreadable else [])


def top_classes(probabilities: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the `top_k` most probable classes of (n, K), or all of fewer: their numbers int64 (n, k) and their
    probabilities float32 (n, k). Equal probabilities are in the order of the classes."""
    # topk leaves the order of equal values open, so they are sorted again: by number, then by value.
    indices = torch.from_numpy(probabilities).topk(min(top_k, probabilities.shape[1])).indices.numpy()
    indices = np.sort(indices, axis=1)
    order = np.argsort(-np.take_along_axis(probabilities, indices, axis=1), axis=1, kind="stable")
    indices = np.take_along_axis(indices, order, axis=1)
    return indices, np.take_along_axis(probabilities, indices, axis=1)


def _shorten(text: str, length: int) -> str:
    """Return at most `length` printable characters, without the beginning: paths differ at their ends."""
    text = printable(text)
    return text if len(text) <= length else f"…{text[1 - length :]}"
