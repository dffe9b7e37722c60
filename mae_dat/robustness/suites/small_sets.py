"""Benchmarks of small images with their own classes: Tiny-ImageNet-C in folders, CIFAR-10-C and CIFAR-100-C in arrays.

Shapes: N images of a cell. A model for them has as many outputs as the benchmark has classes.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from mae_dat.config.errors import DataError, MissingInputError, listing
from mae_dat.data.class_names import name_outputs
from mae_dat.robustness.corruptions import SEVERITIES
from mae_dat.robustness.suites.catalogue import Benchmark
from mae_dat.robustness.suites.folders import folders_in, sampled_indices
from mae_dat.robustness.suites.imagenet import ClassMapping
from mae_dat.robustness.suites.preprocessing import Preprocessing
from mae_dat.robustness.suites.sets import PARTIAL_ADVICE, BenchmarkSet, Cell, open_benchmark
from mae_dat.robustness.suites.shifts import ANY_SIZE

CIFAR_10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""The classes of CIFAR-10 in the order of its labels."""


def open_small(
    benchmark: Benchmark, folder: Path, outputs: int, stored: Sequence[str] | None, partial: bool
) -> list[BenchmarkSet]:
    """Return the cells of Tiny-ImageNet-C, CIFAR-10-C or CIFAR-100-C for a model whose file stores the class names
    `stored`, None if unknown. Raises DataError, MissingInputError, with what is missing."""
    if outputs != benchmark.outputs:
        raise DataError(
            f"{benchmark.title} has {benchmark.outputs} classes, and the model {outputs} outputs: evaluate a model "
            "trained on its classes."
        )
    if benchmark.arrays:
        return _open_arrays(benchmark, folder, stored, partial)
    found = [path for path in sorted(folder.glob("*/*/*")) if path.is_dir() and path.parent.name in "12345"]
    classes = sorted({path.name for path in found})
    if len(classes) > benchmark.outputs:
        raise DataError(f"{folder}: {len(classes)} class folders, and {benchmark.title} has {benchmark.outputs}.")
    named = name_outputs(folder, classes, outputs, stored)
    labels = {name: named.names.index(name) for name in classes}
    return open_benchmark(
        dataclasses.replace(
            benchmark, labels=labels, class_mapping=_mapping(named.names, f"{outputs} classes ({named.source})")
        ),
        folder,
        ANY_SIZE,
        partial=partial,
    )


def _mapping(names: Sequence[str], reading: str) -> ClassMapping:
    every = torch.arange(len(names))
    return ClassMapping(reading, tuple(names), every, every, outputs=len(names))


# ---- arrays ----


class ArraySet(BenchmarkSet):
    """Images of one severity of CORRUPTION.npy, uint8 (5 N, 32, 32, 3), severity by severity."""

    array_file: Path
    first: int
    """Position in the array of the first image of this severity."""

    def name_of(self, index: int) -> str:
        """Return the file and the position in it."""
        return f"{self.array_file}, image {self.first + self.folder_index(index)}"

    def load_image(self, index: int) -> Image.Image:
        """Return an image."""
        return Image.fromarray(np.array(_array(self.array_file)[self.first + self.folder_index(index)]))

    def content_files(self) -> list[str]:
        """Return the path of the array."""
        return [str(self.array_file)]

    def fingerprint(self) -> str:
        """Return the hash of the file's name, the labels, the selection and some of the images."""
        digest = hashlib.sha256(f"{self.array_file.name} {self.first}".encode())
        digest.update("".join(f"{path}\0" for path, _ in self.listing).encode() + self.targets.numpy().tobytes())
        for index in sampled_indices(len(self)):
            digest.update(np.array(self.load_image(index)).tobytes())
        return digest.hexdigest()


@functools.lru_cache(maxsize=32)
def _array(path: Path) -> NDArray[np.uint8]:
    """Return an array that is read from the disk where it is used."""
    return np.load(path, mmap_mode="r")


