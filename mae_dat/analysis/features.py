"""Extract features of images with any model, and measure how well their nearest neighbors classify.

`mae-dat features` runs it in one process on one device.
"""

import dataclasses
import functools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mae_dat.analysis.stability import (
    CorruptedImages,
    Stability,
    stability,
    stability_lines,
    write_stability,
)
from mae_dat.config.commands.features import FeaturesConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import image_size
from mae_dat.config.terminal import print_text
from mae_dat.data.describe import add_images, describe_resize
from mae_dat.data.folders import find_split
from mae_dat.data.image_set import ImageSet, as_float
from mae_dat.data.loader import ImageLoader, batch_loader, eval_loader, worker_count
from mae_dat.data.open import image_root, open_images, with_channels
from mae_dat.data.transforms import EvalTransform
from mae_dat.models.classifier import pool_tokens
from mae_dat.models.mae import MaskedAutoencoder
from mae_dat.models.modes import autocast
from mae_dat.models.weights.describe import add_opened_models, describe_pixels
from mae_dat.models.weights.open import OpenedModel, open_model
from mae_dat.robustness.corrupt_folder import chosen_corruptions
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.device import amp_dtype, describe_device, pick_device
from mae_dat.runtime.inputs import INPUTS_FILE, InputSummary, count_of
from mae_dat.storage.files import atomic_write, prepare_output_folder
from mae_dat.storage.new_folders import create_folder
from mae_dat.storage.weight_files import write_weights

logger = logging.getLogger(__name__)

_CHUNK = 1024  # images that are compared with the whole bank at once


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """Features of n images, in their order. `numpy.asarray(features)` are the values."""

    values: np.ndarray
    """float32 (n, D), or (n, N, D) of every patch."""
    labels: np.ndarray
    """int64 (n,): the numbers of the class folders, -1 for unlabeled images."""
    paths: list[str]
    """Paths of the images, or `image N` in memory."""

    def __len__(self) -> int:
        return len(self.values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype, copy=copy)

    def __repr__(self) -> str:
        return f"Features of {count_of(len(self), 'image')}: float32 {tuple(self.values.shape)}"


def model_features(model: torch.nn.Module, image: Tensor, pool: str) -> Tensor:
    """Compute a classifier's or a masked autoencoder's features of images (B, C, H, W) in [0, 1].

    Returns (B, D), or (B, N, D) for `pool="tokens"`; see `Classifier.features`.
    """
    if isinstance(model, MaskedAutoencoder):
        return pool_tokens(model.features(image), 1, pool)
    features: Tensor = model.features(image, pool)  # type: ignore[operator]
    return features


