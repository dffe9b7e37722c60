"""The summary of what a comparison, or a proof of several comparisons, reads and writes."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from mae_dat.config.commands.compare import CompareConfig, ProofConfig
from mae_dat.config.protocols import protocol_text
from mae_dat.config.runs import FinetuneConfig, PretrainConfig
from mae_dat.data.describe import add_images, describe_resize, describe_root, describe_size
from mae_dat.data.image_set import ImageSet
from mae_dat.data.loader import worker_count
from mae_dat.data.open import image_root
from mae_dat.data.transforms import EvalTransform
from mae_dat.models.describe import describe_default_normalization, describe_tokenizer
from mae_dat.models.tokenizer import load_tokenizer
from mae_dat.runtime.device import amp_dtype, describe_device, pick_device
from mae_dat.runtime.inputs import InputSummary, count_of
from mae_dat.storage.weight_files import WEIGHTS_FILE


def comparison_inputs(
    config: CompareConfig,
    pretraining: PretrainConfig,
    fine_tuning: FinetuneConfig,
    splits: Mapping[str, ImageSet],
    suites: Sequence[str],
    folders: Sequence[Path],
) -> InputSummary:
    """Return the summary of what a comparison reads.

    `fine_tuning` is one of its fine-tunings, which differ in their adversaries and seeds; `folders` are those of all
    trainings.
    """
    data, dat, device = fine_tuning.data, fine_tuning.dat, pick_device(fine_tuning.run.device)
    inputs = InputSummary(config.verb)
    add_images(inputs, config.root, image_root(config.root), splits)
    add_variants(inputs, config)
    inputs.add("model", f"{pretraining.mae.model}, then {fine_tuning.classifier.model}")
    normalization = describe_default_normalization(fine_tuning.classifier.model, data.in_chans)
    inputs.add(
        "pixels",
        f"{describe_size(data.image_size)}, {normalization}",
        f"validation: {describe_resize(EvalTransform(data.image_size))}",
    )
    inputs.add("tokenizer", describe_tokenizer(dat.tokenizer, load_tokenizer(dat.tokenizer)))
    limits = [f"; at most {config.limit:,} images of each"] if config.limit else []
    if config.limit_corrupted:
        limits.append(f"; at most {config.limit_corrupted:,} images for each corruption or attack")
    limit = "".join(limits)
    inputs.add("suites", f"{', '.join(suites)}{limit}" if config.measure else "none (--no_measure)")
    if config.measure and config.protocol != "native":
        inputs.add("protocol", protocol_text(config.protocol))
    if config.measure and config.restrict_classes:
        inputs.add("predicted", "only classes that have images in a suite's folder (--restrict_classes)")
    precision = amp_dtype(fine_tuning.run.precision, device)
    inputs.add("device", f"{describe_device(device, precision, worker_count(data.num_workers))}, {_jobs(config.jobs)}")
    complete = sum((folder / WEIGHTS_FILE).is_file() for folder in folders)
    state = f"resumes: {complete} of {count_of(len(folders), 'training')} complete" if complete else "new"
    inputs.add("output", f"{os.path.abspath(config.output_dir)} ({state})")
    return inputs


def proof_inputs(config: ProofConfig, comparisons: Mapping[str, CompareConfig]) -> InputSummary:
    """Return the summary of what a proof reads; each of its comparisons has a summary of its own."""
    inputs = InputSummary(config.verb)
    for name, comparison in comparisons.items():
        inputs.add("data", f"{name}: {describe_root(comparison.root, image_root(comparison.root))}")
    add_variants(inputs, next(iter(comparisons.values())))
    inputs.add("output", os.path.abspath(config.output_dir))
    return inputs


def add_variants(inputs: InputSummary, config: CompareConfig) -> None:
    """Add the trainings of a comparison: recipes with their flags, variants and seeds."""
    variants = [f"fine-tuning: {', '.join(config.arms)}"]
    if config.cross_arms:
        variants.append(f"after other pretrainings: {', '.join(config.cross_arms)}")
    seeds = f"{'seed' if len(config.seeds) == 1 else 'seeds'} {', '.join(map(str, config.seeds))}"
    inputs.add("trainings", f"pretraining: {', '.join(config.pretrainings)}", f"{'; '.join(variants)}; {seeds}")
    recipes = {config.pretrain_config: config.pretrain_flags, config.finetune_config: config.finetune_flags}
    inputs.add("recipes", *(f"{recipe} {flags}".strip() for recipe, flags in recipes.items()))


def _jobs(jobs: int) -> str:
    return f"{count_of(jobs, 'training')} at a time"
