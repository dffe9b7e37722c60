"""Progress as lines or as a bar, the remaining time, log.txt, and TensorBoard's scalars and images."""

import io
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console as RichConsole
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mae_dat.config.adversaries import DatConfig
from mae_dat.config.groups import AugmentConfig, ClassifierConfig, DataConfig, MaskConfig, OptimConfig, RunConfig
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.data.generated.folder import FolderSettings, write_image_folder
from mae_dat.models import mae
from mae_dat.models.mae import MaeSize, ViTSize
from mae_dat.models.tokenizer import LightConfig, LightTokenizer
from mae_dat.runtime import console as console_module
from mae_dat.runtime.console import Console, format_duration
from mae_dat.runtime.run_log import RunLog, read_log
from mae_dat.training.finetune import run_finetuning
from mae_dat.training.pretrain import run_pretraining


class Clock:
    """A clock that stands still until a test moves it."""

    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console_module, "time", clock)
    return clock


def run_task(console: Console, clock: Clock, total: int, seconds_each: float, done: int = 0) -> None:
    with console.task("train", total, completed=done) as task:
        for step in range(done, total):
            clock.now += seconds_each
            task.advance(f"loss {step}")


# ---- console ----


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.9, "0:59"), (61, "1:01"), (3723, "1:02:03"), (-5, "0:00")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


