"""Checks of the networks themselves: do they take pixels in [0, 1], and can the attacks on them be believed?"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from mae_dat.attacks.checks import CHECK_PASSES, MAX_PROBES, PROBE_SIZE, Check, attack_checks, require_pixel_model
from mae_dat.attacks.discrete import image_generator
from mae_dat.attacks.normalization import CHECKED_INPUTS, better_normalization
from mae_dat.attacks.pixel import PIXEL_ATTACKS
from mae_dat.data.sampler import evenly_spaced
from mae_dat.models.modes import evaluation_mode
from mae_dat.robustness.cache import CachedMeasurement
from mae_dat.robustness.cached_passes import PlanCounts
from mae_dat.robustness.counting import SuiteCounts
from mae_dat.robustness.evaluation_plan import EvaluationPlan, SuiteRun
from mae_dat.robustness.measure import MonitoredNetwork
from mae_dat.robustness.network import EvaluatedNetwork
from mae_dat.robustness.report.metrics import GRADIENT_CHECKS
from mae_dat.robustness.setup import EvaluationSetup
from mae_dat.robustness.suites.attacks import AUTO_ATTACK
from mae_dat.robustness.suites.base import ImagePass
from mae_dat.robustness.suites.sets import BenchmarkSet
from mae_dat.runtime.collectives import on_main_rank
from mae_dat.runtime.watchdog import heartbeat

CHECKED_IMAGES = 64
Checks = dict[str, dict[str, list[dict[str, Any]]]]
"""By network and attack, as in results.json."""


def require_pixel_inputs(plan: EvaluationPlan) -> None:
    """Raise ConfigError for a network that takes normalized images, or pixels up to 255, where its predictions on up to
    1024 images of its first suite show it."""
    first_run = {run.network.name: run for run in reversed(plan.runs)}
    for network in plan.networks:
        if network.facts["normalization"] == "inside" and network.name in first_run:
            image_pass = first_run[network.name].suite.passes[0]
            with torch.no_grad(), evaluation_mode(network.model):
                require_pixel_model(network.model, _probes(image_pass, network.device))


def _probes(image_pass: ImagePass, device: torch.device) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    """Yield images (B, 3, H, W) and a function from their logits (B, K) to bool (B,), whether they are correct."""
    images = image_pass.images
    mapping = images.class_mapping.to(device)
    selected = evenly_spaced(len(images), PROBE_SIZE * MAX_PROBES)
    probes = -(-len(selected) // PROBE_SIZE)
    for start in range(probes):
        indices = selected[start::probes]  # every probe is spread over all classes
        index = torch.tensor(indices)

        def is_correct(logits: Tensor, index: Tensor = index) -> Tensor:
            return images.is_correct(mapping.predictions(logits), index)

        yield torch.stack([images[i]["image"] for i in indices]).to(device), is_correct


def normalization_warnings(plan: EvaluationPlan) -> list[str]:
    """Return a warning for each network that classifies more images of its first suite correctly under another usual
    normalization, beyond chance."""
    first_run = {run.network.name: run for run in reversed(plan.runs)}
    runs = [first_run[network.name] for network in plan.networks if network.name in first_run]
    return [*filter(None, (normalization_warning(run.network, run.suite.passes[0].images) for run in runs))]


def normalization_warning(network: EvaluatedNetwork, images: BenchmarkSet) -> str | None:
    """Return a warning if a network classifies more of a hundred images correctly under another usual normalization,
    beyond chance. Networks whose file records the normalization are not checked."""
    if network.normalization_is_known:
        return None
    mapping = images.class_mapping.to(network.device)
    index = torch.tensor(evenly_spaced(len(images), CHECKED_INPUTS))
    pixels = torch.stack([images[i]["image"] for i in index.tolist()]).to(network.device)

    def is_correct(logits: Tensor) -> Tensor:
        return images.is_correct(mapping.predictions(logits), index)

    return better_normalization(network.name, network.model, pixels, is_correct)


def check_attacks(plan: EvaluationPlan, counts: PlanCounts, setup: EvaluationSetup) -> Checks:
    """Check whether the results of the attacks can be believed, by network and attack.

    The versions of the gradient checks are added to `counts`. Every rank computes them, otherwise the watchdog
    would end those that wait.
    """
    checks: Checks = {}
    for network in plan.networks:
        runs = {run.suite.name: run for run in plan.runs if run.network is network}
        if attacks := [runs[name] for name in (*PIXEL_ATTACKS, AUTO_ATTACK) if name in runs]:
            measurement = _gradient_checks(attacks[0], setup)
            checks.setdefault(network.name, {})[GRADIENT_CHECKS] = measurement.value
            counts[network.name, GRADIENT_CHECKS] = SuiteCounts(versions={"": measurement.versions})
        if "words-symbolic" in runs and "words-random" in runs:
            check = _compare_with_random_words(
                counts[network.name, "words-symbolic"], counts[network.name, "words-random"]
            )
            checks.setdefault(network.name, {})["words-symbolic"] = [check.as_json()]
    return checks


def _compare_with_random_words(symbolic_counts: SuiteCounts, random_counts: SuiteCounts) -> Check:
    """Check that chosen words are never weaker than random ones, at any share."""
    symbolic = [count["correct"] for count in symbolic_counts.counts.values()]
    with_random_words = [count["correct"] for count in random_counts.counts.values()]
    details = f"{symbolic[-1]} right at the largest share, {with_random_words[-1]} under random words"
    passed = all(a <= b for a, b in zip(symbolic, with_random_words, strict=True))
    return Check("beats random words", passed, details)


def _gradient_checks(run: SuiteRun, setup: EvaluationSetup) -> CachedMeasurement:
    """Return the gradient checks of a network, cached or computed on images of an attack's suite."""
    image_pass = run.suite.passes[0]
    key = run.cache_key(image_pass, run.suite.fingerprints[0])
    key = key and {**key, "cells": f"checks on {CHECKED_IMAGES} pictures"}
    measurement = on_main_rank(lambda: setup.cache.read(key, image_pass.files))
    if measurement is None:
        measurement = CachedMeasurement(_compute_gradient_checks(run, setup), run.versions)
        on_main_rank(functools.partial(setup.cache.write, key, measurement, image_pass.files))
    return measurement


def _compute_gradient_checks(run: SuiteRun, setup: EvaluationSetup) -> list[dict[str, Any]]:
    network, images = run.network, run.suite.passes[0].images
    samples = [images[index] for index in evenly_spaced(len(images), CHECKED_IMAGES)]
    image = torch.stack([sample["image"] for sample in samples]).to(network.device)
    label = torch.tensor([sample["label"] for sample in samples]).to(network.device)
    generators = [image_generator(0, index) for index in range(len(image))]
    title = f"do gradients lead an attack on {network.name}?"
    with evaluation_mode(network.model), setup.console.task(title, CHECK_PASSES, "pass") as task:

        def report() -> None:
            heartbeat()
            task.advance()

        checks = attack_checks(MonitoredNetwork(network.model, report), image, label, generators)
    return [check.as_json() for check in checks]
