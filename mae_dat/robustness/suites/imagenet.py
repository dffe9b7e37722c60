"""ImageNet's classes, the subsets of them that other benchmarks use, and how 1000 logits become a prediction among a
benchmark's classes.

Shapes: B batch, K = 1000 ImageNet classes in the order of their WordNet ids, L logits that are used, C classes of the
benchmark. The lists and where they come from: mae_dat/robustness/suites/imagenet_classes.json.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_dat.config.errors import DataError

_LISTS = Path(__file__).parent / "imagenet_classes.json"
NO_CLASS = -1  # the class of a logit that belongs to none of a benchmark's classes


def _digest(words: Sequence[object], separator: str) -> str:
    """Return the first 16 digits of the sha256 of the joined words."""
    return hashlib.sha256(os.fsencode(separator.join(map(str, words)))).hexdigest()[:16]


def _read_lists() -> dict[str, Any]:
    """Return the lists. Assertions verify them, because a changed list would silently shift every result a little."""
    lists: dict[str, Any] = json.loads(_LISTS.read_text())
    assert _digest(lists["synsets"], "\n") == "385e0240499426c0"
    assert _digest(lists["imagenet_a"], ",") == "973e8c3e530bf5db"
    assert _digest(lists["imagenet_r"], ",") == "a1d9a9ace3098120"
    superclasses = [number for numbers in lists["laion_c"].values() for number in numbers]
    assert _digest(superclasses, ",") == "58d2018f59f8e47c"
    return lists


_CLASS_LISTS = _read_lists()
SYNSETS: tuple[str, ...] = tuple(_CLASS_LISTS["synsets"])
"""The 1000 WordNet ids, sorted: a class's number is its position."""
IMAGENET_A: tuple[int, ...] = tuple(_CLASS_LISTS["imagenet_a"])
"""The 200 classes of ImageNet-A; 86 of them are also in ImageNet-R."""
IMAGENET_R: tuple[int, ...] = tuple(_CLASS_LISTS["imagenet_r"])
"""The 200 classes of ImageNet-R."""
LAION_C: dict[str, tuple[int, ...]] = {name: tuple(ids) for name, ids in _CLASS_LISTS["laion_c"].items()}
"""The 16 superclasses of LAION-C, and the 285 ImageNet classes in them (category_mapping.json of FanfeiLi/LAION-C)."""
SIXTEEN: dict[str, tuple[int, ...]] = {name: tuple(ids) for name, ids in _CLASS_LISTS["sixteen"].items()}
"""The 16 categories of the cue-conflict images (Geirhos et al. 2019), and the 207 ImageNet classes in them."""


def synsets_of(classes: Sequence[int]) -> tuple[str, ...]:
    """Return the WordNet ids of class numbers."""
    return tuple(SYNSETS[i] for i in classes)


