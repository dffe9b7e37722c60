"""The batches of the next updates, read while the current one is computed."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator

from mae_dat.config.errors import UserError
from mae_dat.data.image_set import Batch


class Prefetcher:
    """Reads the micro-batches of the next updates ahead of time.

    One update is read ahead, and one more for each step that the host is late (`lag`): the step after a failure of the
    loader is launched before the host learns that a rank has no batch. For the same reason an error of the loader is
    kept in `error` instead of being raised: all ranks learn of it, finish the updates whose batches are there, and save
    before any of them stops.
    """

    def __init__(self, loader: Iterable[Batch], batches_per_update: int, lag: int) -> None:
        self.batches: Iterator[Batch] = iter(loader)
        self.batches_per_update = batches_per_update
        self.error: UserError | None = None
        self._updates: deque[list[Batch]] = deque()
        for _ in range(1 + lag):
            self.prefetch()

    def prefetch(self) -> None:
        """Read the batches of one more update; none at the end of the run."""
        try:
            self._updates.append(list(itertools.islice(self.batches, self.batches_per_update)))
        except UserError as error:
            self.error = self.error or error

    def next_batches(self) -> list[Batch]:
        """Return the batches of the next update, in host memory."""
        return self._updates.popleft()
