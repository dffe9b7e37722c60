"""The command `mae-dat attack`: attack all images of a folder once, and store the adversarial images and words."""

import dataclasses
import json
import logging
import math
import shlex
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop

from mae_dat.attacks.adversary_files import ROW_NUMBERS, ChunkFiles, part_path
from mae_dat.attacks.discrete import discrete_adversary
from mae_dat.attacks.share_controller import ShareController
from mae_dat.attacks.teacher import Teacher
from mae_dat.config.adversaries import AttackConfig
from mae_dat.config.commands.attack import AttackFolderConfig
from mae_dat.config.errors import ConfigError, DataError
from mae_dat.config.extras import require_extra
from mae_dat.config.terminal import print_text
from mae_dat.data.adversaries import (
    StoredAttack,
    StoredVariant,
    image_names,
    names_sha256,
    stored_name,
    variant_folder,
)
from mae_dat.data.describe import add_images
from mae_dat.data.file_facts import file_facts
from mae_dat.data.folders import find_split
from mae_dat.data.gallery import draw_gallery, save_png
from mae_dat.data.image_set import ImageSet, as_float
from mae_dat.data.loader import map_in_workers
from mae_dat.data.open import image_root, open_images_of_model
from mae_dat.data.sampler import evenly_spaced
from mae_dat.data.shards.index import build_index
from mae_dat.data.transforms import default_crop_pct
from mae_dat.models.describe import describe_model, describe_tokenizer
from mae_dat.models.modes import frozen_parameters
from mae_dat.models.tokenizer import VisualTokenizer, load_tokenizer, share_changed, tokenizer_path
from mae_dat.models.weights.open import OpenedModel, open_model
from mae_dat.runtime.collectives import on_all_ranks, on_main_rank
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.device import describe_device, pick_device
from mae_dat.runtime.inputs import INPUTS_FILE, InputSummary
from mae_dat.runtime.seeds import step_generator
from mae_dat.runtime.world import World, process_group, world_from_environment
from mae_dat.storage.files import atomic_write, prepare_output_folder, sha256_of
from mae_dat.storage.output_lock import lock_output_folder

logger = logging.getLogger(__name__)

CHUNK = 256
"""Images that are finished together: the unit of resuming and of the work of a rank."""
MAX_STORED_WORDS = 1 << 16
_SEARCH_IMAGES = 32
_EXAMPLES = 6
_AMPLIFY = 4


def main(config: AttackFolderConfig) -> None:
    """Run the command."""
    record = attack_folder(config, console_for_command())
    if world_from_environment().main:
        print_text(summary_of(record, config.output_dir))


def summary_of(record: StoredAttack, output_dir: str) -> str:
    """Return the result of a complete attack in words, with the command that trains on it."""
    means = record.means
    changed = f"{100 * means['changed_words']:.1f} % of the words changed"
    loss = f"the teacher's loss goes from {means['loss_clean']:.3f} to {means['loss_adversarial']:.3f}"
    clean, adversarial = (100 * means[name] for name in ("accuracy_clean", "accuracy_adversarial"))
    accuracy = f"its accuracy is {adversarial:.1f} % on them, {clean:.1f} % on the originals"
    place = shlex.quote(f"stored:{output_dir}")
    result = f"{output_dir}: {record.images:,} images, {changed}; {loss}, {accuracy}."
    return f"{result}\nNext:\n  mae-dat finetune --data_path DIR --dat {place}"


