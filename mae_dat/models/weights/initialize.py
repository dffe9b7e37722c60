"""Initialize a masked autoencoder from the weights of another model: `mae-dat pretrain --init`.

Sources are autoencoders, with or without decoder, and vision transformers: MAE's files, our runs and exports, Hugging
Face's ViTMAE and ViT, timm's and DINO's. What has another patch side, image size, number of channels or normalization
is resampled. What the source lacks is left as initialized. Everything else has to match, key by key.
"""

import difflib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
from timm.data import resolve_model_data_config
from timm.layers import resample_patch_embed
from torch import Tensor

from mae_dat.config.errors import CheckpointError, listing
from mae_dat.models.classifier import PatchGrid, build_timm
from mae_dat.models.mae import MAE_MODELS, MaskedAutoencoder, pixel_statistics
from mae_dat.models.weights.formats import ModelFile, recognize
from mae_dat.models.weights.load import DECODER_KEYS, recorded_grid, resize_position_embedding
from mae_dat.models.weights.read import ModelSource, read_model_file
from mae_dat.storage.released import released_weights
from mae_dat.storage.weight_files import WeightsFile, aligned_table, check_keys

logger = logging.getLogger(__name__)

Treatment = Literal["loaded", "resampled", "new", "not used"]
_TIMM_PLACES = ("hf-hub:", "hf_hub:", "local-dir:")
_HEAD_KEYS = ("head.", "head_dist.", "fc_norm.")
_NEAREST = 3  # keys in the message about another architecture
# What a masked autoencoder of this package has no place for, with the reason.
_UNSUPPORTED = {
    "dist_token": "a distillation token",
    "reg_token": "register tokens",
    "register_tokens": "register tokens",
    "storage_tokens": "register tokens",
}
_LAYER_SCALE = {"ls1.gamma": "attn.proj", "gamma_1": "attn.proj", "ls2.gamma": "mlp.fc2", "gamma_2": "mlp.fc2"}


class InitRow(NamedTuple):
    """What became of one part of a model."""

    part: str
    tensors: int
    treatment: Treatment
    note: str = ""


@dataclass
class InitReport:
    """What was loaded, resampled and newly initialized."""

    file: ModelFile
    rows: list[InitRow] = field(default_factory=list)

    def __str__(self) -> str:
        header = ("part", "tensors", "", "")
        table = aligned_table([header, *[(row.part, str(row.tensors), row.treatment, row.note) for row in self.rows]])
        wrappers = "".join(f", {wrapper}" for wrapper in self.file.wrappers)
        return f"initialized from {self.file.source} ({self.file.format}{wrappers}):\n{table}"

    def summary(self) -> str:
        """Return the parts that were not loaded unchanged, in one line; empty if all were."""
        names = {kind: [row.part for row in self.rows if row.treatment == kind] for kind in ("resampled", "new")}
        return "; ".join(f"{kind}: {', '.join(parts)}" for kind, parts in names.items() if parts)


def read_initial_weights(source: ModelSource) -> ModelFile:
    """Read the weights of a file, an output folder, a released name, or a timm model by its name.

    Raises MissingInputError, CheckpointError, DownloadError, and ConfigError for a timm model that has no weights.
    """
    if not isinstance(source, str | Path) or not _is_timm_name(str(source)):
        return read_model_file(source)
    net = build_timm(str(source), None, None, drop_path=0.0, in_chans=3, pretrained=True)
    settings = resolve_model_data_config(net)
    statistics = (tuple(settings["mean"]), tuple(settings["std"]))
    return recognize(WeightsFile(dict(net.state_dict()), {}, f"timm's {source}", statistics=statistics))


def _is_timm_name(source: str) -> bool:
    if Path(source).exists() or source in released_weights():
        return False
    return source.startswith(_TIMM_PLACES) or timm.is_model(source)


