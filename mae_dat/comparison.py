"""What an evaluation says at once: every axis with networks side by side, the differences to the first of them and how
sure they are, and the published rows that may stand beside."""

from collections.abc import Iterator, Sequence

from mae_dat.axes import CLEAN, ORDER, Axis, axes_of, common_subset, interval, pixels_text, suites_of
from mae_dat.published import COLUMNS, published_rows
from mae_dat.results import Results
from mae_dat.tables import NOTHING, Table, number_text, titles_of

ARROWS = {+1: " ↑", -1: " ↓", 0: ""}
DOUBT = "‡"
NOTES = (
    "↑ more is better, ↓ less is better.",
    "* not a published benchmark's files: corruptions generated on the fly from clean pictures, or pictures of one's "
    "own. AlexNet's errors do not belong to them.",
    "† partial: pictures are missing (the table of suites says which).",
)


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def verdict(axis: Axis, model: str, first: str) -> int | None:
    """+1 where a network is better than the first beyond chance, -1 where it is worse, 0 where neither can be said;
    None where the axis has no interval or no better, or the attack is in doubt."""
    if not axis.better or model not in axis.numbers or first not in axis.numbers:
        return None
    new, old = axis.numbers[model], axis.numbers[first]
    ends = interval(new, old)
    if ends is None or new.doubtful or old.doubtful:
        return None
    return axis.better if ends[0] > 0 else -axis.better if ends[1] < 0 else 0


def difference_text(axis: Axis, model: str, first: str) -> str:
    """'+1.2 [+0.4, +2.0] better': the difference, its 95 % interval, and what it says where it says anything."""
    new, old = axis.numbers.get(model), axis.numbers.get(first)
    if new is None or old is None:
        return NOTHING
    gap, ends = _signed(new.value - old.value, axis.digits), interval(new, old)
    if ends is None:
        return gap
    telling = {1: " better", -1: " worse"}.get(verdict(axis, model, first) or 0, "")
    return f"{gap} [{_signed(ends[0], axis.digits)}, {_signed(ends[1], axis.digits)}]{telling}"


def value_text(axis: Axis, model: str) -> str:
    """A network's number on an axis; a dash where there is none."""
    number = axis.numbers.get(model)
    return NOTHING if number is None else number_text(number.value, axis.digits) + DOUBT * number.doubtful


def headline_table(results: Results) -> Table:
    """Every axis, networks side by side, then what each differs by from the first."""
    titles, axes = titles_of(results), axes_of(results)
    first, *others = titles
    head = ("", *titles.values(), *(f"{titles[other]} − {titles[first]} [95 %]" for other in others))
    rows = []
    for axis in axes:
        shown = (value_text(axis, model) for model in titles)
        gaps = (difference_text(axis, other, first) for other in others)
        rows.append((axis.title + ARROWS[axis.better], *shown, *gaps))
    groups = [_group(axis) for axis in axes]
    breaks = frozenset(i for i in range(1, len(groups)) if groups[i] != groups[i - 1])
    notes = [*NOTES[:1], *(note for note in NOTES[1:] if any(note[0] in axis.title for axis in axes))]
    if subset := common_subset(results):
        notes.append(f"All suites: {subset}.")
    if any(DOUBT in text for row in rows for text in row):
        notes.append(f"{DOUBT} a check of this attack failed: the network may be less robust than that.")
    if others:
        notes.append(
            f"Differences are to {titles[first]}. Their 95 % intervals are those of the number of pictures (Newcombe), "
            "as if each network had met other pictures and a picture were as hard in every cell of a mean: true ones "
            "are narrower. They say nothing of the scatter between training runs."
        )
    return Table("headline", "Numbers", head, tuple(rows), tuple(notes), breaks=breaks)


def _group(axis: Axis) -> str:
    """What stands between two lines of the headline."""
    if axis.suite in ORDER:
        return "pictures" if ORDER.index(axis.suite) < ORDER.index("imagenet-c") else axis.suite
    return "attacks"


def summary(results: Results) -> list[str]:
    """What the headline says, in a sentence for each network beside the first."""
    titles, axes = titles_of(results), axes_of(results)
    first, *others = titles
    said = []
    for other in others:
        judged = dict(judged_axes(axes, other, first))
        if not judged:
            said.append(f"{titles[other]} shares no measurement with {titles[first]}: other pictures or input size.")
            continue
        better, worse, open_ = (sum(one == sign for one in judged.values()) for sign in (1, -1, 0))
        told = (
            _told(axis, f"{value_text(axis, other)} against {value_text(axis, first)}")
            for axis in judged
            if axis.suite in CLEAN or axis.suite in ("imagenet-c", "generated")
        )
        said.append(
            f"Against {titles[first]}, {titles[other]} is better on {better} of {len(judged)} suites and worse on "
            f"{worse}, beyond what the number of pictures leaves to chance; {open_} are undecided. "
            + "".join(f"{one}. " for one in told)
        )
    if not others:
        own = [axis for axis in axes if axis.key in (*CLEAN, "imagenet-c/mce", "generated/mean")]
        suites = len(suites_of(results))
        found = [f"{titles[first]} on {suites} suite{'' if suites == 1 else 's'}"]
        said = [". ".join(found + [_told(axis, value_text(axis, first)) for axis in own]) + "."]
    if subset := common_subset(results):
        said.append(f"Measured on {subset}.")
    return said


def _told(axis: Axis, value: str) -> str:
    """'ImageNet: 84.58 against 83.60 %'."""
    title = axis.title.removesuffix(" (%)")
    return f"{title}: {value}{'' if title == axis.title else ' %'}"


def judged_axes(axes: Sequence[Axis], model: str, first: str) -> Iterator[tuple[Axis, int]]:
    """One axis of each measurement that both share, with its verdict: the first that has one speaks for it."""
    seen = set()
    for axis in axes:
        asked = axis.suite, tuple(axis.numbers)
        if asked not in seen and (sign := verdict(axis, model, first)) is not None:
            seen.add(asked)
            yield axis, sign


def published_table(results: Results) -> Table | None:
    """Published rows beside the whole, official measurements; None where there is nothing that may stand beside."""
    titles, axes = titles_of(results), [axis for axis in axes_of(results) if axis.published in COLUMNS]
    columns = [key for key in COLUMNS if any(axis.published == key for axis in axes)]
    if not columns:
        return None
    rows = []
    for model, title in titles.items():
        own = {axis.published: axis for axis in axes if model in axis.numbers}
        if own:
            shown = [value_text(own[key], model) if key in own else NOTHING for key in columns]
            rows.append((title, pixels_text(results["models"][model]["size"]), *shown, "this report"))
    line = len(rows)
    sources: dict[str, int] = {}
    for row in published_rows():
        if any(key in row.values for key in columns):
            number = sources.setdefault(row.source, len(sources) + 1)
            shown = [row.values.get(key, NOTHING) for key in columns]
            rows.append((row.model, row.px or NOTHING, *shown, f"[{number}]"))
    head = ("", "px", *(COLUMNS[key] for key in columns), "source")
    notes = (
        "Published rows are of networks trained on ImageNet-1k alone, as printed; none was measured by us.",
        " ".join(f"[{number}] {source}." for source, number in sources.items()),
    )
    return Table("published", "Beside published rows", head, tuple(rows), notes, breaks=frozenset({line}))
