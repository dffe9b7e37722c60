"""ImageNet's classes, the parts of them that other benchmarks use, and how 1000 logits answer a benchmark's question.

Shapes: B batch, K = 1000 ImageNet classes in the order of their WordNet ids, L logits that count, C classes of the
benchmark. The lists and where they come from: mae_dat/robustness/suites/imagenet_classes.json.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_dat.config.errors import DataError

_LISTS = Path(__file__).parent / "imagenet_classes.json"
NO_CLASS = -1  # what a logit stands for that stands for none of a benchmark's classes


def _digest(words: Sequence[object], separator: str) -> str:
    """The first 16 digits of the sha256 of the joined words."""
    return hashlib.sha256(separator.join(map(str, words)).encode()).hexdigest()[:16]


def _read() -> dict[str, Any]:
    """The lists. One that was changed would shift every number by a little: an assertion, not a result."""
    found: dict[str, Any] = json.loads(_LISTS.read_text())
    assert _digest(found["synsets"], "\n") == "385e0240499426c0"
    assert _digest(found["imagenet_a"], ",") == "973e8c3e530bf5db"
    assert _digest(found["imagenet_r"], ",") == "a1d9a9ace3098120"
    return found


_FOUND = _read()
SYNSETS: tuple[str, ...] = tuple(_FOUND["synsets"])
"""The 1000 WordNet ids, sorted: their place is the class's number."""
IMAGENET_A: tuple[int, ...] = tuple(_FOUND["imagenet_a"])
"""The 200 classes of ImageNet-A; 86 of them are ImageNet-R's too."""
IMAGENET_R: tuple[int, ...] = tuple(_FOUND["imagenet_r"])
"""The 200 classes of ImageNet-R."""
SIXTEEN: dict[str, tuple[int, ...]] = {name: tuple(ids) for name, ids in _FOUND["sixteen"].items()}
"""The 16 categories of the cue-conflict pictures (Geirhos et al. 2019), and the 207 ImageNet classes in them."""


def synsets_of(classes: Sequence[int]) -> tuple[str, ...]:
    """The WordNet ids of classes."""
    return tuple(SYNSETS[i] for i in classes)


@dataclass(frozen=True, eq=False)
class Reading:
    """How the logits of a network with ImageNet's classes answer a benchmark's question; for other sets K is their own.

    The answer is what the highest of the logits that count stands for; `pooled`: the class whose members have the
    highest mean probability, as in Geirhos et al. 2019.
    """

    name: str
    """Part of a result's key: the same pictures read in two ways are two results."""
    classes: tuple[str, ...]
    """The benchmark's classes: what labels number."""
    counted: Tensor
    """int64 (L,): the logits that take part."""
    meaning: Tensor
    """int64 (L,): the benchmark's class that each of them stands for, or NO_CLASS."""
    pooled: bool = False
    outputs: int = len(SYNSETS)
    """K: ImageNet's, or of a set of other classes."""

    def to(self, device: torch.device | str) -> "Reading":
        """The same for logits on a device."""
        return replace(self, counted=self.counted.to(device), meaning=self.meaning.to(device))

    def answers(self, logits: Tensor, best: int = 1) -> Tensor:
        """The `best` first answers, int64 (B, best), from logits (B, K); fewer where there are fewer.

        NO_CLASS where a logit won that stands for none. Raises DataError for another K.
        """
        if self.pooled:
            return self.probabilities(logits).topk(min(best, len(self.classes)), dim=1).indices
        return self.meaning[self._counted(logits).topk(min(best, len(self.counted)), dim=1).indices]

    def probabilities(self, logits: Tensor) -> Tensor:
        """Float64 (B, C): softmax over the logits that count, summed over each class's members; `pooled`: their mean.

        Raises DataError for another K.
        """
        softmax = self._counted(logits.double()).softmax(1)
        member = (self.meaning[:, None] == torch.arange(len(self.classes), device=logits.device)).double()
        return softmax @ (member / member.sum(0) if self.pooled else member)

    def _counted(self, logits: Tensor) -> Tensor:
        """The logits that take part, (B, L)."""
        if logits.shape[1] != self.outputs:
            raise DataError(
                f"the network has {logits.shape[1]} outputs, {self.name} needs {self.outputs}; evaluate a network that "
                "was trained on these classes"
            )
        return logits[:, self.counted]


def reading(name: str, classes: Mapping[str, Sequence[int]], only_these: bool, pooled: bool = False) -> Reading:
    """`classes`: a benchmark's classes and the ImageNet classes of each; `only_these`: no other logit counts."""
    meaning = torch.full((len(SYNSETS),), NO_CLASS)
    for number, members in enumerate(classes.values()):
        meaning[list(members)] = number
    counted = torch.arange(len(SYNSETS))[(meaning != NO_CLASS) | (not only_these)]
    return Reading(name, tuple(classes), counted, meaning[counted], pooled)


def _part(name: str, classes: Sequence[int]) -> Reading:
    """Labels are ImageNet's numbers, and only some classes' logits count."""
    counted = torch.tensor(classes)
    return Reading(name, SYNSETS, counted, counted)


ALL_CLASSES = _part("1000 classes", range(len(SYNSETS)))
CLASSES_OF_A = _part("200 classes of ImageNet-A", IMAGENET_A)
CLASSES_OF_R = _part("200 classes of ImageNet-R", IMAGENET_R)
# Others' logits do not count in the answer, but they take their part of the probability: the softmax is over all 1000.
SIXTEEN_CLASSES = reading("16 classes, mean probability", SIXTEEN, only_these=False, pooled=True)


def outputs_advice(outputs: int) -> str:
    """What to do about a network of so many outputs, not ImageNet's."""
    if outputs == 1 + len(SYNSETS):
        return "where the first is a background class, evaluate lambda image: model(image)[:, 1:] from Python"
    return "give weights fine-tuned on ImageNet-1k, or name a --suite of the network's own classes"


def check_classes(classes: Sequence[str] | None, outputs: int) -> None:
    """Raises DataError for a network whose outputs are not ImageNet's classes in their order.

    `classes` are the names that it was trained with, None where nothing says; names other than WordNet ids cannot be
    compared and pass.
    """
    if outputs != len(SYNSETS):
        raise DataError(f"the network has {outputs} outputs, not ImageNet's {len(SYNSETS)}: {outputs_advice(outputs)}")
    names = list(classes or SYNSETS)
    if set(names) <= set(SYNSETS) and names != list(SYNSETS):
        at = next((i for i, (a, b) in enumerate(zip(names, SYNSETS, strict=False)) if a != b), len(names))
        raise DataError(
            f"class {at} of the network is {names[at] if at < len(names) else 'missing'}, ImageNet's is {SYNSETS[at]}: "
            "its class list is not ImageNet's in sorted order"
        )
