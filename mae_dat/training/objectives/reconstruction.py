"""Masked reconstruction (He et al., 2021), of pixels and of visual words."""

from typing import Any

import torch
from torch import Tensor, nn

from mae_dat.attacks.discrete import encode_words
from mae_dat.data.image_set import Batch
from mae_dat.models.mae import MaskedAutoencoder, mask_noise, masked_mse
from mae_dat.models.modes import unwrap_ddp
from mae_dat.models.tokenizer.base import VisualTokenizer
from mae_dat.training.objectives.base import Objective, Parts


class MaskedReconstruction(Objective):
    """He et al. 2021: predict the removed patches of the *clean* picture; mean squared error over them.

    With a tokenizer the target is its words of the clean picture, by their mean negative log-likelihood over the
    removed patches, in nats a word; with `words_weight` as the second of two targets, weighted so. The model then has
    a word head (`add_word_head`).
    """

    def __init__(
        self,
        mask_ratio: float,
        norm_pix: bool,
        tokenizer: VisualTokenizer | None = None,
        words_weight: float | None = None,
    ) -> None:
        self.mask_ratio, self.norm_pix = mask_ratio, norm_pix
        self.tokenizer, self.words_weight = tokenizer, words_weight

    def prepare(self, model: nn.Module, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Any]:
        """The image, with (target patches (B, N, P) of the clean picture, mask noise (B, N), its words (B, h, w) where
        they are a target)."""
        image, inner = batch["image"], unwrap_ddp(model)
        assert isinstance(inner, MaskedAutoencoder)
        noise = mask_noise(len(image), inner.num_patches, generator, image.device)
        words = (encode_words(self.tokenizer, image),) if self.tokenizer else ()
        return image, (inner.target(image, self.norm_pix), noise, *words)

    def loss(self, model: nn.Module, image: Tensor, context: tuple[Tensor, ...]) -> Tensor:
        """Error of the prediction from a view of the picture, at its removed patches."""
        return self.parts(model, image, context)["loss"]

    def parts(self, model: nn.Module, image: Tensor, context: tuple[Tensor, ...]) -> Parts:
        """As `loss`; where words are a target also both losses and the share of words that are the most probable."""
        target, noise, *words = context
        if not words:
            prediction, mask = model(image, self.mask_ratio, noise)
            return {"loss": masked_mse(prediction.float(), target, mask)}
        by_patch = unwrap_ddp(model).patch_words(words[0])
        prediction, mask, surprise, best = model(image, self.mask_ratio, noise, by_patch)
        of_words = surprise.mean()
        told = {"loss_words": of_words, "word_accuracy": best.mean()}
        if self.words_weight is None:
            return {"loss": of_words, **told}
        of_pixels = masked_mse(prediction.float(), target, mask)
        return {"loss": of_pixels + self.words_weight * of_words, "loss_pixels": of_pixels, **told}

    def known_words(self, tokenizer: VisualTokenizer, context: tuple[Tensor, ...]) -> Tensor | None:
        """The words that are a target, if they are this tokenizer's."""
        return context[2] if tokenizer is self.tokenizer else None
