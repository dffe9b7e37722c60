"""Draw galleries of a model's reconstructions, attention, words and adversaries, as PNG and for TensorBoard.

The four kinds of galleries share their flags for images and checkpoints; each has its own configuration and function.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from mae_dat.analysis.scorers import ClassScorer, ReconstructionScorer, Scorer
from mae_dat.attacks.discrete import DiscreteAdversary
from mae_dat.config.commands.visualize import (
    AdversaryConfig,
    AttentionConfig,
    CheckpointConfig,
    ImagesConfig,
    MaskingConfig,
    ReconstructionConfig,
    WordsConfig,
)
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import DEMO, ImageSize, image_size
from mae_dat.data.decode import decode_file
from mae_dat.data.describe import describe_ignored, describe_resize, describe_root, describe_size
from mae_dat.data.folders import IgnoredFiles
from mae_dat.data.gallery import draw_gallery, draw_sheet, save_png
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.open import image_root, with_channels
from mae_dat.data.sampler import evenly_spaced
from mae_dat.data.transforms import EvalTransform
from mae_dat.models.attention import attention_layers, attention_maps, default_query
from mae_dat.models.describe import describe_tokenizer
from mae_dat.models.mae import mask_noise
from mae_dat.models.tokenizer import EMBEDDED, load_tokenizer
from mae_dat.models.weights.describe import add_opened_models, describe_pixels
from mae_dat.models.weights.open import OpenedModel, open_model
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.device import describe_device, pick_device
from mae_dat.runtime.inputs import INPUTS_FILE, InputSummary, count_of
from mae_dat.runtime.seeds import step_generator
from mae_dat.storage.files import prepare_output_folder
from mae_dat.training.galleries import (
    adversary_columns,
    attention_columns,
    changed_word_sheet,
    codebook_image,
    most_changed_words,
    reconstruction_columns,
    used_words,
    word_columns,
    word_tiles,
)
from mae_dat.training.objectives.dat import WithDAT

logger = logging.getLogger(__name__)

_MAX_WORDS = 24  # on a sheet of the most used or most changed words
_MAX_CODEBOOK = 1024  # words in the drawing of a codebook; for a larger one, the most used words


@dataclasses.dataclass(frozen=True)
class GalleryPage:
    """The images of one gallery, (B, C, H, W) in [0, 1], their files, and its number from 1 (None: the only one)."""

    image: Tensor
    paths: list[Path]
    number: int | None

    @property
    def names(self) -> list[str]:
        """The file names for captions, with their folder, which is often the class."""
        return ["/".join(path.parts[-2:]) for path in self.paths]


class GalleryWriter:
    """Write galleries as NAME-PAGE.png into the output folder (NAME.png if there is one page), and to TensorBoard."""

    def __init__(self, config: ImagesConfig) -> None:
        """Raise OutputError if the folder cannot be written."""
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.folder = prepare_output_folder(Path(config.output_dir))
        self.tensorboard: Any = SummaryWriter(config.log_dir or config.output_dir)

    def write(self, name: str, gallery: Tensor, page: int | None = None) -> None:
        """Write one gallery, (3, H, W) in [0, 1]; pages count from 1."""
        path = self.folder / (f"{name}-{page}.png" if page else f"{name}.png")
        save_png(gallery, path)
        self.tensorboard.add_image(f"visualize/{name}", gallery, page or 1)
        logger.info("wrote %s", path)

    def report_inputs(self, inputs: InputSummary, console: Console) -> None:
        """Log the summary of the inputs, and store it in the folder. Raises StorageError."""
        console.report_inputs(inputs, self.folder / INPUTS_FILE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.tensorboard.close()


# ---- images and models ----


@dataclasses.dataclass(frozen=True)
class GalleryImages:
    """The images to draw, in pages, and what lies in their folder."""

    pages: list[GalleryPage]
    path: Path
    """The image or the folder."""
    found: int
    """Images in the folder, of which some are drawn."""
    ignored_files: IgnoredFiles

    @property
    def count(self) -> int:
        """The number of images that are drawn."""
        return sum(len(page.paths) for page in self.pages)


def read_images(config: ImagesConfig, size: ImageSize, in_chans: int, device: torch.device) -> GalleryImages:
    """Read the images at the size of the model, cropped as for evaluation. Raises MissingInputError, DataError."""
    transform = with_channels(EvalTransform(size), in_chans)
    path = image_root(DEMO) / "val" if config.images == DEMO else Path(config.images)
    if path.is_file():
        paths, images, found, ignored_files = [path], [transform(decode_file(path))], 1, IgnoredFiles()
    else:
        folder = ImageFolder(path, transform, labeled=False)
        found, ignored_files = len(folder), folder.ignored_files
        indices = evenly_spaced(found, config.limit or found)
        paths = [Path(folder.samples[index][0]) for index in indices]
        images = [folder[index]["image"] for index in indices]
    starts = range(0, len(paths), config.per_page)
    pages = [
        GalleryPage(
            torch.stack(images[start : start + config.per_page]).to(device),
            paths[start : start + config.per_page],
            start // config.per_page + 1 if len(starts) > 1 else None,
        )
        for start in starts
    ]
    return GalleryImages(pages, path, found, ignored_files)


def gallery_inputs(
    verb: str,
    config: ImagesConfig,
    images: GalleryImages,
    device: torch.device,
    opened: OpenedModel | None = None,
    **rows: str,
) -> InputSummary:
    """Return the summary of what a gallery reads, with further `rows`."""
    inputs = InputSummary(verb)
    inputs.add("images", describe_root(config.images, images.path))
    inputs.add("images", f"{images.count:,} of {count_of(images.found, 'image')}, evenly spaced")
    inputs.add("left out", describe_ignored([images.ignored_files], images.path))
    height, width = images.pages[0].image.shape[-2:]
    resize = describe_resize(EvalTransform((height, width)))
    if opened:
        add_opened_models(inputs, [opened])
        inputs.add("pixels", describe_pixels(opened), resize)
    else:
        inputs.add("pixels", describe_size((height, width)), resize)
    for label, text in rows.items():
        inputs.add(label, text)
    inputs.add("device", describe_device(device))
    inputs.add("output", str(Path(config.output_dir).absolute()))
    return inputs


def open_checkpoint(config: CheckpointConfig, images: ImagesConfig, device: torch.device) -> OpenedModel:
    """Open the model given by the flags."""
    size = image_size(images.input_size) if images.input_size else None
    return open_model(config.checkpoint, config.model, size, flag="--checkpoint").to(device)


def make_scorer(opened: OpenedModel, masking: MaskingConfig) -> Scorer:
    """Return the scorer of a model: the objective of an attack, and captions of the views."""
    if opened.kind == "autoencoder":
        normalized = predicts_normalized_patches(opened, masking.norm_pix_loss)
        return ReconstructionScorer(opened.autoencoder(), masking.mask_ratio, normalized)
    return ClassScorer(opened.classifier(), opened.classes)


def predicts_normalized_patches(opened: OpenedModel, norm_pix_loss: bool | None) -> bool:
    """Return the flag if given, else the setting in the autoencoder's file, else False with a warning."""
    if norm_pix_loss is None and "norm_pix_loss" not in opened.facts:
        logger.warning(
            "%s does not record whether it was trained with --norm_pix_loss: assuming False. If its reconstructions "
            "are gray, use --norm_pix_loss True.",
            opened.title,
        )
    return bool(opened.facts.get("norm_pix_loss", False) if norm_pix_loss is None else norm_pix_loss)


