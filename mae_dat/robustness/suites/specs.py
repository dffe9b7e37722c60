"""The table of suites: for each, its title, what it requires, and the function that builds it for a network.

A suite is a benchmark's stored images, or is made from the clean images: corrupted, attacked, or with changed words.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np

from mae_dat.attacks.pixel import PIXEL_ATTACKS
from mae_dat.config.errors import DataError, InputSizeError
from mae_dat.robustness.corruptions import CORRUPTIONS, EXTRA, REVISION, SEVERITIES, SOURCE, STORED_QUALITY, check_image
from mae_dat.robustness.suites.attacks import (
    AUTO_ATTACK,
    build_auto_attack,
    build_pixel_attack,
    build_word_attack,
    clean_images,
    index_note,
)
from mae_dat.robustness.suites.base import CLEAN, CONFLICT, GENERATED, ImagePass, NetworkInput, Suite
from mae_dat.robustness.suites.catalogue import BENCHMARKS
from mae_dat.robustness.suites.functions import ImageFunction
from mae_dat.robustness.suites.sets import BenchmarkSet
from mae_dat.robustness.suites.sources import SuiteSources

PASSES_OF_EXACT_LOSS = 4
"""Forward passes of an image for each exact loss of `words-symbolic`: ten steps, fewer where they succeed before."""
AGREEMENT, AGREEMENT_IMAGES = "bf16 against fp32", 10_000
BuildSuite = Callable[[SuiteSources, str, str, NetworkInput], Suite]
"""(sources, name, title, network_input) to the suite for a network with this input."""


def build_benchmark(sources: SuiteSources, name: str, title: str, network_input: NetworkInput) -> Suite:
    """Build the suite of a published benchmark: its stored images, counted in one cell each or one per corruption."""
    sets = sources.limited_sets(name, corrupted=bool(BENCHMARKS[name].corruptions))
    return _stored_suite(name, title, sets, network_input)


def build_custom(sources: SuiteSources, name: str, title: str, network_input: NetworkInput) -> Suite:
    """Build the suite of custom classes, `clean` (val/CLASS) or `conflict`."""
    return _stored_suite(name, title, sources.limited_sets(name), network_input)


def _stored_suite(name: str, title: str, sets: list[BenchmarkSet], network_input: NetworkInput) -> Suite:
    passes = tuple(_stored_pass(images.for_input(*network_input)) for images in sets)
    return Suite(name, title, passes, official=name != CONFLICT)


def _stored_pass(images: BenchmarkSet) -> ImagePass:
    """Return a pass over stored images. Confidences are also measured if exactly one class is correct, but not on the
    75 cells of corruptions, whose calibration is not usually reported."""
    corruption, severity = images.cell.corruption, images.cell.severity
    one_label = images.targets.shape[1] == 1 and not images.class_mapping.has_cues
    cell = f"{corruption}/{severity}" if corruption else ""
    return ImagePass(images, (cell,), calibrated=one_label and not corruption)


def build_generated(sources: SuiteSources, name: str, title: str, network_input: NetworkInput) -> Suite:
    """Build the suite of corruptions made from the clean images: a pass for each corruption, a cell for each severity.

    Raises InputSizeError for inputs that are too small for the corruptions.
    """
    images = clean_images(sources, network_input, name)
    settings = sources.settings
    try:
        check_image(np.zeros((*network_input.size_HW, 3), np.uint8))
    except DataError as error:
        raise InputSizeError(str(error)) from error
    passes = tuple(
        ImagePass(
            images,
            cells=tuple(f"{corruption}/{severity}" for severity in SEVERITIES),
            corruption=corruption,
            severities=SEVERITIES,
            seed=settings.seed,
        )
        for corruption in CORRUPTIONS + (EXTRA if settings.extra_corruptions else ())
    )
    protocol = {
        "corruptions": SOURCE,
        "revision of the corruptions": REVISION,
        "stored as": f"JPEG {STORED_QUALITY}",
        "seed": str(settings.seed),
    }
    return Suite(name, title, passes, official=False, extra_protocol={**protocol, **index_note(sources)})


def build_agreement(sources: SuiteSources, measured: Suite) -> Suite:
    """Build the check of how often a network makes the same prediction in bfloat16 and float32, on stored images."""
    seed = sources.settings.seed
    images = measured.passes[0].images.limited(AGREEMENT_IMAGES, seed).named(AGREEMENT)
    image_pass = ImagePass(images, compare_with_float32=True)
    return Suite(AGREEMENT, "bf16 as fp32", (image_pass,), official=False, extra_protocol={"seed": str(seed)})


def build_shift(sources: SuiteSources, name: str, title: str, network_input: NetworkInput) -> Suite:
    """Build a suite of the user's own: a function on the clean images, or shifted images in a folder or CSV file."""
    source = next(shift.source for shift in sources.settings.shifts if shift.name == name)
    if isinstance(source, ImageFunction):
        images = clean_images(sources, network_input, name)
        image_pass = ImagePass(images, function=source, seed=sources.settings.seed)
        protocol = {**source.protocol, "seed": str(sources.settings.seed), **index_note(sources)}
        return Suite(name, name, (image_pass,), official=False, extra_protocol=protocol)
    passes = tuple(
        ImagePass(images.for_input(*network_input), (cell,))
        for images, cell in zip(sources.limited_sets(name), sources.shift_cells(name), strict=True)
    )
    return Suite(name, name, passes, official=False)


