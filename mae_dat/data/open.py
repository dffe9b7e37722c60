"""From the name of a data set to its images: a folder, an address of shards, the environment's default, or `demo`."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from torchvision import transforms

from mae_dat.config.errors import ConfigError, MissingInputError
from mae_dat.config.groups import DEMO, ClassOrder, DataConfig, data_root
from mae_dat.config.paths import require_folder
from mae_dat.data.class_names import BY_WORDNET_ID, OutputNames, imagenet_synsets, name_outputs
from mae_dat.data.folders import class_folders, find_split
from mae_dat.data.generated.folder import generated_root, write_image_folder
from mae_dat.data.image_set import ImageFolder, ImageSet, PixelTransform, Transform, as_float
from mae_dat.data.shards.cache import is_remote, remote_root
from mae_dat.data.shards.index import INDEX_FILE, read_index
from mae_dat.data.shards.reader import Shards
from mae_dat.data.transforms import EvalBandsTransform, EvalTransform

logger = logging.getLogger(__name__)


def training_images(
    data: DataConfig, transform: Transform, seed: int, labeled: bool, outputs: int | None = None
) -> ImageSet:
    """Open the training split that the flags or the environment name.

    Folders named by WordNet ids get ImageNet's labels if the model has ImageNet's number of `outputs`, so that a
    pretrained head fits. Raises ConfigError, DataError.
    """
    root = find_split(image_root(data.data_path), "train", labeled=labeled)
    transform = with_channels(transform, data.in_chans)
    synsets = _name_synsets(root, outputs) if labeled and outputs else None
    images = open_images(root, transform, synsets, labeled=labeled, on_bad=data.on_bad, seed=seed)
    decode_channels(images, data.in_chans)
    if synsets:
        images.class_names_from = BY_WORDNET_ID
    if images.packed_size is not None and images.packed_size < max(data.image_size):
        logger.warning(
            "%s was packed with --size %d, which --input_size %d enlarges: pack the images again, with a larger one.",
            root,
            images.packed_size,
            max(data.image_size),
        )
    return images


def image_root(data_path: str | None) -> Path:
    """Return the root folder of images.

    `demo` draws the generated images at the first use. An address of shards gives the local folder of their cache.
    Raises ConfigError if no data is named, DownloadError.
    """
    root = data_root(data_path)
    if is_remote(root):
        return remote_root(root)
    return write_image_folder(generated_root()) if root == DEMO else Path(root)


def open_images(
    root: str | os.PathLike[str],
    transform: Transform,
    classes: Sequence[str] | None = None,
    on_bad: str = "fail",
    labeled: bool = True,
    seed: int = 0,
) -> ImageSet:
    """Open the images of one split: `Shards` if the folder contains shards, else an `ImageFolder`.

    Raises what these raise, and MissingInputError for shards without an index.
    """
    if (Path(root) / INDEX_FILE).is_file():
        return Shards(root, transform, classes=classes, on_bad=on_bad, labeled=labeled, seed=seed)
    if holds_shards(root):
        raise MissingInputError(f"{root} contains shards without their index: mae-dat pack --index {root}")
    return ImageFolder(root, transform, classes=classes, on_bad=on_bad, labeled=labeled, seed=seed)


def open_images_of_model(
    root: str | os.PathLike[str],
    transform: Transform,
    outputs: int,
    stored: Sequence[str] | None,
    on_bad: str = "fail",
    order: ClassOrder = "auto",
) -> ImageSet:
    """Open the labeled images of a split for a model with `outputs`, whose file stores the names `stored` or None;
    `order` as in `name_outputs`.

    The labels are numbers of the outputs; `classes` has a name for each. Raises what `open_images` raises, and
    DataError where the output of a class folder is unknown.
    """
    require_folder(root)
    if holds_shards(root) and not (Path(root) / INDEX_FILE).is_file():
        return open_images(root, transform)  # raises the error
    named = _name_outputs_for_split(root, outputs, stored, order)
    images = open_images(root, transform, classes=named.names if named else None, on_bad=on_bad)
    if named:
        images.class_names_from = named.source
    return images


def _name_outputs_for_split(
    root: str | os.PathLike[str], outputs: int, stored: Sequence[str] | None, order: ClassOrder
) -> OutputNames | None:
    """Return what `name_outputs` does for the class folders of a split or the classes of its shards; None if it has no
    classes."""
    folders, indexed = _present_classes(root)
    return name_outputs(str(root), folders, outputs, stored, indexed, order) if folders else None


def _name_synsets(root: str | os.PathLike[str], outputs: int) -> list[str] | None:
    """Return ImageNet's WordNet ids if a model's `outputs` are that many and all classes of a split are among them."""
    synsets = imagenet_synsets(outputs)
    return list(synsets) if synsets and set(_present_classes(root)[0]) <= set(synsets) else None


def _present_classes(root: str | os.PathLike[str]) -> tuple[list[str], list[str] | None]:
    """Return the class folders of a split; for shards, the classes that have images and those of all class numbers."""
    if not (Path(root) / INDEX_FILE).is_file():
        return list(class_folders(str(root))[0]), None
    index = read_index(Path(root))
    names = index.classes or []
    return [names[number] for number in index.label.unique().tolist() if number >= 0], names


def holds_shards(root: str | os.PathLike[str]) -> bool:
    """Return whether a folder contains shards, with or without their index."""
    return (Path(root) / INDEX_FILE).is_file() or any(Path(root).glob("*.tar"))


def decode_channels(images: ImageSet, in_chans: int) -> None:
    """Let a set of images decode the channels of its files, unless they are color or gray, and decode the first one.

    Raises DataError if it has other channels, ConfigError for shards.
    """
    if in_chans in (1, 3):
        return
    images.channels = in_chans
    images.load_bands(0, in_chans)


def warn_of_packed_size(images: ImageSet) -> None:
    """Log a warning if validation images were packed at another size."""
    if images.packed_size is not None:
        logger.warning(
            "the accuracies are of the images in %s, shrunk to %d px and stored anew, not of the original ones.",
            images.root,
            images.packed_size,
        )


def with_channels(transform: Transform, in_chans: int) -> Transform:
    """Return a transform with 3 channels (RGB), with 1, the luminance (ITU-R 601) of its result, or with those of the
    files (`decode_channels`).

    Raises ConfigError for a transform of color images alone.
    """
    if in_chans not in (1, 3):
        if isinstance(transform, EvalTransform):
            return EvalBandsTransform(transform)
        if not isinstance(transform, PixelTransform):
            raise ConfigError(f"--in_chans {in_chans}: this command takes images of 3 channels, or 1 (luminance).")
    if in_chans != 1:
        return transform
    grayscale: Transform = transforms.Compose([transform, as_float, transforms.Grayscale()])
    return grayscale


def describe_images(images: ImageSet) -> str:
    """Return the number and fingerprint of the images, for a checkpoint's manifest."""
    return f"{len(images)} ({images.fingerprint()[:12]})"
