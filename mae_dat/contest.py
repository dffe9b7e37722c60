"""All suites of all contenders: opened first, then measured and stored portion by portion, and put together.

Every rank goes through the same steps and gets the same results; rank 0 reads and writes the stored cells.
"""

import dataclasses
import datetime
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_dat.attack import image_generator
from mae_dat.cells import Found, Portion, eval_mode, measure
from mae_dat.comparison import headline_table
from mae_dat.config import ConfigError, command_line
from mae_dat.contenders import Contender, View
from mae_dat.distributed import World, from_main, together
from mae_dat.machine import machine, versions
from mae_dat.metrics import Console
from mae_dat.pixel_attacks import PIXEL_ATTACKS, attack_checks, require_pixel_model
from mae_dat.results import FORMAT, Results, write_results
from mae_dat.scorecard import write_report
from mae_dat.stored_cells import StoredCells
from mae_dat.suites import NEED_GRADIENTS, Battery, Choice, Suite

logger = logging.getLogger(__name__)

CHECKED_PICTURES = 64
PASSES = {"fgsm-1/255": 4, "pgd-5-1/255": 16, "pgd-20-l2-0.5": 61, "words-symbolic": 40, "words-random": 8}
"""Forward passes that an attacked picture takes, roughly: for the time left."""
CORRUPTION_PASSES = 10  # the same for a corruption at five severities, of a small network


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where and how to measure; none of it changes a count."""

    view: View
    store: StoredCells
    console: Console
    world: World = World()  # noqa: RUF009 - immutable
    batch_size: int = 64
    num_workers: int = 0


@dataclasses.dataclass(frozen=True)
class Entry:
    """One suite as one network sees it."""

    contender: Contender
    suite: Suite

    def key(self, portion: Portion, fingerprint: str) -> dict[str, Any] | None:
        """What a portion's numbers are stored under; None where the network cannot be told from another."""
        if self.contender.key is None:
            return None
        protocol = {**portion.pictures.protocol, **self.suite.made}
        cells = {"suite": self.suite.name, "cells": portion.cells, "fingerprint": fingerprint}
        return {"network": self.contender.key, "protocol": protocol, **cells}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be measured, all of it opened, and why the rest will not."""

    contenders: list[Contender]
    entries: list[Entry]
    lacking: dict[str, str]

    @property
    def names(self) -> list[str]:
        """The suites, in order."""
        return list(dict.fromkeys(entry.suite.name for entry in self.entries))

    def of(self, name: str) -> list[Entry]:
        """A suite's entries."""
        return [entry for entry in self.entries if entry.suite.name == name]


# ---- before ----


def open_plan(contenders: Sequence[Contender], choice: Choice, asked: Sequence[str]) -> Plan:
    """Opens every suite for every network. Raises what is wrong with pictures, networks, or the two together."""
    first = contenders[0]
    for other in contenders[1:]:
        if other.outputs != first.outputs or (other.classes or first.classes) != (first.classes or other.classes):
            raise ConfigError(
                f"{first.name} ({first.outputs} outputs) and {other.name} ({other.outputs}) do not have the same "
                "classes: evaluate them one by one."
            )
    classes = next((one.classes for one in contenders if one.classes), None)
    battery = Battery(choice, first.outputs, classes)
    names, lacking = battery.chosen(asked)
    entries = []
    for name in names:
        able = [one for one in contenders if one.differentiable or name not in NEED_GRADIENTS]
        if blind := [one.name for one in contenders if one not in able]:
            lacking[name] = f"{', '.join(blind)} gives no gradient"
        entries += [Entry(one, battery.suite(name, one.size, one.facts["interpolation"])) for one in able]
    if not entries:
        raise ConfigError(f"nothing can be measured: {'; '.join(f'{name}: {why}' for name, why in lacking.items())}.")
    return Plan(list(contenders), entries, lacking)