def test_a_file_gets_one_line_an_interval_and_the_last(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run_task(Console(interval=10), clock, 100, 1.0)
    assert caplog.messages == [
        f"train: step {step}/100  loss {step - 1}  {format_duration(100 - step)} left" for step in range(10, 101, 10)
    ]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run_task(Console(interval=10), clock, 100, 0.01)
    assert caplog.messages == ["train: step 100/100  loss 99  0:00 left"]


def test_the_quiet_console_logs_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run_task(Console(interval=1, quiet=True), clock, 10, 5.0)
    assert not caplog.records


def test_a_terminal_gets_a_live_bar(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    screen, console = io.StringIO(), Console()
    console.rich = RichConsole(file=screen, force_terminal=True, width=100)
    console.live = True
    with caplog.at_level(logging.INFO):
        with console.task("train", 20, completed=5) as task:
            clock.now += 10
            task.advance("loss 0.5", count=5)
            assert task.progress is not None
            task.progress.refresh()
    shown = screen.getvalue()
    assert "train" in shown
    assert "10/20" in shown
    assert "loss 0.5  0:20 left" in shown
    assert not caplog.records, "no plain lines beside the bar"


def test_a_long_line_reaches_a_terminal_in_one_piece() -> None:
    """So that a command in it can be copied; a bar stays below the lines."""
    screen, console = io.StringIO(), Console()
    console.rich = RichConsole(file=screen, force_terminal=True, width=40)
    console.live = True
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        console.start_logging()
        with console.task("train", 20):
            logging.getLogger("mae_dat").info("mae-dat evaluate --checkpoint %s [bold]", "OUT/" * 30)
            logging.getLogger("mae_dat").warning("a warning")
    finally:
        logging.basicConfig(level=level, handlers=before, force=True)
    shown = screen.getvalue()
    assert f"mae-dat evaluate --checkpoint {'OUT/' * 30} [bold]\n" in shown
    assert "\x1b[33ma warning" in shown, "in yellow"


def test_lines_of_a_long_stage_become_rare(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run_task(Console(interval=10), clock, 10 * 3600, 1.0)
    assert 200 < len(caplog.records) < 300, "and not 3600"


def test_the_time_left_of_a_resumed_stage_counts_what_was_done_now(clock: Clock) -> None:
    with Console(quiet=True).task("train", 100, completed=90) as task:
        clock.now += 4
        task.advance(count=2)
        assert task.seconds_left() == pytest.approx(16)


def test_the_time_left_covers_the_planned_stages(clock: Clock) -> None:
    console = Console({"one": 10.0, "two": 20.0, "three": 30.0}, quiet=True)
    with console.task("one", 10) as task:
        clock.now += 10
        task.advance(count=5)
        # Half of the first stage took 10 s: 10 more, and the plan's 50 at twice their length.
        assert task.seconds_left() == pytest.approx(10 + 2 * 50)
        clock.now += 10
        task.advance(count=5)
    assert console.seconds_spent == {"one": 20.0}
    with console.task("two", 4) as task:
        clock.now += 25
        task.advance(count=1)
        # The second stage is estimated at 100 s: (20 + 100) / (10 + 20) of the plan's pace for the third.
        assert task.seconds_left() == pytest.approx(75 + 4 * 30)


def test_without_a_plan_only_this_stage_counts(clock: Clock) -> None:
    console = Console(quiet=True)
    run_task(console, clock, 5, 1.0)
    assert console.seconds_left_after("other", 10.0) == 0


# ---- log.txt ----


def test_records_beyond_the_resumed_step_are_dropped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = RunLog(tmp_path)
    for epoch in range(3):
        log.record({"epoch": epoch, "step": 10 * (epoch + 1), "train_loss": 0.5})
    log.close()
    with (tmp_path / "log.txt").open("a") as file:
        file.write('{"epoch": 3, "st')  # a kill in the middle of a write
    with caplog.at_level(logging.WARNING):
        log = RunLog(tmp_path, resumed_step=25)
    assert "log.txt: an incomplete line was skipped" in caplog.text
    log.record({"epoch": 2, "step": 30, "train_loss": 0.4})
    log.close()
    records = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [(record["epoch"], record["train_loss"]) for record in records] == [(0, 0.5), (1, 0.5), (2, 0.4)]
    assert read_log(tmp_path / "log.txt") == records
    assert read_log(tmp_path / "nothing.txt") == []


def test_a_fresh_run_starts_a_fresh_log(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text('{"epoch": 0, "step": 4}\n')
    RunLog(tmp_path).close()
    assert read_log(tmp_path / "log.txt") == []


def test_a_log_torn_at_any_byte_loses_nothing_else(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, records = tmp_path / "log.txt", [{"step": 10, "note": "ä\n"}, {"step": 20, "loss": 1.25e-7}, {"step": 30}]
    lines = [json.dumps(record).encode() + b"\n" for record in records]
    whole = b"".join(lines)
    ends = [len(b"".join(lines[:count])) for count in range(4)]
    for torn in range(len(whole) + 1):
        path.write_bytes(whole[:torn])
        complete = sum(end - 1 <= torn for end in ends[1:])  # a line without its newline is complete
        assert read_log(path) == records[:complete]
        path.write_bytes(whole[:torn] + bytes(9))  # as a lost page leaves it
        assert read_log(path) == records[: sum(end <= torn for end in ends[1:])]
    path.write_bytes(b"\xff\xfe\n7\n" + whole)
    assert read_log(path) == records


def test_resuming_from_a_torn_log_continues_with_whole_lines(tmp_path: Path) -> None:
    line = json.dumps({"step": 10, "loss": 0.5})
    for torn in range(len(line) + 1):
        (tmp_path / "log.txt").write_text(f"{line}\n{line.replace('10', '20')[:torn]}")
        log = RunLog(tmp_path, resumed_step=10)
        log.record({"step": 20, "loss": 0.25})
        log.close()
        assert read_log(tmp_path / "log.txt") == [{"step": 10, "loss": 0.5}, {"step": 20, "loss": 0.25}]


def test_a_torn_tensorboard_file_leaves_every_position_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run is killed while it writes: later values are written again, earlier ones are kept."""
    (tmp_path / "whole").mkdir()
    first = RunLog(tmp_path / "whole")
    for number in range(1, 5):
        first.point({"train_loss": float(number)}, 1000 * number)
    first.close()
    (events,) = (tmp_path / "whole").glob("events*")
    content = events.read_bytes()
    # TensorBoard reads files in the order of their names, which hold the second in which they were begun.
    began = re.search(r"tfevents\.(\d+)", events.name)
    assert began
    earlier = events.name.replace(began[1], str(int(began[1]) - 60))
    for torn in range(0, len(content) + 1, 23):
        folder = tmp_path / str(torn)
        folder.mkdir()
        (folder / earlier).write_bytes(content[:torn])
        log = RunLog(folder, resumed_step=2000)
        for number in range(3, 7):
            log.point({"train_loss": float(number)}, 1000 * number)
        log.close()
        board = EventAccumulator(str(folder))
        with caplog.at_level(logging.CRITICAL):
            board.Reload()
        shown = [scalar.step for scalar in board.Scalars("train/loss")]
        assert shown[-4:] == [3000, 4000, 5000, 6000]
        assert shown == [1000, 2000, 3000, 4000, 5000, 6000][-len(shown) :] or shown == [1000, 3000, 4000, 5000, 6000]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    log = RunLog(tmp_path, enabled=False)
    log.record({"epoch": 0, "step": 10})
    log.point({"train_loss": 1.0}, 10)
    log.flush()
    log.image("image", torch.zeros(3, 4, 4), 1000)
    log.close()
    assert list(tmp_path.iterdir()) == []


# ---- TensorBoard ----


def read_board(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def curve(events: EventAccumulator, tag: str) -> dict[int, float]:
    return {event.step: event.value for event in events.Scalars(tag)}


def test_scalars_and_images_come_back(tmp_path: Path) -> None:
    log = RunLog(tmp_path, tmp_path / "board")
    log.point({"train_loss": 2.0, "train_lr": 1e-3, "epoch": 0.5}, 1000)
    log.point({"train_loss": 1.0, "train_lr": 1e-4, "epoch": 1.0}, 2000)
    log.record({"epoch": 0, "step": 2000, "train_loss": 1.5, "test_acc1": 60.0, "seconds": 3.0})
    log.image("gallery", torch.rand(3, 20, 30) * 2 - 0.5, 2000)
    log.close()
    events = read_board(tmp_path / "board")
    assert set(events.Tags()["scalars"]) == {"train/loss", "train/lr", "train/epoch", "val/acc1"}
    assert curve(events, "train/loss") == {1000: 2.0, 2000: 1.0}
    assert curve(events, "train/lr") == pytest.approx({1000: 1e-3, 2000: 1e-4})
    assert curve(events, "val/acc1") == {2000: 60.0}
    assert read_log(tmp_path / "steps.jsonl")[1] == {"step": 2000, "train_loss": 1.0, "train_lr": 1e-4, "epoch": 1.0}
    (image,) = events.Images("gallery")
    assert (image.step, image.height, image.width) == (2000, 20, 30)


TINY = ViTSize(32, 8, 32, 1, 2)


def settings(tmp_path: Path, output: str) -> dict[str, Any]:
    root = write_image_folder(
        tmp_path / "images", FolderSettings(train=16, val=10, conflict=10, silhouette=10, size=32)
    )
    return {
        "run": RunConfig(str(tmp_path / output), device="cpu", precision="fp32", images_every=2),
        "data": DataConfig(str(root), (32,), num_workers=0),
        "optim": OptimConfig(batch_size=8, epochs=2, warmup_epochs=0),
    }


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    LightTokenizer(LightConfig(width=8, encoder_blocks=1, decoder_blocks=1, num_words=16)).save(
        tmp_path / "tokenizer.safetensors"
    )
    return str(tmp_path / "tokenizer.safetensors")


TRAIN_TAGS = {
    f"train/{name}"
    for name in (
        *("loss", "loss_clean", "loss_adversarial", "changed_words", "eps", "lr", "grad_norm", "epoch"),
        "images_per_second",
    )
}


def test_pretraining_writes_its_tags_and_galleries(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(mae.MAE_MODELS, "mae_tiny", MaeSize(TINY, 16, 1, 2))
    config = PretrainConfig(
        **settings(tmp_path, "mae"), mae=MaskConfig("mae_tiny"), dat=DatConfig("released", tokenizer=tokenizer)
    )
    run_pretraining(config, Console(quiet=True))
    events, records = read_board(tmp_path / "mae"), read_log(tmp_path / "mae" / "log.txt")
    points = read_log(tmp_path / "mae" / "steps.jsonl")
    assert [point["step"] for point in points] == [1, 2, 3, 4], "at least one in five of an epoch's two steps"
    assert set(events.Tags()["scalars"]) == TRAIN_TAGS
    for tag in TRAIN_TAGS - {"train/epoch", "train/images_per_second"}:
        expected = {point["step"]: point[tag.replace("/", "_")] for point in points}
        assert curve(events, tag) == pytest.approx(expected, rel=1e-6), tag
    assert list(curve(events, "train/epoch").values()) == [0.5, 1.0, 1.5, 2.0]
    for record, halves in zip(records, (points[:2], points[2:]), strict=True):
        for key in ("train_loss", "train_grad_norm", "train_changed_words", "train_eps"):
            assert record[key] == pytest.approx(sum(half[key] for half in halves) / 2, rel=1e-6)
    assert set(events.Tags()["images"]) == {"reconstruction", "adversary"}
    for name in ("reconstruction", "adversary"):
        (image,) = events.Images(name)  # of the second epoch only: images_every is 2
        assert image.step == 4
        assert image.width > 100
        assert (tmp_path / "mae" / "images" / f"{name}.png").is_file()


def test_finetuning_writes_its_tags_and_gallery(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(mae.VIT_SIZES, "vit_tiny", TINY)
    config = FinetuneConfig(
        **settings(tmp_path, "classifier"),
        classifier=ClassifierConfig("vit_tiny"),
        augment=AugmentConfig(aa=None),
        dat=DatConfig("released", tokenizer=tokenizer),
    )
    run_finetuning(config, Console(quiet=True))
    events, records = read_board(tmp_path / "classifier"), read_log(tmp_path / "classifier" / "log.txt")
    assert set(events.Tags()["scalars"]) == {*TRAIN_TAGS, "val/acc1", "val/acc5", "val/loss", "val/balanced_acc"}
    for name in ("acc1", "acc5", "loss"):
        expected = {record["step"]: record[f"test_{name}"] for record in records}
        assert curve(events, f"val/{name}") == pytest.approx(expected, rel=1e-6)
    assert [(image.step, image.width > 100) for image in events.Images("adversary")] == [(4, True)]
