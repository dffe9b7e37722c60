"""Why discrete adversaries help, as Mao et al. 2022 explain it: `python -m mae_dat analysis --checkpoint A [B ...]
--data_path DIR --output_dir OUT`.

For each network, its own discrete and pixel adversaries on held-out pictures: how far the statistics inside the network
are from the clean pictures' (Fig. 2), how far its features, and what the perturbations look like (Fig. 3). Beside the
pixel attack at its usual strength stands one whose change is as long as the discrete one's, and noise of that length:
otherwise strengths would be compared, not kinds. Most of that length is the tokenizer's error, so there is also a pixel
attack that starts from Q(x) and goes as far from it as the discrete one. Writes analysis.json, analysis.html and
figures/*.png.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_dat.analysis.statistics import (
    Moments,
    correlations,
    distinct_colors,
    frechet_distance,
    norm_layers,
    power_spectrum,
    record_moments,
)
from mae_dat.analysis.why_dat_page import CLEAN_VIEW, VIEW_TITLES, write_page
from mae_dat.attacks.discrete import image_generator, reconstruct
from mae_dat.attacks.gradient import unit
from mae_dat.attacks.pixel import PixelAttack, pixel_adversary
from mae_dat.config.adversaries import AttackConfig
from mae_dat.config.errors import ConfigError, DataError
from mae_dat.config.groups import AugmentConfig
from mae_dat.config.parse import command_line, load_config, suggest
from mae_dat.data.folders import find_split
from mae_dat.data.image_set import ImageSet
from mae_dat.data.loader import batch_loader
from mae_dat.data.open import image_root, open_images
from mae_dat.data.sampler import evenly_spaced
from mae_dat.data.transforms import EvalTransform
from mae_dat.models.classifier import Classifier
from mae_dat.models.tokenizer import VisualTokenizer, load_tokenizer
from mae_dat.robustness.network import EvalOptions, EvaluatedNetwork
from mae_dat.robustness.open_networks import open_networks
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.device import pick_device
from mae_dat.runtime.seeds import step_generator
from mae_dat.storage.files import atomic_write, prepare_output_folder
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.dat import WithDAT

logger = logging.getLogger(__name__)

ANALYZED_VIEWS = tuple(view for view in VIEW_TITLES if view != CLEAN_VIEW)
HALVES = ("even", "odd")  # of the clean pictures, which tell how far apart two samples of the same kind are
_MIN_IMAGES = 4  # two in each half: the variance of one value is 0, and nothing correlates with that
DISCRETE = ("reconstruction", "random", "released", "symbolic")
MATCHED = ("pixel_length", "noise_length", "pixel_decoded")
SPECTRUM_BINS = 16
_GALLERY_IMAGES = 4  # pictures in the gallery of perturbations


@dataclasses.dataclass(frozen=True)
class AnalysisConfig:
    """Statistics of clean, discrete-adversarial and pixel-adversarial pictures."""

    checkpoint: tuple[str, ...] = ()
    """Classifiers: output folders, weights files or released names."""
    model: tuple[str, ...] = ()
    """The architecture where the file does not say, one for all or one each; with --pretrained timm's names."""
    pretrained: bool = False
    names: tuple[str, ...] = ()
    """What to call the networks (default: their folders)."""
    data_path: str | None = None
    """Folder with val/CLASS/*, or `demo` (default: the environment variable MAE_DAT_DATA)."""
    output_dir: str = "./output_analysis"
    limit: int | None = 256
    """Pictures, evenly spread (None: all)."""
    views: tuple[str, ...] = ANALYZED_VIEWS
    """Of the pictures: reconstruction, random, released, symbolic, pixel, pixel_length, noise_length,
    pixel_decoded."""
    share: float = 0.05
    """Of the words that the discrete adversaries change."""
    pixel_eps: float = 4 / 255
    """Linf radius of the pixel attack, pixels in [0, 1]."""
    pixel_steps: int = 10
    tokenizer: str = "embedded"
    batch_size: int = 32
    num_workers: int = 2
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for view in self.views:
            if view not in ANALYZED_VIEWS:
                raise ConfigError(f"--views: unknown view {view!r}: {suggest(view, ANALYZED_VIEWS)}")
        if set(MATCHED) & set(self.views) and "released" not in self.views:
            raise ConfigError(f"--views {', '.join(MATCHED)} need released, whose length they take.")
        if self.limit is not None and self.limit < _MIN_IMAGES:
            raise ConfigError(f"--limit must be at least {_MIN_IMAGES}, got {self.limit}.")


class ViewSums(NamedTuple):
    """What is gathered of one view of the pictures by one network."""

    layers: dict[str, Moments]
    features: list[Tensor]
    sums: dict[str, float]
    spectrum: Tensor


