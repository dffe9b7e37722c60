"""The tables of a report as text, made once, so that the page, Markdown and LaTeX show the same digits."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from mae_dat.config.protocols import protocol_text
from mae_dat.robustness.report.groups import Group
from mae_dat.robustness.report.measurements import Measurement
from mae_dat.robustness.report.summarize import ReportData
from mae_dat.robustness.scores.accuracy import Count, SeedStatistics, top1_accuracy
from mae_dat.robustness.scores.results import ModelFacts, TrainingFacts

NOTHING, INFINITE = "–", "∞"
NOTABLE_DISAGREEMENT = 0.0002  # share of predictions that differ in bf16, above which the report warns


@dataclass(frozen=True)
class Table:
    """A table whose cells are text."""

    key: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    words: int = 1
    """Number of left-aligned columns at the left."""
    breaks: frozenset[int] = field(default_factory=frozenset)
    """Rows with a line above them."""
    best: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    """(row, column) of numbers in bold: the best of their row, beyond chance."""
    folded: bool = False
    """Whether the page hides it until the reader opens it."""


def mean_text(values: Iterable[float | None], digits: int) -> str:
    """Format the mean of the finite values over seeds as '41.2', or '41.2 ± 0.3'; a dash if there is none."""
    statistics = SeedStatistics.of(value for value in values if value is not None and math.isfinite(value))
    return NOTHING if statistics is None else statistics.text(digits)


def _accuracy_text(measurement: Measurement, group: Group, cell: str) -> str:
    """Format a group's accuracy in percent on a cell, a dash where it was not measured."""
    counts = [measurement.counts[model] for model in group.members.values()]
    return mean_text((top1_accuracy(count[cell]) for count in counts if cell in count), 1)


# ---- changed words ----

_WORDS_NOTE = "Top-1 accuracy in percent. At 0 the image is decoded from its own words."


def words_table(report: ReportData) -> Table | None:
    """Return the accuracy by share of changed words, a row for each share; None if it was not measured."""
    measurements = report.of_kind("words")
    if not measurements:
        return None
    columns = [(measurement, group) for measurement in measurements for group in measurement.groups]
    shares = sorted({share for m in measurements for share in m.changed_word_shares}, key=float)
    rows = [
        (f"{100 * float(share):g}", *(_accuracy_text(measurement, group, share) for measurement, group in columns))
        for share in shares
    ]
    return Table(
        key="words",
        title="Changed words",
        head=("words changed, up to %", *(f"{group.title}: {measurement.title}" for measurement, group in columns)),
        rows=tuple(rows),
        notes=(_WORDS_NOTE,),
    )


def words_tables_by_group(report: ReportData) -> list[Table]:
    """Return the accuracy by share of changed words, a table for each attack with a row for each group."""
    return [_words_table_by_group(measurement) for measurement in report.of_kind("words")]


def _words_table_by_group(measurement: Measurement) -> Table:
    shares = measurement.changed_word_shares
    rows = [
        (group.title, *(_accuracy_text(measurement, group, share) for share in shares)) for group in measurement.groups
    ]
    return Table(
        key=measurement.suite,
        title=f"Changed words: {measurement.title}",
        head=("words changed, up to", *(f"{100 * float(share):g} %" for share in shares)),
        rows=tuple(rows),
        notes=(_WORDS_NOTE,),
    )


# ---- calibration and checks of attacks ----


def calibration_table(report: ReportData) -> Table | None:
    """Return every calibration score; None if none was measured."""
    rows = [
        _calibration_row(report, measurement, group)
        for measurement in report.measurements
        for group in measurement.groups
        if any(measurement.suite in report.calibration.get(model, {}) for model in group.members.values())
    ]
    if not rows:
        return None
    notes = [
        "ECE: 15 bins of equal width. RMS: bins of 100 images; the released code leaves the last of them out. NLL in "
        "nats; Brier from 0 to 2."
    ]
    if any(INFINITE in row for row in rows):
        notes.append(f"{INFINITE}: the class of an image had probability 0.")
    return Table(
        key="calibration",
        title="Calibration",
        head=("model", "suite", "ECE (%) ↓", "RMS (%) ↓", "RMS, as released (%) ↓", "NLL ↓", "Brier ↓"),
        rows=tuple(rows),
        notes=tuple(notes),
        words=2,
    )


def _calibration_row(report: ReportData, measurement: Measurement, group: Group) -> tuple[str, ...]:
    scores = [report.calibration.get(model, {}).get(measurement.suite, {}) for model in group.members.values()]

    def text(key: str, scale: float, digits: int) -> str:
        values = [entry[key] for entry in scores if key in entry]
        if None in values:
            return INFINITE
        return mean_text((scale * value for value in values if value is not None), digits)

    in_percent = (text(key, scale=100, digits=2) for key in ("ece", "rms", "rms_compat"))
    others = (text(key, scale=1, digits=3) for key in ("nll", "brier"))
    return (group.title, measurement.title, *in_percent, *others)


def checks_table(report: ReportData) -> Table | None:
    """Return the sanity checks of the attacks; None if there were none."""
    rows = [
        (title, attack, check["name"], "passed" if check["passed"] else "FAILED", check["told"])
        for model, title in report.model_titles.items()
        for attack, checks in report.checks.get(model, {}).items()
        for check in checks
    ]
    if not rows:
        return None
    note = "A failed check says that the attack did not work, and the model may be less robust than its rows show."
    return Table(
        key="checks",
        title="Can the attacks be believed?",
        head=("model", "attack", "check", "", "found"),
        rows=tuple(rows),
        notes=(note,),
        words=5,
    )


# ---- what was measured, and how ----