# ---- the galleries ----


def draw_reconstruction(config: ReconstructionConfig, console: Console) -> None:
    """Write reconstruction.png."""
    device = pick_device(config.images.device)
    opened = open_checkpoint(config.checkpoint, config.images, device)
    model = opened.autoencoder()
    norm_pix = predicts_normalized_patches(opened, config.masking.norm_pix_loss)
    generator = step_generator(config.images.seed, 0, 0, device)
    heading = f"{opened.title}, masks of seed {config.images.seed}"
    images = read_images(config.images, opened.input_size, opened.plan.in_chans, device)
    with GalleryWriter(config.images) as writer:
        writer.report_inputs(gallery_inputs(config.verb, config.images, images, device, opened), console)
        for page in images.pages:
            noise = mask_noise(len(page.image), model.num_patches, generator, device)
            columns = reconstruction_columns(
                model, page.image, mask_ratio=config.masking.mask_ratio, noise=noise, norm_pix=norm_pix
            )
            captions = [["", "", name] for name in page.names]
            writer.write("reconstruction", draw_gallery(columns, captions, heading), page.number)


def draw_attention(config: AttentionConfig, console: Console) -> None:
    """Write attention.png."""
    device = pick_device(config.images.device)
    opened = open_checkpoint(config.checkpoint, config.images, device)
    model = opened.encoder()
    depth = len(attention_layers(model))
    block = depth if config.block is None else config.block
    if not 1 <= block <= depth:
        raise ConfigError(f"--block {block}: {opened.title} has blocks 1 to {depth}.")
    query = default_query(model) if config.query == "auto" else config.query
    queries = "attention of the class token" if query == "class" else "mean attention of all patches"
    blocks = f"rollout of blocks 1 to {block}" if config.rollout else f"block {block} of {depth}"
    heading = f"{opened.title}: {queries}, {blocks}"
    images = read_images(config.images, opened.input_size, opened.plan.in_chans, device)
    with GalleryWriter(config.images) as writer:
        writer.report_inputs(gallery_inputs(config.verb, config.images, images, device, opened), console)
        for page in images.pages:
            maps = attention_maps(model, page.image, block=block - 1, query=query, rollout=config.rollout)
            columns, captions = attention_columns(page.image, maps)
            captions = [[name, *row[1:]] for name, row in zip(page.names, captions, strict=True)]
            writer.write("attention", draw_gallery(columns, captions, heading, cell=192), page.number)


