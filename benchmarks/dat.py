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
from mae_dat.config.adversaries import AttackConfig
from mae_dat.config.groups import AugmentConfig
from mae_dat.models.classifier import build_classifier
from mae_dat.models.tokenizer import VQGAN, LightConfig, LightTokenizer, VisualTokenizer, VQGANConfig, in_precision
from mae_dat.runtime.blocks import compile_blocks
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.dat import WithDAT


class Work(NamedTuple):
    """A DAT step."""

    name: str
    side: int
    batch: int
    device: torch.device
    vqgan: VQGANConfig


SMALL_VQGAN = VQGANConfig(512, 8, 8, ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=())
FREE = {"at": "image", "free": True}
MODES: dict[str, dict[str, Any]] = {
    "exact": {"random_start": 1.0},  # as four of five released steps
    "attacked at the image": {"random_start": 1.0, "at": "image"},
    "free gradient at the image": FREE,
    "the same with a light tokenizer": FREE,
    "a fifth of the batch": {"random_start": 1.0, "batch_share": 0.2},
    "random words": {"kind": "random", "share": 0.038},
}
QUICK = ("exact", "free gradient at the image", "the same with a light tokenizer")
# Name, batch on a GPU, GFLOP an image of the exact step, times the released step on a GPU, most plain steps of QUICK.
SIZES = (
    ("vit_base_patch16", 64, 1344.0, 4.0, (13.0, 7.2, 2.6)),
    ("vit_large_patch16", 64, 2066.0, 5.0, (5.6, 3.5, 2.2)),
    ("vit_huge_patch14", 32, 3711.0, 6.0, (3.8, 2.6, 2.1)),
)
CPU_BATCH, CPU_GOAL = 4, 4.0  # of four images one is encoded anew to count changed words


def student_of(vqgan: VQGANConfig) -> VisualTokenizer:
    """A light tokenizer of the size that docs/how-to/tokenizer.md advises: for VQ-f8 a hundredth of its work."""
    size = (96, 4, 6) if vqgan == VQ_F8 else (32, 1, 2)
    return LightTokenizer(LightConfig(vqgan.factor, *size, vqgan.num_words, vqgan.word_dim))


def ours(work: Work, mode: str = "exact", compiled: bool = False) -> Step:
    """Builds our DAT step; `compiled` with the blocks of network and tokenizer."""
    with torch.device(work.device):  # the initialization of ViT-H takes long on a host
        model = build_classifier(work.name, CLASSES, work.side).train()
    tokenizer = student_of(work.vqgan) if "light" in mode else VQGAN(work.vqgan)
    tokenizer = in_precision(tokenizer.freeze(), work.device, compiled=compiled)
    if compiled:
        compile_blocks(model)
    plain = Classification(AugmentConfig(smoothing=0.0), CLASSES)
    objective = WithDAT(tokenizer, AttackConfig(**{"kind": "released", **MODES[mode]}), plain)
    return training_step(model, objective, make_batch(work.batch, work.side, work.device), work.device)


def released(work: Work) -> Step:
    """Builds the released step of the same network."""
    with torch.device(work.device):  # the initialization of ViT-H takes long on a host
        model = build_classifier(work.name, CLASSES, work.side).train()
    tokenizer, trainer = ReleasedVQGAN(work.vqgan).to(work.device), Trainer(model)
    pictures = make_batch(work.batch, work.side, work.device)
    image, target = pictures["image"], one_hot(pictures["label"], CLASSES).float()
    return lambda: dat_step(model, trainer, tokenizer, image, target, torch.randn_like(image))


def mode_cases(work: Work, quick: bool, most: tuple[float | None, ...], skip_reason: str = "") -> list[Case]:
    """The modes against our plain step, with the most that those of QUICK may cost."""
    plain = partial(finetune.ours, work.name, work.side, work.batch, work.device)
    found = []
    for mode in QUICK if quick else MODES:
        if MODES[mode].get("batch_share") and work.batch < 5:
            continue  # less than an image
        goal = dict(zip(QUICK, most, strict=True)).get(mode)
        more: dict[str, Any] = {
            "goal": 6,
            "at_most": goal,
            "is_cost": True,
            "batch": work.batch,
            "skip_reason": skip_reason,
        }
        found.append(Case(f"{work.name} DAT, {mode}", partial(ours, work, mode), plain, "our plain step", **more))
    return found


def cases(quick: bool, device: torch.device) -> list[Case]:
    """The demo's size; ViT-B everywhere, L and H on a GPU."""
    gpu = device.type == "cuda"
    demo = Work("vit_demo_patch8", 64, 16, device, SMALL_VQGAN)
    found = [Case(f"{demo.name} DAT step", partial(ours, demo), partial(released, demo), "released DAT", batch=16)]
    found += mode_cases(demo, quick, (None, None, None))
    for name, gpu_batch, gflop, faster, most in SIZES:
        skip_reason = "" if gpu or name == "vit_base_patch16" else NEEDS_GPU
        work = Work(name, 224, gpu_batch if gpu else CPU_BATCH, device, VQ_F8)
        build = partial(ours, work), partial(released, work)
        more: dict[str, Any] = {"goal": 5, "batch": work.batch, "gflop": gflop, "skip_reason": skip_reason}
        more["at_least"] = faster if gpu or skip_reason else CPU_GOAL
        found.append(Case(f"{name} DAT step", *build, "released DAT", **more))
        if gpu and not quick:
            build = partial(ours, work, compiled=True), partial(released, work)
            found.append(Case(f"{name} DAT step, compiled", *build, "released DAT", **more))
        found += mode_cases(work, quick, most, skip_reason)
    return found