class SuiteSpec(NamedTuple):
    """Facts about a suite that are known before any image is opened."""

    title: str
    kind: Literal["benchmark", "custom", "derived", "own"]
    """A published benchmark; custom classes in val/CLASS and conflict/; made from the clean images; or a shift of the
    user's own."""
    build: BuildSuite
    forward_passes: int = 1
    """Rough number for one image, to estimate the time left; for generated corruptions with the cost of making them."""
    needs_gradients: bool = False
    by_name_only: str = ""
    """Reason why `--suite all` does not include it."""


SUITES: dict[str, SuiteSpec] = {
    **{name: SuiteSpec(benchmark.title, "benchmark", build_benchmark) for name, benchmark in BENCHMARKS.items()},
    CLEAN: SuiteSpec("Clean", "custom", build_custom),
    CONFLICT: SuiteSpec("Cue conflict", "custom", build_custom),
    GENERATED: SuiteSpec("Generated corruptions", "derived", build_generated, forward_passes=10),
    "fgsm-1/255": SuiteSpec("FGSM, 1/255", "derived", build_pixel_attack, forward_passes=4, needs_gradients=True),
    "pgd-5-1/255": SuiteSpec(
        "PGD, 5 steps, 1/255", "derived", build_pixel_attack, forward_passes=16, needs_gradients=True
    ),
    "pgd-20-l2-0.5": SuiteSpec(
        "PGD, 20 steps, L2 0.5", "derived", build_pixel_attack, forward_passes=61, needs_gradients=True
    ),
    AUTO_ATTACK: SuiteSpec(
        "AutoAttack, 4/255",
        "derived",
        build_auto_attack,
        needs_gradients=True,
        by_name_only="takes thousands of passes per image: name it, with --limit or --subset",
    ),
    "words-random": SuiteSpec("Random words", "derived", build_word_attack, forward_passes=8),
    "words-symbolic": SuiteSpec(
        "Symbolic adversary", "derived", build_word_attack, forward_passes=40, needs_gradients=True
    ),
}
assert set(PIXEL_ATTACKS) <= set(SUITES)
_OWN = SuiteSpec("", "own", build_shift)


def suite_spec(name: str) -> SuiteSpec:
    """Return the facts of a suite; those of a shift of the user's own for any other name."""
    return SUITES.get(name, _OWN)


def build_suite(name: str, sources: SuiteSources, network_input: NetworkInput) -> Suite:
    """Build a suite for a network with this input.

    Raises UserError for missing or invalid images, InputSizeError if it cannot be made at this size.
    """
    spec = suite_spec(name)
    return spec.build(sources, name, spec.title, network_input)
