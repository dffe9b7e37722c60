"""Measuring cells: integer counts of networks on pictures that are read once for all of them.

A cell is one measurement: a suite, its corruption at a severity, or its share of changed words. A `ImagePass` holds the
cells that are made of the same pictures. Workers hand over uint8, and counts stay on the device until a portion is
done; then they are summed over ranks. So they depend neither on batches nor on workers nor on ranks, except where a
network's own arithmetic does.

Shapes: B batch, S cells of a portion, K outputs.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, get_worker_info

from mae_dat.config.errors import DataError, NumericsError
from mae_dat.data.loader import batch_loader
from mae_dat.models.modes import Network, autocast, evaluation_mode
from mae_dat.robustness import corruptions as corrupting
from mae_dat.robustness.scores.accuracy import Count
from mae_dat.robustness.scores.calibration import Confidences
from mae_dat.robustness.suites.sets import BenchmarkSet, Preprocessing
from mae_dat.runtime.collectives import all_sum, on_all_ranks
from mae_dat.runtime.watchdog import heartbeat
from mae_dat.runtime.world import World

# Columns of a row of counts. TEXTURE: of cue conflict. BAD: logits that are NaN or infinite.
TOTAL, CORRECT, TOP5, TEXTURE, BAD = range(5)
COLUMNS = 5

Adversary = Callable[[Network, Tensor, Tensor, Tensor], Tensor]
"""(network, pictures, labels (B,), image numbers (B,)) to adversarial pictures."""
WordHits = Callable[[Network, Tensor, Tensor, Tensor], Tensor]
"""The same to bool (S, B): whether the answer is right at each share of changed words."""


@dataclass(frozen=True)
class ImagePass:
    """The cells that one reading of some pictures gives, in the order of the S axis."""

    pictures: BenchmarkSet
    cells: tuple[str, ...] = ("",)
    corruption: str = ""
    severities: tuple[int, ...] = ()
    """Of pictures that are corrupted here: a cell each."""
    seed: int = 0
    adversary: Adversary | None = None
    word_hits: WordHits | None = None
    calibrated: bool = False
    precise: bool = False
    """Always in float32."""
    batched: bool = False
    """Pictures of a batch share its chance: batches are the same for any number of ranks."""
    against_float32: bool = False
    """Right is the answer that the same network gives in float32."""


class Found(TypedDict):
    """What a network scored on a portion."""

    counts: dict[str, Count]
    calibration: dict[str, float | None]


class _Item(TypedDict):
    """Pictures uint8 (S, 3, H, W), 1 for S where nothing is corrupted here; the image's place in its set; and its
    number, which its chance depends on."""

    pictures: Tensor
    index: int
    number: int


class PassImages(Dataset[Any]):
    """What networks get to see, as an `_Item`; keys are (portion, index)."""

    def __init__(self, portions: Sequence[ImagePass]) -> None:
        # Workers read; what attacks stays here.
        self.portions = [replace(portion, adversary=None, word_hits=None) for portion in portions]

    def __getitem__(self, key: tuple[int, int]) -> _Item:
        portion, index = self.portions[key[0]], key[1]
        pixels = np.array(_prepared(portion.pictures, index))
        number = portion.pictures.number(index)
        views = corrupted(pixels, number, portion) if portion.corruption else [pixels]
        pictures = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
        return {"pictures": pictures.contiguous(), "index": index, "number": number}


def _prepared(pictures: BenchmarkSet, index: int) -> Image.Image:
    prepare = pictures.transform
    assert isinstance(prepare, Preprocessing)
    return prepare.picture(pictures.load_image(index))


def corrupted(pixels: corrupting.Image, number: int, portion: ImagePass) -> list[corrupting.Image]:
    """A picture at every severity of the portion, as ImageNet-C would store it. Raises DataError for its size."""
    if get_worker_info() is not None:
        import cv2

        cv2.setNumThreads(0)  # OpenCV would otherwise start its own pool in every process
    name = portion.corruption
    seeds = [corrupting.image_seed(portion.seed, number, name, severity) for severity in portion.severities]
    made = zip(portion.severities, seeds, strict=True)
    return [corrupting.as_stored(corrupting.corrupt(pixels, name, severity, seed)) for severity, seed in made]


class PassSampler(Sampler[list[tuple[int, int]]]):
    """One rank's batches of keys (portion, index): of each portion the images r, r + W, ..., or of a batched one the
    batches r, r + W, ..., so that none is counted twice. Made as they are asked for: ImageNet-C has 3.75 million
    keys."""

    def __init__(self, portions: Sequence[ImagePass], world: World, batch_size: int) -> None:
        self.portions, self.world, self.batch_size = portions, world, batch_size

    def batches(self, portion: int) -> Sequence[range]:
        """The indices of each batch of a portion."""
        rank, ranks, size, total = *self.world[:2], self.batch_size, len(self.portions[portion].pictures)
        if self.portions[portion].batched:
            return [range(start, min(start + size, total)) for start in range(rank * size, total, ranks * size)]
        share = range(rank, total, ranks)
        return [share[start : start + size] for start in range(0, len(share), size)]

    def __len__(self) -> int:
        return sum(len(self.batches(portion)) for portion in range(len(self.portions)))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for portion in range(len(self.portions)):
            for batch in self.batches(portion):
                yield [(portion, index) for index in batch]


class MonitoredNetwork(nn.Module):
    """A network that says when it is asked: an attack may take an hour for one batch."""

    def __init__(self, network: Network, hear: Callable[[], None]) -> None:
        super().__init__()
        self.network, self.hear = network, hear

    def forward(self, image: Tensor) -> Tensor:
        """The network's answer."""
        self.hear()
        return self.network(image)


