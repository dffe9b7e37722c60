"""Draw what a model does, for any checkpoint and any images, as PNG and for TensorBoard.

The four kinds of galleries share their flags for images and checkpoints; each has its own configuration and function.
"""

import dataclasses
import logging
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from mae_dat.analysis.scorers import ClassScorer, ReconstructionScorer, Scorer
from mae_dat.attacks.discrete import DiscreteAdversary
from mae_dat.config.adversaries import DatConfig
from mae_dat.config.errors import ConfigError
from mae_dat.config.groups import ImageSize, image_size
from mae_dat.config.parse import load_config, suggest
from mae_dat.data.decode import decode_file
from mae_dat.data.gallery import draw_gallery, draw_sheet, save_png
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.open import DEMO, image_root, with_channels
from mae_dat.data.sampler import evenly_spaced
from mae_dat.data.transforms import EvalTransform
from mae_dat.models.attention import attention_layers, attention_maps, default_query
from mae_dat.models.mae import mask_noise
from mae_dat.models.tokenizer import EMBEDDED, load_tokenizer
from mae_dat.models.weights.open import OpenedModel, open_model
from mae_dat.runtime.console import console_for_command
from mae_dat.runtime.device import pick_device
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
_RELEASED_DAT = DatConfig("released")
_MAX_CODEBOOK = 1024  # words in the drawing of a codebook; of a larger one the most used are drawn


@dataclasses.dataclass(frozen=True)
class ImagesConfig:
    """Images: which, and where the galleries go."""

    images: str = DEMO
    """An image, a folder of any depth, or `demo` for generated ones."""
    limit: int | None = 6
    """Images, evenly spread over the folder (None: all)."""
    per_page: int = 6
    """Images in one gallery."""
    input_size: tuple[int, ...] | None = None
    """Side, or height and width, in pixels (default: the checkpoint's)."""
    output_dir: str = "./output_pictures"
    log_dir: str | None = None
    """TensorBoard files (default: output_dir)."""
    device: str = "auto"
    seed: int = 0
    """Seed of masks and attacks."""

    def __post_init__(self) -> None:
        for name in ("limit", "per_page"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} must be at least 1, got {value}.")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoint: ours, or MAE's, timm's, easyrobust's, ..."""

    checkpoint: str = ""
    """Output folder, weights file, or the name of released weights."""
    model: str | None = None
    """Its architecture, where the file does not say: mae_vit_base_patch16, vit_base_patch16, or any timm name."""


@dataclasses.dataclass(frozen=True)
class MaskingConfig:
    """Masked autoencoding."""

    mask_ratio: float = 0.75
    """Share of patches removed."""
    norm_pix_loss: bool | None = None
    """Whether the decoder predicts normalized patches (default: what the checkpoint says, else False)."""