@dataclasses.dataclass(frozen=True)
class FolderAttack:
    """An attack on all images of a set, with everything that it needs."""

    config: AttackFolderConfig
    images: ImageSet
    teacher: Teacher
    tokenizer: VisualTokenizer
    opened: OpenedModel
    device: torch.device
    side: int
    """Shorter side of the adversarial images in pixels."""

    @property
    def output(self) -> Path:
        """The folder of the adversarial images."""
        return Path(self.config.output_dir)

    @cached_property
    def names(self) -> list[str]:
        """The names of the images below their folder."""
        return image_names(self.images)

    @property
    def chunks(self) -> int:
        """Number of chunks of images."""
        return math.ceil(len(self.images) / CHUNK)

    def settings(self) -> dict[str, Any]:
        """Return what determines the adversarial images, as JSON values."""
        config = self.config
        kept = (
            "kind",
            "share",
            "eps",
            "steps",
            "nearest",
            "rescore",
            "variants",
            "shards",
            "quality",
            "batch_size",
            "seed",
        )
        return {
            **{name: getattr(config, name) for name in kept},
            "side": self.side,
            "teacher": config.checkpoint,
            "teacher_sha256": sha256_of(Path(self.opened.file.source))
            if Path(self.opened.file.source).is_file()
            else "",
            "tokenizer": config.tokenizer,
            "tokenizer_sha256": sha256_of(tokenizer_path(config.tokenizer)),
        }

    def load(self, indices: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Yield index and image, uint8 (3, H, W) at the size of the adversaries. Raises DataError."""
        resize = _Resize(self.images, self.side, self.tokenizer.factor)
        for index, image in zip(indices, map_in_workers(resize, indices, self.config.num_workers), strict=True):
            if isinstance(image, DataError):
                raise DataError(f"{getattr(image, 'problem', image)}; delete or replace it, and run the command again")
            yield index, image

    def batches(self, indices: Sequence[int]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Yield indices, images (B, 3, H, W) in [0, 1] and labels (B,) on the device; images of one size together."""
        groups: dict[tuple[int, ...], list[tuple[int, Tensor]]] = defaultdict(list)
        for index, image in self.load(indices):
            groups[tuple(image.shape)].append((index, image))
        for group in groups.values():
            for start in range(0, len(group), self.config.batch_size):
                part = group[start : start + self.config.batch_size]
                numbers = [index for index, _ in part]
                label = torch.tensor([self.images.label(index) for index in numbers], device=self.device)
                yield numbers, as_float(torch.stack([image for _, image in part]).to(self.device)), label

    def find_eps(self) -> float:
        """Search the eps that changes the target share of the words of evenly spaced images."""
        attack = self.config.attack
        batches = list(self.batches(evenly_spaced(len(self.images), min(_SEARCH_IMAGES, len(self.images)))))
        controller = ShareController(attack)

        def share_at(eps: float) -> float:
            trial, changed, count = dataclasses.replace(attack, eps=eps), 0.0, 0
            for indices, image, label in batches:
                words, adversarial_words, _ = self.attack_batch(trial, indices, image, label, variant=0)
                changed += float(share_changed(words, adversarial_words)) * words.numel()
                count += words.numel()
            return changed / count

        controller.find(share_at)
        logger.info("eps %.4g changes %.1f %% of the words", controller.eps, 100 * share_at(controller.eps))
        return controller.eps

    def attack_batch(
        self, attack: AttackConfig, indices: Sequence[int], image: Tensor, label: Tensor, variant: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attack images (B, 3, H, W); return words, adversarial words (B, h, w) and adversarial images (B, 3, H, W).

        The random draws depend on the seed, the first index and the variant.
        """
        generator = step_generator(self.config.seed, indices[0], variant, self.device)
        with frozen_parameters(self.teacher.model):
            adversary = discrete_adversary(
                image, self.teacher.loss(label), self.tokenizer, config=attack, generator=generator, check=False
            )
        return adversary.words, adversary.adversarial_words, adversary.adversarial


def attack_folder(config: AttackFolderConfig, console: Console) -> StoredAttack:
    """Attack the training images of a folder, or resume, and return the record of the complete attack.

    Raises UserError; what is finished stays.
    """
    world = world_from_environment()
    console.quiet = console.quiet or not world.main
    device = pick_device(config.device, world)
    with process_group(world, device), ExitStack() as stack:
        job = on_all_ranks(lambda: open_attack(config, device))
        on_main_rank(lambda: stack.enter_context(lock_output_folder(prepare_output_folder(job.output))) and None)
        record = on_main_rank(lambda: _start(job, console))
        if record.complete:
            return record
        attack = config.attack
        if attack.moves_pixels:
            attack = dataclasses.replace(attack, eps=record.settings["found_eps"])
        on_all_ranks(lambda: _attack_chunks(job, attack, world, console))
        return on_main_rank(lambda: _finish(job, record))


def open_attack(config: AttackFolderConfig, device: torch.device) -> FolderAttack:
    """Open images, teacher and tokenizer. Raises UserError."""
    if config.shards:
        require_extra("shards", "--shards")
    opened = open_model(config.checkpoint, config.model, flag="--checkpoint")
    model, size = opened.classifier(), opened.input_size
    root = find_split(image_root(config.data_path), "train")
    images = open_images_of_model(root, lambda image: torch.zeros(0), opened.plan.num_classes, opened.classes)
    tokenizer = load_tokenizer(config.tokenizer).to(device)
    if tokenizer.num_words > MAX_STORED_WORDS:
        raise ConfigError(
            f"--tokenizer {config.tokenizer} has {tokenizer.num_words:,} words; stored words have two bytes, for at "
            f"most {MAX_STORED_WORDS:,}: use a smaller codebook."
        )
    side = config.size or round(max(size) / default_crop_pct(size))
    side = max(1, round(side / tokenizer.factor)) * tokenizer.factor
    return FolderAttack(
        config=config,
        images=images,
        teacher=Teacher(model.to(device), size),
        tokenizer=tokenizer,
        opened=opened,
        device=device,
        side=side,
    )


def _start(job: FolderAttack, console: Console) -> StoredAttack:
    """Write the record of a new attack, or check that this one resumes the attack in the folder. On rank 0.

    Raises ConfigError for other settings, DataError for other images.
    """
    settings, names = job.settings(), job.names
    if len({stored_name(name) for name in names}) < len(names):
        raise DataError(f"{job.images.root}: two images would get the same name as JPEG; rename one, or use --shards.")
    record = None
    if any((job.output / name).exists() for name in ("attack.json", "parts")):
        record = StoredAttack.read(job.output)
        _check_settings(job, record, settings)
        record.check_images(job.images, job.output)
    console.report_inputs(_inputs(job, record), job.output / INPUTS_FILE)
    if record is None:
        attack = job.config.attack
        if attack.moves_pixels:
            settings["found_eps"] = attack.eps if attack.share is None else job.find_eps()
        record = StoredAttack(
            images=len(names),
            variants=job.config.variants,
            names_sha256=names_sha256(names),
            files=file_facts(job.images.content_files()),
            description=f"{attack.describe()}, against {job.opened.title}",
            settings=settings,
        )
        (job.output / "parts").mkdir(exist_ok=True)
        record.write(job.output)
    return record


def _check_settings(job: FolderAttack, record: StoredAttack, settings: dict[str, Any]) -> None:
    # A teacher or tokenizer may have moved; its content counts.
    ignored = ("teacher", "tokenizer")
    for name, value in settings.items():
        if name not in ignored and record.settings.get(name) != value:
            raise ConfigError(
                f"{job.output} holds adversaries of another attack: {name} was {record.settings.get(name)!r}, now it "
                f"is {value!r}. Choose another --output_dir."
            )


def _inputs(job: FolderAttack, record: StoredAttack | None) -> InputSummary:
    """Return the summary of what the attack reads and writes."""
    config, inputs = job.config, InputSummary(job.config.verb)
    add_images(inputs, config.data_path, image_root(config.data_path), {"attacked": job.images})
    inputs.add("teacher", describe_model(job.opened.title, job.teacher.model, job.opened.plan.num_classes))
    inputs.add("tokenizer", describe_tokenizer(config.tokenizer, job.tokenizer))
    inputs.add("adversary", config.attack.describe(), f"shorter side {job.side} px, JPEG quality {config.quality}")
    inputs.add("device", describe_device(job.device, None, config.num_workers, 1))
    done = sum(part_path(job.output, chunk).is_file() for chunk in range(job.chunks))
    state = "new" if record is None else "complete" if record.complete else f"resumes after {done * CHUNK:,} images"
    inputs.add("output", f"{job.output.absolute()} ({state})")
    return inputs


def _attack_chunks(job: FolderAttack, attack: AttackConfig, world: World, console: Console) -> None:
    """Attack this rank's chunks that are not finished yet."""
    mine = range(world.rank, job.chunks, world.size)
    left = [chunk for chunk in mine if not part_path(job.output, chunk).is_file()]
    indices = {chunk: range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(job.images))) for chunk in mine}
    total = sum(map(len, indices.values()))
    done = total - sum(len(indices[chunk]) for chunk in left)
    with console.task("attack", total, unit="image", completed=done) as task:
        for chunk in left:
            start = time.monotonic()
            result = ChunkFiles(job.output, job.names, job.config)
            for numbers, image, label in job.batches(indices[chunk]):
                for variant in range(job.config.variants):
                    _add_variant(job, attack, result, numbers=numbers, image=image, label=label, variant=variant)
                task.advance(f"{len(numbers) / max(time.monotonic() - start, 1e-9):.1f} images/s", len(numbers))
                start = time.monotonic()
            result.write(chunk)


