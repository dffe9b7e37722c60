"""An evaluation from start to end: open the suites, measure them, check the attacks, write results and report.

From the flags to the counts, each module calls the one below:

    command, evaluate_run   flags (or a call from Python), networks and settings
    evaluation              run_evaluation: this file
    evaluation_plan         every suite of every network, opened and checked before any is measured
    cached_passes           the plan's image passes: counts from the cache, or measured now
    measure                 one pass: images through the networks
    counting                one network's predictions on a pass, counted on the device

Every rank takes the same steps and gets the same results; rank 0 alone reads and writes files.
"""

import datetime
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mae_dat.config.parse import command_line
from mae_dat.config.terminal import print_text
from mae_dat.models.tokenizer.base import exact_float32
from mae_dat.robustness.cached_passes import PlanCounts, load_or_measure
from mae_dat.robustness.checks import Checks, check_attacks, normalization_warnings, require_pixel_inputs
from mae_dat.robustness.describe import evaluation_inputs
from mae_dat.robustness.evaluation_plan import EvaluationPlan, log_plan, open_evaluation_plan
from mae_dat.robustness.examples import write_examples
from mae_dat.robustness.image_records import image_order, image_set_facts
from mae_dat.robustness.network import EvaluatedNetwork
from mae_dat.robustness.paired_counts import paired_counts
from mae_dat.robustness.report.findings import mixed_versions
from mae_dat.robustness.report.gate import GateLine
from mae_dat.robustness.report.groups import groups_of, same_seed_pair
from mae_dat.robustness.report.headline import headline_text
from mae_dat.robustness.report.summarize import ReportData, summarize
from mae_dat.robustness.report.write import write_report
from mae_dat.robustness.scores.class_counts import class_scores
from mae_dat.robustness.scores.collapse import collapsed_models
from mae_dat.robustness.scores.predictions import ImageSets
from mae_dat.robustness.scores.results import (
    FORMAT,
    Results,
    TrainingFacts,
    VersionedCells,
    all_versions,
    write_results,
)
from mae_dat.robustness.setup import EvaluationSetup
from mae_dat.robustness.suites.base import SuiteSettings
from mae_dat.robustness.suites.specs import AGREEMENT
from mae_dat.runtime.collectives import on_all_ranks, on_main_rank
from mae_dat.runtime.inputs import INPUTS_FILE
from mae_dat.runtime.machine import hardware_facts

logger = logging.getLogger(__name__)


@exact_float32()
def run_evaluation(
    networks: Sequence[EvaluatedNetwork],
    settings: SuiteSettings,
    requested: Sequence[str],
    setup: EvaluationSetup,
    title: str,
    training: TrainingFacts | None = None,
) -> Results:
    """Measure the requested suites on all networks; with `setup.folder`, write results.json and the report.

    float32 is exact, whatever the process has set. Raises UserError, on all ranks.
    """
    for network in networks:
        if setup.folder and network.key is None:
            logger.warning("%s cannot be distinguished from other models: every call measures it again.", network.name)
    start = datetime.datetime.now()
    plan = on_all_ranks(lambda: open_evaluation_plan(networks, settings, requested))
    on_all_ranks(lambda: require_pixel_inputs(plan))
    inputs = on_main_rank(lambda: _report_inputs(plan, setup))
    counts = load_or_measure(plan, setup)
    checks_of_this_rank = on_all_ranks(lambda: check_attacks(plan, counts, setup))
    checks = on_main_rank(lambda: checks_of_this_rank)
    seconds = (datetime.datetime.now() - start).total_seconds()
    command = setup.call or command_line()
    results = _assemble_results(plan, counts, checks, title=title, command=command, seconds=seconds)
    results["inputs"] = inputs
    if training:
        results["training"] = training
    if setup.folder:
        results["examples"] = _write_examples(plan, results, setup.folder, writes=setup.world.main)
    report = summarize(results)
    for warning in mixed_versions(report):
        logger.warning(warning)
    if setup.folder:
        _write_outputs(results, report, setup.folder)
    return results


def _report_inputs(plan: EvaluationPlan, setup: EvaluationSetup) -> dict[str, str]:
    """Log and store the summary of the inputs, unless the caller did, and return its rows. Raises UserError."""
    warnings = normalization_warnings(plan)
    for warning in warnings:
        logger.warning("%s", warning)
    if setup.inputs:
        log_plan(plan)
        return setup.inputs.as_json()["rows"]
    inputs = evaluation_inputs(plan, setup)
    inputs.add("check", *warnings)
    setup.console.report_inputs(inputs, setup.folder / INPUTS_FILE if setup.folder else None)
    return inputs.as_json()["rows"]