@dataclasses.dataclass(frozen=True)
class ReconstructionConfig:
    """What a masked autoencoder fills in: masked / prediction pasted into the visible patches / original.

    Example: --checkpoint PRETRAINING --images PHOTO_OR_FOLDER
    """

    checkpoint: CheckpointConfig = CheckpointConfig()
    images: ImagesConfig = ImagesConfig()
    masking: MaskingConfig = MaskingConfig()


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Where a vision transformer looks: attention of one block, per head and averaged, over the image.

    Example: --checkpoint CLASSIFIER_OR_PRETRAINING --images PHOTO_OR_FOLDER
    """

    checkpoint: CheckpointConfig = CheckpointConfig()
    images: ImagesConfig = ImagesConfig()
    block: int | None = None
    """Block, from 1 (default: the last)."""
    query: Literal["auto", "class", "mean"] = "auto"
    """Whose attention: the class token's, the mean over the patches', or auto: what the model pools."""
    rollout: bool = False
    """One map of all blocks up to --block instead, through the residual connections (Abnar & Zuidema 2020)."""


@dataclasses.dataclass(frozen=True)
class WordsConfig:
    """Visual words: images decoded from their words, each word alone, index maps, the most used words, the codebook.

    Example: --images PHOTO_OR_FOLDER [--tokenizer FILE]
    """

    images: ImagesConfig = ImagesConfig()
    tokenizer: str = "embedded"
    """`embedded` (for 64 px), a light tokenizer's .safetensors, or a VQGAN of taming, latent-diffusion or
    easyrobust."""


@dataclasses.dataclass(frozen=True)
class AdversaryConfig:
    """Clean / adversarial pairs, their difference amplified, the changed words, and the model's output on them.

    A classifier is attacked at the class of the image, where its folder names one, else at the predicted class; a
    masked autoencoder at its reconstruction loss.

    Example: --checkpoint CLASSIFIER_OR_PRETRAINING --images PHOTO_OR_FOLDER
    """

    checkpoint: CheckpointConfig = CheckpointConfig()
    images: ImagesConfig = ImagesConfig()
    dat: DatConfig = _RELEASED_DAT
    masking: MaskingConfig = MaskingConfig()
    amplify: float = 4.0
    """Factor of the difference that is shown."""


@dataclasses.dataclass(frozen=True)
class GalleryPage:
    """The images of one gallery, (B, C, H, W) in [0, 1], their files, and its number from 1 (None: the only one)."""

    image: Tensor
    paths: list[Path]
    number: int | None

    @property
    def names(self) -> list[str]:
        """Files as captions name them: with their folder, which often is their class."""
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.tensorboard.close()


# ---- images and models ----


def read_pages(config: ImagesConfig, size: ImageSize, in_chans: int, device: torch.device) -> list[GalleryPage]:
    """Read the images at the size of the model, cropped as for evaluation. Raises MissingInputError, DataError."""
    transform = with_channels(EvalTransform(size), in_chans)
    path = image_root(DEMO) / "val" if config.images == DEMO else Path(config.images)
    if path.is_file():
        paths, images = [path], [transform(decode_file(path))]
    else:
        folder = ImageFolder(path, transform, labelled=False)
        indices = evenly_spaced(len(folder), config.limit or len(folder))
        paths = [Path(folder.samples[index][0]) for index in indices]
        images = [folder[index]["image"] for index in indices]
    starts = range(0, len(paths), config.per_page)
    return [
        GalleryPage(
            torch.stack(images[start : start + config.per_page]).to(device),
            paths[start : start + config.per_page],
            start // config.per_page + 1 if len(starts) > 1 else None,
        )
        for start in starts
    ]


def open_checkpoint(config: CheckpointConfig, images: ImagesConfig, device: torch.device) -> OpenedModel:
    """Open the model that the flags name."""
    size = image_size(images.input_size) if images.input_size else None
    return open_model(config.checkpoint, config.model, size, flag="--checkpoint").to(device)


def make_scorer(opened: OpenedModel, masking: MaskingConfig) -> Scorer:
    """Return what describes the views of an image in an attack on this model."""
    if opened.kind == "autoencoder":
        normalized = predicts_normalized_patches(opened, masking.norm_pix_loss)
        return ReconstructionScorer(opened.autoencoder(), masking.mask_ratio, normalized)
    return ClassScorer(opened.classifier(), opened.classes)


def predicts_normalized_patches(opened: OpenedModel, norm_pix_loss: bool | None) -> bool:
    """Return the flag, else what the autoencoder's file says, else False with a warning."""
    if norm_pix_loss is None and "norm_pix_loss" not in opened.facts:
        logger.warning(
            "%s does not say whether it was trained with --norm_pix_loss; taken as False. If its reconstructions are "
            "grey, give --norm_pix_loss True.",
            opened.title,
        )
    return bool(opened.facts.get("norm_pix_loss", False) if norm_pix_loss is None else norm_pix_loss)


# ---- the galleries ----


def draw_reconstruction(config: ReconstructionConfig) -> None:
    """Write reconstruction.png."""
    device = pick_device(config.images.device)
    opened = open_checkpoint(config.checkpoint, config.images, device)
    model = opened.autoencoder()
    norm_pix = predicts_normalized_patches(opened, config.masking.norm_pix_loss)
    generator = step_generator(config.images.seed, 0, 0, device)
    heading = f"{opened.title}, masks of seed {config.images.seed}"
    pages = read_pages(config.images, opened.input_size, opened.plan.in_chans, device)
    with GalleryWriter(config.images) as writer:
        for page in pages:
            noise = mask_noise(len(page.image), model.num_patches, generator, device)
            columns = reconstruction_columns(
                model, page.image, mask_ratio=config.masking.mask_ratio, noise=noise, norm_pix=norm_pix
            )
            captions = [["", "", name] for name in page.names]
            writer.write("reconstruction", draw_gallery(columns, captions, heading), page.number)


