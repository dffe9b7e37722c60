"""A hook of mkdocs: writes the `--help` of every verb into reference/cli.md."""

import contextlib
import io
import os
from typing import Any

from mae_dat.cli import overview, run
from mae_dat.verbs import GROUPS, LAUNCHER, VERBS

MARKER = "<!-- the help of every verb -->"


def help_of(verb: str) -> str:
    """Return what `mae-dat VERB --help` prints at 80 columns."""
    os.environ["COLUMNS"] = "80"
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        run([*verb.split(), "--help"])
    return text.getvalue().strip()


def command_reference() -> str:
    """Return the reference of the command line as Markdown: the overview, then every verb by group."""
    parts = ["```text", overview(), "```"]
    for title, verbs in GROUPS.items():
        parts.append(f"\n## {title.capitalize()}\n")
        for verb in verbs:
            parts += [f"### mae-dat {verb}\n", "```text", help_of(verb), "```\n"]
    if LAUNCHER not in VERBS:
        parts += [f"\n## Jobs\n\n### mae-dat {LAUNCHER}\n", "```text", help_of(LAUNCHER), "```\n"]
    return "\n".join(parts)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace the marker of a page."""
    return markdown.replace(MARKER, command_reference()) if MARKER in markdown else markdown
