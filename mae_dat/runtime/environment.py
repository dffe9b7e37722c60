"""Which code runs: the commit, whether it was changed since, and a hash of the package's sources.

A snapshot that the launcher made says so in `code.json` beside the package; otherwise git is asked. Imports neither
torch nor anything else that is slow, and never fails: what cannot be found out is None.
"""

import functools
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import TypedDict

CODE_FILE = "code.json"
PACKAGE_FOLDER = Path(__file__).parents[1]


class CodeFacts(TypedDict):
    """What a run records about its code."""

    commit: str | None
    """Hex name of git's HEAD; None outside git."""
    dirty: bool | None
    """Whether files differ from that commit; None outside git."""
    sha256: str
    """Of the package's *.py: equal for equal sources, wherever they lie."""


@functools.cache
def code_facts() -> CodeFacts:
    """The facts of the package that this process has imported."""
    return package_code_facts(PACKAGE_FOLDER)


def describe_code(facts: CodeFacts) -> str:
    """The facts in words: the commit where git knew it, otherwise the hash."""
    if facts["commit"] is None:
        return f"sources {facts['sha256'][:12]}"
    return f"commit {facts['commit']}{' with changes' if facts['dirty'] else ''}"


def package_code_facts(package: Path) -> CodeFacts:
    """The facts of a package's folder."""
    sources = {str(path.relative_to(package)): path for path in package.rglob("*.py")}
    commit, dirty = _recorded(package.parent / CODE_FILE) or git_state(package) or (None, None)
    return {"commit": commit, "dirty": dirty, "sha256": tree_hash(sources.items())}


def _recorded(path: Path) -> tuple[str | None, bool | None] | None:
    try:
        facts = json.loads(path.read_text())
        facts = facts.get("package", facts)  # where the script is of another repository
        return facts["commit"], facts["dirty"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def git_state(folder: Path) -> tuple[str, bool] | None:
    """(commit, dirty) of the files that git knows below `folder`; None when it knows none, or there is no git."""
    try:
        if not run_git(folder, "ls-files", "--", "."):
            return None  # an environment inside somebody's repository
        return run_git(folder, "rev-parse", "HEAD").decode().strip(), bool(
            run_git(folder, "status", "--porcelain", "--", ".")
        )
    except (OSError, subprocess.SubprocessError):
        return None


def run_git(folder: Path, *words: str) -> bytes:
    """What git prints, asked in `folder`. Raises OSError without git, SubprocessError when it refuses."""
    # Without optional locks, `status` takes none and disturbs nobody.
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout


def tree_hash(files: Iterable[tuple[str, Path]]) -> str:
    """SHA-256 over names and contents, in the order of the names; a file that is gone counts as absent."""
    digest = hashlib.sha256()
    for name, path in sorted(files):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        digest.update(os.fsencode(name) + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


COMMIT_KEY = "mae_dat's code"  # among the versions; equal sources compute the same, whatever their commit


PACKAGES = ("torch", "torchvision", "timm", "taming-transformers", "numpy", "scipy", "opencv-python", "pillow")


def dependency_versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: installed_version(name) for name in PACKAGES}}


def toolkit_version() -> dict[str, str]:
    """Of this package: its release with a hash of its sources, and its commit."""
    facts = code_facts()
    return {
        "mae_dat": f"{installed_version('mae_dat')}, sources {facts['sha256'][:12]}",
        COMMIT_KEY: describe_code(facts),
    }


def installed_version(package: str) -> str:
    """An installed package's version."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