def refuse_normalised(plan: Plan) -> None:
    """Raises ConfigError for a network that takes normalised pictures, as far as its answers tell."""
    for contender in plan.contenders:
        if contender.facts["normalization"] != "inside":
            continue
        for portion in (one for entry in plan.entries if entry.contender is contender for one in entry.suite.portions):
            if portion.pictures.reading.outputs == len(portion.pictures.classes):  # labels number its outputs
                with eval_mode({"": contender.network}):
                    require_pixel_model(contender.network, *sample(portion, contender))
                break


def sample(portion: Portion, contender: Contender) -> tuple[Tensor, Tensor]:
    """Up to 64 pictures of a portion, evenly spread over it, and their labels, on the network's device."""
    pictures = portion.pictures
    count = min(CHECKED_PICTURES, len(pictures))
    chosen = [pictures[index * len(pictures) // count] for index in range(count)]
    labels = torch.tensor([one["label"] for one in chosen])
    return torch.stack([one["image"] for one in chosen]).to(contender.device), labels.to(contender.device)


# ---- measuring ----


def hold(plan: Plan, setting: Setting) -> dict[tuple[str, str], Found]:
    """Measures everything, or takes what is stored: by network and suite."""
    found: dict[tuple[str, str], Found] = {}
    setting.console.plan = {name: _cost(plan.of(name)) for name in plan.names}
    for name in plan.names:
        groups: dict[str, list[Entry]] = {}
        for entry in plan.of(name):  # networks of the same input look at the same pictures, read once
            groups.setdefault(entry.suite.facts["protocol"]["preprocessing"], []).append(entry)
        for group in groups.values():
            _measure_group(group, found, setting)
        setting.console.passed(name)
    return found


def _cost(entries: Sequence[Entry]) -> float:
    """Forward passes of a suite, roughly."""
    passes = 0
    for entry in entries:
        for portion in entry.suite.portions:
            each = PASSES.get(entry.suite.name, CORRUPTION_PASSES if portion.corruption else 1)
            passes += each * len(portion.pictures)
    return float(passes)


def _measure_group(group: Sequence[Entry], found: dict[tuple[str, str], Found], setting: Setting) -> None:
    suite, world = group[0].suite, setting.world
    prints = [portion.pictures.fingerprint() for portion in suite.portions]

    def keys(at: int) -> dict[str, dict[str, Any] | None]:
        return {entry.contender.name: entry.key(suite.portions[at], prints[at]) for entry in group}

    stored = from_main(
        lambda: [{name: setting.store.read(key) for name, key in keys(at).items()} for at in range(len(prints))]
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
    networks = {entry.contender.name: entry.contender.network for entry in group}
    total = sum(len(range(world.rank, len(portion.pictures), world.size)) for portion, _ in todo)
    with setting.console.task(suite.name, total, "picture") as task:

        def progress(portion: Portion, count: int) -> None:
            task.advance(portion.corruption or portion.cells[0] if len(suite.portions) > 1 else "", count)

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
        for portion, new in measured:
            from_main(functools.partial(_store, setting.store, keys(suite.portions.index(portion)), new))
            for name, one in new.items():
                _add(found, name, suite.name, one)


def _store(store: StoredCells, keys: Mapping[str, dict[str, Any] | None], new: Mapping[str, Found]) -> None:
    for name, one in new.items():
        store.write(keys[name], one)


def _add(found: dict[tuple[str, str], Found], network: str, suite: str, new: Found) -> None:
    own = found.setdefault((network, suite), {"counts": {}, "calibration": {}})
    own["counts"] |= new["counts"]
    own["calibration"] |= new["calibration"]


# ---- after ----


def check_attacks(plan: Plan, found: Mapping[tuple[str, str], Found], setting: Setting) -> dict[str, dict[str, Any]]:
    """Whether the attacks can be believed, by network and attack."""
    checks: dict[str, dict[str, Any]] = {}
    for contender in plan.contenders:
        own = {entry.suite.name: entry for entry in plan.entries if entry.contender is contender}
        if attacked := [own[name] for name in PIXEL_ATTACKS if name in own]:
            checks.setdefault(contender.name, {})["FGSM and PGD"] = _gradient_checks(attacked[0], setting)
        curves = [found[contender.name, name]["counts"] for name in ("words-symbolic", "words-random") if name in own]
        if len(curves) == 2:
            symbolic, random = ([count["correct"] for count in curve.values()] for curve in curves)
            told = f"{symbolic[-1]} right at the largest share, {random[-1]} under random words"
            passed = all(one <= other for one, other in zip(symbolic, random, strict=True))
            check = {"name": "beats random words", "passed": passed, "told": told}
            checks.setdefault(contender.name, {})["words-symbolic"] = [check]
    return checks


def _gradient_checks(entry: Entry, setting: Setting) -> list[dict[str, Any]]:
    contender, portion = entry.contender, entry.suite.portions[0]
    key = entry.key(portion, portion.pictures.fingerprint())
    key = key and {**key, "cells": f"checks on {CHECKED_PICTURES} pictures"}
    found: list[dict[str, Any]] | None = setting.store.read(key)
    if found is None:
        logger.info("%s: checking that its gradients lead an attack", contender.name)
        image, label = sample(portion, contender)
        generators = [image_generator(0, index) for index in range(len(image))]
        with eval_mode({"": contender.network}):
            found = [check._asdict() for check in attack_checks(contender.network, image, label, generators)]
        setting.store.write(key, found)
    return found


def assemble(
    plan: Plan, found: Mapping[tuple[str, str], Found], checks: dict[str, dict[str, Any]], title: str, seconds: float
) -> Results:
    """The results, by network in the order of the command line and suite."""
    results: Results = {
        "format": FORMAT,
        "title": title,
        "command": command_line(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "seconds": seconds,
        "machine": machine(),
        "versions": versions(),
        "models": {one.name: one.facts for one in plan.contenders},
        "suites": {one.name: {} for one in plan.contenders},
        "cells": {one.name: {} for one in plan.contenders},
        "calibration": {one.name: {} for one in plan.contenders},
        "checks": checks,
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


def examine(
    contenders: Sequence[Contender], choice: Choice, asked: Sequence[str], setting: Setting, title: str
) -> Results:
    """Opens all suites, then measures them. Raises UserError, on all ranks."""
    start = datetime.datetime.now()
    plan = together(lambda: open_plan(contenders, choice, asked))
    together(lambda: refuse_normalised(plan))
    if setting.world.main:
        print_plan(plan)
    found = hold(plan, setting)
    checks = from_main(lambda: check_attacks(plan, found, setting))
    return assemble(plan, found, checks, title, (datetime.datetime.now() - start).total_seconds())


def print_plan(plan: Plan) -> None:
    """Says what will be measured, and what not."""
    wide = max(map(len, plan.names))
    for name in plan.names:
        suite = plan.of(name)[0].suite
        facts, cells = suite.facts, sum(len(portion.cells) for portion in suite.portions)
        times = f"{cells} x " if cells > 1 else ""
        marks = f", partial: {'; '.join(facts['missing'])}" if facts["missing"] else ""
        logger.info("%-*s  %s%s pictures%s", wide, name, times, f"{facts['images']:,}", marks)
    reasons: dict[str, list[str]] = {}
    for name, why in plan.lacking.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        logger.info("not measured: %s: %s", ", ".join(names), why)


def save(results: Results, folder: Path) -> None:
    """Writes results.json and the report. Raises StorageError."""
    write_results(results, folder / "results.json")
    logger.info("wrote %s", write_report(results, folder))


def print_headline(results: Results) -> None:
    """The numbers in columns."""
    table = headline_table(results)
    rows = [table.head, *table.rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(table.head))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
