"""Stored adversaries: the folder that `mae-dat attack` writes, and image sets that pair its images with the originals.

ADV/attack.json               what was attacked, by whom and how (`StoredAttack`)
ADV/images.jsonl              one line for each image and variant: name, size, changed words, losses
ADV/variant-0/CLASS/NAME.jpg  the adversarial images, under the names of the originals; or shards, *.tar
ADV/words/00000.npz           their visual words, uint16 (variants, h, w), by index of the image
"""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image
from torch import Tensor

from mae_dat.config.errors import DataError, MissingInputError
from mae_dat.data.decode import decode_file, decode_pixels, read_bytes
from mae_dat.data.file_facts import FileFacts, file_facts, replaced
from mae_dat.data.image_set import ImageSet, PixelTransform
from mae_dat.data.shards.index import INDEX_FILE
from mae_dat.data.shards.reader import Shards
from mae_dat.storage.files import atomic_write

ATTACK_FILE = "attack.json"
ATTACK_FORMAT = 1
_MAX_BYTES = 1 << 20
_TYPES = {"images": int, "variants": int, "format": int, "complete": bool, "names_sha256": str, "description": str}
"""Types of the values of `attack.json`; all others are mappings."""
_ADVICE = "write it with mae-dat attack"


@dataclasses.dataclass(frozen=True)
class StoredAttack:
    """The content of `attack.json`.

    `settings` determine the adversarial images: the hashes of teacher and tokenizer, the kind and strength of the
    attack, the size, the seed. `means` are over all images: changed_words, loss_clean, loss_adversarial,
    accuracy_clean and accuracy_adversarial, in [0, 1] but for the losses; empty until the attack is `complete`.
    """

    images: int
    variants: int
    names_sha256: str
    """Hash of the names of the originals below their folder, in order."""
    files: FileFacts
    """Facts about the files of the originals."""
    description: str
    """The attack in words."""
    settings: dict[str, Any]
    complete: bool = False
    means: dict[str, float] = dataclasses.field(default_factory=dict)
    format: int = ATTACK_FORMAT

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the record of a folder. Raises MissingInputError if it has none, DataError if it is damaged."""
        path = folder / ATTACK_FILE
        if not path.is_file():
            there = "has no stored adversaries" if folder.is_dir() else "does not exist"
            raise MissingInputError(f"{folder} {there} ({ATTACK_FILE} is missing): {_ADVICE}.")
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ValueError(f"it has {path.stat().st_size} bytes")
            values = json.loads(path.read_text())
            if values["format"] != ATTACK_FORMAT:
                raise ValueError(f"format {values['format']!r}, not {ATTACK_FORMAT}")
            record = cls(**values)
            record._check_types()
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"{path} is no record of an attack: {error!s:.200}; {_ADVICE}.") from error
        return record

    def _check_types(self) -> None:
        for field in dataclasses.fields(self):
            expected = _TYPES.get(field.name, dict)
            if not isinstance(getattr(self, field.name), expected):
                raise ValueError(f"{field.name} must be {expected.__name__}")
        if self.variants < 1 or not FileFacts.__required_keys__ <= set(self.files):
            raise ValueError("variants or files are damaged")

    def write(self, folder: Path) -> None:
        """Write the record. Raises StorageError."""
        with atomic_write(folder / ATTACK_FILE) as file:
            file.write(json.dumps(dataclasses.asdict(self), indent=1).encode() + b"\n")

    def check_images(self, images: ImageSet, folder: Path) -> None:
        """Raise DataError unless the adversaries in `folder` were made from exactly these images."""
        if (self.images, self.names_sha256) != (len(images), names_sha256(image_names(images))):
            raise DataError(
                f"{folder} was made from other images than those in {images.root}: {self.images:,} of them, here are "
                f"{len(images):,}{_first_difference(images, folder)}. Run mae-dat attack for this folder, with another "
                "--output_dir."
            )
        if replaced(self.files, file_facts(images.content_files(), before=self.files)):
            raise DataError(
                f"images in {images.root} were changed after {folder} was made from them: run mae-dat attack again, "
                "with another --output_dir."
            )


def image_names(images: ImageSet) -> list[str]:
    """Return the names of the images below their folder, in order; of shards the number of each image."""
    if isinstance(images, Shards):
        return [f"{index:08d}" for index in range(len(images))]
    return [os.path.relpath(images.name_of(index), images.root) for index in range(len(images))]


def names_sha256(names: list[str]) -> str:
    """Return a hash of names, in order."""
    return hashlib.sha256(os.fsencode("\0".join(names))).hexdigest()


def stored_name(name: str) -> str:
    """Return the name of an adversarial image, a JPEG, for the name of the original."""
    return name if name.lower().endswith(".jpg") else f"{name}.jpg"


def variant_folder(folder: Path, variant: int) -> Path:
    """Return the folder of a variant of all images."""
    return folder / f"variant-{variant}"


def _first_difference(images: ImageSet, folder: Path) -> str:
    """Return the first image whose name differs, for messages."""
    try:
        with open(folder / "images.jsonl") as file:
            rows = (json.loads(line) for line in file)
            before = [str(row["image"]) for row in rows if row["variant"] == 0]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    missing = sorted(set(before) ^ set(image_names(images)))
    if not missing:
        return ", in another order"
    return f"; only {'there' if missing[0] in before else 'here'}: {missing[0]}"


class StoredPairs(ImageSet):
    """Images, each with a stored adversary: samples hold the same crop of both, `image` (2, C, H, W).

    `images` are the originals with the transform of a training, which must take a pair. In epoch e, image i comes with
    variant (e + i) mod the number of variants. Raises DataError for adversaries of other images, or incomplete ones.
    """

    def __init__(self, images: ImageSet, folder: Path) -> None:
        super().__init__(images.root, images.transform, images.on_bad, images.seed, images.max_skips)
        self.images, self.folder, self.record = images, folder, StoredAttack.read(folder)
        if not self.record.complete:
            raise DataError(f"{folder} is not complete: run the same mae-dat attack again, which resumes.")
        self.record.check_images(images, folder)
        self.classes, self.ignored_files = images.classes, images.ignored_files
        self.class_names_from, self.packed_size = images.class_names_from, images.packed_size
        self.variants = [
            StoredVariant(variant_folder(folder, number), images) for number in range(self.record.variants)
        ]

    def __len__(self) -> int:
        return len(self.images)

    def describe(self) -> str:
        """Return the stored attack in words."""
        changed = f"{100 * self.record.means['changed_words']:.1f} % of the words changed"
        variants = f", {len(self.variants)} variants" if len(self.variants) > 1 else ""
        return f"stored in {self.folder}: {self.record.description}; {changed}{variants}"

    def load(self, index: int, epoch: int) -> tuple[Any, Any]:
        """Decode an image and its adversary in this epoch. Raises DataError, StorageError."""
        variant = self.variants[(epoch + index) % len(self.variants)]
        if isinstance(self.transform, PixelTransform):
            return self.images.load_pixels(index), variant.load_pixels(index)
        return self.images.load_image(index), variant.load_image(index)

    def load_image(self, index: int) -> Image.Image:
        """Decode an original, RGB. Raises DataError, StorageError."""
        return self.images.load_image(index)

    def label(self, index: int) -> int:
        """Return the number of an image's class; -1 if unlabeled."""
        return self.images.label(index)

    def class_counts(self) -> list[int]:
        """Return the number of images of every class."""
        return self.images.class_counts()

    def describe_storage(self) -> str:
        """Return how the originals are stored."""
        return self.images.describe_storage()

    def read_folders(self) -> list[str]:
        """Return the folders of the originals."""
        return self.images.read_folders()

    def name_of(self, index: int) -> str:
        """Return where the original is."""
        return self.images.name_of(index)

    def fingerprint(self) -> str:
        """Return a hash of the originals' fingerprint and of the attack."""
        settings = json.dumps(self.record.settings, sort_keys=True)
        return hashlib.sha256(f"{self.images.fingerprint()}\n{settings}".encode()).hexdigest()

    def content_files(self) -> list[str]:
        """Return the files of the originals and of the adversaries."""
        return [*self.images.content_files(), *(path for variant in self.variants for path in variant.files())]

    def order(self, seed: int, epoch: int, batch_size: int) -> Tensor:
        """Return the order of an epoch's samples, that of the originals."""
        return self.images.order(seed, epoch, batch_size)


class StoredVariant:
    """The adversarial images of one variant, by index of the original: files under their names, or shards."""

    def __init__(self, root: Path, images: ImageSet) -> None:
        self.root = root
        has_shards = (root / INDEX_FILE).is_file()
        self.shards = Shards(root, images.transform, labeled=False) if has_shards else None
        self.names = [] if self.shards else [stored_name(name) for name in image_names(images)]
        if not root.is_dir() or (self.shards is not None and len(self.shards) != len(images)):
            raise DataError(f"{root} does not hold the adversaries of all {len(images):,} images: {_ADVICE}.")

    def load_image(self, index: int) -> Image.Image:
        """Decode an adversarial image, RGB."""
        return self.shards.load_image(index) if self.shards else decode_file(str(self.root / self.names[index]))

    def load_pixels(self, index: int) -> np.ndarray:
        """Decode an adversarial image, uint8 (H, W, 3)."""
        if self.shards:
            return self.shards.load_pixels(index)
        path = str(self.root / self.names[index])
        return decode_pixels(read_bytes(path), path)

    def files(self) -> list[str]:
        """Return the files that hold the images."""
        return self.shards.content_files() if self.shards else [str(self.root / name) for name in self.names]
