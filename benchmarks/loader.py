"""The training loader on one core against ImageFolder and PIL (row 9 of the goals), and what a step waits for it.

The images are as large as those of ImageNet: 500 x 375 px, generated, with a grain that brings their JPEGs to some
110 kB. All loaders crop and flip as MAE does and run in this process on one thread; processor time is counted. The
baseline also normalizes, which our steps leave to the device, together with the division by 255.
"""

import atexit
import functools
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms import InterpolationMode

from benchmarks.ours import training_step
from benchmarks.timing import Case, Step, wait_for
from mae_dat.config.commands.pack import PackConfig
from mae_dat.data.generated.draw import draw_image
from mae_dat.data.image_set import Batch, as_float
from mae_dat.data.loader import ImageLoader, train_loader
from mae_dat.data.open import open_images
from mae_dat.data.sampler import TrainSampler
from mae_dat.data.shards.pack import pack
from mae_dat.data.transforms import PretrainTransform
from mae_dat.models.mae import build_mae
from mae_dat.runtime.console import Console
from mae_dat.training.objectives.reconstruction import MaskedReconstruction

IMAGES, BATCH, SIDE = 64, 32, 224
GRAIN, QUALITY = 9.0, 95  # gray levels, JPEG
SHORT_SIDE = 256
ORIGINALS_GOAL, SHRUNK_GOAL = 1.8, 4.5
WAITING_GOAL = 0.03
STEPS = 1_000_000  # more than are taken


@functools.cache
def pictures() -> tuple[Path, Path]:
    """A folder of originals, and shards of the same images shrunk; both are gone when the process ends."""
    root = Path(tempfile.mkdtemp(prefix="mae_dat_loader_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    grain = np.random.default_rng(0)
    for index in range(IMAGES):
        smooth = draw_image(0, "train", index, size=500).image[:375]
        noisy = smooth + grain.normal(0, GRAIN, (*smooth.shape[:2], 1))
        path = root / "originals" / "train" / f"{index % 10}" / f"{index}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=QUALITY)
    config = PackConfig(str(root / "originals"), str(root / "shrunk"), size=SHORT_SIDE, num_workers=0)
    pack(config, Console(quiet=True))
    return root / "originals" / "train", root / "shrunk" / "train"


def our_loader(shrunk: bool, batch: int, num_workers: int, pin_memory: bool = False) -> ImageLoader:
    """Endless batches of ours, uint8."""
    images = open_images(pictures()[shrunk], PretrainTransform((SIDE, SIDE)))
    sampler = TrainSampler(len(images), batch, 0, 1, seed=0, start_step=0, total_steps=STEPS, order=images.order)
    return train_loader(images, sampler, num_workers, pin_memory)


def plain_loader() -> DataLoader[object]:
    """ImageFolder and PIL, as the MAE repository reads ImageNet."""
    crop = transforms.RandomResizedCrop(SIDE, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC)
    normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    steps = [crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize]
    images = datasets.ImageFolder(str(pictures()[0]), transforms.Compose(steps))
    return DataLoader(images, BATCH, sampler=torch.arange(STEPS) % IMAGES)  # type: ignore[arg-type]


def ours(shrunk: bool) -> Step:
    """Builds our loader, of the originals or of what they were shrunk to."""
    return reading(our_loader(shrunk, BATCH, 0))


def plain() -> Step:
    """Builds the baseline."""
    return reading(plain_loader())


def reading(loader: DataLoader[object]) -> Step:
    """A step reads a batch on one thread, as a worker does, and returns its processor time."""
    batches = iter(loader)

    def step() -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        start = time.process_time()
        next(batches)
        taken = time.process_time() - start
        torch.set_num_threads(threads)
        return taken

    return step


def fed(batch: int, device: torch.device) -> Step:
    """Builds a MAE ViT-B step fed from shrunk shards; a step returns the seconds for which the device had no batch."""
    model = build_mae("mae_vit_base_patch16").to(device).train()
    workers = max(1, min(16, (os.cpu_count() or 1) - 1))
    batches = iter(our_loader(True, batch, workers, pin_memory=device.type == "cuda"))
    taken = on_device(next(batches), device)
    train = training_step(model, MaskedReconstruction(0.75, False), taken, device)

    def step() -> float:
        train()
        wait_for(device)
        start = time.perf_counter()
        fresh = next(batches)
        waited = time.perf_counter() - start
        taken.update(on_device(fresh, device))
        return waited

    return step


def on_device(batch: Batch, device: torch.device) -> Batch:
    """As the engine moves it."""
    moved: Batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}  # type: ignore
    moved["image"] = as_float(moved["image"])
    return moved


def cases(quick: bool, device: torch.device) -> list[Case]:
    """Originals, shrunk shards, and the wait of a training step."""
    shared = {"baseline": plain, "against": "ImageFolder + PIL on originals", "goal": 9, "batch": BATCH}
    clock = {"returns_seconds": True, "in_process": False}
    batch = min(IMAGES, 64 if device.type == "cuda" else 8)
    return [
        Case("loader, originals", partial(ours, False), at_least=ORIGINALS_GOAL, **shared, **clock),  # type: ignore[arg-type]
        Case("loader, shrunk shards", partial(ours, True), at_least=SHRUNK_GOAL, **shared, **clock),  # type: ignore[arg-type]
        Case(
            "MAE ViT-B fed by shards",
            partial(fed, batch, device),
            batch=batch,
            returns_waiting=True,
            waiting_at_most=WAITING_GOAL,
        ),
    ]
