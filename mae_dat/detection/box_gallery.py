"""Draw detected boxes and the ground truth on images, for the galleries of a training."""

import torch
from torch import Tensor, nn
from torchvision.utils import draw_bounding_boxes

from mae_dat.data.gallery import draw_gallery
from mae_dat.detection.coco import CocoImages
from mae_dat.models.detector import Boxes, Detector
from mae_dat.models.modes import evaluation_mode
from mae_dat.runtime.seeds import step_generator
from mae_dat.training.objectives.base import Objective
from mae_dat.training.objectives.dat import WithDAT

_IMAGES = 4
_MIN_SCORE = 0.5  # detections below are not drawn
_SIDE = 384  # side of a drawn image in pixels
BOX_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442", "#000000")
"""Colors of the classes, in turn: the palette of Okabe and Ito."""


def draw_detections(
    detector: Detector, objective: Objective, images: CocoImages, seed: int, device: torch.device
) -> Tensor:
    """Draw the ground truth and the detections of four images, with DAT also the detections in their adversaries.

    The images and the adversary's randomness are the same at every call. Returns (3, height, width) in [0, 1].
    """
    selection = images.limited(_IMAGES)
    batch = torch.utils.data.default_collate([selection[index] for index in range(_IMAGES)])
    batch = {name: value.to(device) for name, value in batch.items()}
    generator = step_generator(seed, 0, 0, device)
    image, prepared = objective.prepare(detector, batch, generator)  # type: ignore[arg-type]
    views = {"found": image}
    with evaluation_mode(detector):
        if isinstance(objective, WithDAT) and objective.strength_is_known:
            views["found in the adversary"] = objective.adversary(detector, image, prepared, generator).adversarial
        columns = [("truth", draw_boxes(image, prepared[0], images.classes))]
        with torch.no_grad():
            columns += [(title, draw_boxes(view, detector(view), images.classes)) for title, view in views.items()]
    return draw_gallery(columns, cell=_SIDE)


def draw_boxes(image: Tensor, boxes: list[Boxes], classes: list[str]) -> Tensor:
    """Draw named boxes on enlarged images (B, 3, H, W) in [0, 1]; detections with a score below 0.5 are omitted.

    Returns (B, 3, s * H, s * W) with a whole number s.
    """
    scale = max(1, round(_SIDE / image.shape[-1]))
    drawings = []
    enlarged = nn.functional.interpolate(image.cpu(), scale_factor=scale)
    for canvas, objects in zip(enlarged, boxes, strict=True):
        labels = objects["labels"]
        selected = objects["scores"] >= _MIN_SCORE if "scores" in objects else torch.ones_like(labels).bool()
        indices = [label - 1 for label in labels[selected].tolist()]
        names = [classes[index] for index in indices]
        colors = [BOX_COLORS[index % len(BOX_COLORS)] for index in indices]
        corners = scale * objects["boxes"][selected].cpu()
        drawings.append(draw_bounding_boxes(canvas, corners, names, colors, width=2) if names else canvas)
    return torch.stack(drawings)
