"""`mae_dat.finetune` and `mae_dat.pretrain`."""

import inspect
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import FINETUNE, draw_folder, environment, finetune_in

from mae_dat.config.errors import ConfigError, MissingInputError
from mae_dat.config.flags import flags_of
from mae_dat.config.parse import load_config
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.runtime.signals import stop_requests
from mae_dat.storage.weight_files import read_weights
from mae_dat.training.python_api import finetune, pretrain

SMALL: dict[str, Any] = {"input_size": 32, "batch_size": 8, "epochs": 1, "warmup_epochs": 0, "num_workers": 0}
SMALL |= {"images_every": 0, "progress": False}
CLASSIFIER = {**SMALL, "model": "vit_demo_patch8", "aa": None, "reprob": 0}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_folder(tmp_path_factory.mktemp("data"))


def test_flags_in_python_train_as_on_the_command_line(data: Path, tmp_path: Path) -> None:
    result = finetune(data_path=data, output_dir=tmp_path / "python", **CLASSIFIER)
    expected = finetune_in(tmp_path / "command", data)
    assert result.scores == expected
    assert (result.output_dir, result.weights) == (tmp_path / "python", tmp_path / "python" / "model.safetensors")
    assert read_weights(result.weights).facts == read_weights(tmp_path / "command" / "model.safetensors").facts
    loss = f"test_loss {result.scores['test_loss']:.4g}"
    assert repr(result).startswith(f"TrainingResult: {result.weights}\n")
    assert loss in repr(result)
    again = finetune(tmp_path / "python" / "config.yaml", progress=False)  # complete: nothing is trained
    assert again.scores == expected


def test_a_configuration_may_be_given_and_changed(data: Path, tmp_path: Path) -> None:
    flags = [*FINETUNE, "--data_path", str(data), "--output_dir", str(tmp_path / "one")]
    config = load_config(FinetuneConfig, flags)
    assert finetune(config, progress=False).output_dir == tmp_path / "one"
    changed = finetune(config, output_dir=tmp_path / "two", epochs=2, progress=False)
    assert changed.output_dir == tmp_path / "two"
    assert "epochs: 2" in (tmp_path / "two" / "config.yaml").read_text()


def test_pretraining_returns_its_losses(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # torch's default
    result = pretrain(data_path=data, output_dir=tmp_path, model="mae_vit_demo_patch8", deterministic=True, **SMALL)
    assert torch.backends.cudnn.allow_tf32
    assert not torch.are_deterministic_algorithms_enabled()
    assert set(result.scores) == {"train_loss"}
    assert 0 < result.scores["train_loss"] < 10
    assert result.weights.is_file()


def test_what_cannot_work_raises_an_error_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match=r"finetune has no argument 'epoch': did you mean epochs"):
        finetune(epoch=3)
    with pytest.raises(ConfigError, match="epochs must be a whole number, got 'three'"):
        pretrain(epochs="three")
    with pytest.raises(ConfigError, match="takes a FinetuneConfig, a YAML file or a recipe, got PretrainConfig"):
        finetune(PretrainConfig())  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="call mae_dat.evaluate"):
        finetune(load_config(FinetuneConfig, ["--eval"]))
    with pytest.raises(MissingInputError, match="did you mean small_finetune"):
        finetune("small_finetun")


@pytest.mark.parametrize("function, kind", [(finetune, FinetuneConfig), (pretrain, PretrainConfig)])
def test_the_signature_lists_all_flags_with_their_defaults(function: Any, kind: Any) -> None:
    parameters = inspect.signature(function).parameters
    flags = {flag.name: flag for flag in flags_of(kind) if flag.name != "eval"}
    assert list(parameters) == ["config", "progress", *flags]
    assert all(parameters[name].default == flag.default for name, flag in flags.items())
    assert all(f"\n  {name} = " in function.__doc__ for name in flags)


def test_a_script_shows_the_log_of_its_training(data: Path, tmp_path: Path) -> None:
    """Lines on standard error, as no terminal is there; and neither lines nor handlers of others."""
    code = f"""
import logging, mae_dat
result = mae_dat.finetune(data_path={str(data)!r}, output_dir="out", **{CLASSIFIER | {"progress": True}!r})
assert logging.getLogger().handlers == logging.getLogger("mae_dat").handlers == []
print(result)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "fine-tune: step" in done.stderr
    assert done.stdout.startswith("TrainingResult: out/model.safetensors\ntest_acc1 ")


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    signals = []

    def work() -> None:
        with stop_requests() as stop:
            signals.append(stop.signal)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert signals == [None]
