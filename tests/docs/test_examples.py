"""The commands and code of the README and of Get started, run as they are printed, on a few small images."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import ROOT
from tiny_runs import draw_folder, one_thread  # noqa: F401 - the fixture is used by itself

from mae_dat.cli import run

PAGES = {"README.md": ROOT / "README.md", "get-started.md": ROOT / "docs" / "get-started.md"}
SHORT = ["--epochs", "1", "--warmup_epochs", "0", "--batch_size", "8"]
SHORTER = {"pretrain": SHORT, "finetune": SHORT}
NOT_RUN = {
    "demo": "takes minutes; tests/system/test_wheel.py runs it",
    "get": "needs a network",
    "doctor": "tests/experiments/test_doctor.py runs it",
    "explore": "serves a page until it is stopped",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page].read_text(), re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The `mae-dat` commands of a page, without comments."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("mae-dat ")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a user: images in DIR with splits, in my_photos without, and in new_photos."""
    monkeypatch.chdir(tmp_path)
    draw_folder(tmp_path / "DIR")
    (tmp_path / "my_photos").symlink_to(tmp_path / "DIR" / "train")
    (tmp_path / "new_photos").symlink_to(tmp_path / "DIR" / "val")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_every_command_and_every_line_of_python_works(
    page: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = []
    for words in commands(page):
        verb = words[0]
        if verb in NOT_RUN or "--pretrained" in words or "PHOTO.jpg" in words:
            continue
        if verb == "submit":
            words = ["submit", "--dry_run", *words[1:]]
        assert run([*words, *SHORTER.get(verb, [])]) == 0, words
        ran.append(verb)
    assert {"finetune", "predict", "evaluate"} <= set(ran)
    names: dict[str, Any] = {"__name__": "example"}
    for block in blocks(page, "python"):
        if "for images, labels in loader" in block:
            names["loader"] = [(torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 3]))]
            names["optimizer"] = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
        code = re.sub(r"(batch_size|epochs)=\d+,\s+", "", block)
        code = code.replace("output_dir=", "epochs=1, warmup_epochs=0, batch_size=8, output_dir=")
        exec(compile(code, page, "exec"), names)
    assert float(names["loss"].detach()) > 0
