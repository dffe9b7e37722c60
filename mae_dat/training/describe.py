"""The summary of what a training reads and writes: the rows that all trainings share."""

from pathlib import Path
from typing import Any

from torch import nn

from mae_dat.config.adversaries import DatConfig
from mae_dat.config.groups import AugmentConfig, ClassifierConfig, DataConfig, LossConfig
from mae_dat.data.describe import describe_size
from mae_dat.data.loader import worker_count
from mae_dat.models.describe import describe_normalization, describe_tokenizer
from mae_dat.models.tokenizer import VisualTokenizer
from mae_dat.runtime.device import describe_device
from mae_dat.runtime.inputs import InputSummary, count_of, describe_bytes
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
    attack = dat.attack.describe() if dat.attack else getattr(objective, "description", "")
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
        state = f"complete, {count_of(step, 'step')}"
    elif checkpoint is None:
        start = f" from step {step:,}" if step else ""
        state = f"new run{start}, {count_of(total_steps, 'step')}"
    else:
        state = f"resumes at step {step:,} of {total_steps:,}"
    inputs.add("output", f"{Path(context.output).absolute()} ({state})")


def add_resumed_weights(inputs: InputSummary, context: RunContext, checkpoint: Checkpoint | None) -> None:
    """Name the checkpoint that is resumed as the source of the weights, before those that the run began with."""
    if checkpoint is None:
        return
    path = checkpoint.path
    in_output = path.parent.resolve() == context.output.resolve()
    resumed = f"{path.name} of the output folder" if in_output else str(path)
    inputs.rows["weights"] = f"{resumed}\nthe run began with: {inputs.rows['weights']}"


def describe_augmentation(augment: AugmentConfig) -> str:
    """Return the crops and the augmentation in words."""
    low, high = (f"{100 * share:g}" for share in augment.crop_scale)
    parts = [f"random crop of {low} to {high} % of the area", "bicubic", "flip"]
    if augment.aa:
        parts.append(augment.aa)
    elif augment.color_jitter:
        parts.append(f"color jitter {augment.color_jitter:g}")
    for name in ("reprob", "mixup", "cutmix"):
        if value := getattr(augment, name):
            parts.append(f"{'erasing' if name == 'reprob' else name} {value:g}")
    return ", ".join(parts)


def describe_trained(settings: ClassifierConfig, model: nn.Module) -> list[str]:
    """Return what is trained, and the memory of weights, gradients and AdamW's state."""
    parameters = list(model.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    part = "head, a new one behind a BatchNorm (linear probe)" if settings.linear_probe else settings.train
    memory = describe_bytes(4 * total + 12 * trained)
    lines = [f"{part}: {trained:,} of {total:,} parameters; weights, gradients and AdamW's state take {memory}"]
    return lines + [f"the head alone in the first {settings.probe_epochs:g} epochs"] * (settings.probe_epochs > 0)


def describe_loss(settings: LossConfig) -> str:
    """Return the loss, its weights and the sampler in words."""
    parts = ["binary cross-entropy" if settings.loss == "bce" else "cross-entropy"]
    parts += [f"class weights: {settings.class_weights}"] * bool(settings.class_weights)
    parts += ["as many images of each class"] * (settings.sampler == "balanced")
    return ", ".join(parts)
