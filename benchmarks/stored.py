"""Training on stored adversaries against plain training, with the loader: images are decoded in the training process.

The adversaries have random words: a step costs the same for every kind.
"""

import atexit
import functools
import shutil
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.ours import CLASSES, training_step
from benchmarks.timing import Case, Step
from mae_dat.attacks.attack_folder import attack_folder
from mae_dat.config.commands.attack import AttackFolderConfig
from mae_dat.config.groups import AugmentConfig
from mae_dat.data.adversaries import StoredPairs
from mae_dat.data.generated.folder import FolderSettings, write_image_folder
from mae_dat.data.image_set import ImageSet
from mae_dat.data.loader import train_loader
from mae_dat.data.open import open_images
from mae_dat.data.sampler import TrainSampler
from mae_dat.data.transforms import finetune_transform
from mae_dat.models.classifier import build_classifier
from mae_dat.runtime.console import Console
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.stored import WithStoredAdversary

IMAGES, STEPS = 64, 1_000_000  # more steps than are taken
GOAL = 2.1
SIZES = (("vit_demo_patch8", 64, 16), ("vit_base_patch16", 224, 4))
GPU_BATCH = 64


@functools.cache
def adversaries(side: int) -> tuple[Path, Path]:
    """Training images a little larger than `side`, and their adversaries; both are gone when the process ends."""
    root = Path(tempfile.mkdtemp(prefix="mae_dat_stored_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    settings = FolderSettings(train=IMAGES, val=10, conflict=0, silhouette=0, size=side * 8 // 7)
    data = write_image_folder(root / "images", settings)
    config = AttackFolderConfig.from_flags(
        checkpoint="mae_dat_demo",
        data_path=str(data),
        output_dir=str(root / "adversaries"),
        kind="random",
        size=side * 8 // 7,
        num_workers=0,
    )
    attack_folder(config, Console(quiet=True))
    return data / "train", root / "adversaries"


def trained(name: str, side: int, batch: int, device: torch.device, stored: bool) -> Step:
    """Builds a step of a training that reads its images, with or without stored adversaries."""
    originals, folder = adversaries(side)
    images: ImageSet = open_images(originals, finetune_transform((side, side), reprob=0.0))
    objective = Classification(AugmentConfig(smoothing=0.0), CLASSES)
    if stored:
        images = StoredPairs(images, folder)
    sampler = TrainSampler(len(images), batch, 0, 1, seed=0, start_step=0, total_steps=STEPS, order=images.order)
    with torch.device(device):
        model = build_classifier(name, CLASSES, side).train()
    loader = train_loader(images, sampler, num_workers=0)
    return training_step(model, WithStoredAdversary(objective) if stored else objective, batch, device, loader=loader)


def cases(quick: bool, device: torch.device) -> list[Case]:
    """The demo's size and ViT-B."""
    found = []
    for name, side, cpu_batch in SIZES:
        batch = GPU_BATCH if device.type == "cuda" else cpu_batch
        ours, plain = (partial(trained, name, side, batch, device, stored) for stored in (True, False))
        against = "our plain step, loader included"
        found.append(Case(f"{name} DAT, stored", ours, plain, against, goal=6, at_most=GOAL, is_cost=True, batch=batch))
    return found
