"""Tiny models and images to evaluate."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from benchmark_folders import SIDE, reduced, validation_names
from PIL import Image
from timm.models import save_for_hf
from tiny_runs import draw_folder
from torch import Tensor, nn

from mae_dat.models.classifier import build_classifier
from mae_dat.robustness.corruptions import CORRUPTIONS
from mae_dat.robustness.suites.catalogue import BENCHMARKS
from mae_dat.robustness.suites.imagenet import IMAGENET_A, SIXTEEN, synsets_of
from mae_dat.storage.weight_files import write_weights


class Linear(nn.Sequential):
    """A small real network: means over a grid of 4 x 4, then logits; counts the images that it sees."""

    def __init__(self, classes: int = 10, seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, classes))
        nn.init.normal_(self[2].weight)
        self.seen = 0
        self.most: float = float("inf")

    def __getstate__(self) -> dict[str, Any]:
        """Without the counters, which are no part of what it is known by."""
        return {key: value for key, value in vars(self).items() if key not in ("seen", "most")}

    def forward(self, image: Tensor) -> Tensor:
        self.seen += len(image)
        if self.seen > self.most:
            raise KeyboardInterrupt
        return super().forward(image)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of ten classes that are not ImageNet's."""
    return draw_folder(tmp_path_factory.mktemp("own"), train=0, conflict=0)


def draw(paths: list[Path], side: int = SIDE) -> None:
    """A smooth image of its own under every path."""
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(path, format="PNG")


@pytest.fixture
def imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ImageNet, A, V2, C and cue conflict with few classes, laid out like the originals."""
    root, names, shapes = tmp_path / "data", validation_names(), list(SIXTEEN)
    few_of_a = synsets_of(IMAGENET_A)[:4]
    changes: dict[str, dict[str, Any]] = {
        "imagenet": {},
        "imagenet-a": {"images": 4, "labels": dict(zip(few_of_a, IMAGENET_A, strict=False)), "per_class": None},
        "imagenet-v2": {"labels": {"0": 0, "10": 10, "2": 2}},
        "imagenet-c": {},
    }
    for name, change in changes.items():
        monkeypatch.setitem(BENCHMARKS, name, reduced(name, **change))
    cues = dataclasses.replace(BENCHMARKS["cue-conflict"], images=48, per_class=3, side=SIDE)
    monkeypatch.setitem(BENCHMARKS, "cue-conflict", cues)
    draw([root / "imagenet" / "val" / name for name in names], side=70)
    draw([root / "imagenet-a" / wnid / "0.jpg" for wnid in few_of_a], side=50)
    draw([root / "imagenet-v2" / number / f"{k}.jpeg" for number in ("0", "10", "2") for k in range(2)], side=50)
    draw([root / "ImageNet-C" / c / str(s) / name for c in CORRUPTIONS for s in range(1, 6) for name in names])
    draw(
        [
            root / "cue-conflict" / s / f"{s}{i}-{shapes[(k + i) % 16]}2.png"
            for k, s in enumerate(shapes)
            for i in range(3)
        ]
    )
    return root


def write_onnx(network: Linear, path: Path, batch: int | str = "batch", flat: int = 0) -> Path:
    """The same network as a graph, made by hand: exporting takes longer than all of these tests. `flat`: images that
    it was traced with, where the export made a number of that."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, numpy = onnx.helper, onnx.numpy_helper
    weights = {"w": network[2].weight.detach().numpy(), "b": network[2].bias.detach().numpy()}
    nodes = [
        helper.make_node("AveragePool", ["image"], ["grid"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Reshape", ["grid", "shape"], ["flat"])
        if flat
        else helper.make_node("Flatten", ["grid"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["logits"], transB=1),
    ]
    kinds = [("image", [batch, 3, 32, 32]), ("logits", [batch, len(weights["b"])])]
    image_input, logits_output = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in kinds
    )
    weights |= {"shape": np.array([flat, 48])} if flat else {}
    tensors = [numpy.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "linear", [image_input], [logits_output], tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def saved(path: Path, classes: int = 1000, names: list[str] | None = None, side: int = 32, seed: int = 0) -> Path:
    """An untrained vision transformer as a file of ours."""
    torch.manual_seed(seed)
    model = build_classifier("vit_demo_patch8", classes, side)
    nn.init.normal_(model.net.head.weight)  # type: ignore[union-attr, arg-type]
    facts = {"kind": "classifier", "model": "vit_demo_patch8", "global_pool": True, "input_size": [side, side]}
    facts |= {"nb_classes": classes} | ({"classes": names} if names else {})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_weights(path, model.net.state_dict(), {"mae_dat": json.dumps(facts)})
    return path


def write_timm(folder: Path, classes: int = 10) -> nn.Module:
    """A network as timm puts it on the Hub: what hf-hub:OWNER/NAME fetches lies here as local-dir:FOLDER."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=classes, img_size=32)
    save_for_hf(network, folder)
    return network
