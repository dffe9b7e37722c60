"""The sources of suites: the image sets of a folder and the tokenizer, each opened once for any number of networks."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import torch

from mae_dat.config.errors import ConfigError, DataError, MissingInputError, UserError
from mae_dat.config.paths import require_folder
from mae_dat.data.class_names import GIVEN_NAMES, INDEXED_NAMES, SORTED_NAMES, STORED_NAMES
from mae_dat.data.folders import find_evaluation_images
from mae_dat.data.open import holds_shards, open_images_of_model
from mae_dat.models.tokenizer import VisualTokenizer, load_tokenizer, tokenizer_path
from mae_dat.robustness.suites.base import CLEAN, CONFLICT, SuiteSettings
from mae_dat.robustness.suites.catalogue import BENCHMARKS
from mae_dat.robustness.suites.folders import folders_in
from mae_dat.robustness.suites.imagenet import SYNSETS, ClassMapping, check_classes
from mae_dat.robustness.suites.inventory import find_benchmark
from mae_dat.robustness.suites.labels import read_conflicts, read_subset
from mae_dat.robustness.suites.preprocessing import Preprocessing
from mae_dat.robustness.suites.restriction import for_outputs, restrict_to_present
from mae_dat.robustness.suites.sets import PARTIAL_ADVICE, BenchmarkSet, Cell, CustomSet, open_benchmark
from mae_dat.robustness.suites.shifts import open_shift
from mae_dat.robustness.suites.small_sets import open_small
from mae_dat.storage.files import sha256_of

ANY_INPUT = (224, 224)  # image sets are opened for this size, and adapted to a network's input later
OWN_CLASSES = "its own classes"
"""The class mapping's name for labels by stored names or in the order of the class folders."""
SUBSET_SUITES = ("imagenet", "imagenet-real", "imagenet-c")


