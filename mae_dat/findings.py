"""What the numbers of a whole run say: one schema, means over seeds, the headline table and sentences that claim no
more than that.

A run of one model with one seed is a `Run`; runs of one name form a `Group`, in order of first appearance.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from mae_dat.corruptions import CORRUPTIONS, SEVERITIES, SOURCE
from mae_dat.scores import (
    ModelScores,
    Stat,
    accuracy,
    category_errors,
    coverage,
    difference_error,
    mean_error,
    shape_share,
)

Curve = list[list[float | None]]  # [epoch, value] pairs; None where the value was not finite


class Run(ModelScores):
    """One model trained with one seed, and what was measured on it."""

    name: str  # "plain", "random", "dat": runs of one name are averaged
    label: str  # how the report calls it
    seed: int
    seconds: float  # of training
    curves: NotRequired[dict[str, Curve]]  # train_loss, test_acc1 (%), changed_words (share, 0..1) ...


class Pretraining(TypedDict):
    """The stage before fine-tuning, shared by all models."""

    curves: dict[str, Curve]
    seconds: float


class Gallery(TypedDict):
    """A picture made during the run; `file` is a PNG, relative to the report's folder."""

    title: str
    caption: str
    file: str


class Results(TypedDict):
    """Everything a report is made of, as stored in results.json."""

    title: str
    command: str
    created: str  # UTC, ISO 8601
    seconds: float
    machine: dict[str, str]
    versions: dict[str, str]
    settings: dict[str, dict[str, Any]]  # stage -> setting -> value
    notes: list[str]
    models: list[Run]
    pretraining: NotRequired[Pretraining]
    galleries: list[Gallery]


@dataclass(frozen=True)
class Group:
    """All seeds of one model."""

    name: str
    label: str
    style: int  # number of its colour and marker in every chart
    runs: tuple[Run, ...]

    def stat(self, value: "Callable[[Run], float | None]") -> Stat | None:
        """Mean and spread of one number over the seeds that have it."""
        return Stat.of(value(run) for run in self.runs)


@dataclass(frozen=True)
class Column:
    """One number of the headline table; `sign` is +1 where more is better, -1 where less is, 0 where neither."""

    key: str
    title: str
    unit: str
    sign: int
    value: Callable[[Run], float | None]
    digits: int = 1