def initialize_autoencoder(model: MaskedAutoencoder, source: ModelSource) -> InitReport:
    """Load the weights of another model into an autoencoder, resampled where necessary, and log a table of its parts.

    After an error the model is unchanged. Raises what `read_initial_weights` raises, and CheckpointError for another
    architecture or size.
    """
    file = read_initial_weights(source)
    _check_architecture(file, model)
    report = InitReport(file)
    state = _encoder_tensors(file, model, report)
    expected = {key: value for key, value in model.state_dict().items() if not key.startswith(DECODER_KEYS)}
    new = [key for key in ("norm.weight", "norm.bias") if key not in state and "fc_norm.weight" in file.tensors]
    check_keys(file.label, {key: expected[key] for key in expected if key not in new}, state, _advice(state))
    _add_loaded_rows(state, report)
    if new:
        report.rows.append(InitRow("norm", 2, "new", "the file has fc_norm, of a mean over the patches"))
    state |= _decoder_tensors(file, model, report)
    unused = [key for key in file.tensors if key.startswith(_HEAD_KEYS)]
    if unused:
        report.rows.append(
            InitRow(listing(list(dict.fromkeys(k.split(".")[0] for k in unused))), len(unused), "not used")
        )
    model.load_state_dict(state, strict=False)
    logger.info("%s", report)
    return report


# ---- the encoder ----


def _check_architecture(file: ModelFile, model: MaskedAutoencoder) -> None:
    """Raise CheckpointError unless the file holds a plain vision transformer, with the reason."""
    expected = [key for key in model.state_dict() if not key.startswith(DECODER_KEYS)]
    if file.kind in ("other", "detector"):
        pairs = _nearest_keys(expected, file.tensors)
        nearest = "; ".join(f"{key} is nearest to {other}" for key, other in pairs)
        raise CheckpointError(
            f"{file.label} is not a vision transformer, so no tensor fits a masked autoencoder"
            f"{f' ({nearest})' if nearest else ''}: use the weights of a ViT, such as MAE's, DINO's or timm's vit_*."
        )
    for key, what in _UNSUPPORTED.items():
        if key in file.tensors:
            raise CheckpointError(
                f"{file.label} has {what} ({key}), which a masked autoencoder lacks, and its features depend on "
                "them: use weights without."
            )
    if "pos_embed" not in file.tensors:
        raise CheckpointError(
            f"{file.label} has no pos_embed: its position embedding is rotary or relative, and a masked autoencoder "
            "has an absolute one. Use the weights of a ViT with pos_embed."
        )


