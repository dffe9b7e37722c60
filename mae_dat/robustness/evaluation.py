"""An evaluation: the plan of it measured and stored portion by portion, and its results put together.

Every rank goes through the same steps and gets the same results; rank 0 reads and writes the stored cells.
"""

import dataclasses
import datetime
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mae_dat.attacks.checks import CHECK_PASSES, attack_checks
from mae_dat.attacks.discrete import image_generator
from mae_dat.attacks.pixel import PIXEL_ATTACKS
from mae_dat.config.errors import ConfigError
from mae_dat.config.parse import command_line
from mae_dat.models.modes import evaluation_mode
from mae_dat.models.tokenizer.base import exact_float32
from mae_dat.robustness.cache import Kept, MeasurementCache
from mae_dat.robustness.examples import write_examples
from mae_dat.robustness.measure import Found, ImagePass, MonitoredNetwork, PassSampler, measure
from mae_dat.robustness.network import EvalOptions, EvaluatedNetwork
from mae_dat.robustness.plan import CHECKED_PICTURES, Plan, SuiteRun, open_plan, print_plan, refuse_normalised, sample
from mae_dat.robustness.report.comparison import headline_table
from mae_dat.robustness.report.findings import mixed_versions
from mae_dat.robustness.report.groups import groups_of, same_seed_pair
from mae_dat.robustness.report.metrics import GRADIENT_CHECKS
from mae_dat.robustness.report.summarize import summarize
from mae_dat.robustness.report.tables import precision_text
from mae_dat.robustness.report.write import write_report
from mae_dat.robustness.scores.results import (
    FORMAT,
    Results,
    TrainingFacts,
    VersionedCells,
    all_versions,
    write_results,
)
from mae_dat.robustness.suites.choose import AGREEMENT, AUTO_ATTACK, SuiteSettings
from mae_dat.runtime.collectives import on_all_ranks, on_main_rank
from mae_dat.runtime.console import Console
from mae_dat.runtime.machine import hardware_facts
from mae_dat.runtime.watchdog import heartbeat
from mae_dat.runtime.world import World

logger = logging.getLogger(__name__)

PASSES = {"fgsm-1/255": 4, "pgd-5-1/255": 16, "pgd-20-l2-0.5": 61, "words-symbolic": 40, "words-random": 8}
PASSES[AGREEMENT] = 4
"""Forward passes that an attacked picture takes, roughly: for the time left."""
CORRUPTION_PASSES = 10  # the same for a corruption at five severities, of a small network


@dataclasses.dataclass(frozen=True)
class EvaluationSetup:
    """Where and how to measure; none of it changes a count."""

    view: EvalOptions
    folder: Path | None
    """Where results, report and cells go."""
    console: Console
    world: World = World()  # noqa: RUF009 - immutable
    batch_size: int = 64
    num_workers: int = 0

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0:
            raise ConfigError(
                f"--batch_size {self.batch_size} --num_workers {self.num_workers}: give at least 1 picture, and 0 or "
                "more workers."
            )

    @functools.cached_property
    def store(self) -> MeasurementCache:
        """What was measured before."""
        return MeasurementCache(self.folder / "cells" if self.folder else None)


# ---- measuring ----


class Held(Found):
    """What was found for a network on a suite."""

    versions: dict[str, dict[str, str]]
    """That each cell was measured under."""


AllHeld = dict[tuple[str, str], Held]
"""By network and suite."""


def hold(plan: Plan, setting: EvaluationSetup) -> AllHeld:
    """Measures everything, or takes what is stored."""
    found: AllHeld = {}
    stages = {name: plan.of(name) for name in plan.names} | ({AGREEMENT: plan.agreements} if plan.agreements else {})
    setting.console.plan = {name: _cost(entries) for name, entries in stages.items()}
    for name, entries in stages.items():
        groups: dict[str, list[SuiteRun]] = {}
        for entry in entries:  # networks of the same input look at the same pictures, read once
            groups.setdefault(entry.suite.preprocessing, []).append(entry)
        for group in groups.values():
            _measure_group(group, found, setting)
        setting.console.end_stage(name)
    return found


def _cost(entries: Sequence[SuiteRun]) -> float:
    """Forward passes of a suite, roughly."""
    passes = 0
    for entry in entries:
        for portion in entry.suite.portions:
            each = PASSES.get(entry.suite.name, CORRUPTION_PASSES if portion.corruption else 1)
            passes += each * len(portion.pictures)
    return float(passes)