@dataclass(frozen=True, eq=False)
class ClassMapping:
    """How a network's K logits become a prediction among a benchmark's C classes.

    The prediction is the class of the highest of the logits that are used; with `mean_probability`, the class whose
    members have the highest mean probability, as in Geirhos et al. 2019. For data sets other than ImageNet's
    benchmarks, K is the number of their own classes.
    """

    name: str
    """Part of a result's key: the same images with two mappings are two results."""
    classes: tuple[str, ...]
    """The benchmark's classes, in the order of its labels."""
    used_logits: Tensor
    """int64 (L,): the logits that take part."""
    class_of_logit: Tensor
    """int64 (L,): the benchmark's class that each of them belongs to, or NO_CLASS."""
    mean_probability: bool = False
    outputs: int = len(SYNSETS)
    """K."""
    has_cues: bool = False
    """Whether images have a shape's class and a texture's, both of which are counted."""

    def to(self, device: torch.device | str) -> "ClassMapping":
        """Return the same mapping for logits on a device."""
        return replace(self, used_logits=self.used_logits.to(device), class_of_logit=self.class_of_logit.to(device))

    def predictions(self, logits: Tensor, count: int = 1) -> Tensor:
        """Return the `count` best classes, int64 (B, count), from logits (B, K); fewer where there are fewer.

        NO_CLASS if the highest logit belongs to no class. Raises DataError for another K.
        """
        if self.mean_probability:
            return self.probabilities(logits).topk(min(count, len(self.classes)), dim=1).indices
        best = self._select_logits(logits).topk(min(count, len(self.used_logits)), dim=1).indices
        return self.class_of_logit[best]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Return probabilities, float64 (B, C), from logits (B, K): softmax over the logits that are used, summed over
        each class's members; with `mean_probability`, their mean.

        Raises DataError for another K.
        """
        softmax = self._select_logits(logits.double()).softmax(1)
        member = (self.class_of_logit[:, None] == torch.arange(len(self.classes), device=logits.device)).double()
        return softmax @ (member / member.sum(0).clamp(min=1) if self.mean_probability else member)

    def _select_logits(self, logits: Tensor) -> Tensor:
        """Return the logits that are used, (B, L), of (B, K)."""
        if logits.shape[1] != self.outputs:
            raise DataError(
                f"the model has {logits.shape[1]} outputs, but {self.name} needs {self.outputs}: evaluate a model "
                "trained on these classes"
            )
        return logits[:, self.used_logits]


def class_mapping(
    name: str, classes: Mapping[str, Sequence[int]], restricted: bool, mean_probability: bool = False
) -> ClassMapping:
    """Return the mapping from ImageNet's logits to `classes`, a benchmark's classes with the ImageNet classes of each.

    With `restricted`, only the logits of these classes are used.
    """
    class_of_logit = torch.full((len(SYNSETS),), NO_CLASS)
    for number, members in enumerate(classes.values()):
        class_of_logit[list(members)] = number
    used = torch.arange(len(SYNSETS))[(class_of_logit != NO_CLASS) | (not restricted)]
    return ClassMapping(name, tuple(classes), used, class_of_logit[used], mean_probability=mean_probability)


def _imagenet_subset(name: str, classes: Sequence[int]) -> ClassMapping:
    """Return a mapping whose labels are ImageNet's class numbers and which uses the logits of `classes` alone."""
    used = torch.tensor(classes)
    return ClassMapping(name, SYNSETS, used, used)


def mapping_of_outputs(mapping: ClassMapping, names: Sequence[str]) -> ClassMapping:
    """Return a mapping from ImageNet's logits as one from the K outputs of a network with some of ImageNet's classes,
    whose WordNet ids are `names`."""
    number = {synset: i for i, synset in enumerate(SYNSETS)}
    imagenet_class = torch.tensor([number[name] for name in names])
    class_of = torch.full((len(SYNSETS),), NO_CLASS)
    class_of[mapping.used_logits] = mapping.class_of_logit
    used = torch.isin(imagenet_class, mapping.used_logits).nonzero().flatten()
    return replace(
        mapping,
        name=f"{mapping.name}, {len(names)} outputs by WordNet id",
        used_logits=used,
        class_of_logit=class_of[imagenet_class[used]],
        outputs=len(names),
    )


ALL_CLASSES = _imagenet_subset("1000 classes", range(len(SYNSETS)))
CLASSES_OF_A = _imagenet_subset("200 classes of ImageNet-A", IMAGENET_A)
CLASSES_OF_R = _imagenet_subset("200 classes of ImageNet-R", IMAGENET_R)
# The other classes are never predicted, but they keep their part of the probability: the softmax is over all 1000.
SIXTEEN_CLASSES = replace(
    class_mapping("16 classes, mean probability", SIXTEEN, restricted=False, mean_probability=True), has_cues=True
)
LAION_C_CLASSES = class_mapping("16 superclasses, mean probability", LAION_C, restricted=False, mean_probability=True)


def outputs_advice(outputs: int) -> str:
    """Return advice for a network whose number of outputs is not ImageNet's."""
    if outputs == 1 + len(SYNSETS):
        return "if the first is a background class, evaluate lambda image: model(image)[:, 1:] from Python"
    return "use weights fine-tuned on ImageNet-1k, or a --suite of the model's own classes"


def check_classes(classes: Sequence[str] | None, outputs: int) -> None:
    """Raise DataError for a network whose outputs are not ImageNet's classes in their order.

    `classes` are the names it was trained with, None if unknown; names that are not WordNet ids cannot be compared and
    pass.
    """
    if outputs != len(SYNSETS):
        raise DataError(f"the model has {outputs} outputs, not ImageNet's {len(SYNSETS)}: {outputs_advice(outputs)}")
    names = list(classes or SYNSETS)
    if set(names) <= set(SYNSETS) and names != list(SYNSETS):
        at = next((i for i, (a, b) in enumerate(zip(names, SYNSETS, strict=False)) if a != b), len(names))
        raise DataError(
            f"class {at} of the model is {names[at] if at < len(names) else 'missing'}, ImageNet's is {SYNSETS[at]}: "
            "its class list is not ImageNet's in sorted order"
        )
