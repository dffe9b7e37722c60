"""Measure networks on image passes: every image is read once, whatever the number of networks and cells.

`cached_passes` calls `measure_passes` with what is not in the cache; `counting` counts the predictions.

A cell is one number of the results: a suite, its corruption at one severity, or its share of changed words. Counts do
not depend on batches, workers or ranks, except where a network's own arithmetic does.

Shapes: B batch, S cells of a pass.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, get_worker_info

from mae_dat.data.loader import batch_loader
from mae_dat.models.modes import Network, autocast, evaluation_mode
from mae_dat.robustness.corruptions import as_stored, corrupt_image, image_seed
from mae_dat.robustness.corruptions.pixels import Image
from mae_dat.robustness.counting import PassCounter, SuiteCounts
from mae_dat.robustness.suites.base import ImagePass
from mae_dat.runtime.collectives import all_sum, on_all_ranks
from mae_dat.runtime.watchdog import heartbeat
from mae_dat.runtime.world import World

Progress = Callable[[ImagePass, int], None]
"""(image_pass, images): called after every batch, and with 0 images after every forward pass of an attack."""


class PassItem(TypedDict):
    """What a worker returns for one image."""

    images: Tensor
    """uint8 (S, 3, H, W): the image in each of its versions; S is 1 where nothing is corrupted here."""
    set_index: int
    """The image's index in the image set, where its label is."""
    folder_index: int
    """Its index in the whole folder, of which the set may be a subset. Its random draws depend on it, so that they are
    the same in every subset."""


class PassImages(Dataset[Any]):
    """The images of several passes as the networks get them; keys are (pass, index)."""

    def __init__(self, passes: Sequence[ImagePass]) -> None:
        # Workers only read; attacks run in this process and may not be picklable.
        self.passes = [replace(image_pass, adversary=None, word_hits=None) for image_pass in passes]

    def __getitem__(self, key: tuple[int, int]) -> PassItem:
        image_pass, index = self.passes[key[0]], key[1]
        pixels = np.array(image_pass.images.prepared_image(index))
        folder_index = image_pass.images.folder_index(index)
        if image_pass.function is not None:
            pixels = image_pass.function(pixels, image_pass.seed, folder_index)
        versions = corrupt_at_severities(pixels, folder_index, image_pass) if image_pass.corruption else [pixels]
        images = torch.from_numpy(np.stack(versions)).permute(0, 3, 1, 2)
        return {"images": images.contiguous(), "set_index": index, "folder_index": folder_index}


def corrupt_at_severities(pixels: Image, folder_index: int, image_pass: ImagePass) -> list[Image]:
    """Return an image, uint8 (H, W, 3), corrupted at every severity of the pass and compressed as ImageNet-C stores it.

    Raises DataError for its size.
    """
    if get_worker_info() is not None:
        import cv2

        cv2.setNumThreads(0)  # OpenCV would otherwise start a thread pool in every worker process
    name = image_pass.corruption
    versions = []
    for severity in image_pass.severities:
        seed = image_seed(image_pass.seed, folder_index, name, severity)
        versions.append(as_stored(corrupt_image(pixels, name, severity, seed)))
    return versions


class PassSampler(Sampler[list[tuple[int, int]]]):
    """One rank's batches of keys (pass, index), pass after pass.

    Rank r of W gets the images r, r + W, ... of a pass, or the batches r, r + W, ... where batches are fixed, so that
    every image is counted exactly once. Batches are made one by one: ImageNet-C has 3.75 million keys.
    """

    def __init__(self, passes: Sequence[ImagePass], world: World, batch_size: int) -> None:
        self.passes, self.world, self.batch_size = passes, world, batch_size

    def batches(self, position: int) -> Sequence[range]:
        """Return the indices of each batch of a pass."""
        rank, ranks, size = self.world.rank, self.world.size, self.batch_size
        total = len(self.passes[position].images)
        if self.passes[position].fixed_batches:
            return [range(start, min(start + size, total)) for start in range(rank * size, total, ranks * size)]
        indices = range(rank, total, ranks)
        return [indices[start : start + size] for start in range(0, len(indices), size)]

    def __len__(self) -> int:
        return sum(len(self.batches(position)) for position in range(len(self.passes)))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for position in range(len(self.passes)):
            for batch in self.batches(position):
                yield [(position, index) for index in batch]


