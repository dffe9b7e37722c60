"""Measure the average precision of a detector by COCO's rules, on clean and on corrupted images.

mPC and rPC are those of Michaelis et al. 2019, "Benchmarking Robustness in Object Detection", eqs. 1 and 2.
"""

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from mae_dat.config.errors import CheckpointError, DataError
from mae_dat.config.extras import require_extra
from mae_dat.config.terminal import print_text
from mae_dat.data.loader import ImageLoader, eval_loader
from mae_dat.detection.coco import CocoImages
from mae_dat.detection.objective import ground_truth
from mae_dat.models.detector import Detector
from mae_dat.models.modes import autocast, evaluation_mode
from mae_dat.robustness.corruptions import CORRUPTIONS
from mae_dat.runtime.collectives import gather, on_all_ranks
from mae_dat.runtime.console import Console
from mae_dat.storage.files import atomic_write
from mae_dat.storage.json_files import read_json
from mae_dat.training.context import RunContext

logger = logging.getLogger(__name__)

DetectionPair = tuple[dict[str, Tensor], dict[str, Tensor]]
"""The detections and the ground truth of an image, in torchmetrics' format."""


class _StoredScores(TypedDict):
    """The content of detection.json that is read again."""

    protocol: dict[str, Any]
    cells: dict[str, dict[str, float]]


DETECTION_METRICS = ("map", "map_50", "map_75")


def coco_scores(pairs: Sequence[DetectionPair]) -> dict[str, float]:
    """Compute mAP (IoU 0.50 to 0.95), mAP at 0.50 and at 0.75, in [0, 1].

    Raises MissingInputError without torchmetrics or pycocotools, DataError without a box to find.
    """
    require_extra("detection", "mAP")
    from torchmetrics.detection import MeanAveragePrecision

    metric = MeanAveragePrecision(backend="pycocotools")
    metric.update([detections for detections, _ in pairs], [truth for _, truth in pairs])
    result = metric.compute()
    # pycocotools returns -1 where nothing can be measured, such as without any box that is not a crowd.
    if any(float(result[name]) < 0 for name in DETECTION_METRICS):
        raise DataError("no image that could be read has a box that is not a crowd: no average precision is defined.")
    return {name: float(result[name]) for name in DETECTION_METRICS}


@torch.no_grad()
def average_precision(detector: Detector, loader: ImageLoader, context: RunContext) -> dict[str, float]:
    """Compute `coco_scores` over the loaders of all ranks. Collective."""
    pairs: list[DetectionPair] = []
    with evaluation_mode(detector):
        for batch in loader:
            image = batch["image"].to(context.device)
            with autocast(context.device, context.precision):
                all_detections = detector(image)
            truths = ground_truth(batch, crowd=True)
            for detections, truth, skipped in zip(all_detections, truths, batch["skipped"].tolist(), strict=True):
                if not skipped:  # a skipped image's sample is a copy of another image
                    pairs.append(({name: value.float().cpu() for name, value in detections.items()}, truth))
    pairs = [pair for rank_pairs in gather(pairs) for pair in rank_pairs]
    # Boxes and scores are float32 for torchmetrics, but labels have to be integers again.
    return coco_scores([({**detections, "labels": detections["labels"].long()}, truth) for detections, truth in pairs])


def measure_corruptions(
    detector: Detector,
    images: CocoImages,
    severities: Sequence[int],
    *,
    batch_size: int,
    num_workers: int,
    context: RunContext,
    protocol: Mapping[str, Any],
    console: Console,
) -> dict[str, Any]:
    """Measure on clean images and under 15 corruptions, with mPC and rPC, into `output/detection.json`. Collective.

    Every result is stored immediately, and results stored under the same protocol are not measured again.
    """
    path = context.output / "detection.json"
    scores = on_all_ranks(lambda: _read_scores(path, protocol))
    names = ["clean", *(f"{corruption}/{severity}" for corruption in CORRUPTIONS for severity in severities)]
    with console.task("corruptions", len(names)) as task:
        for name in names:
            if name not in scores:
                corruption, _, severity = name.partition("/")
                version = images if name == "clean" else images.corrupted(corruption, int(severity))
                loader = eval_loader(
                    version,
                    batch_size=batch_size,
                    rank=context.world.rank,
                    world_size=context.world.size,
                    num_workers=num_workers,
                )
                scores[name] = average_precision(detector, loader, context)
                if context.world.main:
                    _write_scores(path, protocol, scores)
            task.advance(f"{name} mAP {100 * scores[name]['map']:.1f}")
    return {"protocol": dict(protocol), **corruption_summary(scores), "cells": scores}


def corruption_summary(scores: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the clean mAP (`clean`), the mean mAP over corruptions and severities (`mpc`, eq. 1), and their ratio
    (`rpc`, eq. 2; nan where clean is 0)."""
    clean = scores["clean"]["map"]
    mpc = statistics.fmean(metrics["map"] for name, metrics in scores.items() if name != "clean")
    return {"clean": clean, "mpc": mpc, "rpc": mpc / clean if clean > 0 else float("nan")}


def _read_scores(path: Path, protocol: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    if not path.is_file():
        return {}
    try:
        content = read_json(path, _StoredScores, "what a measurement of a detector writes")
    except CheckpointError as error:
        logger.warning("%s Measuring everything again.", error)
        return {}
    if content["protocol"] != json.loads(json.dumps(dict(protocol))):
        logger.warning("%s was measured under another protocol: measuring everything again.", path)
        return {}
    return content["cells"]


def _write_scores(path: Path, protocol: Mapping[str, Any], scores: Mapping[str, Mapping[str, float]]) -> None:
    summary = corruption_summary(scores) if len(scores) > 1 else {}
    with atomic_write(path) as file:
        file.write(json.dumps({"protocol": dict(protocol), **summary, "cells": scores}, indent=1).encode() + b"\n")


def print_corruption_table(result: Mapping[str, Any], severities: Sequence[int]) -> None:
    """Print mAP in percent, one row per corruption and one column per severity, with the means below."""
    scores = result["cells"]
    print_text(f"{'mAP in %':20}" + "".join(f"{severity:>7}" for severity in severities) + f"{'mean':>8}")
    for name in CORRUPTIONS:
        row = [100 * scores[f"{name}/{severity}"]["map"] for severity in severities]
        print_text(f"{name:20}" + "".join(f"{value:7.1f}" for value in row) + f"{statistics.fmean(row):8.1f}")
    clean = ", ".join(f"{name} {100 * scores['clean'][name]:.1f}" for name in DETECTION_METRICS)
    print_text(f"clean: {clean}; mPC {100 * result['mpc']:.1f}, rPC {100 * result['rpc']:.0f} %")
