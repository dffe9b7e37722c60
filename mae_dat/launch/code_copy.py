"""A copy of the code beside the jobs, so that a job runs what was submitted, however long it waits and however often it
is started again.

The copy's folder is named after its content: submitting the same code twice copies once.
"""

import datetime
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_dat.config.errors import ConfigError, OutputError
from mae_dat.runtime.environment import CODE_FILE, PACKAGE_FOLDER, code_facts, git_state, run_git, tree_hash
from mae_dat.storage.files import prepare_output_folder, storage_error

PATCH_FILE = "code.patch"
SUFFIXES = {".py", ".yaml", ".yml", ".safetensors", ".j2", ".json", ".npz"}
LARGEST = 64 * 2**20  # bytes of a file that still counts as code
MOST_FILES, MOST_BYTES = 10_000, 2**30


@dataclass
class CodeTree:
    """The files of a snapshot by their names in it, and where they come from."""

    root: Path
    files: dict[str, Path]
    state: tuple[str, bool] | None
    """Commit and dirty flag; None outside git."""
    too_large: tuple[str, ...] = ()

    def add(self, path: Path) -> str:
        """A file's name in the snapshot, which it joins unless it is there."""
        path = path.resolve()
        inside = path.is_relative_to(self.root)
        # Two files of one name may come from two places.
        folder = hashlib.sha256(os.fsencode(path.parent)).hexdigest()[:8]
        name = str(path.relative_to(self.root)) if inside else f"submitted/{folder}/{path.name}"
        self.files.setdefault(name, path)
        return name

    @property
    def name(self) -> str:
        """The folder's name: a hash of the files and of the commit."""
        return _name(tree_hash(self.files.items()), self.state)


def code_tree(folder: Path, results: Sequence[Path] = ()) -> CodeTree:
    """The code around a script's folder: what git knows, tracked or new but not ignored; without git the sources in the
    folder and the packages below it. This package joins where it lies elsewhere.

    What lies in the folders `results` is no code. Raises ConfigError when it is too much to be code.
    """
    folder = folder.resolve()
    try:
        root = Path(os.fsdecode(run_git(folder, "rev-parse", "--show-toplevel").removesuffix(b"\n")))
        listed = run_git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        found = {name: root / name for name in map(os.fsdecode, listed.split(b"\0")) if name}
        state = git_state(root)
    except (OSError, subprocess.SubprocessError):
        root, state = folder, None
        found = {str(path.relative_to(root)): path for path in _sources(root)}
    if root != PACKAGE_FOLDER.parent:
        found |= {str(path.relative_to(PACKAGE_FOLDER.parent)): path for path in _sources(PACKAGE_FOLDER)}
    outside = [one.resolve() for one in results if not root.is_relative_to(one.resolve())]
    found = {name: path for name, path in found.items() if not any(path.is_relative_to(one) for one in outside)}
    sizes = {name: path.stat().st_size for name, path in found.items() if path.is_file()}
    too_large = tuple(sorted(name for name, size in sizes.items() if size > LARGEST))
    kept = {name: size for name, size in sizes.items() if size <= LARGEST}
    if len(kept) > MOST_FILES or sum(kept.values()) > MOST_BYTES:
        raise ConfigError(
            f"{root} holds {len(kept):,} files of {sum(kept.values()) / 2**20:,.0f} MiB that git does not ignore, too "
            "much for a copy of the code: name data and results in .gitignore, or give --no_snapshot."
        )
    return CodeTree(root, {name: found[name] for name in kept}, state, too_large)


def _sources(folder: Path) -> Iterator[Path]:
    """Files of code directly in `folder`, and in the packages and folders of data below a package."""
    inside = (folder / "__init__.py").exists()
    for path in folder.iterdir():
        if path.is_file() and path.suffix in SUFFIXES:
            yield path
        elif path.is_dir() and path.name != "__pycache__" and (inside or (path / "__init__.py").exists()):
            yield from _sources(path)


def _name(sha256: str, state: tuple[str, bool] | None) -> str:
    return hashlib.sha256(f"{sha256} {state}".encode()).hexdigest()[:16]


def write_snapshot(tree: CodeTree, parent: Path, command: str) -> Path:
    """Copies the tree into a folder below `parent`, or finds it there, and returns the folder.

    `code.json` in it holds commit, dirty flag, sha256, time and the command that was submitted first; `code.patch` the
    uncommitted changes. Raises OutputError and StorageError.
    """
    prepare_output_folder(parent)
    temporary = Path(tempfile.mkdtemp(prefix=".code.", dir=parent))
    try:
        return _write(tree, temporary, parent, command)
    except OSError as error:
        raise storage_error(parent / CODE_FILE, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(tree: CodeTree, temporary: Path, parent: Path, command: str) -> Path:
    for name, path in tree.files.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, temporary / name)
    # Of the copy, not of the source: somebody may be editing that.
    sha256 = tree_hash((name, temporary / name) for name in tree.files)
    target = parent / _name(sha256, tree.state)
    if not target.exists():
        commit, dirty = tree.state or (None, None)
        facts: dict[str, Any] = {"commit": commit, "dirty": dirty, "sha256": sha256, "files": len(tree.files)}
        stamp = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        if tree.root != PACKAGE_FOLDER.parent:
            facts["package"] = code_facts()
        facts |= {"too_large": tree.too_large, "first_submitted": stamp, "command": command}
        (temporary / CODE_FILE).write_text(json.dumps(facts, indent=1) + "\n")
        if dirty:
            (temporary / PATCH_FILE).write_bytes(run_git(tree.root, "diff", "HEAD", "--binary"))
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another submission was faster
                raise
    if tree_hash((name, target / name) for name in tree.files) != sha256:
        raise OutputError(f"{target} was changed after it was made: remove it, and submit again.")
    return target