def precision_text(facts: ModelFacts, agreement: Count | None) -> str:
    """Return 'bf16; 1 of 10,000 predictions differs from fp32 (0.01 %)', or the precision alone where the
    agreement with float32 was not measured."""
    precision = facts["precision"]
    if agreement is None:
        return precision
    total, different = agreement["total"], agreement["total"] - agreement["correct"]
    share = different / total
    verb = "differs" if different == 1 else "differ"
    text = f"{precision}; {different:,} of {total:,} predictions {verb} from fp32 ({share:.2%})"
    warning = f", above {100 * NOTABLE_DISAGREEMENT:g} %" if share > NOTABLE_DISAGREEMENT else ""
    return text.replace("%)", " %)") + warning


def inputs_table(report: ReportData) -> Table | None:
    """Return what was logged before the start, a row each; None for results of older releases."""
    if not report.inputs:
        return None
    rows = [(label, "; ".join(text.split("\n"))) for label, text in report.inputs.items()]
    return Table(key="inputs", title="Inputs", head=("", "as logged before the start"), rows=tuple(rows), words=2)


def models_table(report: ReportData) -> Table:
    """Return the facts of the models, a column each."""
    weights = {None: "not known", True: "moving average", False: "as trained"}
    models = list(report.models.values())
    rows = [
        ("weights from", *(facts["source"] for facts in models)),
        ("sha256", *(facts["sha256"] or "none: no file" for facts in models)),
        ("architecture", *(facts["architecture"] for facts in models)),
        ("parameters", *(f"{facts['parameters']:,}" for facts in models)),
        ("input", *(f"{facts['size'][0]} × {facts['size'][1]} px" for facts in models)),
        ("interpolation", *(facts["interpolation"] for facts in models)),
        ("normalization", *(facts["normalization"] for facts in models)),
        ("precision", *(precision_text(facts, report.agreement.get(model)) for model, facts in report.models.items())),
        ("weights are", *(weights[facts["averaged"]] for facts in models)),
    ]
    if any("crop" in facts for facts in models):
        crops = (f"{facts['crop']:g} of the side" if "crop" in facts else "usual" for facts in models)
        rows.insert(6, ("crop", *crops))
    if any("protocol" in facts for facts in models):
        rows.insert(4, ("protocol", *(protocol_text(facts.get("protocol", "native")) for facts in models)))
    return Table(
        key="models",
        title="Models",
        head=("", *report.model_titles.values()),
        rows=tuple(rows),
        words=1 + len(models),
    )


def suites_table(report: ReportData) -> Table:
    """Return how each suite was measured; models that share a measurement share a row."""
    titles = report.model_titles
    rows = []
    for measurement in report.measurements:
        facts, models = measurement.facts, measurement.models
        protocol = "; ".join(f"{key}: {value}" for key, value in facts["protocol"].items() if value)
        row = (
            measurement.title,
            "all" if len(models) == len(titles) else ", ".join(titles[model] for model in models),
            "as stored" if facts["official"] else "made or chosen here",
            f"{facts['images']:,}" + (f" ({facts['left_out']:,} left out)" if facts["left_out"] else ""),
            "; ".join(facts["missing"]) or "nothing",
            protocol,
            facts["fingerprint"][:12],
        )
        rows.append(row)
    head = ("suite", "models", "images are", "images in each cell", "missing", "protocol", "fingerprint")
    return Table(key="suites", title="Suites", head=head, rows=tuple(rows), words=len(head))


def runs_table(training: TrainingFacts) -> Table:
    """Return the seeds and minutes of every training, pretrainings first."""
    cpu_seconds: dict[str, float | None] = {**training.get("cpu_seconds", {})} or {"pretraining": None}
    # Only the first pretraining's wall-clock time is recorded.
    minutes = [f"{training['seconds'] / 60:.1f}"] + [NOTHING] * (len(cpu_seconds) - 1)
    rows = [
        (name, "", "", wall, minutes_text(cpu)) for (name, cpu), wall in zip(cpu_seconds.items(), minutes, strict=True)
    ]
    for run in training["runs"].values():
        wall, cpu = minutes_text(run["seconds"]), minutes_text(run.get("cpu_seconds"))
        rows.append((run["label"], run["arm"], str(run["seed"]), wall, cpu))
    return Table(
        key="runs",
        title="Training runs",
        head=("", "arm", "seed", "minutes", "processor minutes"),
        rows=tuple(rows),
        notes=("Processor minutes are over all threads; loader workers are not included.",),
        words=2,
    )


def minutes_text(seconds: float | None) -> str:
    """Format seconds as minutes, a dash if unknown."""
    return NOTHING if seconds is None else f"{seconds / 60:.1f}"


def not_measured(report: ReportData) -> list[str]:
    """Return what a reader might expect and was not measured, with the reasons."""
    reasons: dict[str, list[str]] = {}
    for suite, reason in report.skipped.items():
        reasons.setdefault(reason, []).append(suite)
    remarks = [f"{', '.join(suites)}: {reason}" for reason, suites in reasons.items()]
    measured = {(cell.model, cell.suite) for cell in report.cells}
    for suite in report.suites:
        lacking = [title for model, title in report.model_titles.items() if (model, suite) not in measured]
        if lacking:
            remarks.append(f"{suite}, of {', '.join(lacking)}.")
    if report.of_kind("corruptions") and "imagenet-c" not in report.suites:
        remarks.append("The official ImageNet-C files: no AlexNet-normalised mCE of the literature stands here.")
    if any(len(group.members) == 1 for group in report.groups):
        remarks.append("The scatter between training runs, where a model is one checkpoint.")
    return remarks