def draw_words(config: WordsConfig, console: Console) -> None:
    """Write words.png, most_used_words.png and codebook.png."""
    device = pick_device(config.images.device)
    tokenizer = load_tokenizer(config.tokenizer).to(device)
    size = config.images.input_size or ((64,) if config.tokenizer == EMBEDDED else (224,))
    images = read_images(config.images, image_size(size), tokenizer.in_chans, device)
    tokenizer_in_words = describe_tokenizer(config.tokenizer, tokenizer)
    inputs = gallery_inputs(config.verb, config.images, images, device, tokenizer=tokenizer_in_words)
    heading = f"{Path(config.tokenizer).name} tokenizer: factor {tokenizer.factor}, {tokenizer.num_words} words"
    words = []
    with GalleryWriter(config.images) as writer:
        writer.report_inputs(inputs, console)
        for page in images.pages:
            words.append(tokenizer.encode(page.image))
            columns, captions = word_columns(page.image, words[-1], tokenizer)
            captions = [[name, *row[1:]] for name, row in zip(page.names, captions, strict=True)]
            writer.write("words", draw_gallery(columns, captions, heading), page.number)
        used, shares = used_words(torch.cat(words))
        sample = count_of(images.count, "image")
        texts = [f"{word}\n{share:.1%}" for word, share in zip(used[:_MAX_WORDS].tolist(), shares, strict=False)]
        tiles = word_tiles(tokenizer, used[:_MAX_WORDS])
        writer.write("most_used_words", draw_sheet(tiles, texts, f"{heading}; the most used in {sample}"))
        if tokenizer.num_words <= _MAX_CODEBOOK:
            entries, order = torch.arange(tokenizer.num_words, device=device), "all, by index"
        else:
            entries = used[:_MAX_CODEBOOK]
            order = f"the {len(entries)} most used in {sample}"
        codebook = codebook_image(word_tiles(tokenizer, entries))
        writer.write("codebook", draw_gallery([("", codebook)], heading=f"{heading}; {order}", cell=1))


