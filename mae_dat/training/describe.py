"""The summary of what a training reads and writes: the rows that all trainings share."""

from pathlib import Path
from typing import Any

from mae_dat.config.adversaries import DatConfig
from mae_dat.config.groups import DataConfig
from mae_dat.data.describe import describe_size
from mae_dat.data.loader import worker_count
from mae_dat.models.describe import describe_normalization, describe_tokenizer
from mae_dat.models.tokenizer import VisualTokenizer
from mae_dat.runtime.device import describe_device
from mae_dat.runtime.inputs import InputSummary
from mae_dat.storage.checkpoint import Checkpoint
from mae_dat.training.context import RunContext


def add_pixels(inputs: InputSummary, data: DataConfig, model: Any, *lines: str) -> None:
    """Add the size and normalization of the input, and `lines` about crops."""
    channels = "" if data.in_chans == 3 else f", {data.in_chans} channel"
    inputs.add("pixels", f"{describe_size(data.image_size)}{channels}, {describe_normalization(model)}", *lines)


def add_adversary(inputs: InputSummary, dat: DatConfig, objective: Any, baseline: str = "") -> None:
    """Add the tokenizer of an objective, if it has one, and the adversary: DAT's, a baseline's or none."""
    tokenizer = getattr(objective, "tokenizer", None)
    if isinstance(tokenizer, VisualTokenizer):
        inputs.add("tokenizer", describe_tokenizer(dat.tokenizer, tokenizer))
    attack = dat.attack.describe() if dat.attack else ""
    inputs.add("adversary", ", ".join(filter(None, [attack, baseline])) or "none")


def add_on_bad(inputs: InputSummary, on_bad: str) -> None:
    """Add what happens to unreadable images, if they do not stop the run."""
    if on_bad == "skip":
        inputs.add("left out", "unreadable images are replaced and counted (--on_bad skip)")


def add_device(inputs: InputSummary, context: RunContext, num_workers: int | None) -> None:
    """Add the device, precision, threads, workers and ranks."""
    workers = None if num_workers is None else worker_count(num_workers)
    inputs.add("device", describe_device(context.device, context.precision, workers, context.world.size))


def add_run_output(
    inputs: InputSummary, context: RunContext, checkpoint: Checkpoint | None, step: int, total_steps: int
) -> None:
    """Add the output folder, and whether the run is new, resumes, or is complete."""
    if step >= total_steps:
        state = f"complete, {step:,} steps"
    elif checkpoint is None:
        start = f" from step {step:,}" if step else ""
        state = f"new run{start}, {total_steps:,} steps"
    else:
        path = checkpoint.path
        place = path.name if path.parent.resolve() == context.output.resolve() else path
        state = f"resumes at step {step:,} of {total_steps:,} with the weights of {place}"
    inputs.add("output", f"{Path(context.output).absolute()} ({state})")