class SuiteSources:
    """Image sets and tokenizer for networks with `outputs` logits, of these `classes` if known.

    Any problem of the images raises a UserError with the reason when a set is opened, before the evaluation starts.
    """

    def __init__(self, settings: SuiteSettings, outputs: int, classes: Sequence[str] | None = None) -> None:
        require_folder(settings.root)
        self.settings, self.outputs, self.classes = settings, outputs, settings.classes or classes
        if self.classes is not None and len(self.classes) != outputs:
            raise ConfigError(f"--classes has {len(self.classes)} names, but the models have {outputs} outputs.")
        self.subset = read_subset(settings.subset) if settings.subset else None
        self._sets: dict[str, list[BenchmarkSet]] = {}
        self._shift_cells: dict[str, list[str]] = {}
        self._shift_folders = {name: source for name, source in settings.shifts if isinstance(source, Path)}
        self._tokenizer: VisualTokenizer | None = None

    # ---- images ----

    @property
    def clean_suite(self) -> str:
        """The suite of the clean images: `imagenet`, or `clean` for classes that are not ImageNet's."""
        folder = find_benchmark(self.settings.root, "imagenet")
        if self.outputs != len(SYNSETS) or folder is None or holds_shards(folder):
            return CLEAN
        return "imagenet" if folders_in(str(folder)).keys() <= set(SYNSETS) else CLEAN

    def image_sets(self, name: str) -> list[BenchmarkSet]:
        """Return the cells of a benchmark, or of `clean` or `conflict`, opened once."""
        if name not in self._sets:
            if name == CLEAN:
                sets = [self._open_custom_set()]
            elif name == CONFLICT:
                sets = [self._open_conflict_set()]
            elif name in self._shift_folders:
                sets = self._open_shift(name)
            else:
                sets = self._open_benchmark(name)
            self._sets[name] = restrict_to_present(sets) if self.settings.restrict_classes else sets
        return self._sets[name]

    @property
    def opened_sets(self) -> list[BenchmarkSet]:
        """All image sets that were opened so far."""
        return [images for sets in self._sets.values() for images in sets]

    def limited_sets(self, name: str, corrupted: bool = False) -> list[BenchmarkSet]:
        """Return the cells with at most `limit` images each, and `limit_corrupted` for corrupted or attacked images."""
        settings = self.settings
        limits = [settings.limit, settings.limit_corrupted if corrupted else None]
        limit = min((limit for limit in limits if limit is not None), default=None)
        sets = self.image_sets(name)
        return sets if limit is None else [images.limited(limit, settings.seed) for images in sets]

    def synsets_of_outputs(self, name: str) -> tuple[str, ...] | None:
        """Return the WordNet ids of the outputs of networks with some of ImageNet's classes: their names, or, without
        names, the classes of the benchmark `name` if it has as many. None for other networks."""
        if self.outputs == len(SYNSETS):
            return None
        labels = BENCHMARKS[name].labels.values()
        if self.classes is None and len(labels) == self.outputs:
            return tuple(SYNSETS[label] for label in sorted(labels))
        names = tuple(self.classes or ())
        return names if names and set(names) <= set(SYNSETS) else None

    def covers(self, name: str) -> bool:
        """Return whether the networks are known to have all classes of a benchmark."""
        benchmark = BENCHMARKS[name]
        if self.outputs == benchmark.outputs or benchmark.outputs != len(SYNSETS):
            return self.outputs == benchmark.outputs
        is_listed = benchmark.label_source in ("folder", "real") and not benchmark.class_mapping.mean_probability
        known = {*(self.classes or ())}
        return is_listed and known >= {SYNSETS[label] for label in benchmark.labels.values()}

    def _open_benchmark(self, name: str) -> list[BenchmarkSet]:
        root = self.settings.root
        is_imagenets = BENCHMARKS[name].outputs == len(SYNSETS)
        names = self.synsets_of_outputs(name) if is_imagenets else None
        if is_imagenets and names is None:
            check_classes(self.classes, self.outputs)
        folder = find_benchmark(root, name)
        if folder is None:
            raise MissingInputError(f"{root} has no folder {BENCHMARKS[name].folder_names[0]}, in any spelling.")
        if not is_imagenets:
            return open_small(BENCHMARKS[name], folder, self.outputs, self.classes, self.settings.partial)
        subset = self.subset if name in SUBSET_SUITES else None
        sets = open_benchmark(name, folder, ANY_INPUT, partial=self.settings.partial, subset=subset)
        return sets if names is None else for_outputs(sets, names)

    def _open_custom_set(self) -> BenchmarkSet:
        """Open val/CLASS of classes other than ImageNet's."""
        root = find_evaluation_images(self.settings.root)
        order = self.settings.class_order
        images = open_images_of_model(root, lambda image: torch.zeros(0), self.outputs, self.classes, order=order)
        if self.settings.classes and images.class_names_from == STORED_NAMES:
            images.class_names_from = GIVEN_NAMES
        if len(images.classes) != self.outputs:
            raise DataError(f"{root} has {len(images.classes)} classes, but the models have {self.outputs} outputs.")
        present = {images.label(index) for index in range(len(images))}
        absent = [name for label, name in enumerate(images.classes) if label not in present]
        missing = f"no images of {', '.join(absent[:5])} ({len(absent)} of {self.outputs} classes)"
        if absent and not self.settings.partial:
            raise DataError(f"{root} has {missing}; {PARTIAL_ADVICE}.")
        every = torch.arange(self.outputs)
        by_name_or_order = images.class_names_from in (STORED_NAMES, GIVEN_NAMES, SORTED_NAMES, INDEXED_NAMES)
        reading = OWN_CLASSES if by_name_or_order else images.class_names_from
        mapping = ClassMapping(reading, tuple(images.classes), every, every, outputs=self.outputs)
        custom = CustomSet(Cell(CLEAN), images, mapping, Preprocessing(ANY_INPUT, keep_size=True))
        custom.missing = [missing] if absent else []
        return custom

    def _open_conflict_set(self) -> BenchmarkSet:
        """Open conflict/, whose shapes and textures are classes of the custom set."""
        (clean,) = self.image_sets(CLEAN)
        root = self.settings.root / CONFLICT
        listing, cues = read_conflicts(root, clean.classes)
        return BenchmarkSet(
            Cell(CONFLICT),
            str(root),
            listing=listing,
            targets=cues,
            class_mapping=dataclasses.replace(clean.class_mapping, mean_probability=True, has_cues=True),
            preprocessing=Preprocessing(ANY_INPUT, keep_size=True),
        )

    def clean_if_present(self) -> BenchmarkSet | None:
        """Return the clean images; None if there are none, or they cannot be used."""
        try:
            (clean,) = self.image_sets(self.clean_suite)
        except UserError:
            return None
        return clean

    def _open_shift(self, name: str) -> list[BenchmarkSet]:
        """Open the user's own shifted images."""
        folder = self._shift_folders[name]
        clean, order = self.clean_if_present(), self.settings.class_order
        sets, self._shift_cells[name] = open_shift(name, folder, self.outputs, self.classes, clean, order)
        return sets

    def shift_cells(self, name: str) -> list[str]:
        """Return the names of the cells of the user's own shifted images."""
        self.image_sets(name)
        return self._shift_cells[name]

    # ---- tokenizer ----

    @property
    def tokenizer(self) -> VisualTokenizer:
        """The tokenizer whose words are changed, loaded when it is first used."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.settings.tokenizer).to(self.settings.device)
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether the tokenizer was loaded, for a suite that needs it."""
        return self._tokenizer is not None

    @functools.cached_property
    def tokenizer_facts(self) -> dict[str, str]:
        """The facts that identify the tokenizer in a protocol."""
        return {
            "tokenizer": Path(self.settings.tokenizer).name,
            "tokenizer's sha256": sha256_of(tokenizer_path(self.settings.tokenizer)),
        }
