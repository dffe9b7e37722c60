"""Arms of an evaluation: networks that differ in their seed alone stand in one column, as mean and deviation."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

from mae_dat.robustness.scores.accuracy import SeedStatistics
from mae_dat.robustness.scores.results import Results


@dataclass(frozen=True)
class Group:
    """The networks of one training, by seed; a network of which nothing is known is an arm of its own."""

    title: str
    style: int
    """Number of its colour and marker in every chart."""
    members: dict[int, str]
    """Seed -> name of the network."""

    def stat(self, value: Callable[[str], float | None]) -> SeedStatistics | None:
        """Mean and deviation of one number over the seeds that have it."""
        return SeedStatistics.of(map(value, self.members.values()))


def groups_of(results: Results, models: Collection[str] | None = None) -> list[Group]:
    """The arms in order, of these networks alone if given; colours do not depend on that."""
    runs = results["training"]["runs"] if "training" in results else {}
    titles = titles_of(results)
    found: dict[str, Group] = {}
    for name in results["models"]:
        run = runs.get(name)
        key, title, seed = (run["arm"], run["label"], run["seed"]) if run else (name, titles[name], 0)
        arm = found.setdefault(key, Group(title, len(found), {}))
        if models is None or name in models:
            arm.members[seed] = name
    return [arm for arm in found.values() if arm.members]


def same_seed_pair(results: Results) -> tuple[str, str] | None:
    """A network of the first arm and one of the last, of the same seed where there is one; None for a single arm."""
    first, *_, last = groups_of(results) * 2
    shared = [seed for seed in first.members if seed in last.members]
    one, other = (arm.members[shared[0]] if shared else next(iter(arm.members.values())) for arm in (first, last))
    return (one, other) if one != other else None


def titles_of(results: Results) -> dict[str, str]:
    """What the report calls each network: its title, with its name where two have the same."""
    titles = [facts["title"] for facts in results["models"].values()]
    return {
        name: facts["title"] if titles.count(facts["title"]) == 1 else f"{facts['title']} ({name})"
        for name, facts in results["models"].items()
    }