def draw_adversary(config: AdversaryConfig, console: Console) -> None:
    """Write adversary.png and changed_words.png."""
    attack = config.dat.attack
    if attack is None:
        raise ConfigError("--dat none changes nothing: use released, paper, symbolic, random or reconstruction.")
    device = pick_device(config.images.device)
    opened = open_checkpoint(config.checkpoint, config.images, device)
    images = read_images(config.images, opened.input_size, opened.plan.in_chans, device)
    tokenizer = load_tokenizer(config.dat.tokenizer).to(device)
    tokenizer.check(images.pages[0].image)
    scorer = make_scorer(opened, config.masking)
    objective = WithDAT(tokenizer, attack, scorer.objective)
    generator = step_generator(config.images.seed, 0, 0, device)
    inputs = gallery_inputs(
        config.verb,
        config.images,
        images,
        device,
        opened,
        tokenizer=describe_tokenizer(config.dat.tokenizer, tokenizer),
        adversary=attack.describe(),
    )
    heading = ""
    words, adversarial_words = [], []
    with GalleryWriter(config.images) as writer:
        writer.report_inputs(inputs, console)
        for page in images.pages:
            context = scorer.context(page.image, page.paths, generator)
            adversary = objective.adversary(opened.model, page.image, context, generator)
            words.append(adversary.words)
            adversarial_words.append(adversary.adversarial_words)
            columns = adversary_columns(page.image, adversary, config.amplify)
            eps = f", eps {objective.strength().eps:.3g}" if attack.moves_pixels else ""
            heading = f"{opened.title}, attacked by --dat {config.dat.kind}{eps}"
            captions = adversary_captions(scorer, page, adversary, context)
            writer.write("adversary", draw_gallery(columns, captions, heading), page.number)
        rows = most_changed_words(torch.cat(words), torch.cat(adversarial_words), _MAX_WORDS)
        if not rows:
            logger.warning("no word changed: the attack is too weak for this tokenizer; use --dat_share 0.05.")
            return
        heading += "; words most often changed, what they mostly became, and in how many of their places"
        writer.write("changed_words", changed_word_sheet(tokenizer, rows, heading))


def adversary_captions(
    scorer: Scorer, page: GalleryPage, adversary: DiscreteAdversary, context: Any
) -> list[list[str]]:
    """Return the captions of each image's row: the model's output on the image (with the file name), on its
    reconstruction and on its adversary, and the number of changed words."""
    views = (page.image, adversary.reconstruction, adversary.adversarial)
    outputs = zip(*(scorer.captions(view, context) for view in views), strict=True)
    counts = (adversary.words != adversary.adversarial_words).flatten(1).sum(1).tolist()
    total = adversary.words[0].numel()
    return [
        [f"{clean}\n{name}", reconstructed, adversarial, "", f"{count} of {total}"]
        for name, (clean, reconstructed, adversarial), count in zip(page.names, outputs, counts, strict=True)
    ]


# ---- the command ----

_DRAW: dict[type[Any], Callable[[Any, Console], None]] = {
    ReconstructionConfig: draw_reconstruction,
    AttentionConfig: draw_attention,
    WordsConfig: draw_words,
    AdversaryConfig: draw_adversary,
}


def main(config: ReconstructionConfig | AttentionConfig | WordsConfig | AdversaryConfig) -> None:
    """Run `mae-dat visualize KIND`; the type of the configuration is the kind."""
    _DRAW[type(config)](config, console_for_command())
