"""Weights of others and our own, into classifiers and masked autoencoders.

A checkpoint is read without running code from it, its format is recognised and told, and it is loaded only if every key
is accounted for: what may be missing or left over is what MAE's own fine-tuning allows (a new head; `norm` replaced by
a new `fc_norm` under average pooling). After an error the model is as it was.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_dat.config.errors import CheckpointError
from mae_dat.models.classifier import Classifier, PatchGrid, fused_head
from mae_dat.models.mae import VIT_SIZES, MaskedAutoencoder
from mae_dat.models.split_norms import main_norms
from mae_dat.models.weights.formats import Recognized, recognize
from mae_dat.storage.weight_files import WeightsFile, check_keys, extract_weights, listing, read_weights

logger = logging.getLogger(__name__)

Source = str | Path | WeightsFile | Mapping[str, Any]
DECODER_KEYS = ("decoder_", "mask_token")
WORD_HEAD = "decoder_words."
_DISTILLED = {192: "tiny", 384: "small", 768: "base"}  # timm's names by width


@dataclass(frozen=True)
class LoadReport:
    """What a load did: source, tensors loaded, keys that start afresh, keys left out, position grids if resized.

    `format` is what the file was recognised as, `wrappers` what was taken off.
    """

    source: str
    loaded: int
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    resized: tuple[PatchGrid, PatchGrid] | None = None
    format: str = ""
    wrappers: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors from {self.source}"]
        if self.format:
            parts[0] += f" ({', '.join((self.format, *self.wrappers))})"
        if self.resized:
            parts.append(
                "position embedding resized from {} x {} to {} x {}".format(*self.resized[0], *self.resized[1])
            )
        if self.missing:
            parts.append(f"new: {listing(self.missing)}")
        if self.ignored:
            parts.append(f"not used: {listing(list(dict.fromkeys(key.split('.')[0] for key in self.ignored)))}")
        return "; ".join(parts)


def resize_position_embedding(pos_embed: Tensor, old: PatchGrid, new: PatchGrid, prefix: int = 1) -> Tensor:
    """(1, prefix + h*w, D) from the grid `old` to the grid `new` = (h, w); the `prefix` class tokens stay the same."""
    tokens, patches = pos_embed[:, :prefix], pos_embed[:, prefix:]
    grid = patches.reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False)
    return torch.cat([tokens, grid.permute(0, 2, 3, 1).flatten(1, 2).to(tokens.dtype)], dim=1)


def load_pretrained(classifier: Classifier, source: Source, source_grid: PatchGrid | None = None) -> LoadReport:
    """Start fine-tuning from a file, a checkpoint or a state dict: MAE pretraining or a fine-tuned model, as MAE does.

    The decoder is dropped; head and `fc_norm` may be missing and `norm` left over; a head of another shape starts anew;
    the position embedding is resized where the grid differs (`source_grid` = (rows, columns) is needed only where the
    source's is not square). CheckpointError lists every other key that is missing, left over or of another shape, and
    tells of a file whose pixels were normalised otherwise.
    """
    return _load(classifier, source, source_grid, head=False)


def load_weights(
    classifier: Classifier, source: Source, source_grid: PatchGrid | None = None, head: bool = True
) -> LoadReport:
    """Load a fine-tuned model, for evaluation: every key must match, the head's number of classes too.

    With `head` False the same as `load_pretrained`. CheckpointError names both numbers of classes, or the keys.
    """
    return _load(classifier, source, source_grid, head)


def load_mae(
    model: MaskedAutoencoder, source: Source, decoder: bool = True, source_grid: PatchGrid | None = None
) -> LoadReport:
    """Load a pretraining into a masked autoencoder; with `decoder` False the encoder alone, whatever the file holds.

    Position embeddings are resized where the grid differs. CheckpointError for a file without decoder or of another
    kind, and with the keys that differ.
    """
    file, found = read_source(source)
    if found.kind == "classifier":
        raise CheckpointError(f"{file.source} is a classifier ({found.format}), no pretraining: give MAE's weights.")
    state, own = dict(found.tensors), model.state_dict()
    ignored: list[str] = []
    if not decoder:
        ignored = [key for key in state if key.startswith(DECODER_KEYS)]
        own = {key: value for key, value in own.items() if not key.startswith(DECODER_KEYS)}
    elif found.kind == "encoder":
        raise CheckpointError(
            f"{file.source} has no decoder: MAE's mae_pretrain_* files hold the encoder alone. Give one with decoder, "
            "such as mae_visualize_vit_large.pth, or load the encoder only (decoder=False)."
        )
    state = {key: value for key, value in state.items() if key not in ignored}
    resized = None
    for key in ("pos_embed", "decoder_pos_embed"):
        resized = _resize(state, key, own.get(key), model.grid, 1, source_grid, file.source) or resized
    check_keys(_label(file, found), own, state, _advice(state, "the same --model"))
    model.load_state_dict(state, strict=False)
    return _told(LoadReport(file.source, len(state), (), tuple(ignored), resized, found.format, file.wrappers))


def size_of(tensors: Mapping[str, Tensor]) -> str | None:
    """The one of `VIT_SIZES` that a vision transformer's tensors are, by patch side, width and blocks."""
    patch = tensors.get("patch_embed.proj.weight")
    if patch is None or patch.ndim != 4:
        return None
    depth = len({key.split(".")[1] for key in tensors if key.startswith("blocks.")})
    shape = (patch.shape[-1], patch.shape[0], depth)
    return next((name for name, s in VIT_SIZES.items() if (s.patch_size, s.embed_dim, s.depth) == shape), None)


def read_source(source: Source) -> tuple[WeightsFile, Recognized]:
    """The file behind a source, and what it holds: without AdvProp's auxiliary norms, a linear probe's BatchNorm fused
    into its head.

    Raises MissingInputError, CheckpointError, also for a tokenizer.
    """
    if isinstance(source, WeightsFile):
        file = source
    else:
        file = extract_weights(source, "the given weights") if isinstance(source, Mapping) else read_weights(source)
    # The word head belongs to a pretraining and its tokenizer, and to nothing that is loaded from it.
    kept = {name: one for name, one in file.tensors.items() if not name.startswith(WORD_HEAD)}
    file = file._replace(tensors=fused_head(main_norms(kept)))
    found = recognize(file)
    if found.kind == "tokenizer":
        raise CheckpointError(f"{file.source} is a tokenizer ({found.format}): give it as --tokenizer.")
    return file, found


def _label(file: WeightsFile, found: Recognized) -> str:
    return f"{file.source} ({found.format})"


def _advice(state: Mapping[str, Tensor], what: str) -> str:
    size = size_of(state)
    shown = f" (its shapes are those of {size})" if size else ""
    return f"choose {what} that the file was written for{shown}"


def _told(report: LoadReport) -> LoadReport:
    logger.info("%s", report)
    return report


def _load(classifier: Classifier, source: Source, source_grid: PatchGrid | None, head: bool) -> LoadReport:
    file, found = read_source(source)
    net, state, label = classifier.net, dict(found.tensors), file.source
    own = net.state_dict()
    _check_statistics(classifier, file)
    _check_distillation(state, own, label)
    ignored = [key for key in state if key not in own and key.startswith(DECODER_KEYS)]
    resized = _fit_position_embedding(state, net, source_grid, label)
    own_head = [key for key in own if key.startswith(_head_prefixes(net))]
    if head:
        _check_head(state, own, own_head, label)
    elif any(key in state and state[key].shape != own[key].shape for key in own_head):
        ignored += [key for key in own_head if key in state]
    state = {key: value for key, value in state.items() if key not in set(ignored)}
    new, left = ([], []) if head else _expected_differences(state, own, own_head)
    state = {key: value for key, value in state.items() if key not in left}
    advice = _advice(state, "the model (and the pooling, --global_pool or --cls_token)")
    check_keys(_label(file, found), {key: value for key, value in own.items() if key not in new}, state, advice)
    net.load_state_dict(state, strict=False)
    ignored += left
    return _told(LoadReport(label, len(state), tuple(new), tuple(ignored), resized, found.format, file.wrappers))


def _check_statistics(classifier: Classifier, file: WeightsFile) -> None:
    """Weights are of use only to pixels normalised as in their training: a difference is no detail."""
    if file.statistics is None:
        return
    own = (classifier.mean.flatten().tolist(), classifier.std.flatten().tolist())
    if not all(_close(one, other) for one, other in zip(own, file.statistics, strict=True)):
        mean, std = (tuple(round(value, 4) for value in values) for values in file.statistics)
        raise CheckpointError(
            f"{file.source} was trained on pixels normalised by mean {mean} and std {std}, this model normalises "
            f"otherwise: choose the --model with these statistics (timm's names have their own, such as "
            f"vit_base_patch16_224 0.5), or build_classifier(..., mean={mean}, std={std})."
        )


def _close(one: Sequence[float], other: Sequence[float]) -> bool:
    return len(one) == len(other) and all(abs(a - b) < 1e-3 for a, b in zip(one, other, strict=True))


def _check_distillation(state: Mapping[str, Tensor], own: Mapping[str, Tensor], label: str) -> None:
    if "dist_token" in state and "dist_token" not in own:
        size = _DISTILLED.get(state["dist_token"].shape[-1], "SIZE")
        raise CheckpointError(
            f"{label} is a distilled DeiT: its dist_token and second head fit timm's distilled models only; "
            f"use --model deit_{size}_distilled_patch16_224."
        )


def _head_prefixes(net: nn.Module) -> tuple[str, ...]:
    names = getattr(net, "pretrained_cfg", None) or {}
    names = names.get("classifier") or "head"
    return tuple(f"{name}." for name in ((names,) if isinstance(names, str) else names))


def _check_head(state: Mapping[str, Tensor], own: Mapping[str, Tensor], own_head: list[str], label: str) -> None:
    weight = next((key for key in own_head if key.endswith("weight")), None)
    if weight is None:
        return
    if weight not in state:
        raise CheckpointError(f"{label} has no classification head ({weight}): fine-tune from it before evaluating it")
    theirs, ours = state[weight].shape[0], own[weight].shape[0]
    if theirs != ours:
        raise CheckpointError(
            f"{label} classifies {theirs} classes, the data or the setting has {ours}: use {theirs} classes, "
            "or fine-tune from the checkpoint to get a new head"
        )


def _expected_differences(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], own_head: list[str]
) -> tuple[list[str], list[str]]:
    """Keys that may start afresh (a whole head, a whole `fc_norm`) and keys that may be left over (its `norm`)."""
    own_norm = [key for key in own if key.startswith("fc_norm.")]
    new = [key for part in (own_norm, own_head) if not any(key in state for key in part) for key in part]
    replaced = bool(own_norm) and own_norm[0] in new
    return new, [key for key in state if replaced and key.startswith("norm.") and key not in own]


