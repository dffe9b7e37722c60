"""The sentences at the top of a report: which groups differ beyond chance, and how far the numbers can be trusted."""

from collections.abc import Mapping

from mae_dat.robustness.report.comparison import difference_text, value_text
from mae_dat.robustness.report.differences import ALPHA
from mae_dat.robustness.report.groups import Group
from mae_dat.robustness.report.measurements import WHOLE_SUITES
from mae_dat.robustness.report.metrics import Metric
from mae_dat.robustness.report.paired import MIN_SEEDS
from mae_dat.robustness.report.summarize import ReportData
from mae_dat.robustness.scores.results import CLEAN_SUITES, TrainingRun
from mae_dat.runtime.environment import COMMIT_KEY

QUOTED_SUITES = (*CLEAN_SUITES, "imagenet-c", "generated")
QUOTED_METRICS = (*CLEAN_SUITES, "imagenet-c/mce", "generated/mean")


def findings(report: ReportData) -> list[str]:
    """Return the findings that fit the report: of each group, or with many groups the ones that differ."""
    return ablation_findings(report) if report.groups_are_rows else comparison_findings(report)


def comparison_findings(report: ReportData) -> list[str]:
    """Return a sentence for each group but the first, or the numbers of the only one, and the limits."""
    first, *others = report.groups
    compared = [sentence for other in others for sentence in _compared(report, other, first)]
    sentences = compared or [_numbers_of(report, first)]
    return [*collapse_warnings(report), *sentences, *image_notes(report), *cautions(report)]


def _compared(report: ReportData, group: Group, first: Group) -> list[str]:
    """Return the verdict, and the numbers of clean and corrupted images."""
    verdicts = report.verdicts(group, first)
    if not verdicts:
        return [f"{group.title} shares no measurement with {first.title}: other images or another protocol."]
    quoted = [
        _quote(metric, f"{value_text(metric, group)} vs. {value_text(metric, first)}")
        + f" ({difference_text(report, metric, group, first)})."
        for metric in verdicts
        if metric.suite in QUOTED_SUITES
    ]
    return [_verdict_sentence(group, first, verdicts), *([" ".join(quoted)] if quoted else [])]


def _verdict_sentence(group: Group, first: Group, verdicts: Mapping[Metric, int | None]) -> str:
    """Return 'DAT vs. plain: better on 2 of 5 suites (Clean, ImageNet-C); no significant difference on the others.'"""
    decided = {metric: verdict for metric, verdict in verdicts.items() if verdict is not None}
    versus = f"{group.title} vs. {first.title}"
    if not decided:
        return f"{versus}: no verdict, which takes at least {MIN_SEEDS} seeds of both."
    count = len(decided)
    suites = f"{count} suite{'' if count == 1 else 's'}"
    parts = []
    for word, sign in (("better", 1), ("worse", -1)):
        titles = [suite_name(metric) for metric, verdict in decided.items() if verdict == sign]
        if titles:
            parts.append(f"{word} on {len(titles)} of {suites} ({', '.join(titles)})")
    undecided = sum(verdict == 0 for verdict in decided.values())
    if undecided == count:
        parts.append("no significant difference on " + ("its only suite" if count == 1 else f"any of {suites}"))
    elif undecided:
        parts.append(f"no significant difference on the other {undecided}")
    what = "seeds and images" if group.trained or first.trained else "the images"
    return f"{versus}: {'; '.join(parts)} (p < {ALPHA:g} over {what}, Holm-corrected)."


def suite_name(metric: Metric) -> str:
    """Return the title of a metric's suite: 'ImageNet-C' for 'ImageNet-C: mCE'."""
    return metric.title.removesuffix(" (%)").split(": ")[0].removesuffix(" of the words")


def _numbers_of(report: ReportData, group: Group) -> str:
    count = len(report.suites)
    quoted = [_quote(metric, value_text(metric, group)) for metric in report.metrics if metric.key in QUOTED_METRICS]
    return ". ".join([f"{group.title} on {count} suite{'' if count == 1 else 's'}", *quoted]) + "."


