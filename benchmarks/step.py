"""A MAE step and a DAT step against plain float32 versions of the same: `python benchmarks/step.py [--quick]`.

Both versions run in this process and take turns, so that whatever else the machine does falls on both; told are
medians, their ratio and its spread over the rounds. Numbers of a busy machine mean little. --quick keeps to the demo's
size; without it ViT-B at 224 px follows, which needs several GB of memory and some minutes.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from plain import dat_step, explicit_attention, mae_step, unfused_adamw
from torch import nn

from mae_dat.classifier import build_classifier
from mae_dat.config import AttackConfig, AugmentConfig
from mae_dat.data import Batch
from mae_dat.distributed import amp_dtype, pick_device
from mae_dat.mae import build_mae, mask_noise
from mae_dat.objectives import Classification, MaskedReconstruction, Objective, WithDAT
from mae_dat.optim import build_optimizer
from mae_dat.tokenizer import VQGAN, LightTokenizer, VisualTokenizer

Step = Callable[[], Any]
CLASSES = 10


class Case(NamedTuple):
    """Two versions of a step on the same batch."""

    name: str
    batch: int
    ours: Step
    plain: Step


def our_step(model: nn.Module, objective: Objective, batch: Batch, device: torch.device) -> Step:
    """A training step as the engine does it."""
    optimizer = build_optimizer(model, 1e-4, 0.05, betas=(0.9, 0.95))
    generator = torch.Generator(device).manual_seed(0)
    precision = amp_dtype("auto", device)

    def step() -> None:
        with torch.autocast(device.type, precision or torch.bfloat16, enabled=precision is not None):
            loss = objective(model, batch, generator)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def make_batch(size: int, side: int, device: torch.device) -> Batch:
    """Random pictures in [0, 1] with labels."""
    label = torch.randint(0, CLASSES, (size,), device=device)
    index = torch.arange(size, device=device)
    return Batch(image=torch.rand(size, 3, side, side, device=device), label=label, index=index, skipped=0 * index)


def mae_case(name: str, batch_size: int, device: torch.device) -> Case:
    """Pretraining steps of the MAE `name`, mask ratio 0.75."""
    ours, theirs = build_mae(name).to(device), build_mae(name).to(device)
    batch = make_batch(batch_size, ours.img_size[0], device)
    explicit_attention(theirs)
    optimizer = unfused_adamw(theirs)

    def plain() -> float:
        noise = mask_noise(batch_size, theirs.num_patches, None, device)
        return mae_step(theirs, optimizer, batch["image"], noise)

    return Case(f"MAE {name}", batch_size, our_step(ours, MaskedReconstruction(0.75, False), batch, device), plain)


def dat_case(name: str, batch_size: int, side: int, tokenizer: VisualTokenizer, device: torch.device) -> Case:
    """Fine-tuning steps of the classifier `name` with the released adversary, random start always on."""
    ours, theirs = (build_classifier(name, CLASSES, side).to(device).train() for _ in range(2))
    tokenizer = tokenizer.freeze().to(device)
    batch = make_batch(batch_size, side, device)
    explicit_attention(theirs)
    optimizer = unfused_adamw(theirs)
    target = nn.functional.one_hot(batch["label"], CLASSES).float()
    objective = WithDAT(
        Classification(AugmentConfig(smoothing=0.0), CLASSES), tokenizer, AttackConfig(random_start=1.0)
    )

    def plain() -> float:
        return dat_step(theirs, optimizer, tokenizer, batch["image"], target)

    kind = type(tokenizer).__name__
    return Case(f"DAT {name}, {kind}", batch_size, our_step(ours, objective, batch, device), plain)


def seconds_of(step: Step, device: torch.device) -> float:
    """Wall time of one step, waiting for the device."""
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(case: Case, rounds: int, device: torch.device) -> dict[str, Any]:
    """Images a second of both versions in turns, medians over `rounds`, after one round that does not count."""
    times = [(seconds_of(case.ours, device), seconds_of(case.plain, device)) for _ in range(rounds + 1)][1:]
    ratios = sorted(plain / ours for ours, plain in times)
    quarter = len(ratios) // 4
    ours, plain = (case.batch / statistics.median(column) for column in zip(*times, strict=True))
    spread = (ratios[quarter], ratios[-1 - quarter])
    facts = {"ours": ours, "plain": plain, "ratio": statistics.median(ratios), "spread": spread, "rounds": rounds}
    return {"name": case.name, "batch": case.batch, **facts}


def cases(quick: bool, device: torch.device) -> list[Callable[[], Case]]:
    """What is measured, each built only when its turn comes."""
    demo = [
        lambda: mae_case("mae_vit_demo_patch8", 64, device),
        lambda: dat_case("vit_demo_patch8", 32, 64, LightTokenizer(), device),
    ]
    base = [
        lambda: mae_case("mae_vit_base_patch16", 8, device),
        lambda: dat_case("vit_base_patch16", 1, 224, VQGAN(), device),
    ]
    return demo if quick else demo + base


def line(found: dict[str, Any]) -> str:
    """One row of the table."""
    low, high = found["spread"]
    speed = f"{found['ours']:9.1f} {found['plain']:9.1f} {found['ratio']:7.2f}"
    return f"{found['name']:<40} {found['batch']:>5} {speed}   {low:.2f} to {high:.2f}"


def main() -> None:
    """Measures and prints a table; --output writes the same numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the demo's size only, few rounds")
    parser.add_argument("--rounds", type=int, help="rounds that count (default 9, with --quick 5)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON to this file")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    rounds = arguments.rounds or (5 if arguments.quick else 9)
    precision = amp_dtype("auto", device)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}; ours in {precision or 'float32'}")
    print(f"{'step':<40} {'batch':>5} {'ours':>9} {'plain':>9} {'ratio':>7}   middle half of the ratios")
    results = []
    for build in cases(arguments.quick, device):
        torch.manual_seed(0)
        results.append(measure(build(), rounds, device))
        print(line(results[-1]), flush=True)
    print("ours and plain in images a second, medians of rounds taken in turns; ratio above 1: ours is faster")
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
