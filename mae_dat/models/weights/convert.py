"""Convert weights for use elsewhere: `mae-dat convert SOURCE DEST --to timm`.

SOURCE is any file or output folder that this project loads: MAE, Hugging Face ViTMAE, timm, DeiT, easyrobust, our own.
The result is loaded again, as its users will, and compared with the source before the command ends.
"""

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mae_dat.config.commands.convert import ConvertConfig
from mae_dat.config.errors import CheckpointError, ConfigError, OutputError
from mae_dat.models.modes import Network
from mae_dat.models.weights.converters import CONVERTERS, Conversion, ModelOutputs, random_images, to_hub
from mae_dat.models.weights.open import OpenedModel, open_model
from mae_dat.runtime.console import console_for_command
from mae_dat.storage.files import prepare_output_folder

TOLERANCE = 1e-4  # largest difference of the outputs before and after, relative to the largest output
_SUFFIXES = {
    "timm": (".safetensors", ".pth"),
    "mae": (".pth", ".safetensors"),
    "onnx": (".onnx",),
    "export": (".pt2",),
    "hf": (),
}


def convert(config: ConvertConfig) -> str:
    """Convert a model, compare it with the source, and return what was done and how to load the result.

    The destination appears only if the outputs agree within `TOLERANCE`. Raises UserError.
    """
    dest = Path(config.dest)
    _check_destination(config)
    opened = open_model(config.source, config.model)
    network = opened.encoder()
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=".convert.") as folder, _only_warnings():
        conversion = _write(opened, Path(folder) / dest.name, config)
        difference = max(
            output_difference(ModelOutputs(network), conversion.outputs, random_images(opened, count))
            for count in (1, 3)
        )
        for path in Path(folder).iterdir():  # ONNX puts large weights into a second file
            path.replace(dest.with_name(path.name))
    return (
        f"{config.source}: {opened.file.format}; {opened.plan}\n"
        f"{dest}: loaded again, its outputs differ by {difference:.0e} of the largest (allowed: {TOLERANCE:.0e})\n\n"
        f"{conversion.usage}"
    )


def _write(opened: OpenedModel, path: Path, config: ConvertConfig) -> Conversion:
    if config.to == "hf":
        return to_hub(opened, path, config.dest, source=Path(config.source).name, license=config.license)
    return CONVERTERS[config.to](opened, path, config.dest)


@contextlib.contextmanager
def _only_warnings() -> Iterator[None]:
    """Drop log records below warnings: the exporters' messages, and those of the second loading."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _check_destination(config: ConvertConfig) -> None:
    """Raise ConfigError for a name of another kind of file, OutputError if something would be lost."""
    dest, suffixes = Path(config.dest), _SUFFIXES[config.to]
    if dest.suffix not in suffixes and config.to != "hf":
        raise ConfigError(f"--to {config.to} writes {' or '.join(suffixes)}, got {dest}.")
    if dest.exists() and Path(config.source).resolve() == dest.resolve():
        raise OutputError(f"{dest} is the source itself: name another file.")
    if dest.is_dir() and (config.to != "hf" or any(dest.iterdir())):
        raise OutputError(f"{dest} is a folder with other files: name one that does not exist yet.")
    if dest.is_file() and config.to == "hf":
        raise OutputError(f"{dest} is a file, and --to hf writes a folder: name one that does not exist yet.")
    if not dest.parent.is_dir():
        raise OutputError(f"there is no folder {dest.parent} for {dest.name}: create it first.")
    prepare_output_folder(dest.parent, "another destination")


def output_difference(before: Network, after: Network, image: Tensor) -> float:
    """Return the largest difference of the outputs for images (B, C, H, W), relative to the largest output.

    Raises CheckpointError beyond `TOLERANCE`.
    """
    with torch.no_grad():
        expected, outputs = before(image), after(image)
    difference = float((expected - outputs).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not difference <= TOLERANCE:  # also for NaN
        raise CheckpointError(
            f"the converted network's outputs differ by {difference:.0e} of the largest, more than {TOLERANCE:.0e}: "
            "nothing was written. Please report this, with the model's name and the versions of torch and timm."
        )
    return difference


def main(config: ConvertConfig) -> None:
    """Run the command."""
    console_for_command()
    print(convert(config))
