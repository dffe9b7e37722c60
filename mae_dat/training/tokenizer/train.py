"""Train a light tokenizer on any folders of images: `mae-dat tokenizer train --data_path DIR ...
--output_dir OUT`.

Reconstruction + vector quantization + a PatchGAN (Esser et al. 2021, eqs. 4-7, without the perceptual term, whose
network would have to be downloaded), with codes that fell out of use restarted on current latents. Running the same
command again resumes. The result, `OUT/tokenizer.safetensors` with its card `OUT/tokenizer.json`, is used as
`--tokenizer OUT/tokenizer.safetensors`.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mae_dat.config.commands.tokenizer import TokenizerConfig
from mae_dat.data.loader import ImageLoader
from mae_dat.models.modes import autocast
from mae_dat.models.tokenizer.light import LightConfig, LightTokenizer
from mae_dat.models.tokenizer.quantize import look_up, straight_through, vq_loss
from mae_dat.runtime.console import Console, console_for_command
from mae_dat.runtime.device import amp_dtype
from mae_dat.training.objectives.base import Parts
from mae_dat.training.tokenizer.trainer import TokenizerObjective, train_to_file


class VQReconstruction(TokenizerObjective):
    """Reconstruction + vector quantization + PatchGAN; holds tokenizer, discriminator and the discriminator's
    optimizer."""

    config: TokenizerConfig

    def __init__(self, config: TokenizerConfig, device: torch.device) -> None:
        from taming.modules.discriminator.model import NLayerDiscriminator, weights_init

        super().__init__(config, device)
        torch.manual_seed(config.seed)
        size = {field.name: getattr(config, field.name) for field in dataclasses.fields(LightConfig)}
        self.tokenizer = LightTokenizer(LightConfig(**size)).to(device)
        self.discriminator = NLayerDiscriminator(config.in_chans, ndf=32, n_layers=2).apply(weights_init).to(device)
        self.discriminator_optimizer = torch.optim.Adam(
            self.discriminator.parameters(), lr=config.lr / 4, betas=(0.5, 0.9)
        )
        self.uses_K = torch.zeros(config.num_words, device=device)
        """How often each word was used since codes were restarted."""
        self.precision = amp_dtype(config.precision, device)
        self._image, self._output = torch.empty(0), torch.empty(0)  # of the current step, for the discriminator

    def build_optimizer(self) -> torch.optim.Optimizer:
        """Return the optimizer of the tokenizer."""
        return torch.optim.Adam(self.tokenizer.parameters(), betas=(0.9, 0.99))

    @property
    def gan_joined(self) -> bool:
        """Whether the PatchGAN takes part in the current step."""
        return self.steps_done >= self.config.gan_start * self.config.steps

    def parts(self, model: nn.Module, image: Tensor, context: torch.Generator) -> Parts:
        """Compute the `loss` of an image (B, C, H, W) in [0, 1], and the `squared_error` of its reconstruction."""
        config, tokenizer = self.config, self.tokenizer
        latent = tokenizer.latent(image).float()
        self.restart_codes(latent.detach(), context)
        words = tokenizer.words_of(latent.detach())
        quantized = look_up(words, tokenizer.codebook)
        output = tokenizer.pixels(straight_through(latent, quantized)).float()
        self.uses_K += torch.bincount(words.flatten(), minlength=config.num_words)
        squared_error = F.mse_loss(output, image)
        reconstruction = F.l1_loss(output, image) + 5 * squared_error
        loss = reconstruction + vq_loss(latent, quantized, config.beta)
        if self.gan_joined:
            loss = loss + self.adversarial(reconstruction, output)
        self._image, self._output = image, output.detach()
        return {"loss": loss, "squared_error": squared_error}

    def adversarial(self, reconstruction: Tensor, output: Tensor) -> Tensor:
        """Compute the generator's loss, a scalar, from the scalar reconstruction loss and the output (B, C, H, W).

        It is weighted so that at the last layer its gradient is `gan_weight` times the reconstruction's (eq. 7).
        """
        self.discriminator.eval()
        fooling = -self.discriminator(2 * output - 1).float().mean()
        last = self.tokenizer.decoder[-2].weight
        assert isinstance(last, Tensor)
        (by_reconstruction,) = torch.autograd.grad(reconstruction, last, retain_graph=True)
        (by_fooling,) = torch.autograd.grad(fooling, last, retain_graph=True)
        balance = (by_reconstruction.norm() / (by_fooling.norm() + 1e-6)).clamp(max=1e4).detach()
        return self.config.gan_weight * balance * fooling

    def after_update(self, skip: Tensor) -> None:
        """Update the discriminator with the hinge loss on the step's images and reconstructions."""
        if not self.gan_joined or skip:
            return
        self.discriminator.train()
        with autocast(self.device, self.precision):
            real = self.discriminator(2 * self._image - 1).float()
            fake = self.discriminator(2 * self._output - 1).float()
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        ((1 - real).relu().mean() + (1 + fake).relu().mean()).div(2).backward()
        self.discriminator_optimizer.step()

    def changed_in_forward(self) -> Iterable[Tensor]:
        """Return the codes, which are restarted, and the counts of their use."""
        return self.tokenizer.codes, self.uses_K

    def restart_codes(self, latent: Tensor, generator: torch.Generator) -> None:
        """Replace unused codes by random vectors of the batch's latent (B, D, h, w): all codes at step 0, later those
        unused for `restart_every` steps."""
        if self.steps_done % self.config.restart_every or self.steps_done > 0.8 * self.config.steps:
            return
        if not latent.isfinite().all():  # the loss will not be finite either; until then the codes stay as they were
            return
        unused = self.uses_K == 0 if self.steps_done else torch.ones_like(self.uses_K, dtype=torch.bool)
        flat = latent.permute(0, 2, 3, 1).flatten(0, 2)
        chosen = torch.randint(len(flat), (int(unused.sum()),), generator=generator, device=self.device)
        with torch.no_grad():
            self.tokenizer.codes[unused] = flat[chosen]
        self.uses_K.zero_()

    def measure(self, loader: ImageLoader) -> dict[str, float]:
        """Return figures on held-out images."""
        return measure_reconstruction(self.tokenizer, loader, self.device)

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint."""
        return {
            "discriminator": self.discriminator.state_dict(),
            "judge": self.discriminator_optimizer.state_dict(),
            "uses": self.uses_K,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict`."""
        self.discriminator.load_state_dict(state["discriminator"])
        self.discriminator_optimizer.load_state_dict(state["judge"])
        self.uses_K = state["uses"].to(self.device)


