"""The comparison of fine-tunings, from images to a report, on tiny generated images."""

import dataclasses
import logging
import shutil
from pathlib import Path

import pytest
from pages import Page
from tiny_runs import draw_folder, one_thread, save_tokenizer  # noqa: F401 - one_thread is used by itself

from mae_dat.config.commands.compare import CompareConfig
from mae_dat.config.errors import ConfigError
from mae_dat.experiments.compare import compare
from mae_dat.robustness.scores.results import read_results
from mae_dat.robustness.suites.attacks import WORD_SUITES
from mae_dat.runtime.console import Console
from mae_dat.runtime.inputs import read_inputs

ARMS = ("plain", "random", "released")
FLAGS = "--input_size 32 --batch_size 8 --epochs 1 --warmup_epochs 0 --num_workers 0 --images_every 1"


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
        limit_corrupted=4,
    )
    assert compare(config, Console(quiet=True)) is not None
    return config


def test_the_report_holds_every_arm(config: CompareConfig) -> None:
    output = Path(config.output_dir)
    results = read_results(output / "results.json")
    training = results["training"]
    assert [run["arm"] for run in training["runs"].values()] == list(ARMS)
    for name, run in training["runs"].items():
        cells = results["cells"][name]
        assert cells["clean"][""]["total"] == 20  # --limit_corrupted is for corruptions and attacks
        assert 0 < cells["conflict"][""]["total"] <= 20
        assert len(cells["generated"]) == 75
        assert all(cell["total"] == 4 for cell in cells["generated"].values())
        assert all(cell["total"] == 4 for kind in WORD_SUITES for cell in cells[kind].values())
        assert run["seconds"] > 0
        assert ("changed_words" in run["curves"]) == (run["arm"] != "plain")
    assert training["pretraining"]["train_loss"]
    assert training["settings"]["fine-tuning, DAT"]["dat"] == "released"
    assert len(training["galleries"]) == 3  # reconstructions, and the words of two arms
    page = Page((output / "report.html").read_text())
    assert all(label in page.text for label in ("plain", "random words", "DAT", "One seed"))
    assert not page.text.count("This image is missing")
    headings = [row[0] for row in page.rows if row]
    assert {"Clean (%) ↑", "IN-C*: mean corruption error (%) ↓", "Cue conflict*: shape bias (0–1) ↑"} <= set(headings)


def test_one_summary_of_the_inputs_stands_for_all_runs(config: CompareConfig) -> None:
    output = Path(config.output_dir)
    inputs = read_inputs(output / "inputs.json")
    assert inputs.rows["training"] == "train/: 24 images in 10 classes (2 to 3 each)"
    assert inputs.rows["trainings"] == "pretraining: plain\nfine-tuning: plain, random, released; seed 0"
    assert inputs.rows["model"] == "mae_vit_demo_patch8, then vit_demo_patch8"
    assert inputs.rows["output"] == f"{output} (new)"
    assert read_results(output / "results.json")["inputs"] == inputs.rows
    for name in ("pretrain", "plain-seed0", "released-seed0"):
        assert read_inputs(output / name / "inputs.json").rows["output"].startswith(f"{output / name} (new run, ")


def test_a_rerun_trains_only_what_is_missing(config: CompareConfig, caplog: pytest.LogCaptureFixture) -> None:
    output = Path(config.output_dir)
    shutil.rmtree(output / "random-seed0")
    checkpoints = {path: path.stat().st_mtime_ns for path in output.glob("*/checkpoint-*.pth")}
    before = read_results(output / "results.json")["cells"]
    measured = {path: path.stat().st_mtime_ns for path in output.glob("cells/*")}
    assert len(checkpoints) == 3
    with caplog.at_level(logging.INFO):
        assert compare(config, Console()) is not None
    (table,) = (message for message in caplog.messages if message.startswith("inputs of mae-dat "))
    assert "(resumes: 3 of 4 trainings complete)" in " ".join(table.split())
    assert checkpoints == {path: path.stat().st_mtime_ns for path in checkpoints}
    assert list((output / "random-seed0").glob("checkpoint-*.pth"))
    assert before == read_results(output / "results.json")["cells"]
    # What is trained again alike has the same weights, so that nothing is measured again either.
    assert measured == {path: path.stat().st_mtime_ns for path in output.glob("cells/*")}


def test_galleries_of_earlier_versions_are_found(config: CompareConfig) -> None:
    output = Path(config.output_dir)
    folders = list(output.glob("*/images"))
    for folder in folders:
        folder.rename(folder.with_name("pictures"))
    assert compare(config, Console(quiet=True)) is not None
    galleries = read_results(output / "results.json")["training"]["galleries"]
    assert [gallery["file"] for gallery in galleries] == [
        "pretrain/pictures/reconstruction.png",
        "random-seed0/pictures/adversary.png",
        "released-seed0/pictures/adversary.png",
    ]
    for folder in folders:
        folder.with_name("pictures").rename(folder)


def test_without_measuring_nothing_is_written_but_runs(config: CompareConfig, tmp_path: Path) -> None:
    short = dataclasses.replace(config, output_dir=str(tmp_path / "out"), arms=("plain",), measure=False)
    assert compare(short, Console(quiet=True)) is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["inputs.json", "plain-seed0", "pretrain"]


def test_an_unknown_arm_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="--arms: unknown variant 'releasd': did you mean released"):
        CompareConfig(arms=("plain", "releasd"))
    with pytest.raises(ConfigError, match="--arms"):
        CompareConfig(arms=())


def test_what_cannot_be_measured_is_refused_before_the_training() -> None:
    with pytest.raises(ConfigError, match="--limit 0"):
        CompareConfig(limit=0)
    with pytest.raises(ConfigError, match="--limit_corrupted 0"):
        CompareConfig(limit_corrupted=0)


def test_the_measurement_follows_a_protocol(config: CompareConfig) -> None:
    changed = dataclasses.replace(config, protocol="imagenet-c", restrict_classes=True, suite=("clean",))
    results = compare(changed, Console(quiet=True))
    assert results is not None
    rows = read_inputs(Path(config.output_dir) / "inputs.json").rows
    assert rows["protocol"].startswith("imagenet-c: ")
    assert "--restrict_classes" in rows["predicted"]
    for name, facts in results["models"].items():
        assert facts.get("protocol") == "imagenet-c"
        preprocessing = results["suites"][name]["clean"]["protocol"]["preprocessing"]
        assert preprocessing.endswith("resized to cover 36 x 36 (bilinear), center crop 32 x 32")
