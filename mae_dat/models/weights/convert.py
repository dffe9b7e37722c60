"""Converts weights, so that they work where you want them.

`python -m mae_dat convert SOURCE DEST --to timm`. SOURCE is any file or output folder that this project loads: MAE,
Hugging Face ViTMAE, timm, DeiT, easyrobust, our own. What was written is loaded again, as its users will, and compared
with the source before the command ends.
"""

import contextlib
import dataclasses
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import timm
import torch
import tyro
from torch import Tensor, nn

from mae_dat.config.errors import CheckpointError, ConfigError, MissingInputError, OutputError
from mae_dat.config.parse import load_config
from mae_dat.models.classifier import Classifier
from mae_dat.models.mae import MAE_MODELS, VIT_SIZES, MaskedAutoencoder
from mae_dat.models.weights.huggingface import HubClassifier, HubMaskedAutoencoder, write_card
from mae_dat.models.weights.load import DECODER_KEYS
from mae_dat.models.weights.open import ModelPlan, OpenedModel, open_model
from mae_dat.models.weights.read import read_model_file
from mae_dat.runtime.console import console_for_command
from mae_dat.storage.files import atomic_write, prepare_output_folder
from mae_dat.storage.weight_files import write_weights

Network = Classifier | MaskedAutoencoder
TOLERANCE = 1e-4  # largest difference of the outputs before and after, relative to the largest output
ONNX_LIMIT = 1_900_000_000  # bytes of weights in the graph itself; a file beside it holds more
TIMM_NAMES = {
    "vit_base_patch16": "vit_base_patch16_224",
    "vit_large_patch16": "vit_large_patch16_224",
    "vit_huge_patch14": "vit_huge_patch14_224",
}
SUFFIXES = {
    "timm": (".safetensors", ".pth"),
    "mae": (".pth", ".safetensors"),
    "onnx": (".onnx",),
    "export": (".pt2",),
    "hf": (),
}


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """A conversion."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")] = tyro.MISSING
    """Weights file or output folder."""
    dest: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DEST")] = tyro.MISSING
    """File to write (timm: .safetensors or .pth, mae: .pth, onnx: .onnx, export: .pt2), or a folder (hf)."""
    to: Literal["timm", "mae", "hf", "onnx", "export"] = tyro.MISSING
    """timm: for timm.create_model(checkpoint_path=...). mae: MAE's own layout. hf: a folder for from_pretrained and
    push_to_hub. onnx, export: a graph of the network, pixels in [0, 1] to logits (without a head: to tokens)."""
    model: str | None = None
    """Name of the network, where the file and its shapes leave it open."""
    license: str | None = None
    """hf: licence for the model card, such as cc-by-nc-4.0 for what comes from MAE's published weights."""


class Outputs(nn.Module):
    """What is compared and exported: logits of pixels (B, C, H, W) in [0, 1], or an autoencoder's tokens of all
    patches."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        if isinstance(self.network, MaskedAutoencoder):
            return self.network.features(image)
        return self.network(image)


class Written(NamedTuple):
    """The network as its users will have it, from pixels in [0, 1] to outputs, and the lines that make it."""

    again: Callable[[Tensor], Tensor]
    usage: str


def convert(config: ConvertConfig) -> str:
    """Converts, compares, and says what was done and how to load the result.

    The destination appears only when the outputs agree within `TOLERANCE`. Raises UserError.
    """
    dest = Path(config.dest)
    check_destination(config)
    opened = open_model(config.source, config.model)
    opened.encoder()  # raises for a detector
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=".convert.") as folder, silence():
        part = Path(folder) / dest.name
        written = WRITERS[config.to](opened, part, config)
        difference = max(compare(opened.model, written.again, pictures(opened, count)) for count in (1, 3))
        for path in Path(folder).iterdir():  # ONNX puts large weights into a second file
            path.replace(dest.with_name(path.name))
    return (
        f"{config.source}: {opened.file.format}; {opened.plan}\n"
        f"{dest}: loaded again, its outputs differ by {difference:.0e} of the largest (allowed: {TOLERANCE:.0e})\n\n"
        f"{written.usage}"
    )


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keeps what the exporters and the second loading have to say out of the log, but for warnings."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def check_destination(config: ConvertConfig) -> None:
    """Raises ConfigError for a name of another kind of file, OutputError where something would be lost."""
    dest, suffixes = Path(config.dest), SUFFIXES[config.to]
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


def pictures(opened: OpenedModel, count: int) -> Tensor:
    """Random pictures (count, C, H, W) of the network's size."""
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, opened.plan.in_chans, *opened.input_size, generator=generator)