def _measure_group(group: Sequence[SuiteRun], found: AllHeld, setting: EvaluationSetup) -> None:
    suite, world = group[0].suite, setting.world

    def keys(at: int) -> dict[str, dict[str, Any] | None]:
        return {entry.contender.name: entry.key(suite.portions[at], suite.prints[at]) for entry in group}

    stored = on_main_rank(
        lambda: [{name: setting.store.read(key) for name, key in keys(at).items()} for at in range(len(suite.portions))]
    )
    todo = []
    for portion, known in zip(suite.portions, stored, strict=True):
        for name, old in known.items():
            if old is not None:
                _add(found, name, suite.name, old)
        if missing := [name for name, old in known.items() if old is None]:
            todo.append((portion, missing))
    if not todo:
        logger.info("%s: measured before", suite.name)
        return
    networks = {entry.contender.name: entry.contender.model for entry in group}
    shares = PassSampler([portion for portion, _ in todo], world, setting.batch_size)
    total = sum(len(batch) for at in range(len(todo)) for batch in shares.batches(at))
    passes = 0
    with setting.console.task(suite.name, total, "picture") as task:

        def progress(portion: ImagePass, count: int) -> None:
            nonlocal passes
            passes += count == 0
            cell = portion.corruption or portion.cells[0] if len(suite.portions) > 1 else ""
            task.advance(f"{passes:,} passes" if passes else cell, count)

        measured = measure(
            networks,
            todo,
            batch_size=setting.batch_size,
            num_workers=setting.num_workers,
            device=setting.view.device,
            precision=setting.view.precision,
            world=world,
            progress=progress,
        )
        versions = {entry.contender.name: entry.versions for entry in group}
        for portion, new in measured:
            kept = {name: Kept(one, versions[name]) for name, one in new.items()}
            on_main_rank(functools.partial(_store, setting.store, keys(suite.portions.index(portion)), kept))
            for name, one in kept.items():
                _add(found, name, suite.name, one)


def _store(store: MeasurementCache, keys: Mapping[str, dict[str, Any] | None], new: Mapping[str, Kept]) -> None:
    for name, one in new.items():
        store.write(keys[name], one)


def _add(found: AllHeld, network: str, suite: str, new: Kept) -> None:
    own = found.setdefault((network, suite), {"counts": {}, "calibration": {}, "versions": {}})
    own["counts"] |= new.found["counts"]
    own["calibration"] |= new.found["calibration"]
    own["versions"] |= dict.fromkeys(new.found["counts"], new.versions)


# ---- after ----


def check_attacks(plan: Plan, found: AllHeld, setting: EvaluationSetup) -> dict[str, dict[str, Any]]:
    """Whether the attacks can be believed, by network and attack; `found` learns under which versions that was seen.
    Every rank asks: a waiting one would seem to hang."""
    checks: dict[str, dict[str, Any]] = {}
    for contender in plan.contenders:
        own = {entry.suite.name: entry for entry in plan.entries if entry.contender is contender}
        if attacked := [own[name] for name in (*PIXEL_ATTACKS, AUTO_ATTACK) if name in own]:
            seen = _gradient_checks(attacked[0], setting)
            checks.setdefault(contender.name, {})[GRADIENT_CHECKS] = seen.found
            found[contender.name, GRADIENT_CHECKS] = {"counts": {}, "calibration": {}, "versions": {"": seen.versions}}
        curves = [found[contender.name, name]["counts"] for name in ("words-symbolic", "words-random") if name in own]
        if len(curves) == 2:
            symbolic, random = ([count["correct"] for count in curve.values()] for curve in curves)
            told = f"{symbolic[-1]} right at the largest share, {random[-1]} under random words"
            passed = all(one <= other for one, other in zip(symbolic, random, strict=True))
            check = {"name": "beats random words", "passed": passed, "told": told}
            checks.setdefault(contender.name, {})["words-symbolic"] = [check]
    return checks


