"""Load weights, our own or from other projects, into classifiers, masked autoencoders and detectors.

Every key has to match. The only exceptions are those of MAE's own fine-tuning: a new head, and a new `fc_norm` in place
of `norm` under mean pooling. After an error the model is unchanged.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_dat.config.errors import CheckpointError, listing
from mae_dat.config.groups import image_size
from mae_dat.models.classifier import HEAD_STD, Classifier, PatchGrid, initialize_head
from mae_dat.models.mae import VIT_SIZES, MaskedAutoencoder
from mae_dat.models.weights.formats import ModelFile
from mae_dat.models.weights.read import ModelSource, read_model_file
from mae_dat.storage.weight_files import check_keys

if TYPE_CHECKING:
    from mae_dat.models.detector import Detector

logger = logging.getLogger(__name__)

DECODER_KEYS = ("decoder_", "mask_token")
_DISTILLED_SIZES = {192: "tiny", 384: "small", 768: "base"}  # timm's names by width


@dataclass(frozen=True)
class LoadReport:
    """What was loaded: number of tensors, newly initialized keys, ignored keys, a resized patch grid."""

    source: str
    loaded: int
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    resized: tuple[PatchGrid, PatchGrid] | None = None
    """Rows and columns of the position embedding's patches in the file and in the model."""
    format: str = ""
    """The recognized format of the file."""
    wrappers: tuple[str, ...] = ()
    """Wrappers that were removed, such as `module.`."""
    has_head: bool = False
    """Whether a classifier's whole head was loaded."""

    def __str__(self) -> str:
        parts = [f"loaded {self.loaded} tensors from {self.source}"]
        if self.format:
            parts[0] += f" ({', '.join((self.format, *self.wrappers))})"
        if self.resized:
            old, new = self.resized
            parts.append(f"position embedding resized from {old[0]} x {old[1]} to {new[0]} x {new[1]}")
        if self.missing:
            parts.append(f"new: {listing(self.missing)}")
        if self.ignored:
            parts.append(f"not used: {listing(list(dict.fromkeys(key.split('.')[0] for key in self.ignored)))}")
        return "; ".join(parts)


def load_pretrained(classifier: Classifier, source: ModelSource, source_grid: PatchGrid | None = None) -> LoadReport:
    """Load the initial weights of a fine-tuning: an MAE pretraining or a fine-tuned model, as MAE does.

    A decoder is ignored; head and `fc_norm` may be missing, and `norm` may be unexpected; a head of another shape is
    initialized anew. The position embedding is resized if the patch grid differs; `source_grid` (rows, columns) is
    needed only if the file's grid is not square and the file does not record it.

    Raises MissingInputError; CheckpointError with every other key that is missing, unexpected or of another shape, or
    if the file's model normalizes pixels differently.
    """
    return _load_classifier(classifier, read_model_file(source), source_grid, exact=False)


def load_classifier(classifier: Classifier, source: ModelSource, source_grid: PatchGrid | None = None) -> LoadReport:
    """Load a fine-tuned model for evaluation: every key and the number of classes have to match.

    `source_grid` as in `load_pretrained`. Raises MissingInputError; CheckpointError with both numbers of classes, or
    with the keys that differ.
    """
    return _load_classifier(classifier, read_model_file(source), source_grid, exact=True)


def load_autoencoder(
    model: MaskedAutoencoder, source: ModelSource, decoder: bool = True, source_grid: PatchGrid | None = None
) -> LoadReport:
    """Load a pretraining into a masked autoencoder; with `decoder` False only the encoder, even if there is a decoder.

    Position embeddings are resized if the patch grid differs (`source_grid` as in `load_pretrained`). Raises
    MissingInputError; CheckpointError for a file without decoder or of another kind, or with the keys that differ.
    """
    weights = read_model_file(source)
    if weights.kind == "classifier":
        raise CheckpointError(
            f"{weights.source} is a classifier ({weights.format}), not a masked autoencoder: use MAE's weights."
        )
    if decoder and weights.kind == "encoder":
        raise CheckpointError(
            f"{weights.source} has no decoder: MAE's mae_pretrain_* files contain only the encoder. Use a file with "
            "decoder, such as mae_visualize_vit_large.pth, or load only the encoder (decoder=False)."
        )
    excluded = () if decoder else DECODER_KEYS
    expected = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(excluded)}
    state = {key: tensor for key, tensor in weights.tensors.items() if not key.startswith(excluded)}
    resized = None
    for key in ("pos_embed", "decoder_pos_embed"):
        old = _source_grid(state.get(key), expected.get(key), prefix=1, source_grid=source_grid, weights=weights)
        if old is not None and old != model.grid:
            state[key] = resize_position_embedding(state[key], old, model.grid)
            resized = (old, model.grid)
    check_keys(weights.label, expected, state, _advice(state, "the same --model"))
    model.load_state_dict(state, strict=False)
    ignored = tuple(key for key in weights.tensors if key.startswith(excluded))
    return _logged(
        LoadReport(
            source=weights.source,
            loaded=len(state),
            ignored=ignored,
            resized=resized,
            format=weights.format,
            wrappers=weights.wrappers,
        )
    )