@dataclass(frozen=True)
class Cell:
    """A number as shown; `best` marks the best of its column."""

    text: str
    best: bool


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Group runs by name; the label is that of the first one."""
    names = list(dict.fromkeys(run["name"] for run in runs))
    members = [tuple(run for run in runs if run["name"] == name) for name in names]
    return [Group(name, of[0]["label"], i, of) for i, (name, of) in enumerate(zip(names, members, strict=True))]


def mean_error_or_none(run: Run) -> float | None:
    """Mean corruption error in percent, None if nothing was corrupted."""
    return mean_error(run) if category_errors(run) else None


def bias_or_none(run: Run) -> float | None:
    """Shape bias in 0..1, None if it was not measured."""
    return shape_share(run["shape_bias"]) if "shape_bias" in run else None


def coverage_or_none(run: Run) -> float | None:
    """Percent of the conflict pictures answered with either cue."""
    return 100 * coverage(run["shape_bias"]) if "shape_bias" in run else None


def changed_words(run: Run) -> float | None:
    """Percent of visual words changed in the last epoch, None for training without an adversary."""
    values = [value for _, value in run.get("curves", {}).get("changed_words", []) if value is not None]
    return 100 * values[-1] if values else None


def clean_accuracy(run: Run) -> float | None:
    """Top-1 accuracy in percent on clean images."""
    return accuracy(run["clean"])


def _category(name: str) -> Callable[[Run], float | None]:
    return lambda run: category_errors(run).get(name)


COLUMNS = (
    Column("clean", "clean accuracy", "%", +1, clean_accuracy),
    Column("mean", "mean corruption error", "%", -1, mean_error_or_none),
    *(Column(name, name, "%", -1, _category(name)) for name in ("noise", "blur", "weather", "digital")),
    Column("shape", "shape bias", "0–1", +1, bias_or_none, 2),
    Column("coverage", "coverage", "%", 0, coverage_or_none),
    Column("words", "changed words", "%", 0, changed_words, 2),
    Column("time", "training", "min", -1, lambda run: run["seconds"] / 60),
)


def comparable(groups: Sequence[Group]) -> bool:
    """Whether all runs were measured on the same corruptions, severities and number of images."""
    kinds = {
        (
            run["clean"]["total"],
            *((c, s, n["total"]) for c, cells in sorted(run["corruptions"].items()) for s, n in sorted(cells.items())),
        )
        for group in groups
        for run in group.runs
    }
    return len(kinds) == 1


def headline(groups: Sequence[Group]) -> tuple[list[Column], list[list[Cell]]]:
    """Columns with at least one number, and one row of cells a group. Without comparable runs nothing is called
    best.
    """
    columns = [column for column in COLUMNS if any(group.stat(column.value) for group in groups)]
    ranked = len(groups) > 1 and comparable(groups)
    cells = [_cells(column, groups, ranked) for column in columns]
    return columns, [[column[i] for column in cells] for i in range(len(groups))]


def _cells(column: Column, groups: Sequence[Group], ranked: bool) -> list[Cell]:
    """One column of the table. Values that look equal when rounded are equally good."""
    stats = [group.stat(column.value) for group in groups]
    rounded = [None if stat is None else round(stat.mean, column.digits) for stat in stats]
    present = [value for value in rounded if value is not None]
    telling = ranked and column.sign != 0 and len(set(present)) > 1
    best = max(present, key=lambda value: value * column.sign) if telling else None
    return [
        Cell("–" if stat is None else stat.text(column.digits), best is not None and value == best)
        for stat, value in zip(stats, rounded, strict=True)
    ]


def markdown(groups: Sequence[Group]) -> str:
    """The headline table for a Markdown document; the best of a column is bold."""
    columns, rows = headline(groups)
    lines = [["model", *(f"{column.title} ({column.unit})" for column in columns)], ["---"] * (len(columns) + 1)]
    for group, cells in zip(groups, rows, strict=True):
        lines.append([group.label, *(f"**{cell.text}**" if cell.best else cell.text for cell in cells)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def paired_markdown(groups: Sequence[Group]) -> str:
    """Differences at the same seed, mean ± standard deviation, for every pair of groups with the same seeds.

    Runs of one seed share initialization, order of images and pictures measured, so their difference scatters less
    than either.
    """
    columns = [column for column in COLUMNS if column.sign and column.key != "time"]
    columns = [column for column in columns if all(group.stat(column.value) for group in groups)]
    lines = [["difference at the same seed", *(column.title for column in columns)], ["---"] * (len(columns) + 1)]
    for i, group in enumerate(groups):
        for other in groups[:i]:
            pairs = [(a, b) for a in group.runs for b in other.runs if a["seed"] == b["seed"]]
            cells = [Stat.of(_difference(column, a, b) for a, b in pairs) for column in columns]
            texts = [
                "–" if cell is None else cell.text(max(column.digits, 2))
                for column, cell in zip(columns, cells, strict=True)
            ]
            lines.append([f"{group.label} − {other.label}", *texts])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _difference(column: Column, a: Run, b: Run) -> float | None:
    first, second = column.value(a), column.value(b)
    return None if first is None or second is None else first - second


def _seeds(groups: Sequence[Group]) -> int:
    """The smallest number of seeds of any model."""
    return min(len(group.runs) for group in groups)


def _listing(words: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _several(count: int, noun: str, plural: str | None = None) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {plural or noun + 's'}"


def _gap(a: Group, b: Group, what: str, value: Callable[[Run], float | None]) -> str | None:
    """'a lower clean accuracy by 2.1 points (41.2 against 43.3 %)', with its uncertainty where seeds tell it."""
    left, right = a.stat(value), b.stat(value)
    if left is None or right is None:
        return None
    gap = left.mean - right.mean
    values = f"{left.text()} against {right.text()} %"
    if round(abs(gap), 1) == 0:
        return f"the same {what} to a tenth of a point ({values})"
    clause = f"a {'lower' if gap < 0 else 'higher'} {what} by {abs(gap):.1f} points"
    noise = difference_error(left, right)
    if noise is None:
        return f"{clause} ({values})"
    chance = ", which may be chance" if abs(gap) < 2 * noise else ""
    return f"{clause} ({values}; standard error of the difference {noise:.1f}){chance}"


def compare(a: Group, b: Group) -> str | None:
    """'DAT has, against plain, a lower mean corruption error by 2.1 points (...) and ...'; None without a number."""
    values = (("mean corruption error", mean_error_or_none), ("clean accuracy", clean_accuracy))
    gaps = [gap for what, value in values if (gap := _gap(a, b, what, value))]
    if not gaps:
        return None
    seeds = " (one seed each)" if len(a.runs) == len(b.runs) == 1 else ""
    return f"Compared with {b.label}, {a.label} has {_listing(gaps)}{seeds}."


def _pairs(groups: Sequence[Group]) -> list[tuple[Group, Group]]:
    """What to compare: everything with plain training (or the first model), and DAT with random words."""
    base = next((group for group in groups if group.name == "plain"), groups[0])
    chance = next((group for group in groups if group.name == "random"), None)
    pairs = [(group, base) for group in groups if group is not base]
    if chance is not None and chance is not base:
        pairs += [(group, chance) for group in groups if group.name.startswith("dat")]
    return pairs


def _setup(groups: Sequence[Group]) -> str:
    """What was measured, in one sentence."""
    run = groups[0].runs[0]
    images = _several(run["clean"]["total"], "clean image")
    models = f"{_several(len(groups), 'model')} ({_listing([group.label for group in groups])})"
    sentence = f"{models} measured on {images}"
    if run["corruptions"]:
        severities = {severity for cells in run["corruptions"].values() for severity in cells}
        kinds = _several(len(run["corruptions"]), "corruption")
        sentence += f" and {kinds} at {_several(len(severities), 'severity', 'severities')} ({SOURCE})"
    return f"{sentence}."


def _words(groups: Sequence[Group]) -> list[str]:
    """How strong the attacks were; an attack that changed nothing is called that."""
    shares = {group.label: share for group in groups if (share := group.stat(changed_words)) is not None}
    if not shares:
        return []
    listed = _listing([f"{label} {share.text(2)} %" for label, share in shares.items()])
    sentences = [f"Visual words changed in the last epoch: {listed}."]
    idle = [label for label, share in shares.items() if share.mean == 0]
    if idle:
        sentences.append(
            f"Where none was changed ({_listing(idle)}), the attack did nothing beyond the reconstruction."
        )
    return sentences


def caution(groups: Sequence[Group]) -> str:
    """How far the numbers carry: the number of seeds, and the sampling error of the clean accuracy."""
    if not groups:
        return ""
    run = groups[0].runs[0]
    total, rate = run["clean"]["total"], accuracy(run["clean"]) / 100
    sampling = 100 * math.sqrt(rate * (1 - rate) / total)
    size = (
        f"With {_several(total, 'image')} a clean accuracy alone has a sampling error of about ± {sampling:.1f} points."
    )
    if _seeds(groups) > 1:
        return f"Numbers are means over at least {_seeds(groups)} seeds, ± the standard deviation between them. {size}"
    who = "One seed" if all(len(group.runs) == 1 for group in groups) else "Some models have one seed"
    return f"{who}: the scatter between seeds is unknown, and differences below about 2 points mean nothing. {size}"


def summary(groups: Sequence[Group]) -> list[str]:
    """The run in plain sentences, each computed from the counts. `caution` belongs beside them."""
    if not groups:
        return ["No model was measured."]
    sentences = [_setup(groups)]
    if comparable(groups):
        sentences += [compare(a, b) or "" for a, b in _pairs(groups)]
    else:
        sentences.append("The models were measured on different pictures, so their numbers cannot be compared.")
    sentences += _words(groups)
    return [sentence for sentence in sentences if sentence]


def not_measured(results: Results, groups: Sequence[Group]) -> list[str]:
    """What a reader might take for granted and the run did not measure."""
    runs = results["models"]
    missing = [name for name in CORRUPTIONS if not all(run["corruptions"].get(name) for run in runs)]
    severities = [s for s in SEVERITIES if not all(_has_severity(run["corruptions"], str(s)) for run in runs)]
    remarks = [
        f"The official ImageNet-C files: the pictures here were {SOURCE}. The mean corruption error is therefore a "
        "plain mean of error rates and not the AlexNet-normalised mCE of the literature."
    ]
    if missing:
        remarks.append(f"Corruptions, for at least one model: {', '.join(missing)}.")
    if severities and len(missing) < len(CORRUPTIONS):
        remarks.append(f"Severities, for at least one model: {', '.join(map(str, severities))}.")
    if not all("shape_bias" in run for run in runs):
        remarks.append("Shape bias, for at least one model.")
    if groups and _seeds(groups) == 1:
        remarks.append("The scatter between seeds, for models with a single seed.")
    remarks.append(
        "Natural shifts (ImageNet-A, -R, -Sketch, -V2, ObjectNet), pixel attacks (PGD, AutoAttack), calibration."
    )
    return remarks


def _has_severity(cells: Mapping[str, Mapping[str, Any]], severity: str) -> bool:
    return bool(cells) and all(severity in counts for counts in cells.values())
