"""The worked examples of CONTRIBUTING.md, run as a contributor would write them: the file, its row, its test."""

import inspect
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from mae_dat.config import adversaries
from mae_dat.models import mae
from mae_dat.robustness.suites import specs

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = {
    block.split("\n", 1)[0].removeprefix("# "): block for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
}


def install(path: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of an example, importable under the name of its file."""
    module = types.ModuleType(path.removesuffix(".py").replace("/", "."))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(BLOCKS[path], path, "exec"), module.__dict__)
    return module


def run_tests(path: str, tmp_path: Path) -> None:
    """Run the tests of an example."""
    names: dict[str, Any] = {}
    exec(compile(BLOCKS[path], path, "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert tests
    for test in tests:
        test(**({"tmp_path": tmp_path} if "tmp_path" in inspect.signature(test).parameters else {}))


def test_an_attack(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install("mae_dat/attacks/swap.py", monkeypatch)
    row = re.search(r'`"(\w+)": "([\w.:]+)"` to `ATTACKS`', TEXT)
    assert row is not None
    monkeypatch.setitem(adversaries.ATTACKS, row[1], row[2])
    monkeypatch.setattr(adversaries, "ATTACK_KINDS", tuple(adversaries.ATTACKS))
    run_tests("tests/attacks/test_swap.py", tmp_path)


def test_an_objective(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install("mae_dat/training/objectives/focal.py", monkeypatch)
    run_tests("tests/training/objectives/test_focal.py", tmp_path)


def test_a_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = install("mae_dat/robustness/suites/rotated.py", monkeypatch)
    row = re.search(r'`"([\w-]+)": (SuiteSpec\(.*?\))`', TEXT)
    assert row is not None
    monkeypatch.setitem(specs.SUITES, row[1], eval(row[2], {**vars(module), "SuiteSpec": specs.SuiteSpec}))
    run_tests("tests/robustness/suites/test_rotated.py", tmp_path)


def test_a_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for table in ("VIT_SIZES", "MAE_MODELS"):
        for name, size in getattr(mae, table).items():
            monkeypatch.setitem(getattr(mae, table), name, size)
    before = set(mae.VIT_SIZES) | set(mae.MAE_MODELS)
    exec(BLOCKS["rows of mae_dat/models/mae.py"], vars(mae))
    try:
        run_tests("tests/models/test_nano.py", tmp_path)
    finally:
        for table in (mae.VIT_SIZES, mae.MAE_MODELS):
            for name in set(table) - before:
                del table[name]  # type: ignore[attr-defined]