def draw_attention(config: AttentionConfig) -> None:
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
    pages = read_pages(config.images, opened.input_size, opened.plan.in_chans, device)
    with GalleryWriter(config.images) as writer:
        for page in pages:
            maps = attention_maps(model, page.image, block=block - 1, query=query, rollout=config.rollout)
            columns, captions = attention_columns(page.image, maps)
            captions = [[name, *row[1:]] for name, row in zip(page.names, captions, strict=True)]
            writer.write("attention", draw_gallery(columns, captions, heading, cell=192), page.number)


def draw_words(config: WordsConfig) -> None:
    """Write words.png, most_used_words.png and codebook.png."""
    device = pick_device(config.images.device)
    tokenizer = load_tokenizer(config.tokenizer).to(device)
    size = config.images.input_size or ((64,) if config.tokenizer == EMBEDDED else (224,))
    pages = read_pages(config.images, image_size(size), tokenizer.in_chans, device)
    heading = f"{Path(config.tokenizer).name} tokenizer: factor {tokenizer.factor}, {tokenizer.num_words} words"
    words = []
    with GalleryWriter(config.images) as writer:
        for page in pages:
            words.append(tokenizer.encode(page.image))
            columns, captions = word_columns(page.image, words[-1], tokenizer)
            captions = [[name, *row[1:]] for name, row in zip(page.names, captions, strict=True)]
            writer.write("words", draw_gallery(columns, captions, heading), page.number)
        used, shares = used_words(torch.cat(words))
        sample = f"{sum(len(page.paths) for page in pages)} images"
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


def draw_adversary(config: AdversaryConfig) -> None:
    """Write adversary.png and changed_words.png."""
    attack = config.dat.attack
    if attack is None:
        raise ConfigError("--dat none changes nothing: give released, paper, symbolic, random or reconstruction.")
    device = pick_device(config.images.device)
    opened = open_checkpoint(config.checkpoint, config.images, device)
    pages = read_pages(config.images, opened.input_size, opened.plan.in_chans, device)
    tokenizer = load_tokenizer(config.dat.tokenizer).to(device)
    tokenizer.check(pages[0].image)
    scorer = make_scorer(opened, config.masking)
    objective = WithDAT(scorer.objective, tokenizer, attack)
    generator = step_generator(config.images.seed, 0, 0, device)
    heading = ""
    words, adversarial_words = [], []
    with GalleryWriter(config.images) as writer:
        for page in pages:
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
            logger.warning("no word changed: the attack is too weak for this tokenizer; give --dat_share 0.05.")
            return
        heading += "; words most often changed, what they mostly became, and in how many of their places"
        writer.write("changed_words", changed_word_sheet(tokenizer, rows, heading))


def adversary_captions(
    scorer: Scorer, page: GalleryPage, adversary: DiscreteAdversary, context: Any
) -> list[list[str]]:
    """Return for each image the captions of its row: the model's output on the image, with the file's name, on its
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

GALLERY_KINDS: dict[str, tuple[type[Any], Callable[[Any], None]]] = {
    "reconstruction": (ReconstructionConfig, draw_reconstruction),
    "attention": (AttentionConfig, draw_attention),
    "words": (WordsConfig, draw_words),
    "adversary": (AdversaryConfig, draw_adversary),
}


def usage_overview() -> str:
    """Return the text of `--help`: the kinds of galleries."""
    lines = ["usage: python -m mae_dat visualize KIND [FLAGS]", "", (__doc__ or "").split("\n")[0], ""]
    for name, (config, _) in GALLERY_KINDS.items():
        summary = " ".join((config.__doc__ or "").split("\n\n")[0].split())
        lines.append(textwrap.fill(summary, 100, initial_indent=f"  {name:<15}", subsequent_indent=" " * 17))
    return "\n".join([*lines, "", "The flags of each: python -m mae_dat visualize KIND --help"])


def main(arguments: Sequence[str]) -> None:
    """Run the command with its arguments."""
    console_for_command()
    kind, *flags = arguments or ["--help"]
    if kind in ("-h", "--help"):
        print(usage_overview())
        return
    if kind not in GALLERY_KINDS:
        raise ConfigError(f"no gallery {kind!r}: {suggest(kind, list(GALLERY_KINDS))} KIND comes before the flags.")
    config, draw = GALLERY_KINDS[kind]
    draw(load_config(config, flags, program=f"python -m mae_dat visualize {kind}"))
