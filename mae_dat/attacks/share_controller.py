"""Control of an attack's strength: eps follows a target share of changed visual words.

The same eps changes different shares of words at another image size or with another tokenizer. A share is comparable.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import replace

from mae_dat.config.adversaries import PUBLISHED_EPS, AttackConfig

logger = logging.getLogger(__name__)


class ShareController:
    """Keeps the share of changed words at a target by adjusting eps.

    `find` searches eps on the first batch. `observe` then adjusts it after each step: log eps moves by a small part of
    log(target / running share), or by half of it while the share is off by more than a factor of 2. Such large errors
    occur in the first steps of `paper`, whose gradient is not normalized and grows a thousandfold while the
    classification head learns.
    """

    GAIN, FAST_GAIN = 0.05, 0.5
    SMOOTHING = 0.9
    # The upper limit is finite: without a gradient eps would grow forever, and infinity * 0 makes NaN pixels.
    LARGEST = 1e12
    # The search covers a factor of 2^12 * 16^7 = 1.1e12; a leap of 16 is bisected to within 1.04.
    DOUBLINGS, LEAPS, BISECTIONS = 12, 7, 6

    def __init__(self, config: AttackConfig) -> None:
        """Start from `config`'s eps (0.1 if it has none), with its share as the target."""
        assert config.share is not None
        self.target = config.share
        self.eps = PUBLISHED_EPS if math.isnan(config.eps) else config.eps
        self.average: float | None = None

    def apply(self, config: AttackConfig) -> AttackConfig:
        """Return the attack with the current strength."""
        return replace(config, eps=self.eps)

    def find(self, share_at: Callable[[float], float]) -> None:
        """Search eps on a first batch: go up or down until the target is bracketed, then bisect in log eps.

        `share_at` maps eps to the share of changed words. If no eps reaches the target, log a warning and use the
        one whose share is closest; of several equally close ones, the smallest.
        """
        eps, shares = self.eps, {self.eps: share_at(self.eps)}
        upwards = shares[eps] < self.target
        for factor in (2.0,) * self.DOUBLINGS + (16.0,) * self.LEAPS:
            previous, eps = eps, eps * factor if upwards else eps / factor
            shares[eps] = share_at(eps)
            if (shares[eps] < self.target) != upwards:
                self.eps = self._bisect(share_at, min(previous, eps), max(previous, eps))
                return
        self.eps = min(shares, key=lambda eps: (abs(shares[eps] - self.target), eps))
        logger.warning(
            "no eps from %.3g to %.3g changes %.1f %% of the words; using eps %.3g, which changes %.2f %%. "
            "If the loss has no gradient yet (the output of the model is still constant), eps is adjusted later, when "
            "there is one; otherwise choose another --dat_share.",
            min(shares),
            max(shares),
            100 * self.target,
            self.eps,
            100 * shares[self.eps],
        )

    def _bisect(self, share_at: Callable[[float], float], low: float, high: float) -> float:
        for _ in range(self.BISECTIONS):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if share_at(middle) < self.target else (low, middle)
        return (low * high) ** 0.5

    def observe(self, share: float) -> None:
        """Adjust eps to the share of changed words, in [0, 1], measured in a step."""
        near = self.target / 2 <= share <= 2 * self.target
        if self.average is None or not near:
            self.average = share
        self.average = self.SMOOTHING * self.average + (1 - self.SMOOTHING) * share
        # Clamped to [1/4, 4], so that a step changes eps by a factor of 2 at most (FAST_GAIN), even if no word changes.
        ratio = max(self.target / max(self.average, self.target / 4), 0.25)
        self.eps = min(self.eps * ratio ** (self.GAIN if near else self.FAST_GAIN), self.LARGEST)

    def state_dict(self) -> dict[str, float | None]:
        """Return the state for a checkpoint."""
        return {"eps": self.eps, "average": self.average}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """Restore `state_dict`."""
        assert state["eps"] is not None
        self.eps, self.average = state["eps"], state["average"]
