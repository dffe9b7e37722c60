"""Flags of `mae-dat convert`."""

import dataclasses
from typing import Annotated, Literal

import tyro


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Convert a model for use elsewhere: timm, MAE, Hugging Face, ONNX, torch.export.

    SOURCE is any file or output folder that this project loads: ours, MAE's, Hugging Face's ViTMAE, timm's, DeiT's or
    easyrobust's. The result is loaded again and its outputs are compared with the source's before the command ends.
    """

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")] = tyro.MISSING
    """Weights file or output folder."""
    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")] = tyro.MISSING
    """File to write (timm: .safetensors or .pth, mae: .pth, onnx: .onnx, export: .pt2), or a folder (hf)."""
    to: Literal["timm", "mae", "hf", "onnx", "export"] = tyro.MISSING
    """timm: for timm.create_model(checkpoint_path=...). mae: MAE's own layout. hf: a folder for from_pretrained and
    push_to_hub. onnx, export: a graph of the model, pixels in [0, 1] to logits (without a head: to tokens)."""
    model: str | None = None
    """Name of the architecture, if neither the file nor its shapes show it."""
    license: str | None = None
    """hf: license for the model card, such as cc-by-nc-4.0 for what comes from MAE's published weights."""
