"""Weights of others and our own, into a classifier.

A checkpoint is read without running code from it, and loaded only if every key is accounted for: what may be missing or
left over is what MAE's own fine-tuning allows (a new head; `norm` replaced by a new `fc_norm` under average pooling).
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mae_dat.classifier import Classifier, Grid
from mae_dat.errors import CheckpointError
from mae_dat.weights import bare_tensors, check_keys, listing, read_weights

logger = logging.getLogger(__name__)

_PRETRAINING_KEYS = ("decoder_", "mask_token")


@dataclass(frozen=True)
class LoadReport:
    """What a load did: its source, tensors loaded, keys that start afresh, keys left out, position grids if resized."""

    source: str
    loaded: int
    missing: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    resized: tuple[Grid, Grid] | None = None

    def __str__(self) -> str:
        parts = [f"{self.loaded} tensors from {self.source}"]
        if self.resized:
            parts.append(
                "position embedding resized from {} x {} to {} x {}".format(*self.resized[0], *self.resized[1])
            )
        if self.missing:
            parts.append(f"new: {listing(self.missing)}")
        if self.ignored:
            parts.append(f"not used: {listing(self.ignored)}")
        return "; ".join(parts)


def resize_position_embedding(pos_embed: Tensor, old: Grid, new: Grid, prefix: int = 1) -> Tensor:
    """(1, prefix + h*w, D) from the grid `old` to the grid `new` = (h, w); the `prefix` class tokens stay the same."""
    tokens, patches = pos_embed[:, :prefix], pos_embed[:, prefix:]
    grid = patches.reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False)
    return torch.cat([tokens, grid.permute(0, 2, 3, 1).flatten(1, 2).to(tokens.dtype)], dim=1)


def load_pretrained(
    classifier: Classifier, source: str | Path | Mapping[str, Any], source_grid: Grid | None = None
) -> LoadReport:
    """Start fine-tuning from a file, a checkpoint or a state dict: MAE pretraining or a fine-tuned model, as MAE does.

    The decoder is dropped; head and `fc_norm` may be missing and `norm` left over; a head of another shape starts anew;
    the position embedding is resized where the grid differs (`source_grid` = (rows, columns) is needed only where the
    source's is not square). CheckpointError lists every other key that is missing, left over or of another shape.
    """
    return _load(classifier, source, source_grid, head=False)


def load_weights(
    classifier: Classifier, source: str | Path | Mapping[str, Any], source_grid: Grid | None = None, head: bool = True
) -> LoadReport:
    """Load a fine-tuned model, for evaluation: every key must match, the head's number of classes too.

    With `head` False the same as `load_pretrained`. CheckpointError names both numbers of classes, or the keys.
    """
    return _load(classifier, source, source_grid, head)


def _load(
    classifier: Classifier, source: str | Path | Mapping[str, Any], source_grid: Grid | None, head: bool
) -> LoadReport:
    if isinstance(source, Mapping):
        label, state = "the given weights", bare_tensors(source, "the given weights")
    else:
        label, state = str(source), read_weights(source).tensors
    net = classifier.net
    own = net.state_dict()
    ignored = [key for key in state if key not in own and key.startswith(_PRETRAINING_KEYS)]
    resized = _fit_position_embedding(state, net, source_grid, label)
    own_head = [key for key in own if key.startswith(_head_prefixes(net))]
    if head:
        _check_head(state, own, own_head, label)
    elif any(key in state and state[key].shape != own[key].shape for key in own_head):
        ignored += [key for key in own_head if key in state]
    state = {key: value for key, value in state.items() if key not in set(ignored)}
    new, left = ([], []) if head else _expected_differences(state, own, own_head)
    state = {key: value for key, value in state.items() if key not in left}
    advice = "choose the model (and the pooling, --global_pool or --cls_token) that the file was written for"
    check_keys(label, {key: value for key, value in own.items() if key not in new}, state, advice)
    net.load_state_dict(state, strict=False)
    report = LoadReport(label, len(state), tuple(new), tuple(ignored + left), resized)
    logger.info("%s", report)
    return report


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
    state: dict[str, Tensor], net: nn.Module, source_grid: Grid | None, label: str
) -> tuple[Grid, Grid] | None:
    """Resize state["pos_embed"] where the grid differs, and return both grids; None where nothing was to do."""
    ours, theirs = getattr(net, "pos_embed", None), state.get("pos_embed")
    if not isinstance(net, VisionTransformer) or ours is None or theirs is None or theirs.shape[-1] != ours.shape[-1]:
        return None
    new: Grid = tuple(net.patch_embed.grid_size)
    prefix = 0 if net.no_embed_class else net.num_prefix_tokens
    patches = theirs.shape[1] - prefix
    if source_grid is None and theirs.shape == ours.shape:
        return None
    side = math.isqrt(max(patches, 0))
    old = source_grid or (side, side)
    if old[0] * old[1] != patches:
        raise CheckpointError(
            f"{label} has a position embedding for {patches} patches, not {old[0]} x {old[1]}: "
            "give its rows and columns of patches as source_grid"
        )
    if old == new:
        return None
    state["pos_embed"] = resize_position_embedding(theirs, old, new, prefix)
    return old, new
