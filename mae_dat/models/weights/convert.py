"""Convert weights for use elsewhere: `mae-dat convert SOURCE DEST --to timm`.

SOURCE is any file or output folder that this project loads: MAE, Hugging Face ViTMAE, timm, DeiT, easyrobust, our own.
The command then loads the result in the way its users will, and compares it with the source.
"""

import contextlib
import dataclasses
import logging
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mae_dat.config.commands.convert import ConvertConfig
from mae_dat.config.errors import CheckpointError, ConfigError, OutputError, StorageError, suggest
from mae_dat.config.flags import expand_home
from mae_dat.config.terminal import print_text
from mae_dat.data.describe import describe_classes
from mae_dat.models.modes import Network
from mae_dat.models.weights.converters import CONVERTERS, Conversion, ModelOutputs, random_images, to_hub
from mae_dat.models.weights.describe import add_opened_models, describe_pixels
from mae_dat.models.weights.open import OpenedModel, open_model
from mae_dat.runtime.console import console_for_command
from mae_dat.runtime.inputs import INPUTS_FILE, InputSummary
from mae_dat.storage.files import prepare_output_folder, storage_error

TOLERANCE = 1e-4  # largest difference of the outputs before and after, relative to the largest output
_TEMPORARY = re.compile(r"\.convert\.\w+/")
_SUFFIXES = {
    "timm": (".safetensors", ".pth"),
    "mae": (".pth", ".safetensors"),
    "onnx": (".onnx",),
    "export": (".pt2",),
    "hf": (),
}


@dataclasses.dataclass(frozen=True, repr=False)
class ConvertedModel:
    """A converted model; printing it shows what was converted and how to load the result."""

    source: str
    path: Path
    """The file or folder that was written."""
    description: str
    """Format of the source and its architecture, in words."""
    difference: float
    """Largest difference between the outputs of the source and of the result, loaded again, over the largest output."""
    usage: str
    """Lines of code, or commands, that load the result."""

    def __repr__(self) -> str:
        return (
            f"{self.source}: {self.description}\n"
            f"{self.path}: loaded again, its outputs differ by {self.difference:.0e} of the largest "
            f"(allowed: {TOLERANCE:.0e})\n\n{self.usage}"
        )


def convert(
    source: str | Path, dest: str | Path, to: str, *, model: str | None = None, license: str | None = None
) -> ConvertedModel:
    """Convert a model for use elsewhere, load the result again, and compare its outputs with the source's.

    Args:
        source: a weights file or an output folder of any kind that `load_model` takes, except a detector; or a released
            name.
        dest: the file to write (timm: .safetensors or .pth, mae: .pth, onnx: .onnx, export: .pt2), or a folder (hf). It
            appears only if the outputs agree.
        to: timm, for `timm.create_model(checkpoint_path=...)`; mae, for MAE's code; hf, a folder for `from_pretrained`
            and `push_to_hub`; onnx or export (torch.export), a graph from pixels in [0, 1] to logits, or to tokens for
            a pretraining.
        model: the architecture, if neither the file nor its shapes show it.
        license: hf: license for the model card, such as cc-by-nc-4.0 for what comes from MAE's published weights.

    Returns:
        A `ConvertedModel`, which prints what was done and how to load the result.

    Raises:
        ConfigError: the target is unknown, or does not fit the model or the name of the file.
        OutputError: something would be lost at the destination.
        UserError: the source is missing or damaged, or the outputs differ.

    Examples:
        >>> import mae_dat
        >>> converted = mae_dat.convert("mae_dat_demo", "demo.safetensors", to="timm")
        >>> converted.path.name, converted.difference < 1e-4
        ('demo.safetensors', True)
    """
    if to not in _SUFFIXES:
        raise ConfigError(f"convert(to={to!r}): {suggest(to, list(_SUFFIXES))}")
    source, dest = expand_home(source), Path(expand_home(dest))
    _check_destination(source, dest, to)
    return _convert_opened(open_model(source, model), source, dest, to, license)


