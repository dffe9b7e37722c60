"""Exact accuracy: integer counts over all ranks, divided once."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from mae_dat.config.errors import DataError
from mae_dat.data.image_set import Batch
from mae_dat.data.loader import ImageLoader
from mae_dat.models.modes import autocast
from mae_dat.runtime.collectives import all_sum, gather, on_all_ranks
from mae_dat.runtime.sharding import is_sharded
from mae_dat.runtime.watchdog import heartbeat


@torch.no_grad()  # what sharded weights are gathered into in inference mode could not be trained with
def evaluate_accuracy(
    model: nn.Module, loader: ImageLoader, device: torch.device, precision: torch.dtype | None
) -> dict[str, float]:
    """Top-1 and top-5 in percent and cross-entropy, from counts summed over ranks and divided once (test_acc1,
    test_acc5, test_loss).

    Images that stand in for unreadable ones (`skipped`) are not counted. Raises DataError when none is left.
    """
    training = model.training
    model.eval()
    counts = torch.zeros(4, dtype=torch.float64, device=device)

    def count() -> Tensor:
        for batch, counted in synchronized(loader, model):
            counts.add_(_counts(model, batch, device, precision) * counted)
            heartbeat()
        return counts

    # In shards a rank that fails cannot wait for the others, which wait for it: it leaves, and they hear why.
    correct, correct5, loss, total = all_sum(count() if is_sharded(model) else on_all_ranks(count)).tolist()
    model.train(training)
    if not total:
        raise DataError("no image to evaluate could be read: check the validation folder.")
    return {"test_acc1": 100 * correct / total, "test_acc5": 100 * correct5 / total, "test_loss": loss / total}


def _counts(model: nn.Module, batch: Batch, device: torch.device, precision: torch.dtype | None) -> Tensor:
    """Hits, hits among five, summed loss and images of a batch, float64 (4,)."""
    image, label = batch["image"].to(device, non_blocking=True), batch["label"].to(device, non_blocking=True)
    with autocast(device, precision):
        logits = model(image).float()
    own = batch["skipped"].to(device, non_blocking=True) == 0
    # Chosen by a product: rows picked by a mask would have the host wait to learn how many they are.
    hits = (logits.topk(min(5, logits.shape[1]), dim=1).indices == label[:, None]) & own[:, None]
    loss = nn.functional.cross_entropy(logits, label, reduction="none").double().where(own, 0)
    return torch.stack([hits[:, 0].sum(), hits.sum(), loss.sum(), own.sum()])


def synchronized(loader: ImageLoader, model: nn.Module) -> Iterator[tuple[Batch, bool]]:
    """The loader's batches, and whether they count. With a sharded model, whose forward pass needs all ranks, each gets
    as many as the others: its last one again."""
    if not is_sharded(model):
        yield from ((batch, True) for batch in loader)
        return
    batches, last = iter(loader), None
    for _ in range(max(gather(len(loader)))):
        batch = next(batches, None)
        if batch is None and last is None:  # fewer pictures than ranks: this one borrows a picture
            last = default_collate([loader.dataset.dataset[0]])  # type: ignore[attr-defined]
        last = batch or last
        assert last is not None
        yield last, batch is not None