def _add_variant(
    job: FolderAttack,
    attack: AttackConfig,
    result: "ChunkFiles",
    *,
    numbers: list[int],
    image: Tensor,
    label: Tensor,
    variant: int,
) -> None:
    words, adversarial_words, adversarial = job.attack_batch(attack, numbers, image, label, variant)
    changed = (words != adversarial_words).flatten(1).float().mean(1)
    (loss, right), (adversarial_loss, still_right) = (job.teacher.predict(x, label) for x in (image, adversarial))
    columns = (changed, loss, adversarial_loss, right, still_right)
    for row, index in enumerate(numbers):
        result.add(
            index,
            variant,
            pixels=(255 * adversarial[row]).round().byte().permute(1, 2, 0).cpu().numpy(),
            words=adversarial_words[row].cpu().numpy().astype(np.uint16),
            values={name: round(float(column[row]), 5) for name, column in zip(ROW_NUMBERS, columns, strict=True)},
        )


def _finish(job: FolderAttack, record: StoredAttack) -> StoredAttack:
    """Collect the rows of all chunks, index shards, draw the examples and mark the attack as complete. On rank 0."""
    rows = []
    with atomic_write(job.output / "images.jsonl") as file:
        for chunk in range(job.chunks):
            text = part_path(job.output, chunk).read_bytes()
            file.write(text)
            rows += [json.loads(line) for line in text.splitlines()]
    if job.config.shards:
        for variant in range(job.config.variants):
            folder = variant_folder(job.output, variant)
            build_index(folder).write(folder)
    _draw_examples(job)
    means = {name: float(np.mean([row[name] for row in rows])) for name in ROW_NUMBERS}
    record = dataclasses.replace(record, complete=True, means=means)
    record.write(job.output)
    return record


