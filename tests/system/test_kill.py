"""Training under SIGKILL: 25 kills of every kind of run (tests/support/kill_loop.py does more)."""

import re

import pytest
from tiny_runs import run_script

pytestmark = pytest.mark.slow


def kill(*arguments: str) -> dict[str, int]:
    """What the loop counted."""
    done = run_script("tests/support/kill_loop.py", *arguments, PYTHONPATH="tests/support:.")
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(
        r"(\d+) kills, (\d+) runs completed, (\d+) with another.* (\d+) redone, at most (\d+)", done.stdout
    )
    assert found, done.stdout
    return dict(zip(("kills", "runs", "unequal", "redone", "worst"), map(int, found.groups()), strict=True))


@pytest.mark.parametrize("ranks", ["1", "2"])
@pytest.mark.parametrize("arm", ["mae", "dat"])
def test_a_run_killed_at_any_instant_ends_with_the_same_weights(arm: str, ranks: str) -> None:
    """Of one rank and of all, in starting, training, saving and evaluating; a save follows every update."""
    tally = kill("--kills", "25", "--arm", arm, "--ranks", ranks)
    assert tally["kills"] >= 25
    assert tally["unequal"] == 0
    assert tally["worst"] <= 2, "the interval between two saves, and the save under way"


def test_three_ranks_add_up_in_the_same_order_after_a_kill() -> None:
    """From three on the order of a sum depends on how DDP arranges its buckets."""
    assert kill("--kills", "6", "--arm", "mae", "--ranks", "3")["unequal"] == 0


def test_a_run_goes_on_with_other_numbers_of_ranks() -> None:
    """The same images in the same updates, and so the same losses up to rounding."""
    tally = kill("--kills", "8", "--arm", "plain", "--ranks", "1", "2", "4")
    assert tally["kills"] >= 8
    assert tally["unequal"] == 0
