"""Pictures on which two networks differ, for a report: what each answers, and the picture as its words tell it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mae_dat.data.gallery import save_png
from mae_dat.data.sampler import evenly_spaced
from mae_dat.models.modes import evaluation_mode
from mae_dat.robustness.measure import ImagePass, PassImages
from mae_dat.robustness.plan import Plan, SuiteRun
from mae_dat.robustness.suites.imagenet import NO_CLASS
from mae_dat.runtime.watchdog import heartbeat

SHOWN, LOOKED_AT = 8, 128
SHOWN_CORRUPTIONS = ("gaussian_noise", "glass_blur", "fog", "pixelate")
SHOWN_SEVERITY = 3


@torch.no_grad()
def write_examples(plan: Plan, pair: tuple[str, str], folder: Path | None) -> list[dict[str, Any]]:
    """Up to 8 pictures, as PNG below `folder`, on which two networks differ, one rightly.

    For each cell one of either kind, of 128 pictures that are evenly spread. Without a folder nothing is written, which
    is for the other ranks: they look along, because one that waits would seem to hang. Raises StorageError.
    """
    examples: list[dict[str, Any]] = []
    for entries, portion, row in _cells(plan, pair):
        cell = portion.cells[row]
        for image, label, answers in _differing(entries, portion, row):
            if len(examples) == SHOWN:
                return examples
            file = f"examples/{len(examples) + 1}.png"
            _save(image, folder, file)
            suite = entries[0].suite.name
            examples.append({"file": file, "suite": suite, "cell": cell, "label": label, "answers": answers})
            if plan.sources.has_tokenizer:
                words = f"examples/{len(examples)}-words.png"
                tokenizer = plan.sources.tokenizer
                decoded = tokenizer.decode(tokenizer.encode(image[None].to(tokenizer.codebook.device)))
                _save(decoded[0].cpu(), folder, words)
                examples[-1]["words"] = words
    return examples


def _save(image: Tensor, folder: Path | None, file: str) -> None:
    if folder:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        save_png(image, folder / file)


def _cells(plan: Plan, pair: tuple[str, str]) -> Iterator[tuple[list[SuiteRun], ImagePass, int]]:
    """Cells to look at, corrupted ones first: the two networks' entries, the portion, the row in it."""
    for corrupted in (True, False):
        for name in plan.suite_names:
            own = {entry.network.name: entry for entry in plan.runs_of(name)}
            entries = [own[one] for one in pair if one in own]
            if len(entries) < 2 or len({entry.suite.preprocessing for entry in entries}) > 1:
                continue
            for portion in entries[0].suite.passes:
                for row, cell in enumerate(portion.cells):
                    corruption, _, severity = cell.partition("/")
                    wanted = corruption in SHOWN_CORRUPTIONS and severity == str(SHOWN_SEVERITY)
                    attacked = portion.adversary or portion.word_hits
                    plain = cell == "" and not portion.images.class_mapping.mean_probability
                    if not attacked and (wanted if corrupted else plain):
                        yield entries, portion, row


def _differing(entries: list[SuiteRun], portion: ImagePass, row: int) -> Iterator[tuple[Tensor, str, dict[str, str]]]:
    """A picture (3, H, W) that the first network alone has right, and one that the second has, with their answers."""
    pictures, made = portion.images, PassImages([portion])
    chosen = evenly_spaced(len(pictures), LOOKED_AT)
    image = torch.stack([_heard(made[0, index]["images"][row]) for index in chosen]).float() / 255
    index = torch.tensor(chosen)
    answers, right = [], []
    with evaluation_mode(*(entry.network.model for entry in entries)):
        for entry in entries:
            network, device = entry.network.model, entry.network.device
            logits = torch.cat([_heard(network(part.to(device)).float().cpu()) for part in image.split(16)])
            answers.append(pictures.class_mapping.predictions(logits))
            right.append(pictures.is_correct(answers[-1], index))
    for one, other in ((0, 1), (1, 0)):
        for at in (right[one] & ~right[other]).nonzero().flatten().tolist()[:1]:
            said = {
                e.network.name: _said(pictures.classes, int(a[at, 0])) for e, a in zip(entries, answers, strict=True)
            }
            yield image[at], _said(pictures.classes, int(answers[one][at, 0])), said


def _heard(found: Tensor) -> Tensor:
    """The same, once the watchdog knows of it."""
    heartbeat()
    return found


def _said(classes: list[str], answer: int) -> str:
    return "no class of the set" if answer == NO_CLASS else classes[answer]
