"""The whole toolkit on generated pictures, in minutes on two cores: `make demo`.

Pretrains a small masked autoencoder, fine-tunes it plainly, with random words and with DAT, measures all three clean,
corrupted and with conflicting textures, and writes output/demo/report.html. A second call goes on where the first one
stopped.
"""

import sys
from pathlib import Path

from mae_dat import run
from mae_dat.compare import CONFIGS, CompareConfig, compare
from mae_dat.config import load_config, run_command
from mae_dat.findings import Group, caution, group_runs
from mae_dat.report import Results
from mae_dat.scores import mean_error, shape_share

DEFAULTS = CompareConfig(
    data_path="demo",
    output_dir="output/demo",
    arms=("plain", "random", "released"),
    seeds=(0,),
    pretrain=str(CONFIGS / "demo_pretrain.yaml"),
    finetune=str(CONFIGS / "demo_finetune.yaml"),
    limit=80,
    title="mae_dat demo: generated shapes and textures",
)


def main() -> None:
    """Command line."""
    console = run.console_for_command()
    config = load_config(CompareConfig, run.arguments(), __doc__ or "", default=DEFAULTS)
    results = compare(config, console)
    if results is not None:
        sys.stdout.write("\n".join(closing_lines(results, Path(config.output_dir))) + "\n")


def closing_lines(results: Results, output: Path) -> list[str]:
    """Where to look, and one line a model with the numbers that matter."""
    lines = [
        "",
        f"Open {output / 'report.html'} (numbers: {output / 'results.json'}). {caution(group_runs(results['models']))}",
    ]
    for group in group_runs(results["models"]):
        lines.append(model_line(group))
    return lines


def model_line(group: Group) -> str:
    """Clean accuracy, mean corruption error and shape bias of one model, means over seeds, in percent."""
    count = len(group.runs)
    clean = sum(100 * one["clean"]["correct"] / one["clean"]["total"] for one in group.runs) / count
    corrupted = sum(mean_error(one) for one in group.runs) / count
    shares = [
        share for one in group.runs if "shape_bias" in one and (share := shape_share(one["shape_bias"])) is not None
    ]
    bias = f"   shape bias {100 * sum(shares) / len(shares):5.1f} %" if shares else ""
    return f"  {group.label:<14} clean accuracy {clean:5.1f} %   mean corruption error {corrupted:5.1f} %{bias}"


if __name__ == "__main__":
    run_command(main)