def _quote(metric: Metric, value: str) -> str:
    """Return 'ImageNet: 84.58 vs. 83.60 %'."""
    title = metric.title.removesuffix(" (%)")
    return f"{title}: {value}{'' if title == metric.title else ' %'}"


def ablation_findings(report: ReportData) -> list[str]:
    """Return which groups differ from the first beyond chance on clean and on corrupted images, and the limits."""
    first, *others = report.groups
    sentences = []
    for title in ("clean", "corruption error"):
        if title in report.columns:
            verdicts = {other: report.verdict(report.columns[title], other, first) for other in others}
            if all(verdict is None for verdict in verdicts.values()):
                sentences.append(f"{title.capitalize()}: no verdict, which takes at least {MIN_SEEDS} seeds.")
                continue
            better = ", ".join(group.title for group, verdict in verdicts.items() if verdict == 1) or "none"
            worse = ", ".join(group.title for group, verdict in verdicts.items() if verdict == -1) or "none"
            sentences.append(
                f"{title.capitalize()}, significantly better than {first.title}: {better}; "
                f"worse than {first.title}: {worse}."
            )
    return [*collapse_warnings(report), *sentences, *image_notes(report), *cautions(report)]


# ---- how far the numbers can be trusted ----


def collapse_warnings(report: ReportData) -> list[str]:
    """Return a sentence for each model that has collapsed."""
    return [
        f"Caution: {report.model_titles[model]} predicts {collapse['name']} for {collapse['percent']:.1f} % of the "
        f"images of {collapse['suite']}. None of its numbers is called better."
        for model, collapse in report.collapsed.items()
    ]


def image_notes(report: ReportData) -> list[str]:
    """Return which choice of images was measured, if it was a choice, and a warning about mixed versions."""
    notes = []
    if report.image_subset:
        whole = " and ".join(WHOLE_SUITES[name] for name in WHOLE_SUITES if name in report.suites)
        exception = "" if report.subset_of_all or not whole else f"; {whole} on all"
        notes.append(f"Measured on {report.image_subset}{exception}.")
    return notes + mixed_versions(report)


def mixed_versions(report: ReportData) -> list[str]:
    """Return a warning if the numbers were measured under several versions of a package."""
    values: dict[str, set[str]] = {}
    for entry in report.measured_under:
        for package, version in entry["versions"].items():
            if package != COMMIT_KEY:  # equal sources compute the same, whatever their commit
                values.setdefault(package, set()).add(version)
    mixed = [f"{package} {report.versions[package]}" for package, several in values.items() if len(several) > 1]
    if values and not all(entry["versions"] for entry in report.measured_under):
        mixed.append("cells of an older release, which recorded none")
    if not mixed:
        return []
    return [
        f"Caution: measured under several versions ({'; '.join(mixed)}), which may cause differences. To measure "
        "everything again, delete the folder cells beside results.json and repeat the command."
    ]


def cautions(report: ReportData) -> list[str]:
    """Return how many seeds the numbers of trainings are from, and whether their attacks changed any visual words;
    nothing without trainings."""
    if report.training is None:
        return []
    runs, fewest = report.training["runs"], min(len(group.members) for group in report.groups)
    sentences = [
        f"Numbers are means over at least {fewest} seeds, ± the standard deviation between them."
        if fewest > 1
        else "One seed: the scatter between trainings is unknown, and a second seed may reverse a difference."
    ]
    by_title = {
        group.title: group.statistics(lambda model: changed_words_percent(runs[model])) for group in report.groups
    }
    changed = {title: share for title, share in by_title.items() if share is not None}
    if changed:
        shares = ", ".join(f"{title} {share.text(2)} %" for title, share in changed.items())
        sentences.append(f"Visual words changed in the last epoch of training: {shares}.")
    if idle := [title for title, share in changed.items() if share.mean == 0]:
        sentences.append(f"Where none was changed ({', '.join(idle)}), the attack only reconstructed the image.")
    return sentences


def changed_words_percent(run: TrainingRun) -> float | None:
    """Return the percentage of visual words changed in the last epoch; None for a training without an adversary."""
    values = [value for _, value in run["curves"].get("changed_words", []) if value is not None]
    return 100 * values[-1] if values else None