class _Resize:
    """Maps the index of an image to its pixels, uint8 (3, H, W): shorter side `side`, both multiples of `factor`."""

    def __init__(self, images: ImageSet, side: int, factor: int) -> None:
        self.images, self.side, self.factor = images, side, factor

    def __call__(self, index: int) -> Tensor:
        image = self.images.load_image(index)
        scale = self.side / min(image.size)
        width, height = (max(self.side, round(length * scale / self.factor) * self.factor) for length in image.size)
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _draw_examples(job: FolderAttack) -> None:
    """Write examples.png: the centers of some images, of their adversaries, and the difference."""
    indices = evenly_spaced(len(job.images), _EXAMPLES)
    variant = StoredVariant(variant_folder(job.output, 0), job.images)
    clean = torch.stack([center_crop(image, [job.side, job.side]) for _, image in job.load(indices)]) / 255
    stored = [torch.from_numpy(variant.load_pixels(index)).permute(2, 0, 1) for index in indices]
    adversarial = torch.stack([center_crop(image, [job.side, job.side]) for image in stored]) / 255
    difference = 0.5 + _AMPLIFY * (adversarial - clean)
    columns = [("original", clean), ("stored adversary", adversarial), (f"difference × {_AMPLIFY}", difference)]
    save_png(draw_gallery(columns, heading=job.config.attack.describe()), job.output / "examples.png")
