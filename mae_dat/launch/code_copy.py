"""A copy of the code next to the jobs: a job runs the code as submitted, even after a long wait or a restart.

The copy's folder is named after its content, so that submitting the same code twice copies it once.
"""

import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mae_dat.config.errors import ConfigError, OutputError
from mae_dat.config.recipes import RECIPES_FOLDER
from mae_dat.runtime.environment import CODE_FILE, PACKAGE_FOLDER, code_facts, git_state, run_git, tree_hash
from mae_dat.storage.files import prepare_output_folder, storage_error

PATCH_FILE = "code.patch"
CODE_SUFFIXES = {".py", ".yaml", ".yml", ".safetensors", ".j2", ".json", ".npz"}
MAX_FILE_BYTES = 64 * 2**20  # a larger file is not code
MAX_FILES, MAX_BYTES = 10_000, 2**30

_SECRET = re.compile(
    r"\.env(\..*)?|\.netrc|\.pypirc|\.npmrc|\.git-credentials|.*\.(pem|key|p12|pfx|kdbx)|id_(rsa|dsa|ecdsa|ed25519).*|"
    r".*credentials.*\.json|.*secrets?\.(json|ya?ml|toml|txt)|\.?(hf_|wandb_)?token(\.txt)?",
    re.IGNORECASE,
)
"""Names of files that git does not track and that usually hold passwords or keys; they are not copied."""


@dataclass
class CodeTree:
    """The files to copy, by their names in the copy."""

    root: Path
    files: dict[str, Path]
    state: tuple[str, bool] | None
    """Commit, and whether files differ from it; None outside git."""
    too_large: tuple[str, ...] = ()
    """Names of files that are not copied."""

    def add(self, path: Path) -> str:
        """Add a file unless it is there already; return its name in the copy."""
        path = path.resolve()
        if path.is_relative_to(self.root):
            name = str(path.relative_to(self.root))
        else:
            # Two files of the same name may come from two folders.
            folder = hashlib.sha256(os.fsencode(path.parent)).hexdigest()[:8]
            name = f"submitted/{folder}/{path.name}"
        self.files.setdefault(name, path)
        return name

    @property
    def name(self) -> str:
        """The name of the copy's folder: a hash of the files and of the commit."""
        return _folder_name(tree_hash(self.files.items()), self.state)


def collect_code(folder: Path, results: Sequence[Path] = ()) -> CodeTree:
    """Collect the code around a script's folder: all files of its git repository that are not ignored.

    Without git, collects the sources in the folder and the packages below it. This package, with its recipes, is added
    if it is elsewhere; if `folder` is where it was installed, only this package is collected. Files in the folders
    `results` are not code. Raises ConfigError if the files are too many or too large to be code.
    """
    root, files, state = _files_around(folder.resolve())
    if state is None or root != PACKAGE_FOLDER.parent:
        files |= _package_files()
    # A folder of results that contains the whole repository excludes nothing.
    excluded = [path.resolve() for path in results if not root.is_relative_to(path.resolve())]
    files = {name: path for name, path in files.items() if not any(path.is_relative_to(folder) for folder in excluded)}
    sizes = {name: path.stat().st_size for name, path in files.items() if path.is_file()}
    too_large = tuple(sorted(name for name, size in sizes.items() if size > MAX_FILE_BYTES))
    sizes = {name: size for name, size in sizes.items() if size <= MAX_FILE_BYTES}
    if len(sizes) > MAX_FILES or sum(sizes.values()) > MAX_BYTES:
        raise ConfigError(
            f"{root} contains {len(sizes):,} files of {sum(sizes.values()) / 2**20:,.0f} MiB that git does not ignore, "
            "too much for a copy of the code: list data and results in .gitignore, or use --no_snapshot."
        )
    return CodeTree(root, {name: files[name] for name in sizes}, state, too_large)


