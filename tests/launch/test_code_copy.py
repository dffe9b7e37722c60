"""Copies of the code: which files belong to them; complete, named by content, never mixed."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mae_dat.config.errors import ConfigError, OutputError
from mae_dat.launch import code_copy
from mae_dat.launch.code_copy import collect_code, write_code_copy
from mae_dat.runtime.environment import CODE_FILE, code_facts, package_code_facts

GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
ODD = "a b ü\n.py"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with a committed, a changed, a new, a deleted and an ignored file."""
    root = tmp_path / "repository"
    (root / "below").mkdir(parents=True)
    for name in ("train.py", "changed.txt", "deleted.py", f"below/{ODD}"):
        (root / name).write_text("1\n")
    (root / ".gitignore").write_text("*.log\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*GIT, *words], cwd=root, check=True)
    (root / "changed.txt").write_text("2\n")
    (root / "new.yaml").touch()
    (root / "deleted.py").unlink()
    (root / "ignored.log").touch()
    return root


def outside_package(files: dict[str, Path]) -> set[str]:
    """Names of files outside this package, which is part of every copy."""
    return {name for name in files if not name.startswith("mae_dat/")}


def test_a_copy_has_what_git_knows_and_the_package(repository: Path, tmp_path: Path) -> None:
    tree = collect_code(repository / "below")
    assert outside_package(tree.files) == {".gitignore", "train.py", "changed.txt", "new.yaml", f"below/{ODD}"}
    copy = write_code_copy(tree, tmp_path / "code", "python submit.py x")
    assert copy.name == tree.name
    assert (copy / "changed.txt").read_text() == "2\n"
    assert (copy / "below" / ODD).read_text() == "1\n"
    assert package_code_facts(copy / "mae_dat") == code_facts()
    facts = json.loads((copy / CODE_FILE).read_text())
    assert (facts["command"], facts["dirty"], len(facts["commit"])) == ("python submit.py x", True, 40)
    patch = (copy / "code.patch").read_text()
    assert "-1\n+2" in patch
    assert "deleted.py" in patch


def test_the_same_code_is_copied_once_and_changed_code_again(repository: Path, tmp_path: Path) -> None:
    first = write_code_copy(collect_code(repository), tmp_path / "code", "first")
    assert write_code_copy(collect_code(repository), tmp_path / "code", "second") == first
    assert json.loads((first / CODE_FILE).read_text())["command"] == "first"
    (repository / "changed.txt").write_text("3\n")
    second = write_code_copy(collect_code(repository), tmp_path / "code", "third")
    assert (second / "changed.txt").read_text() == "3\n"
    subprocess.run([*GIT, "commit", "-q", "-a", "-m", "second"], cwd=repository, check=True)
    third = write_code_copy(collect_code(repository), tmp_path / "code", "fourth")
    assert len({first, second, third}) == 3  # of the same files, but another commit
    assert len(list((tmp_path / "code").iterdir())) == 3


def test_an_edited_copy_is_not_used(repository: Path, tmp_path: Path) -> None:
    copy = write_code_copy(collect_code(repository), tmp_path / "code", "")
    (copy / "train.py").write_text("something else\n")
    with pytest.raises(OutputError, match="was changed after it was copied"):
        write_code_copy(collect_code(repository), tmp_path / "code", "")


def test_many_copies_at_once_make_one(repository: Path, tmp_path: Path) -> None:
    tree = collect_code(repository)
    with ThreadPoolExecutor(8) as pool:
        copies = list(pool.map(lambda _: write_code_copy(tree, tmp_path / "code", ""), range(16)))
    assert [path.name for path in (tmp_path / "code").iterdir()] == [copies[0].name]


def test_results_in_the_repository_are_not_code(repository: Path) -> None:
    before = collect_code(repository).name
    (repository / "out" / "jobs").mkdir(parents=True)
    (repository / "out" / "jobs" / "log").touch()
    assert collect_code(repository, [repository / "out"]).name == before
    assert collect_code(repository, [repository, repository / "out"]).name == before  # the root is not only results
    assert collect_code(repository).name != before


def test_large_files_are_named_and_left_out(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(code_copy, "MAX_FILE_BYTES", 5_000_000)
    with open(repository / "data.bin", "wb") as file:
        os.truncate(file.fileno(), 5_000_001)
    tree = collect_code(repository)
    assert tree.too_large == ("data.bin",)
    assert "data.bin" not in tree.files
    monkeypatch.setattr(code_copy, "MAX_FILES", 4)
    with pytest.raises(ConfigError, match=r"\.gitignore, or use --no_snapshot"):
        collect_code(repository)


def test_without_git_sources_and_packages_are_taken(tmp_path: Path) -> None:
    for name in ("train.py", "photo.jpg", "lib/__init__.py", "lib/deep/table.yaml", "lib/deep/x.jpg", "data/other.py"):
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    tree = collect_code(tmp_path / "folder")
    assert outside_package(tree.files) == {"train.py", "lib/__init__.py", "lib/deep/table.yaml"}
    assert tree.state is None
    assert "mae_dat/storage/released_weights.yaml" in tree.files
    assert "mae_dat/models/tokenizer/weights/light_f4_512.safetensors" in tree.files
    assert "mae_dat/robustness/corruptions/frost/frost1.png" in tree.files


def test_a_copy_finds_the_recipes(repository: Path, tmp_path: Path) -> None:
    copy = write_code_copy(collect_code(repository), tmp_path / "code", "")
    code = "from mae_dat.config.recipes import find_recipe; print(find_recipe('small_finetune'))"
    command = [sys.executable, "-c", code]
    found = subprocess.run(
        command, cwd=copy, env={**os.environ, "PYTHONPATH": str(copy)}, capture_output=True, text=True
    )
    assert found.stdout.strip() == str(copy / "mae_dat" / "configs" / "small_finetune.yaml"), found.stderr


def test_an_installed_package_is_copied_without_its_neighbors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a virtual environment inside a repository; a copy is a package as the wheel installs it."""
    packages = tmp_path / "repository" / ".venv" / "site-packages"
    installed = write_code_copy(collect_code(tmp_path), tmp_path / "code", "")
    packages.mkdir(parents=True)
    (installed / "mae_dat").rename(packages / "mae_dat")
    (packages / "other").mkdir()
    (packages / "other" / "__init__.py").touch()
    subprocess.run([*GIT, "init", "-q"], cwd=tmp_path / "repository", check=True)
    monkeypatch.setattr(code_copy, "PACKAGE_FOLDER", packages / "mae_dat")
    monkeypatch.setattr(code_copy, "RECIPES_FOLDER", packages / "mae_dat" / "configs")
    tree = collect_code(packages)
    assert outside_package(tree.files) == set()
    assert set(tree.files) == {
        str(path.relative_to(packages)) for path in packages.rglob("mae_dat/**/*") if path.is_file()
    }
    assert tree.state is None


def test_files_from_elsewhere_join_under_names_of_their_own(repository: Path, tmp_path: Path) -> None:
    tree = collect_code(repository)
    files = [tmp_path / folder / "a.yaml" for folder in ("one", "two")]
    for path in files:
        path.parent.mkdir()
        path.write_text(path.parent.name)
    names = [tree.add(path) for path in (*files, repository / "ignored.log", repository / "train.py")]
    assert names[2:] == ["ignored.log", "train.py"]
    copy = write_code_copy(tree, tmp_path / "code", "")
    assert [(copy / name).read_text() for name in names[:2]] == ["one", "two"]


def test_untracked_secrets_and_links_to_other_places_are_not_copied(tmp_path: Path) -> None:
    tree, outside = tmp_path / "tree", tmp_path / "outside.txt"
    tree.mkdir()
    outside.write_text("private")
    for name in ("train.py", ".env", ".env.local", "deploy.pem", "id_rsa", "tracked.key", "notes.txt"):
        (tree / name).write_text("x")
    (tree / "link.txt").symlink_to(outside)
    (tree / "inside.txt").symlink_to(tree / "notes.txt")
    for words in (["init", "-q"], ["add", "train.py", "tracked.key"]):
        subprocess.run(["git", "-C", str(tree), *words], check=True)
    files = {name for name in collect_code(tree).files if not name.startswith("mae_dat/")}
    assert files == {"train.py", "tracked.key", "notes.txt", "inside.txt"}
    before = os.umask(0o077)
    try:
        copy = write_code_copy(collect_code(tree), tmp_path / "copies", "command")
    finally:
        os.umask(before)
    assert copy.stat().st_mode & 0o777 == 0o700