def compare(network: Network, again: Callable[[Tensor], Tensor], image: Tensor) -> float:
    """Largest difference of the outputs, relative to the largest output. Raises CheckpointError beyond `TOLERANCE`."""
    with torch.no_grad():
        before, after = Outputs(network)(image), again(image)
    difference = float((before - after).abs().max() / before.abs().max().clamp(min=1e-12))
    if not difference <= TOLERANCE:  # nan too
        raise CheckpointError(
            f"the converted network's outputs differ by {difference:.0e} of the largest, more than {TOLERANCE:.0e}: "
            "nothing was written. Please report this, with the model's name and the versions of torch and timm."
        )
    return difference


def network_inside(network: Network) -> nn.Module:
    """The network under its normalisation."""
    return network.net if isinstance(network, Classifier) else network


def tensors_of(opened: OpenedModel, decoder: bool) -> dict[str, Tensor]:
    """Bare tensors; of an autoencoder without the decoder unless asked for and present."""
    state = network_inside(opened.model).state_dict()
    if isinstance(opened.model, Classifier) or (decoder and opened.plan.has_decoder):
        return dict(state)
    return {key: value for key, value in state.items() if not key.startswith(DECODER_KEYS)}


def statistics_of(network: Network) -> dict[str, tuple[float, ...]]:
    """Mean and deviation of pixels in [0, 1] by which the network normalises, free of float32's last digits."""
    values = {"mean": network.mean, "std": network.std}
    return {key: tuple(round(number, 6) for number in value.flatten().tolist()) for key, value in values.items()}


def facts_of(opened: OpenedModel) -> dict[str, Any]:
    """What it takes to rebuild the network, as our own exports say it."""
    plan, network = opened.plan, opened.model
    facts: dict[str, Any] = {
        "kind": "classifier" if plan.num_classes else "mae",
        "model": plan.name,
        "in_chans": plan.in_chans,
        **statistics_of(network),
    }
    facts |= {"input_size": list(plan.img_size)} if plan.img_size else {}
    facts |= {"nb_classes": plan.num_classes, "global_pool": plan.global_pool} if plan.num_classes else {}
    return {**opened.facts, **facts}


def save(tensors: dict[str, Tensor], dest: Path, opened: OpenedModel, root: str | None) -> None:
    """Writes a .safetensors with our facts, or a .pth with the tensors under `root`. Raises StorageError."""
    if dest.suffix == ".safetensors":
        write_weights(dest, tensors, {"mae_dat": json.dumps(facts_of(opened))})
        return
    with atomic_write(dest) as file:
        torch.save({root: tensors} if root else tensors, file)


def timm_arguments(plan: ModelPlan, network: Network) -> tuple[str, dict[str, Any]]:
    """Name and arguments with which `timm.create_model` builds the same network."""
    options: dict[str, Any] = {"num_classes": plan.num_classes}
    name = plan.name.removeprefix("mae_")
    if name in VIT_SIZES:
        size = VIT_SIZES[name]
        if plan.num_classes and plan.global_pool:
            options["global_pool"] = "avg"
        if name not in TIMM_NAMES:
            options |= {key: getattr(size, key) for key in ("patch_size", "embed_dim", "depth", "num_heads")}
        name = TIMM_NAMES.get(name, "vit_tiny_patch16_224")
    settings: Any = timm.get_pretrained_cfg(name)
    if plan.img_size and hasattr(network_inside(network), "patch_embed") and plan.img_size != settings.input_size[-2:]:
        options["img_size"] = plan.img_size
    if plan.in_chans != 3:
        options["in_chans"] = plan.in_chans
    return name, {**options, "pretrained_cfg_overlay": statistics_of(network)}


def to_timm(opened: OpenedModel, dest: Path, config: ConvertConfig) -> Written:
    """A file for `timm.create_model(..., checkpoint_path=...)`; of a pretraining the encoder."""
    name, options = timm_arguments(opened.plan, opened.model)
    save(tensors_of(opened, decoder=False), dest, opened, None)
    model: Any = timm.create_model(name, checkpoint_path=str(dest), **options).eval()
    network = opened.model
    statistics = options["pretrained_cfg_overlay"]

    def again(image: Tensor) -> Tensor:
        image = (image - network.mean) / network.std
        return model(image) if opened.plan.num_classes else model.forward_features(image)

    lines = "".join(f"    {key}={value!r},\n" for key, value in {"checkpoint_path": config.dest, **options}.items())
    return Written(
        again,
        f"timm.create_model(\n    {name!r},\n{lines})\n\n"
        f"timm's models take normalised pixels: mean {statistics['mean']}, std {statistics['std']}.",
    )


