"""Files around the code: the citation, the changelog, the workflows and the hooks fit the code."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from paths import ROOT

import mae_dat

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def test_the_citation_names_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == mae_dat.__version__
    assert citation["license"] == "Apache-2.0"


def test_the_changelog_begins_with_what_is_not_released() -> None:
    sections = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert sections[0] == "## Unreleased"


def test_the_workflow_runs_what_every_other_machine_runs() -> None:
    job = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]["test"]
    assert "bash .ci/run" in [step.get("run") for step in job["steps"]]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    tested = [
        line.rpartition(" ")[2] for line in classifiers if line.startswith("Programming Language :: Python :: 3.")
    ]
    assert job["strategy"]["matrix"]["python"] == tested


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_no_workflow_may_write_to_the_repository(path: Path) -> None:
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}


def test_the_hooks_pass_on_these_files() -> None:
    """They run the tools of the environment of `make setup`."""
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["id"] for hook in hooks] == ["ruff-check", "ruff-format", "codespell"]
    for hook in hooks:
        program, *flags = hook["entry"].removeprefix(".venv/bin/").split()
        command = [str(Path(sys.executable).parent / program), *(flag for flag in flags if flag != "--fix")]
        done = subprocess.run([*command, __file__], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
