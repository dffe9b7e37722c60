"""Measure why discrete adversaries help, following the explanation of Mao et al. 2022.

`mae-dat analyze --checkpoint A [B ...] --data_path DIR --output_dir OUT` attacks each network with discrete and pixel
adversaries on held-out images. It measures how far the statistics inside the network are from those of the clean images
(Fig. 2), the distance of its features, and the appearance of the perturbations (Fig. 3).

The pixel attack at its usual strength and DAT differ in strength as well as in kind. To compare only the kind, there
are also a pixel attack with the L2 length of DAT's change, and noise of that length. Since most of DAT's length is the
tokenizer's reconstruction error, another pixel attack starts from the reconstruction Q(x) and has the length of DAT's
change from it. Writes analysis.json, analysis.html and figures/*.png.
"""

import dataclasses
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_dat.analysis.analyze_page import CLEAN_VIEW, write_page
from mae_dat.analysis.statistics import (
    Moments,
    correlations,
    distinct_colors,
    frechet_distance,
    norm_layers,
    power_spectrum,
    record_moments,
)
from mae_dat.attacks.discrete import image_generator, reconstruct
from mae_dat.attacks.gradient import unit
from mae_dat.attacks.pixel import PixelAttack, pixel_adversary
from mae_dat.config.adversaries import AttackConfig
from mae_dat.config.commands.analyze import ANALYZED_VIEWS, MIN_ANALYZED_IMAGES, AnalyzeConfig
from mae_dat.config.errors import ConfigError, DataError
from mae_dat.config.groups import AugmentConfig
from mae_dat.config.parse import command_line
from mae_dat.data.class_names import given_class_names
from mae_dat.data.describe import add_images, describe_resize
from mae_dat.data.folders import find_evaluation_images
from mae_dat.data.image_set import ImageSet
from mae_dat.data.loader import batch_loader, worker_count
from mae_dat.data.open import image_root, open_images_of_model
from mae_dat.data.sampler import evenly_spaced
from mae_dat.data.transforms import EvalTransform
from mae_dat.models.classifier import Classifier
from mae_dat.models.describe import describe_tokenizer
from mae_dat.models.tokenizer import VisualTokenizer, load_tokenizer
from mae_dat.robustness.describe import add_network_pixels, add_networks
from mae_dat.robustness.network import EvalOptions, EvaluatedNetwork
from mae_dat.robustness.open_networks import open_networks
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.device import describe_device, pick_device
from mae_dat.runtime.inputs import INPUTS_FILE, InputSummary, count_of
from mae_dat.runtime.seeds import step_generator
from mae_dat.storage.files import atomic_write, prepare_output_folder
from mae_dat.training.objectives.classification import Classification
from mae_dat.training.objectives.dat import WithDAT

logger = logging.getLogger(__name__)

_HALVES = ("even", "odd")  # of the clean images, to compare two samples of the same distribution
_DISCRETE = ("reconstruction", "random", "released", "symbolic")
_SPECTRUM_BINS = 16
_GALLERY_IMAGES = 4  # in the gallery of perturbations


@dataclasses.dataclass
class ViewStatistics:
    """Statistics of one view of the images in one network, accumulated over batches."""

    moments: dict[str, Moments]
    """The moments of each layer's inputs."""
    features: list[Tensor]
    sums: dict[str, float]
    """The sum of each number over the images, by name."""
    spectrum: Tensor
    """Sum of the power spectra of the changes, (bins,)."""

    @classmethod
    def of_layers(cls, layers: Iterable[str]) -> Self:
        """Return empty statistics of these layers."""
        return cls({name: Moments() for name in layers}, [], {}, torch.zeros(_SPECTRUM_BINS, dtype=torch.float64))

    @torch.no_grad()
    def add_batch(
        self, model: Classifier, layers: dict[str, nn.Module], image: Tensor, clean: Tensor, label: Tensor
    ) -> None:
        """Add a batch of the view (B, 3, H, W), made from the images `clean` with classes `label` (B,)."""
        with record_moments(layers, self.moments):
            logits = model(image).float()
        self.features.append(model.features(image).float().cpu())
        delta = image - clean
        numbers = {
            "correct": logits.argmax(1) == label,
            "loss": F.cross_entropy(logits, label, reduction="none"),
            "length": l2_lengths(delta),
            "largest": delta.flatten(1).abs().amax(1),
            "colors": distinct_colors(image),
        }
        self.add_sums({"images": len(image), **{name: float(value.sum()) for name, value in numbers.items()}})
        self.spectrum.add_(len(image) * power_spectrum(delta, _SPECTRUM_BINS).cpu())

    def add_sums(self, numbers: Mapping[str, float]) -> None:
        """Add numbers, each summed over a batch, to those of the same name."""
        for name, value in numbers.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> dict[str, Any]:
        """Return the count `images` and the means over them."""
        images = self.sums["images"]
        means = {name: value / images for name, value in self.sums.items() if name != "images"}
        return {"images": int(images), **means}


