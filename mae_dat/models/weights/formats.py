"""Checkpoint formats by name: what a file holds, told by its keys, and its tensors under the keys that MAE and timm
share.

Hugging Face names query, key and value apart; they are stacked into the one `qkv` of MAE and timm, in that order.
"""

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from mae_dat.storage.weight_files import WeightsFile

Kind = Literal["autoencoder", "encoder", "classifier", "tokenizer", "network"]

_HUGGING_FACE = "embeddings.patch_embeddings.projection.weight"
# Applied in this order: what a rule leaves of a key is what the next one sees.
_RENAMES = (
    (r"^vit\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^classifier\.", "head."),
    (r"^encoder\.layer\.", "blocks."),
    # transformers 5 writes the second form.
    (r"^decoder\.(decoder_layers|decoder_encoder\.layer)\.", "decoder_blocks."),
    (r"^decoder\.", ""),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
)
_PART = re.compile(r"(.*\.attn\.)(query|key|value)(\.\w+)")


class Recognized(NamedTuple):
    """A file's format in words, what it holds, and its tensors under the keys of MAE and timm.

    `kind`: an `autoencoder` has encoder and decoder, an `encoder` is a vision transformer without head, a `classifier`
    one with a head; a `tokenizer` makes visual words; a `network` is anything else.
    """

    format: str
    kind: Kind
    tensors: dict[str, Tensor]


def recognize(file: WeightsFile) -> Recognized:
    """The format of a file, and its tensors translated from it."""
    tensors, prefix = file.tensors, ""
    if _HUGGING_FACE in tensors or f"vit.{_HUGGING_FACE}" in tensors:
        tensors, prefix = from_hugging_face(tensors), "Hugging Face, "
    elif "mae_dat" in file.metadata:
        prefix = "mae_dat, "
    elif file.statistics:
        prefix = "easyrobust, "
    kind, words = _kind(tensors, file.metadata)
    return Recognized(prefix + words, kind, tensors)


def from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """ViTMAE's and ViT's tensors under MAE's keys, query, key and value stacked; a pooler is left out.

    An incomplete triple stays apart, so that the load names what is missing.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        if not key.startswith("pooler."):
            renamed[key] = value
    stacked: dict[str, Tensor] = {}
    for key, value in renamed.items():
        part = _PART.fullmatch(key)
        triple = [f"{part[1]}{name}{part[3]}" for name in ("query", "key", "value")] if part else []
        if not part or not all(name in renamed for name in triple):
            stacked[key] = value
        elif part[2] == "query":
            stacked[f"{part[1]}qkv{part[3]}"] = torch.cat([renamed[name] for name in triple])
    return stacked


def _kind(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[Kind, str]:
    """What the tensors are, as a kind and in words."""
    if metadata.get("tokenizer") == "light":
        return "tokenizer", "light tokenizer"
    if "quantize.embedding.weight" in tensors or "quantize.embed.weight" in tensors:
        return "tokenizer", "VQGAN"
    if not {"patch_embed.proj.weight", "blocks.0.norm1.weight"} <= tensors.keys():
        return "network", "network with timm's or torchvision's keys"
    if "decoder_pred.weight" in tensors:
        return "autoencoder", "MAE with decoder"
    if "dist_token" in tensors:
        return "classifier", "distilled DeiT"
    if "head.weight" not in tensors:
        return "encoder", "MAE encoder"
    if "fc_norm.weight" in tensors:
        return "classifier", "MAE fine-tuned, mean pooling"
    return "classifier", "vision transformer with class token, timm's keys"