class NonFiniteFlag:
    """Tells that counts on the device are no longer zero: the first time at once, later a batch or two late, when they
    have come over by themselves. To ask for them would make the device wait for the next batch."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts
        self.arrived = torch.zeros(counts.shape, dtype=counts.dtype, pin_memory=counts.is_cuda)
        self.copied: torch.cuda.Event | None = None

    def raised(self) -> bool:
        """Whether any was seen not to be zero."""
        if not self.counts.is_cuda:
            return bool(self.counts.any())
        if self.copied is None:
            self.copied = torch.cuda.Event()
            self.arrived.copy_(self.counts)
        elif not self.copied.query():
            return False
        known = bool(self.arrived.any())
        self.arrived.copy_(self.counts, non_blocking=True)
        self.copied.record()
        return known


@dataclass
class PassCounter:
    """One network's counts on one portion: int64 (S, columns) on the device, and its confidences."""

    name: str
    portion: ImagePass
    device: torch.device
    precision: torch.dtype | None
    counts: Tensor = field(init=False)
    alarm: NonFiniteFlag = field(init=False)
    """Of logits that are not finite."""
    confidences: Confidences | None = None

    def __post_init__(self) -> None:
        self.counts = torch.zeros(len(self.portion.cells), COLUMNS, dtype=torch.int64, device=self.device)
        self.alarm = NonFiniteFlag(self.counts[:, BAD])
        if self.portion.calibrated:
            self.confidences = Confidences(len(self.portion.pictures), self.device)
        self.right = copy.copy(self.portion.pictures)
        """The labels, on the device."""
        self.right.targets = self.right.targets.to(self.device)
        self.right.reading = self.right.reading.to(self.device)

    def add(self, network: Network, pictures: Tensor, index: Tensor, number: Tensor) -> None:
        """A batch of float pictures (B, S, 3, H, W); `index` on the device, `number` not."""
        if self.portion.word_hits:
            hits = self.portion.word_hits(network, pictures[:, 0], self.right.targets[index, 0], number)
            self.counts[:, CORRECT] += hits.sum(1)
            self.counts[:, TOTAL] += len(index)
            return
        for row in range(pictures.shape[1]):
            self._add(self.counts[row], network, pictures[:, row], index, number)

    def _add(self, row: Tensor, network: Network, image: Tensor, index: Tensor, number: Tensor) -> None:
        reading, targets = self.right.reading, self.right.targets[index]
        if self.portion.adversary:
            image = self.portion.adversary(network, image, targets[:, 0], number)
        precision = None if self.portion.precise else self.precision
        with autocast(self.device, precision):
            logits = network(image).float()
        answers = reading.answers(logits, 5)
        right = self.right.right(answers, index)
        if self.portion.against_float32:
            with autocast(self.device, None):
                right = answers[:, 0] == reading.answers(network(image).float(), 5)[:, 0]
        five = (answers[:, :, None] == targets[:, None, :]).flatten(1).any(1)
        bad = ~logits.isfinite().all(1)
        shown = [torch.ones_like(bad), right, five, torch.zeros_like(bad), bad]
        if reading.pooled:
            shown[TEXTURE] = self.right.texture(answers, index)
        row += torch.stack(shown).sum(1)
        if self.confidences:
            self.confidences.add(index, reading.probabilities(logits), targets[:, 0])

    def found(self, reduce: Callable[[Tensor], Tensor]) -> Found:
        """The counts of all ranks, on each of them. Raises NumericsError for logits that are not finite on any,
        DataError for a miscount."""
        reading, table = self.portion.pictures.reading, reduce(self.counts).tolist()
        rows = dict(zip(self.portion.cells, table, strict=True))
        for cell, row in rows.items():
            if row[BAD]:  # whose rank went no further
                raise NumericsError(
                    f"{self.name} gave NaN or infinite logits for {row[BAD]} of the first {row[TOTAL]} pictures of "
                    f"{self.where(cell)}: its weights are damaged or its arithmetic overflows; check the checkpoint, "
                    "or give --precision fp32."
                )
        for cell, row in rows.items():
            if row[TOTAL] != len(self.portion.pictures):
                raise DataError(f"{self.where(cell)}: {row[TOTAL]} of {len(self.portion.pictures)} pictures counted")
        counts: dict[str, Count] = {}
        for cell, row in rows.items():
            counts[cell] = {"correct": row[CORRECT], "total": row[TOTAL]}
            if reading.pooled:
                counts[cell] |= {"shape": row[CORRECT], "texture": row[TEXTURE]}
            elif len(reading.classes) >= 5 and not self.portion.word_hits:
                counts[cell]["top5"] = row[TOP5]
        if self.confidences is None:
            return {"counts": counts, "calibration": {}}
        self.confidences.reduce(reduce)
        return {"counts": counts, "calibration": self.confidences.scores()}

    def where(self, cell: str) -> str:
        """The cell in words."""
        return f"{self.portion.pictures.cell.benchmark} {cell}".strip()