def _open_arrays(benchmark: Benchmark, folder: Path, stored: Sequence[str] | None, partial: bool) -> list[BenchmarkSet]:
    labels = _read_labels(benchmark, folder)
    names = [path.stem for path in sorted(folder.glob("*.npy"))]
    known = benchmark.corruptions + benchmark.extra_corruptions
    if unknown := [name for name in names if name not in (*known, "labels")]:
        raise DataError(f"{folder}: {listing(unknown, 3)}.npy is no corruption of {benchmark.title}.")
    absent = [name for name in benchmark.corruptions if name not in names]
    missing = [f"{listing(absent)} missing, so their mean is over {len(known) - 4 - len(absent)} corruptions"]
    missing = missing if absent else []
    if absent and (not partial or len(absent) == len(benchmark.corruptions)):
        raise DataError(f"{folder}: {benchmark.title} is not complete: {missing[0]}. {PARTIAL_ADVICE.capitalize()}.")
    mapping = _class_names(benchmark, stored)
    sets: list[BenchmarkSet] = []
    for name in (name for name in known if name in names):
        path = folder / f"{name}.npy"
        _check_array(path, benchmark, len(labels))
        for severity in SEVERITIES:
            first = (severity - 1) * len(labels) // len(SEVERITIES)
            of_severity = labels[first : first + len(labels) // len(SEVERITIES)].tolist()
            found = ArraySet(
                Cell(benchmark.name, name, severity),
                str(folder),
                listing=[(f"{index:05d}", label) for index, label in enumerate(of_severity)],
                targets=torch.tensor(of_severity)[:, None],
                class_mapping=mapping,
                preprocessing=Preprocessing(ANY_SIZE, side=benchmark.side),
            )
            found.array_file, found.first, found.missing = path, first, list(missing)
            found.protocol["folder"] = folder.resolve().name
            sets.append(found)
    return sets


def _class_names(benchmark: Benchmark, stored: Sequence[str] | None) -> ClassMapping:
    """Return the mapping of outputs to labels, which have the same numbers. Raises DataError for class names in another
    order than CIFAR-10's."""
    usual = list(CIFAR_10) if benchmark.outputs == len(CIFAR_10) else [str(i) for i in range(benchmark.outputs)]
    if stored is not None and set(stored) == set(usual) and list(stored) != usual:
        raise DataError(
            f"the model's classes are {listing(list(stored))}, and {benchmark.title}'s labels are in the order "
            f"{listing(usual)}: reorder the outputs."
        )
    names = list(stored) if stored is not None else usual
    return _mapping(names, f"{benchmark.outputs} classes in the order of {benchmark.title.removesuffix('-C')}")


def _read_labels(benchmark: Benchmark, folder: Path) -> NDArray[np.int64]:
    """Return labels.npy, int64 (5 N,). Raises MissingInputError, DataError for another shape, count or range."""
    path = folder / "labels.npy"
    if not path.is_file():
        inside = listing(list(folders_in(str(folder))), 3) or "other files"
        raise MissingInputError(
            f"{path} is missing, so the classes of all images are unknown: unpack {benchmark.title} again (found "
            f"{inside})."
        )
    labels: NDArray[Any] = _load(path)
    per_severity = benchmark.images or 0
    expected = len(SEVERITIES) * per_severity
    if labels.shape != (expected,) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path} is {labels.dtype} of shape {labels.shape}; {benchmark.title} has {expected:,} whole numbers, "
            f"{per_severity:,} for each severity. Unpack it again."
        )
    labels = np.asarray(labels, dtype=np.int64)
    counts = np.bincount(labels[:per_severity].clip(min=0), minlength=benchmark.outputs)
    if labels.min() < 0 or labels.max() >= benchmark.outputs or set(counts.tolist()) != {benchmark.per_class}:
        raise DataError(
            f"{path}: the labels are {labels.min()} to {labels.max()}, {counts.min()} to {counts.max()} of a class; "
            f"{benchmark.title} has {benchmark.per_class} of each of 0 to {benchmark.outputs - 1}."
        )
    if not np.array_equal(labels, np.tile(labels[:per_severity], len(SEVERITIES))):
        raise DataError(f"{path}: the labels differ between severities, so the file is damaged: unpack it again.")
    return labels


def _check_array(path: Path, benchmark: Benchmark, images: int) -> None:
    array = _load(path)
    expected = (images, benchmark.side, benchmark.side, 3)
    if array.shape != expected or array.dtype != np.uint8:
        raise DataError(
            f"{path} is {array.dtype} of shape {array.shape}; {benchmark.title} has uint8 of shape {expected}: unpack "
            "it again."
        )


def _load(path: Path) -> NDArray[np.generic]:
    try:
        array: NDArray[np.generic] = np.load(path, mmap_mode="r")  # without pickle: no code of the file is executed
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as an array ({error}): unpack it again.") from error
    return array
