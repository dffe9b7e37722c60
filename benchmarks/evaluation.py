"""Evaluating stored ImageNet-C folders (row 7 of the goals): ours against a loader for every cell, in float32.

The images are generated and few. What a loader needs until its first batch is therefore left out on both sides: of
the 50,000 images of a real cell it is next to nothing, here it would be most of the gain. `python -m
benchmarks.evaluation [--quick]` tells where the time goes.
"""

import atexit
import dataclasses
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from benchmarks.timing import Case, Step, peak_memory, quartiles, restart_peak, wait_for
from mae_dat.config.parse import load_config, run_command
from mae_dat.data.generated.draw import draw_image
from mae_dat.models.classifier import Classifier, build_classifier
from mae_dat.robustness.corruptions import CORRUPTIONS, SEVERITIES, corrupt_image
from mae_dat.robustness.measure import measure_passes
from mae_dat.robustness.suites.base import NetworkInput, SuiteSettings
from mae_dat.robustness.suites.imagenet import SYNSETS
from mae_dat.robustness.suites.sources import SuiteSources
from mae_dat.robustness.suites.specs import build_suite
from mae_dat.runtime.device import amp_dtype, pick_device

USUAL = "75 loaders, float32, a read-back a batch"
GOAL = 5.0
CLASSES = 8  # folders that hold images


