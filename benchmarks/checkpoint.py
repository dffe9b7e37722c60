"""How long training stands still for a checkpoint, against a plain `torch.save`: `python benchmarks/checkpoint.py`.

A classifier with AdamW trains on random pictures. In turns its state is written by `torch.save`, and by the Saver of
mae_dat/checkpoint.py as a run does it; what counts for that is the time inside `save` and, before the next update,
inside `before_change`. Steps go on until the file is there; how much slower they are meanwhile is told too. The last
number is `torch.save` with what a safe write needs besides: fsync, sha256, replacing.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mae_dat.checkpoint import Saver, save_checkpoint
from mae_dat.classifier import build_classifier
from mae_dat.distributed import amp_dtype, pick_device
from mae_dat.optim import build_optimizer


class Run:
    """A training on random pictures."""

    def __init__(self, name: str, batch: int, device: torch.device) -> None:
        self.model = build_classifier(name, 1000).to(device).train()
        self.optimizer = build_optimizer(self.model, 1e-4, 0.05)
        side = 64 if "demo" in name else 224
        self.image = torch.rand(batch, 3, side, side, device=device)
        self.label = torch.zeros(batch, dtype=torch.long, device=device)
        self.device = device

    def step(self, before: Callable[[], Any] = lambda: None) -> float:
        """A step as the engine does it; returns its seconds and calls `before` in front of the update."""
        start, precision = time.perf_counter(), amp_dtype("auto", self.device)
        with torch.autocast(self.device.type, precision or torch.bfloat16, enabled=precision is not None):
            loss = nn.functional.cross_entropy(self.model(self.image), self.label)
        loss.backward()
        before()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        float(loss.detach())
        self.wait()
        return time.perf_counter() - start

    def state(self) -> dict[str, Any]:
        """As large as a run's."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": 1}

    def wait(self) -> None:
        """For what the device has been told to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def save_in_background(run: Run, saver: Saver, number: int) -> tuple[float, list[float]]:
    """Seconds that a save stops training, and those of the steps until its file is there."""
    stopped = [timed(lambda: saver.save(number, run.state(), at_once=run.model.buffers()))]

    def before_change() -> None:
        run.wait()  # the step's own work is no stop
        stopped.append(timed(lambda: (saver.before_change(), run.wait())))

    steps = [run.step(before_change)]
    while saver.writing:
        steps.append(run.step(saver.before_change))
    return sum(stopped), steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch16", help="classifier (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="keep the numbers as JSON")
    args = parser.parse_args()
    run = Run(args.model, args.batch_size, pick_device(args.device))
    run.step()
    numbers: dict[str, list[float]] = {"plain": [], "ours": [], "safe": [], "step": [], "step while writing": []}
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        (folder / "safe").mkdir()
        saver = Saver(folder, keep=1)
        save_in_background(run, saver, 1)  # takes the host memory that later saves use again
        for number in range(2, args.rounds + 2):
            saver.wait()
            numbers["step"] += [run.step() for _ in range(3)]
            numbers["plain"].append(timed(lambda: torch.save(run.state(), folder / "plain.pth")))
            stopped, steps = save_in_background(run, saver, number)
            numbers["ours"].append(stopped)
            numbers["step while writing"] += steps
            saver.wait()
            numbers["safe"].append(timed(lambda: save_checkpoint(folder / "safe", 1, run.state())))
        saver.close()
        size = (folder / "plain.pth").stat().st_size
    print_numbers(args.model, size, numbers)
    if args.output:
        args.output.write_text(json.dumps({"bytes": size, **numbers}, indent=1))


def print_numbers(model: str, size: int, numbers: dict[str, list[float]]) -> None:
    """Medians with ranges, and the ratios within the rounds."""
    print(f"{model} with AdamW: {size / 1e9:.2f} GB, {len(numbers['plain'])} rounds; median (lowest to highest)")
    told = {
        "plain": "torch.save, training stands still",
        "safe": "written safely, training stands still",
        "ours": "written in the background, training stands still",
        "step": "a step",
        "step while writing": "a step while a checkpoint is written",
    }
    for name, what in told.items():
        values = numbers[name]
        print(f"  {what:50} {statistics.median(values):8.3f} s ({min(values):.3f} to {max(values):.3f})")
    ratios = [plain / ours for plain, ours in zip(numbers["plain"], numbers["ours"], strict=True)]
    spread = f"{min(ratios):.0f} to {max(ratios):.0f}"
    print(f"  torch.save stops training {statistics.median(ratios):.0f} times as long ({spread})")


if __name__ == "__main__":
    main()
