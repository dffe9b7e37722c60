"""Open a model by the name of released weights, a weights file or an output folder: `open_model(source).model`.

The steps are the same for every model: read and recognize the source (`read_model_file`), derive how to build the model
from the recorded facts and the shapes (`plan_model`), build it, and load the tensors (`weights.load`).
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import timm
import torch
from timm.data import resolve_model_data_config

from mae_dat.config.errors import CheckpointError, ConfigError, unknown_name
from mae_dat.config.groups import ImageSize, image_size
from mae_dat.models.classifier import Classifier, PatchGrid, build_classifier
from mae_dat.models.describe import describe_statistics
from mae_dat.models.mae import MAE_MODELS, VIT_SIZES, MaskedAutoencoder, build_mae
from mae_dat.models.weights.formats import ModelFile
from mae_dat.models.weights.load import load_autoencoder, load_classifier, load_detector, size_by_shapes
from mae_dat.models.weights.read import ModelSource, errors_name_flag, read_model_file

if TYPE_CHECKING:
    from mae_dat.models.detector import Detector

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelPlan:
    """All settings needed to build a model; `build` builds it with fresh weights."""

    kind: Literal["autoencoder", "classifier", "detector"]
    name: str
    """The model's name, as `build_mae`, `build_classifier` or `build_detector` takes it."""
    num_classes: int = 0
    """0 for an autoencoder."""
    img_size: ImageSize | None = None
    """None if the model takes any size."""
    in_chans: int = 3
    global_pool: bool = True
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    """Statistics that normalize pixels in [0, 1]; None for the model's default."""
    has_decoder: bool = False
    """Whether the file holds an autoencoder's decoder; otherwise it is left as initialized."""
    detector_settings: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments of `build_detector`."""

    def build(self) -> "Classifier | MaskedAutoencoder | Detector":
        """Build the model with fresh weights. Raises ConfigError for an unknown name."""
        if self.kind == "detector":
            from mae_dat.models.detector import build_detector  # slow to import, and rarely needed

            assert self.img_size is not None
            return build_detector(self.name, self.num_classes, self.img_size, **self.detector_settings)
        if self.kind == "autoencoder":
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


@dataclass(frozen=True)
class OpenedModel:
    """A model in evaluation mode, and what is known about it."""

    model: Any
    """A `Classifier`, `MaskedAutoencoder` or `Detector`; the methods below return it typed."""
    plan: ModelPlan
    file: ModelFile
    title: str
    """Its source and architecture, for titles and messages."""

    @property
    def kind(self) -> Literal["autoencoder", "classifier", "detector"]:
        """The kind of model."""
        return self.plan.kind

    @property
    def facts(self) -> Mapping[str, Any]:
        """Facts recorded in the file or in the registry of released weights."""
        return self.file.facts

    @property
    def classes(self) -> list[str] | None:
        """The names of the outputs, in their order, if the file records them."""
        return self.facts.get("classes")

    @property
    def input_size(self) -> ImageSize:
        """Height and width in pixels that the model was built for, or else timm's usual ones."""
        return self.plan.img_size or classifier_size(self.model)

    @property
    def crop_pct(self) -> float | None:
        """The crop's side over the resized image's that belongs to the weights; None for MAE's default."""
        if self.facts or self.plan.name in VIT_SIZES or self.kind != "classifier":
            return self.facts.get("crop_pct")
        return resolve_model_data_config(self.model.net)["crop_pct"]

    @property
    def interpolation(self) -> str:
        """The interpolation that belongs to the weights: timm's for its files, bicubic for those trained here."""
        recorded = self.facts.get("interpolation")
        if recorded or self.facts or self.kind != "classifier":
            return recorded if recorded and recorded != "random" else "bicubic"
        return resolve_model_data_config(self.model.net)["interpolation"]

    def to(self, device: torch.device) -> Self:
        """Move the model to a device."""
        return replace(self, model=self.model.to(device))

    def classifier(self) -> Classifier:
        """Return the model if it is a classifier. Raises CheckpointError otherwise."""
        if self.kind == "autoencoder":
            raise CheckpointError(f"{self.title} is a pretraining, which has no classes yet: fine-tune it first.")
        if self.kind == "detector":
            raise CheckpointError(f"{self.title} is an object detector: use a classifier.")
        return self.model

    def autoencoder(self) -> MaskedAutoencoder:
        """Return the model if it can reconstruct images. Raises CheckpointError otherwise."""
        if self.kind != "autoencoder":
            raise CheckpointError(
                f"{self.title} is a {self.kind}, which cannot reconstruct images: use a pretrained masked autoencoder."
            )
        if not self.plan.has_decoder:
            raise CheckpointError(
                f"{self.title} has no decoder, so it cannot reconstruct images: MAE's mae_pretrain_* files contain "
                "only the encoder. Use a file with decoder, such as mae_visualize_vit_large.pth or your own "
                "pretraining; or draw the encoder's attention."
            )
        return self.model

    def encoder(self) -> Classifier | MaskedAutoencoder:
        """Return the model if it computes features of whole images. Raises CheckpointError for a detector."""
        if self.kind == "detector":
            raise CheckpointError(f"{self.title} is an object detector: use a classifier or masked autoencoder.")
        return self.model