def _convert_opened(opened: OpenedModel, source: str, dest: Path, to: str, license: str | None) -> ConvertedModel:
    """Convert an opened model; see `convert`."""
    network = opened.encoder()
    with (
        _storage_errors(dest),
        tempfile.TemporaryDirectory(dir=dest.parent, prefix=".convert.") as folder,
        _only_warnings(),
    ):
        conversion = _write(opened, Path(folder) / dest.name, to, dest=dest, source=source, license=license)
        difference = max(
            output_difference(ModelOutputs(network), conversion.outputs, random_images(opened, count))
            for count in (1, 3)
        )
        for path in Path(folder).iterdir():  # ONNX puts large weights into a second file
            path.replace(dest.with_name(path.name))
    return ConvertedModel(source, dest, f"{opened.file.format}; {opened.plan}", difference, conversion.usage)


def _write(opened: OpenedModel, path: Path, to: str, *, dest: Path, source: str, license: str | None) -> Conversion:
    if to == "hf":
        return to_hub(opened, path, str(dest), source=Path(source).name, license=license)
    return CONVERTERS[to](opened, path, str(dest))


@contextlib.contextmanager
def _storage_errors(dest: Path) -> Iterator[None]:
    """Raise StorageError about the destination for a failed write of the temporary files next to it."""
    try:
        yield
    except StorageError as error:
        raise StorageError(_TEMPORARY.sub("", str(error))) from error
    except OSError as error:
        raise storage_error(dest, error) from error


@contextlib.contextmanager
def _only_warnings() -> Iterator[None]:
    """Drop log records below warnings: the exporters' messages, and those of the second loading."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.INFO))
    try:
        yield
    finally:
        logging.disable(before)


def _check_destination(source: str, dest: Path, to: str) -> None:
    """Raise ConfigError for a name with the wrong suffix, OutputError if existing files would be overwritten."""
    suffixes = _SUFFIXES[to]
    if dest.suffix not in suffixes and to != "hf":
        raise ConfigError(f"--to {to} writes {' or '.join(suffixes)}, got {dest}: use that suffix.")
    if dest.exists() and Path(source).resolve() == dest.resolve():
        raise OutputError(f"{dest} is the source itself: choose another file.")
    if dest.is_dir() and (to != "hf" or any(dest.iterdir())):
        raise OutputError(f"{dest} is a folder with other files: choose one that does not exist yet.")
    if dest.is_file() and to == "hf":
        raise OutputError(f"{dest} is a file, but --to hf writes a folder: choose one that does not exist yet.")
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
            f"the converted model's outputs differ by {difference:.0e} of the largest, more than {TOLERANCE:.0e}: "
            "nothing was written. Please report this, with the model's name and the versions of torch and timm."
        )
    return difference


def main(config: ConvertConfig) -> None:
    """Run the command."""
    console, dest = console_for_command(), Path(config.dest)
    _check_destination(config.source, dest, config.to)
    opened = open_model(config.source, config.model)
    inputs = conversion_inputs(config, opened)
    console.report_inputs(inputs)
    print_text(_convert_opened(opened, config.source, dest, config.to, config.license))
    inputs.write(dest / INPUTS_FILE if config.to == "hf" else dest.with_name(f"{dest.name}.{INPUTS_FILE}"))


def conversion_inputs(config: ConvertConfig, opened: OpenedModel) -> InputSummary:
    """Return the summary of what a conversion reads."""
    inputs = InputSummary(config.verb)
    add_opened_models(inputs, [opened])
    inputs.add("pixels", describe_pixels(opened))
    inputs.add("classes", f"{describe_classes(opened.classes)} (names stored with the model)" if opened.classes else "")
    inputs.add("output", f"{Path(config.dest).absolute()} ({config.to})")
    return inputs