def analyze_network(
    contender: EvaluatedNetwork, images: ImageSet, config: AnalysisConfig, console: Console
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Analyze one network: its views in numbers (see `summarize_views`) and the first images of each view.

    Raises ConfigError for a network that is no `Classifier` or has no normalization layer, DataError for fewer than 4
    images.
    """
    network = contender.model
    if not isinstance(network, Classifier):
        raise ConfigError(f"{contender.name} is {contender.facts['architecture']}: its layers cannot be looked into.")
    layers, count = norm_layers(network), min(config.limit or len(images), len(images))
    if count < _MIN_IMAGES:
        raise DataError(f"{images.root} has {count} pictures: statistics of two halves take at least {_MIN_IMAGES}.")
    seen = {
        view: ViewSums({name: Moments() for name in layers}, [], {}, torch.zeros(SPECTRUM_BINS, dtype=torch.float64))
        for view in (CLEAN_VIEW, *HALVES, *config.views)
    }
    chosen = evenly_spaced(len(images), count)
    batches = [chosen[start : start + config.batch_size] for start in range(0, count, config.batch_size)]
    adversaries = AdversarialViews(network, load_tokenizer(config.tokenizer).to(contender.device), config)
    shown: dict[str, Tensor] = {}
    done = 0
    with console.task(f"analysis of {contender.name}", len(batches)) as task:
        for batch in batch_loader(images, batches, config.num_workers):
            image, label = batch["image"].to(contender.device), batch["label"].to(contender.device)
            views = adversaries.views(image, label, batch["index"].tolist())
            shown = shown or {view: picture[:_GALLERY_IMAGES].cpu() for view, (picture, _) in views.items()}
            for view, (picture, own) in views.items():
                _look(network, layers, seen[view], picture, image, label)
                _add(seen[view].sums, {name: value * len(image) for name, value in own.items()})
            for place, half in enumerate(HALVES):
                start = (place + done) % 2
                if len(one := image[start::2]):
                    _look(network, layers, seen[half], one, one, label[start::2])
            done += len(image)
            task.advance("")
    return {"name": contender.name, "facts": contender.facts, **summarize_views(seen, len(layers))}, shown


class AdversarialViews:
    """The views of a batch of pictures, (B, 3, H, W) in [0, 1], made against one network."""

    def __init__(self, network: Classifier, tokenizer: VisualTokenizer, config: AnalysisConfig) -> None:
        self.network, self.tokenizer, self.config = network, tokenizer, config
        self.classes = int(network.net.num_classes)  # type: ignore[arg-type]
        judge = Classification(AugmentConfig(smoothing=0.0), self.classes)
        self.attacks = {
            kind: WithDAT(judge, tokenizer, AttackConfig(kind, share=config.share))  # type: ignore[arg-type]
            for kind in DISCRETE
            if kind in config.views
        }

    def views(self, image: Tensor, label: Tensor, indices: list[int]) -> dict[str, tuple[Tensor, dict[str, float]]]:
        """Each view, with what is known of it besides as means over the batch: of discrete ones `words`, the share
        that changed, and `length_decoded`, of the change from Q(x). The clean pictures come first."""
        found: dict[str, tuple[Tensor, dict[str, float]]] = {CLEAN_VIEW: (image, {})}
        target = F.one_hot(label, self.classes).float()
        decoded = reconstruct(self.tokenizer, image)
        for kind, attack in self.attacks.items():
            generator = step_generator(self.config.seed, indices[0], 0, image.device)
            result = attack.adversary(self.network, image, target, generator)
            length = float(l2_lengths(result.adversarial - decoded).mean())
            found[kind] = (result.adversarial, {"words": float(result.changed_share), "length_decoded": length})
        eps, steps = self.config.pixel_eps, self.config.pixel_steps
        asked = self.config.views
        if "pixel" in asked:
            usual = PixelAttack(eps, 2.5 * eps / steps, steps, random_start=True)
            found["pixel"] = (self._pixel(image, label, usual, indices), {})
        if "released" in found:
            changed = found["released"][0]
            length_B111 = l2_lengths(changed - image)
            if "pixel_length" in asked:
                found["pixel_length"] = (self._as_long(image, label, length_B111, indices), {})
            if "noise_length" in asked:
                noise = torch.stack([torch.randn(image.shape[1:], generator=one) for one in self._chance(indices)])
                found["noise_length"] = ((image + length_B111 * unit(noise.to(image.device))).clamp(0, 1), {})
            if "pixel_decoded" in asked:
                view = self._as_long(decoded, label, l2_lengths(changed - decoded), indices)
                found["pixel_decoded"] = (view, {"length_decoded": float(l2_lengths(view - decoded).mean())})
        return {view: found[view] for view in (CLEAN_VIEW, *ANALYZED_VIEWS) if view in found}

    def _pixel(self, image: Tensor, label: Tensor, attack: PixelAttack, indices: list[int]) -> Tensor:
        return pixel_adversary(self.network, image, label, attack, self._chance(indices))

    def _as_long(self, image: Tensor, label: Tensor, length_B111: Tensor, indices: list[int]) -> Tensor:
        """The L2 attack in the ball of the longest, then each picture's change drawn in to its own length."""
        longest, steps = float(length_B111.max()), self.config.pixel_steps
        attack = PixelAttack(longest, 2.5 * longest / steps, steps, "l2", random_start=True)
        delta = self._pixel(image, label, attack, indices) - image
        return (image + delta * (length_B111 / l2_lengths(delta)).clamp(max=1)).clamp(0, 1)

    def _chance(self, indices: list[int]) -> list[torch.Generator]:
        return [image_generator(self.config.seed, index) for index in indices]


def l2_lengths(delta: Tensor) -> Tensor:
    """L2 norms of perturbations (B, C, H, W), (B, 1, 1, 1)."""
    return torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)


