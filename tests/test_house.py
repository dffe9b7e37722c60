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

# A file imports from its own package, without a cycle, and from packages on lower floors.
FLOORS = {
    "config": 0,
    "storage": 1,
    "runtime": 2,
    "data": 3,
    "launch": 3,
    "models": 4,
    "attacks": 5,
    "training": 6,
    "robustness": 7,
    "analysis": 8,
    "detection": 8,
    "experiments": 9,
    "__init__": 10,
}
# Imports that go up all the same, until the files are split as the design says.
STILL_UP: tuple[tuple[str, str], ...] = ()
# Packages whose `__init__.py` is not empty; each counts as one file.
WHOLES = ("models.tokenizer", "robustness.corruptions")
DRAWERS = {"util", "utils", "misc", "helper", "helpers", "common"}
# Methods that others' base classes define and call; what they do is said by the class.
OVERRIDES = {"forward", "affinity", "emit"}
# `print` is for what a command line is asked to show: in these functions of it only, and in those named print_*.
PRINTING = {"main", "run_command"}
# What follows a machine's own top-level folders, or climbs out of the repository; URLs and longer paths are no match.
MACHINE_PATH = re.compile(r"(?<![\w./:~}-])(?:/(?:work|root|home|Users)|\.\./(?:\.\./)*shared)/\w\S*")


def room_of(name: str) -> str:
    """The file that a dotted name of mae_dat leads to, such as `training.loop`; one of WHOLES counts as one file, and
    `__init__` are the public names and the commands' short files."""
    parts = name.split(".")[1:]
    while parts and not is_module(parts):
        parts.pop()
    room = next((whole for whole in WHOLES if parts[:2] == whole.split(".")), ".".join(parts))
    return room if len(parts) > 1 or room in FLOORS else "__init__"


def rooms_imported(source: str, package: tuple[str, ...] = ("mae_dat",)) -> set[str]:
    """Files of mae_dat that a source imports anywhere; `package` is where it lies, for relative imports."""
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
        rooms |= {room_of(name) for name in names if name.split(".")[0] == "mae_dat"}
    return rooms


def is_module(parts: list[str]) -> bool:
    path = PACKAGE.joinpath(*parts)
    return path.with_suffix(".py").exists() or path.is_dir()


def floor(room: str) -> int:
    return FLOORS.get(room.partition(".")[0], -1)


def floor_faults(imports: dict[str, set[str]]) -> list[str]:
    """What is wrong with the imports between files, in words."""
    faults = [f"{room} is missing from FLOORS" for room in sorted(imports) if floor(room) < 0]
    for room, targets in sorted(imports.items()):
        for target in sorted(targets - {room}):
            if floor(target) >= floor(room) and target.partition(".")[0] != room.partition(".")[0]:
                faults.append(f"{room} (floor {floor(room)}) imports {target} (floor {floor(target)})")
    try:
        TopologicalSorter({room: targets - {room} for room, targets in imports.items()}).prepare()
    except CycleError as error:
        faults.append(f"cycle: {' -> '.join(error.args[1])}")
    return faults


def test_files_import_only_from_lower_floors() -> None:
    imports: dict[str, set[str]] = {}
    for path in SOURCES:
        package = ("mae_dat", *path.relative_to(PACKAGE).parts[:-1])
        room = room_of(".".join([*package, path.stem]).removesuffix(".__init__"))
        imports.setdefault(room, set()).update(rooms_imported(path.read_text(), package))
    for room, target in STILL_UP:
        assert target in imports[room], f"{room} imports {target} no longer: take it out of STILL_UP"
        imports[room].remove(target)
    assert not floor_faults(imports)


@pytest.mark.parametrize(
    ("imports", "fault"),
    [
        ({"attacks.pixel": {"training.loop"}}, "attacks.pixel (floor 5) imports training.loop (floor 6)"),
        ({"detection.train": {"analysis.views"}}, "detection.train (floor 8) imports analysis.views (floor 8)"),
        ({"newcomer": set()}, "newcomer is missing from FLOORS"),
        ({"models.mae": {"models.split_norms"}, "models.split_norms": {"models.mae"}}, "cycle: "),
        ({"training.loop": {"__init__"}}, "training.loop (floor 6) imports __init__ (floor 10)"),
    ],
)
def test_the_floor_check_sees_faults(imports: dict[str, set[str]], fault: str) -> None:
    assert any(found.startswith(fault) for found in floor_faults(imports))


@pytest.mark.parametrize(
    "source",
    [
        "import mae_dat.config.errors",
        "import mae_dat.config.errors as e",
        "from mae_dat.config import errors",
        "from mae_dat.config.errors import UserError",
        "def f():\n    from .config.errors import UserError",
        "from .config import errors",
    ],
)
def test_the_floor_check_sees_every_form_of_import(source: str) -> None:
    assert rooms_imported(source) == {"config.errors"}
    assert rooms_imported("from ..config.errors import UserError", ("mae_dat", "data")) == {"config.errors"}
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
    for document in sorted((ROOT / "docs").glob("*.md")):
        for file, test in re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", document.read_text()):
            named += 1
            path = next((ROOT / "tests").rglob(file), None)
            assert path, f"{document.name} names {file}"
            assert not test or f"def {test}(" in path.read_text(), f"{document.name} names {file}::{test}"
    assert named > 40
