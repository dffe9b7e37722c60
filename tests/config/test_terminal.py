"""Names from files never reach the terminal as commands: in every message, log line and printed table."""

import contextlib
import io
import logging
from pathlib import Path

import pytest
from noise_images import MakeFolder
from rich.console import Console as RichConsole
from tiny_runs import FINETUNE, one_thread, verb  # noqa: F401

from mae_dat.config.parse import run_command
from mae_dat.config.terminal import print_text, printable, printable_lines
from mae_dat.runtime.console import Console

CLEAR = "a\x1b[2J\x1b]0;owned\x07b"
HIDDEN = [27, 7, 8, 155, 0x202E, 0x200B, 0xDC80, 13]


def test_only_line_breaks_and_tabs_stay(capsys: pytest.CaptureFixture[str]) -> None:
    assert printable_lines(f"café 猫\t{CLEAR}\n") == "café 猫\ta?[2J?]0;owned?b\n"
    assert printable_lines("".join(map(chr, HIDDEN))) == "?" * len(HIDDEN)
    assert printable("a\nb") == "a?b"
    print_text(CLEAR)
    assert capsys.readouterr().out == "a?[2J?]0;owned?b\n"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_log_and_progress_hold_no_escapes(is_terminal: bool, capsys: pytest.CaptureFixture[str]) -> None:
    console, stream = Console(), io.StringIO()
    console.live, console.rich = is_terminal, RichConsole(file=stream, force_terminal=False)
    handler = console._log_handler()
    handler.emit(logging.LogRecord("mae_dat", logging.INFO, "", 1, "class %s", (CLEAR,), None))
    with console.task(CLEAR, 1) as task:
        task.advance(f"[red]{CLEAR}")
    shown = stream.getvalue() + capsys.readouterr().err
    assert "class a?[2J?]0;owned?b" in shown
    assert not {"\x1b", "\x07"} & set(shown)


@pytest.mark.slow
def test_no_command_prints_the_escapes_of_a_class_or_a_file(
    make: MakeFolder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    photos = make(" ".join(f"photos/{name}/{CLEAR}{number}.png" for name in (CLEAR, "dog") for number in range(8)))
    data, out = tmp_path / "data", tmp_path / f"out{CLEAR}"
    assert verb("split")([str(photos / "photos"), str(data), "--val", "0.5"]) == 0
    assert verb("finetune")([*FINETUNE, "--data_path", str(data), "--output_dir", str(out)]) == 0
    (data / "train" / "dog" / f"{CLEAR}.png").write_bytes(b"no image")
    for name, *arguments in (
        ["scan", str(data / "train"), "--num_workers", "0"],
        ["predict", str(data / "train"), "--checkpoint", str(out), "--output_dir", str(tmp_path / "predictions")],
        ["evaluate", "--checkpoint", str(out), "--data_path", str(data), "--suite", "clean", "--output_dir", str(out)],
        ["report", str(out)],
        ["convert", str(out), str(tmp_path / f"{CLEAR}.pth"), "--to", "timm"],
        ["predict", str(tmp_path / CLEAR), "--checkpoint", str(out)],
    ):
        capfd.readouterr()
        with contextlib.suppress(SystemExit):
            run_command(lambda name=name, arguments=arguments: verb(name)(arguments))
        shown = "".join(capfd.readouterr())
        assert "owned" in shown, name
        assert not {"\x1b", "\x07"} & set(shown), (name, shown)
    for text in ("report.md", "report.tex"):
        assert "\x1b" not in (out / text).read_text()
