"""What an evaluation will measure: all suites of all networks, opened and checked before any is measured.

`evaluation` opens the plan, and `cached_passes` measures it.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from mae_dat.config.errors import ConfigError, InputSizeError
from mae_dat.data.decode import decoding_settings
from mae_dat.robustness.network import EvaluatedNetwork
from mae_dat.robustness.suites.base import CLEAN, ImagePass, NetworkInput, Suite, SuiteSettings
from mae_dat.robustness.suites.catalogue import BENCHMARKS
from mae_dat.robustness.suites.choose import NOT_REQUESTED, choose_suites
from mae_dat.robustness.suites.sources import SuiteSources
from mae_dat.robustness.suites.specs import build_agreement, build_suite, suite_spec
from mae_dat.runtime.environment import dependency_versions, installed_version, toolkit_version

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class SuiteRun:
    """One suite on one network."""

    network: EvaluatedNetwork
    suite: Suite

    @property
    def versions(self) -> dict[str, str]:
        """The versions of everything that measures it now."""
        packages = {name: installed_version(name) for name in self.suite.packages}
        return {**toolkit_version(), **dependency_versions(), **packages, **self.network.versions}

    def cache_key(self, image_pass: ImagePass, fingerprint: str) -> dict[str, Any] | None:
        """Return what a pass's counts are cached under; None if nothing distinguishes the network from others, or for a
        function, whose code may have changed anywhere."""
        if self.network.key is None or image_pass.function is not None:
            return None
        return {
            "network": self.network.key,
            "protocol": {**image_pass.images.protocol, **self.suite.extra_protocol, **decoding_settings()},
            "suite": self.suite.name,
            "cells": image_pass.cells,
            "fingerprint": fingerprint,
        }


@dataclasses.dataclass(frozen=True)
class EvaluationPlan:
    """What will be measured, all of it opened, and why the rest is skipped."""

    networks: list[EvaluatedNetwork]
    runs: list[SuiteRun]
    """Suite by suite."""
    skipped: dict[str, str]
    """Suites that are not measured, or not for some networks, and why."""
    sources: SuiteSources
    agreement_runs: list[SuiteRun] = dataclasses.field(default_factory=list)
    """Runs of the networks in bfloat16 that count how often they predict as in float32, on their first suite of stored
    images."""

    @property
    def suite_names(self) -> list[str]:
        """The suites, in order."""
        return list(dict.fromkeys(run.suite.name for run in self.runs))

    def runs_of(self, suite: str) -> list[SuiteRun]:
        """Return a suite's runs, one for each network."""
        return [run for run in self.runs if run.suite.name == suite]


def open_evaluation_plan(
    networks: Sequence[EvaluatedNetwork], settings: SuiteSettings, requested: Sequence[str]
) -> EvaluationPlan:
    """Open every requested suite for every network.

    A suite that cannot be built at a network's size is skipped if `all` was requested. Raises UserError for whatever is
    wrong with the images, the networks, or the two together.
    """
    if settings.classes:
        networks = [dataclasses.replace(network, classes=settings.classes) for network in networks]
    _require_same_classes(networks)
    classes = next((network.classes for network in networks if network.classes), None)
    sources = SuiteSources(settings, networks[0].outputs, classes)
    names, skipped = choose_suites(requested, sources)
    runs: list[SuiteRun] = []
    for name in names:
        reasons: list[str] = []
        for network in networks:
            if suite_spec(name).needs_gradients and not network.differentiable:
                reasons.append(f"{network.name} gives no gradient")
                continue
            facts = network.facts
            protocol = facts.get("protocol", "native")
            network_input = NetworkInput(network.size, facts["interpolation"], facts.get("crop"), protocol)
            try:
                runs.append(SuiteRun(network, build_suite(name, sources, network_input)))
            except InputSizeError as error:
                if name in requested:
                    raise
                reasons.append(f"{network.name}: {error}")
        if reasons:
            skipped[name] = "; ".join(reasons)
    if not runs:
        reasons_by_suite = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise ConfigError(f"nothing can be measured: {reasons_by_suite}.")
    return EvaluationPlan(
        networks=list(networks),
        runs=runs,
        skipped=skipped,
        sources=sources,
        agreement_runs=_agreement_runs(runs, sources),
    )


def _require_same_classes(networks: Sequence[EvaluatedNetwork]) -> None:
    """Raise ConfigError unless all networks have the same outputs, as far as their classes are known."""
    first = networks[0]
    for other in networks[1:]:
        if other.outputs != first.outputs or (other.classes or first.classes) != (first.classes or other.classes):
            raise ConfigError(
                f"{first.name} ({first.outputs} outputs) and {other.name} ({other.outputs}) do not have the same "
                "classes: evaluate them one by one."
            )


def _agreement_runs(runs: Sequence[SuiteRun], sources: SuiteSources) -> list[SuiteRun]:
    stored = [run for run in runs if run.suite.name in (*BENCHMARKS, CLEAN)]
    first_of_network = {run.network.name: run for run in reversed(stored) if run.network.facts["precision"] == "bf16"}
    return [SuiteRun(run.network, build_agreement(sources, run.suite)) for run in first_of_network.values()]


def log_plan(plan: EvaluationPlan) -> None:
    """Log what will be measured, and which of the requested suites are skipped for which reason."""
    width = max(map(len, plan.suite_names))
    for name in plan.suite_names:
        suite = plan.runs_of(name)[0].suite
        cells = sum(len(image_pass.cells) for image_pass in suite.passes)
        times = f"{cells} x " if cells > 1 else ""
        partial = f", partial: {'; '.join(suite.missing)}" if suite.missing else ""
        logger.info("%-*s  %s%s images%s", width, name, times, f"{suite.image_count:,}", partial)
    suites_of_reason: dict[str, list[str]] = {}
    for name, reason in plan.skipped.items():
        if reason == NOT_REQUESTED:
            continue
        suites_of_reason.setdefault(reason, []).append(name)
    for reason, names in suites_of_reason.items():
        logger.info("not measured: %s: %s", ", ".join(names), reason)
