"""Small folders in the layouts of the published benchmarks."""

import dataclasses
import json
import os
import random
from pathlib import Path

import numpy as np
from PIL import Image

from mae_dat.robustness.suites.catalogue import BENCHMARKS, Benchmark
from mae_dat.robustness.suites.imagenet import SYNSETS

SIDE = 40


FEW = SYNSETS[:3]


def write(paths: list[Path], side: int = SIDE) -> None:
    """One noise image under many names: hard links, for there may be thousands."""
    first = paths[0]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path == first:
            pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path, format="PNG")
        else:
            os.link(first, path)


def validation_names(wnids: tuple[str, ...] = FEW, each: int = 2) -> list[str]:
    """n01440764/ILSVRC2012_val_00000001.JPEG and so on."""
    return [f"{w}/ILSVRC2012_val_{i * each + k + 1:08d}.JPEG" for i, w in enumerate(wnids) for k in range(each)]


def reduced(name: str, **changes: object) -> Benchmark:
    """A benchmark of three classes with two images each."""
    labels = {wnid: number for number, wnid in enumerate(FEW)}
    facts = {"labels": labels, "images": 6, "per_class": 2} | changes
    if BENCHMARKS[name].side:
        facts["side"] = SIDE
    return dataclasses.replace(BENCHMARKS[name], **facts)


def write_objectnet(root: Path) -> None:
    """313 folders with an image each; classes 0 to 112 overlap, the first 12 of them with two ImageNet classes."""
    folders = [f"thing_{number:03d}" for number in range(313)]
    write([root / "images" / name / "0.png" for name in folders])
    lines = list(range(1000))
    random.Random(1).shuffle(lines)  # line of the label file, of each ImageNet class
    texts = [""] * 1000
    for number, line in enumerate(lines):
        texts[line] = f"name {number}, other name"
    ids = {i: [2 * i, 2 * i + 1] if i < 12 else [100 + i] for i in range(113)}
    mapping = {f"Thing {i}": "; ".join(f"name {k}, other name" for k in own) for i, own in ids.items()}
    (root / "mappings").mkdir()
    for name, content in [
        ("folder_to_objectnet_label.json", {name: f"Thing {i}" for i, name in enumerate(folders)}),
        ("objectnet_to_imagenet_1k.json", mapping),
        ("pytorch_to_imagenet_2012_id.json", {str(number): line for number, line in enumerate(lines)}),
    ]:
        (root / "mappings" / name).write_text(json.dumps(content))
    (root / "mappings" / "imagenet_to_label_2012_v2").write_text("\n".join(texts) + "\n")
