"""Find a model's tensors in a checkpoint, and remove what training scripts wrap around them.

The weights are searched under the names that MAE, timm, Lightning, DINO and others use for them. Then prefixes are
removed, such as DDP's `module.`, and tensors that belong to the training, such as those of a loss. Everything that was
removed or chosen is reported.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mae_dat.config.errors import CheckpointError, listing

# Averaged weights take precedence, as in timm.
_AVERAGE_KEYS = ("state_dict_ema", "model_ema", "ema", "ema_state_dict", "model_ema_state_dict", "params_ema")
_USUAL_KEYS = ("model", "state_dict")
_OTHER_KEYS = (
    "model_state_dict",
    "net",
    "network",
    "model_state",
    "params",
    "weights",
    "module",
    "teacher",
    "student",
    "backbone",
    "encoder",
)
_STATE_KEYS = (*_AVERAGE_KEYS, *_USUAL_KEYS, *_OTHER_KEYS)
_MAX_DEPTH = 4  # levels of such keys that are searched, because a hostile file can nest any number of them
# Prefixes that all tensors may have: DDP; Classifier; a wrapper; easyrobust's (normalization, model); others' wrappers.
_SHARED_PREFIXES = ("module.", "net.", "model.", "1.", "network.", "backbone.", "encoder.", "teacher.", "student.")
_REPORTED_PREFIXES = {
    "module.": "DDP (module.)",
    **{prefix: f"the prefix {prefix}" for prefix in ("backbone.", "encoder.", "teacher.", "student.")},
}
# Prefixes of one network beside others: those of an average first, then of a backbone, then of a wrapper.
_INNER_PREFIXES = (
    "ema_model.",
    "model_ema.",
    "ema.",
    "teacher.backbone.",
    "teacher.",
    "first_stage_model.",  # the VQGAN in the checkpoint of a transformer (taming) or a diffusion model
    "backbone.",
    "base_encoder.",
    "encoder_q.",
    "student.backbone.",
    "student.",
    "encoder.",
    "trunk.",
    "visual.",
    "network.",
    "model.",
    "net.",
    "module.",
)
# The first layers of networks: the tensors of a network contain one of them.
_FIRST_LAYERS = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "conv1.weight",
    "conv1.0.weight",
    "conv_stem.weight",
    "stem.0.weight",
    "stem.conv.weight",
    "features.0.0.weight",
    "quantize.embedding.weight",
    "quantize.embed.weight",
)
_TRAINING_KEYS = ("n_averaged",)  # of torch.optim.swa_utils.AveragedModel
_TRAINING_PREFIXES = ("criterion.", "loss_fn.", "train_loss.", "metrics.")
_STATISTICS = ("0.mean", "0.std")  # of easyrobust's pair of normalization and model

PixelStatistics = tuple[tuple[float, ...], tuple[float, ...]]


class Unwrapped(NamedTuple):
    """Tensors by key without prefixes, what was removed or chosen in words, and a normalization stored with them."""

    tensors: dict[str, Tensor]
    wrappers: tuple[str, ...]
    statistics: PixelStatistics | None


def unwrap(content: Any, source: str, ours: bool = False) -> Unwrapped:
    """Return the tensors of a state dict, or of a checkpoint that contains one.

    `ours` marks an exported file of this package, which contains one model and nothing else.

    Raises CheckpointError with `source` and its content if there are no tensors, or if some of them are NaN or of a
    kind that models do not use.
    """
    wrappers: list[str] = []
    for _ in range(_MAX_DEPTH):
        key = next((key for key in _STATE_KEYS if isinstance(content, Mapping) and _has_state_dict(content, key)), None)
        if key is None:
            break
        wrappers += [f"the average ({key})"] if key in _AVERAGE_KEYS else []
        wrappers += [f"under {key}"] if key in _OTHER_KEYS else []
        content = content[key]
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(key): value for key, value in items if isinstance(value, Tensor)}
    if any("_orig_mod." in key for key in tensors):  # torch.compile wraps modules at any depth
        tensors = {key.replace("_orig_mod.", ""): value for key, value in tensors.items()}
        wrappers.append("torch.compile (_orig_mod.)")
    statistics: dict[str, Tensor] = {}
    search = () if ours else (_without_training, _without_prefixes, _of_one_network, _without_prefixes)
    for step in (_without_prefixes, *search):
        tensors = step(tensors, wrappers, statistics)
    if not tensors:
        raise _no_weights(content, source)
    _check_values(tensors, source)
    values = [tuple(statistics[key].flatten().tolist()) for key in _STATISTICS if key in statistics]
    return Unwrapped(tensors, tuple(wrappers), (values[0], values[1]) if len(values) == 2 else None)


def _without_prefixes(
    tensors: dict[str, Tensor], wrappers: list[str], statistics: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Remove prefixes that all tensors share, and move the statistics of a normalization to `statistics`."""
    while tensors:
        statistics |= {key: tensors.pop(key) for key in _STATISTICS if key in tensors}
        prefix = next((prefix for prefix in _SHARED_PREFIXES if all(key.startswith(prefix) for key in tensors)), None)
        if prefix is None or not tensors:
            break
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
        if prefix in _REPORTED_PREFIXES:
            wrappers.append(_REPORTED_PREFIXES[prefix])
    return tensors


