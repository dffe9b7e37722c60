"""What an evaluation says at once: every axis with networks side by side, the differences to the first of them and how
sure they are, and the published rows that may stand beside."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from scipy.stats import t as student

from mae_dat.robustness.report.charts import signed
from mae_dat.robustness.report.groups import Group, groups_of
from mae_dat.robustness.report.metrics import (
    CLEAN,
    ORDER,
    Metric,
    common_size,
    common_subset,
    interval,
    made_subset,
    metrics_of,
    pixels_text,
    suites_of,
)
from mae_dat.robustness.report.published import COLUMNS, UNSURE, Published, published_rows, unsure_note
from mae_dat.robustness.report.tables import NOTHING, Table, stat_text
from mae_dat.robustness.scores.accuracy import SeedStatistics
from mae_dat.robustness.scores.results import Results, TrainingRun
from mae_dat.runtime.environment import COMMIT_KEY

ARROWS = {+1: " ↑", -1: " ↓", 0: ""}
DOUBT = "‡"
NOTES = (
    "↑ more is better, ↓ less is better.",
    "* not a published benchmark's files: corruptions generated on the fly from clean pictures, or pictures of one's "
    "own. AlexNet's errors do not belong to them.",
    "† partial: pictures are missing (the table of suites says which).",
)


class Difference(NamedTuple):
    """By how much an arm differs from another on an axis."""

    gap: float
    ends: tuple[float, float] | None
    """Of its 95 % interval; None where there is none."""
    spread: float | None
    """Standard deviation over pairs of the same seed; None for a single pair."""


def difference(axis: Metric, new: Group, old: Group) -> Difference | None:
    """The mean difference of networks of the same seed, which share initialization and order of pictures, so that it
    scatters less than either; None without a pair.

    The interval is Student's of the pairs, or for a single pair that of the number of pictures.
    """
    names = [(name, old.members[seed]) for seed, name in new.members.items() if seed in old.members]
    pairs = [(axis.numbers[a], axis.numbers[b]) for a, b in names if a in axis.numbers and b in axis.numbers]
    gaps = SeedStatistics.of(one.value - other.value for one, other in pairs)
    if gaps is None:
        return None
    if gaps.std is None:
        return Difference(gaps.mean, interval(*pairs[0]), None)
    half = float(student.ppf(0.975, gaps.n - 1)) * gaps.std / math.sqrt(gaps.n)
    return Difference(gaps.mean, (gaps.mean - half, gaps.mean + half), gaps.std)


def verdict(axis: Metric, new: Group, old: Group) -> int | None:
    """+1 where an arm is better than another beyond chance, -1 where it is worse, 0 where neither can be said; None
    where the axis has no interval or no better, or the attack is in doubt."""
    found = difference(axis, new, old)
    if not axis.better or found is None or found.ends is None or _doubtful(axis, new) or _doubtful(axis, old):
        return None
    return axis.better if found.ends[0] > 0 else -axis.better if found.ends[1] < 0 else 0


def _doubtful(axis: Metric, arm: Group) -> bool:
    return any(axis.numbers[name].doubtful for name in arm.members.values() if name in axis.numbers)


def difference_text(axis: Metric, new: Group, old: Group) -> str:
    """'+1.2 [+0.4, +2.0] better': the difference, its 95 % interval, and what it says where it says anything; of
    several seeds '+1.2 ± 0.3 better', the deviation between pairs."""
    found = difference(axis, new, old)
    if found is None:
        return NOTHING
    text = signed(found.gap, axis.digits)
    if found.spread is not None:
        text += f" ± {found.spread:.{axis.digits}f}"
    elif found.ends is not None:
        text += f" [{signed(found.ends[0], axis.digits)}, {signed(found.ends[1], axis.digits)}]"
    return text + {1: " better", -1: " worse"}.get(verdict(axis, new, old) or 0, "")


def value_text(axis: Metric, arm: Group) -> str:
    """An arm's number on an axis, of several seeds with its deviation; a dash where there is none."""
    values = (axis.numbers[name].value for name in arm.members.values() if name in axis.numbers)
    return stat_text(values, axis.digits) + DOUBT * _doubtful(axis, arm)


def best_of(axis: Metric, arms: Sequence[Group]) -> Group | None:
    """The arm that is better than every other on an axis, beyond chance."""
    there = [arm for arm in arms if any(name in axis.numbers for name in arm.members.values())]
    for arm in there if len(there) > 1 else ():
        if all(verdict(axis, arm, other) == 1 for other in there if other is not arm):
            return arm
    return None


