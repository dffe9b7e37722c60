"""The tables of an evaluation's report, as text: made once, so that a page, Markdown and LaTeX show the same digits."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from mae_dat.axes import (
    Variant,
    kind_of,
    kinds_of,
    mean_of,
    scores_of,
    severity_means,
    suites_of,
    variants,
)
from mae_dat.corruptions import CATEGORIES, CORRUPTIONS, EXTRA, SEVERITIES
from mae_dat.mce import corruption_errors, mce, severity_mce
from mae_dat.results import Contender, Results
from mae_dat.scores import ModelScores, accuracy, category_errors, corruption_error

NOTHING = "–"
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


def number_text(value: float | None, digits: int) -> str:
    """'41.2'; a dash for what was not measured or is not finite."""
    return NOTHING if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def titles_of(results: Results) -> dict[str, str]:
    """What the report calls each network: its title, with its name where two have the same."""
    titles = [facts["title"] for facts in results["models"].values()]
    return {
        name: facts["title"] if titles.count(facts["title"]) == 1 else f"{facts['title']} ({name})"
        for name, facts in results["models"].items()
    }


# ---- corruptions ----


def corruption_names(scores: Mapping[str, ModelScores]) -> list[str]:
    """Corruptions that any network has, in the usual order."""
    present = dict.fromkeys(name for one in scores.values() for name in one["corruptions"])
    usual = [name for name in CORRUPTIONS + EXTRA if name in present]
    return usual + [name for name in present if name not in usual]


Summarized = Callable[[ModelScores], float]
MEANS = "means"


def corruption_table(results: Results, variant: Variant) -> Table:
    """Error in percent of each corruption over severities, and its AlexNet-normalised CE for the official files."""
    titles = titles_of(results)
    scores = {model: scores_of(results, model, variant.suite) for model in variant.models}
    official = variant.suite == "imagenet-c" and variant.facts["official"]
    names = corruption_names(scores)
    kinds = kinds_of(names)
    lines: list[tuple[str, str, Summarized, Summarized]] = [
        (name.replace("_", " "), kinds[name], partial(_error_of, name), partial(_ce_of, name)) for name in names
    ]
    for kind in CATEGORIES if any(name in CORRUPTIONS for name in names) else ():
        lines.append((f"mean of {kind}", MEANS, partial(_kind_error, kind), partial(_kind_ce, kind)))
    for severity in SEVERITIES:
        lines.append((f"severity {severity}", "", partial(_severity_error, severity), partial(_severity_ce, severity)))
    lines.append(("mean", MEANS, mean_of, mce))
    rows, groups = [], []
    for title, group, error_of, ce_of in lines:
        errors = [_number(error_of, own) for own in scores.values()]
        ces = [_number(ce_of, own) for own in scores.values()] if official else []
        if any(text != NOTHING for text in errors):
            rows.append((title, group.removeprefix(MEANS), *errors, *ces))
            groups.append(group)
    breaks = frozenset(i for i in range(1, len(groups)) if groups[i] != groups[i - 1])
    head = ["corruption", "kind", *(f"{titles[model]}, error %" for model in scores)]
    head += [f"{titles[model]}, CE" for model in scores] if official else []
    notes = ["Error averaged over severities. Held-out corruptions never count in a mean."]
    if official:
        notes.append(
            "CE: error over AlexNet's, in percent (Hendrycks & Dietterich 2019); their mean over the 15 is the mCE."
        )
    key = re.sub(r"[^a-z0-9]+", "-", f"corruptions {variant.title}".lower()).strip("-")
    return Table(key, variant.title, tuple(head), tuple(rows), tuple(notes), 2, breaks)


def _number(value: Summarized, scores: ModelScores) -> str:
    """One decimal; a dash where not all that it needs was measured."""
    try:
        return number_text(value(scores), 1)
    except (KeyError, ValueError):
        return NOTHING


def _error_of(name: str, scores: ModelScores) -> float:
    return corruption_error(scores["corruptions"][name])


def _ce_of(name: str, scores: ModelScores) -> float:
    return corruption_errors({**scores, "corruptions": {name: scores["corruptions"][name]}})[name]


def _kind_error(kind: str, scores: ModelScores) -> float:
    return category_errors(scores)[kind]


def _kind_ce(kind: str, scores: ModelScores) -> float:
    return mce(scores, names=CATEGORIES[kind])


def _severity_error(severity: int, scores: ModelScores) -> float:
    return severity_means(scores)[severity]


def _severity_ce(severity: int, scores: ModelScores) -> float:
    return severity_mce(scores)[severity]


# ---- the rest ----


def words_table(results: Results) -> Table | None:
    """Accuracy by share of changed words."""
    titles = titles_of(results)
    own = [variant for variant in variants(results) if variant.suite.startswith("words")]
    if not own:
        return None
    columns = [(variant, model) for variant in own for model in variant.models]
    cells = [results["cells"][model][variant.suite] for variant, model in columns]
    shares = sorted({share for found in cells for share in found}, key=float)
    rows = [
        (f"{100 * float(share):g}", *(number_text(accuracy(one[share]) if share in one else None, 1) for one in cells))
        for share in shares
    ]
    head = ("words changed, up to %", *(f"{titles[model]}: {variant.title}" for variant, model in columns))
    notes = ("Top-1 accuracy in percent. At 0 the picture is decoded from its own words.",)
    return Table("words", "Changed words", head, tuple(rows), notes)


def calibration_table(results: Results) -> Table | None:
    """Every calibration number."""
    titles = titles_of(results)
    rows = [
        (
            titles[model],
            next((one.title for one in variants(results) if one.suite == suite and model in one.models), suite),
            *(number_text(_scaled(found.get(key), 100), 2) for key in ("ece", "rms", "rms_compat")),
            *(number_text(found.get(key), 3) for key in ("nll", "brier")),
        )
        for model in titles
        for suite, found in results["calibration"].get(model, {}).items()
    ]
    head = ("network", "suite", "ECE (%) ↓", "RMS (%) ↓", "RMS, as released (%) ↓", "NLL ↓", "Brier ↓")
    notes = (
        "ECE: 15 bins of equal width. RMS: bins of 100 pictures; the released code leaves the last of them out. NLL in "
        "nats; Brier from 0 to 2.",
    )
    return Table("calibration", "Calibration", head, tuple(rows), notes, 2) if rows else None


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else factor * value


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

    def averaged(facts: Contender) -> str:
        return {None: "not known", True: "moving average", False: "as trained"}[facts["averaged"]]

    facts = list(results["models"].values())
    rows = (
        ("weights from", *(one["source"] for one in facts)),
        ("sha256", *(one["sha256"] or "none: no file" for one in facts)),
        ("architecture", *(one["architecture"] for one in facts)),
        ("parameters", *(f"{one['parameters']:,}" for one in facts)),
        ("input", *(f"{one['size'][0]} × {one['size'][1]} px" for one in facts)),
        ("interpolation", *(one["interpolation"] for one in facts)),
        ("normalization", *(one["normalization"] for one in facts)),
        ("precision", *(precision_text(results, model) for model in results["models"])),
        ("weights", *map(averaged, facts)),
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
                "official files" if facts["official"] else "made or chosen here",
                f"{facts['images']:,}" + (f" ({facts['left_out']:,} left out)" if facts["left_out"] else ""),
                "; ".join(facts["missing"]) or "nothing",
                protocol,
                facts["fingerprint"][:12],
            )
        )
    head = ("suite", "networks", "pictures are", "in each cell", "missing", "protocol", "fingerprint")
    return Table("suites", "Suites", head, tuple(rows), words=7)


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
    return [*said, "The scatter between training runs: each network is one checkpoint."]
