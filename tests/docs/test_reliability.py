"""Every fault on the page about reliability has a test, and the table of exit codes has every error."""

import inspect

from paths import ROOT

from mae_dat.config import errors
from mae_dat.config.errors import InterruptError, RankError, UserError

EXPLANATION = (ROOT / "docs" / "explanation" / "reliability.md").read_text()
EXIT_CODES = (ROOT / "docs" / "reference" / "exit-codes.md").read_text()


def test_every_row_of_a_fault_has_a_test() -> None:
    tables = EXPLANATION.partition("## Faults and their tests")[2].partition("## What it costs")[0]
    rows = [line for line in tables.splitlines() if line.startswith("| ") and not line.startswith("| fault")]
    assert not [row for row in rows if "test_" not in row]


def test_the_table_of_exit_codes_is_complete() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, UserError)]
    for kind in {*kinds} - {UserError, InterruptError, RankError}:
        row = next(line for line in EXIT_CODES.splitlines() if f"`{kind.__name__}`" in line)
        assert row.endswith(f"| {kind.exit_code} |"), kind
        assert f"\n| {kind.exit_code} | " in EXIT_CODES, kind
