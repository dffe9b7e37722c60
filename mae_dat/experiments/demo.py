"""Run the whole toolkit on generated images, in minutes on two cores: `make demo`.

Pretrains a small masked autoencoder, fine-tunes it plainly, with random words and with DAT, measures the three networks
on clean, corrupted and cue-conflict images, and writes output/demo/report.html. To resume, run the same command again.
"""

from collections.abc import Sequence

from mae_dat.experiments import compare
from mae_dat.experiments.compare import CONFIGS, CompareConfig

_DEFAULTS = CompareConfig(
    data_path="demo",
    output_dir="output/demo",
    arms=("plain", "random", "released"),
    seeds=(0,),
    pretrain=str(CONFIGS / "demo_pretrain.yaml"),
    finetune=str(CONFIGS / "demo_finetune.yaml"),
    limit=100,
    title="mae_dat demo: generated shapes and textures",
)


def main(arguments: Sequence[str]) -> None:
    """Run the command with its arguments."""
    compare.main(arguments, _DEFAULTS, __doc__ or "")
