"""`~` means the home folder where no shell replaces it, and a user may have none."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from noise_images import MakeFolder
from PIL import Image
from tiny_runs import ROOT, one_thread, save_tokenizer  # noqa: F401

import mae_dat
from mae_dat.config.groups import data_root
from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig
from mae_dat.training.python_api import _settings


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


@pytest.mark.slow
def test_a_tilde_in_every_function(make: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    make(" ".join(f"set/{split}/{name}/{number}.png" for split in ("train", "val") for name in "ab" for number in "01"))
    save_tokenizer(tmp_path / "words.safetensors")
    quiet = {"progress": False, "num_workers": 0}
    small = {"model": "vit_demo_patch8", "input_size": 32, "batch_size": 4, "epochs": 1, "aa": None, **quiet}
    result = mae_dat.finetune(data_path="~/set", output_dir="~/out", **small)
    assert result.output_dir == tmp_path / "out"
    config = mae_dat.FinetuneConfig()
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, output_dir="~/out"),
        data=dataclasses.replace(config.data, data_path="~/set"),
    )
    assert _settings(mae_dat.FinetuneConfig, config, {}, "finetune").run.output_dir == str(tmp_path / "out")
    assert mae_dat.load_model("~/out").classes == ("a", "b")
    assert mae_dat.create_model("vit_demo_patch8", 2, "~/out", input_size=32).input_size == (32, 32)
    assert mae_dat.load_tokenizer("~/words.safetensors").num_words == 64
    mae_dat.convert("~/out", "~/timm.safetensors", to="timm")
    predictions = mae_dat.predict("~/out", ["~/set/val", Path("~/set/train/a/0.png")], output_dir="~/labels", **quiet)
    predictions.to_csv("~/table.csv")
    mae_dat.evaluate("~/out", "clean", "~/set", output_dir="~/scores", **quiet).report("~/report")
    assert len(mae_dat.extract_features("~/out", "~/set/val/a", **quiet).paths) == 2
    config.to_yaml("~/c.yaml")
    assert mae_dat.FinetuneConfig.from_yaml("~/c.yaml").data.data_path == str(tmp_path / "set")
    for name in ("timm.safetensors", "labels/predictions.csv", "table.csv", "scores/report.md", "report/report.md"):
        assert (tmp_path / name).is_file(), name
    assert not (tmp_path / "~").exists()


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
@pytest.mark.parametrize("home", [None, "read-only"])
def test_a_user_without_home_and_passwd_entry(home: str | None, tmp_path: Path) -> None:
    """The user may read everything, so that it finds Python, but owns nothing."""
    (tmp_path / "read-only").mkdir(mode=0o555)
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    user = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups"]
    user += ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    settings = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    if home:
        settings["HOME"] = str(tmp_path / home)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*user, "sh", "-c", 'umask 077; exec "$@"', "sh", sys.executable, "-m", "mae_dat", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False)
        assert "Traceback" not in done.stdout + done.stderr
        return done

    assert run("list").returncode == 0
    pictures = tmp_path / "photo.png"
    Image.new("RGB", (64, 64)).save(pictures)
    given = ["--checkpoint", "mae_dat_demo", "--device", "cpu", "--num_workers", "0"]
    done = run("predict", str(pictures), *given, "--output_dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "predictions.csv").is_file()
    done = run("predict", "demo", *given, "--output_dir", str(tmp_path / "demo"))
    assert done.returncode == (73 if home else 66)
    assert ("cannot write the generated images" if home else "set MAE_DAT_HOME to a folder") in done.stderr
