"""The models of `torch.hub`: one function for each name, with released weights or the weights of a file.

    model = torch.hub.load(REPOSITORY, "mae_dat_demo", pretrained=True, trust_repo=True)
    model = torch.hub.load("FOLDER", "mae_dat_demo", pretrained=True, source="local")   # no network

`pretrained` is False (fresh weights), True (released weights, downloaded once, verified on every load) or the path of a
weights file in any format of `docs/reference/formats.md`. Further arguments go to the constructor. Images are (B, 3, H,
W) with pixels in [0, 1]: every model normalizes them itself. Models are returned in evaluation mode.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mae_dat.storage.released import released_weights

if TYPE_CHECKING:  # so that torch.hub.list and torch.hub.help do not wait for torch
    from mae_dat.models.classifier import Classifier
    from mae_dat.models.mae import MaskedAutoencoder
    from mae_dat.models.tokenizer import VisualTokenizer
    from mae_dat.models.weights.named_models import Pretrained

__all__ = [
    "mae_dat_demo",
    "mae_vit_base_patch16",
    "mae_vit_huge_patch14",
    "mae_vit_huge_patch14_dat",
    "mae_vit_large_patch16",
    "resnet50_dat",
    "vit_base_patch16",
    "vit_base_patch16_dat",
    "vit_huge_patch14",
    "vit_large_patch16",
    "vqgan_demo",
    "vqgan_f8_16384",
    "vqgan_f16_1024",
]


# ---- masked autoencoders ----


def mae_vit_base_patch16(pretrained: Pretrained = False, decoder: bool = True, **settings: Any) -> MaskedAutoencoder:
    """Masked autoencoder ViT-B/16, 112 M parameters with its decoder: model(image, mask_ratio, noise) -> patches, mask.

    Released weights: MAE's pretraining with decoder (1600 epochs, predicts normalized pixels; CC-BY-NC-4.0, not for
    commercial use). MAE's better known mae_pretrain_vit_base.pth contains only the encoder: load it with
    decoder=False, which leaves the decoder as initialized. `settings`: img_size, in_chans, mean, std, ...
    """
    return _autoencoder("mae_vit_base_patch16", pretrained, decoder, settings)


def mae_vit_large_patch16(pretrained: Pretrained = False, decoder: bool = True, **settings: Any) -> MaskedAutoencoder:
    """Masked autoencoder ViT-L/16, 330 M parameters with its decoder; weights and arguments as mae_vit_base_patch16."""
    return _autoencoder("mae_vit_large_patch16", pretrained, decoder, settings)


def mae_vit_huge_patch14(pretrained: Pretrained = False, decoder: bool = True, **settings: Any) -> MaskedAutoencoder:
    """Masked autoencoder ViT-H/14, 657 M parameters with its decoder; weights and arguments as mae_vit_base_patch16."""
    return _autoencoder("mae_vit_huge_patch14", pretrained, decoder, settings)


# ---- classifiers ----


def vit_base_patch16(pretrained: Pretrained = False, **settings: Any) -> Classifier:
    """ViT-B/16 classifier of pixels in [0, 1]: logits (B, 1000). Released: MAE fine-tuned, 83.7 % top-1 (CC-BY-NC-4.0).

    `settings`: img_size, drop_path, in_chans, and num_classes (if given, the head is new).
    """
    return _classifier("vit_base_patch16", pretrained, settings)


def vit_large_patch16(pretrained: Pretrained = False, **settings: Any) -> Classifier:
    """ViT-L/16 classifier of pixels in [0, 1]: logits (B, 1000). Released: MAE fine-tuned, 86.0 % top-1 (CC-BY-NC-4.0).

    `settings` as vit_base_patch16.
    """
    return _classifier("vit_large_patch16", pretrained, settings)


def vit_huge_patch14(pretrained: Pretrained = False, **settings: Any) -> Classifier:
    """ViT-H/14 classifier of pixels in [0, 1]: logits (B, 1000). Released: MAE fine-tuned, 86.9 % top-1 (CC-BY-NC-4.0).

    `settings` as vit_base_patch16.
    """
    return _classifier("vit_huge_patch14", pretrained, settings)


def resnet50_dat(pretrained: Pretrained = False, **settings: Any) -> Classifier:
    """ResNet50 classifier of pixels in [0, 1]: logits (B, 1000). Released: trained with DAT, 76.5 % top-1, 74.16 mCE.

    `settings`: num_classes (if given, the head is new), in_chans, drop_path.
    """
    return _classifier("resnet50_dat", pretrained, settings)


def vit_base_patch16_dat(pretrained: Pretrained = False, **settings: Any) -> Classifier:
    """ViT-B/16 classifier (class token) of pixels in [0, 1]. Released: trained with DAT, 81.5 % top-1, 44.65 mCE.

    `settings` as vit_base_patch16.
    """
    return _classifier("vit_base_patch16_dat", pretrained, settings)


def mae_vit_huge_patch14_dat(pretrained: Pretrained = False, **settings: Any) -> Classifier:
    """ViT-H/14 classifier of pixels in [0, 1]. Released: MAE fine-tuned with DAT, 87.0 % top-1, 31.40 mCE.

    Made from MAE's weights (CC-BY-NC-4.0, not for commercial use). `settings` as vit_base_patch16.
    """
    return _classifier("mae_vit_huge_patch14_dat", pretrained, settings)


def mae_dat_demo(pretrained: Pretrained = False) -> Classifier | MaskedAutoencoder:
    """The project's own small model for 64 px, pixels in [0, 1], pretrained with MAE, fine-tuned with DAT; included.

    Apache-2.0. What it was trained on and its accuracy are in mae_dat/models/weights/demo_classifier.json.
    """
    from mae_dat.models.weights.open import open_model, plan_model
    from mae_dat.models.weights.read import read_model_file

    if pretrained:
        return open_model(_source("mae_dat_demo", pretrained)).encoder()
    return plan_model(read_model_file("mae_dat_demo")).build().eval()  # type: ignore[return-value]


# ---- visual words ----


def vqgan_f8_16384(pretrained: Pretrained = False) -> VisualTokenizer:
    """VQGAN tokenizer, factor 8, 16,384 words, 68 M parameters: the configuration of DAT's (latent-diffusion, MIT).

    encode(image) -> words (B, H/8, W/8), decode(words) -> image, both with pixels in [0, 1]; any sides divisible by 8.
    """
    return _tokenizer("vqgan_f8_16384", pretrained)


def vqgan_f16_1024(pretrained: Pretrained = False) -> VisualTokenizer:
    """VQGAN tokenizer, factor 16, 1,024 words, 72 M parameters (taming-transformers, ImageNet, MIT).

    encode(image) -> words (B, H/16, W/16), decode(words) -> image, both with pixels in [0, 1].
    """
    return _tokenizer("vqgan_f16_1024", pretrained)


def vqgan_demo(pretrained: Pretrained = False) -> VisualTokenizer:
    """The project's own light tokenizer for 64 px, factor 4, 512 words, 0.5 M parameters; included.

    encode(image) -> words (B, H/4, W/4), decode(words) -> image, both with pixels in [0, 1].
    """
    return _tokenizer("vqgan_demo", pretrained)


# ---- building ----


def _autoencoder(name: str, pretrained: Pretrained, decoder: bool, settings: dict[str, Any]) -> MaskedAutoencoder:
    from mae_dat.models.weights.named_models import build_named_autoencoder

    return build_named_autoencoder(name, pretrained, decoder, settings)


def _classifier(name: str, pretrained: Pretrained, settings: dict[str, Any]) -> Classifier:
    from mae_dat.models.weights.named_models import build_named_classifier

    return build_named_classifier(name, pretrained, settings)


def _tokenizer(name: str, pretrained: Pretrained) -> VisualTokenizer:
    from mae_dat.models.tokenizer import VQGAN, VQGAN_PRESETS, LightTokenizer, load_tokenizer

    if pretrained:
        return load_tokenizer(_source(name, pretrained))
    model = released_weights()[name].model
    return (VQGAN(VQGAN_PRESETS[model]) if model in VQGAN_PRESETS else LightTokenizer()).freeze()


def _source(name: str, pretrained: Pretrained) -> str | Path:
    """Return the name of the released weights, or the file or other name that was given instead."""
    return name if isinstance(pretrained, bool) else pretrained
