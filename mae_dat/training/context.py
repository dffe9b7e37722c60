"""Where a run happens: ranks, device, precision, output folder; and a model made ready for it."""

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
    """Where a run happens."""

    world: World
    device: torch.device
    precision: torch.dtype | None
    output: Path
    lease: OutputLock | None = None
    """Of the output folder, on rank 0 of a training."""
    shards: bool = False
    """Whether the ranks share one copy of a model (`--fsdp`)."""
    compiled: bool = False
    """Whether blocks are compiled."""
    checkpointed: bool = False
    """Whether blocks compute their activations twice to save memory."""


@contextlib.contextmanager
def run_context(run: RunConfig, launch: LaunchConfig, console: Console, training: bool = True) -> Iterator[RunContext]:
    """Joins the peers, picks the device and prepares the output folder; the block runs inside the process group.

    A training has the folder to itself: OutputError, on all ranks, if another one holds it.
    """
    world = world_from_environment()
    if world.size == 1 and launch.world_size > 1:
        logger.warning(
            "--world_size %d alone starts nothing: use torchrun --nproc_per_node %d.",
            launch.world_size,
            launch.world_size,
        )
    fsdp = launch.fsdp and world.size > 1
    if launch.fsdp and not fsdp:
        logger.warning("--fsdp: a single rank has nobody to share the model with.")
    if not world.main:
        console.quiet, console.live = True, False
    if run.compile and fsdp:
        raise ConfigError("--compile does not go with --fsdp: leave out one of them.")
    device = pick_device(run.device, world)
    set_float32_precision(run.precision)
    if run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    with process_group(world, device), contextlib.ExitStack() as stack:
        output, leases = Path(run.output_dir), []

        def prepare() -> None:
            prepare_output_folder(output)
            if training:
                leases.append(stack.enter_context(lock_output_folder(output)))
                delete_unfinished(output)

        on_main_rank(prepare)
        stack.enter_context(watchdog(run.hang_minutes, world.rank))
        yield RunContext(
            world,
            device,
            amp_dtype(run.precision, device),
            output,
            leases[0] if leases else None,
            fsdp,
            run.compile,
            run.checkpoint_activations,
        )


def prepare_model(model: nn.Module, context: RunContext, copy: nn.Module | None = None) -> None:
    """Makes of a model, and of its averaged copy, what the flags ask; the optimizer comes after. Raises ConfigError."""
    choose_attention(model, context.device, context.precision)
    if context.checkpointed:
        checkpoint_blocks(model)
    if context.compiled:
        compile_blocks(model)
    for one in (model, copy):
        if one is not None and context.shards:
            shard_model(one, context.world, context.device)