@torch.no_grad()
def measure_reconstruction(tokenizer: LightTokenizer, loader: ImageLoader, device: torch.device) -> dict[str, float]:
    """Return PSNR in dB (mean over images, pixels in [0, 1]), L1, and the share of the codebook in use on held-out
    images."""
    tokenizer.eval()
    psnr, absolute, used, count = 0.0, 0.0, torch.zeros(tokenizer.num_words, device=device), 0
    for batch in loader:
        image = batch["image"].to(device)
        words = tokenizer.encode(image)
        error = tokenizer.decode(words) - image
        psnr += float((-10 * error.square().mean((1, 2, 3)).clamp(min=1e-10).log10()).sum())
        absolute += float(error.abs().mean((1, 2, 3)).sum())
        used += torch.bincount(words.flatten(), minlength=tokenizer.num_words)
        count += len(image)
    return {
        "psnr_db": psnr / count,
        "l1": absolute / count,
        "codebook_in_use": float((used > 0).float().mean()),
        "pictures": count,
    }


def train_tokenizer(config: TokenizerConfig, console: Console) -> Path:
    """Train a tokenizer and write it with its card; returns its path."""
    return train_to_file(config, console, VQReconstruction)


def main(config: TokenizerConfig) -> None:
    """Run the command."""
    train_tokenizer(config, console_for_command())