def _nearest_keys(expected: Sequence[str], tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Return pairs of an expected key and the key of the file that is most like it, the most similar ones first."""
    keys = list(tensors)[:400]
    pairs = [(key, found[0]) for key in expected[:20] if (found := difflib.get_close_matches(key, keys, 1, 0.5))]
    return pairs[:_NEAREST]


def _encoder_tensors(file: ModelFile, model: MaskedAutoencoder, report: InitReport) -> dict[str, Tensor]:
    """Return the encoder's tensors, adapted to the model; add rows for those that are resampled."""
    excluded = (*DECODER_KEYS, *_HEAD_KEYS)
    state = {key: tensor for key, tensor in file.tensors.items() if not key.startswith(excluded)}
    _check_width(state, model, file)
    _merge_layer_scale(state, report)
    _fit_patch_embedding(state, model, file, report)
    _fit_position(state, "pos_embed", model, file, report)
    return state


def _check_width(state: Mapping[str, Tensor], model: MaskedAutoencoder, file: ModelFile) -> None:
    width, depth = state["pos_embed"].shape[-1], _depth(state)
    if (width, depth) != (model.embed_dim, len(model.blocks)):
        raise CheckpointError(
            f"{file.label} has {depth} blocks of width {width}, but the model has {len(model.blocks)} of width "
            f"{model.embed_dim}: {_advice(state)}."
        )


def _depth(state: Mapping[str, Tensor]) -> int:
    return len({key.split(".")[1] for key in state if key.startswith("blocks.")})


def _advice(state: Mapping[str, Tensor]) -> str:
    """Return what to do about weights that do not fit: the models with their width and number of blocks."""
    shape = (state["pos_embed"].shape[-1], _depth(state))
    fitting = [name for name, size in MAE_MODELS.items() if (size.encoder.embed_dim, size.encoder.depth) == shape]
    if fitting:
        return f"its width and blocks are those of --model {' or '.join(fitting)}"
    return f"use the weights of {', '.join(MAE_MODELS)}"


def _merge_layer_scale(state: dict[str, Tensor], report: InitReport) -> None:
    """Multiply LayerScale's factors (D,) into the layers before them, which is the same function."""
    merged = 0
    for key in [key for key in state if key.endswith(tuple(_LAYER_SCALE))]:
        block, suffix = key.split(".", 2)[:2], key.split(".", 2)[2]
        gamma, layer = state.pop(key), ".".join([*block, _LAYER_SCALE[suffix]])
        state[f"{layer}.weight"] = state[f"{layer}.weight"] * gamma[:, None]
        state[f"{layer}.bias"] = state[f"{layer}.bias"] * gamma
        merged += 1
    if merged:
        report.rows.append(InitRow("LayerScale", merged, "resampled", "multiplied into attn.proj and mlp.fc2"))


def _fit_patch_embedding(
    state: dict[str, Tensor], model: MaskedAutoencoder, file: ModelFile, report: InitReport
) -> None:
    """Adapt the patch projection (D, C, p, p) to the model's patch side, channels and normalization."""
    weight, bias = state["patch_embed.proj.weight"], state.get("patch_embed.proj.bias")
    notes, rows = [], report.rows
    side, channels = weight.shape[-1], weight.shape[1]
    if side != model.patch_size:
        weight = resample_patch_embed(weight.float(), [model.patch_size, model.patch_size])
        notes.append(f"patches of {side} px to {model.patch_size} px")
    mean, std = (torch.tensor(values, dtype=torch.float64) for values in pixel_statistics_of(file, channels))
    if channels != model.in_chans:
        weight, mean, std = _adapt_channels(weight, mean, std, model.in_chans)
        notes.append(f"{channels} to {model.in_chans} channels")
    own_mean, own_std = model.mean.flatten().double().cpu(), model.std.flatten().double().cpu()
    if bias is not None and not (torch.allclose(mean, own_mean, atol=1e-4) and torch.allclose(std, own_std, atol=1e-4)):
        # The same function of the pixels: w (x - m) / s = w s' / s (x - m') / s' + w (m' - m) / s.
        shift = (weight.double() * ((own_mean - mean) / std).view(1, -1, 1, 1)).sum((1, 2, 3))
        weight = (weight.double() * (own_std / std).view(1, -1, 1, 1)).to(weight.dtype)
        bias = (bias.double() + shift).to(bias.dtype)
        notes.append("for this model's normalization of pixels")
    if notes:
        state["patch_embed.proj.weight"] = weight
        state |= {} if bias is None else {"patch_embed.proj.bias": bias}
        rows.append(InitRow("patch_embed", 1 + (bias is not None), "resampled", ", ".join(notes)))


def _adapt_channels(weight: Tensor, mean: Tensor, std: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Adapt a projection (D, C, p, p) and statistics (C,) to another number of channels.

    For one channel the weights are summed. More channels repeat them in turn, and the copies share the weight: an image
    whose further channels repeat the first ones gives the same tokens. With fewer channels, the first ones are scaled.
    """
    have = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True), mean.mean(0, keepdim=True), std.mean(0, keepdim=True)
    index = torch.arange(channels) % have
    share = 1 / torch.bincount(index, minlength=have)[index] if channels > have else torch.tensor(have / channels)
    return weight[:, index] * share.view(-1, 1, 1), mean[index], std[index]


def pixel_statistics_of(file: ModelFile, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation of pixels in [0, 1] that the weights were trained with: as recorded, else those of the
    timm model that the file is named after, else the default of masked autoencoders."""
    if file.statistics and len(file.statistics[0]) == channels:
        return file.statistics
    name = file.facts.get("model") or Path(file.source).stem.partition(".")[0]
    if channels == 3 and timm.is_model(name):
        settings: Any = timm.get_pretrained_cfg(name)
        return tuple(settings.mean), tuple(settings.std)
    return pixel_statistics(channels)


# ---- position embeddings, decoder ----


def _fit_position(
    state: dict[str, Tensor], key: str, model: MaskedAutoencoder, file: ModelFile, report: InitReport
) -> None:
    """Resize a position embedding (1, 1 + N, D) to the model's grid, with an entry for the class token."""
    position = state[key]
    grid, prefix = _grid_of(position, file)
    notes = []
    if not prefix:
        position = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)
        notes.append("0 for the class token")
    if grid != model.grid:
        position = resize_position_embedding(position, grid, model.grid)
        notes.append(f"{grid[0]} x {grid[1]} to {model.grid[0]} x {model.grid[1]} patches")
    if notes:
        state[key] = position
        report.rows.append(InitRow(key, 1, "resampled", ", ".join(notes)))


def _grid_of(position: Tensor, file: ModelFile) -> tuple[PatchGrid, int]:
    """Return the grid of a position embedding, recorded or square, and its tokens before the patches, 1 or 0."""
    tokens = position.shape[1]
    for prefix in (1, 0):
        if grid := recorded_grid(file, tokens - prefix):
            return grid, prefix
    for prefix in (1, 0):
        side = math.isqrt(max(0, tokens - prefix))
        if side > 0 and side * side == tokens - prefix:
            return (side, side), prefix
    raise CheckpointError(
        f"{file.label} was written for images that are not square ({tokens} tokens), and does not record their size: "
        "use an export of mae-dat, which does."
    )


def _decoder_tensors(file: ModelFile, model: MaskedAutoencoder, report: InitReport) -> dict[str, Tensor]:
    """Return the decoder's tensors adapted to the model, none if the file's decoder is another one; add its rows."""
    state = {key: tensor for key, tensor in file.tensors.items() if key.startswith(DECODER_KEYS)}
    expected = {key: value for key, value in model.state_dict().items() if key.startswith(DECODER_KEYS)}
    reason = _other_decoder(state, model)
    if reason:
        report.rows.append(InitRow("decoder", len(expected), "new", reason))
        if state:
            report.rows.append(InitRow("decoder of the file", len(state), "not used"))
        return {}
    _fit_position(state, "decoder_pos_embed", model, file, report)
    mean, std = pixel_statistics_of(file, file.tensors["patch_embed.proj.weight"].shape[1])
    same_pixels = len(mean) == model.in_chans and all(
        abs(one - other) < 1e-4
        for one, other in zip((*mean, *std), (*model.mean.flatten(), *model.std.flatten()), strict=True)
    )
    last = ("decoder_pred.weight", "decoder_pred.bias")
    if not same_pixels or state[last[0]].shape != expected[last[0]].shape:
        for key in last:
            state.pop(key), expected.pop(key)
        report.rows.append(InitRow("decoder_pred", 2, "new", "other patches, channels or normalization of pixels"))
    check_keys(file.label, expected, state, "use an undamaged file, or one without decoder")
    resampled = {row.part for row in report.rows}
    report.rows.append(InitRow("decoder", len([key for key in state if key not in resampled]), "loaded"))
    return state


def _other_decoder(state: Mapping[str, Tensor], model: MaskedAutoencoder) -> str:
    """Return why the decoder of a file is not that of the model; empty if it is."""
    if "decoder_pred.weight" not in state or "decoder_embed.weight" not in state:
        return "the file has no decoder"
    width = state["decoder_embed.weight"].shape[0]
    depth = len({key.split(".")[1] for key in state if key.startswith("decoder_blocks.")})
    own = (model.decoder_embed.weight.shape[0], len(model.decoder_blocks))
    if (width, depth) != own:
        return f"{own[1]} blocks of width {own[0]}; the file's has {depth} of width {width}"
    return ""


def _add_loaded_rows(state: Mapping[str, Tensor], report: InitReport) -> None:
    """Add a row for each part of the encoder that was loaded unchanged."""
    changed = {row.part for row in report.rows}
    parts: dict[str, int] = {}
    for key in state:
        part = key.split(".")[0]
        parts[part] = parts.get(part, 0) + 1
    report.rows += [InitRow(part, count, "loaded") for part, count in parts.items() if part not in changed]
