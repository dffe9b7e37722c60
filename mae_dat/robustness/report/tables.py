"""The tables of an evaluation's report, as text: made once, so that a page, Markdown and LaTeX show the same digits."""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from mae_dat.robustness.corruptions import CATEGORIES, CORRUPTIONS, EXTRA, SEVERITIES
from mae_dat.robustness.report.groups import Group, groups_of, titles_of
from mae_dat.robustness.report.metrics import (
    Variant,
    kind_of,
    kinds_of,
    mean_of,
    scores_of,
    severity_means,
    suites_of,
    variants,
)
from mae_dat.robustness.scores.accuracy import (
    CorruptionCounts,
    SeedStatistics,
    category_errors,
    top1_accuracy,
    unnormalized_ce,
)
from mae_dat.robustness.scores.corruption_error import corruption_errors, mce, severity_mce
from mae_dat.robustness.scores.results import ModelFacts, Results, TrainingFacts

NOTHING, INFINITE = "–", "∞"
OTHERWISE = 0.0002  # share of answers that bf16 may change before a reader is told that it is much


@dataclass(frozen=True)
class Table:
    """Cells of text; the first `words` columns are left-aligned."""

    key: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    words: int = 1
    breaks: frozenset[int] = field(default_factory=frozenset)
    """Rows above which a line is drawn."""
    best: frozenset[tuple[int, int]] = field(default_factory=frozenset)
    """Rows and columns of numbers that are the best of their row, beyond chance."""
    folded: bool = False
    """Whether a page shows it only when asked."""


def stat_text(values: Iterable[float | None], digits: int) -> str:
    """'41.2', or '41.2 ± 0.3' of several seeds; a dash for what was not measured or is not finite."""
    stat = SeedStatistics.of(value for value in values if value is not None and math.isfinite(value))
    return NOTHING if stat is None else stat.text(digits)


# ---- corruptions ----


def corruption_names(scores: Mapping[str, CorruptionCounts]) -> list[str]:
    """Corruptions that any network has, in the usual order."""
    present = dict.fromkeys(name for one in scores.values() for name in one["corruptions"])
    usual = [name for name in CORRUPTIONS + EXTRA if name in present]
    return usual + [name for name in present if name not in usual]


Summarized = Callable[[CorruptionCounts], float]
MEANS = "means"


def corruption_table(results: Results, variant: Variant) -> Table:
    """Error in percent of each corruption over severities, and for the official files its AlexNet-normalised CE, also
    relative to the clean error."""
    arms = groups_of(results, variant.models)
    scores = {model: scores_of(results, model, variant.suite) for model in variant.models}
    official = variant.suite == "imagenet-c" and variant.facts["official"]
    names = corruption_names(scores)
    kinds = kinds_of(names)
    lines: list[tuple[str, str, tuple[Summarized, ...]]] = [
        (
            name.replace("_", " "),
            kinds[name],
            tuple(partial(value, name) for value in (_error_of, _ce_of, _relative_ce)),
        )
        for name in names
    ]
    for kind in CATEGORIES if any(name in CORRUPTIONS for name in names) else ():
        ce = partial(_kind_ce, kind)
        lines.append((f"mean of {kind}", MEANS, (partial(_kind_error, kind), ce, partial(ce, relative=True))))
    for severity in SEVERITIES:
        lines.append(
            (f"severity {severity}", "", (partial(_severity_error, severity), partial(_severity_ce, severity)))
        )
    lines.append(("mean", MEANS, (mean_of, mce, partial(mce, relative=True))))
    own = [[scores[model] for model in arm.members.values()] for arm in arms]
    clean = official and any(one["clean"]["total"] for one in scores.values())
    columns = ("error %", *(("CE",) if official else ()), *(("relative CE",) if clean else ()))
    rows, groups = [], []
    for title, group, values in lines:
        texts = [[_number(value, members) for members in own] for value in values[: len(columns)]]
        texts += [[NOTHING] * len(own)] * (len(columns) - len(texts))
        if any(text != NOTHING for text in texts[0]):
            rows.append((title, group.removeprefix(MEANS), *itertools.chain(*texts)))
            groups.append(group)
    breaks = frozenset(i for i in range(1, len(groups)) if groups[i] != groups[i - 1])
    head = ["corruption", "kind", *(f"{arm.title}, {column}" for column in columns for arm in arms)]
    notes = ["Error averaged over severities. Held-out corruptions never count in a mean."]
    if official:
        notes.append(
            "CE: error over AlexNet's, in percent (Hendrycks & Dietterich 2019); their mean over the 15 is the mCE."
        )
    if clean:
        notes.append(
            "Relative CE: the same of what the error is above that on clean pictures, of both networks; their mean is "
            "the relative mCE."
        )
    key = re.sub(r"[^a-z0-9]+", "-", f"corruptions {variant.title}".lower()).strip("-")
    return Table(key, variant.title, tuple(head), tuple(rows), tuple(notes), 2, breaks)