def _write_examples(plan: EvaluationPlan, results: Results, folder: Path, writes: bool) -> list[dict[str, Any]]:
    """Write images on which two models of the same seed differ, if there are such models. Raises StorageError.

    All ranks look for examples, otherwise the watchdog would end those that wait; rank 0 alone writes them.
    """
    pair = same_seed_pair(groups_of(results))
    if pair is None:
        return []
    examples = on_all_ranks(lambda: write_examples(plan, pair, folder if writes else None))
    return on_main_rank(lambda: examples)


def _write_outputs(results: Results, report: ReportData, folder: Path) -> None:
    """Write results.json and the report on rank 0. Raises StorageError, on all ranks."""

    def write() -> None:
        write_results(results, folder / "results.json")
        logger.info("wrote %s", write_report(report, folder))

    on_main_rank(write)


def _assemble_results(
    plan: EvaluationPlan, counts: PlanCounts, checks: Checks, *, title: str, command: str, seconds: float
) -> Results:
    """Return the content of results.json, by network in the order of the plan and by suite."""
    measured_under = _versioned_cells(counts)
    names = [network.name for network in plan.networks]
    results: Results = {
        "format": FORMAT,
        "title": title,
        "command": command,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "machine": hardware_facts(),
        "versions": all_versions(measured_under),
        "measured_under": measured_under,
        "models": {network.name: network.facts for network in plan.networks},
        "suites": {name: {} for name in names},
        "cells": {name: {} for name in names},
        "images": {name: {} for name in names},
        "classes": {name: {} for name in names},
        "calibration": {name: {} for name in names},
        "checks": checks,
        "agreement": {run.network.name: counts[run.network.name, AGREEMENT].counts[""] for run in plan.agreement_runs},
        "not_measured": plan.skipped,
        "examples": [],
    }
    for run in plan.runs:
        name, suite = run.network.name, run.suite
        suite_counts = counts[name, suite.name]
        cells = [cell for image_pass in suite.passes for cell in image_pass.cells]
        results["suites"][name][suite.name] = suite.facts
        results["cells"][name][suite.name] = {cell: suite_counts.counts[cell] for cell in cells}
        results["images"][name][suite.name] = {
            cell: suite_counts.images[cell] for cell in cells if cell in suite_counts.images
        }
        if suite_counts.classes:
            results["classes"][name][suite.name] = class_scores(suite_counts.classes)
        if suite_counts.reliability:
            results.setdefault("reliability", {}).setdefault(name, {})[suite.name] = suite_counts.reliability
        if suite_counts.calibration:
            results["calibration"][name][suite.name] = suite_counts.calibration
    results["image_sets"] = _image_sets(plan)
    results["paired"] = paired_counts(plan, counts)
    results["collapsed"] = collapsed_models(results["images"], results["cells"])
    return results


def _image_sets(plan: EvaluationPlan) -> ImageSets:
    """Return the images of every suite by their order; models of one evaluation have the same classes."""
    sets: ImageSets = {}
    for suite in (run.suite for run in plan.runs):
        by_order = sets.setdefault(suite.name, {})
        for images in (image_pass.images for image_pass in suite.passes):
            order = image_order(images)
            if order not in by_order:
                by_order[order] = image_set_facts(images)
    return sets


def _versioned_cells(counts: PlanCounts) -> list[VersionedCells]:
    """Group all cells by the versions they were measured with: cached ones may be older than this run."""
    groups: list[VersionedCells] = []
    for (network, suite), suite_counts in counts.items():
        for cell, versions in suite_counts.versions.items():
            group = next((group for group in groups if group["versions"] == versions), None)
            if group is None:
                group = VersionedCells(versions=versions, cells={})
                groups.append(group)
            group["cells"].setdefault(network, {}).setdefault(suite, []).append(cell)
    return groups


def print_headline(results: Results) -> None:
    """Print the headline numbers of an evaluation."""
    print_text(headline_text(summarize(results)))


def print_gate(lines: Sequence[GateLine]) -> None:
    """Print the verdict on every requirement."""
    print_text("")
    for line in lines:
        print_text(line)
