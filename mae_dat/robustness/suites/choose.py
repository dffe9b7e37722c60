"""What can be measured: the benchmarks of ImageNet, a data set of one's own, and what is made of either's clean
pictures: corruptions, pixel attacks, changed words.

A `Battery` opens the pictures once, whatever the number of networks; `Battery.suite` gives a suite as one network sees
it. Nothing is computed here, and what is wrong is said here.
"""

import copy
import dataclasses
import functools
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mae_dat.attacks.auto_attack import AUTO_ATTACK_EPS, auto_attack, require_auto_attack
from mae_dat.attacks.discrete import image_generator
from mae_dat.attacks.pixel import PIXEL_ATTACKS, PixelAttack, pixel_adversary
from mae_dat.attacks.word_budget import WORD_ATTACK_KINDS, WORD_SHARES, WordAttack, word_hits
from mae_dat.config.errors import ConfigError, DataError, InputSizeError, MissingInputError, UserError
from mae_dat.config.groups import ImageSize
from mae_dat.config.parse import suggest
from mae_dat.data.folders import find_split, require_folder
from mae_dat.data.open import holds_shards, open_images
from mae_dat.models.modes import Network
from mae_dat.models.tokenizer import VisualTokenizer, load_tokenizer, tokenizer_path
from mae_dat.robustness import corruptions as corrupting
from mae_dat.robustness.measure import Adversary, ImagePass
from mae_dat.robustness.suites.base import Suite
from mae_dat.robustness.suites.folders import folders_in
from mae_dat.robustness.suites.imagenet import SYNSETS, Reading, check_classes, outputs_advice
from mae_dat.robustness.suites.inventory import find, inventory
from mae_dat.robustness.suites.labels import read_conflicts, read_subset
from mae_dat.robustness.suites.sets import (
    BENCHMARKS,
    PARTIAL,
    BenchmarkSet,
    Cell,
    CustomSet,
    Preprocessing,
    open_benchmark,
)
from mae_dat.storage.files import sha256_of

logger = logging.getLogger(__name__)

CLEAN, GENERATED, CONFLICT = "clean", "generated", "conflict"
AUTO_ATTACK = f"autoattack-{round(255 * AUTO_ATTACK_EPS)}/255"
WORDS = {f"words-{kind}": kind for kind in ("random", "symbolic")}
ATTACKS = (*PIXEL_ATTACKS, AUTO_ATTACK, *WORDS)
OWN = (CLEAN, CONFLICT)
"""Pictures of classes of one's own: val/CLASS, and conflict/ with textures of other classes."""
SUITES = (*BENCHMARKS, *OWN, GENERATED, *ATTACKS)
NEED_GRADIENTS = (*PIXEL_ATTACKS, AUTO_ATTACK, "words-symbolic")
BY_NAME_ONLY = {
    AUTO_ATTACK: "takes thousands of passes a picture: name it, with --limit or --subset",
}
AGREEMENT, AGREEMENT_PICTURES = "bf16 against fp32", 10_000
TITLES = {
    CLEAN: "Clean",
    CONFLICT: "Cue conflict",
    "fgsm-1/255": "FGSM, 1/255",
    "pgd-5-1/255": "PGD, 5 steps, 1/255",
    "pgd-20-l2-0.5": "PGD, 20 steps, L2 0.5",
    AUTO_ATTACK: "AutoAttack, 4/255",
    "words-random": "Random words",
    "words-symbolic": "Symbolic adversary",
}


@dataclasses.dataclass(frozen=True)
class SuiteSettings:
    """What is measured of the pictures below a folder, and how."""

    root: Path
    partial: bool = False
    """Take folders that are not whole; their rows are marked."""
    subset: Path | None = None
    """RobustBench's list of 5,000 pictures, for ImageNet and ImageNet-C."""
    limit: int | None = None
    """Pictures of each cell."""
    whole_clean: bool = False
    """Count all pictures of clean and conflict, whatever the limit: they take one pass each."""
    seed: int = 0
    held_out: bool = False
    """Also the four further corruptions, where they are made here."""
    tokenizer: str = "embedded"
    batch_size: int = 64
    """Part of AutoAttack's result alone."""
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"--limit {self.limit}: give at least 1 picture a cell, or None for all.")