def _without_training(
    tensors: dict[str, Tensor], wrappers: list[str], statistics: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Remove tensors of the training, such as those of the loss, and report them."""
    removed = [key for key in tensors if key in _TRAINING_KEYS or key.startswith(_TRAINING_PREFIXES)]
    if not removed or len(removed) == len(tensors):
        return tensors
    wrappers.append(f"not used: {', '.join(dict.fromkeys(key.partition('.')[0] for key in removed))}")
    return {key: value for key, value in tensors.items() if key not in removed}


def _of_one_network(
    tensors: dict[str, Tensor], wrappers: list[str], statistics: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Choose one of several networks by its prefix, such as a teacher beside a student, and report it."""
    if any(key in tensors for key in _FIRST_LAYERS):
        return tensors
    for prefix in _INNER_PREFIXES:
        inner = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        inner = {key.removeprefix("module."): value for key, value in inner.items()}
        if any(key in inner or f"vit.{key}" in inner for key in _FIRST_LAYERS):
            others = dict.fromkeys(key.partition(".")[0] for key in tensors if not key.startswith(prefix))
            wrappers.append(f"only {prefix}*" + (f" (not used: {listing([*others])})" if others else ""))
            return inner
    return tensors


def _has_state_dict(content: Mapping[Any, Any], key: str, depth: int = _MAX_DEPTH) -> bool:
    """Return whether `content[key]` is or contains a state dict: `ema` may also be a number."""
    inner = content.get(key)
    return isinstance(inner, Mapping) and (
        any(isinstance(value, Tensor) for value in inner.values())
        or (depth > 1 and any(_has_state_dict(inner, inner_key, depth - 1) for inner_key in _STATE_KEYS))
    )


def _no_weights(content: Any, source: str) -> CheckpointError:
    """Return the error for a file without tensors under a known name; it names those under other names."""
    if not isinstance(content, Mapping):
        return CheckpointError(
            f"{source} contains no weights, only {type(content).__name__}: use the checkpoint of a model."
        )
    named = [
        str(key)
        for key, inner in content.items()
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values())
    ]
    names = listing([str(key) for key in content])
    if named:
        return CheckpointError(
            f"{source} contains no weights under a known name, but tensors under {listing(named)}: if that is the "
            f"model, save it alone: torch.save(checkpoint[{named[0]!r}], 'weights.pth')."
        )
    return CheckpointError(f"{source} contains no weights, only {names}: use the checkpoint of a model.")


def _check_values(tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise CheckpointError for NaN, and for tensors without dense values: sparse, quantized or on no device."""
    unusable = [
        key for key, value in tensors.items() if value.is_meta or value.is_quantized or value.layout != torch.strided
    ]
    if unusable:
        raise CheckpointError(
            f"{source}: {listing(unusable, 3)} have no dense values (sparse, quantized or meta tensors): save "
            "ordinary tensors, such as model.dequantize or tensor.to_dense() give."
        )
    damaged = [key for key, value in tensors.items() if _any_value(value, torch.isnan)]
    if damaged:
        raise CheckpointError(
            f"{source} contains NaN in {len(damaged)} of {len(tensors)} tensors ({listing(damaged, 3)}): the training "
            "diverged or the file is damaged; use an earlier checkpoint."
        )


def _any_value(tensor: Tensor, test: Callable[[Tensor], Tensor]) -> bool:
    if not tensor.is_floating_point():
        return False
    return bool(test(tensor if tensor.itemsize > 1 else tensor.float()).any())
