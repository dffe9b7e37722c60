"""What an eps means: share of visual words that a step of that L2 length changes, how exact the words are, and what
equally many changed words do to the loss when they are chosen by an attack or at random.

`python benchmarks/strength.py OUT --data_path DIR [--tokenizer NAME]` with OUT a fine-tuned classifier.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mae_dat.attack import DiscreteAdversary, ShareController, discrete_adversary, unit
from mae_dat.config import AttackConfig, FinetuneConfig, load_config
from mae_dat.finetune import evaluated_config, held_out_images, load_classifier
from mae_dat.tokenizer import VisualTokenizer, load_tokenizer, share_changed

RADII = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
SHARES = (0.05, 0.15)
ATTACKS = {
    "random words": AttackConfig("random"),
    "Algorithm 1": AttackConfig("paper"),
    "DAT": AttackConfig("released", random_start=0.0),
    "DAT, 10 steps": AttackConfig("released", random_start=0.0, steps=10),
}


def exactness(tokenizer: VisualTokenizer, image: Tensor) -> str:
    """PSNR, drift of the words under reconstruction, and words that bfloat16 gets wrong."""
    words, reconstruction = tokenizer.encode(image), tokenizer.reconstruct(image)
    psnr = (-10 * (reconstruction - image).square().mean((1, 2, 3)).log10()).mean()
    drift = share_changed(words, tokenizer.encode(reconstruction))
    with torch.autocast(image.device.type, torch.bfloat16):
        flipped = share_changed(words, tokenizer.encode(image))
    return f"PSNR {psnr:.2f} dB; words of Q(x) that are not those of x {drift:.2%}; bfloat16 changes {flipped:.2%}"


def attacked(attack: AttackConfig, share: float, run: Callable[[AttackConfig], DiscreteAdversary]) -> DiscreteAdversary:
    """The adversary that changes this share of the words."""
    attack = dataclasses.replace(attack, share=share)
    if not attack.moves_pixels:
        return run(attack)
    controller = ShareController(attack)
    controller.find(lambda eps: float(run(dataclasses.replace(attack, eps=eps)).changed))
    return run(controller.apply(attack))


def damage(image: Tensor, loss_of: Callable[[Tensor], Tensor], tokenizer: VisualTokenizer) -> None:
    """Prints the loss of pictures, of their reconstructions and of adversaries with equally many changed words."""
    with torch.no_grad():
        clean, decoded = loss_of(image).item(), loss_of(tokenizer.reconstruct(image)).item()
    print(f"\nloss {clean:.3f}; of the reconstructions {decoded:.3f}")
    print("   words   " + "   ".join(f"{name:>14}" for name in ATTACKS))
    for share in SHARES:
        losses = []
        for attack in ATTACKS.values():
            found = attacked(
                attack, share, lambda one: discrete_adversary(image, loss_of, tokenizer, one, torch.Generator())
            )
            with torch.no_grad():
                losses.append(loss_of(found.adversarial).item())
        print(f"{share:8.0%}   " + "   ".join(f"{loss:14.3f}" for loss in losses))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("classifier", type=Path, help="output folder of a fine-tuning")
    parser.add_argument("--data_path", required=True)
    parser.add_argument("--tokenizer", default="embedded")
    parser.add_argument("--images", type=int, default=200)
    options = parser.parse_args()
    config, classes = evaluated_config(
        options.classifier, load_config(FinetuneConfig, ["--data_path", options.data_path])
    )
    images = held_out_images(config, classes)
    model = load_classifier(options.classifier, config, images.classes).eval()
    tokenizer = load_tokenizer(options.tokenizer)
    chosen = [images[index * len(images) // options.images] for index in range(options.images)]
    image = torch.stack([one["image"] for one in chosen])
    label = torch.tensor([one["label"] for one in chosen])
    with torch.no_grad():
        print(exactness(tokenizer, image))
        reconstruction = tokenizer.reconstruct(image)
        words = tokenizer.encode(reconstruction)
    generator = torch.Generator().manual_seed(0)
    direction = unit(torch.randn(image.shape, generator=generator))
    print("   eps   changed by the attack   by a random direction   RMS in grey levels of 255")
    for eps in RADII:
        attack = AttackConfig("released", eps, random_start=0.0)
        found = discrete_adversary(image, lambda x: F.cross_entropy(model(x), label), tokenizer, attack, generator)
        with torch.no_grad():
            moved = share_changed(words, tokenizer.encode((reconstruction + eps * direction).clamp(0, 1)))
        level = 255 * eps / image[0].numel() ** 0.5
        print(f"{eps:6.2f} {found.changed:23.2%} {moved:23.2%} {level:27.2f}")
    damage(image, lambda x: F.cross_entropy(model(x), label), tokenizer)


if __name__ == "__main__":
    main()
