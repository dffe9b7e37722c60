"""What an evaluation will measure: all suites of all contenders, opened and looked at before any is measured."""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mae_dat.attacks.checks import MAX_PROBES, PROBE_SIZE, require_pixel_model
from mae_dat.config.errors import ConfigError, InputSizeError
from mae_dat.data.sampler import evenly_spaced
from mae_dat.models.modes import evaluation_mode
from mae_dat.robustness.measure import ImagePass
from mae_dat.robustness.network import EvaluatedNetwork
from mae_dat.robustness.suites.base import Suite
from mae_dat.robustness.suites.choose import CLEAN, NEED_GRADIENTS, Battery, SuiteSettings
from mae_dat.robustness.suites.imagenet import Reading
from mae_dat.robustness.suites.sets import BENCHMARKS, BenchmarkSet
from mae_dat.runtime.environment import dependency_versions, installed_version, toolkit_version

logger = logging.getLogger(__name__)

CHECKED_PICTURES = 64


@dataclasses.dataclass(frozen=True)
class SuiteRun:
    """One suite as one network sees it."""

    contender: EvaluatedNetwork
    suite: Suite

    @property
    def versions(self) -> dict[str, str]:
        """Of what measures it now."""
        packages = {name: installed_version(name) for name in self.suite.packages}
        return {**toolkit_version(), **dependency_versions(), **packages, **self.contender.versions}

    def key(self, portion: ImagePass, fingerprint: str) -> dict[str, Any] | None:
        """What a portion's numbers are stored under; None where the network cannot be told from another."""
        if self.contender.key is None:
            return None
        protocol = {**portion.pictures.protocol, **self.suite.made}
        cells = {"suite": self.suite.name, "cells": portion.cells, "fingerprint": fingerprint}
        return {"network": self.contender.key, "protocol": protocol, **cells}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What will be measured, all of it opened, and why the rest will not."""

    contenders: list[EvaluatedNetwork]
    entries: list[SuiteRun]
    lacking: dict[str, str]
    battery: Battery
    agreements: list[SuiteRun] = dataclasses.field(default_factory=list)
    """Of the networks in bfloat16: how often they answer as in float32, on the first suite of stored pictures."""

    @property
    def names(self) -> list[str]:
        """The suites, in order."""
        return list(dict.fromkeys(entry.suite.name for entry in self.entries))

    def of(self, name: str) -> list[SuiteRun]:
        """A suite's entries."""
        return [entry for entry in self.entries if entry.suite.name == name]


def open_plan(contenders: Sequence[EvaluatedNetwork], choice: SuiteSettings, asked: Sequence[str]) -> Plan:
    """Opens every suite for every network. Raises what is wrong with pictures, networks, or the two together; a suite
    of `all` that cannot be made at a network's size is not measured."""
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
        unable: list[str] = []
        for one in contenders:
            if not one.differentiable and name in NEED_GRADIENTS:
                unable.append(f"{one.name} gives no gradient")
                continue
            try:
                seen = one.size, one.facts["interpolation"], one.facts.get("crop")
                entries.append(SuiteRun(one, battery.suite(name, *seen)))
            except InputSizeError as error:
                if name in asked:
                    raise
                unable.append(f"{one.name}: {error}")
        if unable:
            lacking[name] = "; ".join(unable)
    if not entries:
        raise ConfigError(f"nothing can be measured: {'; '.join(f'{name}: {why}' for name, why in lacking.items())}.")
    return Plan(list(contenders), entries, lacking, battery, _agreements(entries, battery))


def _agreements(entries: Sequence[SuiteRun], battery: Battery) -> list[SuiteRun]:
    stored = [one for one in entries if one.suite.name in (*BENCHMARKS, CLEAN)]
    first = {one.contender.name: one for one in reversed(stored) if one.contender.facts["precision"] == "bf16"}
    return [SuiteRun(one.contender, battery.agreement(one.suite)) for one in first.values()]


def refuse_normalised(plan: Plan) -> None:
    """Raises ConfigError for a network that takes normalised pictures, or pixels up to 255, as far as its answers on up
    to 1024 pictures of its first suite tell."""
    first = {entry.contender.name: entry for entry in reversed(plan.entries)}
    for contender in plan.contenders:
        if contender.facts["normalization"] == "inside" and contender.name in first:
            with torch.no_grad(), evaluation_mode(contender.model):
                require_pixel_model(contender.model, _looks(first[contender.name].suite.portions[0], contender))


def _looks(portion: ImagePass, contender: EvaluatedNetwork) -> Iterator[tuple[Tensor, Callable[[Tensor], Tensor]]]:
    pictures, reading = portion.pictures, portion.pictures.reading.to(contender.device)
    chosen = evenly_spaced(len(pictures), PROBE_SIZE * MAX_PROBES)
    times = -(-len(chosen) // PROBE_SIZE)
    for start in range(times):
        index = chosen[start::times]
        image = torch.stack([pictures[one]["image"] for one in index]).to(contender.device)
        yield image, partial(_right, pictures, reading, torch.tensor(index))


def _right(pictures: BenchmarkSet, reading: Reading, index: Tensor, logits: Tensor) -> Tensor:
    return pictures.right(reading.answers(logits), index)


def sample(portion: ImagePass, contender: EvaluatedNetwork) -> tuple[Tensor, Tensor]:
    """Up to 64 pictures of a portion, evenly spread over it, and their labels, on the network's device."""
    chosen = [portion.pictures[index] for index in evenly_spaced(len(portion.pictures), CHECKED_PICTURES)]
    labels = torch.tensor([one["label"] for one in chosen])
    return torch.stack([one["image"] for one in chosen]).to(contender.device), labels.to(contender.device)


def print_plan(plan: Plan) -> None:
    """Says what will be measured, and what not."""
    wide = max(map(len, plan.names))
    for name in plan.names:
        suite = plan.of(name)[0].suite
        cells = sum(len(portion.cells) for portion in suite.portions)
        times = f"{cells} x " if cells > 1 else ""
        marks = f", partial: {'; '.join(suite.missing)}" if suite.missing else ""
        logger.info("%-*s  %s%s pictures%s", wide, name, times, f"{suite.images:,}", marks)
    reasons: dict[str, list[str]] = {}
    for name, why in plan.lacking.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        logger.info("not measured: %s: %s", ", ".join(names), why)
