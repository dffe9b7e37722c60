"""Find the benchmarks in a folder, by their usual names.

Only names are compared here; `open_benchmark` checks whether a folder is complete.
"""

import re
from pathlib import Path
from typing import NamedTuple

from mae_dat.config.errors import DataError, UserError
from mae_dat.config.paths import require_folder
from mae_dat.robustness.suites.catalogue import BENCHMARKS, Benchmark
from mae_dat.robustness.suites.folders import folders_in
from mae_dat.robustness.suites.labels import find_label_file, read_objectnet


class BenchmarkLocation(NamedTuple):
    """The folder of a benchmark, or why it is missing."""

    benchmark: Benchmark
    folder: Path | None
    reason: str


def _plain(name: str) -> str:
    """Return a name without case and punctuation: 'ImageNet-C' and 'imagenet_c' become one."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def find_benchmark(root: str | Path, name: str) -> Path | None:
    """Return the folder of benchmark `name`, None if there is none: `root` itself or a folder in it, under one of the
    benchmark's usual names in any spelling.

    Raises MissingInputError without `root`, DataError for several candidates.
    """
    require_folder(root)
    benchmark = BENCHMARKS[name]
    usual = {_plain(folder_name) for folder_name in benchmark.folder_names}
    candidates = {Path(root).resolve().name: str(root), **folders_in(str(root))}
    matches = [Path(path) for folder_name, path in candidates.items() if _plain(folder_name) in usual]
    # `val` may contain any images: it means ImageNet only if no other name matches.
    matches = [path for path in matches if path.name != "val"] or matches
    folders = [path / benchmark.subfolder if (path / benchmark.subfolder).is_dir() else path for path in matches]
    distinct = list({path.resolve(): path for path in reversed(folders)}.values())[::-1]  # without links to the same
    if len(distinct) > 1:
        paths = " and ".join(map(str, distinct))
        raise DataError(f"{root}: {paths} may each be {benchmark.title}; move one of them out of {root}, or rename it")
    return distinct[0] if distinct else None


def inventory(root: str | Path) -> list[BenchmarkLocation]:
    """Return every benchmark with its folder in `root` or the reason it is missing.

    Raises MissingInputError without `root`.
    """
    require_folder(root)
    locations = []
    for benchmark in BENCHMARKS.values():
        folder, reason = None, ""
        try:
            folder = find_benchmark(root, benchmark.name)
            if folder is None:
                reason = f"no folder {benchmark.folder_names[0]}, in any spelling"
            elif benchmark.label_source == "real":
                find_label_file(folder, "real.json")
            elif benchmark.label_source in ("objnet-113", "objnet-1000"):
                read_objectnet(folder)
        except UserError as error:
            folder, reason = None, str(error)
        locations.append(BenchmarkLocation(benchmark, folder, reason))
    return locations
