"""The rules of the house that a machine can check: floors, names, docstrings, printing, paths, headers of configs."""

import ast
import re
import subprocess
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mae_dat"
SOURCES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.y*ml"))

# A file imports only from lower floors. On the same floor: within a package, or one way without a cycle.
FLOORS = {
    "errors": 0,
    "command": 0,
    "config": 0,
    "distributed": 0,
    "rendezvous": 0,
    "peers": 0,
    "watch": 0,
    "stopping": 0,
    "files": 0,
    "identity": 1,
    "provenance": 0,
    "snapshot": 0,
    "attempts": 1,
    "lease": 1,
    "weights": 1,
    "registry": 1,
    "download": 1,
    "store": 1,
    "generated": 1,
    "generated_folder": 1,
    "decoding": 1,
    "data": 1,
    "shard_cache": 1,
    "shard_index": 1,
    "shards": 1,
    "corruptions": 1,
    "sources": 1,
    "transforms": 1,
    "loaders": 1,
    "formats": 2,
    "imagenet": 2,
    "benchmark_folders": 2,
    "benchmark_labels": 2,
    "benchmark_sets": 2,
    "inventory": 2,
    "tokenizer": 2,
    "symbolic": 3,
    "attack": 3,
    "pixel_attacks": 3,
    "split_norms": 3,
    "distributions": 3,
    "word_attack": 4,
    "word_head": 4,
    "mae": 4,
    "classifier": 4,
    "loading": 5,
    "rebuild": 6,
    "huggingface": 6,
    "attention": 5,
    "objectives": 5,
    "adversarial": 5,
    "consistency": 5,
    "detection_data": 2,
    "detector": 7,
    "average_precision": 9,
    "detect": 9,
    "optim": 6,
    "parallel": 6,
    "readback": 6,
    "metrics": 6,
    "checkpoint": 6,
    "pictures": 6,
    "scores": 6,
    "results": 6,
    "mce": 6,
    "calibration": 6,
    "charts": 6,
    "accuracy": 7,
    "resuming": 7,
    "training": 7,
    "engine": 7,
    "machine": 1,
    "cells": 7,
    "stored_cells": 6,
    "suite": 7,
    "suites": 7,
    "contenders": 8,
    "contest": 8,
    "examples": 8,
    "plan": 8,
    "robustness": 9,
    "published": 6,
    "axes": 7,
    "ablation": 7,
    "arms": 7,
    "figures": 7,
    "teaser": 7,
    "tables": 7,
    "comparison": 7,
    "typeset": 7,
    "run": 8,
    "pretrain": 8,
    "pretrainings": 8,
    "side_by_side": 8,
    "finetune": 8,
    "evaluate": 8,
    "train_tokenizer": 8,
    "distill_tokenizer": 9,
    "scheduler": 1,
    "script_task": 2,
    "code_snapshot": 2,
    "following": 3,
    "cluster": 3,
    "launch": 8,
    "subject": 8,
    "hub": 8,
    "scorecard": 8,
    "fetch": 9,
    "pack": 9,
    "scan": 9,
    "compare": 9,
    "convert": 9,
    "visualize": 9,
    "demo": 9,
    "proof": 9,
    "panels": 9,
    "explanation": 8,
    "explore": 9,
    "features": 9,
    "analysis": 9,
    "__init__": 10,  # the public names; no file of the package may import them from here
}
# Files past 400 lines, each with its reason.
LONG_FILES = {"config.py": "every flag of the toolkit in one place"}
DRAWERS = {"util", "utils", "misc", "helper", "helpers", "common"}
# Methods that others' base classes define and call; what they do is said by the class.
OVERRIDES = {"forward", "affinity", "emit"}
# `print` is for what a command line is asked to show: in these functions of it only, and in those named print_*.
PRINTING = {"main", "run_command"}
# What follows a machine's own top-level folders, or climbs out of the repository; URLs and longer paths are no match.
MACHINE_PATH = re.compile(r"(?<![\w./:~}-])(?:/(?:work|root|home|Users)|\.\./(?:\.\./)*shared)/\w\S*")


def room_of(path: Path) -> str:
    """The entry of FLOORS that a file of the package belongs to: its top-level module or package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def rooms_imported(source: str, package: tuple[str, ...] = ("mae_dat",)) -> set[str]:
    """Top-level modules of mae_dat that a source imports anywhere; `package` is where it lies, for relative imports."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            first, _, rest = name.partition(".")
            if first == "mae_dat":
                room = rest.partition(".")[0]
                rooms.add(room if room in FLOORS or is_module(room) else "__init__")
    return rooms


def is_module(room: str) -> bool:
    return (PACKAGE / f"{room}.py").exists() or (PACKAGE / room).is_dir()


def floor_faults(imports: dict[str, set[str]]) -> list[str]:
    """What is wrong with the imports between rooms, in words."""
    faults = [f"{room} is missing from FLOORS" for room in sorted(imports) if room not in FLOORS]
    for room, targets in sorted(imports.items()):
        for target in sorted(targets - {room}):
            if FLOORS.get(target, 0) > FLOORS.get(room, 0):
                faults.append(f"{room} (floor {FLOORS.get(room)}) imports {target} (floor {FLOORS.get(target)})")
    try:
        TopologicalSorter({room: targets - {room} for room, targets in imports.items()}).prepare()
    except CycleError as error:
        faults.append(f"cycle: {' -> '.join(error.args[1])}")
    return faults


