"""Parsing: flags and YAML files with one set of names, checked strictly; commands that end with a message."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mae_dat.config.errors import MissingInputError, UsageError
from mae_dat.config.flags import flat_values
from mae_dat.config.parse import command_line, load_config, run_command
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.config.yaml_files import settings_text

ROOT = Path(__file__).parents[2]


def flags(config: Any) -> dict[str, Any]:
    return flat_values(config)


def finetune_flags(*arguments: str) -> dict[str, Any]:
    return flags(load_config(FinetuneConfig, arguments))


def yaml_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_command_line_before_file_before_default(tmp_path: Path) -> None:
    path = yaml_file(tmp_path, "epochs: 7\nblr: 1e-4\nglobal_pool: true\ninput_size: [64, 48]\naa: null\n")
    found = finetune_flags("--epochs", "9", "--config", path, "--no_global_pool", "--input_size", "32")
    assert (found["epochs"], found["blr"], found["warmup_epochs"]) == (9, 1e-4, 5)
    assert (found["global_pool"], found["input_size"], found["aa"]) == (False, (32,), None)
    assert finetune_flags(f"--config={path}")["epochs"] == 7
    assert finetune_flags("--config", path)["input_size"] == (64, 48)


def test_every_flag_survives_the_way_through_a_file(tmp_path: Path) -> None:
    changed = [
        "--output_dir", "out put", "--resume", "R", "--seed", "3", "--input_size", "64", "48", "--no_pin_mem",
        "--blr", "3e-05", "--clip_grad", "1.5", "--dat", "--dat_share", "0.04", "--cutmix_minmax", "0.2", "0.8",
        "--aa", "None", "--no_global_pool", "--ema_decay", "0.99", "--limit", "7", "--crop_scale", "0.3", "0.9",
    ]  # fmt: skip
    for kind, arguments in ((FinetuneConfig, changed), (FinetuneConfig, []), (PretrainConfig, ["--norm_pix_loss"])):
        config = load_config(kind, arguments)
        (tmp_path / "config.yaml").write_text(settings_text(flat_values(config), command_line()))
        assert load_config(kind, ["--config", str(tmp_path / "config.yaml")]) == config
    assert (tmp_path / "config.yaml").read_text().startswith(f"# {command_line()}")


def test_a_missing_file_is_an_error_with_the_nearest(tmp_path: Path) -> None:
    yaml_file(tmp_path, "")
    with pytest.raises(MissingInputError, match=r"recip.yaml: no such file or recipe; did you mean .*recipe.yaml"):
        load_config(FinetuneConfig, ["--config", str(tmp_path / "recip.yaml")])
    with pytest.raises(UsageError, match="--config needs a value"):
        load_config(FinetuneConfig, ["--config"])


def test_a_users_error_is_one_line_and_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise MissingInputError("no such file: x")

    def interrupt() -> None:
        raise KeyboardInterrupt

    for command, code, told in ((fail, 66, "error: no such file: x\n"), (interrupt, 130, "interrupted.\n")):
        with pytest.raises(SystemExit) as stopped:
            run_command(command)
        assert stopped.value.code == code
        assert capsys.readouterr().err == told
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)  # type: ignore[arg-type, return-value]


def test_a_reader_that_has_seen_enough_gets_no_traceback() -> None:
    code = "from mae_dat.config.parse import run_command\nrun_command(lambda: print('x' * 10**6, flush=True))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([str(ROOT / "mae_dat" / "__main__.py"), "demo"], "mae-dat demo --seeds 1"),
        (["/usr/bin/mae-dat", "demo"], "mae-dat demo --seeds 1"),
        (["/a/main_pretrain.py"], "python main_pretrain.py --seeds 1"),
    ],
)
def test_the_command_is_logged_as_it_can_be_typed(
    arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [*arguments, "--seeds", "1"])
    assert command_line() == text
