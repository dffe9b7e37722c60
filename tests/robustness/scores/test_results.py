"""results.json from others: whatever is wrong with it is an error with file and key, and nothing else."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from paths import GOLDEN

from mae_dat.config.errors import CheckpointError, UserError
from mae_dat.robustness.report.headline import headline_text
from mae_dat.robustness.report.render import counts_csv
from mae_dat.robustness.report.summarize import summarize
from mae_dat.robustness.scores.results import read_results

STORED = (GOLDEN / "earlier" / "results.json").read_text()
VALUES = (None, -1, 0, 10**30, 1e308, "x", "", [], {}, True, "a/b/c", [[]], {"": {}})


def keys_of(value: Any, key: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value[:2]) if isinstance(value, list) else ()
    for name, inner in items:
        yield (*key, name)
        yield from keys_of(inner, (*key, name))


def changed(key: tuple[Any, ...], value: Any) -> str:
    content = json.loads(STORED)
    inner = content
    for name in key[:-1]:
        inner = inner[name]
    inner[key[-1]] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (("format",), "1", r"format must be a whole number, not \"1\""),
        (("models", "plain", "size"), [32], "models.plain.size must be height and width"),
        (("models", "plain", "title"), 3, "models.plain.title must be text, not 3"),
        (("cells", "plain", "clean", "", "correct"), -1, r"cells.plain.clean\. must have a total above 0, and counts"),
        (("cells", "plain", "clean", "", "total"), 0, "must have a total above 0"),
        (("cells", "plain", "clean", ""), [1], "must be an object of keys and values, not a list"),
        (("suites", "plain"), {}, r"cells.plain.clean is missing in models or suites"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, key: tuple[Any, ...], value: Any, message: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(changed(key, value))
    with pytest.raises(CheckpointError, match=rf"results\.json is not the results.json of an evaluation: .*{message}"):
        read_results(path)


def test_no_change_of_any_value_ends_with_another_error(tmp_path: Path) -> None:
    draw, path = random.Random(0), tmp_path / "results.json"
    keys = [*keys_of(json.loads(STORED))]
    outcomes = []
    for _ in range(60):
        path.write_text(changed(draw.choice(keys), draw.choice(VALUES)))
        try:
            report = summarize(read_results(path))
            headline_text(report)
            counts_csv(report)
            outcomes.append(True)
        except UserError:
            outcomes.append(False)
    assert {*outcomes} == {False, True}
