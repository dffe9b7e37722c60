"""Which benchmarks lie in a folder, under whatever of their usual names.

Names alone are looked at here; whether a folder holds all that it should is for `open_benchmark` to say.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mae_dat.config.errors import DataError, UserError
from mae_dat.data.folders import require_folder
from mae_dat.robustness.suites.folders import folders_in
from mae_dat.robustness.suites.labels import beside, read_objectnet
from mae_dat.robustness.suites.sets import BENCHMARKS, Benchmark


class Found(NamedTuple):
    """Where a benchmark is, or why it is not there."""

    benchmark: Benchmark
    folder: Path | None
    note: str


def _plain(name: str) -> str:
    """'ImageNet-C' and 'imagenet_c' are one name."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find(root: str | Path, name: str) -> Path | None:
    """The folder of benchmark `name`: `root` itself or a folder in it, under one of its usual names in any spelling;
    None if there is none. Raises MissingInputError without `root`, DataError for several."""
    require_folder(root)
    known = BENCHMARKS[name]
    usual = {_plain(own) for own in known.usual}
    around = {Path(root).resolve().name: str(root), **folders_in(str(root))}
    places = [Path(path) for own, path in around.items() if _plain(own) in usual]
    # `val` names ImageNet's pictures only where nothing else tells whose they are.
    named = [place for place in places if place.name != "val"] or places
    inside = [at / known.inside if (at / known.inside).is_dir() else at for at in named]
    found = list({place.resolve(): place for place in reversed(inside)}.values())[::-1]  # a link is no second one
    if len(found) > 1:
        told = " and ".join(map(str, found))
        raise DataError(f"{root}: {told} may each be {known.title}; move one of them out of {root}, or rename it")
    return found[0] if found else None


def inventory(root: str | Path) -> list[Found]:
    """Every benchmark, found in `root` or not. Raises MissingInputError without `root`."""
    require_folder(root)
    rows = []
    for known in BENCHMARKS.values():
        folder, note = None, ""
        try:
            folder = find(root, known.name)
            if folder is None:
                note = f"no folder {known.usual[0]}, in any spelling"
            elif known.source == "real":
                beside(folder, "real.json")
            elif known.source in ("objnet-113", "objnet-1000"):
                read_objectnet(folder)
        except UserError as error:
            folder, note = None, str(error)
        rows.append(Found(known, folder, note))
    return rows


def inventory_text(found: Sequence[Found]) -> str:
    """A line a benchmark: its name, and where it is or why it is not measured."""
    wide = max(len(row.benchmark.name) for row in found)
    return "\n".join(f"{row.benchmark.name:<{wide}}  {row.folder or 'not measured: ' + row.note}" for row in found)