@dataclass(frozen=True)
class Work:
    """What is evaluated, and how."""

    model: str
    cells: int
    images: int
    """In each cell."""
    batch: int
    device: torch.device
    precision: str = "auto"
    workers: int = max(1, min(16, (os.cpu_count() or 1) // 2))

    @property
    def total(self) -> int:
        """Pictures."""
        return self.cells * self.images


@functools.cache
def stored_set(cells: int, images: int) -> Path:
    """An ImageNet-C of so many cells and images, in a folder that goes with this process."""
    root = tempfile.TemporaryDirectory(prefix="imagenet-c-")
    atexit.register(root.cleanup)
    pictures = [draw_image(0, "val", index, size=224).image for index in range(images)]
    places = [(name, severity) for severity in SEVERITIES for name in CORRUPTIONS][:cells]
    for name, severity in places:
        for index, picture in enumerate(pictures):
            wnid = SYNSETS[index % CLASSES]
            path = Path(root.name, "imagenet-c", name, str(severity), wnid, f"{index:08d}.JPEG")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(corrupt_image(np.asarray(picture), name, severity, index)).save(path, quality=85)
    return Path(root.name)


class Timed(nn.Module):
    """A network that sums up the seconds spent in it (on a CPU) and knows when it was first asked."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.seconds, self.first = network, 0.0, 0.0

    def forward(self, image: Tensor) -> Tensor:
        """The network's answer."""
        start = time.perf_counter()
        self.first = self.first or start
        logits: Tensor = self.network(image)
        self.seconds += time.perf_counter() - start
        return logits


def build(work: Work) -> Classifier:
    """The network, its answers spread over the classes that there are."""
    torch.manual_seed(0)
    model = build_classifier(work.model, len(SYNSETS), 224).to(work.device).eval()
    weight, bias = (getattr(model.net.get_classifier(), name).data for name in ("weight", "bias"))  # type: ignore[operator]
    nn.init.normal_(weight)
    bias.fill_(-1e4)[:CLASSES] = 0
    return model


@dataclass
class Run:
    """One evaluation of all cells."""

    right: list[int] = field(default_factory=list)
    """Of each cell."""
    seconds: float = 0.0
    starts: float = 0.0
    """Seconds of these until a loader's first batch was there."""
    network: float = 0.0
    """Seconds of these within the network; means nothing on a GPU."""
    peaks: list[float] = field(default_factory=list)
    """Of memory in bytes, after each cell."""


def ours(work: Work, model: Classifier) -> Run:
    """As `mae-dat evaluate` does it."""
    network, found = Timed(model), Run()
    start = time.perf_counter()
    sources = SuiteSources(SuiteSettings(stored_set(work.cells, work.images), partial=True), len(SYNSETS))
    suite = build_suite("imagenet-c", sources, NetworkInput((224, 224)))
    passes = sorted(suite.passes, key=lambda image_pass: image_pass.images.root)
    measured = measure_passes(
        {"net": network},
        [(image_pass, ["net"]) for image_pass in passes],
        batch_size=work.batch,
        num_workers=work.workers,
        device=work.device,
        precision=amp_dtype(work.precision, work.device),
    )
    restart_peak(work.device)
    for image_pass, counts in measured:
        found.right.append(counts["net"].counts[image_pass.cells[0]]["correct"])
        found.peaks.append(peak_memory(work.device))
    found.seconds, found.starts = time.perf_counter() - start, network.first - start
    found.network = network.seconds
    return found


@torch.no_grad()
def usual(work: Work, model: Classifier) -> Run:
    """As evaluations are mostly written: for each cell a folder, a loader and its workers anew, normalization in the
    workers, float32, and the number of right answers read back after every batch."""
    network, found = Timed(model.net), Run()
    normalize = transforms.Normalize(model.mean.flatten().tolist(), model.std.flatten().tolist())
    prepare = transforms.Compose([transforms.ToTensor(), normalize])
    start = time.perf_counter()
    for cell in sorted(stored_set(work.cells, work.images).glob("imagenet-c/*/*")):
        began = time.perf_counter()
        images = ImageFolder(str(cell), prepare)
        batches = iter(DataLoader(images, work.batch, num_workers=work.workers, pin_memory=work.device.type == "cuda"))
        batch, right = next(batches), 0
        found.starts += time.perf_counter() - began
        while batch is not None:
            image, label = batch[0].to(work.device), batch[1].to(work.device)
            right += int((network(image).argmax(1) == label).sum().item())
            batch = next(batches, None)
        found.right.append(right)
    found.seconds, found.network = time.perf_counter() - start, network.seconds
    return found


# ---- as cases of `python -m benchmarks` ----


def cases(quick: bool, device: torch.device) -> list[Case]:
    """A small network, where reading weighs most, and larger ones."""
    return [_case(work) for work in works(quick, device)]


def works(quick: bool, device: torch.device) -> list[Work]:
    """What is evaluated on a device."""
    if device.type == "cuda":
        sizes = ("tiny", "base") if quick else ("tiny", "base", "large")
        return [Work(f"vit_{size}_patch16_224", 15, 512, 256, device) for size in sizes]
    tiny = Work("vit_tiny_patch16_224", 5, 32, 32, device)
    return [tiny] if quick else [tiny, Work("vit_base_patch16_224", 2, 16, 8, device)]


def _case(work: Work) -> Case:
    def step(act: Callable[[Work, Classifier], Run]) -> Callable[[], Step]:
        def built() -> Step:
            model = build(work)

            def seconds() -> float:
                wait_for(work.device)
                run = act(work, model)
                return run.seconds - run.starts

            return seconds

        return built

    name = f"evaluation, {work.model}"
    settings = {"against": USUAL, "goal": 7, "batch": work.total, "at_least": GOAL, "returns_seconds": True}
    return Case(name, step(ours), step(usual), **settings)  # type: ignore[arg-type]


# ---- where the time goes ----


@dataclass(frozen=True)
class ProfileConfig:
    """What to look at."""

    quick: bool = False
    """The small network only."""
    device: str = "auto"
    rounds: int = 3


def main() -> None:
    """The two ways and ours in float32, in turns."""
    config = load_config(ProfileConfig, sys.argv[1:], "python -m benchmarks.evaluation", description=__doc__)
    device = pick_device(config.device)
    best = "bf16" if amp_dtype("auto", device) else "fp32"
    print(f"{device}, {torch.get_num_threads()} threads and {Work('', 0, 0, 0, device).workers} workers of the loader")
    for work in works(config.quick, device):
        profile(work, best, config.rounds)


def profile(work: Work, best: str, rounds: int) -> None:
    """Prints the rows of one network. Both ways in float32 must count the same."""
    model = build(work)
    ways: dict[str, Callable[[], Run]] = {
        "the usual way, fp32": lambda: usual(work, model),
        "ours, fp32": lambda: ours(dataclasses.replace(work, precision="fp32"), model),
        f"ours, {best}": lambda: ours(dataclasses.replace(work, precision=best), model),
    }
    turns = [{name: act() for name, act in ways.items()} for _ in range(rounds + 1)][1:]
    first, second = list(ways)[:2]
    assert turns[0][first].right == turns[0][second].right, "the two ways do not count the same"
    print(f"\n{work.model}, {work.cells} cells of {work.images} images, batches of {work.batch}")
    print(f"{'':22}{'images/s':>9}{'times as fast':>24}{'outside the network':>21}{'loaders start in':>18}")
    for name in ways:
        runs = [turn[name] for turn in turns]
        ratios = [_speed(turn[name]) / _speed(turn[first]) for turn in turns]
        low, high = quartiles(ratios)
        shares = [1 - one.network / (one.seconds - one.starts) for one in runs]
        share = "" if work.device.type == "cuda" else f"{statistics.median(shares):.0%}"
        told = f"{statistics.median(ratios):.2f} ({low:.2f} to {high:.2f})"
        starts = statistics.median(one.starts for one in runs) / (work.cells if name == first else 1)
        rate = work.total * statistics.median(map(_speed, runs))
        print(f"{name:22}{rate:9.1f}{told:>24}{share:>21}{starts:16.2f} s")
    peaks = turns[-1][f"ours, {best}"].peaks
    print(f"ours, peak memory: {peaks[0] / 1e9:.2f} GB after the first cell, {peaks[-1] / 1e9:.2f} GB after the last")


def _speed(run: Run) -> float:
    return 1 / (run.seconds - run.starts)


if __name__ == "__main__":
    run_command(main)
