"""Suites of attacked images: pixel attacks, AutoAttack and changed visual words, all on the clean images and in
float32."""

import torch
from torch import Tensor

from mae_dat.attacks.auto_attack import AUTO_ATTACK_EPS, auto_attack, require_auto_attack
from mae_dat.attacks.discrete import image_generator
from mae_dat.attacks.pixel import PIXEL_ATTACKS, PixelAttack, pixel_adversary
from mae_dat.attacks.word_budget import WORD_ATTACK_KINDS, WORD_SHARES, WordAttack, word_hits
from mae_dat.config.groups import ImageSize
from mae_dat.models.modes import Network
from mae_dat.robustness.suites.base import Adversary, ImagePass, NetworkInput, Suite
from mae_dat.robustness.suites.sets import BenchmarkSet
from mae_dat.robustness.suites.sources import SuiteSources

AUTO_ATTACK = f"autoattack-{round(255 * AUTO_ATTACK_EPS)}/255"
WORD_SUITES = {f"words-{kind}": kind for kind in ("random", "symbolic")}
EXACT_LOSSES = "exact losses"
"""Key of a protocol: the candidates of each step of the symbolic adversary whose loss is computed."""
ATTACK_SUITES = (*PIXEL_ATTACKS, AUTO_ATTACK, *WORD_SUITES)
assert set(WORD_SUITES.values()) == set(WORD_ATTACK_KINDS)


def clean_images(sources: SuiteSources, network_input: NetworkInput, name: str) -> BenchmarkSet:
    """Return the clean images for a network's input, as the cell of the suite `name` that is made from them."""
    (images,) = sources.limited_sets(sources.clean_suite, corrupted=True)
    return images.for_input(*network_input).named(name)


def index_note(sources: SuiteSources) -> dict[str, str]:
    """Return the protocol's note on image indices, which random draws depend on; empty unless a subset is measured."""
    return {} if sources.subset is None else {"numbers": "places in the whole folder"}


def build_pixel_attack(sources: SuiteSources, name: str, title: str, network_input: NetworkInput) -> Suite:
    """Build a suite of FGSM or PGD."""
    attack, seed = PIXEL_ATTACKS[name], sources.settings.seed
    image_pass = ImagePass(
        clean_images(sources, network_input, name), adversary=_pixel_adversary(attack, seed), float32=True
    )
    protocol = {"precision": "fp32", **index_note(sources), "attack": str(attack), "seed": str(seed)}
    return Suite(name, title, (image_pass,), official=True, extra_protocol=protocol)


def _pixel_adversary(attack: PixelAttack, seed: int) -> Adversary:
    def adversary(network: Network, image: Tensor, label: Tensor, folder_index: Tensor) -> Tensor:
        # A generator for each image, so that its random start does not depend on the batch.
        generators = [image_generator(seed, i) for i in folder_index.tolist()]
        return pixel_adversary(network, image, label, attack, generators=generators)

    return adversary


def build_auto_attack(sources: SuiteSources, name: str, title: str, network_input: NetworkInput) -> Suite:
    """Build the suite of AutoAttack. Raises MissingInputError or ConfigError if it cannot run."""
    settings = sources.settings
    images = clean_images(sources, network_input, name)
    require_auto_attack(sources.outputs)

    def adversary(network: Network, image: Tensor, label: Tensor, folder_index: Tensor) -> Tensor:
        with torch.enable_grad():
            return auto_attack(network, image, label, seed=settings.seed)  # type: ignore[arg-type]

    protocol = {
        "precision": "fp32",
        **index_note(sources),
        "attack": f"standard, consecutive batches of {settings.batch_size}",
        "seed": str(settings.seed),
    }
    # AutoAttack draws random numbers for the whole batch, so the result depends on the batches.
    image_pass = ImagePass(images, adversary=adversary, float32=True, fixed_batches=True)
    return Suite(name, title, (image_pass,), official=True, extra_protocol=protocol, packages=("torchattacks",))


def build_word_attack(sources: SuiteSources, name: str, title: str, network_input: NetworkInput) -> Suite:
    """Build the suite of symbolic or random words, with a cell for each share of changed words."""
    images = clean_images(sources, network_input, name)
    attack = _word_attack(sources, network_input.size_HW)

    def hits(network: Network, image: Tensor, label: Tensor, folder_index: Tensor) -> Tensor:
        return word_hits(
            network,  # type: ignore[arg-type]
            sources.tokenizer,
            image=image,
            label=label,
            index=folder_index,
            kind=WORD_SUITES[name],
            attack=attack,
        )

    protocol = {
        "precision": "fp32",
        **index_note(sources),
        **sources.tokenizer_facts,
        "steps": str(attack.steps),
        EXACT_LOSSES: str(attack.rescore) if WORD_SUITES[name] == "symbolic" else "",
        "seed": str(attack.seed),
    }
    cells = tuple(f"{share:g}" for share in attack.shares)
    image_pass = ImagePass(images, cells, word_hits=hits, float32=True)
    return Suite(name, title, (image_pass,), official=True, extra_protocol=protocol)


def _word_attack(sources: SuiteSources, size_HW: ImageSize) -> WordAttack:
    """Return the attack with the shares that give different numbers of words at this size.

    Raises InputSizeError for a size that does not fit the tokenizer.
    """
    tokenizer = sources.tokenizer
    tokenizer.check(torch.zeros(1, 3, *size_HW))
    words = (size_HW[0] // tokenizer.factor) * (size_HW[1] // tokenizer.factor)
    # Of shares that round to the same number of words, the smallest is kept.
    share_of_count = {round(share * words): share for share in reversed(WORD_SHARES)}
    settings = sources.settings
    return WordAttack(tuple(sorted(share_of_count.values())), rescore=settings.rescore, seed=settings.seed)
