"""Jobs on a real scheduler of two nodes, which these tests start themselves: signals, requeues, lost nodes and arrays,
and training that ends with the same weights through all of it.

Needs root, and Debian's SLURM packages or apt to get them; a skipped test names what is missing.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from tiny_runs import FINETUNE, ROOT, draw_folder, environment, save_tokenizer

from mae_dat.launch.slurm import JobState, job_states
from mae_dat.launch.task import RankExit, RankExits

pytestmark = pytest.mark.slow

TOOLS = Path(__file__).parents[1] / "support" / "slurm"
DAT = [*FINETUNE, "--epochs", "14", "--save_minutes", "0.03", "--dat", "--device", "cpu"]

# A fast stand-in for training: a step each 0.1 s, saved by rank 0 every 10 steps and, slowly, on SIGTERM. The other
# rank leaves at once on SIGTERM. Arguments: folder, event at step 20 of the first attempt, and the rank it happens on.
TRAINER = """
import os, pathlib, signal, sys, time
folder, event, event_rank = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
rank = os.environ.get("RANK") or os.environ["SLURM_PROCID"]
restarts = os.environ.get("MAE_DAT_RESTARTS") or os.environ.get("SLURM_RESTART_COUNT", "0")
signals = []
signal.signal(signal.SIGTERM, lambda *_: signals.append(1))
def save():
    (folder / "new").write_text(str(step))
    (folder / "new").rename(folder / "state")
step = int((folder / "state").read_text()) if (folder / "state").exists() else 0
print("attempt", restarts, "rank", rank, "from step", step, flush=True)
(folder / f"from-{restarts}-{rank}").write_text(str(step))
while step < 60:
    time.sleep(0.1)
    step += 1
    if restarts == "0" and rank == event_rank and step == 20:
        if event.startswith("kill"):
            os.kill(os.getpid(), 9)
        if event.startswith("exit"):
            sys.exit(int(event[4:]))
    if event == "deaf" and restarts == "0":
        step = 30 if len(signals) < 2 else step  # until the time limit itself
    if signals and not (event == "deaf" and len(signals) < 2):
        if rank == "0":
            time.sleep(8 if event in ("USR2", "TERM") else 1)  # longer than KillWait: nothing may interrupt this
            save()
        sys.exit(75)
    if rank == "0" and step % 10 == 0:
        save()
(folder / f"done-{rank}").touch()
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[str]:
    """A cluster of nodes n1 and n2 with accounting, and partitions `debug` and, preempted by it, `low`."""
    if os.geteuid() != 0:
        pytest.skip("a scheduler of our own needs root")
    if not shutil.which("unshare") or not shutil.which("apt-get"):
        pytest.skip("a scheduler of our own needs Linux' namespaces, and Debian's packages")
    folder = tempfile.mkdtemp(prefix="slurm-", dir="/tmp")  # a short path: it holds sockets
    os.chmod(folder, 0o755)
    settings = {"SLURM_LAB": folder, "SLURM_LAB_CPUS": "16"}
    up = subprocess.run([TOOLS / "slurm-up"], env=os.environ | settings, capture_output=True, text=True, timeout=400)
    if up.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        pytest.skip(f"no scheduler could be started: {' '.join(up.stderr.split())[-600:]}")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("SLURM_", "MAE_DAT_"))]:
            patch.delenv(name)
        patch.setenv("SLURM_CONF", f"{folder}/etc/slurm.conf")
        patch.setenv("OMP_NUM_THREADS", "1")
        yield folder
    for process in Submitted.waiting:  # where a test has failed
        process.kill()
        process.wait()
    subprocess.run([TOOLS / "slurm-down"], env=os.environ | settings, check=True, timeout=120)
    shutil.rmtree(folder, ignore_errors=True)


def slurm(*command: str) -> str:
    """Run one of SLURM's commands and return its output."""
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout


def until(ready: Callable[[], object], what: str, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"{what}: not within {seconds} s\n{slurm('squeue', '--states=all')}"
        time.sleep(0.2)


class Submitted:
    """A job of two tasks on two nodes, with `submit.py --wait` following it."""

    waiting: ClassVar[list[subprocess.Popen[bytes]]] = []

    def __init__(self, folder: Path, script: Path, *words: object, flags: tuple[str, ...] = ()) -> None:
        self.jobs = folder / "jobs"
        self.shown = folder / "shown.txt"
        command = [sys.executable, ROOT / "submit.py", "--cluster", "slurm", "--wait", "--nodes", 2, "--ngpus", 0]
        command += ["--cpus_per_task", 1, "--job_dir", self.jobs / "%j", *flags, script, *words]
        with self.shown.open("w") as out:
            self.process = subprocess.Popen(
                list(map(str, command)), cwd=folder, env=environment(), stdout=out, stderr=subprocess.STDOUT
            )
        self.waiting.append(self.process)
        until(lambda: "submitted job" in self.text or self.process.poll(), "submission")
        assert "submitted job" in self.text, self.text
        self.id = self.text.split("submitted job ")[1].split()[0]

    @property
    def text(self) -> str:
        """The output of `--wait` so far."""
        return self.shown.read_text()

    @property
    def state(self) -> str:
        """The state of the job, such as RUNNING."""
        return (job_states(self.id) or {}).get(self.id, JobState("")).name

    def result(self, seconds: float = 240) -> int:
        """Wait for the end and return the exit code of `--wait`."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"job {self.id} has not ended within {seconds} s:\n{self.text}")

    def exits(self, attempt: int) -> dict[int, RankExit]:
        """Return how the script ended on each rank."""
        (folder,) = self.jobs.glob("*/*_exits_*")
        return RankExits(folder).read(attempt)


@pytest.fixture
def trainer(lab: str, tmp_path: Path) -> Callable[..., tuple[Submitted, Path]]:
    """Starts the stand-in; returns the job and its folder."""

    def start(event: str = "nothing", rank: str = "0", *flags: str) -> tuple[Submitted, Path]:
        folder = tmp_path / f"{event}-{rank}"
        folder.mkdir()
        (folder / "train.py").write_text(TRAINER)
        return Submitted(folder, folder / "train.py", folder, event, rank, flags=flags), folder

    return start


def wait_for_step_10(job: Submitted, folder: Path) -> None:
    until(lambda: (folder / "state").exists() and (folder / "from-0-1").exists(), f"job {job.id} at step 10")


@pytest.fixture(scope="module")
def out_of_time(lab: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Submitted, Path]:
    """A job that ignores signals until its time limit, started early because that takes more than a minute."""
    folder = tmp_path_factory.mktemp("limit")
    (folder / "train.py").write_text(TRAINER)
    return Submitted(folder, folder / "train.py", folder, "deaf", "0", flags=("--timeout", "1")), folder


@pytest.mark.usefixtures("out_of_time")
def test_waiting_returns_the_scripts_exit_code(trainer: Callable[..., tuple[Submitted, Path]]) -> None:
    jobs = {trainer()[0]: 0, trainer("exit74", "0")[0]: 74, trainer("exit65", "1")[0]: 65}
    for job, code in jobs.items():
        assert job.result() == code, job.text
        until(lambda job=job: job.state in ("COMPLETED", "FAILED"), "the end")  # type: ignore[misc]
        assert job.state == ("FAILED" if code else "COMPLETED")
        assert job.exits(1) == {}


@pytest.mark.usefixtures("out_of_time")
def test_a_job_that_is_signalled_or_killed_resumes(trainer: Callable[..., tuple[Submitted, Path]]) -> None:
    signalled = {}
    for name in ("USR2", "TERM"):
        job, folder = signalled[name] = trainer(name, "0")
        wait_for_step_10(job, folder)
        slurm("scancel", f"--signal={name}", job.id)
    killed = [trainer("kill", "0"), trainer("kill", "1"), trainer("exit75", "1")]
    for job, folder in [*signalled.values(), *killed]:
        assert job.result() == 0, job.text
        assert (folder / "done-0").exists()
        assert (folder / "done-1").exists()
        assert not (folder / "from-2-0").exists(), "one requeue, although several ranks ask for it"
        assert int((folder / "from-1-0").read_text()) >= 10
    for job, _ in signalled.values():
        exits = job.exits(0)
        assert (exits[0].code, exits[1].code) == (75, 75)  # rank 0 had time to save although rank 1 had left
        assert exits[0].seconds > exits[1].seconds + 5


@pytest.mark.usefixtures("out_of_time")
def test_a_canceled_job_is_not_revived(trainer: Callable[..., tuple[Submitted, Path]]) -> None:
    job, folder = trainer()
    wait_for_step_10(job, folder)
    slurm("scancel", job.id)
    assert job.result() == 130
    time.sleep(8)  # a requeued job would start within that time
    assert job.state == "CANCELLED"
    assert not (folder / "from-1-0").exists()
    assert job.exits(0)[0].exit_code == 75  # which otherwise means a restart


@pytest.mark.usefixtures("out_of_time")
def test_a_job_that_an_administrator_requeues_resumes(trainer: Callable[..., tuple[Submitted, Path]]) -> None:
    job, folder = trainer()
    wait_for_step_10(job, folder)
    slurm("scontrol", "requeue", job.id)
    assert job.result() == 0, job.text
    assert (folder / "from-1-0").exists()
    assert not (folder / "from-2-0").exists()


@pytest.mark.usefixtures("out_of_time")
def test_the_bare_batch_file_of_the_documentation(lab: str, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "slurm.md").read_text()
    text = "#!/bin/bash\n" + page.split("#!/bin/bash\n")[1].split("```")[0]
    sizes = "--nodes=4 --ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=10 --time=24:00:00"
    command = "python main_finetune.py --dat --output_dir OUT"
    assert sizes in text
    assert command in text
    (tmp_path / "train.py").write_text(TRAINER)
    jobs = {}
    for name in ("signalled", "canceled"):
        (tmp_path / name).mkdir()
        batch = tmp_path / f"{name}.sh"
        changed = text.replace(sizes, "--nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --time=10")
        batch.write_text(changed.replace(command, f"{sys.executable} {tmp_path}/train.py {tmp_path}/{name} nothing 0"))
        jobs[name] = slurm("sbatch", "--parsable", f"--chdir={tmp_path}", str(batch)).strip()
    for name in jobs:
        until(lambda name=name: (tmp_path / name / "state").exists(), name)  # type: ignore[misc]
    slurm("scancel", "--signal=TERM", jobs["signalled"])
    slurm("scancel", jobs["canceled"])
    until(lambda: job_states(jobs["signalled"]) == {jobs["signalled"]: JobState("COMPLETED", "None")}, "the end")
    assert (tmp_path / "signalled" / "done-0").exists()
    assert not (tmp_path / "signalled" / "from-2-0").exists()
    assert (job_states(jobs["canceled"]) or {})[jobs["canceled"]].name == "CANCELLED"
    assert not (tmp_path / "canceled" / "from-1-0").exists()


@pytest.mark.usefixtures("out_of_time")
def test_an_array_has_its_own_folders_and_the_first_error(lab: str, tmp_path: Path) -> None:
    for index in (0, 3, 7):
        (tmp_path / str(index)).mkdir()
    script = tmp_path / "train.py"
    script.write_text(TRAINER.replace('"exit"', '"exit" if "/3" in sys.argv[1] else "never"'))
    job = Submitted(tmp_path, script, tmp_path / "%a", "exit74", "0", flags=("--array", "0,3,7%2"))
    until(lambda: (tmp_path / "0" / "state").exists(), "the first element")
    slurm("scancel", "--signal=USR2", f"{job.id}_0")
    assert job.result() == 74, job.text
    states = job_states(job.id)
    assert states is not None
    assert {name: state.name for name, state in states.items()} == {
        f"{job.id}_0": "COMPLETED",
        f"{job.id}_3": "FAILED",
        f"{job.id}_7": "COMPLETED",
    }
    assert [(tmp_path / index / "from-1-0").exists() for index in ("0", "3", "7")] == [True, False, False]
    assert "\n[7] attempt 0 rank 0 from step 0\n" in job.text


def test_the_accounting_knows_jobs_that_the_controller_has_forgotten(
    trainer: Callable[..., tuple[Submitted, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = trainer("exit65", "0")
    assert job.result() == 65
    assert job_states("999999999") == {}
    from mae_dat.launch.slurm import _recorded_states

    until(lambda: _recorded_states(job.id) == {job.id: JobState("FAILED")}, "the accounting")
    monkeypatch.setenv("PATH", "")
    assert job_states(job.id) is None  # no reply is not an end


def test_out_of_time(out_of_time: tuple[Submitted, Path]) -> None:
    job, folder = out_of_time
    assert job.result() == 0, job.text
    assert (folder / "from-1-0").read_text() == "31"
    assert job.exits(0)[0].seconds > 40


# ---- training itself ----


@pytest.fixture(scope="module")
def flags(lab: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a fine-tuning with DAT on generated images."""
    folder = tmp_path_factory.mktemp("images")
    draw_folder(folder / "images", train=160, val=20, conflict=0)
    tokenizer = save_tokenizer(folder / "tokenizer.safetensors")
    return [*DAT, "--data_path", str(folder / "images"), "--tokenizer", str(tokenizer)]


def weights_hash(output: Path) -> str:
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


def newest_step(output: Path) -> int:
    return max((int(path.stem.partition("-")[2]) for path in output.glob("checkpoint-*.json")), default=0)


@pytest.fixture(scope="module")
def uninterrupted(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the hash of the weights of a job without interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    job = Submitted(folder, ROOT / "main_finetune.py", *flags, "--output_dir", folder / "out")
    assert job.result(400) == 0, job.text
    assert "2 ranks" in job.text
    return weights_hash(folder / "out")


@pytest.mark.parametrize("way", ["srun", "torchrun"])
def test_the_same_script_without_the_launcher(way: str, uninterrupted: str, flags: list[str], tmp_path: Path) -> None:
    start = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1", "--unbuffered"]
    python = [sys.executable]
    if way == "torchrun":
        python += ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
        python += ["--rdzv-endpoint=n1:29511", "--rdzv-id=test"]
    command = [*start, *python, str(ROOT / "main_finetune.py"), *flags, "--output_dir", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr
    assert weights_hash(tmp_path / "out") == uninterrupted


def test_a_job_that_is_preempted_and_loses_a_node_ends_with_the_same_weights(
    lab: str, uninterrupted: str, flags: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    job = Submitted(tmp_path, ROOT / "main_finetune.py", *flags, "--output_dir", output, flags=("--partition", "low"))
    until(lambda: newest_step(output) >= 20, "the first checkpoints", 400)
    slurm("sbatch", "--wait", "--partition=debug", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=srun true")
    before = newest_step(output)
    assert job.exits(0)[0].signal
    assert job.exits(0)[0].exit_code == 75
    until(lambda: newest_step(output) > before, "steps of the second attempt", 400)
    lab_environment = os.environ | {"SLURM_LAB": lab}
    subprocess.run([TOOLS / "slurm-down", "--node", "n2"], env=lab_environment, check=True)  # a power cut
    slurm("scontrol", "update", "nodename=n2", "state=down", "reason=test")  # seen at once, not after SlurmdTimeout
    until(lambda: job.state == "PENDING", "the job back in the queue")
    assert before < newest_step(output) < 140
    subprocess.run([TOOLS / "slurm-up", "--node", "n2"], env=lab_environment, check=True)
    assert job.result(400) == 0, job.text
    assert weights_hash(output) == uninterrupted
    assert set(job.exits(2)) == {0, 1}
    records = [json.loads(line) for line in (output / "log.txt").read_text().splitlines()]
    assert [record["epoch"] for record in records] == list(range(14))
