"""What an eps means: share of visual words that a step of that L2 length changes, how exact the words are, and what
equally many changed words do to loss and accuracy when they are chosen by an attack or at random.

`python benchmarks/strength.py OUT --data_path DIR [--tokenizer NAME]` with OUT a fine-tuned classifier; without
OUT only how exact the words are, in each precision.
"""

import argparse
import copy
import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_dat.attacks.discrete import DiscreteAdversary, discrete_adversary
from mae_dat.attacks.gradient import unit
from mae_dat.attacks.share_controller import ShareController
from mae_dat.attacks.word_budget import WORD_ATTACK_KINDS, WordAttack, word_hits
from mae_dat.config.adversaries import AttackConfig
from mae_dat.config.groups import DataConfig
from mae_dat.data.image_set import ImageFolder
from mae_dat.data.transforms import EvalTransform
from mae_dat.models.tokenizer import VisualTokenizer, in_precision, load_tokenizer, share_changed
from mae_dat.models.tokenizer.precision import PRECISIONS, agreement
from mae_dat.models.weights.open import open_model
from mae_dat.training.finetune import validation_images

RADII = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
PRECISION_RADII = (0.1, 2.0)
SHARES = (0.01, 0.05, 0.15)
SEEDS = range(5)  # of the random words: all other attacks are without chance here
ATTACKS = {
    "random words": AttackConfig("random"),
    "random among the 32 nearest": AttackConfig("random", nearest=32),
    "Algorithm 1": AttackConfig("paper"),
    "DAT": AttackConfig("released", random_start=0.0),
    "symbolic": AttackConfig("symbolic"),
    "symbolic, 4 steps": AttackConfig("symbolic", steps=4),
    "symbolic, 32 nearest": AttackConfig("symbolic", nearest=32),
    "symbolic, 32 nearest, 4 steps": AttackConfig("symbolic", nearest=32, steps=4),
    "DAT, 10 steps": AttackConfig("released", random_start=0.0, steps=10),
}


@torch.no_grad()
def print_exactness(tokenizer: VisualTokenizer, image: Tensor, delta: Tensor) -> None:
    """Prints PSNR, drift of the words under reconstruction, and what 16 bits do to the words and to those that steps of
    two lengths along `delta` change."""
    words, reconstruction = tokenizer.encode(image), tokenizer.reconstruct(image)
    psnr = (-10 * (reconstruction - image).square().mean((1, 2, 3)).log10()).mean()
    drift = share_changed(words, tokenizer.encode(reconstruction))
    print(f"PSNR {psnr:.2f} dB; words of Q(x) that are not those of x {drift:.2%}")
    print("\nprecision      eps   words that differ   changed by a step (fp32)   same places (same Q(x))   gray levels")
    for name in PRECISIONS:
        fast = in_precision(copy.deepcopy(tokenizer), image.device, name)
        for eps in PRECISION_RADII:
            found = agreement(tokenizer, fast, image, eps * delta)
            print(
                f"{name:12} {eps:5.2f} {found.flips:19.2%} {found.fast_changes:16.2%} ({found.exact_changes:.2%})"
                f" {found.overlap:17.0%} ({found.overlap_same_image:.0%}) {255 * found.pixels:16.3f}"
            )
    print()


def attacked(attack: AttackConfig, share: float, run: Callable[[AttackConfig], DiscreteAdversary]) -> DiscreteAdversary:
    """The adversary that changes this share of the words."""
    attack = dataclasses.replace(attack, share=share)
    if not attack.moves_pixels:
        return run(attack)
    controller = ShareController(attack)
    controller.find(lambda eps: float(run(dataclasses.replace(attack, eps=eps)).changed_share))
    return run(controller.apply(attack))


