"""Exact accuracy: integer counts over all ranks, divided once."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from mae_dat.config.errors import DataError
from mae_dat.data.image_set import Batch
from mae_dat.data.loader import ImageLoader
from mae_dat.models.modes import autocast, evaluation_mode
from mae_dat.runtime.collectives import all_sum, gather, on_all_ranks
from mae_dat.runtime.sharding import is_sharded
from mae_dat.runtime.watchdog import heartbeat


@torch.no_grad()  # parameters that a sharded model gathers in inference mode could not be trained afterwards
def evaluate_accuracy(
    model: nn.Module, loader: ImageLoader, device: torch.device, precision: torch.dtype | None
) -> dict[str, float]:
    """Return top-1 and top-5 accuracy in percent and the mean cross-entropy in nats (test_acc1, test_acc5, test_loss).

    They are exact: counts are summed over all ranks and divided once. Images that replace unreadable ones (`skipped`)
    are not counted. Raises DataError when none is left. Collective.
    """
    counts = torch.zeros(4, dtype=torch.float64, device=device)

    def count() -> Tensor:
        for batch, counted in synchronized(loader, model):
            counts.add_(_batch_counts(model, batch, device, precision) * counted)
            heartbeat()
        return counts

    with evaluation_mode(model):
        # With a sharded model a rank that fails must not wait for the others, which wait for it in the forward pass: it
        # leaves, and they report its reason.
        correct, correct5, loss, total = all_sum(count() if is_sharded(model) else on_all_ranks(count)).tolist()
    if not total:
        raise DataError("no image to evaluate could be read: check the validation folder.")
    return {"test_acc1": 100 * correct / total, "test_acc5": 100 * correct5 / total, "test_loss": loss / total}


def _batch_counts(model: nn.Module, batch: Batch, device: torch.device, precision: torch.dtype | None) -> Tensor:
    """Return the top-1 hits, top-5 hits, summed loss and number of images of a batch, float64 (4,)."""
    image, label = batch["image"].to(device, non_blocking=True), batch["label"].to(device, non_blocking=True)
    with autocast(device, precision):
        logits = model(image).float()
    readable = batch["skipped"].to(device, non_blocking=True) == 0
    # Rows are excluded by a product: selecting them by a mask would make the host wait for their number.
    hits = (logits.topk(min(5, logits.shape[1]), dim=1).indices == label[:, None]) & readable[:, None]
    loss = nn.functional.cross_entropy(logits, label, reduction="none").double().where(readable, 0)
    return torch.stack([hits[:, 0].sum(), hits.sum(), loss.sum(), readable.sum()])


def synchronized(loader: ImageLoader, model: nn.Module) -> Iterator[tuple[Batch, bool]]:
    """Yield the loader's batches, and whether they count.

    The forward pass of a sharded model needs all ranks, so with one each rank gets as many batches as the others: its
    last one again.
    """
    if not is_sharded(model):
        yield from ((batch, True) for batch in loader)
        return
    batches, last = iter(loader), None
    for _ in range(max(gather(len(loader)))):
        batch = next(batches, None)
        if batch is None and last is None:  # fewer images than ranks: this one borrows an image
            last = default_collate([loader.samples[0]])
        last = batch or last
        assert last is not None
        yield last, batch is not None
