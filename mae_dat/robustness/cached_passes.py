"""Split an evaluation plan into image passes, load the counts of those measured before, and measure the others.

`evaluation` calls `load_or_measure` with its plan; `measure` gets the passes that are not in the cache.
"""

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mae_dat.robustness.cache import CachedMeasurement, MeasurementCache
from mae_dat.robustness.counting import SuiteCounts
from mae_dat.robustness.evaluation_plan import EvaluationPlan, SuiteRun
from mae_dat.robustness.measure import PassSampler, Progress, measure_passes
from mae_dat.robustness.setup import EvaluationSetup
from mae_dat.robustness.suites.attacks import EXACT_LOSSES
from mae_dat.robustness.suites.base import ImagePass, Suite
from mae_dat.robustness.suites.specs import AGREEMENT, PASSES_OF_EXACT_LOSS, suite_spec
from mae_dat.runtime.collectives import on_main_rank
from mae_dat.runtime.console import Task

logger = logging.getLogger(__name__)

PlanCounts = dict[tuple[str, str], SuiteCounts]
"""By names of network and suite."""
AGREEMENT_FORWARD_PASSES = 4


def load_or_measure(plan: EvaluationPlan, setup: EvaluationSetup) -> PlanCounts:
    """Return the counts of every run of a plan, the same on all ranks. Raises UserError."""
    counts: PlanCounts = {}
    stages = {name: plan.runs_of(name) for name in plan.suite_names}
    if plan.agreement_runs:
        stages[AGREEMENT] = plan.agreement_runs
    setup.console.plan = {name: _forward_passes(runs) for name, runs in stages.items()}
    for name, runs in stages.items():
        groups: dict[str, list[SuiteRun]] = {}
        for run in runs:  # networks with the same preprocessing see the same pixels, which are read once
            groups.setdefault(run.suite.preprocessing, []).append(run)
        for group in groups.values():
            _measure_same_images(group, counts, setup)
        setup.console.end_stage(name)
    return counts


def _forward_passes(runs: Sequence[SuiteRun]) -> float:
    """Estimate the forward passes of a suite, for the time left."""
    total = 0
    for run in runs:
        name = run.suite.name
        per_image = AGREEMENT_FORWARD_PASSES if name == AGREEMENT else suite_spec(name).forward_passes
        per_image += PASSES_OF_EXACT_LOSS * int(run.suite.extra_protocol.get(EXACT_LOSSES) or 0)
        total += sum(per_image * len(image_pass.images) for image_pass in run.suite.passes)
    return float(total)


def _measure_same_images(runs: Sequence[SuiteRun], counts: PlanCounts, setup: EvaluationSetup) -> None:
    """Add the counts of networks that see the same images of a suite to `counts`."""
    suite = runs[0].suite
    for run in runs:
        counts[run.network.name, suite.name] = SuiteCounts()
    remaining = _load_cached(runs, counts, setup.cache)
    if not remaining:
        logger.info("%s: measured before", suite.name)
        return
    sampler = PassSampler([image_pass for image_pass, _ in remaining], setup.world, setup.batch_size)
    images_of_this_rank = sum(len(batch) for i in range(len(remaining)) for batch in sampler.batches(i))
    versions = {run.network.name: run.versions for run in runs}
    unit = "image x corruption" if any(image_pass.corruption for image_pass, _ in remaining) else "image"
    with setup.console.task(suite.name, images_of_this_rank, unit) as task:
        for image_pass, counts_by_network in measure_passes(
            {run.network.name: run.network.model for run in runs},
            remaining,
            batch_size=setup.batch_size,
            num_workers=setup.num_workers,
            device=setup.options.device,
            precision=setup.options.precision,
            world=setup.world,
            progress=_progress_on(task, suite),
        ):
            for name, pass_counts in counts_by_network.items():
                pass_counts.versions = dict.fromkeys(pass_counts.counts, versions[name])
                counts[name, suite.name].add(pass_counts)
            keys = _cache_keys(runs, suite.passes.index(image_pass))
            measurements = {
                name: CachedMeasurement(_as_json(pass_counts), versions[name])
                for name, pass_counts in counts_by_network.items()
            }
            on_main_rank(functools.partial(_write_to_cache, setup.cache, keys, measurements, image_pass))


def _cache_keys(runs: Sequence[SuiteRun], position: int) -> dict[str, dict[str, Any] | None]:
    """Return each network's cache key of a pass. The runs see the same images, so they share the fingerprint."""
    image_pass, fingerprint = runs[0].suite.passes[position], runs[0].suite.fingerprints[position]
    return {run.network.name: run.cache_key(image_pass, fingerprint) for run in runs}


def _load_cached(
    runs: Sequence[SuiteRun], counts: PlanCounts, cache: MeasurementCache
) -> list[tuple[ImagePass, list[str]]]:
    """Add cached counts to `counts`; return the other passes, each with the names of the networks to measure."""
    suite = runs[0].suite
    positions = range(len(suite.passes))
    cached = on_main_rank(
        lambda: [_read_cached(cache, _cache_keys(runs, position), suite.passes[position]) for position in positions]
    )
    remaining = []
    for image_pass, measurements in zip(suite.passes, cached, strict=True):
        for name, measurement in measurements.items():
            if measurement is not None:
                counts[name, suite.name].add(_from_json(measurement))
        if names := [name for name, measurement in measurements.items() if measurement is None]:
            remaining.append((image_pass, names))
    return remaining


def _as_json(counts: SuiteCounts) -> dict[str, Any]:
    content: dict[str, Any] = {"counts": counts.counts, "calibration": counts.calibration, "images": counts.images}
    if counts.reliability:
        content["reliability"] = counts.reliability
    return content if counts.classes is None else {**content, "classes": counts.classes}


def _from_json(measurement: CachedMeasurement) -> SuiteCounts:
    counts = measurement.value["counts"]
    return SuiteCounts(
        counts,
        calibration=measurement.value["calibration"],
        versions=dict.fromkeys(counts, measurement.versions),
        images=measurement.value.get("images", {}),  # an older release stored counts alone
        reliability=measurement.value.get("reliability", []),
        classes=measurement.value.get("classes"),
    )


def _read_cached(
    cache: MeasurementCache, keys: Mapping[str, dict[str, Any] | None], image_pass: ImagePass
) -> dict[str, CachedMeasurement | None]:
    """Return each network's measurement of a pass, None where there is none on the images as they are now."""
    if not any(cache.has(key) for key in keys.values()):
        return dict.fromkeys(keys)
    files = image_pass.files
    return {name: cache.read(key, files) for name, key in keys.items()}


def _write_to_cache(
    cache: MeasurementCache,
    keys: Mapping[str, dict[str, Any] | None],
    measurements: Mapping[str, CachedMeasurement],
    image_pass: ImagePass,
) -> None:
    if cache.folder is None:
        return
    files = image_pass.files
    for name, measurement in measurements.items():
        cache.write(keys[name], measurement, files)


def _progress_on(task: Task, suite: Suite) -> Progress:
    """Return a function that advances a progress line, which shows the corruption or the forward passes so far."""
    forward_passes = 0

    def progress(image_pass: ImagePass, images: int) -> None:
        nonlocal forward_passes
        forward_passes += images == 0
        cell = image_pass.corruption or image_pass.cells[0] if len(suite.passes) > 1 else ""
        task.advance(f"{forward_passes:,} passes" if forward_passes else cell, images)

    return progress