def load_detector(detector: "Detector", source: ModelSource) -> LoadReport:
    """Load a `Detector` exported by this package. Raises MissingInputError, CheckpointError with the differing keys."""
    weights = read_model_file(source)
    check_keys(
        weights.source,
        detector.net.state_dict(),
        weights.tensors,
        "use weights exported by mae-dat detect with the same --model",
    )
    detector.net.load_state_dict(weights.tensors)
    return LoadReport(weights.source, len(weights.tensors), format=weights.format, wrappers=weights.wrappers)


# ---- classifiers ----


def _load_classifier(
    classifier: Classifier, weights: ModelFile, source_grid: PatchGrid | None, exact: bool
) -> LoadReport:
    """Load weights; if not `exact`, head and `fc_norm` may be initialized anew."""
    net, state = classifier.net, dict(weights.tensors)
    expected = net.state_dict()
    _check_statistics(classifier, weights)
    _check_distillation(state, expected, weights.source)
    ignored = [key for key in state if key not in expected and key.startswith(DECODER_KEYS)]
    resized = _fit_position_embedding(state, net, source_grid, weights)
    head = [key for key in expected if key.startswith(_head_prefixes(net))]
    if exact:
        _check_head(state, expected, head, weights.source)
    elif any(key in state and state[key].shape != expected[key].shape for key in head):
        ignored += [key for key in head if key in state]
    state = {key: tensor for key, tensor in state.items() if key not in set(ignored)}
    fresh_keys, unused_keys = ([], []) if exact else _allowed_differences(state, expected, head)
    state = {key: tensor for key, tensor in state.items() if key not in unused_keys}
    required = {key: tensor for key, tensor in expected.items() if key not in fresh_keys}
    advice = _advice(state, "the model (and the pooling, --global_pool or --cls_token)")
    check_keys(weights.label, required, state, advice)
    net.load_state_dict(state, strict=False)
    if any(key not in state for key in head) and hasattr(net, "pretrained_cfg"):  # MAE's start there already
        initialize_head(net, HEAD_STD)
    return _logged(
        LoadReport(
            source=weights.source,
            loaded=len(state),
            missing=tuple(fresh_keys),
            ignored=(*ignored, *unused_keys),
            resized=resized,
            format=weights.format,
            wrappers=weights.wrappers,
            has_head=all(key in state for key in head),
        )
    )


def _check_statistics(classifier: Classifier, weights: ModelFile) -> None:
    """Raise CheckpointError if the weights were trained on pixels that were normalized differently."""
    if weights.statistics is None:
        return
    statistics = (classifier.mean.flatten().tolist(), classifier.std.flatten().tolist())
    if not all(_close(values, others) for values, others in zip(statistics, weights.statistics, strict=True)):
        mean, std = (tuple(round(value, 4) for value in values) for values in weights.statistics)
        raise CheckpointError(
            f"{weights.source} was trained on pixels normalized by mean {mean} and std {std}, but this model "
            f"normalizes differently: choose a --model with these statistics (timm's have their own, such as 0.5 for "
            f"vit_base_patch16_224), or build_classifier(..., mean={mean}, std={std})."
        )


def _close(values: Sequence[float], others: Sequence[float]) -> bool:
    return len(values) == len(others) and all(abs(a - b) < 1e-3 for a, b in zip(values, others, strict=True))


def _check_distillation(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str) -> None:
    if "dist_token" in state and "dist_token" not in expected:
        size = _DISTILLED_SIZES.get(state["dist_token"].shape[-1], "SIZE")
        raise CheckpointError(
            f"{source} is a distilled DeiT: its dist_token and second head fit only timm's distilled models: use "
            f"--model deit_{size}_distilled_patch16_224."
        )