def classifier_size(model: Classifier) -> ImageSize:
    """Return the height and width in pixels of a classifier's images, from its patches or timm's settings."""
    img_size = getattr(getattr(model.net, "patch_embed", None), "img_size", None)
    height, width = img_size or resolve_model_data_config(model.net)["input_size"][-2:]
    return height, width


def open_model(
    source: ModelSource, name: str | None = None, img_size: ImageSize | None = None, *, flag: str | None = None
) -> OpenedModel:
    """Open a model on the CPU, in evaluation mode, from the name of released weights, a file, a folder or tensors.

    `name` is the architecture, required if neither the file nor its shapes show it; `img_size` (height, width) replaces
    the image size of the file. `flag` is the command-line flag that gave the source, for messages. If the file of an
    autoencoder has no decoder, the decoder is left as initialized.

    Raises MissingInputError, ConfigError, CheckpointError, DownloadError.
    """
    if source == "":
        missing = f"{flag or 'the model'} is missing"
        raise ConfigError(f"{missing}: give an output folder, a weights file or a released name.")
    with errors_name_flag(flag):
        file = read_model_file(source)
        plan = plan_model(file, name)
        source_grid = _patch_grid(plan, file)
        plan = replace(plan, img_size=img_size or plan.img_size)
        model = plan.build()
        if isinstance(model, MaskedAutoencoder):
            load_autoencoder(model, file, plan.has_decoder, source_grid)
        elif isinstance(model, Classifier):
            load_classifier(model, file, source_grid)
        else:
            load_detector(model, file)
    title = Path(source).name if isinstance(source, str | Path) else Path(file.source).name
    return OpenedModel(model.eval(), plan, file, f"{title} ({plan.name})")


# ---- from a file to the plan of its model ----


def plan_model(file: ModelFile, name: str | None = None) -> ModelPlan:
    """Derive what to build from the facts that a file records, from its shapes, and from the architecture `name`.

    Raises CheckpointError if that is not enough, ConfigError for an unknown name.
    """
    if file.kind == "detector":
        return _plan_detector(file)
    if name and not file.facts:
        _compare_with_file_name(name, file)
    name = name or file.facts.get("model") or _name_by_shapes(file)
    is_vit = name in MAE_MODELS or name in VIT_SIZES
    if not is_vit and not timm.is_model(name):
        raise unknown_name("model", name, [*MAE_MODELS, *VIT_SIZES, *timm.list_models()])
    is_pretraining = file.kind in ("autoencoder", "encoder")
    if is_pretraining and f"mae_{name}" in MAE_MODELS:
        name = f"mae_{name}"
    if is_pretraining != (name in MAE_MODELS):
        content = "a pretraining without classes" if is_pretraining else "a classifier"
        raise CheckpointError(f"{file.source} is {content} ({file.format}), but {name} is not: use another --model.")
    patch = file.tensors.get("patch_embed.proj.weight")
    mean, std = file.statistics or (None, None)
    return ModelPlan(
        kind="autoencoder" if is_pretraining else "classifier",
        name=name,
        num_classes=0 if is_pretraining else len(file.tensors[_head_weight(name, file)]),
        img_size=_recorded_size(file) or _size_by_shapes(file, required=is_vit),
        in_chans=file.facts.get("in_chans", 3 if patch is None else patch.shape[1]),
        global_pool="fc_norm.weight" in file.tensors,
        mean=mean,
        std=std,
        has_decoder=file.kind == "autoencoder",
    )