def _number(value: Summarized, members: Sequence[CorruptionCounts]) -> str:
    """One decimal; a dash where not all that it needs was measured."""
    try:
        return stat_text(map(value, members), 1)
    except (KeyError, ValueError):
        return NOTHING


def _error_of(name: str, scores: CorruptionCounts) -> float:
    return unnormalized_ce(scores["corruptions"][name])


def _ce_of(name: str, scores: CorruptionCounts, relative: bool = False) -> float:
    one: CorruptionCounts = {**scores, "corruptions": {name: scores["corruptions"][name]}}
    return corruption_errors(one, relative=relative)[name]


def _relative_ce(name: str, scores: CorruptionCounts) -> float:
    return _ce_of(name, scores, relative=True)


def _kind_error(kind: str, scores: CorruptionCounts) -> float:
    return category_errors(scores)[kind]


def _kind_ce(kind: str, scores: CorruptionCounts, relative: bool = False) -> float:
    return mce(scores, relative=relative, names=CATEGORIES[kind])


def _severity_error(severity: int, scores: CorruptionCounts) -> float:
    return severity_means(scores)[severity]


def _severity_ce(severity: int, scores: CorruptionCounts) -> float:
    return severity_mce(scores)[severity]


# ---- the rest ----


def words_table(results: Results) -> Table | None:
    """Accuracy by share of changed words."""
    own = [variant for variant in variants(results) if variant.suite.startswith("words")]
    if not own:
        return None
    columns = [(variant, arm) for variant in own for arm in groups_of(results, variant.models)]
    cells = [[results["cells"][model][one.suite] for model in arm.members.values()] for one, arm in columns]
    shares = sorted({share for members in cells for found in members for share in found}, key=float)
    rows = [
        (
            f"{100 * float(share):g}",
            *(stat_text((top1_accuracy(one[share]) for one in members if share in one), 1) for members in cells),
        )
        for share in shares
    ]
    head = ("words changed, up to %", *(f"{arm.title}: {variant.title}" for variant, arm in columns))
    notes = ("Top-1 accuracy in percent. At 0 the picture is decoded from its own words.",)
    return Table("words", "Changed words", head, tuple(rows), notes)


def calibration_table(results: Results) -> Table | None:
    """Every calibration number."""
    found = results["calibration"]

    def text(arm: Group, suite: str, key: str, scale: float, digits: int) -> str:
        measured = [found.get(model, {}).get(suite, {}) for model in arm.members.values()]
        values = [one[key] for one in measured if key in one]
        finite = [scale * value for value in values if value is not None]
        return stat_text(finite, digits) if len(finite) == len(values) else INFINITE

    rows = [
        (
            arm.title,
            variant.title,
            *(text(arm, variant.suite, key, 100, 2) for key in ("ece", "rms", "rms_compat")),
            *(text(arm, variant.suite, key, 1, 3) for key in ("nll", "brier")),
        )
        for variant in variants(results)
        for arm in groups_of(results, variant.models)
        if any(variant.suite in found.get(model, {}) for model in arm.members.values())
    ]
    head = ("network", "suite", "ECE (%) ↓", "RMS (%) ↓", "RMS, as released (%) ↓", "NLL ↓", "Brier ↓")
    notes = [
        "ECE: 15 bins of equal width. RMS: bins of 100 pictures; the released code leaves the last of them out. NLL in "
        "nats; Brier from 0 to 2."
    ]
    if any(INFINITE in row for row in rows):
        notes.append(f"{INFINITE}: the class of a picture had probability 0.")
    return Table("calibration", "Calibration", head, tuple(rows), tuple(notes), 2) if rows else None


def checks_table(results: Results) -> Table | None:
    """Whether each attack can be believed."""
    titles = titles_of(results)
    rows = [
        (titles[model], attack, check["name"], "passed" if check["passed"] else "FAILED", check["told"])
        for model in titles
        for attack, checks in results["checks"].get(model, {}).items()
        for check in checks
    ]
    head = ("network", "attack", "check", "", "found")
    notes = (
        "A failed check says that the network may be less robust than its rows: the attack is broken, not beaten.",
    )
    return Table("checks", "Can the attacks be believed?", head, tuple(rows), notes, 5) if rows else None


