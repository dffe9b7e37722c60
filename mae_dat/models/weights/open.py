"""A network from nothing but its weights file: what the file says of itself, or else what its shapes tell.

`open_model("weights.pth")` is the one line; `Blueprint` is what was found out.
"""

import contextlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data import resolve_model_data_config
from torch import Tensor

from mae_dat.config.errors import CheckpointError, ConfigError, MissingInputError
from mae_dat.config.groups import image_size
from mae_dat.models.classifier import Classifier, PatchGrid, build_classifier
from mae_dat.models.mae import MAE_MODELS, VIT_SIZES, MaskedAutoencoder, build_mae, unknown_name
from mae_dat.models.tokenizer import check_card
from mae_dat.models.weights.formats import Recognized
from mae_dat.models.weights.load import Source, load_mae, load_weights, read_source, size_of
from mae_dat.storage.checkpoint import newest_checkpoint
from mae_dat.storage.released import local_path, released_weights
from mae_dat.storage.weight_files import WEIGHTS_FILE, WeightsFile, extract_weights, read_weights


@dataclass(frozen=True)
class Blueprint:
    """What it takes to build a network: a masked autoencoder (`num_classes` 0) or a classifier.

    `img_size` is (H, W) in pixels, None where the network takes any; `mean` and `std` are None for the model's own.
    `decoder` says whether the file holds one.
    """

    name: str
    num_classes: int
    img_size: PatchGrid | None = None
    in_chans: int = 3
    global_pool: bool = True
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    decoder: bool = False

    def build(self) -> Classifier | MaskedAutoencoder:
        """The network with fresh weights. Raises ConfigError for a name that is not known."""
        if self.name in MAE_MODELS:
            size: dict[str, Any] = {"img_size": self.img_size} if self.img_size else {}
            return build_mae(self.name, in_chans=self.in_chans, mean=self.mean, std=self.std, **size)
        return build_classifier(
            self.name,
            self.num_classes,
            self.img_size,
            global_pool=self.global_pool,
            in_chans=self.in_chans,
            mean=self.mean,
            std=self.std,
        )

    def __str__(self) -> str:
        size = f", {self.img_size[0]} x {self.img_size[1]} px" if self.img_size else ""
        return f"{self.name}{size}" + (f", {self.num_classes} classes" if self.num_classes else "")


class Opened(NamedTuple):
    """A source: its file, what that was recognised as, what it takes to build the network, and the loaded network."""

    file: WeightsFile
    found: Recognized
    plan: Blueprint
    network: Classifier | MaskedAutoencoder


def open_model(source: Source, model: str | None = None) -> Classifier | MaskedAutoencoder:
    """The network of a weights file, in evaluation mode: a classifier, or a masked autoencoder for a pretraining.

    `model` is its name, needed where the file and its shapes leave it open. Without a decoder in the file the
    autoencoder's is left as initialised. Raises MissingInputError, ConfigError, CheckpointError.
    """
    return open_source(source, model).network


def open_source(source: Source, model: str | None = None, img_size: PatchGrid | None = None) -> Opened:
    """`open_model`, with all that was found out on the way; for pictures of another size where `img_size` says so."""
    file, found = read_source(source)
    plan = describe(file, found, model)
    grid = _grid(plan, found.tensors)
    plan = replace(plan, img_size=img_size or plan.img_size)
    network = plan.build()
    if isinstance(network, MaskedAutoencoder):
        load_mae(network, file, plan.decoder, grid)
    else:
        load_weights(network, file, grid)
    return Opened(file, found, plan, network.eval())


def describe(file: WeightsFile, found: Recognized, model: str | None = None) -> Blueprint:
    """What the file's own facts, its shapes and the name `model` say. Raises CheckpointError where that is too little,
    ConfigError for a name that is not known."""
    facts, tensors = file.facts, found.tensors
    name = model or facts.get("model") or _name_by_shapes(file, found)
    maes = name in MAE_MODELS or name in VIT_SIZES
    if not maes and not timm.is_model(name):
        raise unknown_name("model", name, [*MAE_MODELS, *VIT_SIZES, *timm.list_models()])
    pretraining = found.kind in ("autoencoder", "encoder")
    if pretraining and f"mae_{name}" in MAE_MODELS:
        name = f"mae_{name}"
    if pretraining != (name in MAE_MODELS):
        held = "a pretraining without classes" if pretraining else "a classifier"
        raise CheckpointError(f"{file.source} is {held} ({found.format}), which {name} is not: give another --model.")
    size = tuple(facts["input_size"]) if "input_size" in facts else _image_size(file, tensors, maes)
    patch = tensors.get("patch_embed.proj.weight")
    mean, std = file.statistics or (None, None)
    return Blueprint(
        name=name,
        num_classes=0 if pretraining else len(tensors[_head_of(name, file, tensors)]),
        img_size=(size[0], size[-1]) if size else None,
        in_chans=facts.get("in_chans", 3 if patch is None else patch.shape[1]),
        global_pool="fc_norm.weight" in tensors,
        mean=mean,
        std=std,
        decoder=found.kind == "autoencoder",
    )


def _name_by_shapes(file: WeightsFile, found: Recognized) -> str:
    name = size_of(found.tensors)
    if name is None:
        raise CheckpointError(
            f"{file.source} ({found.format}) does not say which network it is, and its shapes are none of "
            f"{', '.join(VIT_SIZES)}: give its name with --model, or timm's."
        )
    pooled = "fc_norm.weight" in found.tensors
    if found.kind == "classifier" and not pooled and file.statistics is None:
        # The same keys and shapes, and nothing in the file tells by what the pixels were normalised.
        raise CheckpointError(
            f"{file.source} ({found.format}) may be MAE's or timm's, which normalise pixels differently: give --model "
            f"{name} (ImageNet's statistics: MAE, DeiT) or timm's name, such as vit_base_patch16_224 (its own)."
        )
    return name


