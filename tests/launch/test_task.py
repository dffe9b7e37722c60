"""What the exit codes of a job's ranks mean, and how a growing log is shown; the jobs themselves are in test_submit.py
and test_slurm.py."""

import io
from pathlib import Path

import pytest

from mae_dat.launch.follow import UNKNOWN, LogTail, exit_code
from mae_dat.launch.slurm import JobState, array_indices
from mae_dat.launch.task import EARLY_CRASH_S, RankExit, RankExits, ScriptTask, job_exit_code


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ((), 0),
        ((0, 0), 0),
        ((75, 0), 75),
        ((0, -9), 75),
        ((-15, 75), 75),
        ((75, 65, 74), 65),
        ((0, 1), 1),
        ((-2, 75), 130),
    ],
)
def test_an_error_prevails_over_a_restart(codes: tuple[int, ...], code: int) -> None:
    assert job_exit_code([RankExit(rank_code, 100.0) for rank_code in codes]) == code


def test_exits_are_recorded_by_attempt_and_rank(tmp_path: Path) -> None:
    exits = RankExits(tmp_path / "exits")
    assert exits.newest_code() is None
    exits.write(2, 1, RankExit(65, 1.0))
    exits.write(9, 10, RankExit(-9, 1.0, "SIGUSR2"))
    exits.write(10, 0, RankExit(0, 1.5))
    assert exits.read(9) == {10: RankExit(-9, 1.0, "SIGUSR2")}
    assert exits.newest_code() == 0
    exits.write(10, 3, RankExit(75, 1.5))
    assert exits.newest_code() == 75
    (exits.folder / "11-0.json").write_text('{"code": ')  # cut off by a lost node
    assert exits.read(11) == {}


def test_a_full_disk_does_not_end_what_follows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    RankExits(tmp_path / "file").write(0, 0, RankExit(75, 1.0))
    assert RankExits(tmp_path / "file").read(0) == {}


@pytest.mark.parametrize(
    ("attempts", "crashing"),
    [
        ([(-11, 5.0, None)] * 3, True),
        ([(-11, 5.0, None)] * 2, False),
        ([(-11, 5.0, None), (-11, EARLY_CRASH_S + 1, None), (-11, 5.0, None)], False),
        ([(-9, 5.0, "SIGTERM")] * 3, False),
        ([(75, 5.0, None)] * 3, False),
    ],
)
def test_only_a_script_that_is_killed_at_every_start_keeps_crashing(
    tmp_path: Path, attempts: list[tuple[int, float, str | None]], crashing: bool
) -> None:
    exits = RankExits(tmp_path)
    for number, (code, seconds, signal) in enumerate(attempts):
        exits.write(number, 0, RankExit(75, seconds))
        exits.write(number, 1, RankExit(code, seconds, signal))
    assert exits.keep_crashing(len(attempts) - 1) == crashing


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        ("3", [3]),
        ("0-3", [0, 1, 2, 3]),
        ("0-8:4,3,3", [0, 3, 4, 8]),
        ("5-5%1", [5]),
    ],
)
def test_array_indices_are_slurms(text: str, indices: list[int]) -> None:
    assert array_indices(text) == indices


@pytest.mark.parametrize("text", ["", "a", "-3", "1,", "1-", "3-1", "0-4:0", "1%0", "1%", "1%x", "٣", "0-9999999"])
def test_a_text_that_is_not_an_array_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        array_indices(text)


@pytest.mark.parametrize(
    ("state", "script_code", "code"),
    [
        ("COMPLETED", 0, 0),
        ("COMPLETED", None, 0),
        ("FAILED", 74, 74),
        ("FAILED", None, 1),
        ("FAILED", 0, 1),  # rank 0 was well, but another rank's launcher died
        ("CANCELLED", 75, 130),
        ("TIMEOUT", None, 75),
        ("TIMEOUT", 76, 76),
        ("NODE_FAIL", 0, 75),
        ("OUT_OF_MEMORY", None, 1),
        (UNKNOWN.name, 0, 0),
        (UNKNOWN.name, None, 1),
    ],
)
def test_waiting_returns_the_scripts_code_or_what_the_state_means(
    state: str, script_code: int | None, code: int
) -> None:
    assert exit_code(JobState(state), script_code) == code


def test_a_log_is_shown_line_by_line_as_it_grows(tmp_path: Path) -> None:
    log, out = LogTail(tmp_path / "log"), io.StringIO()
    log.show(out)  # not there yet
    log.path.write_bytes("one\ntwo ü".encode()[:-1])
    log.show(out)
    assert out.getvalue() == "one\n"
    with log.path.open("ab") as file:
        file.write("ü".encode()[1:] + b"\n\nrest")
    log.show(out)
    log.show(out, unfinished=True)
    assert out.getvalue() == "one\ntwo ü\n\nrest"
    log.path.write_text("anew\n")
    log.show(out)
    assert out.getvalue().endswith("restanew\n")


def test_lines_of_an_array_begin_with_their_index(tmp_path: Path) -> None:
    log, out = LogTail(tmp_path / "log", "[3] "), io.StringIO()
    log.path.write_text("one\n\ntwo\n")
    log.show(out)
    assert out.getvalue() == "[3] one\n\n[3] two\n"


def test_an_index_replaces_every_placeholder() -> None:
    task = ScriptTask("x.py", ("--seed=%a", "a%ab%a", "%"))
    assert task.at_index(12).args == ("--seed=12", "a12b12", "%")
    assert task.at_index(12).token == task.token