def precision_text(results: Results, model: str) -> str:
    """'bf16; of 10,000 pictures it answers 1 otherwise than in fp32 (0.01 %)'."""
    precision, count = results["models"][model]["precision"], results.get("agreement", {}).get(model)
    if count is None:
        return precision
    wrong = count["total"] - count["correct"]
    share = wrong / count["total"]
    told = f"{precision}; of {count['total']:,} pictures it answers {wrong:,} otherwise than in fp32 ({share:.2%})"
    return told.replace("%)", " %)") + (f", above {100 * OTHERWISE:g} %" if share > OTHERWISE else "")


def networks_table(results: Results) -> Table:
    """What was evaluated: a column each."""

    def averaged(facts: ModelFacts) -> str:
        return {None: "not known", True: "moving average", False: "as trained"}[facts["averaged"]]

    facts = list(results["models"].values())
    own = any("crop" in one for one in facts)
    rows = (
        ("weights from", *(one["source"] for one in facts)),
        ("sha256", *(one["sha256"] or "none: no file" for one in facts)),
        ("architecture", *(one["architecture"] for one in facts)),
        ("parameters", *(f"{one['parameters']:,}" for one in facts)),
        ("input", *(f"{one['size'][0]} × {one['size'][1]} px" for one in facts)),
        ("interpolation", *(one["interpolation"] for one in facts)),
        *([("crop", *(f"{one['crop']:g} of the side" if "crop" in one else "usual" for one in facts))] if own else ()),
        ("normalization", *(one["normalization"] for one in facts)),
        ("precision", *(precision_text(results, model) for model in results["models"])),
        ("weights are", *map(averaged, facts)),
    )
    return Table("networks", "Networks", ("", *titles_of(results).values()), rows, words=1 + len(facts))


def suites_table(results: Results) -> Table:
    """How each suite was measured; networks for which it is the same share a row."""
    titles = titles_of(results)
    rows = []
    for variant in variants(results):
        facts = variant.facts
        protocol = "; ".join(f"{key}: {value}" for key, value in facts["protocol"].items() if value)
        rows.append(
            (
                variant.title,
                "all" if len(variant.models) == len(titles) else ", ".join(titles[model] for model in variant.models),
                "as stored" if facts["official"] else "made or chosen here",
                f"{facts['images']:,}" + (f" ({facts['left_out']:,} left out)" if facts["left_out"] else ""),
                "; ".join(facts["missing"]) or "nothing",
                protocol,
                facts["fingerprint"][:12],
            )
        )
    head = ("suite", "networks", "pictures are", "in each cell", "missing", "protocol", "fingerprint")
    return Table("suites", "Suites", head, tuple(rows), words=7)


def runs_table(training: TrainingFacts) -> Table:
    """Seeds and minutes of every training, pretrainings first."""
    spent: dict[str, float | None] = {**training.get("cpu_seconds", {})} or {"pretraining": None}
    clock = [f"{training['seconds'] / 60:.1f}"] + [NOTHING] * (len(spent) - 1)
    rows = [(name, "", "", wall, _minutes(cpu)) for (name, cpu), wall in zip(spent.items(), clock, strict=True)]
    for run in training["runs"].values():
        wall, cpu = _minutes(run["seconds"]), _minutes(run.get("cpu_seconds"))
        rows.append((run["label"], run["arm"], str(run["seed"]), wall, cpu))
    notes = ("Processor minutes are over all threads; processes that load pictures are not in them.",)
    return Table("runs", "Training runs", ("", "arm", "seed", "minutes", "processor minutes"), tuple(rows), notes, 2)


def _minutes(seconds: float | None) -> str:
    return NOTHING if seconds is None else f"{seconds / 60:.1f}"


def not_measured(results: Results) -> list[str]:
    """What a reader might take for granted and was not measured, and why."""
    titles = titles_of(results)
    reasons: dict[str, list[str]] = {}
    for suite, why in results["not_measured"].items():
        reasons.setdefault(why, []).append(suite)
    said = [f"{', '.join(suites)}: {why}" for why, suites in reasons.items()]
    for suite in suites_of(results):
        lack = [title for model, title in titles.items() if not results["cells"].get(model, {}).get(suite)]
        if lack:
            said.append(f"{suite}, of {', '.join(lack)}.")
    kinds = {kind_of(found) for own in results["cells"].values() for found in own.values()}
    if "corruptions" in kinds and "imagenet-c" not in suites_of(results):
        said.append("The official ImageNet-C files: no AlexNet-normalised mCE of the literature stands here.")
    if any(len(arm.members) == 1 for arm in groups_of(results)):
        said.append("The scatter between training runs, where a network is one checkpoint.")
    return said