def _fit_position_embedding(
    state: dict[str, Tensor], net: nn.Module, source_grid: PatchGrid | None, label: str
) -> tuple[PatchGrid, PatchGrid] | None:
    """`_resize` for a vision transformer; nothing to do for other networks."""
    ours = getattr(net, "pos_embed", None)
    if not isinstance(net, VisionTransformer) or ours is None:
        return None
    prefix = 0 if net.no_embed_class else net.num_prefix_tokens
    return _resize(state, "pos_embed", ours, tuple(net.patch_embed.grid_size), prefix, source_grid, label)


def _resize(
    state: dict[str, Tensor],
    key: str,
    ours: Tensor | None,
    new: PatchGrid,
    prefix: int,
    source_grid: PatchGrid | None,
    label: str,
) -> tuple[PatchGrid, PatchGrid] | None:
    """Resizes state[key] to the grid `new` where its own differs, and returns both; None where nothing was to do."""
    theirs = state.get(key)
    if theirs is None or ours is None or theirs.ndim != 3 or theirs.shape[-1] != ours.shape[-1]:
        return None
    if source_grid is None and theirs.shape == ours.shape:
        return None
    patches = theirs.shape[1] - prefix
    side = math.isqrt(max(patches, 0))
    old = source_grid or (side, side)
    if old[0] * old[1] != patches:
        raise CheckpointError(
            f"{label} has a position embedding for {patches} patches, not {old[0]} x {old[1]}: "
            "give its rows and columns of patches as source_grid"
        )
    if old == new:
        return None
    state[key] = resize_position_embedding(theirs, old, new, prefix)
    return old, new
