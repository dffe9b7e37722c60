"""`~` means the home folder where no shell replaces it."""

from pathlib import Path

import pytest

from mae_dat.config.groups import data_root
from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig


def test_a_tilde_in_yaml_after_an_equals_sign_and_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("output_dir: ~/out\nfinetune: ~/weights.pth\n")
    config = load_config(FinetuneConfig, ["--config=~/c.yaml", "--data_path=~/set"])
    assert config.run.output_dir == f"{tmp_path}/out"
    assert config.classifier.finetune == f"{tmp_path}/weights.pth"
    assert config.data.data_path == f"{tmp_path}/set"
    assert FinetuneConfig.from_flags(resume="~/old").run.resume == f"{tmp_path}/old"
    assert load_config(FinetuneConfig, ["--data_path", "a~b"]).data.data_path == "a~b"
    monkeypatch.setenv("MAE_DAT_DATA", "~/images")
    assert data_root(None) == f"{tmp_path}/images"
