"""Text for a terminal. Names of files, classes and models may contain sequences that a terminal would obey, such as
those that clear the screen or set the title of the window; they are never printed."""

import sys
import unicodedata

_KEPT = ("\n", "\t")
_UNSAFE = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Unicode's categories of control, format (such as text from right to left) and surrogate characters, and of separators
that some terminals take for the end of a line."""


def printable(text: str) -> str:
    """Return a name on one line: control characters, and characters that cannot be encoded, become question marks."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def printable_lines(text: str) -> str:
    """Return a text with line breaks and tabs, in which every other control character becomes a question mark."""
    if text.isprintable():
        return text
    return "".join(
        "?" if letter not in _KEPT and unicodedata.category(letter) in _UNSAFE else letter for letter in text
    )


def print_text(text: object) -> None:
    """Print a text on standard output as `printable_lines`, and flush it."""
    sys.stdout.write(f"{printable_lines(str(text))}\n")
    sys.stdout.flush()