def _image_size(file: WeightsFile, tensors: Mapping[str, Tensor], needed: bool) -> PatchGrid | None:
    """Height and width that a vision transformer's position embedding is for, if they are equal.

    Where they are not, None, or CheckpointError if `needed`: timm's models have a size of their own, and some of them
    no class token or several.
    """
    patch, position = tensors.get("patch_embed.proj.weight"), tensors.get("pos_embed")
    if patch is None or position is None:
        return None
    patches = position.shape[1] - 1 - ("dist_token" in tensors)
    side = math.isqrt(patches)
    if side * side != patches:
        if not needed:
            return None
        raise CheckpointError(
            f"{file.source} was written for pictures that are not square ({patches} patches), and does not say for "
            "which: build the model with its img_size, and load with source_grid."
        )
    return side * patch.shape[-2], side * patch.shape[-1]


def _grid(plan: Blueprint, tensors: Mapping[str, Tensor]) -> PatchGrid | None:
    """Rows and columns of patches."""
    patch = tensors.get("patch_embed.proj.weight")
    if plan.img_size is None or patch is None or "pos_embed" not in tensors:
        return None
    return plan.img_size[0] // patch.shape[-2], plan.img_size[1] // patch.shape[-1]


def _head_of(name: str, file: WeightsFile, tensors: Mapping[str, Tensor]) -> str:
    """Key of the weights whose rows are the classes. Raises CheckpointError where there are none."""
    settings: Any = None if name in VIT_SIZES else timm.get_pretrained_cfg(name, allow_unregistered=True)
    head = getattr(settings, "classifier", None) or "head"
    key = f"{head if isinstance(head, str) else head[0]}.weight"
    if key not in tensors:
        raise CheckpointError(f"{file.source} has no classification head ({key}): fine-tune from it first.")
    return key


logger = logging.getLogger(__name__)


Size = tuple[int, int]


@dataclass(frozen=True)
class Subject:
    """A network in evaluation mode, what to call it, what its file says about itself, and the pictures it takes:
    height and width in pixels, and channels."""

    model: Classifier | MaskedAutoencoder
    name: str
    facts: dict[str, Any]
    size: Size
    in_chans: int
    decoder: bool

    def autoencoder(self) -> MaskedAutoencoder:
        """The network, if it can reconstruct. Raises CheckpointError otherwise."""
        if not isinstance(self.model, MaskedAutoencoder):
            raise CheckpointError(f"{self.name} is a classifier and reconstructs nothing: give a pretraining.")
        if not self.decoder:
            raise CheckpointError(
                f"{self.name} has no decoder, without which nothing is reconstructed: MAE's mae_pretrain_* files hold "
                "the encoder alone. Give one with decoder, such as mae_visualize_vit_large.pth or a pretraining of "
                "yours; the encoder's attention can be drawn."
            )
        return self.model


def load_subject(
    checkpoint: str, name: str | None, input_size: tuple[int, ...] | None, device: torch.device
) -> Subject:
    """The network of an output folder, of a weights file or of released weights.

    `name` is the architecture and `input_size` the pictures' where the file does not say, or others are wanted. Raises
    ConfigError, MissingInputError, CheckpointError, DownloadError.
    """
    if not checkpoint:
        raise ConfigError("--checkpoint is missing: give an output folder, a weights file or a released name.")
    weights, facts = read_export(Path(checkpoint))
    told = weights._replace(metadata={"mae_dat": json.dumps(facts)}) if facts else weights
    with naming("--checkpoint"):
        opened = open_source(told, name, image_size(input_size) if input_size else None)
    plan, model = opened.plan, opened.network
    height, width = plan.img_size or resolve_model_data_config(model.net)["input_size"][-2:]
    title = f"{Path(checkpoint).name} ({plan.name})"
    return Subject(model.to(device), title, facts, (height, width), plan.in_chans, plan.decoder)


def predicts_normalized(subject: Subject, asked: bool | None) -> bool:
    """Whether an autoencoder predicts normalized patches: as asked, else as its file says, else not, with a warning."""
    if asked is None and "norm_pix_loss" not in subject.facts:
        logger.warning(
            "%s does not say whether it was trained with --norm_pix_loss; taken as False. If its reconstructions are "
            "grey, give --norm_pix_loss True.",
            subject.name,
        )
    return bool(subject.facts.get("norm_pix_loss", False) if asked is None else asked)


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """Adds the flag that named a file, such as `--finetune`, to the error of its load."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def read_export(path: Path) -> tuple[WeightsFile, dict[str, Any]]:
    """Weights from a file, an output folder of ours or by the name of released ones, and the facts stored with them or
    in the registry (empty for another foreign file).

    A folder gives its `model.safetensors`, or the model in its newest checkpoint. Raises MissingInputError,
    CheckpointError, DownloadError.
    """
    entry = None if path.exists() else released_weights().get(str(path))
    path = local_path(path)
    if path.is_dir() and not (path / WEIGHTS_FILE).is_file():
        found = newest_checkpoint(path)
        if found is None:
            raise MissingInputError(f"{path} holds neither {WEIGHTS_FILE} nor a valid checkpoint-*.pth.")
        state = found.load()
        weights = extract_weights(state, str(found.path))
        return weights, dict(found.manifest.get("settings", {}))
    file = path / WEIGHTS_FILE if path.is_dir() else path
    check_card(file)
    weights = read_weights(file)
    try:
        return weights, json.loads(weights.metadata.get("mae_dat", "{}")) or (entry.facts if entry else {})
    except ValueError as error:
        raise CheckpointError(f"{file}: its description is damaged ({error}).") from error
