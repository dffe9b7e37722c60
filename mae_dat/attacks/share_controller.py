"""Hold the share of changed visual words at a target by adjusting an attack's strength."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace

from mae_dat.config.groups import PUBLISHED_EPS, AttackConfig

logger = logging.getLogger(__name__)


class ShareController:
    """Holds the share of changed words at a target by adjusting eps, which does not carry over between sizes and
    tokenizers.

    The strength is found on the first batch, then followed: log eps moves by a small part of the log ratio of target
    and running share, and by half of it while the share is off by more than a factor of 2 (`paper` in the first steps,
    where a gradient that is not normalized grows a thousandfold with the classification head).
    """

    GAIN, FAST_GAIN = 0.05, 0.5
    SMOOTHING = 0.9
    LARGEST = 1e12  # without any gradient no strength is enough: infinity times zero would end as NaN pixels
    DOUBLINGS, LEAPS, BISECTIONS = 12, 7, 6  # by 1.1e12 in all; a leap of 16 is bisected to 1.04

    def __init__(self, config: AttackConfig) -> None:
        assert config.share is not None
        self.target = config.share
        self.eps = PUBLISHED_EPS if math.isnan(config.eps) else config.eps
        self.average: float | None = None

    def apply(self, config: AttackConfig) -> AttackConfig:
        """The attack with the strength of now."""
        return replace(config, eps=self.eps)

    def find(self, share_at: Callable[[float], float]) -> None:
        """Searches eps on a first batch: goes up or down until the target is bracketed, then bisects in log eps.

        Out of reach, it warns, and eps is the smallest of those that come nearest.
        """
        tried = {self.eps: share_at(self.eps)}
        up = tried[self.eps] < self.target
        last = self.eps
        for factor in (2.0,) * self.DOUBLINGS + (16.0,) * self.LEAPS:
            last, before = last * factor if up else last / factor, last
            tried[last] = share_at(last)
            if (tried[last] < self.target) != up:
                break
        else:
            self.eps = min(tried, key=lambda eps: (abs(tried[eps] - self.target), eps))
            logger.warning(
                "no strength from eps %.3g to %.3g changes %.1f %% of the words; eps %.3g comes nearest, with %.2f %%. "
                "A loss without gradient, as of a network that is still constant, is followed once it has one; "
                "otherwise give another --dat_share.",
                min(tried),
                max(tried),
                100 * self.target,
                self.eps,
                100 * tried[self.eps],
            )
            return
        low, high = sorted((before, last))
        for _ in range(self.BISECTIONS):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if share_at(middle) < self.target else (low, middle)
        self.eps = (low * high) ** 0.5

    def observe(self, share: float) -> None:
        """Follows the share measured in a step."""
        near = self.target / 2 <= share <= 2 * self.target
        if self.average is None or not near:
            self.average = share
        self.average = self.SMOOTHING * self.average + (1 - self.SMOOTHING) * share
        ratio = min(max(self.target / max(self.average, self.target / 4), 0.25), 4.0)
        self.eps = min(self.eps * ratio ** (self.GAIN if near else self.FAST_GAIN), self.LARGEST)

    def state_dict(self) -> dict[str, float | None]:
        """For a checkpoint."""
        return {"eps": self.eps, "average": self.average}

    def load_state_dict(self, state: dict[str, float | None]) -> None:
        """From a checkpoint."""
        assert state["eps"] is not None
        self.eps, self.average = state["eps"], state["average"]