@torch.no_grad()
def _look(
    network: Classifier, layers: dict[str, nn.Module], seen: ViewSums, picture: Tensor, clean: Tensor, label: Tensor
) -> None:
    """Adds a view's statistics, features, answers and looks."""
    with record_moments(layers, seen.layers):
        logits = network(picture).float()
    seen.features.append(network.features(picture).float().cpu())
    delta = picture - clean
    numbers = {
        "correct": logits.argmax(1) == label,
        "loss": F.cross_entropy(logits, label, reduction="none"),
        "length": l2_lengths(delta),
        "largest": delta.flatten(1).abs().amax(1),
        "colors": distinct_colors(picture),
    }
    _add(seen.sums, {"images": len(picture), **{name: float(value.sum()) for name, value in numbers.items()}})
    seen.spectrum.add_(len(picture) * power_spectrum(delta, SPECTRUM_BINS).cpu())


def _add(sums: dict[str, float], more: dict[str, float]) -> None:
    """Adds numbers to those of the same name."""
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + value


def summarize_views(seen: dict[str, ViewSums], layers: int) -> dict[str, Any]:
    """Means over the pictures of each view (`length`: L2 from the clean picture, `length_decoded` from Q(x), `largest`:
    Linf, of pixels in [0, 1]; `words`: share changed), the correlations of Fig. 2 layer by layer and their means, and
    the Frechet distance of its features from the clean ones. `halves` holds the correlations between two halves of the
    clean pictures."""
    found: dict[str, Any] = {}
    for view in (CLEAN_VIEW, *(name for name in ANALYZED_VIEWS if name in seen)):
        one = seen[view]
        images = one.sums["images"]
        means = {name: value / images for name, value in one.sums.items() if name != "images"}
        found[view] = {"images": int(images), **means}
        if view != CLEAN_VIEW:
            found[view] |= mean_correlations(seen[CLEAN_VIEW].layers, one.layers)
            found[view]["frechet"] = frechet_distance(torch.cat(seen[CLEAN_VIEW].features), torch.cat(one.features))
            found[view]["spectrum"] = (one.spectrum / images).tolist()
    first, second = (seen[half].layers for half in HALVES)
    return {"views": found, "halves": mean_correlations(first, second), "layers": layers}


def mean_correlations(clean: dict[str, Moments], other: dict[str, Moments]) -> dict[str, Any]:
    """Pearson's r layer by layer, and the means over the layers; None where a layer's channels are all alike, which
    leaves the layer out of the mean. Raises ConfigError where that leaves none."""
    by_layer = correlations(clean, other)
    means = {}
    for key in ("mean", "variance"):
        known = [one[key] for one in by_layer.values() if not math.isnan(one[key])]
        if not known:
            raise ConfigError(f"no layer has channels that differ by their {key}: there is nothing to correlate.")
        means[key] = sum(known) / len(known)
    named = {name: {key: None if math.isnan(r) else r for key, r in one.items()} for name, one in by_layer.items()}
    return {"correlation_mean": means["mean"], "correlation_variance": means["variance"], "by_layer": named}


def main(arguments: Sequence[str]) -> None:
    """Run the command with its arguments."""
    console = console_for_command()
    config = load_config(AnalysisConfig, arguments, __doc__ or "")
    device = pick_device(config.device)
    opened = open_networks(config.checkpoint, config.model, config.pretrained, config.names, EvalOptions(device))
    root = find_split(image_root(config.data_path), "val")
    networks, shown = [], {}
    for contender in opened:
        classes = list(contender.classes) if contender.classes else None
        seen = contender.facts
        transform = EvalTransform(contender.size, seen["interpolation"], seen.get("crop"))
        images = open_images(root, transform, classes=classes)
        facts, pictures = analyze_network(contender, images, config, console)
        networks.append(facts)
        shown[contender.name] = pictures
    results = {"command": command_line(), "settings": dataclasses.asdict(config), "networks": networks}
    output = prepare_output_folder(Path(config.output_dir))
    with atomic_write(output / "analysis.json") as file:
        file.write((json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    logger.info("wrote %s", write_page(results, shown, output))
