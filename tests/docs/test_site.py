"""The documentation site: built strictly, so that no link or anchor is dead and every public name has its entry."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT
from tiny_runs import environment

from mae_dat.verbs import VERBS


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(NO_MKDOCS_2_WARNING="1"), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_the_reference_has_every_verb_and_every_public_name(site: Path) -> None:
    commands = (site / "reference" / "cli" / "index.html").read_text()
    assert all(f"mae-dat {verb}</h3>" in re.sub(r"<a .*?</a>", "", commands) for verb in VERBS)
    api = (site / "reference" / "api" / "index.html").read_text()
    import mae_dat

    assert all(f'id="mae_dat.{name}"' in api for name in mae_dat.__all__)


def test_the_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.findall(
            r"<(?:script|link|img)[^>]+(?:src|href)=\"https?://[^\"]*\.(?:js|css|png|woff)", page.read_text()
        )


def test_links_of_files_outside_the_site_lead_somewhere() -> None:
    for name in ("README.md", "CONTRIBUTING.md"):
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / name).read_text()):
            assert target.startswith("http") or (ROOT / target).exists(), f"{name}: {target}"
