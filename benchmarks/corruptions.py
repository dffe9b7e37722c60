"""Corrupted images a second on one core against `imagecorruptions` (row 8 of the goals).

Both corrupt the same generated image of 224 px at all five severities; processor time is counted, so that other
programs on the machine matter little.
"""

import io
import time
from collections.abc import Callable, Sequence
from functools import partial

import cv2
import numpy as np
import torch
from PIL import Image

from benchmarks.timing import Case, Step
from mae_dat.data.generated.draw import draw_image
from mae_dat.robustness.corruptions import CORRUPTIONS, EXTRA, SEVERITIES, STORED_QUALITY, as_stored, corrupt_image

GOAL = 5.0  # times as fast over the 15 together
Corrupt = Callable[[np.ndarray, str, int], object]


def ours(image: np.ndarray, name: str, severity: int) -> np.ndarray:
    """Ours, with the name first and a seed."""
    return corrupt_image(image, name, severity, 0)


def theirs(image: np.ndarray, name: str, severity: int) -> np.ndarray:
    """Imported late: it takes seconds and needs numba."""
    from imagecorruptions import corrupt as their_corrupt

    return their_corrupt(image, severity, name)


def stored(act: Corrupt, image: np.ndarray, name: str, severity: int) -> object:
    """With the round trip through JPEG that ImageNet-C has gone through, which is Pillow's in both."""
    return as_stored(act(image, name, severity))  # type: ignore[arg-type]


def encoded(act: Corrupt, image: np.ndarray, name: str, severity: int) -> bytes:
    """With the file that `mae-dat corrupt` writes, which Pillow encodes in both."""
    file = io.BytesIO()
    Image.fromarray(act(image, name, severity)).save(file, "JPEG", quality=STORED_QUALITY)  # type: ignore[arg-type]
    return file.getvalue()


def builder(act: Corrupt, names: Sequence[str]) -> Step:
    """One image through the corruptions `names`; a step returns its processor time."""
    cv2.setNumThreads(1)
    image = draw_image(0, "val", 0, size=224).image
    for name in names:
        act(image, name, 1)  # tables are built, numba compiles

    def step() -> float:
        start = time.process_time()
        for name in names:
            for severity in SEVERITIES:
                act(image, name, severity)
        return time.process_time() - start

    return step


def case(what: str, names: Sequence[str], first: Corrupt = ours, second: Corrupt = theirs, **more: object) -> Case:
    """Ours against theirs over some corruptions and all severities."""
    build = partial(builder, first, names), partial(builder, second, names)
    shared = {"batch": len(names) * len(SEVERITIES), "returns_seconds": True, "in_process": False}
    return Case(what, *build, "imagecorruptions", **shared, **more)  # type: ignore[arg-type]


def cases(quick: bool, device: torch.device) -> list[Case]:
    """The 15 together, without and with the JPEG they are stored in; without `quick` each alone."""
    both = partial(stored, ours), partial(stored, theirs)
    files = partial(encoded, ours), partial(encoded, theirs)
    found = [
        case("the 15 corruptions", CORRUPTIONS, goal=8, at_least=GOAL),
        case("the 15 corruptions, stored as JPEG", CORRUPTIONS, *both),
        case("the 15 corruptions, written as JPEG files", CORRUPTIONS, *files, at_least=GOAL),
    ]
    return found if quick else [*found, *(case(name, [name]) for name in CORRUPTIONS + EXTRA)]
