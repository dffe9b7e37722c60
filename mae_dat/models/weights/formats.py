"""Checkpoint formats: recognize a file by its keys, and convert its keys to those of MAE and timm.

MAE and timm use the same keys. They stay unchanged, as do those of torchvision, DeiT and easyrobust. Only the keys of
Hugging Face are renamed (`from_hugging_face`). It also stores query, key and value separately; they are stacked into
the one `qkv` of MAE and timm, in that order.

`extract_weights` in `storage/weight_files.py` has already removed prefixes that all keys of a file share, such as DDP's
`module.`. One of them is `net.`, the prefix of the timm network inside a `Classifier`; `load.py` loads into that
network.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from mae_dat.models.describe import WeightsOrigin
from mae_dat.storage.unwrap import PixelStatistics
from mae_dat.storage.weight_files import WeightsFile

Kind = Literal["autoencoder", "encoder", "classifier", "detector", "tokenizer", "other"]
"""`autoencoder`: encoder and decoder; `encoder`: a vision transformer without head; `classifier`: one with a head;
`detector`: boxes; `tokenizer`: visual words; `other`: a network that its keys do not identify, such as a ResNet."""

_HUGGING_FACE = "embeddings.patch_embeddings.projection.weight"
# Applied in this order, each to the result of the previous one.
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
_ATTENTION_PART = re.compile(r"(.*\.attn\.)(query|key|value)(\.\w+)")


@dataclass(frozen=True)
class ModelFile:
    """The content of a model's file: tensors under the keys of MAE and timm, and facts about them."""

    tensors: dict[str, Tensor]
    kind: Kind
    format: str = ""
    """The format in words, for messages and reports."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Facts recorded about the model by our export, the checkpoint of a run or the registry of released weights."""
    source: str = "the given weights"
    """The path of the file."""
    wrappers: tuple[str, ...] = ()
    """Wrappers that were removed, such as `module.` (see `extract_weights`)."""
    statistics: PixelStatistics | None = None
    """Mean and standard deviation of pixels in [0, 1], one value per channel, if the file holds them."""

    is_timms: bool = False
    """Whether the facts are those of timm's `config.json` next to the file."""
    released: str = ""
    """The released name that it was given by."""
    sha256: str = ""
    """The hash of the file, if it was compared with its card."""

    @property
    def label(self) -> str:
        """Path and format, for messages."""
        return f"{self.source} ({self.format})"

    @property
    def origin(self) -> WeightsOrigin:
        """Where the tensors came from, without the tensors."""
        return WeightsOrigin(self.source, self.format, self.released, self.wrappers, self.sha256)


def recognize(file: WeightsFile, facts: Mapping[str, Any] | None = None, is_ours: bool = False) -> ModelFile:
    """Recognize the format of a file and convert its keys to those of MAE and timm.

    `facts` replace those in the file; `is_ours` marks the checkpoint of a run, which has no metadata. Raises
    CheckpointError for damaged facts.
    """
    tensors, prefix = file.tensors, ""
    facts = file.facts if facts is None else facts
    if _HUGGING_FACE in tensors or f"vit.{_HUGGING_FACE}" in tensors:
        tensors, prefix = from_hugging_face(tensors), "Hugging Face, "
    elif is_ours or "mae_dat" in file.metadata:
        prefix = "mae_dat, "
    elif file.statistics:
        prefix = "easyrobust, "
    kind, description = _kind(tensors, file.metadata, facts)
    return ModelFile(
        tensors=tensors,
        kind=kind,
        format=prefix + description,
        facts=facts,
        source=file.source,
        wrappers=file.wrappers,
        statistics=file.statistics,
    )


def from_hugging_face(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of ViTMAE and ViT to MAE's keys and stack query, key and value; drop a pooler.

    An incomplete triple is not stacked, so that loading it reports the missing key.
    """
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        for pattern, replacement in _RENAMES:
            key = re.sub(pattern, replacement, key)
        if not key.startswith("pooler."):
            renamed[key] = value
    stacked: dict[str, Tensor] = {}
    for key, value in renamed.items():
        part = _ATTENTION_PART.fullmatch(key)
        triple = [f"{part[1]}{name}{part[3]}" for name in ("query", "key", "value")] if part else []
        if not part or not all(name in renamed for name in triple):
            stacked[key] = value
        elif part[2] == "query":
            stacked[f"{part[1]}qkv{part[3]}"] = torch.cat([renamed[name] for name in triple])
    return stacked


def _kind(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], facts: Mapping[str, Any]) -> tuple[Kind, str]:
    """Return the kind of model that the tensors belong to, and its description."""
    if facts.get("kind") == "detector":
        return "detector", "object detector"
    if metadata.get("tokenizer") == "light":
        return "tokenizer", "light tokenizer"
    if "quantize.embedding.weight" in tensors or "quantize.embed.weight" in tensors:
        return "tokenizer", "VQGAN"
    if not {"patch_embed.proj.weight", "blocks.0.norm1.weight"} <= tensors.keys():
        return "other", "model with timm's or torchvision's keys"
    if "decoder_pred.weight" in tensors:
        return "autoencoder", "MAE with decoder"
    if "dist_token" in tensors:
        return "classifier", "distilled DeiT"
    if "head.weight" not in tensors:
        return "encoder", "MAE encoder"
    if "fc_norm.weight" in tensors:
        return "classifier", "MAE fine-tuned, mean pooling"
    return "classifier", "vision transformer with class token, timm's keys"
