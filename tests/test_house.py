"""Rules of the code that no linter checks: module names, length, paths of one machine, headers of recipes, tests that
documents name. Layers, docstrings and printing are checked by `make lint`."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mae_dat"
SOURCES = sorted(PACKAGE.rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").rglob("*.y*ml"))

DRAWERS = {"util", "utils", "misc", "helper", "helpers", "common"}
# What follows a machine's own top-level folders, or climbs out of the repository; URLs and longer paths are no match.
MACHINE_PATH = re.compile(r"(?<![\w./:~}-])(?:/(?:work|root|home|Users)|\.\./(?:\.\./)*shared)/\w\S*")


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


def tracked_files() -> list[Path]:
    """Files that are or would be committed; without git (an unpacked archive) the sources."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        return [*SOURCES, *CONFIGS, *sorted((ROOT / "tests").rglob("*.py"))]
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
    assert "docs/" not in path.read_text(), "the wheel has no docs/: give the number itself"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    long = {
        name: length
        for name, node in functions(ast.parse(source))
        if not isinstance(node, ast.ClassDef) and (length := (node.end_lineno or 0) - node.lineno + 1) > 60
    }
    assert not long


def test_the_tests_that_documents_name_exist() -> None:
    named = 0
    for document in sorted((ROOT / "docs").rglob("*.md")):
        for file, test in re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", document.read_text()):
            named += 1
            texts = [path.read_text() for path in (ROOT / "tests").rglob(file)]  # two packages may have such a file
            assert texts, f"{document.name} names {file}"
            assert not test or any(f"def {test}(" in text for text in texts), f"{document.name} names {file}::{test}"
    assert named > 40


def test_the_package_contains_its_thirteen_packages_and_the_command_line() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages == {
        "config", "storage", "runtime", "data", "launch", "models", "attacks", "training", "robustness", "detection",
        "analysis", "experiments", "prediction",
    }  # fmt: skip
    assert {path.name for path in PACKAGE.glob("*.*")} == {
        "__init__.py",
        "__main__.py",
        "cli.py",
        "py.typed",
        "verbs.py",
    }


def test_an_init_file_holds_one_sentence() -> None:
    with_code = {"mae_dat", "mae_dat/models/tokenizer", "mae_dat/robustness/corruptions"}
    for path in PACKAGE.rglob("__init__.py"):
        statements = ast.parse(path.read_text()).body
        assert ast.get_docstring(ast.parse(path.read_text())), path
        assert str(path.parent.relative_to(ROOT)) in with_code or len(statements) == 1, path


def definitions(path: Path) -> Iterator[str]:
    """Public functions, classes and constants that a file defines; `main` and loggers have one name everywhere."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        else:
            names = []
        yield from (name for name in names if name[0] != "_" and name not in {"main", "logger", "T"})


def test_a_public_name_is_defined_in_one_module() -> None:
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for name in definitions(path):
            places.setdefault(name, []).append(str(path.relative_to(ROOT)))
    assert not {name: files for name, files in places.items() if len(set(files)) > 1}


def test_the_tour_names_twelve_files_that_exist() -> None:
    tour = (ROOT / "docs" / "explanation" / "tour.md").read_text()
    steps = re.findall(r"^\d\. `([^`]+)`", tour, re.MULTILINE)
    assert len(steps) == 9 + 3
    for file in steps + re.findall(r"`([a-z_]+/[a-z_/]+\.py)`", tour):
        assert (ROOT / file).is_file() or (PACKAGE / file).is_file(), file
