"""The table of verbs: what `mae-dat VERB` can do, with the configuration, the function and two examples of each verb.

A new verb is one entry in `GROUPS`. Nothing here imports torch: the code of a verb is imported when it is called.
"""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from mae_dat.config.arguments import Command
from mae_dat.config.flags import flat_values
from mae_dat.config.interrupts import interruptible
from mae_dat.config.memory import memory_errors_name_flags
from mae_dat.config.parse import command_of, load_config
from mae_dat.config.paths import check_data_path
from mae_dat.storage.new_folders import empty_folders_removed


def _find(place: str) -> Any:
    """Import what `MODULE:NAME` names below `mae_dat`."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"mae_dat.{module}"), name)


@dataclasses.dataclass(frozen=True)
class Verb:
    """A verb: one line about it, its configuration, the function that runs it, and two examples.

    Places are `MODULE:NAME` below `mae_dat`; importing the module of a configuration does not import torch.
    """

    summary: str
    config: str
    run: str | Callable[[Any], str]
    """The function that takes the configuration, or a choice of it by the configuration."""
    examples: tuple[str, ...]

    def command_line(self, program: str) -> Command:
        """Return the command line of the verb; `program` is the command in the usage line."""
        return command_of(_find(self.config), program, self._examples(program))

    def load(self, arguments: Sequence[str], program: str) -> Any:
        """Build the configuration from the arguments; `program` is the command in the usage line."""
        return load_config(_find(self.config), arguments, program, self._examples(program), check_effects=True)

    def _examples(self, program: str) -> tuple[str, ...]:
        if not program.endswith(".py"):
            return self.examples
        return tuple(f"python {program} {words.split(' ', 2)[2]}" for words in self.examples)

    def call(self, config: Any) -> None:
        """Import the verb's code and run it. Raises UserError."""
        values = flat_values(config)
        check_data_path(values)
        run = _find(self.run if isinstance(self.run, str) else self.run(config))
        with interruptible(), memory_errors_name_flags(values), empty_folders_removed():
            if "threads" in values:
                from mae_dat.runtime.threads import set_threads  # imports torch, as every verb with this flag does

                set_threads(values["threads"])
            run(config)


def _finetune_or_evaluate(config: Any) -> str:
    return "robustness.evaluate_run:main" if config.evaluation.eval else "training.finetune:main"


