"""Corrupted pictures a second on one core, ours against `imagecorruptions`: `python benchmarks/corruptions.py`.

Both corrupt the same generated pictures at all five severities, in turns and on one thread; processor time is counted,
so that other programs on the machine matter little. A corruption's time is its mean over pictures and severities; the
last lines tell the time of all 15 together, without and with the JPEG that ImageNet-C is stored in.
"""

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from imagecorruptions import corrupt as their_corrupt

from mae_dat.corruptions import CORRUPTIONS, EXTRA, SEVERITIES, as_stored, corrupt
from mae_dat.generated import draw

GOAL = 5.0  # times as fast over the 15 together
logger = logging.getLogger("benchmarks.corruptions")

Seconds = tuple[float, float]  # ours, theirs


def seconds_of(work: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def one_picture(image: np.ndarray, seed: int) -> dict[str, Seconds]:
    """Mean seconds of every corruption over the severities, both versions in turns."""
    found = {}
    for name in CORRUPTIONS + EXTRA:
        turns = [
            (
                seconds_of(lambda name=name, severity=severity: corrupt(image, name, severity, seed)),
                seconds_of(lambda name=name, severity=severity: their_corrupt(image, severity, name)),
            )
            for severity in SEVERITIES
        ]
        ours, theirs = zip(*turns, strict=True)
        found[name] = statistics.mean(ours), statistics.mean(theirs)
    return found


def print_table(rounds: list[dict[str, Seconds]], stored: float) -> float:
    """Images a second, medians over the pictures; returns the ratio over the 15 together."""
    print(f"{'images a second and core':26}{'ours':>8}{'imagecorruptions':>18}{'ratio':>8}")
    for name in CORRUPTIONS + EXTRA:
        ours, theirs = (statistics.median(found[name][i] for found in rounds) for i in (0, 1))
        print(f"{name:26}{1 / ours:8.0f}{1 / theirs:18.0f}{theirs / ours:8.1f}")
    totals = [[sum(found[name][i] for name in CORRUPTIONS) / len(CORRUPTIONS) for found in rounds] for i in (0, 1)]
    ours, theirs = map(statistics.median, totals)
    ratios = sorted(other / own for own, other in zip(*totals, strict=True))
    spread = f"  ({ratios[len(ratios) // 4]:.1f} to {ratios[-len(ratios) // 4]:.1f})"
    print(f"{'the 15 together':26}{1 / ours:8.0f}{1 / theirs:18.0f}{statistics.median(ratios):8.1f}{spread}")
    both = (theirs + stored) / (ours + stored)
    print(f"{'the 15, stored as JPEG':26}{1 / (ours + stored):8.0f}{1 / (theirs + stored):18.0f}{both:8.1f}")
    return statistics.median(ratios)


def main() -> None:
    """Prints the table; exit code 1 below the goal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8, help="how many pictures")
    parser.add_argument("--size", type=int, default=224, help="their height and width in px")
    parser.add_argument("--output", type=Path, help="write the numbers as JSON to this file")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    cv2.setNumThreads(1)
    images = [draw(0, "val", index, size=arguments.size).image for index in range(arguments.images)]
    one_picture(images[0], seed=0)  # tables are built, numba compiles
    rounds = [one_picture(image, seed) for seed, image in enumerate(images)]
    stored = statistics.median(seconds_of(lambda image=image: as_stored(image)) for image in images)
    ratio = print_table(rounds, stored)
    if arguments.output:
        arguments.output.write_text(json.dumps({"seconds": rounds, "stored": stored, "ratio": ratio}, indent=1) + "\n")
    if ratio < GOAL:
        logger.error("%.1f times as fast as imagecorruptions over the 15 together; the goal is %.0f", ratio, GOAL)
        sys.exit(1)


if __name__ == "__main__":
    main()
