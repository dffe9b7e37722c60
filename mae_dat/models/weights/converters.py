"""Write an opened model in the formats of other projects, and load the result in the way its users will.

Each converter writes to the temporary `path`. It returns the outputs of the written model, for comparison, and the
lines of code that load it from `dest`, its final path.
"""

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from mae_dat.config.errors import ConfigError
from mae_dat.config.extras import require_extra
from mae_dat.models.classifier import Classifier
from mae_dat.models.mae import MAE_MODELS, VIT_SIZES, MaskedAutoencoder
from mae_dat.models.modes import Network
from mae_dat.models.weights.huggingface import HubClassifier, HubMaskedAutoencoder, write_card
from mae_dat.models.weights.load import DECODER_KEYS
from mae_dat.models.weights.open import OpenedModel, open_model
from mae_dat.models.weights.read import read_model_file
from mae_dat.storage.files import atomic_write
from mae_dat.storage.weight_files import write_weights

ONNX_LIMIT = 1_900_000_000  # bytes of weights in the graph itself; larger weights go into a second file
TIMM_NAMES = {
    "vit_tiny_patch16": "vit_tiny_patch16_224",
    "vit_small_patch16": "vit_small_patch16_224",
    "vit_base_patch16": "vit_base_patch16_224",
    "vit_large_patch16": "vit_large_patch16_224",
    "vit_huge_patch14": "vit_huge_patch14_224",
}


class ModelOutputs(nn.Module):
    """What is compared and exported: a classifier's logits (B, K) of pixels (B, C, H, W) in [0, 1], or an autoencoder's
    tokens (B, 1 + N, D) of all patches."""

    def __init__(self, network: Classifier | MaskedAutoencoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Return logits or tokens of images (B, C, H, W) in [0, 1]."""
        if isinstance(self.network, MaskedAutoencoder):
            return self.network.features(image)
        return self.network(image)


class Conversion(NamedTuple):
    """A converted model: a function from pixels in [0, 1] to its outputs, and the lines of code that load it."""

    outputs: Network
    usage: str


def random_images(opened: OpenedModel, count: int) -> Tensor:
    """Draw images (count, C, H, W) in [0, 1] of the model's size, the same ones for the same count."""
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, opened.plan.in_chans, *opened.input_size, generator=generator)


# ---- weights ----


def to_timm(opened: OpenedModel, path: Path, dest: str) -> Conversion:
    """Write a file for `timm.create_model(..., checkpoint_path=...)`; for a masked autoencoder, the encoder."""
    name, options = timm_arguments(opened)
    _write_tensors(_bare_tensors(opened, decoder=False), path, opened, root=None)
    model: Any = timm.create_model(name, checkpoint_path=str(path), **options).eval()
    mean, std = opened.model.mean, opened.model.std

    def outputs(image: Tensor) -> Tensor:
        image = (image - mean) / std
        return model(image) if opened.plan.num_classes else model.forward_features(image)

    lines = "".join(f"    {key}={value!r},\n" for key, value in {"checkpoint_path": dest, **options}.items())
    statistics = options["pretrained_cfg_overlay"]
    return Conversion(
        outputs,
        f"timm.create_model(\n    {name!r},\n{lines})\n\n"
        f"timm's models take normalized pixels: mean {statistics['mean']}, std {statistics['std']}.",
    )


def timm_arguments(opened: OpenedModel) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments with which `timm.create_model` builds the same network."""
    plan = opened.plan
    options: dict[str, Any] = {"num_classes": plan.num_classes}
    name = plan.name.removeprefix("mae_")
    if name in VIT_SIZES:
        size = VIT_SIZES[name]
        if plan.num_classes and plan.global_pool:
            options["global_pool"] = "avg"
        if name not in TIMM_NAMES:
            options |= {key: getattr(size, key) for key in ("patch_size", "embed_dim", "depth", "num_heads")}
        name = TIMM_NAMES.get(name, "vit_tiny_patch16_224")
    pretrained_cfg: Any = timm.get_pretrained_cfg(name)
    if (
        plan.img_size
        and hasattr(_bare_network(opened), "patch_embed")
        and plan.img_size != pretrained_cfg.input_size[-2:]
    ):
        options["img_size"] = plan.img_size
    if plan.in_chans != 3:
        options["in_chans"] = plan.in_chans
    return name, {**options, "pretrained_cfg_overlay": _pixel_statistics(opened)}


def to_mae(opened: OpenedModel, path: Path, dest: str) -> Conversion:
    """Write a .pth in MAE's layout (key `model`), with the decoder if there is one. Raises ConfigError."""
    plan = opened.plan
    if plan.name not in (*VIT_SIZES, *MAE_MODELS):
        raise ConfigError(f"MAE's code has no {plan.name}: use --to timm.")
    _write_tensors(_bare_tensors(opened, decoder=True), path, opened, root="model")
    # MAE's layout records nothing about the model: the architecture comes from the source.
    file = dataclasses.replace(read_model_file(path), facts=_export_facts(opened))
    flags = "--eval --resume" if plan.num_classes else "--finetune"
    height, width = plan.img_size or (224, 224)
    size = "" if (height, width) == (224, 224) else f" --input_size {height} {width}"
    return Conversion(
        ModelOutputs(open_model(file).model),
        f"python main_finetune.py {flags} {dest} --model {plan.name.removeprefix('mae_')}{size}",
    )