def headline_table(results: Results) -> Table:
    """Every axis, arms side by side, then what each differs by from the first."""
    arms, axes = groups_of(results), metrics_of(results)
    first, *others = arms
    seeds = any(len(arm.members) > 1 for arm in arms)
    unit = "at the same seed" if seeds else "[95 %]"
    head = ("", *(arm.title for arm in arms), *(f"{other.title} − {first.title} {unit}" for other in others))
    rows = []
    for axis in axes:
        shown = (value_text(axis, arm) for arm in arms)
        gaps = (difference_text(axis, other, first) for other in others)
        rows.append((axis.title + ARROWS[axis.better], *shown, *gaps))
    groups = [_group(axis) for axis in axes]
    breaks = frozenset(i for i in range(1, len(groups)) if groups[i] != groups[i - 1])
    winners = [best_of(axis, arms) for axis in axes]
    best = frozenset((row, 1 + arms.index(arm)) for row, arm in enumerate(winners) if arm)
    notes = [*NOTES[:1], *(note for note in NOTES[1:] if any(note[0] in axis.title for axis in axes))]
    if subset := made_subset(results):
        notes.append(f"All suites{'' if common_subset(results) else ' but Clean and Cue conflict'}: {subset}.")
    if size := common_size(results):
        notes.append(f"All networks take pictures of {size}.")
    if any(DOUBT in text for row in rows for text in row):
        notes.append(f"{DOUBT} a check of this attack failed: the network may be less robust than that.")
    notes += _meaning(first.title, seeds) if others else []
    return Table("headline", "Numbers", head, tuple(rows), tuple(notes), breaks=breaks, best=best)


def _meaning(first: str, seeds: bool) -> list[str]:
    """What stands behind ± and an interval."""
    if seeds:
        return [
            "Mean ± standard deviation over seeds; differences are those of runs with the same seed. Better and worse "
            "are said, and the best of a row is marked, where Student's 95 % interval of these differences excludes "
            "zero. The sampling error of the pictures, which all networks share, is not in it."
        ]
    return [
        f"Differences are to {first}. Their 95 % intervals are those of the number of pictures (Newcombe), as if each "
        "network had met other pictures and a picture were as hard in every cell of a mean: true ones are narrower. "
        "They say nothing of the scatter between training runs. The best of a row is marked where such an interval "
        "excludes zero against every other."
    ]


def pairs_table(results: Results) -> Table | None:
    """Differences between arms that are not the first; None without two such arms."""
    _, *others = groups_of(results)
    pairs = [(new, old) for i, new in enumerate(others) for old in others[:i]]
    if not pairs:
        return None
    axes = [axis for axis in metrics_of(results) if axis.better]
    head = ("", *(f"{new.title} − {old.title}" for new, old in pairs))
    rows = [(a.title + ARROWS[a.better], *(difference_text(a, new, old) for new, old in pairs)) for a in axes]
    return Table("pairs", "Differences between the others", head, tuple(rows), ("As in the table above.",))


def _group(axis: Metric) -> str:
    """What stands between two lines of the headline."""
    if axis.suite in ORDER:
        return "pictures" if ORDER.index(axis.suite) < ORDER.index("imagenet-c") else axis.suite
    return "attacks"


def summary(results: Results) -> list[str]:
    """What the headline says, in a sentence for each arm beside the first."""
    arms, axes = groups_of(results), metrics_of(results)
    first, *others = arms
    said = []
    for other in others:
        judged = dict(judged_axes(axes, other, first))
        if not judged:
            said.append(f"{other.title} shares no measurement with {first.title}: other pictures or input size.")
            continue
        better, worse, open_ = (sum(one == sign for one in judged.values()) for sign in (1, -1, 0))
        told = (
            _told(axis, f"{value_text(axis, other)} against {value_text(axis, first)}")
            for axis in judged
            if axis.suite in CLEAN or axis.suite in ("imagenet-c", "generated")
        )
        chance = "number of pictures" if min(len(other.members), len(first.members)) == 1 else "scatter between seeds"
        said.append(
            f"Against {first.title}, {other.title} is better on {better} of {len(judged)} suites and worse on "
            f"{worse}, beyond what the {chance} leaves to chance; {open_} are undecided. "
            + "".join(f"{one}. " for one in told)
        )
    if not others:
        own = [axis for axis in axes if axis.key in (*CLEAN, "imagenet-c/mce", "generated/mean")]
        suites = len(suites_of(results))
        found = [f"{first.title} on {suites} suite{'' if suites == 1 else 's'}"]
        said = [". ".join(found + [_told(axis, value_text(axis, first)) for axis in own]) + "."]
    return [*said, *measured_on(results), *caution(results)]


def measured_on(results: Results) -> list[str]:
    """Of how many pictures the numbers are, where it is a choice of them, and whether one version measured them all."""
    subset, but = made_subset(results), "" if common_subset(results) else "; clean and conflicting ones on all"
    return [*([f"Measured on {subset}{but}."] if subset else []), *mixed_versions(results)]


def mixed_versions(results: Results) -> list[str]:
    """A warning, where numbers that stand side by side were measured under several versions."""
    under = results.get("measured_under", [])
    values: dict[str, set[str]] = {}
    for name, value in (item for one in under for item in one["versions"].items() if item[0] != COMMIT_KEY):
        values.setdefault(name, set()).add(value)
    mixed = [f"{name} {results['versions'][name]}" for name, several in values.items() if len(several) > 1]
    if values and not all(one["versions"] for one in under):
        mixed.append("cells of an older release, which recorded none")
    if not mixed:
        return []
    return [
        f"Caution: measured under several versions ({'; '.join(mixed)}), which differences may come from. To measure "
        "all anew, delete the folder cells beside results.json and give the command again."
    ]


