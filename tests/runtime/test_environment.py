"""Which code runs: known from git, from the record of a copy of the code, or by its hash alone; never an error."""

import json
import subprocess
from pathlib import Path

import pytest

from mae_dat.runtime.environment import CODE_FILE, code_facts, describe_code, package_code_facts, tree_hash

GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A committed package with one module."""
    folder = tmp_path / "repository" / "package"
    folder.mkdir(parents=True)
    (folder / "module.py").write_text("x = 1\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*GIT, *words], cwd=folder.parent, check=True)
    return folder


def head(folder: Path) -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True).stdout.strip()


def test_git_knows_the_commit_and_whether_files_changed_since(package: Path) -> None:
    before = package_code_facts(package)
    assert (before["commit"], before["dirty"]) == (head(package), False)
    (package.parent / "notes.txt").write_text("beside the package")
    assert package_code_facts(package) == before
    (package / "module.py").write_text("x = 2\n")
    after = package_code_facts(package)
    assert (after["commit"], after["dirty"]) == (before["commit"], True)
    assert after["sha256"] != before["sha256"]


def test_the_facts_in_words_name_a_commit_or_the_hash() -> None:
    assert describe_code({"commit": "abc", "dirty": False, "sha256": "f" * 64}) == "commit abc"
    assert describe_code({"commit": "abc", "dirty": True, "sha256": "f" * 64}) == "commit abc with changes"
    assert describe_code({"commit": None, "dirty": None, "sha256": "f" * 64}) == "sources ffffffffffff"


def test_a_new_file_counts_as_a_change(package: Path) -> None:
    before = package_code_facts(package)
    (package / "new.py").touch()
    after = package_code_facts(package)
    assert after["dirty"]
    assert after["sha256"] != before["sha256"]


def test_a_copy_of_the_code_records_its_origin(package: Path) -> None:
    sha256 = package_code_facts(package)["sha256"]
    (package.parent / CODE_FILE).write_text(json.dumps({"commit": "abc", "dirty": True}))
    assert package_code_facts(package) == {"commit": "abc", "dirty": True, "sha256": sha256}
    recorded = {"commit": "def", "dirty": False}
    (package.parent / CODE_FILE).write_text(json.dumps({"commit": "abc", "dirty": True, "package": recorded}))
    assert package_code_facts(package) == {**recorded, "sha256": sha256}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"commit": 1', "\0"])
def test_a_damaged_record_is_ignored(package: Path, text: str) -> None:
    before = package_code_facts(package)
    (package.parent / CODE_FILE).write_text(text)
    assert package_code_facts(package) == before


def test_outside_git_only_the_sources_are_known(tmp_path: Path) -> None:
    (tmp_path / "module.py").write_text("x = 1\n")
    facts = package_code_facts(tmp_path)
    assert (facts["commit"], facts["dirty"]) == (None, None)
    assert facts["sha256"] == tree_hash([("module.py", tmp_path / "module.py")])


def test_a_virtual_environment_inside_a_repository_does_not_belong_to_it(package: Path) -> None:
    (package.parent / ".gitignore").write_text("venv\n")
    installed = package.parent / "venv" / "package"
    installed.mkdir(parents=True)
    (installed / "module.py").write_text("x = 1\n")
    assert package_code_facts(installed)["commit"] is None
    assert package_code_facts(installed)["sha256"] == package_code_facts(package)["sha256"]


def test_without_git_nothing_fails(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert package_code_facts(package)["commit"] is None


def test_the_hash_depends_on_names_and_contents_not_on_the_order(tmp_path: Path) -> None:
    for name, text in {"a": "1", "b": "2"}.items():
        (tmp_path / name).write_text(text)
    files = [("a", tmp_path / "a"), ("b", tmp_path / "b")]
    assert tree_hash(files) == tree_hash(files[::-1])
    assert tree_hash(files) != tree_hash([("b", tmp_path / "a"), ("a", tmp_path / "b")])
    assert tree_hash([*files, ("gone", tmp_path / "gone")]) == tree_hash(files)


def test_this_package_knows_itself() -> None:
    assert len(code_facts()["sha256"]) == 64
    assert code_facts() is code_facts()