def to_hub(opened: OpenedModel, path: Path, dest: str, source: str, license: str | None = None) -> Conversion:
    """Write a folder for `from_pretrained` and `push_to_hub`: config.json, model.safetensors and a model card.

    The card states the origin `source`, and the `license` if one is given.
    """
    plan = opened.plan
    settings: dict[str, Any] = {
        "name": plan.name,
        "img_size": list(plan.img_size) if plan.img_size else None,
        "in_chans": plan.in_chans,
        **_pixel_statistics(opened),
    }
    model: HubClassifier | HubMaskedAutoencoder
    if plan.num_classes:
        model = HubClassifier(
            num_classes=plan.num_classes, global_pool=plan.global_pool, classes=opened.classes, **settings
        )
    else:
        model = HubMaskedAutoencoder(decoder=plan.has_decoder, **settings)
    model.load_state_dict(opened.model.state_dict())
    kind = type(model)
    path.mkdir(exist_ok=True)
    write_card(path, kind, f"{plan}; converted from {source} ({opened.file.format}).", license)
    model.eval().save_pretrained(path)
    return Conversion(
        ModelOutputs(kind.from_pretrained(path)),
        f"from mae_dat.models.weights.huggingface import {kind.__name__}\n\n"
        f"model = {kind.__name__}.from_pretrained({dest!r})\n\n"
        f"To publish the folder with its card: hf upload USER/{path.name} {dest}",
    )


def _bare_network(opened: OpenedModel) -> nn.Module:
    """Return the network inside a `Classifier`, or the autoencoder: their keys have no prefix."""
    return opened.model.net if opened.kind == "classifier" else opened.model


def _bare_tensors(opened: OpenedModel, decoder: bool) -> dict[str, Tensor]:
    """Return the tensors by bare key; those of a decoder only if requested and present in the source."""
    state = _bare_network(opened).state_dict()
    if opened.kind == "classifier" or (decoder and opened.plan.has_decoder):
        return dict(state)
    return {key: tensor for key, tensor in state.items() if not key.startswith(DECODER_KEYS)}


def _pixel_statistics(opened: OpenedModel) -> dict[str, tuple[float, ...]]:
    """Return mean and deviation of pixels in [0, 1] that the model normalizes by, without float32's last digits."""
    statistics = {"mean": opened.model.mean, "std": opened.model.std}
    return {key: tuple(round(value, 6) for value in tensor.flatten().tolist()) for key, tensor in statistics.items()}


def _export_facts(opened: OpenedModel) -> dict[str, Any]:
    """Return the facts that rebuild the model, as our own exports record them."""
    plan = opened.plan
    facts: dict[str, Any] = {
        "kind": "classifier" if plan.num_classes else "mae",
        "model": plan.name,
        "in_chans": plan.in_chans,
        **_pixel_statistics(opened),
    }
    facts |= {"input_size": list(plan.img_size)} if plan.img_size else {}
    if plan.num_classes:
        facts |= {"nb_classes": plan.num_classes, "global_pool": plan.global_pool}
        facts |= {"crop_pct": opened.crop_pct} if opened.crop_pct else {}
        facts |= {"interpolation": opened.interpolation} if opened.interpolation != "bicubic" else {}
    return {**opened.facts, **facts}


def _write_tensors(tensors: dict[str, Tensor], path: Path, opened: OpenedModel, root: str | None) -> None:
    """Write a .safetensors with our facts, or a .pth with the tensors under the key `root`. Raises StorageError."""
    if path.suffix == ".safetensors":
        write_weights(path, tensors, {"mae_dat": json.dumps(_export_facts(opened))})
        return
    with atomic_write(path, sum(tensor.nbytes for tensor in tensors.values())) as file:
        torch.save({root: tensors} if root else tensors, file)


# ---- graphs ----


def to_onnx(opened: OpenedModel, path: Path, dest: str) -> Conversion:
    """Write an ONNX graph with a dynamic batch size, and run it with onnxruntime. Raises MissingInputError."""
    require_extra("export", "--to onnx")
    import onnxruntime

    size = sum(tensor.nbytes for tensor in opened.model.state_dict().values())
    torch.onnx.export(
        ModelOutputs(opened.model).eval(),
        (random_images(opened, 2),),
        path,
        input_names=["image"],
        output_names=["output"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch")}},
        dynamo=True,
        external_data=size > ONNX_LIMIT,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def outputs(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])

    return Conversion(outputs, f"onnxruntime.InferenceSession({dest!r}).run(None, {{'image': pixels in [0, 1]}})")


def to_export(opened: OpenedModel, path: Path, dest: str) -> Conversion:
    """Write a `torch.export` program with a dynamic batch size."""
    batch = {"image": {0: torch.export.Dim("batch")}}
    network = ModelOutputs(opened.model).eval()
    with torch.no_grad():
        program = torch.export.export(network, (random_images(opened, 2),), dynamic_shapes=batch)
    content = io.BytesIO()  # torch's writer ends the process when a file cannot be written
    torch.export.save(program, content)
    with atomic_write(path, content.tell()) as file:
        file.write(content.getbuffer())
    return Conversion(torch.export.load(path).module(), f"torch.export.load({dest!r}).module()(pixels in [0, 1])")


CONVERTERS: dict[str, Callable[[OpenedModel, Path, str], Conversion]] = {
    "timm": to_timm,
    "mae": to_mae,
    "onnx": to_onnx,
    "export": to_export,
}
"""The converters by the value of --to, except `hf`: `to_hub` has more arguments."""
