"""The files of a prediction: CSV, JSON Lines and, where pyarrow is installed, Parquet.

Rows are written batch by batch to NAME.partial, in complete lines. At the end the files get their names; after an
interruption the lines stay in NAME.partial, so a file of the final name is always complete.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Self

from mae_dat.storage.csv_files import csv_lines, safe_cell
from mae_dat.storage.files import atomic_write, storage_error, sync_folder

PARTIAL = ".partial"

Row = Mapping[str, str | float | bool]
"""The cells of one row by column."""


def _utf8(text: str) -> bytes:
    """Encode a text; bytes of a file name that are no UTF-8 become `\\udcXX`."""
    return text.encode("utf-8", errors="backslashreplace")


def _round(value: Any) -> Any:
    """Round the floats in a JSON value to 6 significant digits, as in the CSV file."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {key: _round(entry) for key, entry in value.items()}
    return [_round(entry) for entry in value] if isinstance(value, list | tuple) else value


class PredictionFiles:
    """predictions.csv, predictions.jsonl, predictions.parquet and unreadable.txt in a folder.

    A context manager: on success the files get their names, else the complete lines stay in NAME.partial. Raises
    StorageError.
    """

    def __init__(self, folder: Path, columns: Mapping[str, type]) -> None:
        """`columns` are the names and types (str, float or bool) of the CSV file's and the Parquet file's columns."""
        self.folder, self.columns = folder, dict(columns)
        self.unreadable = 0
        self._files: dict[str, BinaryIO] = {}
        self._parquet: Any = None

    def __enter__(self) -> Self:
        try:
            self._append("predictions.csv", csv_lines([[*self.columns]]))
            self._append("predictions.jsonl", b"")
            if find_spec("pyarrow"):
                self._open_parquet()
        except BaseException:
            for file in self._files.values():
                file.close()
            raise
        return self

    def add(self, rows: Sequence[Row], records: Sequence[Mapping[str, Any]], unreadable: Mapping[str, str]) -> None:
        """Write a batch: rows of the tables, JSON records, and unreadable images with the reason."""
        self._append(
            "predictions.csv", csv_lines([[safe_cell(row[column]) for column in self.columns] for row in rows])
        )
        lines = "".join(f"{json.dumps(_round(record), ensure_ascii=False)}\n" for record in records)
        self._append("predictions.jsonl", _utf8(lines))
        if unreadable:
            lines = "".join(f"{_one_line(name)}\t{_one_line(reason)}\n" for name, reason in unreadable.items())
            self._append("unreadable.txt", _utf8(lines))
            self.unreadable += len(unreadable)
        if self._parquet and rows:
            self._write_parquet(rows)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._parquet:
            self._parquet.close()
        for name, file in self._files.items():
            with self._storage_errors(name), contextlib.closing(file):
                file.flush()
                os.fsync(file.fileno())
        if kind is None:
            self._give_names()

    @property
    def names(self) -> list[str]:
        """The names of the files."""
        return [*self._files, *(["predictions.parquet"] if self._parquet else [])]

    def _give_names(self) -> None:
        for name in self.names:
            with self._storage_errors(name):
                os.replace(self._partial(name), self.folder / name)
        for name in {"unreadable.txt", "predictions.parquet"}.difference(self.names):
            for path in (self.folder / name, self._partial(name)):
                path.unlink(missing_ok=True)  # of an earlier call with other results
        sync_folder(self.folder)

    def _partial(self, name: str) -> Path:
        return self.folder / f"{name}{PARTIAL}"

    def _append(self, name: str, content: bytes) -> None:
        with self._storage_errors(name):
            if name not in self._files:
                self._files[name] = open(self._partial(name), "wb", buffering=0)  # noqa: SIM115 - closed by __exit__
            view = memoryview(content)
            while view:
                view = view[self._files[name].write(view) :]

    @contextlib.contextmanager
    def _storage_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise storage_error(self.folder / name, error) from error

    def _open_parquet(self) -> None:
        import pyarrow
        from pyarrow import parquet

        types = {str: pyarrow.string(), float: pyarrow.float32(), bool: pyarrow.bool_()}
        schema = pyarrow.schema([(name, types[kind]) for name, kind in self.columns.items()])
        with self._storage_errors("predictions.parquet"):
            self._parquet = parquet.ParquetWriter(self._partial("predictions.parquet"), schema)

    def _write_parquet(self, rows: Sequence[Row]) -> None:
        import pyarrow

        values = {
            column: [_utf8(cell).decode() if isinstance(cell := row[column], str) else cell for row in rows]
            for column in self.columns
        }
        with self._storage_errors("predictions.parquet"):
            self._parquet.write_table(pyarrow.table(values, schema=self._parquet.schema))


def _one_line(text: str) -> str:
    """Return a text with control characters written as `\\n`, `\\t`, ..."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Write a CSV file like predictions.csv, atomically. Raises StorageError."""
    with atomic_write(path) as file:
        file.write(csv_lines([[*columns], *([safe_cell(row[column]) for column in columns] for row in rows)]))
