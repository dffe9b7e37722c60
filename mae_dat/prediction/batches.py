"""The loop of a prediction: images through a model, batch by batch, as an evaluation passes them.

The loader, the pixels, the precision and the batches are those of `robustness/measure.py`. Unreadable images stay in
their batch as black ones and are sorted out afterwards, so they do not change the batches of others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from mae_dat.config.errors import DataError
from mae_dat.data.decode import ImageError
from mae_dat.data.image_set import as_float
from mae_dat.data.inputs import InputImages
from mae_dat.data.loader import batch_loader
from mae_dat.models.modes import autocast
from mae_dat.models.tokenizer.base import exact_float32
from mae_dat.robustness.setup import EvaluationSetup

Prepare = Callable[[Image.Image], Tensor]
"""From a decoded image to the model's input, (3, H, W): uint8, or float32 in [0, 1]."""
_LARGEST_RATIO = 1000  # of the sides: resizing the shorter side of 1 x 60,000 px to 256 px would need gigabytes


class InputItem(TypedDict):
    """What a worker returns for one image."""

    image: Tensor
    """(3, H, W), black if it is unreadable."""
    index: int
    name: str
    problem: str
    """Why it is unreadable; empty if it is not."""
    size: Tensor
    """int64 (2,): height and width of the decoded image in pixels."""


@dataclass(frozen=True)
class PredictionBatch:
    """The images of a batch that could be read, and the others."""

    kept: list[int]
    """Positions in the batch of the images that could be read."""
    indices: list[int]
    """The numbers of these images among all inputs."""
    names: list[str]
    sizes: list[tuple[int, int]]
    """Height and width of these images in pixels."""
    unreadable: dict[str, str]
    """The names of the other images, and why each could not be read."""


class PreparedImages(Dataset[Any]):
    """The images as the model gets them."""

    def __init__(self, images: InputImages, prepare: Prepare, blank: Tensor) -> None:
        """`blank` (3, H, W) takes the place of an unreadable image."""
        self.images, self.prepare, self.blank = images, prepare, blank

    def __getitem__(self, index: int) -> InputItem:
        name = self.images.image_name(index)
        try:
            image = self.images.load_image(index)
            if max(image.size) > _LARGEST_RATIO * min(image.size):
                raise DataError(f"one side is more than {_LARGEST_RATIO} times the other")
            size = torch.tensor([image.height, image.width])
            return {"image": self.prepare(image), "index": index, "name": name, "problem": "", "size": size}
        except DataError as error:
            problem = error.problem if isinstance(error, ImageError) else str(error)
            reason = problem.removeprefix(f"{name}: ")
            return {"image": self.blank, "index": index, "name": name, "problem": reason, "size": torch.zeros(2).long()}


@torch.no_grad()
def predict_batches(
    dataset: PreparedImages,
    compute: Callable[[Tensor], Any],
    deliver: Callable[[PredictionBatch, Any], None],
    setup: EvaluationSetup,
    title: str = "predict",
) -> None:
    """Pass all images through a model: `compute` takes images (B, 3, H, W) in [0, 1] on the device and returns the
    outputs; `deliver` takes the batch and these outputs.

    A batch is delivered while the device computes the next one, so `compute` should return without waiting for the
    device. Raises what the two raise, StorageError, RetryError.
    """
    count, device = len(dataset.images), setup.options.device
    batches = [range(start, min(start + setup.batch_size, count)) for start in range(0, count, setup.batch_size)]
    num_workers = min(setup.num_workers, len(batches)) if len(batches) > 1 else 0
    loader: Any = batch_loader(dataset, batches, num_workers, device.type == "cuda")
    previous: tuple[PredictionBatch, Any] | None = None
    # Inside one outer block, a network's weights are cast once and not for every batch.
    with exact_float32(), autocast(device, None), setup.console.task(title, count, "image") as task:
        for items in loader:
            outputs = compute(as_float(items["image"].to(device, non_blocking=True)))
            if previous:
                deliver(*previous)
            previous = _describe(items), outputs
            task.advance("", len(items["name"]))
        if previous:
            deliver(*previous)


def _describe(items: dict[str, Any]) -> PredictionBatch:
    problems: Sequence[str] = items["problem"]
    kept = [position for position, problem in enumerate(problems) if not problem]
    names, indices, sizes = items["name"], items["index"].tolist(), items["size"].tolist()
    return PredictionBatch(
        kept=kept,
        indices=[indices[position] for position in kept],
        names=[names[position] for position in kept],
        sizes=[(sizes[position][0], sizes[position][1]) for position in kept],
        unreadable={name: problem for name, problem in zip(names, problems, strict=True) if problem},
    )
