"""The command `mae-dat split`: copy a folder of class folders into train and val."""

import os
import random
import shlex
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from mae_dat.config.commands.split import SplitConfig
from mae_dat.config.errors import DataError, OutputError
from mae_dat.config.paths import require_folder
from mae_dat.config.terminal import print_text
from mae_dat.data.describe import add_images
from mae_dat.data.folders import SPLIT_NAMES, split_folders
from mae_dat.data.image_set import ImageFolder
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.inputs import INPUTS_FILE, InputSummary, count_of
from mae_dat.storage.files import prepare_output_folder, sha256_of


def main(config: SplitConfig) -> None:
    """Run the command."""
    counts = split_folder(config, console_for_command())
    train, val = (sum(pair[part] for pair in counts.values()) for part in (0, 1))
    print_text(
        f"{config.out}: train {count_of(train, 'image')}, val {count_of(val, 'image')}, in {len(counts)} classes"
    )
    print_text(f"Next:\n  mae-dat finetune --data_path {shlex.quote(config.out)}")


def split_folder(config: SplitConfig, console: Console) -> dict[str, tuple[int, int]]:
    """Write the splits; return the number of training and validation images by class.

    The files are written to a temporary folder beside OUT, which gets its name at the end. Raises DataError,
    MissingInputError, OutputError.
    """
    source, out = Path(config.source), Path(config.out)
    require_folder(source)
    for names in SPLIT_NAMES.values():
        for name in split_folders(source, names):
            raise DataError(f"{source} has the folder {name}: it is split already, or name the folder {source / name}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists already: choose a new folder, or delete it.")
    images = ImageFolder(source, lambda image: torch.zeros(0))
    inputs = _describe_inputs(config, images)
    prepare_output_folder(out.absolute().parent, "another OUT")
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    try:
        console.report_inputs(inputs, temporary / INPUTS_FILE)
        counts = _write_splits(config, images, temporary, console)
        temporary.chmod(0o777 & ~_umask())
        temporary.replace(out)
    except OSError as error:
        raise OutputError(f"cannot write {error.filename or out}: {error.strerror}. Choose another OUT.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return counts


def choose_validation(paths: Sequence[str], share: float, seed: str) -> set[str]:
    """Choose about `share` of the files at random, at least one, and leave at least one.

    Files with the same content are chosen together. Raises DataError if all files have the same content.
    """
    groups = defaultdict(list)
    for path in sorted(paths):
        groups[sha256_of(Path(path))].append(path)
    if len(groups) < 2:
        raise DataError(
            f"{Path(paths[0]).parent} has {count_of(len(groups), 'different image')}; a class needs two or more, one "
            "for train and one for val."
        )
    in_random_order = list(groups.values())
    random.Random(os.fsencode(seed)).shuffle(in_random_order)
    wanted, chosen = max(1, round(share * len(paths))), set(in_random_order[0])
    for group in in_random_order[1:-1]:
        if len(chosen) + len(group) <= wanted:
            chosen.update(group)
    return chosen


def _write_splits(config: SplitConfig, images: ImageFolder, out: Path, console: Console) -> dict[str, tuple[int, int]]:
    """Copy or link every image below `out`; return the number of training and validation images by class."""
    counts = {}
    by_class = defaultdict(list)
    for path, label in images.samples:
        by_class[images.classes[label]].append(path)
    with console.task("split", len(images)) as task:
        for name, paths in by_class.items():
            val = choose_validation(paths, config.val, f"{config.seed} {name}")
            counts[name] = (len(paths) - len(val), len(val))
            for path in paths:
                target = out / ("val" if path in val else "train") / os.path.relpath(path, config.source)
                target.parent.mkdir(parents=True, exist_ok=True)
                if config.link:
                    target.symlink_to(Path(path).absolute())
                else:
                    shutil.copyfile(path, target)
                task.advance(name)
    return counts


def _describe_inputs(config: SplitConfig, images: ImageFolder) -> InputSummary:
    inputs = InputSummary(config.verb)
    add_images(inputs, config.source, Path(config.source), {"images": images})
    inputs.add("val", f"{100 * config.val:g} % of each class, seed {config.seed}")
    inputs.add("output", f"{Path(config.out).absolute()} ({'symbolic links' if config.link else 'copies'})")
    return inputs


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
