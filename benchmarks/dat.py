"""DAT steps: the exact algorithm against the released step (row 5 of the goals), and every mode against our own plain
fine-tuning step (row 6). VQ-f8 at 224 px; at the demo's size a small VQGAN."""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.functional import one_hot

from benchmarks import finetune
from benchmarks.ours import CLASSES, make_batch, training_step
from benchmarks.plain import VQ_F8, ReleasedVQGAN, Trainer, dat_step
from benchmarks.timing import NEEDS_GPU, Case, Step
from mae_dat.classifier import build_classifier
from mae_dat.config import AttackConfig, AugmentConfig
from mae_dat.objectives import Classification, WithDAT
from mae_dat.tokenizer import VQGAN, LightConfig, LightTokenizer, VQGANConfig


class Work(NamedTuple):
    """A DAT step."""

    name: str
    side: int
    batch: int
    device: torch.device
    vqgan: VQGANConfig


SMALL_VQGAN = VQGANConfig(512, 8, 8, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=())
EXACT = {"random_start": 1.0}  # as in four of five released steps
MODES: dict[str, dict[str, Any]] = {"exact": EXACT, "exact, light tokenizer": EXACT}
# Name, batch on a GPU, GFLOP an image of the exact step, times the released step on a GPU, most plain steps by mode.
SIZES = (
    ("vit_base_patch16", 64, 1344.0, 4.0, {"exact": 13.0}),
    ("vit_large_patch16", 64, 2066.0, 5.0, {"exact": 5.6}),
    ("vit_huge_patch14", 32, 3711.0, 6.0, {"exact": 3.8}),
)
CPU_BATCH, CPU_GOAL = 1, 4.0


def ours(work: Work, mode: str = "exact") -> Step:
    """Builds our DAT step."""
    model = build_classifier(work.name, CLASSES, work.side).to(work.device).train()
    light = LightTokenizer(LightConfig(factor=8 if work.side > 64 else 4))
    tokenizer = (light if "light" in mode else VQGAN(work.vqgan)).freeze().to(work.device)
    plain = Classification(AugmentConfig(smoothing=0.0), CLASSES)
    objective = WithDAT(plain, tokenizer, AttackConfig("released", **MODES[mode]))
    return training_step(model, objective, make_batch(work.batch, work.side, work.device), work.device)


def released(work: Work) -> Step:
    """Builds the released step of the same network."""
    model = build_classifier(work.name, CLASSES, work.side).to(work.device).train()
    tokenizer, trainer = ReleasedVQGAN(work.vqgan).to(work.device), Trainer(model)
    pictures = make_batch(work.batch, work.side, work.device)
    image, target = pictures["image"], one_hot(pictures["label"], CLASSES).float()
    return lambda: dat_step(model, trainer, tokenizer, image, target, torch.randn_like(image))


def size_cases(work: Work, modes: dict[str, float], exact: dict[str, Any], **shared: Any) -> list[Case]:
    """The exact step against the released one, with the goals `exact`; then the modes, with the most that each may
    cost."""
    build = partial(ours, work), partial(released, work)
    found = [Case(f"{work.name} DAT step", *build, "released DAT", **exact, **shared)]
    plain = partial(finetune.ours, work.name, work.side, work.batch, work.device)
    for mode in MODES:
        name, goals = f"{work.name} DAT step, {mode}", {"goal": 6, "at_most": modes.get(mode), "is_cost": True}
        found.append(Case(name, partial(ours, work, mode), plain, "our plain step", **goals, **shared))
    return found


def cases(quick: bool, device: torch.device) -> list[Case]:
    """The demo's size; ViT-B everywhere, L and H on a GPU."""
    gpu = device.type == "cuda"
    found = size_cases(Work("vit_demo_patch8", 64, 16, device, SMALL_VQGAN), {}, {}, batch=16)
    for name, gpu_batch, gflop, faster, modes in SIZES:
        runs = gpu or name == "vit_base_patch16"
        work = Work(name, 224, gpu_batch if gpu else CPU_BATCH, device, VQ_F8)
        exact = {"goal": 5, "at_least": faster if gpu or not runs else CPU_GOAL, "gflop": gflop}
        found += size_cases(work, modes, exact, batch=work.batch, left_out="" if runs else NEEDS_GPU)
    return found
