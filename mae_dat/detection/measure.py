"""Average precision of a detector by COCO's rules, clean and under the corruptions (Michaelis et al. 2019,
"Benchmarking Robustness in Object Detection", eqs. 1 and 2: mPC and rPC)."""

import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_dat.config.errors import ConfigError
from mae_dat.data.loader import ImageLoader, eval_loader
from mae_dat.detection.coco import CocoImages
from mae_dat.detection.objective import ground_truth
from mae_dat.models.detector import Detector
from mae_dat.models.modes import autocast, evaluation_mode
from mae_dat.robustness.corruptions import CORRUPTIONS
from mae_dat.runtime.collectives import gather, on_all_ranks
from mae_dat.runtime.console import Console
from mae_dat.storage.files import atomic_write
from mae_dat.training.context import RunContext

logger = logging.getLogger(__name__)

DetectionPair = tuple[dict[str, Tensor], dict[str, Tensor]]
"""What was found in a picture and what is there, as torchmetrics takes them."""
DETECTION_METRICS = ("map", "map_50", "map_75")


def coco_scores(pairs: Sequence[DetectionPair]) -> dict[str, float]:
    """mAP (IoU 0.50 to 0.95), mAP at 0.50 and at 0.75, shares in [0, 1]. Raises ConfigError without pycocotools."""
    try:
        from torchmetrics.detection import MeanAveragePrecision

        metric = MeanAveragePrecision(backend="pycocotools")
    except ImportError as error:
        raise ConfigError("mAP needs two more packages: pip install 'mae_dat[detection]'.") from error
    metric.update([found for found, _ in pairs], [there for _, there in pairs])
    result = metric.compute()
    return {name: float(result[name]) for name in DETECTION_METRICS}


@torch.no_grad()
def average_precision(detector: Detector, loader: ImageLoader, context: RunContext) -> dict[str, float]:
    """`coco_scores` over the loaders of all ranks. Collective."""
    pairs: list[DetectionPair] = []
    with evaluation_mode(detector):
        for batch in loader:
            image = batch["image"].to(context.device)
            with autocast(context.device, context.precision):
                found = detector(image)
            there = ground_truth(batch, crowd=True)
            for one, truth, skipped in zip(found, there, batch["skipped"].tolist(), strict=True):
                if not skipped:
                    pairs.append(({name: value.float().cpu() for name, value in one.items()}, truth))
    pairs = [pair for rank in gather(pairs) for pair in rank]
    return coco_scores([({**one, "labels": one["labels"].long()}, truth) for one, truth in pairs])


def measure_corruptions(
    detector: Detector,
    pictures: CocoImages,
    severities: Sequence[int],
    batch_size: int,
    num_workers: int,
    context: RunContext,
    protocol: Mapping[str, Any],
    console: Console,
) -> dict[str, Any]:
    """Average precision clean and under 15 corruptions, with mPC and rPC, in `output/detection.json`.

    Every cell is stored as it is done, and those that are there under the same protocol are not done again.
    """
    path = context.output / "detection.json"
    cells = on_all_ranks(lambda: _stored(path, protocol))
    wanted = ["clean", *(f"{name}/{severity}" for name in CORRUPTIONS for severity in severities)]
    with console.task("corruptions", len(wanted)) as task:
        for cell in wanted:
            if cell not in cells:
                name, _, severity = cell.partition("/")
                shown = pictures if cell == "clean" else pictures.corrupted(name, int(severity))
                loader = eval_loader(shown, batch_size, context.world.rank, context.world.size, num_workers)
                cells[cell] = average_precision(detector, loader, context)
                if context.world.main:
                    _store(path, protocol, cells)
            task.advance(f"{cell} mAP {100 * cells[cell]['map']:.1f}")
    return {"protocol": dict(protocol), **corruption_summary(cells), "cells": cells}


def corruption_summary(cells: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Clean mAP (`clean`), its mean over corruptions and severities (`mpc`), and their ratio (`rpc`), nan where clean
    is 0."""
    clean = cells["clean"]["map"]
    mpc = statistics.fmean(one["map"] for name, one in cells.items() if name != "clean")
    return {"clean": clean, "mpc": mpc, "rpc": mpc / clean if clean > 0 else float("nan")}


def _stored(path: Path, protocol: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    if found.get("protocol") != json.loads(json.dumps(dict(protocol))):
        logger.warning("%s is of another protocol: measured anew.", path)
        return {}
    return found["cells"]


def _store(path: Path, protocol: Mapping[str, Any], cells: Mapping[str, Mapping[str, float]]) -> None:
    complete = corruption_summary(cells) if len(cells) > 1 else {}
    with atomic_write(path) as file:
        file.write(json.dumps({"protocol": dict(protocol), **complete, "cells": cells}, indent=1).encode() + b"\n")


def print_corruption_table(result: Mapping[str, Any], severities: Sequence[int]) -> None:
    """mAP in percent, a corruption a row and a severity a column, with the means below."""
    cells = result["cells"]
    print(f"{'mAP in %':20}" + "".join(f"{severity:>7}" for severity in severities) + f"{'mean':>8}")
    for name in CORRUPTIONS:
        row = [100 * cells[f"{name}/{severity}"]["map"] for severity in severities]
        print(f"{name:20}" + "".join(f"{value:7.1f}" for value in row) + f"{statistics.fmean(row):8.1f}")
    clean = cells["clean"]
    told = ", ".join(f"{name} {100 * clean[name]:.1f}" for name in DETECTION_METRICS)
    print(f"clean: {told}; mPC {100 * result['mpc']:.1f}, rPC {100 * result['rpc']:.0f} %")
