"""Example images for a report, on which two models differ: their predictions, and the image decoded from its words."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from mae_dat.data.gallery import save_png
from mae_dat.data.sampler import evenly_spaced
from mae_dat.models.modes import evaluation_mode
from mae_dat.robustness.evaluation_plan import EvaluationPlan, SuiteRun
from mae_dat.robustness.measure import PassImages
from mae_dat.robustness.suites.base import ImagePass
from mae_dat.robustness.suites.imagenet import NO_CLASS
from mae_dat.runtime.watchdog import heartbeat

MAX_EXAMPLES = 8
CANDIDATES = 128  # evenly spaced images of a cell
EXAMPLE_CORRUPTIONS = ("gaussian_noise", "glass_blur", "fog", "pixelate")
EXAMPLE_SEVERITY = 3
BATCH_SIZE = 16


class _Cell(NamedTuple):
    """One cell of a suite and the runs of the two models on it."""

    runs: list[SuiteRun]
    image_pass: ImagePass
    row: int
    """Position of the cell in the pass."""


class _Example(NamedTuple):
    """An image (3, H, W) in [0, 1] that one of two models predicts correctly."""

    image: Tensor
    label: str
    predictions: dict[str, str]
    """By model."""
    image_index: int
    """Its position in the image set."""


@torch.no_grad()
def write_examples(plan: EvaluationPlan, pair: tuple[str, str], folder: Path | None) -> list[dict[str, Any]]:
    """Write up to 8 images on which two models differ as PNG below `folder`, and return them as `Results.examples`.

    Of each cell, one image that only the first model predicts correctly and one that only the second does, out of 128
    evenly spaced ones. Ranks other than the main one pass no folder: they compute the same and write nothing,
    otherwise the watchdog would end them as they wait. Raises StorageError.
    """
    examples: list[dict[str, Any]] = []
    for cell in _cells(plan, pair):
        for example in _differing_images(cell):
            if len(examples) == MAX_EXAMPLES:
                return examples
            name = f"examples/{len(examples) + 1}"
            entry: dict[str, Any] = {
                "file": f"{name}.png",
                "suite": cell.runs[0].suite.name,
                "cell": cell.image_pass.cells[cell.row],
                "label": example.label,
                "answers": example.predictions,
            }
            _save(example.image, folder, entry["file"])
            if cell.image_pass.corruption:  # made from the clean image
                entry["clean"] = f"{name}-clean.png"
                clean, entry["clean_answers"] = _clean_version(cell, example.image_index)
                _save(clean, folder, entry["clean"])
            if plan.sources.has_tokenizer:
                tokenizer = plan.sources.tokenizer
                words = tokenizer.encode(example.image[None].to(tokenizer.codebook.device))
                entry["words"] = f"{name}-words.png"
                _save(tokenizer.decode(words)[0].cpu(), folder, entry["words"])
            examples.append(entry)
    return examples


def _save(image: Tensor, folder: Path | None, file: str) -> None:
    if folder:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_png(image, folder / file)


def _cells(plan: EvaluationPlan, pair: tuple[str, str]) -> Iterator[_Cell]:
    """Yield the cells to take examples from, those of corruptions first, where both models see the same images."""
    for corrupted in (True, False):
        for suite in plan.suite_names:
            by_model = {run.network.name: run for run in plan.runs_of(suite)}
            runs = [by_model[model] for model in pair if model in by_model]
            if len(runs) < 2 or len({run.suite.preprocessing for run in runs}) > 1:
                continue
            for image_pass in runs[0].suite.passes:
                for row, cell in enumerate(image_pass.cells):
                    if _is_suitable(image_pass, cell, corrupted):
                        yield _Cell(runs, image_pass, row)


def _is_suitable(image_pass: ImagePass, cell: str, corrupted: bool) -> bool:
    """Return whether a cell is one of the example corruptions, or if not `corrupted` a whole suite without conflicting
    cues; never an attack."""
    if image_pass.adversary or image_pass.word_hits:
        return False
    if corrupted:
        corruption, _, severity = cell.partition("/")
        return corruption in EXAMPLE_CORRUPTIONS and severity == str(EXAMPLE_SEVERITY)
    return cell == "" and not image_pass.images.class_mapping.has_cues


def _differing_images(cell: _Cell) -> Iterator[_Example]:
    """Yield the first image that only the first model predicts correctly, and the first that only the second does."""
    images = cell.image_pass.images
    indices = evenly_spaced(len(images), CANDIDATES)
    batch = _load_images(cell, indices)
    predictions = [images.class_mapping.predictions(_logits(run, batch)) for run in cell.runs]
    first, second = (images.is_correct(predicted, torch.tensor(indices)) for predicted in predictions)
    for correct, only_this in ((0, first & ~second), (1, second & ~first)):
        for position in only_this.nonzero().flatten().tolist()[:1]:
            names = [_class_name(images.classes, int(predicted[position, 0])) for predicted in predictions]
            by_model = {run.network.name: name for run, name in zip(cell.runs, names, strict=True)}
            yield _Example(batch[position], names[correct], by_model, indices[position])


def _clean_version(cell: _Cell, index: int) -> tuple[Tensor, dict[str, str]]:
    """Return an image without its corruption, float (3, H, W) in [0, 1], and every model's prediction of it."""
    images = cell.image_pass.images
    image = to_tensor(images.prepared_image(index))
    predictions = [images.class_mapping.predictions(_logits(run, image[None])) for run in cell.runs]
    names = [_class_name(images.classes, int(predicted[0, 0])) for predicted in predictions]
    return image, {run.network.name: name for run, name in zip(cell.runs, names, strict=True)}


def _load_images(cell: _Cell, indices: list[int]) -> Tensor:
    """Load images of a cell as float (N, 3, H, W) in [0, 1]."""
    dataset = PassImages([cell.image_pass])
    images = []
    for index in indices:
        images.append(dataset[0, index]["images"][cell.row])
        heartbeat()
    return torch.stack(images).float() / 255


def _logits(run: SuiteRun, images: Tensor) -> Tensor:
    """Return a model's logits (N, K) for float images (N, 3, H, W) in [0, 1], on the CPU."""
    model, device = run.network.model, run.network.device
    logits = []
    with evaluation_mode(model):
        for batch in images.split(BATCH_SIZE):
            logits.append(model(batch.to(device)).float().cpu())
            heartbeat()
    return torch.cat(logits)


def _class_name(classes: list[str], prediction: int) -> str:
    return "no class of the set" if prediction == NO_CLASS else classes[prediction]