def _files_around(folder: Path) -> tuple[Path, dict[str, Path], tuple[str, bool] | None]:
    """Return the root of the code around `folder`, its files by name, and (commit, dirty), None without git."""
    if folder == PACKAGE_FOLDER.parent == RECIPES_FOLDER.parents[1]:  # installed, next to foreign packages
        return folder, {}, None
    try:
        root = Path(os.fsdecode(run_git(folder, "rev-parse", "--show-toplevel").removesuffix(b"\n")))
        tracked, others = (
            [os.fsdecode(name) for name in run_git(root, "ls-files", "-z", *which).split(b"\0") if name]
            for which in (["--cached"], ["--others", "--exclude-standard"])
        )
        names = [*tracked, *(name for name in others if not _SECRET.fullmatch(name.rpartition("/")[2]))]
        files = {name: root / name for name in names}
        return root, {name: path for name, path in files.items() if _stays_inside(path, root)}, git_state(root)
    except (OSError, subprocess.SubprocessError):
        return folder, {str(path.relative_to(folder)): path for path in _sources(folder)}, None


def _stays_inside(path: Path, root: Path) -> bool:
    """Return whether a file is not a link to something outside the tree, whose content would be copied."""
    return not path.is_symlink() or path.resolve().is_relative_to(root.resolve())


def _package_files() -> dict[str, Path]:
    """Return all files of this package, with the recipes where an installed package has them."""
    package = PACKAGE_FOLDER
    files = {path for path in package.rglob("*") if path.is_file() and path.parent.name != "__pycache__"}
    recipes = {f"{package.name}/configs/{path.name}": path for path in RECIPES_FOLDER.glob("*.yaml")}
    return {str(path.relative_to(package.parent)): path for path in files} | recipes


def _sources(folder: Path) -> Iterator[Path]:
    """Yield the files of code in `folder` itself and in the packages below it, with the data folders of packages."""
    is_package = (folder / "__init__.py").exists()
    for path in folder.iterdir():
        if path.is_file() and path.suffix in CODE_SUFFIXES:
            yield path
        elif path.is_dir() and path.name != "__pycache__" and (is_package or (path / "__init__.py").exists()):
            yield from _sources(path)


def _folder_name(sha256: str, state: tuple[str, bool] | None) -> str:
    return hashlib.sha256(f"{sha256} {state}".encode()).hexdigest()[:16]


def write_code_copy(tree: CodeTree, parent: Path, command: str) -> Path:
    """Copy the files into a folder below `parent`, unless the same copy exists, and return the folder.

    Its `code.json` records commit, dirty flag, sha256, time and the command that was submitted first; `code.patch` the
    uncommitted changes. Raises OutputError and StorageError.
    """
    prepare_output_folder(parent)
    temporary = Path(tempfile.mkdtemp(prefix=".code.", dir=parent))
    try:
        return _copy_files(tree, temporary, parent, command)
    except OSError as error:
        raise storage_error(parent / CODE_FILE, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_files(tree: CodeTree, temporary: Path, parent: Path, command: str) -> Path:
    for name, path in tree.files.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, temporary / name)
    # The hash of the copy, because the source may change meanwhile.
    sha256 = tree_hash((name, temporary / name) for name in tree.files)
    target = parent / _folder_name(sha256, tree.state)
    if not target.exists():
        _write_record(tree, temporary, sha256, command)
        umask = os.umask(0o077)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():  # otherwise another submission was faster
                raise
    if tree_hash((name, target / name) for name in tree.files) != sha256:
        raise OutputError(f"{target} was changed after it was copied: remove it and submit again.")
    return target


def _write_record(tree: CodeTree, folder: Path, sha256: str, command: str) -> None:
    """Write `code.json`, and `code.patch` if there are uncommitted changes."""
    commit, dirty = tree.state or (None, None)
    facts: dict[str, Any] = {"commit": commit, "dirty": dirty, "sha256": sha256, "files": len(tree.files)}
    if tree.root != PACKAGE_FOLDER.parent:
        facts["package"] = code_facts()
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    facts |= {"too_large": tree.too_large, "first_submitted": time, "command": command}
    (folder / CODE_FILE).write_text(json.dumps(facts, indent=1) + "\n")
    if dirty:
        (folder / PATCH_FILE).write_bytes(run_git(tree.root, "diff", "HEAD", "--binary"))
