"""Fine-tuning steps (row 3 of the goals): random images and labels, no mixing."""

from functools import partial
from typing import Any

import torch
from torch.nn.functional import one_hot

from benchmarks.ours import CLASSES, make_batch, training_step
from benchmarks.plain import Trainer, finetuning_step
from benchmarks.timing import NEEDS_GPU, Case, Step
from mae_dat.config.groups import AugmentConfig
from mae_dat.models.classifier import build_classifier
from mae_dat.runtime.blocks import compile_blocks
from mae_dat.training.objectives.classification import Classification

# Batch on a GPU, GFLOP an image.
SIZES = {"vit_base_patch16": (256, 105.0), "vit_large_patch16": (128, 369.0), "vit_huge_patch14": (64, 1003.0)}
CPU_BATCH, SIDE = 4, 224
GOALS = {False: 1.7, True: 1.2}
"""On a GPU: times the released step, and times timm's network with its fused attention in the same step."""


def ours(name: str, side: int, batch: int, device: torch.device, compiled: bool = False) -> Step:
    """Builds our step of the classifier `name` at `side` px."""
    with torch.device(device):
        model = build_classifier(name, CLASSES, side).train()
    if compiled:
        compile_blocks(model)
    objective = Classification(AugmentConfig(smoothing=0.0), CLASSES)
    return training_step(model, objective, make_batch(batch, side, device), device)


def released(name: str, side: int, batch: int, device: torch.device, fused_attention: bool = False) -> Step:
    """Builds the released step of the same network, or the same with timm's fused attention."""
    with torch.device(device):
        model = build_classifier(name, CLASSES, side).train()
    trainer, pictures = Trainer(model, fused_attention), make_batch(batch, side, device)
    target = one_hot(pictures["label"], CLASSES).float()
    return lambda: finetuning_step(model, trainer, pictures["image"], target)


def case(
    size: tuple[str, int, int, torch.device], fused_attention: bool = False, compiled: bool = False, **more: Any
) -> Case:
    """Ours against one of the two baselines."""
    against = "the same with SDPA" if fused_attention else "released MAE"
    build = partial(ours, *size, compiled), partial(released, *size, fused_attention)
    return Case(f"{size[0]} fine-tuning step{', --compile' * compiled}", *build, against, batch=size[2], **more)


def cases(quick: bool, device: torch.device) -> list[Case]:
    """The demo's size; ViT-B everywhere, L and H on a GPU; the second baseline not with `quick`."""
    gpu = device.type == "cuda"
    found = [case(("vit_demo_patch8", 64, 64, device))]
    for name, (batch, gflop) in SIZES.items():
        base = name == "vit_base_patch16"
        size = (name, SIDE, batch if gpu else CPU_BATCH, device)
        for fused in (False,) if quick else (False, True):
            goals = {
                "at_least": GOALS[fused] if gpu or not base else None,
                "skip_reason": "" if gpu or base else NEEDS_GPU,
            }
            for compiled in (False, True) if gpu and not quick else (False,):
                found.append(case(size, fused, compiled, goal=3, gflop=gflop, **goals))
    return found
