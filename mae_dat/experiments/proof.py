"""Compare every adversary and baseline, after several pretrainings, with several seeds, on several data sets.

`mae-dat proof --data_path A B --output_dir OUT` writes, for each data set, a comparison with its report into
a folder of OUT, and the tables of all data sets into OUT/results.md. To resume, run the same command again. `--quick`
checks in minutes, on a few generated images, that everything works.
"""

from pathlib import Path

from mae_dat.config.commands.compare import CompareConfig, ProofConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.parse import command_line
from mae_dat.config.terminal import print_text
from mae_dat.data.generated.folder import FolderSettings, write_image_folder
from mae_dat.experiments.compare import compare
from mae_dat.experiments.describe import proof_inputs
from mae_dat.robustness.open_networks import distinct_names
from mae_dat.robustness.report.comparison import ablation_tables
from mae_dat.robustness.report.findings import ablation_findings
from mae_dat.robustness.report.render import markdown_table, markdown_text
from mae_dat.robustness.report.summarize import summarize
from mae_dat.robustness.report.tables import words_tables_by_group
from mae_dat.robustness.scores.results import Results
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.inputs import INPUTS_FILE
from mae_dat.runtime.machine import hardware_facts
from mae_dat.storage.files import atomic_write, prepare_output_folder

_QUICK_IMAGES = FolderSettings(train=32, val=20, conflict=20, silhouette=0, size=32)
_QUICK_FLAGS = "--input_size 32 --batch_size 16 --epochs 1 --warmup_epochs 0"


def comparisons(config: ProofConfig) -> dict[str, CompareConfig]:
    """Return the settings of a comparison for each data set, by its name. Raises ConfigError."""
    output = Path(config.output_dir)
    paths, flags, seeds, limit = config.roots, "", config.seeds, config.limit_corrupted
    if config.quick:
        folder = write_image_folder(output / "images", _QUICK_IMAGES)
        paths, flags, seeds, limit = (str(folder),), _QUICK_FLAGS, config.seeds[:1], 2
    if len(set(paths)) < len(paths):
        raise ConfigError(f"--data_path names a folder twice: {' '.join(paths)}.")
    names = [name.replace("/", "-") for name in distinct_names(paths)]
    return {
        name: CompareConfig(
            data_path=path,
            output_dir=str(output / name),
            arms=config.arms,
            pretrainings=config.pretrainings,
            cross_arms=config.cross_arms,
            seeds=seeds,
            pretrain_config=config.pretrain_config,
            finetune_config=config.finetune_config,
            pretrain_flags=flags,
            finetune_flags=flags,
            limit=config.limit,
            limit_corrupted=limit,
            restrict_classes=config.restrict_classes,
            protocol=config.protocol,
            jobs=config.jobs,
            threads=config.threads,
            title=f"Every adversary and baseline on {name}",
        )
        for name, path in zip(names, paths, strict=True)
    }


def prove(config: ProofConfig, console: Console) -> Path:
    """Train and measure what is still missing, and write OUT/results.md. Returns its path."""
    path = Path(config.output_dir) / "results.md"
    all_results: dict[str, Results] = {}
    configs = comparisons(config)
    inputs = proof_inputs(config, configs)
    console.report_inputs(inputs, prepare_output_folder(path.parent) / INPUTS_FILE)
    for name, comparison in configs.items():
        results = compare(comparison, console)
        assert results is not None, "a proof measures"
        all_results[name] = results
        _write_tables(all_results, path)  # after every data set, in case the next one is interrupted
    return path


def _write_tables(all_results: dict[str, Results], path: Path) -> None:
    """Write the tables of all data sets as Markdown. Raises StorageError."""
    hardware = ", ".join(f"{key}: {value}" for key, value in hardware_facts().items())
    parts = ["# Results", f"    {command_line()}", markdown_text(hardware)]
    for name, results in all_results.items():
        report = summarize(results)
        parts += [f"## {markdown_text(name)}", markdown_text(" ".join(ablation_findings(report)))]
        tables = (*ablation_tables(report), *words_tables_by_group(report))
        parts += [markdown_table(table, level=3) for table in tables]
    with atomic_write(path) as file:
        file.write(("\n\n".join(parts) + "\n").encode())


def main(config: ProofConfig) -> None:
    """Run the command."""
    print_text(f"wrote {prove(config, console_for_command())}")
