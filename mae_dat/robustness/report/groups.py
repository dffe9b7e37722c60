"""Groups of an evaluation: models that differ in their seed alone share a column, as mean and standard deviation."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from mae_dat.robustness.scores.accuracy import SeedStatistics
from mae_dat.robustness.scores.results import Results


@dataclass(frozen=True, eq=False)
class Group:
    """The models of one training with several seeds. A model without a recorded training is a group of its own."""

    title: str
    style: int
    """Number of its colour and marker in every chart."""
    members: dict[int, str]
    """Seed -> name of the model."""
    trained: bool = False
    """Whether it stands for a training with several seeds; otherwise it is one checkpoint."""
    collapsed: bool = False
    """Whether a member has collapsed. No number of such a group is called better."""

    def statistics(self, value: Callable[[str], float | None]) -> SeedStatistics | None:
        """Compute the mean and deviation of `value(model)` over the seeds that have it; None if none has."""
        return SeedStatistics.of(map(value, self.members.values()))

    def restricted_to(self, models: Collection[str]) -> "Group":
        """Return the group with these of its models alone, in the same style."""
        return replace(self, members={seed: model for seed, model in self.members.items() if model in models})


def groups_of(results: Results) -> list[Group]:
    """Return the groups in the order of their first models."""
    runs = results["training"]["runs"] if "training" in results else {}
    titles = model_titles(results)
    collapsed = results.get("collapsed", {})
    groups: dict[str, Group] = {}
    for model in results["models"]:
        run = runs.get(model)
        key, title, seed = (run["arm"], run["label"], run["seed"]) if run else (model, titles[model], 0)
        group = groups.setdefault(key, Group(title, style=len(groups), members={}, trained=run is not None))
        group.members[seed] = model
    return [_named_collapsed(group, collapsed) for group in groups.values()]


def _named_collapsed(group: Group, collapsed: Collection[str]) -> Group:
    """Return the group, called collapsed in its title if a member has collapsed."""
    seeds = [str(seed) for seed, model in group.members.items() if model in collapsed]
    if not seeds:
        return group
    which = "collapsed" if len(seeds) == len(group.members) else f"collapsed with seed {', '.join(seeds)}"
    title = group.title if group.title.endswith("(collapsed)") else f"{group.title} ({which})"
    return replace(group, title=title, collapsed=True)


def same_seed_pair(groups: Sequence[Group]) -> tuple[str, str] | None:
    """Return a model of the first group and one of the last, of the same seed if they share one; None for a single
    group."""
    first, last = groups[0], groups[-1]
    if first is last:
        return None
    shared = [seed for seed in first.members if seed in last.members]
    if shared:
        return first.members[shared[0]], last.members[shared[0]]
    return next(iter(first.members.values())), next(iter(last.members.values()))


def model_titles(results: Results) -> dict[str, str]:
    """Return each model's title in the report, followed by its name where two models have the same title, and by
    (collapsed) for a model that has collapsed."""
    titles = [facts["title"] for facts in results["models"].values()]
    collapsed = results.get("collapsed", {})
    return {
        name: (facts["title"] if titles.count(facts["title"]) == 1 else f"{facts['title']} ({name})")
        + (" (collapsed)" if name in collapsed else "")
        for name, facts in results["models"].items()
    }
