"""The comparison of fine-tunings, from images to a report, on tiny generated pictures."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from tiny_runs import draw_folder, one_thread, save_tokenizer  # noqa: F401 - one_thread is used by itself

from mae_dat.compare import CompareConfig, compare
from mae_dat.config import ConfigError
from mae_dat.metrics import Console

ARMS = ("plain", "random", "released")
FLAGS = "--input_size 32 --batch_size 8 --epochs 1 --warmup_epochs 0 --num_workers 0 --pictures_every 1"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> CompareConfig:
    """A finished comparison."""
    root = tmp_path_factory.mktemp("compare")
    tokenizer = save_tokenizer(root / "light.safetensors")
    config = CompareConfig(
        data_path=str(draw_folder(root / "images")),
        output_dir=str(root / "out"),
        arms=ARMS,
        seeds=(0,),
        pretrain_flags=FLAGS,
        finetune_flags=f"{FLAGS} --tokenizer {tokenizer}",
        limit=8,
        severities=(1, 5),
    )
    assert compare(config, Console(quiet=True)) is not None
    return config


def test_the_report_holds_every_arm(config: CompareConfig) -> None:
    output = Path(config.output_dir)
    results = json.loads((output / "results.json").read_text())
    assert [model["name"] for model in results["models"]] == list(ARMS)
    for model in results["models"]:
        assert model["clean"]["total"] == 20  # the limit is for the corruptions
        assert len(model["corruptions"]) == 15
        assert all(row.keys() == {"1", "5"} for row in model["corruptions"].values())
        assert all(cell["total"] == 8 for row in model["corruptions"].values() for cell in row.values())
        assert model["seconds"] > 0
        assert ("changed_words" in model["curves"]) == (model["name"] != "plain")
    assert results["pretraining"]["curves"]["train_loss"]
    assert results["settings"]["fine-tuning, DAT"]["dat"] == "released"
    assert len(results["galleries"]) == 3  # reconstructions, and the words of two arms
    page = (output / "report.html").read_text()
    assert all(label in page for label in ("plain", "random words", "DAT"))


def test_a_rerun_trains_only_what_is_missing(config: CompareConfig) -> None:
    output = Path(config.output_dir)
    shutil.rmtree(output / "random-seed0")
    checkpoints = {path: path.stat().st_mtime_ns for path in output.glob("*/checkpoint-*.pth")}
    before = json.loads((output / "results.json").read_text())["models"]
    assert len(checkpoints) == 3
    assert compare(config, Console(quiet=True)) is not None
    assert checkpoints == {path: path.stat().st_mtime_ns for path in checkpoints}
    assert list((output / "random-seed0").glob("checkpoint-*.pth"))
    after = json.loads((output / "results.json").read_text())["models"]
    for one, other in zip(before, after, strict=True):
        assert one["clean"] == other["clean"]
        assert one["corruptions"] == other["corruptions"]


def test_without_measuring_nothing_is_written_but_runs(config: CompareConfig, tmp_path: Path) -> None:
    short = dataclasses.replace(config, output_dir=str(tmp_path / "out"), arms=("plain",), measure=False)
    assert compare(short, Console(quiet=True)) is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["plain-seed0", "pretrain"]


def test_an_unknown_arm_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="unknown arm 'releasd': did you mean released"):
        CompareConfig(arms=("plain", "releasd"))
    with pytest.raises(ConfigError, match="--arms"):
        CompareConfig(arms=())


def test_what_cannot_be_measured_is_refused_before_the_training() -> None:
    with pytest.raises(ConfigError, match="--limit 0"):
        CompareConfig(limit=0)
    with pytest.raises(ConfigError, match="--severities 1 6"):
        CompareConfig(severities=(1, 6))