def analyze_network(
    network: EvaluatedNetwork, images: ImageSet, config: AnalyzeConfig, console: Console
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Analyze one network: its views in numbers (see `summarize_views`) and the first images of each view.

    Raises ConfigError for a network that is not a `Classifier` or has no normalization layer, DataError for fewer than
    4 images.
    """
    model = network.model
    if not isinstance(model, Classifier):
        raise ConfigError(f"{network.name} is {network.facts['architecture']}: its layers are not accessible.")
    layers, count = norm_layers(model), min(config.limit or len(images), len(images))
    if count < MIN_ANALYZED_IMAGES:
        raise DataError(
            f"{images.root} has {count_of(count, 'image')}: the statistics of two halves need at least "
            f"{MIN_ANALYZED_IMAGES}."
        )
    statistics = {view: ViewStatistics.of_layers(layers) for view in (CLEAN_VIEW, *_HALVES, *config.views)}
    indices = evenly_spaced(len(images), count)
    batches = [indices[start : start + config.batch_size] for start in range(0, count, config.batch_size)]
    attacks = AdversarialViews(model, load_tokenizer(config.tokenizer).to(network.device), config)
    examples: dict[str, Tensor] = {}
    position = 0
    with console.task(f"analysis of {network.name}", len(batches)) as task:
        for batch in batch_loader(images, batches, config.num_workers):
            clean, label = batch["image"].to(network.device), batch["label"].to(network.device)
            views = attacks.make_views(clean, label, batch["index"].tolist())
            examples = examples or {view: image[:_GALLERY_IMAGES].cpu() for view, (image, _) in views.items()}
            for view, (image, means) in views.items():
                statistics[view].add_batch(model, layers, image, clean=clean, label=label)
                statistics[view].add_sums({name: mean * len(clean) for name, mean in means.items()})
            for offset, half in enumerate(_HALVES):
                rows = slice((offset + position) % 2, None, 2)  # every other image of the whole set, not of the batch
                if len(clean[rows]):
                    statistics[half].add_batch(model, layers, clean[rows], clean=clean[rows], label=label[rows])
            position += len(clean)
            task.advance("")
    return {"name": network.name, "facts": network.facts, **summarize_views(statistics, len(layers))}, examples


class AdversarialViews:
    """Make the views of a batch of images (B, 3, H, W) in [0, 1], attacking one network."""

    def __init__(self, model: Classifier, tokenizer: VisualTokenizer, config: AnalyzeConfig) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.num_classes = int(model.net.num_classes)  # type: ignore[arg-type]
        objective = Classification(AugmentConfig(smoothing=0.0), self.num_classes)
        self.attacks = {
            kind: WithDAT(tokenizer, AttackConfig(kind, share=config.share), objective)  # type: ignore[arg-type]
            for kind in _DISCRETE
            if kind in config.views
        }

    def make_views(
        self, image: Tensor, label: Tensor, indices: list[int]
    ) -> dict[str, tuple[Tensor, dict[str, float]]]:
        """Make each view (B, 3, H, W), and further numbers as means over the batch; the clean images come first.

        Numbers of discrete views: `words`, the share of changed words, and `length_decoded`, of the change from Q(x).
        `indices` are those of the images in their set, which seed the attacks.
        """
        views: dict[str, tuple[Tensor, dict[str, float]]] = {CLEAN_VIEW: (image, {})}
        target = F.one_hot(label, self.num_classes).float()
        decoded = reconstruct(self.tokenizer, image)
        for kind, attack in self.attacks.items():
            generator = step_generator(self.config.seed, indices[0], 0, image.device)
            adversary = attack.adversary(self.model, image, target, generator)
            length = float(l2_lengths(adversary.adversarial - decoded).mean())
            numbers = {"words": float(adversary.changed_share), "length_decoded": length}
            views[kind] = (adversary.adversarial, numbers)
        eps, steps = self.config.pixel_eps, self.config.pixel_steps
        if "pixel" in self.config.views:
            attack_at_eps = PixelAttack(eps, 2.5 * eps / steps, steps, random_start=True)
            views["pixel"] = (self._pixel_attack(image, label, attack_at_eps, indices), {})
        if "released" in views:
            views |= self._matched_views(image, label, indices, decoded=decoded, dat=views["released"][0])
        return {view: views[view] for view in (CLEAN_VIEW, *ANALYZED_VIEWS) if view in views}

    def _matched_views(
        self, image: Tensor, label: Tensor, indices: list[int], *, decoded: Tensor, dat: Tensor
    ) -> dict[str, tuple[Tensor, dict[str, float]]]:
        """Make the views whose change has the L2 length of the change of `dat`, DAT's adversary."""
        views: dict[str, tuple[Tensor, dict[str, float]]] = {}
        length_B111 = l2_lengths(dat - image)
        if "pixel_length" in self.config.views:
            views["pixel_length"] = (self._pixel_attack_of_length(image, label, length_B111, indices), {})
        if "noise_length" in self.config.views:
            noise = torch.stack(
                [torch.randn(image.shape[1:], generator=chance) for chance in self._generators(indices)]
            )
            views["noise_length"] = ((image + length_B111 * unit(noise.to(image.device))).clamp(0, 1), {})
        if "pixel_decoded" in self.config.views:
            view = self._pixel_attack_of_length(decoded, label, l2_lengths(dat - decoded), indices)
            views["pixel_decoded"] = (view, {"length_decoded": float(l2_lengths(view - decoded).mean())})
        return views

    def _pixel_attack(self, image: Tensor, label: Tensor, attack: PixelAttack, indices: list[int]) -> Tensor:
        return pixel_adversary(self.model, image, label, attack=attack, generators=self._generators(indices))

    def _pixel_attack_of_length(self, image: Tensor, label: Tensor, length_B111: Tensor, indices: list[int]) -> Tensor:
        """Attack in the L2 ball of the batch's greatest length, then shorten each image's change to its length."""
        longest, steps = float(length_B111.max()), self.config.pixel_steps
        attack = PixelAttack(longest, 2.5 * longest / steps, steps, "l2", random_start=True)
        delta = self._pixel_attack(image, label, attack, indices) - image
        return (image + delta * (length_B111 / l2_lengths(delta)).clamp(max=1)).clamp(0, 1)

    def _generators(self, indices: list[int]) -> list[torch.Generator]:
        return [image_generator(self.config.seed, index) for index in indices]


def l2_lengths(delta: Tensor) -> Tensor:
    """Compute the L2 norms (B, 1, 1, 1) of perturbations (B, C, H, W)."""
    return torch.linalg.vector_norm(delta, dim=(1, 2, 3), keepdim=True)


def summarize_views(statistics: dict[str, ViewStatistics], layers: int) -> dict[str, Any]:
    """Return the numbers of every view, and in `halves` the correlations between two halves of the clean images.

    A view has means over its images (`length`: L2 distance from the clean image, `length_decoded` from Q(x), `largest`:
    Linf, of pixels in [0, 1]; `words`: share of changed words), the correlations of Fig. 2 layer by layer and their
    means, and the Frechet distance of its features from the clean ones.
    """
    views: dict[str, Any] = {}
    clean = statistics[CLEAN_VIEW]
    for view in (CLEAN_VIEW, *(name for name in ANALYZED_VIEWS if name in statistics)):
        current = statistics[view]
        views[view] = current.means()
        if view != CLEAN_VIEW:
            views[view] |= mean_correlations(clean.moments, current.moments)
            views[view]["frechet"] = frechet_distance(torch.cat(clean.features), torch.cat(current.features))
            views[view]["spectrum"] = (current.spectrum / current.sums["images"]).tolist()
    even, odd = (statistics[half].moments for half in _HALVES)
    return {"views": views, "halves": mean_correlations(even, odd), "layers": layers}


def mean_correlations(clean: dict[str, Moments], other: dict[str, Moments]) -> dict[str, Any]:
    """Compute Pearson's r layer by layer, and the means over the layers.

    r is None for a layer whose channels are all equal, and the means exclude such layers. Raises ConfigError if no
    layer remains.
    """
    by_layer = correlations(clean, other)
    means = {}
    for moment in ("mean", "variance"):
        defined = [r[moment] for r in by_layer.values() if not math.isnan(r[moment])]
        if not defined:
            raise ConfigError(f"the channels of every layer have the same {moment}: there is nothing to correlate.")
        means[moment] = sum(defined) / len(defined)
    # JSON has no nan.
    json_by_layer = {
        name: {moment: None if math.isnan(r) else r for moment, r in layer.items()} for name, layer in by_layer.items()
    }
    return {"correlation_mean": means["mean"], "correlation_variance": means["variance"], "by_layer": json_by_layer}


def _transform(network: EvaluatedNetwork) -> EvalTransform:
    return EvalTransform(network.size, network.facts["interpolation"], network.facts.get("crop"))


def _open_images(root: Path, network: EvaluatedNetwork, config: AnalyzeConfig) -> ImageSet:
    """Open the class folders for a network. Raises UserError."""
    classes = given_class_names(config.classes, network.outputs, network.name) or network.classes
    return open_images_of_model(root, _transform(network), network.outputs, classes, order=config.class_order)


def analysis_inputs(
    config: AnalyzeConfig, networks: Sequence[EvaluatedNetwork], images: ImageSet, device: torch.device
) -> InputSummary:
    """Return the summary of what an analysis reads."""
    inputs = InputSummary(config.verb)
    add_images(inputs, config.data_path, image_root(config.data_path), {"validation": images})
    if config.limit is not None and config.limit < len(images):
        inputs.add("validation", f"{config.limit:,} of them, evenly spaced")
    add_networks(inputs, networks)
    add_network_pixels(inputs, [(network, describe_resize(_transform(network))) for network in networks])
    inputs.add("tokenizer", describe_tokenizer(config.tokenizer, load_tokenizer(config.tokenizer)))
    inputs.add("adversary", f"{', '.join(config.views)}; {100 * config.share:g} % of the words")
    inputs.add("device", describe_device(device, None, worker_count(config.num_workers)))
    inputs.add("output", str(Path(config.output_dir).absolute()))
    return inputs


def main(config: AnalyzeConfig) -> None:
    """Run the command."""
    console = console_for_command()
    device = pick_device(config.device)
    evaluated = open_networks(
        config.checkpoint,
        models=config.model,
        pretrained=config.pretrained,
        names=config.names,
        options=EvalOptions(device),
    )
    root = find_evaluation_images(image_root(config.data_path))
    sets = [_open_images(root, network, config) for network in evaluated]
    output = prepare_output_folder(Path(config.output_dir))
    inputs = analysis_inputs(config, evaluated, sets[0], device)
    console.report_inputs(inputs, output / INPUTS_FILE)
    networks, examples = [], {}
    for network, images in zip(evaluated, sets, strict=True):
        numbers, examples[network.name] = analyze_network(network, images, config, console)
        networks.append(numbers)
    results = {"command": command_line(), "settings": dataclasses.asdict(config), "networks": networks}
    with atomic_write(output / "analysis.json") as file:
        file.write((json.dumps(results, indent=1, allow_nan=False) + "\n").encode())
    logger.info("wrote %s", write_page(results, examples, output))
