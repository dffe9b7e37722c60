"""The context of a run: its settings, ranks, device, precision, output folder and console; and models prepared for
it."""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import LaunchConfig, RunConfig
from mae_dat.runtime.blocks import checkpoint_blocks, choose_attention, compile_blocks
from mae_dat.runtime.collectives import on_main_rank
from mae_dat.runtime.console import Console
from mae_dat.runtime.device import amp_dtype, pick_device, set_float32_precision
from mae_dat.runtime.sharding import shard_model
from mae_dat.runtime.watchdog import watchdog
from mae_dat.runtime.world import World, process_group, world_from_environment
from mae_dat.storage.checkpoint import delete_unfinished
from mae_dat.storage.files import prepare_output_folder
from mae_dat.storage.output_lock import OutputLock, lock_output_folder

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RunContext:
    """Where and how a run is computed."""

    run: RunConfig
    world: World
    device: torch.device
    precision: torch.dtype | None
    """The data type of autocast; None for float32."""
    console: Console
    output_lock: OutputLock | None = None
    """The right to write into the output folder, on rank 0 of a training."""
    sharded: bool = False
    """Whether the ranks share one copy of a model (`--fsdp`)."""

    @property
    def output(self) -> Path:
        """The output folder."""
        return Path(self.run.output_dir)


@contextlib.contextmanager
def run_context(run: RunConfig, launch: LaunchConfig, console: Console, training: bool = True) -> Iterator[RunContext]:
    """Join the other ranks, choose the device and prepare the output folder; the block runs in the process group.

    A training locks its output folder. Raises OutputError, on all ranks, if another run uses it, and ConfigError.
    """
    world = world_from_environment()
    sharded = launch.fsdp and world.size > 1
    _warn_about_ranks(launch, world)
    if not world.main:
        console.quiet, console.live = True, False
    if run.compile and sharded:
        raise ConfigError("--compile does not go with --fsdp: leave out one of them.")
    device = pick_device(run.device, world)
    set_float32_precision(run.precision)
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    with process_group(world, device), contextlib.ExitStack() as stack:
        locks: list[OutputLock] = []  # stays empty on the other ranks, and where nothing is trained

        def prepare_output() -> None:
            output = Path(run.output_dir)
            prepare_output_folder(output)
            if training:
                locks.append(stack.enter_context(lock_output_folder(output)))
                delete_unfinished(output)

        on_main_rank(prepare_output)
        stack.enter_context(watchdog(run.hang_minutes, world.rank))
        yield RunContext(
            run=run,
            world=world,
            device=device,
            precision=amp_dtype(run.precision, device),
            console=console,
            output_lock=locks[0] if locks else None,
            sharded=sharded,
        )


def _warn_about_ranks(launch: LaunchConfig, world: World) -> None:
    if world.size > 1:
        return
    if launch.world_size > 1:
        ranks = launch.world_size
        logger.warning("--world_size %d alone starts nothing: use torchrun --nproc_per_node %d.", ranks, ranks)
    if launch.fsdp:
        logger.warning("--fsdp: a single rank has no other rank to share the model with.")


def prepare_model(model: nn.Module, context: RunContext, average: nn.Module | None = None) -> None:
    """Prepare a model, and the average of its weights, as the flags ask: attention, activations, compilation, shards.

    Build the optimizer afterwards. Raises ConfigError.
    """
    choose_attention(model, context.device, context.precision)
    if context.run.checkpoint_activations:
        checkpoint_blocks(model)
    if context.run.compile:
        compile_blocks(model)
    if context.sharded:
        for network in (model, average):
            if network is not None:
                shard_model(network, context.world, context.device)
