"""Measure several models at once on clean, corrupted and cue-conflict pictures, as exact integer counts.

Shapes: B batch, S severities, C channels, H height, W width, M models. Every corrupted picture is made once, in
worker processes, and shown to all models. Its seed depends on (seed, index, corruption, severity) alone, so the
counts depend neither on the batch size nor on the number of workers or ranks, except where a model's own arithmetic
does.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from mae_dat import corruptions as corrupting
from mae_dat.errors import DataError, MissingInputError, NumericsError
from mae_dat.scores import Cells, CleanCount, ModelScores, category_errors, mean_error, shape_share
from mae_dat.watch import beat

__all__ = ["Evaluation", "category_errors", "evaluate", "mean_error", "read_conflicts", "shape_share"]

logger = logging.getLogger(__name__)

CLEAN, CONFLICT = "clean", "shape bias"
CLEAN_SEVERITY = 0
# Columns of a row of counts. CORRECT: or shape class. SECOND: top-5, or texture class. FIVE: had 5+ classes. BAD: NaN.
TOTAL, CORRECT, SECOND, FIVE, BAD = range(5)
COLUMNS = 5

Conflict = tuple[Tensor, int, int]  # image float (C, H, W) in [0, 1], shape's class, texture's class
Task = tuple[str, int]  # what to do, and the image's index
Batch = tuple[
    str, Tensor, Tensor
]  # what, pictures (B, S, C, H, W), labels (B, 2): shape and texture, equal if no conflict
Progress = Callable[[str, int, int], None]


class ImageSet(Protocol):
    """Anything of a known length whose items hold `image`, float (C, H, W) in [0, 1], and `label`, int."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Mapping[str, Any]: ...


class Protocols(TypedDict):
    """How the numbers came about: goes into the report beside them."""

    images: int
    images_available: int
    seed: int
    corruptions: list[str]
    severities: list[int]
    source: str


class Evaluation(TypedDict):
    """What `evaluate` returns."""

    models: dict[str, ModelScores]
    protocol: Protocols


def _identity(counts: Tensor) -> Tensor:
    return counts


