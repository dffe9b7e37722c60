"""Where a process runs: ranks from torchrun's and srun's variables, devices, precision, and the random state of a
step."""

import os

import pytest
import torch

from mae_dat.config.errors import ConfigError
from mae_dat.runtime import device
from mae_dat.runtime.collectives import all_mean, all_sum
from mae_dat.runtime.device import amp_dtype, pick_device
from mae_dat.runtime.seeds import step_generator, step_seed
from mae_dat.runtime.world import World, _first_host, process_group, world_from_environment

CPU = torch.device("cpu")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def no_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, *[name for name in os.environ if name.startswith("SLURM_")]):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "world"),
    [
        ({}, World(0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, World(3, 8, 1)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, World(0, 1, 0)),
        (
            {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2", "SLURM_LOCALID": "0"},
            World(2, 4, 0),
        ),
        # An interactive allocation, and a batch script's own shell: one process, whatever was allocated.
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}, World(0, 1, 0)),
        ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, World(0, 1, 0)),
        # torchrun inside srun: torchrun's are the nearer ones.
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"},
            World(5, 8, 1),
        ),
    ],
)
def test_the_world_is_read_from_the_environment(
    variables: dict[str, str], world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert world_from_environment() == world
    assert world_from_environment().main == (world.rank == 0)


def test_cuda_without_cuda_is_an_error_that_offers_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ConfigError, match="--device cuda.*Use --device cpu"):
            pick_device(name)
    assert pick_device("auto") == pick_device("cpu") == CPU


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="--device gpu is not a device: use cuda, cpu or auto"):
        pick_device("gpu")


def test_precision_follows_the_flag_and_the_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    assert amp_dtype("fp32", CPU) is None
    assert amp_dtype("bf16", CPU) is torch.bfloat16
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: True)
    assert amp_dtype("auto", CPU) is torch.bfloat16
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: False)
    assert amp_dtype("auto", CPU) is None
    for capable in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, capable=capable: capable)
        assert amp_dtype("auto", torch.device("cuda")) is (torch.bfloat16 if capable else None)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n03", "n03"),
        ("a1,b2", "a1"),
        ("n[03-05,9]", "n03"),
        ("n[7,9-12]", "n7"),
        ("a1,n[03-05]", "a1"),
        ("gpu-a[001-016],gpu-b[001-002]", "gpu-a001"),
        ("n[03-05]-ib,m1", "n03-ib"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert _first_host(nodes) == first


def test_a_single_process_joins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    value = torch.tensor([1.0, 2.0])
    with process_group(World(), CPU):
        assert not torch.distributed.is_initialized()
        assert all_sum(value) is value
        assert all_mean(value) is value
    assert "MASTER_ADDR" not in os.environ


def test_a_group_reduces_and_is_left_cleanly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group of one rank is enough to see that sums do not change their argument and that the group is left."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        value = torch.tensor([1, 2])
        summed = all_sum(value)
        assert summed is not value
        assert summed.tolist() == [1, 2]
        assert float(all_mean(torch.tensor(3.0))) == 3.0
    finally:
        torch.distributed.destroy_process_group()


def test_a_steps_seed_is_pure_and_distinct() -> None:
    seeds = {(s, t, r): step_seed(s, t, r) for s in range(4) for t in range(50) for r in range(8)}
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= value < 2**63 for value in seeds.values())
    torch.manual_seed(99)
    assert seeds == {key: step_seed(*key) for key in seeds}
    assert step_seed(0, 0, 0) == 4507322640883948382, "resuming older checkpoints needs the same numbers"


def test_a_steps_generator_depends_on_its_seed_only() -> None:
    before = torch.get_rng_state()
    first, same, other = (torch.rand(8, generator=step_generator(0, step, 0, CPU)) for step in (5, 5, 6))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