def damage(model: nn.Module, image: Tensor, label: Tensor, tokenizer: VisualTokenizer) -> None:
    """Prints loss and accuracy of images, of their reconstructions and of adversaries with equally many changed
    words; of random ones mean and deviation over seeds."""

    def loss_of(view: Tensor) -> Tensor:
        return F.cross_entropy(model(view), label)

    def effect(view: Tensor) -> tuple[float, float]:
        with torch.no_grad():
            logits = model(view)
        return F.cross_entropy(logits, label).item(), (logits.argmax(1) == label).float().mean().item()

    with torch.no_grad():
        views = {"pictures": image, "reconstructions": tokenizer.reconstruct(image)}
    print(
        "\n" + "; ".join("{}: loss {:.3f}, accuracy {:.1%}".format(name, *effect(one)) for name, one in views.items())
    )
    print(f"{'words changed':30}" + "".join(f"{share:>26.0%}" for share in SHARES))
    for name, attack in ATTACKS.items():
        cells = []
        for share in SHARES:
            effects = []
            for seed in SEEDS if attack.kind == "random" else (0,):
                source = torch.Generator().manual_seed(seed)
                found = attacked(attack, share, lambda one: discrete_adversary(image, loss_of, tokenizer, one, source))  # noqa: B023
                effects.append(effect(found.adversarial))
            losses, accuracies = zip(*effects, strict=True)
            spread = f" +- {statistics.stdev(losses):.3f}" if len(losses) > 1 else " " * 9
            cells.append(f"{statistics.mean(losses):8.3f}{spread}{statistics.mean(accuracies):9.1%}")
        print(f"{name:30}" + "".join(cells))


def curves(model: nn.Module, image: Tensor, label: Tensor, tokenizer: VisualTokenizer) -> None:
    """Prints the accuracy when up to a share of the words are changed (mae_dat.attacks.word_budget)."""
    attack, index = WordAttack(), torch.arange(len(image))
    print(f"\n{'right with up to so many words':30}" + "".join(f"{share:>8.0%}" for share in attack.shares))
    for kind in WORD_ATTACK_KINDS:
        hits = word_hits(model, tokenizer, image, label, index, kind, attack).float().mean(1)
        print(f"{kind:30}" + "".join(f"{share:>8.1%}" for share in hits.tolist()))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classifier", type=Path, nargs="?", help="output folder of a fine-tuning")
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--tokenizer", default="embedded")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--input_size", type=int, default=224, help="without a classifier: pixels along a side")
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    if options.classifier is None:
        side = options.input_size
        folder = ImageFolder(Path(options.data_path), EvalTransform((side, side)), labeled=False)
        image = torch.stack([folder[index * len(folder) // options.images]["image"] for index in range(options.images)])
        print_exactness(tokenizer, image, unit(torch.randn(image.shape, generator=torch.Generator().manual_seed(0))))
        return
    opened = open_model(options.classifier)
    data = DataConfig(data_path=options.data_path, input_size=opened.input_size, in_chans=opened.plan.in_chans)
    images = validation_images(data, opened.classes)
    model = opened.classifier()
    chosen = [images[index * len(images) // options.images] for index in range(options.images)]
    image = torch.stack([one["image"] for one in chosen])
    label = torch.tensor([one["label"] for one in chosen])
    with torch.no_grad():
        reconstruction = tokenizer.reconstruct(image)
        words = tokenizer.encode(reconstruction)
    generator = torch.Generator().manual_seed(0)
    direction = unit(torch.randn(image.shape, generator=generator))
    print_exactness(tokenizer, image, direction)
    print("   eps   changed by the attack   by a random direction   RMS in gray levels of 255")
    for eps in RADII:
        attack = AttackConfig("released", eps, random_start=0.0)
        found = discrete_adversary(image, lambda x: F.cross_entropy(model(x), label), tokenizer, attack, generator)
        with torch.no_grad():
            moved = share_changed(words, tokenizer.encode((reconstruction + eps * direction).clamp(0, 1)))
        level = 255 * eps / image[0].numel() ** 0.5
        print(f"{eps:6.2f} {found.exact_changes_share:23.2%} {moved:23.2%} {level:27.2f}")
    damage(model, image, label, tokenizer)
    curves(model, image, label, tokenizer)


if __name__ == "__main__":
    main()