def _to_uint8(image_CHW: Tensor) -> corrupting.Image:
    """[0, 1] float (3, H, W) -> uint8 (H, W, 3), rounded to nearest."""
    return image_CHW.mul(255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()


class _Pictures(Dataset[tuple[str, Tensor, Tensor]]):
    """Items are (what, pictures (S, C, H, W), labels (2,)); with all severities in one item an image is decoded
    once.
    """

    def __init__(self, dataset: ImageSet, conflicts: Sequence[Conflict], severities: Sequence[int], seed: int) -> None:
        self.dataset, self.conflicts, self.severities, self.seed = dataset, conflicts, severities, seed

    def __getitem__(self, task: Task) -> Batch:
        what, index = task
        if what == CONFLICT:
            image, shape, texture = self.conflicts[index]
            return what, image[None], torch.tensor([shape, texture])
        item = self.dataset[index]
        labels = torch.tensor([int(item["label"])] * 2)
        if what == CLEAN:
            return what, item["image"][None], labels
        return what, self._corrupted(item["image"], what, index), labels

    def _corrupted(self, image_CHW: Tensor, what: str, index: int) -> Tensor:
        clean = _to_uint8(image_CHW)
        seeds = {s: corrupting.image_seed(self.seed, index, what, s) for s in self.severities}
        pictures = [corrupting.corrupt(clean, what, severity, seed) for severity, seed in seeds.items()]
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def _collate(items: list[Batch]) -> Batch:
    """Stack items of one batch, which all have the same `what`."""
    shapes = {tuple(pictures.shape[1:]) for _, pictures, _ in items}
    if len(shapes) > 1:
        raise DataError(
            f"images of one set differ in size: {sorted(shapes)} (C, H, W); resize or crop them to one size"
        )
    return items[0][0], torch.stack([item[1] for item in items]), torch.stack([item[2] for item in items])


def _start_worker(_: int) -> None:
    """One thread a worker: OpenCV would otherwise start its own pool in every process."""
    import cv2

    cv2.setNumThreads(0)


@contextmanager
def _eval_mode(models: Mapping[str, nn.Module]) -> Iterator[None]:
    """All models in eval mode; every submodule's flag is put back, also after an error."""
    flags = [(module, module.training) for model in models.values() for module in model.modules()]
    for model in models.values():
        model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


def read_conflicts(folder: Path, classes: Sequence[str], textures: Mapping[str, str] | None = None) -> list[Conflict]:
    """Read all `<shape>-<texture>-*.png` under `folder` as (image, shape's class, texture's class).

    Images are float (3, H, W) in [0, 1]. `classes` are the model's, in its order; `textures` maps a texture's name to
    the class it goes with (by default it bears the class's own name). Pictures whose cues agree say nothing about the
    bias and are left out (Geirhos et al. 2019). Raises MissingInputError or DataError, naming the folder or file.
    """
    if not folder.is_dir():
        raise MissingInputError(f"{folder}: no such folder of conflict pictures; generate them or leave shape bias out")
    number = {name: i for i, name in enumerate(classes)}
    owner = {name: name for name in classes} if textures is None else textures
    found = []
    for path in sorted(folder.rglob("*-*-*.png")):
        shape, texture, _ = path.name.split("-", 2)
        if shape not in number or owner.get(texture) not in number:
            raise DataError(f"{path}: {shape!r} or {texture!r} is no shape or texture of the classes {list(classes)}")
        cues = number[shape], number[owner[texture]]
        if cues[0] != cues[1]:
            found.append((_read_picture(path), *cues))
    if not found:
        raise DataError(f"{folder}: no conflict picture named <shape>-<texture>-*.png; generate them first")
    return found


def _read_picture(path: Path) -> Tensor:
    """An image file as float (3, H, W) in [0, 1]. Raises DataError if it is none."""
    try:
        with Image.open(path) as file:
            pixels = np.array(file.convert("RGB"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read as an image ({error}); replace or delete it") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


@dataclass(frozen=True)
class _Rows:
    """Which row of the count table belongs to which measurement."""

    names: tuple[str, ...]
    severities: tuple[int, ...]

    def __len__(self) -> int:
        return 2 + len(self.names) * len(self.severities)

    def of(self, what: str) -> list[int]:
        """Rows of one batch, in the order of its S axis."""
        if what in (CLEAN, CONFLICT):
            return [0 if what == CLEAN else 1]
        first = 2 + self.names.index(what) * len(self.severities)
        return list(range(first, first + len(self.severities)))

    def where(self, row: int) -> str:
        """The row in words."""
        if row < 2:
            return f"{CLEAN} images" if row == 0 else "conflict pictures"
        name, severity = divmod(row - 2, len(self.severities))
        return f"{self.names[name]} at severity {self.severities[severity]}"


def _count(logits_BK: Tensor, labels_B2: Tensor, conflict: bool) -> Tensor:
    """One row of counts, int64 (5,), on the CPU. Raises DataError for a label past K."""
    classes = logits_BK.shape[1]
    if int(labels_B2.max()) >= classes:
        label = int(labels_B2.max())
        raise DataError(
            f"label {label} does not fit a model of {classes} outputs; evaluate with the model's own classes"
        )
    hits_BK = logits_BK.topk(min(5, classes), dim=1).indices == labels_B2[:, :1]
    second = logits_BK.argmax(1) == labels_B2[:, 1] if conflict else hits_BK.any(1)
    total, bad = len(logits_BK), logits_BK.isnan().any(1)
    return torch.tensor([total, int(hits_BK[:, 0].sum()), int(second.sum()), total * (classes >= 5), int(bad.sum())])


def _measure(models: Mapping[str, nn.Module], batch: Batch, device: torch.device) -> Tensor:
    """Counts (M, S, 5) of one batch for all models."""
    what, pictures_BSCHW, labels_B2 = batch
    labels_B2 = labels_B2.to(device)
    counts = torch.zeros(len(models), pictures_BSCHW.shape[1], COLUMNS, dtype=torch.int64)
    for s in range(pictures_BSCHW.shape[1]):
        images_BCHW = pictures_BSCHW[:, s].to(device)
        if images_BCHW.dtype == torch.uint8:
            images_BCHW = images_BCHW.float() / 255
        for m, model in enumerate(models.values()):
            counts[m, s] = _count(model(images_BCHW), labels_B2, what == CONFLICT)
    return counts


def _tasks(
    clean: Sequence[int], names: Sequence[str], indices: Sequence[int], conflicts: Sequence[int], batch_size: int
) -> list[list[Task]]:
    """Batches of tasks, each of one kind: clean, every corruption, conflicts."""
    sets = [(CLEAN, clean), *((name, indices) for name in names), (CONFLICT, conflicts)]
    return [
        [(what, i) for i in chosen[start : start + batch_size]]
        for what, chosen in sets
        for start in range(0, len(chosen), batch_size)
    ]


def _loader(pictures: _Pictures, batches: list[list[Task]], num_workers: int) -> DataLoader[Batch]:
    """One loader for the whole evaluation, so that workers start only once."""
    init = _start_worker if num_workers else None
    sampler: Any = batches  # a sampler of tasks rather than of plain integers
    return DataLoader(
        pictures, batch_sampler=sampler, num_workers=num_workers, collate_fn=_collate, worker_init_fn=init
    )


def _choose(dataset: ImageSet, limit: int | None, seed: int) -> list[int]:
    """All indices, or the first `limit` of a permutation drawn from `seed`."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} leaves no image to evaluate; give at least 1, or None for all")
    if len(dataset) == 0:
        raise DataError("the evaluation set holds no image; check its folder")
    if limit is None or limit >= len(dataset):
        return list(range(len(dataset)))
    order: list[int] = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed)).tolist()
    return order[:limit]


def _scores(counts: Tensor, rows: _Rows, conflicts: bool) -> ModelScores:
    """Turn one model's table of counts (rows, 5) into named counts."""
    table: list[list[int]] = counts.tolist()
    clean: CleanCount = {"correct": table[0][CORRECT], "total": table[0][TOTAL]}
    if table[0][FIVE]:
        clean["top5"] = table[0][SECOND]
    cells: Cells = {
        name: {
            str(s): {"correct": table[r][CORRECT], "total": table[r][TOTAL]}
            for s, r in zip(rows.severities, rows.of(name), strict=True)
        }
        for name in rows.names
    }
    scores: ModelScores = {"clean": clean, "corruptions": cells}
    if conflicts:
        scores["shape_bias"] = {"shape": table[1][CORRECT], "texture": table[1][SECOND], "total": table[1][TOTAL]}
    return scores


def _accumulate(
    models: Mapping[str, nn.Module],
    loader: DataLoader[Batch],
    rows: _Rows,
    progress: Progress | None,
    total: int,
    device: torch.device,
) -> Tensor:
    """Counts (M, rows, 5) of this rank. Stops at the first NaN: the ranks tell each other in the reduction that
    follows.
    """
    counts = torch.zeros(len(models), len(rows), COLUMNS, dtype=torch.int64)
    done = 0
    for batch in loader:
        new = _measure(models, batch, device)
        counts[:, rows.of(batch[0])] += new
        beat()
        done += len(batch[1])
        if progress is not None:
            progress(batch[0], done, total)
        if bool(new[..., BAD].any()):
            break
    return counts


def _refuse_nan(counts: Tensor, models: Mapping[str, nn.Module], rows: _Rows) -> None:
    """Raise NumericsError on every rank if any rank saw a NaN."""
    for m, name in enumerate(models):
        for row in counts[m, :, BAD].nonzero().flatten().tolist():
            count = int(counts[m, row, BAD])
            raise NumericsError(
                f"model {name!r} gave NaN logits for {count} picture(s) of {rows.where(row)}; its weights "
                "are damaged or its arithmetic overflows: check the checkpoint, or evaluate in float32"
            )


@torch.inference_mode()
def evaluate(
    models: Mapping[str, nn.Module],
    dataset: ImageSet,
    *,
    corruptions: Sequence[str] = corrupting.CORRUPTIONS,
    severities: Sequence[int] = corrupting.SEVERITIES,
    limit: int | None = None,
    conflicts: Sequence[Conflict] = (),
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    rank: int = 0,
    world: int = 1,
    reduce: Callable[[Tensor], Tensor] = _identity,
    progress: Progress | None = None,
) -> Evaluation:
    """Count right answers of all `models` on clean, corrupted and, if given, conflict pictures.

    Models map float (B, C, H, W) in [0, 1] to logits (B, K); they must be on `device`. They run in eval mode and get
    their flags back. `limit` corrupts only the first images of a permutation drawn from `seed`; clean
    accuracy is always of all images. Rank r of `world` takes every
    world-th image from r on, and `reduce` sums an int64 tensor over the ranks, so that all return the same counts.
    `progress` is told (what, done, total) in images of this rank; a corrupted image counts once for all its
    severities.

    Raises ValueError (unknown corruption or severity, bad limit), DataError (images too small or of several sizes,
    labels that do not fit) and, on all ranks, NumericsError (NaN logits).
    """
    for name in corruptions:
        for severity in severities:
            corrupting.check(name, severity)
    rows = _Rows(tuple(corruptions), tuple(severities) if corruptions else ())
    chosen = _choose(dataset, limit, seed)
    if corruptions:  # here, for the sake of a plain message: an error in a worker arrives wrapped in its traceback
        corrupting.check_image(_to_uint8(dataset[chosen[0]]["image"]))
    mine = slice(rank, None, world)
    every, conflicting = range(len(dataset))[mine], range(len(conflicts))[mine]
    batches = _tasks(every, rows.names, chosen[mine], conflicting, batch_size)
    loader = _loader(_Pictures(dataset, conflicts, rows.severities, seed), batches, num_workers)
    logger.info("evaluating %d model(s) on %d of %d images", len(models), len(chosen), len(dataset))
    with _eval_mode(models):
        counts = _accumulate(models, loader, rows, progress, sum(map(len, batches)), torch.device(device))
    counts = reduce(counts)
    _refuse_nan(counts, models, rows)
    protocol: Protocols = {
        "images": len(chosen),
        "images_available": len(dataset),
        "seed": seed,
        "corruptions": list(rows.names),
        "severities": list(rows.severities),
        "source": corrupting.SOURCE,
    }
    scores = {name: _scores(counts[m], rows, len(conflicts) > 0) for m, name in enumerate(models)}
    return {"models": scores, "protocol": protocol}
