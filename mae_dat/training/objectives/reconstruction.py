"""Masked reconstruction (He et al. 2021): predict the removed patches, as pixels or as visual words."""

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
    """He et al. 2021: predict the removed patches of the *clean* image; mean squared error over them.

    With a tokenizer the target is its words of the clean image, with their mean negative log-likelihood over the
    removed patches as the loss, in nats per word. With `words_weight` pixels and words are both targets, and the words'
    loss has this weight. The model then needs a word head (`add_word_head`).
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
        """Return the image, and targets and mask for every view of it.

        These are (target patches (B, N, P) of the clean image, mask noise (B, N)), followed by the image's words
        (B, h, w) if they are a target.
        """
        image = batch["image"]
        autoencoder = unwrap_ddp(model)
        assert isinstance(autoencoder, MaskedAutoencoder)
        noise = self.draw_mask(autoencoder, image, generator)
        words = (encode_words(self.tokenizer, image),) if self.tokenizer else ()
        return image, (autoencoder.target(image, self.norm_pix), noise, *words)

    def draw_mask(self, model: MaskedAutoencoder, image: Tensor, generator: torch.Generator) -> Tensor:
        """Draw the step's random mask as noise (B, N): the model keeps the patches with the smallest noise."""
        return mask_noise(len(image), model.num_patches, generator, image.device)

    def loss(self, model: nn.Module, image: Tensor, prepared: tuple[Tensor, ...]) -> Tensor:
        """Compute the error of the prediction from a view (B, C, H, W), at the removed patches; a scalar."""
        return self.parts(model, image, prepared)["loss"]

    def parts(self, model: nn.Module, image: Tensor, prepared: tuple[Tensor, ...]) -> Parts:
        """Compute `loss`; if words are a target, also both losses and the share of words predicted right."""
        target, noise, *words = prepared
        if not words:
            prediction, mask = model(image, self.mask_ratio, noise)
            return {"loss": masked_mse(prediction.float(), target, mask)}
        words_by_patch = unwrap_ddp(model).patch_words(words[0])
        prediction, mask, negative_log_likelihood, is_best = model(image, self.mask_ratio, noise, words_by_patch)
        words_loss = negative_log_likelihood.mean()
        logged = {"loss_words": words_loss, "word_accuracy": is_best.mean()}
        if self.words_weight is None:
            return {"loss": words_loss, **logged}
        pixels_loss = masked_mse(prediction.float(), target, mask)
        return {"loss": pixels_loss + self.words_weight * words_loss, "loss_pixels": pixels_loss, **logged}

    def known_words(self, tokenizer: VisualTokenizer, prepared: tuple[Tensor, ...]) -> Tensor | None:
        """Return the target words (B, h, w), if they are this tokenizer's."""
        return prepared[2] if tokenizer is self.tokenizer else None