GROUPS: dict[str, dict[str, Verb]] = {
    "train": {
        "pretrain": Verb(
            "pretrain a masked autoencoder, with or without DAT",
            "config.runs:PretrainConfig",
            "training.pretrain:main",
            (
                "mae-dat pretrain --data_path DIR --output_dir PRE",
                "mae-dat pretrain --config small_pretrain --data_path demo --dat",
            ),
        ),
        "finetune": Verb(
            "fine-tune a classifier, with or without DAT",
            "config.runs:FinetuneConfig",
            _finetune_or_evaluate,
            (
                "mae-dat finetune --data_path DIR --finetune PRE --output_dir OUT --dat",
                "mae-dat finetune --data_path DIR --model resnet50 --pretrained --dat",
            ),
        ),
        "attack": Verb(
            "store adversarial images of a folder, to train on",
            "config.commands.attack:AttackFolderConfig",
            "attacks.attack_folder:main",
            (
                "mae-dat attack --checkpoint TEACHER --data_path DIR --output_dir ADV",
                "mae-dat attack --checkpoint TEACHER --data_path DIR --kind random --variants 3",
            ),
        ),
        "detect": Verb(
            "train an object detector, or measure its mAP",
            "config.commands.detect:DetectConfig",
            "detection.train:main",
            (
                "mae-dat detect --data_path DIR --output_dir DET --dat",
                "mae-dat detect --data_path DIR --eval --corrupted --resume DET",
            ),
        ),
        "tokenizer train": Verb(
            "train a light tokenizer on any images",
            "config.commands.tokenizer:TokenizerConfig",
            "training.tokenizer.train:main",
            (
                "mae-dat tokenizer train --data_path DIR --output_dir TOK",
                "mae-dat tokenizer train --data_path DIR1 DIR2 --val_path DIR3 --steps 30000",
            ),
        ),
        "tokenizer distill": Verb(
            "train a light student of a tokenizer",
            "config.commands.tokenizer:DistillConfig",
            "training.tokenizer.distill:main",
            (
                "mae-dat tokenizer distill --teacher vqgan_f8_16384 --input_size 224",
                "mae-dat tokenizer distill --teacher TOK/tokenizer.safetensors --data_path DIR",
            ),
        ),
    },
    "measure": {
        "evaluate": Verb(
            "evaluate models on every robustness benchmark",
            "config.commands.evaluate:EvaluateConfig",
            "robustness.command:main",
            (
                "mae-dat evaluate --checkpoint OUT --data_path DIR --suite clean generated",
                "mae-dat evaluate --model resnet50 --pretrained --data_path IMAGENET",
            ),
        ),
        "predict": Verb(
            "predict the classes or boxes of new images",
            "config.commands.predict:PredictConfig",
            "prediction.predict:main",
            (
                "mae-dat predict photo.jpg DIR --checkpoint OUT --output_dir PREDICTIONS",
                "mae-dat predict DIR --model resnet50 --pretrained --top_k 3",
            ),
        ),
        "compare": Verb(
            "train plain, with random words and with DAT; compare",
            "config.commands.compare:CompareConfig",
            "experiments.compare:main",
            (
                "mae-dat compare --data_path DIR --output_dir CMP",
                "mae-dat compare --data_path DIR --arms plain released --seeds 0 1 --jobs 2",
            ),
        ),
        "features": Verb(
            "extract features, or classify by nearest neighbors",
            "config.commands.features:FeaturesConfig",
            "analysis.features:main",
            (
                "mae-dat features --checkpoint PRE --data_path DIR --knn 20",
                "mae-dat features --checkpoint OUT --data_path DIR --corruptions all",
            ),
        ),
        "report": Verb(
            "make a report again, or compare two evaluations",
            "config.commands.report:ReportConfig",
            "robustness.report.write:main",
            ("mae-dat report output/evaluation", "mae-dat report --compare BEFORE AFTER --output_dir CHANGES"),
        ),
        "proof": Verb(
            "compare all adversaries over data sets and seeds",
            "config.commands.compare:ProofConfig",
            "experiments.proof:main",
            ("mae-dat proof --data_path DIR1 DIR2 --output_dir PROOF", "mae-dat proof --quick"),
        ),
    },
    "look": {
        "visualize reconstruction": Verb(
            "draw what a masked autoencoder fills in",
            "config.commands.visualize:ReconstructionConfig",
            "analysis.visualize:main",
            (
                "mae-dat visualize reconstruction --checkpoint PRE --images PHOTO.jpg",
                "mae-dat visualize reconstruction --checkpoint PRE --images DIR --limit 12",
            ),
        ),
        "visualize attention": Verb(
            "draw where a vision transformer looks",
            "config.commands.visualize:AttentionConfig",
            "analysis.visualize:main",
            (
                "mae-dat visualize attention --checkpoint OUT --images PHOTO.jpg",
                "mae-dat visualize attention --checkpoint OUT --images DIR --rollout",
            ),
        ),
        "visualize words": Verb(
            "draw the visual words of images",
            "config.commands.visualize:WordsConfig",
            "analysis.visualize:main",
            (
                "mae-dat visualize words --images PHOTO.jpg",
                "mae-dat visualize words --images DIR --tokenizer TOK/tokenizer.safetensors",
            ),
        ),
        "visualize adversary": Verb(
            "draw adversarial images and the words that changed",
            "config.commands.visualize:AdversaryConfig",
            "analysis.visualize:main",
            (
                "mae-dat visualize adversary --checkpoint OUT --images PHOTO.jpg",
                "mae-dat visualize adversary --checkpoint OUT --images DIR --dat symbolic",
            ),
        ),
        "explore": Verb(
            "corrupt an image or change its words on a local page",
            "config.commands.explore:ExploreConfig",
            "analysis.explore:main",
            ("mae-dat explore", "mae-dat explore --checkpoint OUT_A OUT_B --images DIR"),
        ),
        "analyze": Verb(
            "compare adversarial and clean images in a model",
            "config.commands.analyze:AnalyzeConfig",
            "analysis.analyze:main",
            (
                "mae-dat analyze --checkpoint OUT --data_path DIR",
                "mae-dat analyze --checkpoint PLAIN DAT --data_path DIR --limit 128",
            ),
        ),
    },
    "data": {
        "split": Verb(
            "split class folders into train and val",
            "config.commands.split:SplitConfig",
            "data.split:main",
            ("mae-dat split PHOTOS DIR", "mae-dat split PHOTOS DIR --val 0.1 --link"),
        ),
        "corrupt": Verb(
            "write corrupted copies of a folder of images",
            "config.commands.corrupt:CorruptConfig",
            "robustness.corrupt_folder:main",
            (
                "mae-dat corrupt DIR/val --output_dir DIR/corrupted",
                "mae-dat corrupt PHOTOS --corruptions fog snow --severities 1 3 5 --png",
            ),
        ),
        "pack": Verb(
            "pack a folder of images into tar shards",
            "config.commands.pack:PackConfig",
            "data.shards.pack:main",
            ("mae-dat pack DIR SHARDS --size 256", "mae-dat pack --index SHARDS"),
        ),
        "scan": Verb(
            "find unreadable and changed files",
            "config.commands.scan:ScanConfig",
            "data.scan:main",
            ("mae-dat scan DIR", "mae-dat scan DIR --verify"),
        ),
    },
    "weights": {
        "list": Verb(
            "list released weights",
            "config.commands.weights:ListConfig",
            "models.weights.fetch:list_weights",
            ("mae-dat list", "mae-dat list vqgan_f8_16384"),
        ),
        "get": Verb(
            "download released weights",
            "config.commands.weights:GetConfig",
            "models.weights.fetch:get_weights",
            ("mae-dat get mae_vit_base_patch16", "mae-dat get vqgan_f8_16384 --output_dir MIRROR"),
        ),
        "convert": Verb(
            "convert a model to timm, MAE, Hugging Face or ONNX",
            "config.commands.convert:ConvertConfig",
            "models.weights.convert:main",
            ("mae-dat convert OUT my_vit.safetensors --to timm", "mae-dat convert OUT my_vit.onnx --to onnx"),
        ),
    },
    "help": {
        "demo": Verb(
            "run the whole toolkit on generated images",
            "config.commands.compare:DemoConfig",
            "experiments.compare:main",
            ("mae-dat demo", "mae-dat demo --arms plain released --output_dir DEMO"),
        ),
        "doctor": Verb(
            "check the installation, find the batch size that fits",
            "config.commands.doctor:DoctorConfig",
            "experiments.doctor:main",
            ("mae-dat doctor", "mae-dat doctor --model vit_large_patch16 --dat --tokenizer vqgan_f8_16384"),
        ),
        "recipes": Verb(
            "list the recipes that --config finds, or print one",
            "config.commands.recipes:RecipesConfig",
            "config.show_recipes:main",
            ("mae-dat recipes", "mae-dat recipes small_finetune > mine.yaml"),
        ),
        "completion": Verb(
            "print a script that completes verbs and flags",
            "config.commands.completion:CompletionConfig",
            "cli:print_completion",
            (
                "mae-dat completion bash > ~/.local/share/bash-completion/completions/mae-dat",
                "mae-dat completion fish > ~/.config/fish/completions/mae-dat.fish",
            ),
        ),
    },
}
FAMILIES = {
    "tokenizer": "Train a light tokenizer, which turns an image into visual words.",
    "visualize": "Draw galleries of images that show what a model or a tokenizer does.",
}
"""The first words of verbs of two words."""
VERBS: dict[str, Verb] = {name: verb for group in GROUPS.values() for name, verb in group.items()}
LAUNCHER, LAUNCHER_SUMMARY = "submit", "run a verb as a job on SLURM or on this machine"
"""The verb whose arguments are its own flags, then another verb or a script with its flags."""
