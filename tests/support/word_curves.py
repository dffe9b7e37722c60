"""Curves of accuracy under the word attack, counted batch by batch: the reference for the evaluation's."""

from collections.abc import Iterable

import torch
from torch import nn

from mae_dat.attacks.word_budget import WORD_ATTACK_KINDS, WordAttack, word_hits
from mae_dat.config.errors import DataError
from mae_dat.data.image_set import Batch
from mae_dat.models.modes import evaluation_mode
from mae_dat.models.tokenizer.base import VisualTokenizer

WordCurve = dict[str, dict[str, int]]
"""Share as text (JSON keys are text) -> `correct` of `total` images."""


@torch.no_grad()
def word_accuracy(
    model: nn.Module,
    tokenizer: VisualTokenizer,
    batches: Iterable[Batch],
    attack: WordAttack,
    device: torch.device,
) -> dict[str, WordCurve]:
    """Measure the curve of each kind in integer counts.

    The model runs in evaluation mode, and its training flags are restored. Images that replace unreadable ones
    (`skipped`) are not counted. Raises DataError if no image is left, ConfigError (size, shares), NumericsError (NaN or
    infinite logits).
    """
    counts = torch.zeros(len(WORD_ATTACK_KINDS) + 1, len(attack.shares), dtype=torch.int64, device=device)
    with evaluation_mode(model):
        for batch in batches:
            readable = batch["skipped"] == 0
            image, label = batch["image"][readable].to(device), batch["label"][readable].to(device)
            index = batch["index"][readable]
            for row, kind in enumerate(WORD_ATTACK_KINDS if len(image) else ()):
                hits = word_hits(
                    model, tokenizer=tokenizer, image=image, label=label, index=index, kind=kind, attack=attack
                )
                counts[row] += hits.sum(1)
            counts[-1] += len(image)
    *correct, total = counts.tolist()
    if not total[0]:
        raise DataError("no image to attack could be read: check the validation folder.")
    shares = [f"{share:g}" for share in attack.shares]
    return {
        kind: {share: {"correct": hits, "total": total[0]} for share, hits in zip(shares, row, strict=True)}
        for kind, row in zip(WORD_ATTACK_KINDS, correct, strict=True)
    }