class MonitoredNetwork(nn.Module):
    """A network that reports each forward pass, because an attack may take an hour for one batch."""

    def __init__(self, network: Network, report: Callable[[], None]) -> None:
        super().__init__()
        self.network, self.report = network, report

    def forward(self, image: Tensor) -> Tensor:
        """Return the network's logits (B, K) for images (B, 3, H, W)."""
        self.report()
        return self.network(image)


@torch.no_grad()  # not inference mode, because attacks take gradients inside
def measure_passes(  # noqa: PLR0913 - keywords
    networks: Mapping[str, Network],
    passes: Sequence[tuple[ImagePass, Sequence[str]]],
    *,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device,
    precision: torch.dtype | None = None,
    world: World = World(),  # noqa: B008 - immutable
    reduce: Callable[[Tensor], Tensor] = all_sum,
    progress: Progress = lambda image_pass, images: None,
) -> Iterator[tuple[ImagePass, dict[str, SuiteCounts]]]:
    """Yield the counts of the networks named beside each pass, pass by pass, the same on all ranks.

    How images flow:

    1. An image set (`BenchmarkSet`) knows files and labels. An `ImagePass` reads it once and gives S cells, such as one
       corruption at five severities.
    2. `PassSampler` divides each pass into this rank's batches. Workers of one loader, which serves all passes, decode
       and resize each image, corrupt it S times (`PassImages`), and return uint8 (S, 3, H, W).
    3. On the device a batch becomes float (B, S, 3, H, W) in [0, 1]. Each network's `PassCounter` attacks the images if
       the pass says so, predicts, and adds to its counts, which stay on the device.
    4. After a pass, the counts are summed over ranks by `reduce` and yielded.

    Raises on all ranks NumericsError (NaN or infinite logits, soon after the first), DataError (unreadable images).
    """
    image_passes = [image_pass for image_pass, _ in passes]
    sampler = PassSampler(image_passes, world, batch_size)
    batches: Iterator[Any] = iter(batch_loader(PassImages(image_passes), sampler, num_workers, device.type == "cuda"))
    with evaluation_mode(*networks.values()):
        for position, (image_pass, names) in enumerate(passes):
            report = functools.partial(_report, progress, image_pass)
            models = {name: _monitored(networks[name], image_pass, report) for name in names}
            counters = [
                PassCounter(name, models[name], image_pass, device=device, precision=precision) for name in names
            ]
            steps = len(sampler.batches(position))
            on_all_ranks(functools.partial(_count_batches, batches, steps, counters, device, report))
            yield image_pass, {counter.name: counter.sum_over_ranks(reduce) for counter in counters}


def _report(progress: Progress, image_pass: ImagePass, images: int = 0) -> None:
    heartbeat()
    progress(image_pass, images)


def _monitored(network: Network, image_pass: ImagePass, report: Callable[[], None]) -> Network:
    is_attacked = image_pass.adversary or image_pass.word_hits
    return MonitoredNetwork(network, report) if is_attacked else network


def _count_batches(
    batches: Iterator[Any],
    steps: int,
    counters: Sequence[PassCounter],
    device: torch.device,
    report: Callable[[int], None],
) -> None:
    """Count the next `steps` batches; stop early if a network gives logits that are not finite, which `sum_over_ranks`
    then reports on all ranks."""
    with autocast(device, None):  # inside one outer block, a network's weights are cast once and not for every batch
        for _ in range(steps):
            batch = next(batches)
            images = batch["images"].to(device, non_blocking=True).float() / 255
            set_index = batch["set_index"].to(device, non_blocking=True)
            for counter in counters:
                counter.add(images, set_index, batch["folder_index"])
            report(len(set_index))
            # All flags are read, not only up to the first one that is set: reading starts a flag's next copy.
            flags = [counter.non_finite.is_set() for counter in counters]
            if any(flags):
                return
