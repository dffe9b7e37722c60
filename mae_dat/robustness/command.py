"""Evaluate models on every robustness benchmark in a folder, and write results.json and a report: the command.

`mae-dat evaluate --checkpoint A B --suite all --data_path ROOT --output_dir OUT` runs every benchmark found in ROOT
and lists the ones that are missing: ImageNet's benchmarks in folders of their usual names, or ROOT/val/CLASS/*.jpg for
other classes. Several models become columns side by side. To resume an interrupted evaluation, run the same command
again. `evaluate.py` is the same from Python.
"""

# `evaluation.run_evaluation` does the work. Its docstring lists the modules below it in order.

from pathlib import Path

from mae_dat.config.commands.evaluate import EvaluateConfig
from mae_dat.config.groups import LaunchConfig, RunConfig, image_size
from mae_dat.config.requirements import read_requirements
from mae_dat.robustness.evaluation import print_gate, print_headline, run_evaluation
from mae_dat.robustness.network import EvalOptions
from mae_dat.robustness.open_networks import baseline_first, open_networks
from mae_dat.robustness.report.gate import gate_lines, require_met
from mae_dat.robustness.scores.results import Results
from mae_dat.robustness.setup import EvaluationSetup, suite_settings
from mae_dat.runtime.collectives import on_all_ranks
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.world import world_from_environment
from mae_dat.training.context import run_context


def _evaluate_from_flags(config: EvaluateConfig, console: Console) -> Results:
    """Open the networks, measure them and write the report. Raises UserError."""
    run_config = RunConfig(
        output_dir=config.output_dir, device=config.device, precision=config.precision, hang_minutes=config.hang_minutes
    )
    with run_context(run_config, LaunchConfig(), console, training=False) as context:
        size_HW = image_size(config.input_size) if config.input_size else None
        options = EvalOptions(
            context.device,
            context.precision,
            size=size_HW,
            interpolation=config.interpolation,
            crop=config.crop,
            protocol=config.protocol,
        )
        networks = on_all_ranks(
            lambda: open_networks(
                config.checkpoint, config.model, pretrained=config.pretrained, names=config.names, options=options
            )
        )
        setup = EvaluationSetup(
            options,
            context.output,
            console=console,
            world=context.world,
            batch_size=config.batch_size,
            num_workers=config.num_workers,
        )
        return run_evaluation(
            baseline_first(networks, config.baseline),
            suite_settings(config.suites, context.device, config.batch_size),
            requested=config.suites.suite,
            setup=setup,
            title=config.title,
        )


def main(config: EvaluateConfig) -> None:
    """Run the command."""
    requirements = read_requirements(config.require) if config.require else None
    results = _evaluate_from_flags(config, console_for_command())
    if world_from_environment().main:
        print_headline(results)
        if requirements:
            folder = Path(config.output_dir)
            print_gate(gate_lines(results, requirements, config.undecided, folder / "results.json", folder))
    if requirements:
        require_met(gate_lines(results, requirements, config.undecided), config.undecided)