def test_files_import_only_from_lower_floors() -> None:
    imports: dict[str, set[str]] = {}
    for path in SOURCES:
        package = ("mae_dat", *path.relative_to(PACKAGE).parts[:-1])
        imports.setdefault(room_of(path), set()).update(rooms_imported(path.read_text(), package))
    assert not floor_faults(imports)


@pytest.mark.parametrize(
    ("imports", "fault"),
    [
        ({"attack": {"engine"}}, "attack (floor 3) imports engine (floor 7)"),
        ({"newcomer": set()}, "newcomer is missing from FLOORS"),
        ({"mae": {"classifier"}, "classifier": {"mae"}}, "cycle: "),
        ({"engine": {"__init__"}}, "engine (floor 7) imports __init__ (floor 10)"),
    ],
)
def test_the_floor_check_sees_faults(imports: dict[str, set[str]], fault: str) -> None:
    assert any(found.startswith(fault) for found in floor_faults(imports))


@pytest.mark.parametrize(
    "source",
    [
        "import mae_dat.errors",
        "import mae_dat.errors as e",
        "from mae_dat import errors",
        "from mae_dat.errors import UserError",
        "def f():\n    from .errors import UserError",
        "from . import errors",
    ],
)
def test_the_floor_check_sees_every_form_of_import(source: str) -> None:
    assert rooms_imported(source) == {"errors"}
    assert rooms_imported("from ..errors import UserError", ("mae_dat", "tokenizer")) == {"errors"}
    assert rooms_imported("from mae_dat import AttackConfig; import torch") == {"__init__"}


def test_no_drawers() -> None:
    assert not [str(path) for path in SOURCES if {path.stem, path.parent.name} & DRAWERS]


def functions(
    tree: ast.AST, prefix: str = ""
) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]]:
    """Every function and class that is not inside another function, with its dotted name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from functions(node, f"{prefix}{node.name}.")


def undocumented(source: str) -> list[str]:
    """Public functions, methods and classes without a docstring; methods in OVERRIDES are told by their class."""
    tree = ast.parse(source)
    names = [name for name, node in functions(tree) if ast.get_docstring(node) is None]
    missing = [
        name
        for name in names
        if name.rpartition(".")[2] not in OVERRIDES and not any(part[0] == "_" for part in name.split("."))
    ]
    return missing if ast.get_docstring(tree) else ["the module", *missing]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_public_has_a_docstring(path: Path) -> None:
    source = path.read_text()
    assert not source.strip() or not undocumented(source)


def test_the_docstring_check_sees_faults() -> None:
    source = (
        '"""M."""\nclass A:\n    def f(self): ...\n    def _g(self): ...\n    def forward(self): ...\ndef h(): "d"\n'
    )
    assert undocumented(source) == ["A", "A.f"]
    assert undocumented("x = 1") == ["the module"]


def stray_prints(tree: ast.AST, allowed: bool = False) -> Iterator[int]:
    """Lines with a call of `print` outside the functions that may."""
    for node in ast.iter_child_nodes(tree):
        inside = allowed
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = allowed or node.name in PRINTING or node.name.lstrip("_").startswith("print_")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print" and not inside:
            yield node.lineno
        yield from stray_prints(node, inside)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_command_lines_print(path: Path) -> None:
    assert not list(stray_prints(ast.parse(path.read_text())))


def test_the_print_check_sees_faults() -> None:
    source = (
        "print(1)\ndef main():\n    print(2)\ndef _print_x():\n    print(3)\ndef fit():\n    if 1:\n        print(4)\n"
    )
    assert list(stray_prints(ast.parse(source))) == [1, 8]


def tracked_files() -> list[Path]:
    """Files that are or would be committed; without git (an unpacked archive) the sources."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        return [*SOURCES, *CONFIGS, *sorted((ROOT / "tests").glob("*.py"))]
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


def machine_paths(text: str) -> list[str]:
    """Paths in a text that only one machine has."""
    return MACHINE_PATH.findall(text)


def test_no_file_names_a_path_of_one_machine() -> None:
    found = {}
    for path in tracked_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        if words := machine_paths(text):
            found[str(path.relative_to(ROOT))] = words
    assert not found


def test_the_path_check_sees_faults() -> None:
    home = "/" + "home"  # in two parts, so that this file does not find itself
    assert machine_paths(f'folder = "{home}/me/x"') == [f'{home}/me/x"']
    assert machine_paths(f"see({home}/me) or ..{'/shared'}/data") == [f"{home}/me)", "../" + "shared/data"]
    assert machine_paths(f"https://example.org{home}/x output{home}/y ..{home}/z $HOME{'/work'}/x") == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_begins_with_a_header(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# "), "a config begins with what it is, its command, hardware, time and expected number"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text()
    assert path.name in LONG_FILES or len(source.splitlines()) <= 400
    long = {
        name: length
        for name, node in functions(ast.parse(source))
        if not isinstance(node, ast.ClassDef) and (length := (node.end_lineno or 0) - node.lineno + 1) > 60
    }
    assert not long


def test_the_tests_that_documents_name_exist() -> None:
    named = 0
    for document in sorted((ROOT / "docs").glob("*.md")):
        for file, test in re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", document.read_text()):
            named += 1
            path = ROOT / "tests" / file
            assert path.is_file(), f"{document.name} names {file}"
            assert not test or f"def {test}(" in path.read_text(), f"{document.name} names {file}::{test}"
    assert named > 40