def _plan_detector(file: ModelFile) -> ModelPlan:
    facts = file.facts
    return ModelPlan(
        kind="detector",
        name=facts["model"],
        num_classes=len(facts["classes"]),
        img_size=_recorded_size(file),
        detector_settings={key: facts[key] for key in ("width", "anchor_size", "regions")},
    )


def _name_by_shapes(file: ModelFile) -> str:
    name = size_by_shapes(file.tensors)
    if name is None:
        timm_name = _timm_name_of(file.source)
        example = f"such as {timm_name}, as the file is named" if timm_name else "such as that of a timm model"
        raise CheckpointError(
            f"{file.label} does not record its architecture, and its shapes match none of "
            f"{', '.join(VIT_SIZES)}: give the name with --model, {example}."
        )
    if file.kind == "classifier" and "fc_norm.weight" not in file.tensors and file.statistics is None:
        # MAE's and timm's files have the same keys and shapes, and do not record how pixels are normalized.
        raise CheckpointError(
            f"{file.label} may be from MAE or timm, which normalize pixels differently: give --model {name} for "
            "ImageNet's statistics (MAE, DeiT), or a timm name such as vit_base_patch16_224 for timm's."
        )
    return name


def _compare_with_file_name(name: str, file: ModelFile) -> None:
    """Warn if a file is named after another model of timm than `name`, which normalizes pixels differently."""
    named = _timm_name_of(file.source)
    settings: Any = named and timm.get_pretrained_cfg(named)
    own: Any = None if name in VIT_SIZES else timm.get_pretrained_cfg(name, allow_unregistered=True)
    if settings and own and named != own.architecture and (settings.mean, settings.std) != (own.mean, own.std):
        logger.warning(
            "%s is named after timm's %s, which normalizes by %s; %s normalizes by %s: check --model",
            file.source,
            named,
            describe_statistics(settings.mean, settings.std),
            name,
            describe_statistics(own.mean, own.std),
        )


def _timm_name_of(source: str) -> str | None:
    """Return the name of the timm model that a file is named after, such as resnet50 of resnet50.a1_in1k.pth."""
    name = re.sub(r"-[0-9a-f]{8}$", "", Path(source).stem).partition(".")[0]
    return name if timm.is_model(name) else None


def _recorded_size(file: ModelFile) -> ImageSize | None:
    return image_size(tuple(file.facts["input_size"])) if "input_size" in file.facts else None


def _size_by_shapes(file: ModelFile, required: bool) -> ImageSize | None:
    """Return the image size of a vision transformer's position embedding, whose patch grid has to be square.

    If it is not, return None, or raise CheckpointError if the size is `required`: timm's models have a size of their
    own, and some of them no class token or several.
    """
    patch, position = file.tensors.get("patch_embed.proj.weight"), file.tensors.get("pos_embed")
    if patch is None or position is None:
        return None
    patches = position.shape[1] - 1 - ("dist_token" in file.tensors)
    side = math.isqrt(patches)
    if side * side != patches:
        if not required:
            return None
        raise CheckpointError(
            f"{file.source} was written for images that are not square ({patches} patches), and does not record their "
            "size: build the model with its img_size, and load the weights with source_grid."
        )
    return side * patch.shape[-2], side * patch.shape[-1]


def _patch_grid(plan: ModelPlan, file: ModelFile) -> PatchGrid | None:
    """Return the rows and columns of patches of the file's position embedding."""
    patch = file.tensors.get("patch_embed.proj.weight")
    if plan.img_size is None or patch is None or "pos_embed" not in file.tensors:
        return None
    return plan.img_size[0] // patch.shape[-2], plan.img_size[1] // patch.shape[-1]


def _head_weight(name: str, file: ModelFile) -> str:
    """Return the key of the head's weights (classes, D). Raises CheckpointError if there are none."""
    pretrained_cfg: Any = None if name in VIT_SIZES else timm.get_pretrained_cfg(name, allow_unregistered=True)
    head = getattr(pretrained_cfg, "classifier", None) or "head"
    key = f"{head if isinstance(head, str) else head[0]}.weight"
    if key not in file.tensors:
        raise CheckpointError(f"{file.source} has no classification head ({key}): fine-tune it first.")
    return key
