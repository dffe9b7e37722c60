"""CSV files that spreadsheets open without running anything in them."""

import re
from collections.abc import Iterable, Sequence

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "\n", "'")
_SPECIAL = re.compile(r'[",\r\n]')


def safe_cell(value: str | float | bool | None) -> str:
    """Return a value as the text of a CSV cell; floats have 6 significant digits, None is empty.

    A spreadsheet would run a text that starts with = + - @ or a control character as a formula. Such a text gets a '
    in front, and so does one that starts with ', so that removing one leading ' restores every text.
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, str):
        return str(value).lower()
    return f"'{value}" if value.startswith(_FORMULA_STARTS) else value


def csv_lines(rows: Iterable[Sequence[str]]) -> bytes:
    """Return the lines of a CSV file, quoted where necessary. Bytes of a name that are no UTF-8 become `\\udcXX`."""
    text = "".join(",".join(map(_quote, row)) + "\n" for row in rows)
    return text.encode("utf-8", errors="backslashreplace")


def _quote(cell: str) -> str:
    # Not by the csv module, which leaves a carriage return unquoted before Python 3.13.
    return '"' + cell.replace('"', '""') + '"' if _SPECIAL.search(cell) else cell
