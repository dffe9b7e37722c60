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
    groups: dict[str, Group] = {}
    for model in results["models"]:
        run = runs.get(model)
        key, title, seed = (run["arm"], run["label"], run["seed"]) if run else (model, titles[model], 0)
        group = groups.setdefault(key, Group(title, style=len(groups), members={}))
        group.members[seed] = model
    return list(groups.values())


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
    """Return each model's title in the report, followed by its name where two models have the same title."""
    titles = [facts["title"] for facts in results["models"].values()]
    return {
        name: facts["title"] if titles.count(facts["title"]) == 1 else f"{facts['title']} ({name})"
        for name, facts in results["models"].items()
    }