class Battery:
    """The suites of one choice of pictures, for networks with so many outputs, of these classes where they are known.

    What is wrong with the pictures is a UserError, with the reason, before hours are spent.
    """

    def __init__(self, choice: SuiteSettings, outputs: int, classes: Sequence[str] | None = None) -> None:
        require_folder(choice.root)
        self.choice, self.outputs, self.classes = choice, outputs, classes
        self.subset = read_subset(choice.subset) if choice.subset else None
        self._sets: dict[str, list[BenchmarkSet]] = {}
        self._tokenizer: VisualTokenizer | None = None

    @property
    def clean(self) -> str:
        """The suite of the clean pictures: `imagenet`, or `clean` for classes that are not ImageNet's."""
        place = find(self.choice.root, "imagenet")
        if self.outputs != len(SYNSETS) or place is None or holds_shards(place):
            return CLEAN
        return "imagenet" if folders_in(str(place)).keys() <= set(SYNSETS) else CLEAN

    def chosen(self, asked: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """The suites to measure, in order, and why the others are not; `all` is what there is. Raises ConfigError."""
        if not asked:
            raise ConfigError(f"--suite names nothing: give all, or some of {', '.join(SUITES)}.")
        for name in asked:
            if name not in (*SUITES, "all"):
                raise ConfigError(f"--suite {name}: {suggest(name, [*SUITES, 'all'])}")
        if "all" not in asked:
            return list(dict.fromkeys(asked)), {name: "not asked for" for name in SUITES if name not in asked}
        lacking = {row.benchmark.name: row.note for row in inventory(self.choice.root) if row.folder is None}
        if self.outputs != len(SYNSETS):
            lacking |= dict.fromkeys(BENCHMARKS, f"the networks have {self.outputs} outputs, not ImageNet's 1000")
        if self.clean == "imagenet":
            lacking |= dict.fromkeys(OWN, "ImageNet's own pictures are there")
        elif not self._has_split():
            lacking |= dict.fromkeys(OWN, "no folder val/CLASS")
            lacking |= dict.fromkeys((GENERATED, *ATTACKS), "needs clean pictures: ImageNet's or val/CLASS")
        else:
            own = dict.fromkeys(("imagenet", "imagenet-real"), "the class folders are not ImageNet's")
            lacking = own | lacking
            if not (self.choice.root / CONFLICT).is_dir():
                lacking[CONFLICT] = "no folder conflict"
        if "imagenet-c" not in lacking:
            lacking[GENERATED] = "the official ImageNet-C is there: name it to have both"
        lacking |= {name: why for name, why in BY_NAME_ONLY.items() if name not in lacking}
        lacking = {name: lacking[name] for name in SUITES if name in lacking and name not in asked}
        found = [name for name in SUITES if name not in lacking]
        if not found:
            raise self._nothing()
        return found, lacking

    def _nothing(self) -> UserError:
        """Why `all` is nothing."""
        root = self.choice.root.resolve()
        there = [row.benchmark.title for row in inventory(root) if row.folder not in (None, root)]
        if there and self.outputs != len(SYNSETS):
            return ConfigError(
                f"{self.choice.root} holds {', '.join(dict.fromkeys(there))}, and the networks have {self.outputs} "
                f"outputs, not ImageNet's {len(SYNSETS)}: {outputs_advice(self.outputs)}"
            )
        near = [path for path in (root.parent, root.parent.parent, *root.iterdir()) if (path / "val").is_dir()]
        hint = f"did you mean {near[0]}?" if near else "see --help for its layout."
        return MissingInputError(f"{self.choice.root} holds no benchmark and no val/CLASS: {hint}")

    def _has_split(self) -> bool:
        try:
            root = find_split(self.choice.root, "val")
            return bool(folders_in(str(root))) or holds_shards(root)
        except UserError:
            return False

    # ---- pictures ----

    def sets(self, name: str) -> list[BenchmarkSet]:
        """The cells of a benchmark, or of the custom set, opened once."""
        if name not in self._sets:
            opens = {CLEAN: self._open_own, CONFLICT: self._open_conflicts}
            self._sets[name] = opens[name]() if name in opens else self._open(name)
        return self._sets[name]

    def _counted(self, name: str) -> list[BenchmarkSet]:
        """The same, no more pictures of each than wanted."""
        limit = self.choice.limit
        return self.sets(name) if limit is None else [limited(one, limit, self.choice.seed) for one in self.sets(name)]

    def _open(self, name: str) -> list[BenchmarkSet]:
        check_classes(self.classes, self.outputs)
        folder = find(self.choice.root, name)
        if folder is None:
            raise MissingInputError(f"{self.choice.root} has no folder {BENCHMARKS[name].usual[0]}, in any spelling.")
        subset = self.subset if name in ("imagenet", "imagenet-real", "imagenet-c") else None
        return open_benchmark(name, folder, (224, 224), partial=self.choice.partial, subset=subset)

    def _open_own(self) -> list[BenchmarkSet]:
        root = find_split(self.choice.root, "val")
        images = open_images(root, lambda image: torch.zeros(0), self.classes)
        if len(images.classes) != self.outputs:
            raise DataError(f"{root} has {len(images.classes)} classes, the networks have {self.outputs} outputs.")
        there = {images.label(index) for index in range(len(images))}
        absent = [name for label, name in enumerate(images.classes) if label not in there]
        told = f"no pictures of {', '.join(absent[:5])} ({len(absent)} of {self.outputs} classes)"
        if absent and not self.choice.partial:
            raise DataError(f"{root} has {told}; {PARTIAL}.")
        every = torch.arange(self.outputs)
        reading = Reading("its own classes", tuple(images.classes), every, every, outputs=self.outputs)
        own = CustomSet(Cell(CLEAN), images, reading, Preprocessing((224, 224), keep=True))
        own.missing = [told] if absent else []
        return [own]

    def _open_conflicts(self) -> list[BenchmarkSet]:
        (own,), root = self.sets(CLEAN), self.choice.root / CONFLICT
        listing, cues = read_conflicts(root, own.classes)
        reading = dataclasses.replace(own.reading, pooled=True)
        found = BenchmarkSet(Cell(CONFLICT), str(root), listing, cues, reading, Preprocessing((224, 224), keep=True))
        return [found]

    # ---- suites ----

    def suite(self, name: str, size_HW: ImageSize, interpolation: str, crop: float | None = None) -> Suite:
        """A suite for a network of this input. Raises what opening raises, InputSizeError where it cannot be made."""

        def see(pictures: BenchmarkSet) -> BenchmarkSet:
            return seen_at(pictures, size_HW, interpolation, crop)

        if name in BENCHMARKS or name in OWN:
            whole = self.choice.whole_clean and name in OWN
            portions = [_stored(see(pictures)) for pictures in (self.sets if whole else self._counted)(name)]
            title = BENCHMARKS[name].title if name in BENCHMARKS else TITLES[name]
            return Suite(name, title, tuple(portions), official=name != CONFLICT)
        (clean,) = map(see, self._counted(self.clean))
        numbered = {} if self.subset is None else {"numbers": "places in the whole folder"}
        if name == GENERATED:
            return self._generated(clean, size_HW, numbered)
        made = {"precision": "fp32", **numbered}
        if name in WORDS:
            attack = self._word_attack(size_HW)
            made |= {"tokenizer": Path(self.choice.tokenizer).name, "tokenizer's sha256": self._tokenizer_sha256}
            made |= {"steps": str(attack.steps), "seed": str(attack.seed)}
            portion = self._words(name, clean, attack)
        else:
            if name == AUTO_ATTACK:
                require_auto_attack(self.outputs)
            adversary = self._auto_attack if name == AUTO_ATTACK else self._pixel_attack(PIXEL_ATTACKS[name])
            settings = f"standard, consecutive batches of {self.choice.batch_size}"
            made["attack"] = settings if name == AUTO_ATTACK else str(PIXEL_ATTACKS[name])
            made["seed"] = str(self.choice.seed)
            portion = ImagePass(_named(clean, name), adversary=adversary, precise=True, batched=name == AUTO_ATTACK)
        needed = ("torchattacks",) if name == AUTO_ATTACK else ()
        return Suite(name, TITLES.get(name, name), (portion,), official=True, made=made, packages=needed)

    def agreement(self, measured: Suite) -> Suite:
        """How often a network in bfloat16 answers as in float32, on pictures of a suite of stored ones."""
        pictures = limited(measured.portions[0].pictures, AGREEMENT_PICTURES, self.choice.seed)
        portion = ImagePass(_named(pictures, AGREEMENT), against_float32=True)
        return Suite(AGREEMENT, "bf16 as fp32", (portion,), official=False, made={"seed": str(self.choice.seed)})

    def _generated(self, clean: BenchmarkSet, size_HW: ImageSize, numbered: dict[str, str]) -> Suite:
        try:
            corrupting.check_image(np.zeros((*size_HW, 3), np.uint8))
        except DataError as error:
            raise InputSizeError(str(error)) from error
        names = corrupting.CORRUPTIONS + (corrupting.EXTRA if self.choice.held_out else ())
        portions = tuple(
            ImagePass(
                _named(clean, GENERATED),
                tuple(f"{name}/{severity}" for severity in corrupting.SEVERITIES),
                corruption=name,
                severities=corrupting.SEVERITIES,
                seed=self.choice.seed,
            )
            for name in names
        )
        made = {"corruptions": corrupting.SOURCE, "stored as": f"JPEG {corrupting.STORED_QUALITY}"}
        made |= {"seed": str(self.choice.seed), **numbered}
        needed = ("imagecorruptions-imaug",)  # photographs of frost
        return Suite(GENERATED, "Generated corruptions", portions, official=False, made=made, packages=needed)

    def _pixel_attack(self, attack: PixelAttack) -> Adversary:
        def adversary(network: Network, image: Tensor, label: Tensor, number: Tensor) -> Tensor:
            generators = [image_generator(self.choice.seed, one) for one in number.tolist()]
            return pixel_adversary(network, image, label, attack, generators)

        return adversary

    def _auto_attack(self, network: Network, image: Tensor, label: Tensor, number: Tensor) -> Tensor:
        with torch.enable_grad():
            return auto_attack(network, image, label, seed=self.choice.seed)  # type: ignore[arg-type]

    def _word_attack(self, size_HW: ImageSize) -> WordAttack:
        """Shares that are different numbers of words at this size."""
        tokenizer = self.tokenizer
        tokenizer.check(torch.zeros(1, 3, *size_HW))
        places = (size_HW[0] // tokenizer.factor) * (size_HW[1] // tokenizer.factor)
        different = {round(share * places): share for share in reversed(WORD_SHARES)}
        return WordAttack(tuple(sorted(different.values())), seed=self.choice.seed)

    def _words(self, name: str, clean: BenchmarkSet, attack: WordAttack) -> ImagePass:
        def hits(network: Network, image: Tensor, label: Tensor, number: Tensor) -> Tensor:
            return word_hits(network, self.tokenizer, image, label, number, WORDS[name], attack)  # type: ignore[arg-type]

        cells = tuple(f"{share:g}" for share in attack.shares)
        return ImagePass(_named(clean, name), cells, word_hits=hits, precise=True)

    @property
    def speaks(self) -> bool:
        """Whether a tokenizer is loaded, for a suite that needs it."""
        return self._tokenizer is not None

    @property
    def tokenizer(self) -> VisualTokenizer:
        """The one whose words are changed."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.choice.tokenizer).to(self.choice.device)
        return self._tokenizer

    @functools.cached_property
    def _tokenizer_sha256(self) -> str:
        return sha256_of(tokenizer_path(self.choice.tokenizer))


assert set(WORDS.values()) == set(WORD_ATTACK_KINDS)


def _stored(pictures: BenchmarkSet) -> ImagePass:
    """A portion of files. Where one class alone is right, confidences are measured too, but not on 75 corruptions."""
    corruption, severity = pictures.cell.corruption, pictures.cell.severity
    cell = f"{corruption}/{severity}" if corruption else ""
    plain = not corruption and pictures.targets.shape[1] == 1 and not pictures.reading.pooled
    return ImagePass(pictures, (cell,), calibrated=plain)


def _named(pictures: BenchmarkSet, name: str) -> BenchmarkSet:
    """The same pictures as cells of another suite, for messages."""
    other = copy.copy(pictures)
    other.cell = Cell(name)
    return other


def seen_at(pictures: BenchmarkSet, size_HW: ImageSize, interpolation: str, crop: float | None) -> BenchmarkSet:
    """The same pictures for a network of another input."""
    assert isinstance(pictures.transform, Preprocessing)
    prepare = dataclasses.replace(pictures.transform, size_HW=size_HW, interpolation=interpolation, crop=crop)
    other = pictures.with_transform(prepare)
    other.protocol = {**pictures.protocol, "preprocessing": str(prepare)}
    return other


def limited(pictures: BenchmarkSet, limit: int, seed: int) -> BenchmarkSet:
    """The first `limit` of a permutation drawn from `seed`, in their old order; they keep their numbers."""
    if limit >= len(pictures):
        return pictures
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    chosen = order[:limit].sort().values
    other = copy.copy(pictures)
    other.listing, other.targets = [pictures.listing[index] for index in chosen], pictures.targets[chosen]
    other.numbers = [pictures.number(index) for index in chosen.tolist()]
    told = f"{limit:,} of {len(pictures):,} pictures (seed {seed})"
    before = pictures.protocol["subset"]
    other.protocol = {**pictures.protocol, "subset": f"{told}, {before}" if before else told}
    return other