@torch.inference_mode()
def compute_features(
    model: torch.nn.Module, loader: ImageLoader, title: str, config: FeaturesConfig, console: Console
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the features of all images of a loader in their order, (n, D) or (n, N, D), and return them with the
    labels (n,)."""
    device = next(model.parameters()).device
    precision = amp_dtype(config.precision, device)
    values, labels = [], []
    with console.task(title, len(loader)) as task:
        for batch in loader:
            with autocast(device, precision):
                image = as_float(batch["image"].to(device, non_blocking=True))
                features = model_features(model, image, config.pool)
            values.append(features.float().cpu())
            labels.append(batch["label"])
            task.advance("")
    return torch.cat(values).numpy(), torch.cat(labels).numpy()


def _features_of_split(opened: OpenedModel, images: ImageSet, config: FeaturesConfig, console: Console) -> Features:
    device = next(opened.model.parameters()).device
    loader = eval_loader(
        images,
        batch_size=config.batch_size,
        rank=0,
        world_size=1,
        num_workers=config.num_workers,
        pin_memory=device.type == "cuda",
    )
    title = f"features of {Path(images.root).name}"
    values, labels = compute_features(opened.encoder(), loader, title, config, console)
    return Features(values, labels, [images.name_of(index) for index in range(len(images))])


def knn_accuracy(bank: Features, queries: Features, neighbors: int, temperature: float) -> dict[str, float]:
    """Compute the accuracy in percent, top-1 and top-5 (knn_acc1, knn_acc5), of votes by cosine similarity (Wu et al.
    2018, arXiv 1805.01978).

    Each of the `neighbors` nearest images of the bank votes for its class with exp(similarity / temperature). Raises
    ConfigError when the bank has fewer images.
    """
    if neighbors > len(bank.labels):
        raise ConfigError(f"--knn {neighbors}: there are only {len(bank.labels)} training images; use a lower number.")
    bank_ND, bank_labels = F.normalize(torch.from_numpy(bank.values), dim=1), torch.from_numpy(bank.labels)
    query_values, query_labels = torch.from_numpy(queries.values), torch.from_numpy(queries.labels)
    classes, hits = int(bank_labels.max()) + 1, torch.zeros(2)
    for values, labels in zip(query_values.split(_CHUNK), query_labels.split(_CHUNK), strict=True):
        similarity, nearest = (F.normalize(values, dim=1) @ bank_ND.T).topk(neighbors, dim=1)
        votes = torch.zeros(len(values), classes)
        # Less the largest, so that no exponential overflows at a small temperature.
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes.scatter_add_(1, bank_labels[nearest], weights)
        correct = votes.topk(min(5, classes), dim=1).indices == labels[:, None]
        hits += torch.stack([correct[:, 0].sum(), correct.sum()])
    acc1, acc5 = (100 * hits / len(queries.labels)).tolist()
    return {"knn_acc1": acc1, "knn_acc5": acc5}


def save_features(features: Features, path: Path) -> None:
    """Write features, labels and paths atomically; .safetensors has the paths in its metadata as JSON."""
    create_folder(path.parent)
    if path.suffix == ".safetensors":
        tensors = {"features": torch.from_numpy(features.values), "labels": torch.from_numpy(features.labels)}
        write_weights(path, tensors, {"paths": json.dumps(features.paths)})
        return
    with atomic_write(path) as file:
        np.savez(file, features=features.values, labels=features.labels, paths=np.array(features.paths))


def open_splits(config: FeaturesConfig, opened: OpenedModel) -> dict[str, ImageSet]:
    """Open the splits that the flags need, unaugmented, at the model's size; `all` takes every image of the folder."""
    root = image_root(config.data_path)
    transform = with_channels(_transform(opened), opened.plan.in_chans)
    splits: dict[str, ImageSet] = {}
    needed = ["train", "val"] if config.knn is not None else []
    for split in dict.fromkeys([*needed, *([config.split] if config.output_dir or config.corruptions else [])]):
        # The same labels in both splits, even where a class has no folder in one of them.
        classes = splits["train"].classes if split == "val" and config.knn is not None else None
        folder = root if split == "all" else find_split(root, split)
        splits[split] = open_images(folder, transform, classes, labeled=split != "all")
    return splits


def _transform(opened: OpenedModel) -> EvalTransform:
    """Return the resizing and crop that belong to the weights."""
    return EvalTransform(opened.input_size, opened.interpolation, opened.crop_pct)


def features_inputs(config: FeaturesConfig, opened: OpenedModel, splits: dict[str, ImageSet]) -> InputSummary:
    """Return the summary of what the extraction of features reads."""
    inputs = InputSummary(config.verb)
    add_images(inputs, config.data_path, image_root(config.data_path), splits)
    add_opened_models(inputs, [opened])
    inputs.add("pixels", describe_pixels(opened), describe_resize(_transform(opened)))
    device = next(opened.model.parameters()).device
    inputs.add("device", describe_device(device, amp_dtype(config.precision, device), worker_count(config.num_workers)))
    inputs.add("output", str(Path(config.output_dir).absolute()) if config.output_dir else "nothing is written")
    return inputs


def _inputs_path(config: FeaturesConfig) -> Path | None:
    return prepare_output_folder(Path(config.output_dir)) / INPUTS_FILE if config.output_dir else None


def run_features(config: FeaturesConfig, console: Console) -> dict[str, float]:
    """Extract, measure and write what the flags request; return `knn_accuracy`, empty without --knn.

    Raises ConfigError when they request nothing.
    """
    if not config.output_dir and config.knn is None and not config.corruptions:
        raise ConfigError("nothing to do: give --output_dir OUT, --knn 20, --corruptions all, or several.")
    names = chosen_corruptions(config.corruptions)
    device = pick_device(config.device)
    size = image_size(config.input_size) if config.input_size else None
    opened = open_model(config.checkpoint, config.model, size, flag="--checkpoint").to(device)

    splits = open_splits(config, opened)
    console.report_inputs(features_inputs(config, opened, splits), _inputs_path(config))

    @functools.cache  # --knn and --output_dir may need the same split
    def features(split: str) -> Features:
        return _features_of_split(opened, splits[split], config, console)

    accuracy: dict[str, float] = {}
    if config.knn is not None:
        accuracy = knn_accuracy(features("train"), features("val"), config.knn, config.knn_temperature)
        line = "%d nearest neighbors: acc1 %.2f %%, acc5 %.2f %%"
        logger.info(line, config.knn, accuracy["knn_acc1"], accuracy["knn_acc5"])
    if config.output_dir:
        path = prepare_output_folder(Path(config.output_dir)) / f"features.{config.format}"
        save_features(features(config.split), path)
        shape = " x ".join(map(str, features(config.split).values.shape))
        logger.info("wrote %s: features %s", path, shape)
    if names:
        _measure_stability(opened, splits[config.split], names, config, console)
    return accuracy


def _measure_stability(
    opened: OpenedModel, images: ImageSet, names: list[str], config: FeaturesConfig, console: Console
) -> list[Stability]:
    """Measure the stability under corruptions, print it as a table and write stability.csv.

    Raises ConfigError for grayscale models, too few images or small inputs.
    """
    if opened.plan.in_chans != 3:
        raise ConfigError("--corruptions needs a model of color images.")
    count = len(images) if config.limit is None else min(config.limit, len(images))
    generator = torch.Generator().manual_seed(config.seed)
    chosen = torch.randperm(len(images), generator=generator)[:count].sort().values.tolist()
    size, pin = opened.input_size, next(opened.model.parameters()).device.type == "cuda"
    batches = [chosen[start : start + config.batch_size] for start in range(0, count, config.batch_size)]

    cells = [(name, severity) for name in names for severity in sorted(set(config.severities))]
    loader = batch_loader(images, batches, config.num_workers, pin)
    clean = compute_features(opened.encoder(), loader, "clean images", config, console)[0]
    rows: list[Stability] = []
    with console.task("corruptions", len(cells)) as task:
        for name, severity in cells:
            corrupted = CorruptedImages(images.load_image, size, name, severity, config.seed)
            loader = batch_loader(corrupted, batches, config.num_workers, pin)
            values = compute_features(opened.encoder(), loader, name, config, Console(quiet=True))[0]
            rows.append(stability(clean, values, name, severity, config.neighbors))
            task.advance(f"{name} {severity}")
    print_text("\n".join(stability_lines(rows, config.neighbors, count)))
    if config.output_dir:
        write_stability(rows, Path(config.output_dir) / "stability.csv")
    return rows


def main(config: FeaturesConfig) -> None:
    """Run the command."""
    run_features(config, console_for_command())