@torch.no_grad()  # not inference mode: attacks take gradients within
def measure(
    networks: Mapping[str, Network],
    portions: Sequence[tuple[ImagePass, Sequence[str]]],
    *,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device,
    precision: torch.dtype | None = None,
    world: World = World(),  # noqa: B008 - immutable
    reduce: Callable[[Tensor], Tensor] = all_sum,
    progress: Callable[[ImagePass, int], None] = lambda portion, count: None,
) -> Iterator[tuple[ImagePass, dict[str, Found]]]:
    """What the networks named beside each portion score on it, a portion at a time, on all ranks the same.

    `progress` hears of every batch of this rank, and with 0 pictures of every pass of an attack. One loader reads all
    portions. Raises on all ranks NumericsError (NaN or infinite logits, soon after the first), DataError (unreadable
    pictures).
    """
    every = [portion for portion, _ in portions]
    shares = PassSampler(every, world, batch_size)
    loader = batch_loader(PassImages(every), shares, num_workers, device.type == "cuda")
    stream: Iterator[Any] = iter(loader)

    def tell(portion: ImagePass, count: int) -> None:
        heartbeat()
        progress(portion, count)

    def count(portion: ImagePass, tallies: Sequence[PassCounter], steps: int) -> None:
        hear = functools.partial(tell, portion, 0)
        attacked = portion.adversary or portion.word_hits
        asked = {
            one.name: MonitoredNetwork(networks[one.name], hear) if attacked else networks[one.name] for one in tallies
        }
        with autocast(device, None):  # within it, networks cast their weights once, not for every batch
            for _ in range(steps):
                batch = next(stream)
                pictures = batch["pictures"].to(device, non_blocking=True).float() / 255
                index = batch["index"].to(device, non_blocking=True)
                for tally in tallies:
                    tally.add(asked[tally.name], pictures, index, batch["number"])
                tell(portion, len(index))
                if True in [tally.alarm.raised() for tally in tallies]:  # which `found` says, on all ranks
                    return

    with evaluation_mode(*networks.values()):
        for at, (portion, names) in enumerate(portions):
            tallies = [PassCounter(name, portion, device, precision) for name in names]
            on_all_ranks(functools.partial(count, portion, tallies, len(shares.batches(at))))
            yield portion, {tally.name: tally.found(reduce) for tally in tallies}