def caution(results: Results) -> list[str]:
    """How far the numbers of trainings carry, and whether their attacks did anything; nothing without trainings."""
    if "training" not in results:
        return []
    arms, runs = groups_of(results), results["training"]["runs"]
    fewest = min(len(arm.members) for arm in arms)
    said = [
        f"Numbers are means over at least {fewest} seeds, ± the standard deviation between them."
        if fewest > 1
        else "One seed: the scatter between trainings is unknown, and a second seed may turn any of these differences."
    ]
    changed = {arm.title: arm.stat(lambda name: changed_words(runs[name])) for arm in arms}
    shares = {title: share for title, share in changed.items() if share is not None}
    if shares:
        told = ", ".join(f"{title} {share.text(2)} %" for title, share in shares.items())
        said.append(f"Visual words changed in the last epoch of training: {told}.")
    if idle := [title for title, share in shares.items() if share.mean == 0]:
        said.append(f"Where none was changed ({', '.join(idle)}), the attack did nothing beyond the reconstruction.")
    return said


def changed_words(run: TrainingRun) -> float | None:
    """Percent of visual words changed in the last epoch, None for training without an adversary."""
    values = [value for _, value in run["curves"].get("changed_words", []) if value is not None]
    return 100 * values[-1] if values else None


def _told(axis: Metric, value: str) -> str:
    """'ImageNet: 84.58 against 83.60 %'."""
    title = axis.title.removesuffix(" (%)")
    return f"{title}: {value}{'' if title == axis.title else ' %'}"


def judged_axes(axes: Sequence[Metric], new: Group, old: Group) -> Iterator[tuple[Metric, int]]:
    """One axis of each measurement that both share, with its verdict: the first that has one speaks for it."""
    seen = set()
    for axis in axes:
        asked = axis.suite, tuple(axis.numbers)
        if asked not in seen and (sign := verdict(axis, new, old)) is not None:
            seen.add(asked)
            yield axis, sign


# ---- beside published rows ----

NEAR = 2  # published rows of a column that are shown at once: so many of the best, and so many nearest to each network


def published_tables(results: Results) -> list[Table]:
    """Published rows beside the whole, official measurements: the references, the best and the nearest at once, the
    others folded away. Nothing where there is nothing that may stand beside."""
    axes = [axis for axis in metrics_of(results) if axis.published in COLUMNS]
    columns = [key for key in COLUMNS if any(axis.published == key for axis in axes)]
    if not columns:
        return []
    own = []
    for arm in groups_of(results):
        name = next(iter(arm.members.values()))
        found = {axis.published: axis for axis in axes if name in axis.numbers}
        if found:
            shown = [value_text(found[key], arm) if key in found else NOTHING for key in columns]
            own.append((arm.title, pixels_text(results["models"][name]["size"]), *shown, "this report"))
    there = [row for row in published_rows() if any(key in row.values for key in columns)]
    near = _near(there, columns, axes)
    at_once, folded = (
        sorted((row for row in there if (row in near) == now), key=lambda row: row.more_data) for now in (True, False)
    )
    head = ("", "px", *(COLUMNS[key] for key in columns), "source")
    rows, notes = _rows_of(at_once, columns)
    tables = [Table("published", "Beside published rows", head, (*own, *rows), notes, breaks=frozenset({len(own)}))]
    if folded:
        rows, notes = _rows_of(folded, columns)
        title = f"{len(folded)} further published rows"
        tables.append(Table("published-more", title, head, rows, notes, folded=True))
    return tables


def _near(rows: Sequence[Published], columns: Sequence[str], axes: Sequence[Metric]) -> list[Published]:
    """The rows that a reader wants to see at once."""
    near = [row for row in rows if row.reference]
    for key in columns:
        values = [(number, row) for row in rows if not row.more_data and (number := row.number(key)) is not None]
        best = 0.0 if COLUMNS[key].endswith("↓") else 100.0
        own = [number.value for axis in axes if axis.published == key for number in axis.numbers.values()]
        for aim in (best, *own):
            near += [row for _, row in sorted(values, key=lambda one: abs(one[0] - aim))[:NEAR]]
    return near


def _rows_of(rows: Sequence[Published], columns: Sequence[str]) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Published rows as text, and the notes that say what they are."""
    sources: dict[str, int] = {}
    found = []
    for row in rows:
        number = sources.setdefault(row.source, len(sources) + 1)
        told = f"[{number}]" + (", more data" if row.more_data else "")
        found.append((row.model, row.px or NOTHING, *(row.values.get(key, NOTHING) for key in columns), told))
    notes = [
        "Published rows are of networks trained on ImageNet-1k alone, but where they say more data; as printed, none "
        "measured by us."
    ]
    if any(text.endswith(UNSURE) for row in found for text in row):
        notes.append(unsure_note())
    notes.append(" ".join(f"[{number}] {source}." for source, number in sources.items()))
    return tuple(found), tuple(notes)
