"""MAE pretraining steps (rows 1 and 2 of the goals): random images, mask ratio 0.75."""

from functools import partial
from typing import Any

import torch

from benchmarks.ours import make_batch, training_step
from benchmarks.plain import Trainer, mae_step
from benchmarks.timing import NEEDS_GPU, Case, Step
from mae_dat.models.mae import build_mae, mask_noise
from mae_dat.runtime.blocks import compile_blocks
from mae_dat.training.objectives.reconstruction import MaskedReconstruction

# Batch on a GPU, GFLOP an image, goals on a GPU: times the reference, share of the matrix rate.
SIZES = {
    "mae_vit_base_patch16": (256, 58.5, 2.0, 0.50),
    "mae_vit_large_patch16": (128, 124.0, 1.7, 0.60),
    "mae_vit_huge_patch14": (64, 291.0, 1.5, 0.65),
}
CPU_BATCH, CPU_GOAL = 8, 2.0


def ours(name: str, batch: int, device: torch.device, compiled: bool = False) -> Step:
    """Builds our step of the model `name`."""
    with torch.device(device):
        model = build_mae(name).train()
    if compiled:
        compile_blocks(model)
    pictures = make_batch(batch, model.img_size[0], device)
    return training_step(model, MaskedReconstruction(0.75, False), pictures, device)


def released(name: str, batch: int, device: torch.device) -> Step:
    """Builds the released step of the same model."""
    with torch.device(device):
        model = build_mae(name).train()
    trainer, image = Trainer(model), make_batch(batch, model.img_size[0], device)["image"]
    return lambda: mae_step(model, trainer, image, mask_noise(batch, model.num_patches, None, device))


def case(name: str, batch: int, device: torch.device, **more: object) -> Case:
    """Ours against the released step."""
    build = {"ours": partial(ours, name, batch, device), "baseline": partial(released, name, batch, device)}
    return Case(f"{name} step", **build, against="released MAE", batch=batch, **more)  # type: ignore[arg-type]


def cases(quick: bool, device: torch.device) -> list[Case]:
    """The demo's size; ViT-B everywhere, L and H on a GPU; what `--compile` gives not with `quick`."""
    gpu = device.type == "cuda"
    found = [case("mae_vit_demo_patch8", 64, device)]
    for name, (batch, gflop, faster, share) in SIZES.items():
        base = name == "mae_vit_base_patch16"
        goals = {"at_least": faster if gpu else CPU_GOAL, "share_at_least": share if gpu else None}
        if not (base or gpu):
            goals = {"at_least": faster, "share_at_least": share, "skip_reason": NEEDS_GPU}
        size = (name, batch if gpu else CPU_BATCH, device)
        found.append(case(*size, goal=1, gflop=gflop, **goals))
        if gpu and not quick:  # the best form may be this one
            build = partial(ours, *size, compiled=True), partial(released, *size)
            more: dict[str, Any] = {"batch": size[1], "goal": 1, "gflop": gflop, **goals}
            found.append(Case(f"{name} step, --compile", *build, against="released MAE", **more))
        elif base and not quick:
            build = partial(ours, *size, compiled=True), partial(ours, *size)
            found.append(Case(f"{name} step, --compile", *build, against="without", batch=size[1], gflop=gflop))
    return found
