"""The bins of a reliability diagram, as results.json holds them. Needs no torch."""

from typing import TypedDict


class ReliabilityBin(TypedDict):
    """The images whose confidence is in one bin of the expected calibration error."""

    images: int
    correct: int
    """Correct predictions."""
    confidence: float
    """Mean confidence, 0 to 1."""


ReliabilityBins = dict[str, dict[str, list[ReliabilityBin]]]
"""By model and suite."""