def _head_prefixes(net: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the head's keys; timm's distilled models have two heads."""
    pretrained_cfg: Mapping[str, Any] = getattr(net, "pretrained_cfg", None) or {}
    names = pretrained_cfg.get("classifier") or "head"
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _check_head(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], head: Sequence[str], source: str) -> None:
    weight = next((key for key in head if key.endswith("weight")), None)
    if weight is None:
        return
    if weight not in state:
        raise CheckpointError(f"{source} has no classification head ({weight}): fine-tune it before evaluating it.")
    check_class_count(source, len(state[weight]), len(expected[weight]))


def check_class_count(source: str, classes: int, expected: int) -> None:
    """Raise CheckpointError unless the head of `source` has as many classes as the data or the setting."""
    if classes != expected:
        raise CheckpointError(
            f"{source} has {classes} classes, but the setting has {expected}: leave out --nb_classes to evaluate it "
            "with its own head, or fine-tune from the checkpoint to get a new one."
        )


def _allowed_differences(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], head: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return keys that may be missing (a whole head, a whole `fc_norm`) and keys that may be unexpected (`norm`)."""
    fc_norm = [key for key in expected if key.startswith("fc_norm.")]
    fresh_keys = [key for part in (fc_norm, head) if not any(key in state for key in part) for key in part]
    # Under mean pooling MAE normalizes after pooling, by `fc_norm`, and does not use the encoder's last `norm`.
    norm_replaced = bool(fc_norm) and fc_norm[0] in fresh_keys
    return fresh_keys, [key for key in state if norm_replaced and key.startswith("norm.") and key not in expected]


# ---- position embeddings ----


def resize_position_embedding(pos_embed: Tensor, old: PatchGrid, new: PatchGrid, prefix: int = 1) -> Tensor:
    """Resize a position embedding (1, prefix + h * w, D) bicubically from the grid `old` to `new`, as MAE does.

    The first `prefix` tokens (class token, registers) stay the same. timm's `resample_abs_pos_embed` is not used: older
    versions skip the resize if the number of patches stays the same, for example from 4 x 16 to 8 x 8.
    """
    tokens, patches = pos_embed[:, :prefix], pos_embed[:, prefix:]
    grid = patches.reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False)
    return torch.cat([tokens, grid.permute(0, 2, 3, 1).flatten(1, 2).to(tokens.dtype)], dim=1)


def _fit_position_embedding(
    state: dict[str, Tensor], net: nn.Module, source_grid: PatchGrid | None, weights: ModelFile
) -> tuple[PatchGrid, PatchGrid] | None:
    """Resize state["pos_embed"] to a vision transformer's grid if it differs, and return both grids."""
    if not isinstance(net, VisionTransformer) or net.pos_embed is None:
        return None
    prefix = 0 if net.no_embed_class else net.num_prefix_tokens
    position = state.get("pos_embed")
    old = _source_grid(position, net.pos_embed, prefix=prefix, source_grid=source_grid, weights=weights)
    rows, columns = net.patch_embed.grid_size
    if old is None or old == (rows, columns):
        return None
    state["pos_embed"] = resize_position_embedding(state["pos_embed"], old, (rows, columns), prefix)
    return old, (rows, columns)


def _source_grid(
    position: Tensor | None,
    expected: Tensor | None,
    *,
    prefix: int,
    source_grid: PatchGrid | None,
    weights: ModelFile,
) -> PatchGrid | None:
    """Return the rows and columns of a position embedding's patches: `source_grid`, else those recorded, else a square.

    None if there is nothing to resize. Raises CheckpointError if the number of patches does not fit.
    """
    if position is None or expected is None or position.ndim != 3 or position.shape[-1] != expected.shape[-1]:
        return None
    patches = position.shape[1] - prefix
    # The number of patches alone does not distinguish 4 x 16 from 8 x 8.
    grid = source_grid or recorded_grid(weights, patches)
    if grid is None and position.shape == expected.shape:
        return None
    side = math.isqrt(max(patches, 0))
    rows, columns = grid or (side, side)
    if rows * columns != patches:
        raise CheckpointError(
            f"{weights.source} has a position embedding for {patches} patches, not {rows} x {columns}: "
            "give its rows and columns of patches as source_grid."
        )
    return rows, columns


def recorded_grid(weights: ModelFile, patches: int) -> PatchGrid | None:
    """Return the rows and columns of patches by the recorded image size, or None if their number is not `patches`.

    They can differ: the registry of released weights records a size too, and a file of that name may be another one.
    """
    projection = weights.tensors.get("patch_embed.proj.weight")
    if projection is None or projection.ndim != 4 or "input_size" not in weights.facts:
        return None
    height, width = image_size(tuple(weights.facts["input_size"]))
    rows, columns = height // projection.shape[-2], width // projection.shape[-1]
    return (rows, columns) if rows * columns == patches else None


# ---- sizes and messages ----


def size_by_shapes(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name in `VIT_SIZES` with the patch side, width and number of blocks of these tensors."""
    patch = tensors.get("patch_embed.proj.weight")
    if patch is None or patch.ndim != 4:
        return None
    depth = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
    shape = (patch.shape[-1], patch.shape[0], depth)
    return next((name for name, s in VIT_SIZES.items() if (s.patch_size, s.embed_dim, s.depth) == shape), None)


def _advice(state: Mapping[str, Tensor], what: str) -> str:
    size = size_by_shapes(state)
    hint = f" (its shapes are those of {size})" if size else ""
    return f"choose {what} that the file was written for{hint}"


def _logged(report: LoadReport) -> LoadReport:
    logger.info("%s", report)
    return report
