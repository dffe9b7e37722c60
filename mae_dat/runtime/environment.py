"""Software facts: the commit of this package, whether files differ from it, and the versions of the packages.

A copy of the code made by the launcher records its origin in `code.json` next to the package; otherwise the facts come
from git. Imports neither torch nor other slow modules, and never fails: an unknown fact is None.
"""

import contextlib
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
PACKAGES = ("torch", "torchvision", "timm", "taming-transformers", "numpy", "scipy", "opencv-python", "pillow")
# All builds of OpenCV compute the same, so their version is recorded under one name.
OTHER_BUILDS = {"opencv-python": ("opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")}
COMMIT_KEY = "mae_dat's code"
"""Key of the commit among the versions. It is never compared: equal sources give equal results, even if their commits
differ."""


class CodeFacts(TypedDict):
    """What a run records about its code."""

    commit: str | None
    """Hexadecimal name of git's HEAD; None outside git."""
    dirty: bool | None
    """Whether files differ from that commit; None outside git."""
    sha256: str
    """Hash of the package's *.py files: equal for equal sources in any folder."""


# ---- this package ----


@functools.cache
def code_facts() -> CodeFacts:
    """Return the facts of the package that this process has imported."""
    return package_code_facts(PACKAGE_FOLDER)


def package_code_facts(package: Path) -> CodeFacts:
    """Return the facts of a package, given its folder."""
    sources = {str(path.relative_to(package)): path for path in package.rglob("*.py")}
    commit, dirty = _recorded_state(package.parent / CODE_FILE) or git_state(package) or (None, None)
    return {"commit": commit, "dirty": dirty, "sha256": tree_hash(sources.items())}


def describe_code(facts: CodeFacts) -> str:
    """Describe the code in words: by its commit if known, otherwise by its hash."""
    if facts["commit"] is None:
        return f"sources {facts['sha256'][:12]}"
    return f"commit {facts['commit']}{' with changes' if facts['dirty'] else ''}"


def _recorded_state(path: Path) -> tuple[str | None, bool | None] | None:
    """Return (commit, dirty) from the `code.json` of a copy of the code; None without a valid one."""
    try:
        facts = json.loads(path.read_text())
        facts = facts.get("package", facts)  # present if the submitted script belongs to another repository
        return facts["commit"], facts["dirty"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def git_state(folder: Path) -> tuple[str, bool] | None:
    """Return (commit, dirty) of the files that git tracks below `folder`; None if there are none, or no git."""
    try:
        if not run_git(folder, "ls-files", "--", "."):
            return None  # for example a virtual environment inside another repository
        commit = run_git(folder, "rev-parse", "HEAD").decode().strip()
        return commit, bool(run_git(folder, "status", "--porcelain", "--", "."))
    except (OSError, subprocess.SubprocessError):
        return None


def run_git(folder: Path, *words: str) -> bytes:
    """Run git in `folder` and return its output. Raises OSError without git, SubprocessError when git fails."""
    # Otherwise `status` locks the index for a moment, so that git commands of the user can fail.
    command = ["git", "--no-optional-locks", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, check=True, timeout=60).stdout


def tree_hash(files: Iterable[tuple[str, Path]]) -> str:
    """Return the SHA-256 over the names and contents of files, sorted by name; a missing file is skipped."""
    digest = hashlib.sha256()
    for name, path in sorted(files):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        digest.update(os.fsencode(name) + b"\0" + hashlib.sha256(content).digest())
    return digest.hexdigest()


# ---- versions ----


def toolkit_version() -> dict[str, str]:
    """Return the version of this package: its release with a hash of its sources, and its commit."""
    facts = code_facts()
    release = f"{installed_version('mae_dat')}, sources {facts['sha256'][:12]}"
    return {"mae_dat": release, COMMIT_KEY: describe_code(facts)}


def dependency_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version(), **{name: installed_version(name) for name in PACKAGES}}


def installed_version(package: str) -> str:
    """Return the version of an installed package, of another build of it if that is installed, or "not installed"."""
    for name in (package, *OTHER_BUILDS.get(package, ())):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "not installed"
