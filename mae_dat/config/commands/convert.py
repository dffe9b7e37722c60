"""Flags of `mae-dat convert`."""

import dataclasses
from typing import Literal

from mae_dat.config.command_config import CommandConfig


@dataclasses.dataclass(frozen=True)
class ConvertConfig(CommandConfig):
    """Convert a model for use elsewhere: timm, MAE, Hugging Face, ONNX, torch.export.

    SOURCE is an output folder of this package, or a file of this package, MAE, Hugging Face's ViTMAE, timm, DeiT or
    easyrobust. Before the command ends, it loads the result and compares its outputs with those of the source.
    """

    verb = "convert"
    source: str = dataclasses.field(metadata={"positional": "SOURCE"})
    """Weights file or output folder."""
    dest: str = dataclasses.field(metadata={"positional": "DEST"})
    """File to write (timm: .safetensors or .pth, mae: .pth, onnx: .onnx, export: .pt2), or a folder (hf)."""
    to: Literal["timm", "mae", "hf", "onnx", "export"]
    """timm: for timm.create_model(checkpoint_path=...). mae: MAE's own layout. hf: a folder for from_pretrained and
    push_to_hub. onnx, export: a graph from pixels in [0, 1] to logits (to tokens without a head)."""
    model: str | None = None
    """Architecture, if neither the file nor its shapes show it."""
    license: str | None = None
    """hf: license for the model card, such as cc-by-nc-4.0 for models made from MAE's published weights."""
