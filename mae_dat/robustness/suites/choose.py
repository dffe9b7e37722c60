"""Choose the suites to measure: those that were requested, or, for `all`, those whose images are present."""

from collections.abc import Sequence

from mae_dat.config.errors import ConfigError, MissingInputError, UserError, suggest
from mae_dat.data.folders import find_evaluation_images
from mae_dat.data.open import holds_shards
from mae_dat.robustness.suites.base import CONFLICT, GENERATED
from mae_dat.robustness.suites.catalogue import BENCHMARKS
from mae_dat.robustness.suites.folders import folders_in
from mae_dat.robustness.suites.imagenet import SYNSETS, outputs_advice
from mae_dat.robustness.suites.inventory import inventory
from mae_dat.robustness.suites.sources import SuiteSources
from mae_dat.robustness.suites.specs import SUITES

CUSTOM_SUITES = tuple(name for name, spec in SUITES.items() if spec.kind == "custom")
DERIVED_SUITES = tuple(name for name, spec in SUITES.items() if spec.kind == "derived")
NOT_REQUESTED = "not asked for"
"""The reason of suites that --suite does not name."""


def choose_suites(requested: Sequence[str], sources: SuiteSources) -> tuple[list[str], dict[str, str]]:
    """Return the suites to measure, in order, and why each other one is skipped.

    `all` means everything that is present. Raises ConfigError for an unknown name or none; if `all` finds nothing,
    ConfigError or MissingInputError.
    """
    own = [shift.name for shift in sources.settings.shifts]
    if not requested and not own:
        raise ConfigError(f"--suite is empty: give all, or some of {', '.join(SUITES)}.")
    for name in requested:
        if name not in (*SUITES, *own, "all"):
            raise ConfigError(f"--suite {name}: {suggest(name, [*SUITES, *own, 'all'])}")
    if not requested and sources.clean_if_present() is not None:
        requested = [sources.clean_suite]
    if "all" not in requested:
        skipped = {name: NOT_REQUESTED for name in SUITES if name not in requested}
        return list(dict.fromkeys([*requested, *own])), skipped
    reasons = _reasons_to_skip(sources)
    skipped = {name: reasons[name] for name in SUITES if name in reasons and name not in requested}
    chosen = [name for name in SUITES if name not in skipped]
    if not chosen and not own:
        raise _nothing_present(sources)
    return [*chosen, *own], skipped


def _reasons_to_skip(sources: SuiteSources) -> dict[str, str]:
    """Return the suites that `all` does not include, each with the reason."""
    root, outputs = sources.settings.root, sources.outputs
    reasons = {location.benchmark.name: location.reason for location in inventory(root) if location.folder is None}
    for name, benchmark in BENCHMARKS.items():
        if not sources.covers(name):
            needed = "ImageNet's 1000" if benchmark.outputs == len(SYNSETS) else f"its {benchmark.outputs}"
            reasons[name] = f"the models have {outputs} outputs, not {needed}"
    if sources.clean_suite == "imagenet":
        reasons |= dict.fromkeys(CUSTOM_SUITES, "ImageNet's own images are there")
    elif not _has_validation_split(sources):
        reasons |= dict.fromkeys(CUSTOM_SUITES, "no folder val/CLASS")
        reasons |= dict.fromkeys(DERIVED_SUITES, "needs clean images: ImageNet's or val/CLASS")
    else:
        for name in ("imagenet", "imagenet-real"):
            reasons.setdefault(name, "the class folders are not ImageNet's")
        if not (root / CONFLICT).is_dir():
            reasons[CONFLICT] = "no folder conflict"
    if "imagenet-c" not in reasons:
        reasons[GENERATED] = "the official ImageNet-C is there: name it to have both"
    if rescore := sources.settings.rescore:
        cost = f"takes up to {10 * rescore:,} passes per image: name it, with --limit, or give --rescore 0"
        reasons.setdefault("words-symbolic", cost)
    for name, spec in SUITES.items():
        if spec.by_name_only:
            reasons.setdefault(name, spec.by_name_only)
    return reasons


def _has_validation_split(sources: SuiteSources) -> bool:
    try:
        split = find_evaluation_images(sources.settings.root)
        return bool(folders_in(str(split))) or holds_shards(split)
    except UserError:
        return False


def _nothing_present(sources: SuiteSources) -> UserError:
    """Return the error that explains why `all` finds nothing."""
    root = sources.settings.root.resolve()
    present = [location.benchmark.title for location in inventory(root) if location.folder not in (None, root)]
    if present and sources.outputs != len(SYNSETS):
        return ConfigError(
            f"{sources.settings.root} contains {', '.join(dict.fromkeys(present))}, but the models have "
            f"{sources.outputs} outputs, not ImageNet's {len(SYNSETS)}: {outputs_advice(sources.outputs)}"
        )
    candidates = [path for path in (root.parent, root.parent.parent, *root.iterdir()) if (path / "val").is_dir()]
    hint = f"did you mean {candidates[0]}?" if candidates else "see --help for its layout."
    return MissingInputError(f"{sources.settings.root} contains no benchmark and no val/CLASS: {hint}")