def to_mae(opened: OpenedModel, dest: Path, config: ConvertConfig) -> Written:
    """MAE's own layout: `model` in a .pth, with the decoder where there is one."""
    if opened.plan.name not in (*VIT_SIZES, *MAE_MODELS):
        raise ConfigError(f"MAE's code has no {opened.plan.name}: use --to timm.")
    save(tensors_of(opened, decoder=True), dest, opened, "model")
    # MAE's layout records nothing: what is compared is built from the facts of the source.
    file = dataclasses.replace(read_model_file(dest), facts=facts_of(opened))
    what = "--eval --resume" if opened.plan.num_classes else "--finetune"
    sides = opened.plan.img_size or (224, 224)
    size = "" if tuple(sides) == (224, 224) else f" --input_size {' '.join(map(str, sides))}"
    return Written(
        Outputs(open_model(file).model),
        f"python main_finetune.py {what} {config.dest} --model {opened.plan.name.removeprefix('mae_')}{size}",
    )


def to_hub(opened: OpenedModel, dest: Path, config: ConvertConfig) -> Written:
    """A folder for `from_pretrained` and `push_to_hub`: config.json, model.safetensors and a model card."""
    plan, network = opened.plan, opened.model
    settings: dict[str, Any] = {
        "name": plan.name,
        "img_size": list(plan.img_size) if plan.img_size else None,
        "in_chans": plan.in_chans,
        **statistics_of(network),
    }
    model: HubClassifier | HubMaskedAutoencoder
    if plan.num_classes:
        classes = opened.classes
        pooled = plan.global_pool
        model = HubClassifier(num_classes=plan.num_classes, global_pool=pooled, classes=classes, **settings)
    else:
        model = HubMaskedAutoencoder(decoder=plan.has_decoder, **settings)
    model.load_state_dict(network.state_dict())
    kind = type(model)
    dest.mkdir(exist_ok=True)
    source = f"{Path(config.source).name} ({opened.file.format})"
    write_card(dest, kind, f"{plan}; converted from {source}.", config.license)
    model.eval().save_pretrained(dest)
    return Written(
        Outputs(kind.from_pretrained(dest)),
        f"from mae_dat.models.weights.huggingface import {kind.__name__}\n\n"
        f"model = {kind.__name__}.from_pretrained({config.dest!r})\n\n"
        f"To publish the folder with its card: hf upload USER/{dest.name} {config.dest}",
    )


def to_onnx(opened: OpenedModel, dest: Path, config: ConvertConfig) -> Written:
    """An ONNX graph with a free batch size, run again by onnxruntime."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise MissingInputError(f'--to onnx needs the package {error.name}: pip install "mae_dat[export]"') from error
    image = pictures(opened, 2)
    total = sum(value.nbytes for value in opened.model.state_dict().values())
    torch.onnx.export(
        Outputs(opened.model).eval(),
        (image,),
        dest,
        input_names=["image"],
        output_names=["output"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        dynamo=True,
        external_data=total > ONNX_LIMIT,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(dest, providers=["CPUExecutionProvider"])

    def again(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])

    return Written(again, f"onnxruntime.InferenceSession({config.dest!r}).run(None, {{'image': pixels in [0, 1]}})")


def to_export(opened: OpenedModel, dest: Path, config: ConvertConfig) -> Written:
    """A `torch.export` program with a free batch size."""
    batch = {"image": {0: torch.export.Dim("batch")}}
    with torch.no_grad():
        program = torch.export.export(Outputs(opened.model).eval(), (pictures(opened, 2),), dynamic_shapes=batch)
    with atomic_write(dest) as file:
        torch.export.save(program, file)
    return Written(torch.export.load(dest).module(), f"torch.export.load({config.dest!r}).module()(pixels in [0, 1])")


WRITERS: dict[str, Callable[[OpenedModel, Path, ConvertConfig], Written]] = {
    "timm": to_timm,
    "mae": to_mae,
    "hf": to_hub,
    "onnx": to_onnx,
    "export": to_export,
}


def main(arguments: Sequence[str]) -> None:
    """Run the command with its arguments."""
    console_for_command()
    print(convert(load_config(ConvertConfig, arguments, __doc__ or "")))
