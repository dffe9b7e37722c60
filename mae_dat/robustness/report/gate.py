"""The gate of `--require`: a verdict for each requirement on the numbers of an evaluation, decided by intervals.

A requirement is passed if its whole 95 % interval meets the condition, failed if none of it does, and undecided
otherwise. Nothing of a collapsed model passes.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mae_dat.config.errors import RequirementError
from mae_dat.config.requirements import NoWorse, Requirement, Requirements
from mae_dat.robustness.report.gate_files import write_gate_files
from mae_dat.robustness.report.gate_values import GateValue, differences_to, value_of
from mae_dat.robustness.scores.collapse import collapsed_models
from mae_dat.robustness.scores.results import Collapse, Results, read_results
from mae_dat.robustness.scores.results_check import check_results

Verdict = Literal["passed", "failed", "undecided"]


@dataclasses.dataclass(frozen=True)
class GateLine:
    """The verdict on one requirement for one model."""

    model: str
    requirement: str
    value: GateValue
    verdict: Verdict
    note: str = ""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.verdict:<9}  {self.model}: {self.requirement}: {self.value}{note}"

    def as_json(self) -> dict[str, Any]:
        """Return the line for the evidence file."""
        return {
            "model": self.model,
            "requirement": self.requirement,
            "value": self.value.value,
            "interval": None if self.value.ends is None else list(self.value.ends),
            "verdict": self.verdict,
            "note": self.note,
        }


def judge(results: Results, requirements: Requirements) -> list[GateLine]:
    """Return the verdict on every requirement for every model.

    Raises CheckpointError for results whose numbers contradict each other, ConfigError for a number that was not
    measured, DataError for an earlier evaluation of other images.
    """
    check_results(results, "these results")
    collapsed = {**collapsed_models(results.get("images", {}), results["cells"]), **results.get("collapsed", {})}
    lines = []
    for model in results["models"]:
        for entry in requirements.entries:
            for text, value, operator, bound in _conditions(results, model, entry):
                verdict, note = _verdict(value, operator, bound), ""
                if model in collapsed:
                    verdict, note = "failed", _describe(collapsed[model])
                lines.append(GateLine(model, text, value, verdict, note))
    return lines


def _conditions(
    results: Results, model: str, entry: Requirement | NoWorse
) -> Iterator[tuple[str, GateValue, str, float]]:
    """Yield the text, the value and the condition of a requirement; several for `no_worse_than`."""
    if isinstance(entry, Requirement):
        yield entry.text, value_of(results, model, entry), entry.operator, entry.bound
        return
    earlier = read_results(entry.file)
    check_results(earlier, str(entry.file))
    for name, value in differences_to(results, model, earlier, entry):
        yield f"{entry.text}: change of {name}", value, ">=", -entry.by


def _verdict(value: GateValue, operator: str, bound: float) -> Verdict:
    """Decide by the interval; by the value alone where there is no interval."""
    low, high = value.ends or (value.value, value.value)
    tests = {
        "<=": (high <= bound, low > bound),
        "<": (high < bound, low >= bound),
        ">=": (low >= bound, high < bound),
        ">": (low > bound, high <= bound),
    }
    passed, failed = tests[operator]
    return "passed" if passed else "failed" if failed else "undecided"


def _describe(collapse: Collapse) -> str:
    return f"collapsed: it predicts {collapse['name']} for {collapse['percent']:.1f} % of {collapse['suite']}"


def is_met(lines: Sequence[GateLine], undecided: Literal["pass", "fail"]) -> bool:
    """Return whether no requirement failed, and none is undecided unless that passes."""
    verdicts = {line.verdict for line in lines}
    return "failed" not in verdicts and (undecided == "pass" or "undecided" not in verdicts)


def gate_lines(
    results: Results,
    requirements: Requirements,
    undecided: Literal["pass", "fail"],
    file: Path | None = None,
    folder: Path | None = None,
) -> list[GateLine]:
    """Judge results and write requirements.xml (JUnit) and requirements.json (evidence) to `folder`.

    `file` is the results.json that was judged. Raises what `judge` raises, StorageError.
    """
    lines = judge(results, requirements)
    if folder is not None:
        verdict = "passed" if is_met(lines, undecided) else "failed"
        write_gate_files(lines, verdict, undecided, results, requirements, (file, folder))
    return lines


def require_met(lines: Sequence[GateLine], undecided: Literal["pass", "fail"]) -> None:
    """Raise RequirementError, with the requirements that are not met, unless all are."""
    if is_met(lines, undecided):
        return
    counted = ("failed",) if undecided == "pass" else ("failed", "undecided")
    unmet = [line for line in lines if line.verdict in counted]
    names = "; ".join(f"{line.model}: {line.requirement}" for line in unmet[:3])
    more = f" and {len(unmet) - 3} more" if len(unmet) > 3 else ""
    hint = " An undecided one needs more images, or --undecided pass." if unmet[0].verdict == "undecided" else ""
    raise RequirementError(f"{len(unmet)} of {len(lines)} requirements are not met: {names}{more}.{hint}")