def _gradient_checks(entry: SuiteRun, setting: EvaluationSetup) -> Kept:
    contender, portion = entry.contender, entry.suite.portions[0]
    key = entry.key(portion, entry.suite.prints[0])
    key = key and {**key, "cells": f"checks on {CHECKED_PICTURES} pictures"}
    kept = on_main_rank(lambda: setting.store.read(key))
    if kept is None:
        image, label = sample(portion, contender)
        generators = [image_generator(0, index) for index in range(len(image))]
        title = f"do gradients lead an attack on {contender.name}?"
        with evaluation_mode(contender.model), setting.console.task(title, CHECK_PASSES, "pass") as task:

            def hear() -> None:
                heartbeat()
                task.advance()

            network = MonitoredNetwork(contender.model, hear)
            found = [check.as_json() for check in attack_checks(network, image, label, generators)]
        kept = Kept(found, entry.versions)
        on_main_rank(functools.partial(setting.store.write, key, kept))
    return kept


def environments(found: AllHeld) -> list[VersionedCells]:
    """Which cells were measured under which versions."""
    every: list[VersionedCells] = []
    for (network, suite), own in found.items():
        for cell, told in own["versions"].items():
            same = (one for one in every if one["versions"] == told)
            if (under := next(same, None)) is None:
                every.append(under := VersionedCells(versions=told, cells={}))
            under["cells"].setdefault(network, {}).setdefault(suite, []).append(cell)
    return every


def assemble(plan: Plan, found: AllHeld, checks: dict[str, dict[str, Any]], title: str, seconds: float) -> Results:
    """The results, by network in the order of the command line and suite."""
    under = environments(found)
    results: Results = {
        "format": FORMAT,
        "title": title,
        "command": command_line(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "machine": hardware_facts(),
        "versions": all_versions(under),
        "measured_under": under,
        "models": {one.name: one.facts for one in plan.contenders},
        "suites": {one.name: {} for one in plan.contenders},
        "cells": {one.name: {} for one in plan.contenders},
        "calibration": {one.name: {} for one in plan.contenders},
        "checks": checks,
        "agreement": {
            entry.contender.name: found[entry.contender.name, AGREEMENT]["counts"][""] for entry in plan.agreements
        },
        "not_measured": plan.lacking,
        "examples": [],
    }
    for entry in plan.entries:
        name, suite = entry.contender.name, entry.suite
        own = found[name, suite.name]
        order = [cell for portion in suite.portions for cell in portion.cells]
        results["suites"][name][suite.name] = suite.facts
        results["cells"][name][suite.name] = {cell: own["counts"][cell] for cell in order}
        if own["calibration"]:
            results["calibration"][name][suite.name] = own["calibration"]
    return results


@exact_float32()
def run_evaluation(
    contenders: Sequence[EvaluatedNetwork],
    choice: SuiteSettings,
    asked: Sequence[str],
    setting: EvaluationSetup,
    title: str,
    training: TrainingFacts | None = None,
) -> Results:
    """Opens all suites, measures them, and with a folder writes results.json and the report; float32 is exact, whatever
    the process has set. Raises UserError, on all ranks."""
    folder = setting.folder
    for nameless in (one.name for one in contenders if folder and one.key is None):
        logger.warning("%s cannot be told from other networks: it is measured anew by every call.", nameless)
    start = datetime.datetime.now()
    plan = on_all_ranks(lambda: open_plan(contenders, choice, asked))
    on_all_ranks(lambda: refuse_normalised(plan))
    if setting.world.main:
        print_plan(plan)
    found = hold(plan, setting)
    every = on_all_ranks(lambda: check_attacks(plan, found, setting))
    checks = on_main_rank(lambda: every)
    results = assemble(plan, found, checks, title, (datetime.datetime.now() - start).total_seconds())
    for warning in mixed_versions(summarize(results)):
        logger.warning(warning)
    if training:
        results["training"] = training
    if folder:
        if pair := same_seed_pair(groups_of(results)):
            shown = on_all_ranks(lambda: write_examples(plan, pair, folder if setting.world.main else None))
            results["examples"] = on_main_rank(lambda: shown)
        on_main_rank(lambda: save(results, folder))
    return results


def save(results: Results, folder: Path) -> None:
    """Writes results.json and the report. Raises StorageError."""
    write_results(results, folder / "results.json")
    logger.info("wrote %s", write_report(results, folder))


def print_headline(results: Results) -> None:
    """The numbers in columns, below what they are not."""
    report = summarize(results)
    if report.image_subset and report.subset_of_all:
        print(f"Not the whole benchmarks: {report.image_subset} of every suite.")
    table = headline_table(report)
    rows = [table.head, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.head))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
    for model, title in report.model_titles.items():
        if model in report.agreement:
            print(f"{title}: {precision_text(report.models[model], report.agreement[model])}")
